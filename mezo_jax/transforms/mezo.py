r"""Provides MeZO, which is SGD with the gradient estimate of SPSA.

.. math:: \theta \leftarrow \theta - \eta (g z + \lambda\theta)

The estimate :math:`g z` comes from `mezo_jax.spsa` or another estimator. This
module adds weight decay, the learning rate, rounding and accumulation.

References:
  Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
  <https://arxiv.org/abs/2305.17333>`_, Algorithm 1 and Definition 2.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal
import warnings

import jax
from jax.core import Tracer
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, dtypes, paths, sharding, xla
from mezo_jax.directions.base import Directions
from mezo_jax.transforms.accumulate import accumulated, sgd
from mezo_jax.transforms.anchored import anchored
from mezo_jax.transforms.estimator import Estimator
from mezo_jax.transforms.not_finite import skip_not_finite
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.stochastic_rounding import (
  round_stochastically,
  to_nearest,
)
from mezo_jax.transforms.types import ZerothOrderTransformation


@arguments.renamed(fold_every='apply_every')
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
    decay_to: Literal['zero', 'start'] = 'zero',
    stochastic_rounding: bool = True,
    apply_every: int | None = None,
) -> ZerothOrderTransformation:
  r"""Optimizes with MeZO, a memory-efficient zeroth-order SGD.

  .. math::
    \theta \leftarrow \theta - \eta \Bigl(\frac{1}{n} \sum_{j=1}^n g_j z_j
    + \lambda\theta\Bigr), \qquad g_j =
    \frac{\mathcal{L}(\theta + \epsilon z_j; \mathcal{B})
    - \mathcal{L}(\theta - \epsilon z_j; \mathcal{B})}{2 \epsilon}

  It is this chain::

    skip_not_finite(chain(spsa(...), add_decayed_weights(...),
                          scale_by_learning_rate(...), round_stochastically()))

  The variants of MeZO are other estimators in the same chain:
  ``mezo(1e-6, estimator=variants.hizoo(1e-3, key=0))``.

  Call ``update`` and `optax.apply_updates` in one `jax.jit` that donates params
  and state, or use `mezo_jax.make_step`. Otherwise the updates are stored,
  which are as large as the params. Like `spsa`, ``mezo`` must be the first link
  of a chain. ``chain(mezo(...), clip_by_global_norm(1e-3))`` clips the whole
  step.

  Args:
    learning_rate: Learning rate :math:`\eta`. A number, a schedule, or groups
      ``{regular expression: number or schedule}``. A param has the rate of the
      first expression that is found in its path. Schedules count the steps that
      were not skipped. The paper uses 1e-7 to 1e-6 for all weights of a 13B
      model, 5e-5 to 1e-4 with LoRA, and 1e-3 to 1e-2 with prefixes.
    eps: Perturbation scale :math:`\epsilon`, in the same forms. Its schedules
      count all steps, including skipped steps. Defaults to None, for 1e-3. The
      paper uses 1e-3 for all weights, 1e-2 with LoRA (1e-3 on RoBERTa), and
      1e-1 with prefixes.
    key: A `jax.random.key` or an integer seed, from which all directions are
      drawn. Required unless ``estimator`` is given.
    directions: Distribution of z, as in `mezo_jax.spsa`. Its mask selects the
      leaves that are perturbed, updated and decayed. Defaults to None, for
      `mezo_jax.Normal()`.
    num_samples: Number n of directions per step. Defaults to None, for 1.
    micro_batches: Number of equal parts in which the batch is evaluated, as in
      `mezo_jax.spsa`. Defaults to None, for 1.
    estimator: A `mezo_jax.spsa` with more options, or a variant from
      `mezo_jax.variants`. It replaces the five arguments above. Defaults to
      None, for a `mezo_jax.spsa` with these arguments.
    weight_decay: Weight decay :math:`\lambda`. The product
      :math:`\lambda\theta` is rounded to float32 before it is added, so that
      all programs compute the same bits. Defaults to 0.
    decay: The leaves that are decayed, in the forms of `Directions.mask`.
      Defaults to None, which selects all matrices except biases and norms, by
      their names; a warning lists the choice.
    decay_to: What weight decay pulls params towards. 'zero', the default, is
      the equation above. 'start' is the params at the time of ``init``: the
      last term becomes :math:`\lambda (\theta - \theta_0)`. The optimizer then
      keeps a copy of the params; see `mezo_jax.anchored`. If ``decay`` is None,
      all params that have a z are decayed, biases and norms too.
    stochastic_rounding: Whether updated bfloat16, float16 and quantised weights
      are rounded stochastically (`mezo_jax.round_stochastically`) instead of to
      nearest. The random bits are derived from the key and the step. Defaults
      to True.
    apply_every: Number of steps k after which updates are applied. In between,
      losses are evaluated at the weights plus the accumulated updates, so that
      the trajectory is unchanged. Use it with `mezo_jax.make_step`. It saves
      time if updates take long compared with forward passes, as with short
      prompts, and if z is cheap to draw (`LowRank`). It requires a single
      learning rate and eps, no weight decay, and no later links that change
      updates. Call ``step.apply_accumulated(params, state)`` before you read
      the weights. Defaults to None, for 1.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its ``update`` takes the same
    arguments as the ``update`` of `spsa`. Updates have the dtypes of the
    params. The first element of its state is the state of the estimator.

  Raises:
    ValueError: If an option is out of range, as in `spsa`; if neither ``key``
      nor ``estimator`` is given; if ``estimator`` is given together with
      options of `spsa`; if there is weight decay and a mask of elements; or if
      ``apply_every`` is above 1 and there is weight decay, groups, or an
      estimator whose updates are not linear in its numbers.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1, Tables 15 and 16.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax, optax
    >>> tx = mezo_jax.mezo(learning_rate=1e-2, key=jax.random.key(0))
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
      raise ValueError('mezo: pass key=, a jax.random.key or an integer seed, '
                       'or an estimator= that has one.')
    estimator = spsa(**given)
  elif not isinstance(estimator, Estimator):
    raise ValueError('estimator must be mezo_jax.spsa(...) or a variant such '
                     f'as mezo_jax.variants.hizoo(...), got {estimator!r}.')
  elif given:
    raise ValueError('mezo: estimator cannot be combined with '
                     f'{", ".join(given)}; pass these to the estimator.')
  estimator = estimator.in_float32()
  options = estimator.options
  learning_rate = arguments.rate('learning_rate', learning_rate)
  arguments.number('weight_decay', weight_decay, least=0)
  if decay_to not in ('zero', 'start'):
    raise ValueError(f"decay_to must be 'zero' or 'start', got {decay_to!r}.")
  never = not isinstance(weight_decay, Tracer) and weight_decay == 0
  finish = rounding(options.key, options.directions, stochastic_rounding)
  if apply_every is not None:
    apply_every = arguments.whole('apply_every', apply_every)
  if apply_every is not None and apply_every > 1:
    if not never or isinstance(learning_rate, Mapping) or isinstance(
        options.eps, Mapping) or not estimator.is_linear:
      raise ValueError('apply_every above 1 stores only coefficients of z. It '
                       'needs weight_decay=0, a single learning_rate and eps '
                       'instead of groups, and an estimator whose updates are '
                       'those of spsa.')
    return accumulated(estimator, apply_every, sgd(learning_rate), finish)

  def decayed(params):
    """Returns which leaves are decayed. A leaf without a z is never decayed."""
    if decay is None and decay_to == 'start':
      tree = paths.structure(params)
      chosen = jax.tree.unflatten(tree, [True] * tree.num_leaves)
    elif decay is None:
      chosen = paths.decayed(params, options.directions.stacked)
    else:
      chosen = jax.tree.unflatten(
          paths.structure(params), paths.resolved(params, decay, 'decay'))
    return jax.tree.map(lambda a, b: bool(a and b),
                        _used(params, options.directions), chosen)

  def add_decay(updates, params):
    """Adds weight decay to updates, like `optax.add_decayed_weights`.

    Both terms are rounded before they are added. Otherwise, a compiler could
    fuse the product and the sum in some programs and not in others, so that
    results would differ in the last bit.
    """
    if never:
      return updates
    def add(update, p):
      return xla.rounded(update) + xla.rounded(weight_decay * _wide(p))
    return jax.tree.map(add, updates, sharding.fetched(params))

  to_start = decay_to == 'start' and not never
  tx = skip_not_finite(optax.chain(
      estimator,
      optax.masked(anchored(weight_decay) if to_start else
                   optax.stateless(add_decay), decayed),
      by_group(optax.scale_by_learning_rate, learning_rate),
      finish))

  def init_fn(params):
    if not isinstance(weight_decay, Tracer) and not never:
      selected = options.directions.selected(params)
      if any(jnp.ndim(m) for m in jax.tree.leaves(selected)):
        raise ValueError('weight_decay would move elements that the mask of '
                         'directions excludes: with a mask of elements, leave '
                         'weight_decay at 0.')
      if decay is None and decay_to == 'zero':
        _show(params, decayed(params))
    return tx.init(params)

  return ZerothOrderTransformation(init_fn, tx.update)


def _wide(x):
  """Casts half precision to float32; other arrays are returned unchanged."""
  return x.astype(dtypes.wide(x.dtype)) if paths.is_floating(x) else x


def rounding(key: Any, directions: Directions, stochastic: bool
             ) -> optax.GradientTransformation:
  """Returns the last link of the chain, which rounds updates to param dtypes.

  Args:
    key: The key of the run.
    directions: Leaves without a z are rounded to nearest.
    stochastic: Whether to round the other leaves stochastically.
  """
  if not arguments.boolean('stochastic_rounding', stochastic):
    return to_nearest()
  return round_stochastically(key, lambda params: _used(params, directions))


def _used(params, directions: Directions):
  """Returns which leaves have a z, in all or some of their elements."""
  return jax.tree.map(lambda m: m is not False, directions.selected(params))


def by_group(make: Callable[..., Any], value: Any
             ) -> optax.GradientTransformation:
  """Returns a transform, or one transform for each group of params.

  Args:
    make: A function from a value to a transform.
    value: A value, or groups ``{regular expression: value}``.
  """
  if not isinstance(value, Mapping):
    return make(value)
  return optax.partition(
      {group: make(v) for group, v in value.items()},
      lambda params: paths.groups_of(params, value))


def _show(params, decayed) -> None:
  """Warns which leaves have weight decay, since they were chosen by guessing.
  """
  names = {True: [], False: []}
  for (path, _), d in zip(paths.named_leaves(params), jax.tree.leaves(decayed)):
    names[d].append(path)
  def some(chosen):
    """Returns the first four names."""
    more = ', ...' if len(names[chosen]) > 4 else ''
    return ', '.join(names[chosen][:4]) + more
  warnings.warn(
      'weight_decay: the decayed parameters were chosen by their names and '
      f'shapes: {len(names[True])} are decayed ({some(True)}), '
      f'{len(names[False])} are not ({some(False)}). Pass a mask as '
      'decay= to choose them yourself.',
      stacklevel=3)
