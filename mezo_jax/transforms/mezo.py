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
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.transforms.accumulate import pending, sgd
from mezo_jax.transforms.evaluate_points import Combine, two_sided
from mezo_jax.transforms.not_finite import skip_not_finite
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.stochastic_rounding import (
  round_stochastically,
  to_nearest,
)
from mezo_jax.transforms.types import ZerothOrderTransformation


def mezo(
    learning_rate: float | optax.Schedule | Mapping[str, Any],
    eps: float | optax.Schedule | Mapping[str, Any] = 1e-3,
    *,
    key: jax.Array | int,
    directions: Directions | str = Normal(),
    combine: Combine | str = two_sided,
    num_samples: int | None = None,
    over: str = 'scan',
    micro_batches: int | None = None,
    weight_decay: float = 0.0,
    decay: Any = None,
    stochastic_rounding: bool = True,
    fold_every: int | None = None,
) -> ZerothOrderTransformation:
  r"""Memory-efficient zeroth-order SGD.

  As `optax.sgd` is to `optax.trace`::

    skip_not_finite(chain(spsa(...), add_decayed_weights(...),
                          scale_by_learning_rate(...), round_stochastically()))

  Like `spsa` it makes its own updates, so in a chain it must be the first link:
  ``chain(clip_by_global_norm(1.0), mezo(...))`` is refused, since the clip
  would have nothing to clip; ``chain(mezo(...), clip_by_global_norm(1e-3))``
  clips the step.

  Put ``update`` and `optax.apply_updates` in one `jax.jit` with params and
  state donated, or call `mezo_jax.make_step`: no tree of updates is then built.

  Args:
    learning_rate: :math:`\eta`, a number or a schedule; or groups of them,
      ``{regular expression: number or schedule}``, by the first that is found
      in a parameter's path. The paper: 1e-7 to 1e-6 for 13B in full, 5e-5 to
      1e-4 with LoRA, 1e-3 to 1e-2 with prefixes.
    eps: :math:`\epsilon`, likewise. The paper: 1e-3 in full, 1e-2 with LoRA (on
      RoBERTa 1e-3), 1e-1 with prefixes.
    key: a `jax.random.key` or an integer seed.
    directions: what z is, and which leaves are perturbed, updated and decayed;
      see `mezo_jax.spsa`, as for the next four.
    combine: How losses become :math:`g`: `two_sided`, `one_sided` or `fzoo`,
      their names, or a `Combine`.
    num_samples: directions per step.
    over: whether they are evaluated one after the other, or in one pass.
    micro_batches: parts that the batch is evaluated in.
    weight_decay: :math:`\lambda`; :math:`\lambda\theta` is of float32, and
      rounded before it is added, in every program alike.
    decay: which leaves are decayed, as `Directions.mask`; None for a guess,
      matrices without names of biases and norms, which a warning spells out.
    stochastic_rounding: whether bfloat16 and float16 weights are rounded
      stochastically (`mezo_jax.round_stochastically`), with bits of the step's
      key, instead of to nearest.
    fold_every: Apply updates every k steps; 1 if None. In between, losses are
      evaluated at the weights plus the accumulated updates, so the trajectory
      is unchanged. It pays where updates take long compared with forwards
      (short prompts) and terms of z are cheap (`LowRank`), under
      `mezo_jax.make_step`, which touches no weights in between. Needs one
      learning rate and eps, no decay, and no links after it in a chain that
      change updates: losses in between would not know of them. Before weights
      are read: ``step.flush(params, state)``.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose ``update`` is that of
    `spsa`, followed by the rest. Updates have the dtypes of the parameters. A
    step whose loss is not finite changes nothing (but adds what is pending,
    where that is due).
    The state is the chain's: `SpsaState` is its first element, with
    ``fold_every`` what is pending the second.

  Raises:
    ValueError: as `spsa`; for a learning rate that is not a number, a schedule
      or groups of them; for weight decay with a mask of elements; and for
      ``fold_every`` below 1, or above it with decay or groups.

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
  directions = as_directions(directions)
  learning_rate = arguments.rate('learning_rate', learning_rate)
  estimate = spsa(
      eps, key=key, directions=directions, combine=combine,
      num_samples=num_samples, over=over, micro_batches=micro_batches,
      dtype=jnp.float32)
  if fold_every is not None and _check_fold(
      fold_every, learning_rate, eps, weight_decay) > 1:
    assert not isinstance(learning_rate, Mapping)  # _check_fold refuses groups
    return pending(estimate, fold_every, directions,
                   sgd(learning_rate),
                   rounding(key, directions, stochastic_rounding))
  return descent(estimate, learning_rate, key=key, directions=directions,
                 weight_decay=weight_decay, decay=decay,
                 stochastic_rounding=stochastic_rounding)


def descent(estimate: optax.GradientTransformation, learning_rate: Any, *,
            key: Any, directions: Directions, weight_decay: Any = 0.0,
            decay: Any = None, stochastic_rounding: bool = True
            ) -> ZerothOrderTransformation:
  """Adds to an estimate the other links that `mezo` has."""
  learning_rate = arguments.rate('learning_rate', learning_rate)
  arguments.number('weight_decay', weight_decay, least=0)
  finish = rounding(key, directions, stochastic_rounding)

  def decayed(params):
    chosen = (paths.decayed(params, directions.stacked) if decay is None else
              jax.tree.unflatten(paths.structure(params),
                                 paths.resolved(params, decay, 'decay')))
    return jax.tree.map(lambda a, b: bool(a and b), _used(params, directions),
                        chosen)

  never = not isinstance(weight_decay, Tracer) and weight_decay == 0
  def add_decay(updates, params):
    """`optax.add_decayed_weights` of float32 products, rounded both."""
    return updates if never else jax.tree.map(
        lambda u, p: xla.rounded(u) + xla.rounded(
            weight_decay * _wide(p)), updates, sharding.fetched(params))

  tx = skip_not_finite(optax.chain(
      estimate,
      optax.masked(optax.stateless(add_decay), decayed),
      by_group(optax.scale_by_learning_rate, learning_rate), finish))

  def init_fn(params):
    if not isinstance(weight_decay, Tracer) and not never:
      if any(jnp.ndim(m) for m in jax.tree.leaves(directions.selected(params))):
        raise ValueError('weight_decay would move elements that the mask '
                         'leaves out: leave it at 0 with a mask of elements.')
      if decay is None:
        _show(params, decayed(params))
    return tx.init(params)

  return ZerothOrderTransformation(init_fn, tx.update)


def _wide(x):
  """Half precision as float32."""
  return x.astype(dtypes.wide(x.dtype)) if paths.is_floating(x) else x


def rounding(key: Any, directions: Directions, stochastic: bool
             ) -> optax.GradientTransformation:
  """Returns the last link: updates in the dtypes of the parameters."""
  if not arguments.boolean('stochastic_rounding', stochastic):
    return to_nearest()
  return round_stochastically(key, lambda params: _used(params, directions))


def _used(params, directions: Directions):
  return jax.tree.map(lambda m: m is not False, directions.selected(params))


def _check_fold(fold_every, learning_rate, eps, weight_decay) -> int:
  """``fold_every``, if the rest allows it."""
  arguments.whole('fold_every', fold_every)
  arguments.number('weight_decay', weight_decay, least=0)
  decays = isinstance(weight_decay, Tracer) or weight_decay != 0
  if fold_every > 1 and (decays or isinstance(learning_rate, Mapping)
                         or isinstance(eps, Mapping)):
    raise ValueError('fold_every above 1 keeps coefficients of z alone: it '
                     'needs weight_decay=0 and one learning_rate and eps, no '
                     'groups.')
  return fold_every


def by_group(make: Callable[..., Any], value: Any
             ) -> optax.GradientTransformation:
  """``make(value)``, or for groups of values each for its own parameters."""
  if not isinstance(value, Mapping):
    return make(value)
  return optax.partition(
      {group: make(v) for group, v in value.items()},
      lambda params: paths.groups_of(params, value))


def _show(params, decayed) -> None:
  """Says once what was guessed of weight decay."""
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
