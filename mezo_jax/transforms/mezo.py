r"""MeZO, ZO-SGD: :math:`\theta \leftarrow \theta - \eta (g z + \lambda\theta)`.

Malladi et al. (2023), Algorithm 1 and Definition 2; the estimate ``g z`` is
`mezo_jax.spsa`.
"""

from collections.abc import Callable, Mapping
from typing import Any
import warnings

import jax
from jax.core import Tracer
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, dtypes, paths, sharding, xla
from mezo_jax.directions.base import Directions
from mezo_jax.transforms.accumulate import accumulated, sgd
from mezo_jax.transforms.estimator import Estimator
from mezo_jax.transforms.not_finite import skip_not_finite
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.stochastic_rounding import (
  round_stochastically,
  to_nearest,
)
from mezo_jax.transforms.types import ZerothOrderTransformation


def mezo(
    learning_rate: float | optax.Schedule | Mapping[str, Any],
    eps: float | optax.Schedule | Mapping[str, Any] | None = None,
    *,
    key: jax.Array | int | None = None,
    directions: Directions | str | None = None,
    num_samples: int | None = None,
    micro_batches: int | None = None,
    estimator: Estimator | None = None,
    weight_decay: float = 0.0,
    decay: Any = None,
    stochastic_rounding: bool = True,
    fold_every: int | None = None,
) -> ZerothOrderTransformation:
  r"""Memory-efficient zeroth-order SGD.

  It is to `mezo_jax.spsa` what `optax.sgd` is to `optax.trace`::

    skip_not_finite(chain(spsa(...), add_decayed_weights(...),
                          scale_by_learning_rate(...), round_stochastically()))

  Variants of MeZO are other estimators with the same links after them:
  ``mezo(1e-6, estimator=variants.hizoo(1e-3, key=0))``.

  Put ``update`` and `optax.apply_updates` in one `jax.jit` with params and
  state donated, or call `mezo_jax.make_step`; then no tree of updates is built.
  Like `spsa`, it must be the first link of a chain: ``chain(mezo(...),
  clip_by_global_norm(1e-3))`` clips the step.

  Args:
    learning_rate: :math:`\eta`: a number, a schedule of the steps that were not
      skipped, or groups ``{regular expression: number or schedule}``, of which
      the first that is found in a parameter's path counts. The paper uses 1e-7
      to 1e-6 for all weights of a 13B model, 5e-5 to 1e-4 with LoRA, and 1e-3
      to 1e-2 with prefixes.
    eps: Perturbation scale :math:`\epsilon`, in the same forms. Defaults to
      1e-3. The paper uses 1e-3 for all weights, 1e-2 with LoRA (1e-3 on
      RoBERTa), and 1e-1 with prefixes.
    key: A `jax.random.key` or an integer seed.
    directions: Distribution of z and the leaves that are perturbed, updated and
      decayed, as in `mezo_jax.spsa`. Defaults to `mezo_jax.Normal()`.
    num_samples: Number of directions per step. Defaults to 1.
    micro_batches: Number of equal parts in which the batch is evaluated, as in
      `mezo_jax.spsa`. Defaults to 1.
    estimator: `mezo_jax.spsa` with other options, or a variant from
      `mezo_jax.variants`, in place of the five arguments above.
    weight_decay: :math:`\lambda`. The product :math:`\lambda\theta` is rounded
      to float32 before it is added, so all programs give the same bits.
    decay: The leaves that are decayed, as `Directions.mask`. Defaults to None,
      for all matrices except those with names of biases and norms; a warning
      lists the choice.
    stochastic_rounding: Whether bfloat16 and float16 weights are rounded
      stochastically (`mezo_jax.round_stochastically`), with bits of the step's
      key, instead of to nearest.
    fold_every: Apply updates every k steps. Defaults to 1. In between, losses
      are evaluated at the weights plus the accumulated updates, so the
      trajectory is unchanged. It pays where updates take long compared with
      forward passes (short prompts) and terms of z are cheap (`LowRank`), under
      `mezo_jax.make_step`. It needs one learning rate and eps, no weight decay,
      and no links after it that change updates. Call ``step.flush(params,
      state)`` before the weights are read.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose ``update`` has the
    arguments of that of `spsa`. Updates have the dtypes of the parameters. The
    first element of its state is the estimator's state.

  Raises:
    ValueError: As `spsa`; for ``estimator`` together with options of `spsa`;
      for a learning rate that is not a number, a schedule or groups; for weight
      decay with a mask of elements; and for ``fold_every`` below 1, or above 1
      with weight decay, groups or an estimator that has its own ``apply``.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1, Tables 15 and 16.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> tx = mezo(learning_rate=1e-2, key=jax.random.key(0))
    >>> loss_fn = lambda params, x: jnp.sum((params - x) ** 2)
    >>> params = jnp.zeros(3)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(
    ...     None, state, params, value_fn=loss_fn, x=jnp.ones(3))
    >>> params = optax.apply_updates(params, updates)
  """
  given: dict[str, Any] = dict(
      eps=eps, key=key, directions=directions, num_samples=num_samples,
      micro_batches=micro_batches)
  given = {name: value for name, value in given.items() if value is not None}
  if estimator is None:
    if key is None:
      raise ValueError('mezo needs key, a jax.random.key or an integer seed, '
                       'or an estimator that has one.')
    estimator = spsa(**given)
  elif not isinstance(estimator, Estimator):
    raise ValueError('estimator must be mezo_jax.spsa(...) or a variant such '
                     f'as mezo_jax.variants.hizoo(...), got {estimator!r}.')
  elif given:
    raise ValueError(f'mezo was given an estimator and {", ".join(given)}: '
                     'give those to the estimator.')
  estimator = estimator.in_float32()
  options = estimator.options
  learning_rate = arguments.rate('learning_rate', learning_rate)
  arguments.number('weight_decay', weight_decay, least=0)
  never = not isinstance(weight_decay, Tracer) and weight_decay == 0
  finish = rounding(options.key, options.directions, stochastic_rounding)
  if fold_every is not None and arguments.whole('fold_every', fold_every) > 1:
    if not never or isinstance(learning_rate, Mapping) or isinstance(
        options.eps, Mapping) or not estimator.is_linear:
      raise ValueError('fold_every above 1 keeps coefficients of z alone: it '
                       'needs weight_decay=0, one learning_rate and eps, no '
                       'groups, and an estimator whose updates are those of '
                       'spsa.')
    return accumulated(estimator, fold_every, sgd(learning_rate), finish)

  def decayed(params):
    if decay is None:
      chosen = paths.decayed(params, options.directions.stacked)
    else:
      chosen = jax.tree.unflatten(
          paths.structure(params), paths.resolved(params, decay, 'decay'))
    return jax.tree.map(lambda a, b: bool(a and b),
                        _used(params, options.directions), chosen)

  def add_decay(updates, params):
    """`optax.add_decayed_weights` of float32 products, both rounded."""
    if never:
      return updates
    def add(update, p):
      return xla.rounded(update) + xla.rounded(weight_decay * _wide(p))
    return jax.tree.map(add, updates, sharding.fetched(params))

  tx = skip_not_finite(optax.chain(
      estimator,
      optax.masked(optax.stateless(add_decay), decayed),
      by_group(optax.scale_by_learning_rate, learning_rate),
      finish))

  def init_fn(params):
    if not isinstance(weight_decay, Tracer) and not never:
      selected = options.directions.selected(params)
      if any(jnp.ndim(m) for m in jax.tree.leaves(selected)):
        raise ValueError('weight_decay would move elements that the mask '
                         'leaves out: leave it at 0 with a mask of elements.')
      if decay is None:
        _show(params, decayed(params))
    return tx.init(params)

  return ZerothOrderTransformation(init_fn, tx.update)


def _wide(x):
  """Returns half precision as float32."""
  return x.astype(dtypes.wide(x.dtype)) if paths.is_floating(x) else x


def rounding(key: Any, directions: Directions, stochastic: bool
             ) -> optax.GradientTransformation:
  """Returns the last link: updates in the dtypes of the parameters."""
  if not arguments.boolean('stochastic_rounding', stochastic):
    return to_nearest()
  return round_stochastically(key, lambda params: _used(params, directions))


def _used(params, directions: Directions):
  return jax.tree.map(lambda m: m is not False, directions.selected(params))


def by_group(make: Callable[..., Any], value: Any
             ) -> optax.GradientTransformation:
  """Returns ``make(value)``; for groups, one of each for its parameters."""
  if not isinstance(value, Mapping):
    return make(value)
  return optax.partition(
      {group: make(v) for group, v in value.items()},
      lambda params: paths.groups_of(params, value))


def _show(params, decayed) -> None:
  """Warns once about the leaves that were guessed to have weight decay."""
  names = {True: [], False: []}
  for (path, _), d in zip(paths.named_leaves(params),
                          jax.tree.leaves(decayed)):
    names[d].append(path)
  some = lambda of: ', '.join(of[:4]) + (', ...' if len(of) > 4 else '')
  warnings.warn(
      f'weight decay was guessed from names and shapes: {len(names[True])} '
      f'parameters have it ({some(names[True])}), {len(names[False])} do not '
      f'({some(names[False])}). Say decay=..., a mask, to choose.',
      stacklevel=3)
