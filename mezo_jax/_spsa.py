r"""SPSA: a gradient estimate from two forward passes (MeZO, Algorithm 1).

In the paper's letters, one step on the batch :math:`\mathcal{B}`:

.. math::
  z &\sim \mathcal{N}(0, I_d), \quad
  \ell_\pm = \mathcal{L}(\theta \pm \epsilon z; \mathcal{B}) \\
  \text{projected\_grad} &= (\ell_+ - \ell_-) / (2 \epsilon) \\
  \hat\nabla \mathcal{L} &= \text{projected\_grad} \cdot z

The rest of the algorithm, :math:`\theta \leftarrow \theta - \eta \hat\nabla
\mathcal{L}`, is optax's: see `mezo_jax.mezo`.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax import _noise, _values, sharding
from mezo_jax._directions import Directions, Normal, Rademacher, Sphere
from mezo_jax._estimate import check_over, Combine, estimate, fzoo, two_sided
from mezo_jax._lowrank import LazyLowRank, LowRank
from mezo_jax._perturb import direction
from mezo_jax._subzero import SubZero

KINDS = {  # the names that a config has for them
    'normal': Normal, 'rademacher': Rademacher, 'sphere': Sphere,
    'low_rank': LowRank, 'lazy_low_rank': LazyLowRank, 'subzero': SubZero}


class SpsaState(NamedTuple):
  """State of `spsa`."""

  count: jax.Array  # shape=(), dtype=int32: steps made, skipped ones included
  key: jax.Array  # shape=(), dtype=key<fry>: of the whole run
  value: jax.Array  # shape=(), dtype=float32: mean loss of the last step
  projected_grad: jax.Array  # shape=(num_samples,), dtype=float32
  notfinite_count: jax.Array  # shape=(), dtype=int32: skipped in a row
  total_notfinite: jax.Array  # shape=(), dtype=int32: skipped in all


# --- the transform ----------------------------------------------------------


def spsa(
    eps: float | optax.Schedule | Mapping = 1e-3,
    *,
    key: jax.Array | int,
    directions: Directions | str = Normal(),
    combine: Combine = two_sided,
    num_samples: int | None = None,
    over: str = 'scan',
    micro_batches: int | None = None,
    equal_parts: bool = False,
    dtype=None,
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates the gradient by simultaneous perturbation.

  With n = ``num_samples`` directions the updates are

  .. math::
    \frac{1}{n} \sum_{j=1}^n g_j z_j, \qquad g_j =
    \frac{\mathcal{L}(\theta + \epsilon z_j; \mathcal{B})
    - \mathcal{L}(\theta - \epsilon z_j; \mathcal{B})}{2 \epsilon}
    \approx z_j^\top \nabla \mathcal{L},

  an estimate of :math:`E[zz^\top]\nabla\mathcal{L} = \nabla\mathcal{L}` that is
  unbiased up to :math:`O(\epsilon^2)`. ``update`` needs ``params`` and
  ``value_fn`` and makes its own updates, so it stands first in any chain and
  is given ``None`` in their place.

  Args:
    eps: perturbation scale :math:`\epsilon`, a number or a schedule of the
      step number; or groups of them, ``{regular expression: number or
      schedule}``, by the first that is found in a parameter's path. With
      :math:`\epsilon_i` for the parameters of group i, :math:`g z` is
      :math:`(\ell_+ - \ell_-) / (2 \epsilon_i) \cdot z` there, and the state
      has ``projected_grad`` with that of the first group.
    key: a `jax.random.key` or an integer seed; fixes every direction of the
      run. Step t, direction j uses ``fold_in(fold_in(key, t), j)``.
    directions: what z is: its distribution and generator, and which leaves have
      it (`mezo_jax.Normal`, `Rademacher`, `Sphere`). The others get zero
      updates.
    combine: from losses to :math:`g`: `two_sided`; `one_sided`,
      :math:`(\mathcal{L}(\theta + \epsilon z) - \mathcal{L}(\theta)) /
      \epsilon`: n + 1 evaluations instead of 2n, with a bias of
      :math:`O(\epsilon)`; `fzoo`, the same differences over the standard
      deviation of the n losses (of signs, FZOO).
    num_samples: directions per step (n-SPSA), 1 if None. For their sum instead
      of their mean, multiply the learning rate by n.
    over: how they are evaluated: 'scan', one after the other; 'batch', all in
      one pass, both signs too; 'rows', in one pass, each with 1 / n of the
      batch's rows for its own. See `estimate`.
    micro_batches: evaluate the batch in this many equal parts (1 if None), all
      with one z: gradient accumulation. Every array passed on to ``value_fn``
      is split along its leading axis; close over what is no batch. The value is
      that of the whole batch, so ``value_fn`` must return the rows' values
      ``[B]`` or ``(values, weights)``: see `mezo_jax._values`.
    equal_parts: average the scalars of the parts as they are.
    dtype: of the updates; None for each parameter's own.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its ``update(None, state,
    params, value_fn=..., **kwargs)`` calls ``value_fn(params, ...)`` with those
    of ``kwargs`` that it takes by name. That returns a scalar, the rows'
    values ``[B]`` or ``(values, weights)``, in float32 or float64. A value or
    projected gradient that is not finite gives zero updates and is counted in
    the state. (`optax.apply_updates` cannot add to PRNG keys among the params:
    `mezo_jax.peft.split` sets them apart.)

    *The door*: ``update(None, state, params, projected_grad=g)``, with g [n] as
    the state of a step has it (and ``value=``, to be kept in the state), is the
    same update without the evaluations: replay, directions of other hosts,
    losses computed elsewhere. One that is not finite is a skipped step.

    ``around=``, a `Displacement` whose z are those of ``directions``, takes the
    losses at params that are so displaced; the updates are what they were.

    ``part=(i, r)`` evaluates the i-th of r equal parts of the directions; the
    others' ``projected_grad`` are NaN. It is for the losses alone: replicas put
    their parts together (`mezo_jax.exchange`) and go through the door.

  Raises:
    ValueError: for an option out of range, missing ``params`` or ``value_fn``,
      updates of an earlier transform, params with `optax.MaskedNode` holes, a
      loss that is none of the above or of half precision, or parts of unknown
      weight.

  References:
    Spall, 1992, "Multivariate stochastic approximation using a simultaneous
    perturbation gradient approximation"; Malladi et al., 2023, `Fine-Tuning
    Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Definition 1 and Algorithms 1 and 2.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> loss_fn = lambda params, x: jnp.sum((params - x) ** 2)
    >>> tx = optax.chain(spsa(1e-3, key=0), optax.adam(1e-1))
    >>> params = jnp.zeros(3)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(
    ...     None, state, params, value_fn=loss_fn, x=jnp.ones(3))
    >>> params = optax.apply_updates(params, updates)

  .. warning::
    Wrappers that want a tree of updates (`optax.MultiSteps`, ``flatten``,
    ``apply_if_finite``, ``conditionally_mask``, ``conditionally_transform``,
    ``contrib.mechanize``) or hide a part of the params (``masked``,
    ``partition``) cannot hold an estimate, which does not depend on what it is
    handed. Put them around what follows: ``chain(spsa(...), wrapper(rest))``.
    `optax.lookahead` cannot be used: it passes no extra arguments on.
  """
  num_samples = 1 if num_samples is None else num_samples
  micro_batches = 1 if micro_batches is None else micro_batches
  directions = as_directions(directions)
  _check_options(eps, num_samples, micro_batches, over)

  def init_fn(params):
    _check_holes(params)
    directions.selected(params)
    return sharding.beside(SpsaState(
        count=jnp.zeros([], jnp.int32),
        key=jnp.copy(_noise.as_key(key)),  # the caller's may not be donated
        value=jnp.zeros([], jnp.float32),
        projected_grad=jnp.zeros([num_samples], jnp.float32),
        notfinite_count=jnp.zeros([], jnp.int32),
        total_notfinite=jnp.zeros([], jnp.int32)), params)

  def update_fn(updates, state, params=None, *, value_fn=None,
                projected_grad=None, around=None, part=None, **extra_args):
    _check_update(updates, params, value_fn, projected_grad)
    keys = directions.keys(state.key, state.count, num_samples)
    kind, z = directions.plain(params, keys)
    epsilon = _at(eps, state.count)

    if projected_grad is None:
      if around is not None:
        around = directions.plain(params, around.keys)[1].times(around.coefs)
      mine = z if part is None else jax.tree.map(
          lambda x: x[_part(part, num_samples, combine)], z)
      losses = estimate(  # of θ ± εz
          value_fn, params, mine, epsilon, kind, signs=combine.signs, over=over,
          micro_batches=micro_batches, equal_parts=equal_parts, around=around,
          batch=_values.accepted(value_fn, extra_args))
      value, g = combine.fn(losses, _first(epsilon))
      g = jnp.where(jnp.isfinite(value), g, jnp.nan)
      if part is not None:
        g = jnp.full(num_samples, jnp.nan, g.dtype).at[
            _part(part, num_samples, combine)].set(g)
      z = z.after(value)
    else:
      value = extra_args.get('value', jnp.nan)
      g = _checked(projected_grad, num_samples)

    value, g = jnp.float32(value), g.astype(jnp.float32)
    finite = jnp.all(jnp.isfinite(g))
    mean = jnp.where(finite, g, 0.0) / num_samples
    of_group = jax.tree.map(lambda e: mean * (_first(epsilon) / e), epsilon)
    updates = direction(params, z.times(of_group), kind, dtype=dtype)
    return updates, SpsaState(
        count=optax.safe_increment(state.count),
        key=state.key,
        value=value,
        projected_grad=g,
        notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
        total_notfinite=state.total_notfinite + (1 - finite.astype(jnp.int32)))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _part(part: tuple[int, int], n: int, combine: Combine) -> slice:
  """Which of the n directions are evaluated."""
  i, parts = part
  if n % parts or not 0 <= i < parts or combine is fzoo:
    raise ValueError(
        f'part={part} is none of {n} directions: it must be (i, r) with i from '
        '0 to r - 1, and r must divide num_samples; and not with fzoo, which '
        'divides by the deviation of the losses of all.')
  return slice(i * n // parts, (i + 1) * n // parts)


def _at(eps, count):
  """Epsilon at a step; of groups an OrderedDict."""
  now = lambda e: jnp.asarray(e(count) if callable(e) else e, jnp.float32)
  if isinstance(eps, Mapping):
    return OrderedDict((group, now(e)) for group, e in eps.items())
  return now(eps)


def _first(epsilon) -> jax.Array:
  """The epsilon that ``projected_grad`` is told in: of groups, the first's."""
  return jax.tree.leaves(epsilon)[0]


def as_directions(directions: Directions | str) -> Directions:
  """A config's name of directions, 'normal', as what it names."""
  if isinstance(directions, Directions):
    return directions
  if directions not in KINDS:
    raise ValueError(f'directions must be one of {tuple(KINDS)}, or such as '
                     f'mezo_jax.Normal(), got {directions!r}.')
  return KINDS[directions]()


def _check_options(eps, num_samples, micro_batches, over):
  for name, value in (('num_samples', num_samples),
                      ('micro_batches', micro_batches)):
    if not isinstance(value, (int, np.integer)) or value < 1:
      raise ValueError(
          f'{name} must be a Python integer of at least 1, got {value!r}; '
          f"under optax.inject_hyperparams name it in static_args.")
  check_over(over)
  if over == 'rows' and num_samples % micro_batches:
    raise ValueError(f"with over='rows' micro_batches={micro_batches} must "
                     f'divide num_samples={num_samples}.')
  for e in eps.values() if isinstance(eps, Mapping) else (eps,):
    if isinstance(e, (int, float)) and not e > 0:
      raise ValueError(f'eps must be positive, got {eps}.')


def _checked(projected_grad, num_samples: int) -> jax.Array:
  g = jnp.asarray(projected_grad)
  if g.shape != (num_samples,):
    raise ValueError(f'projected_grad must have the shape [{num_samples}], one '
                     f'for each direction, got {list(g.shape)}.')
  return g


def _check_holes(params):
  is_hole = lambda x: isinstance(x, optax.MaskedNode)
  if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
    raise ValueError(
        'spsa was given params with holes (optax.MaskedNode), on which '
        'value_fn would compute a wrong loss. Do not wrap it in optax.masked '
        'or optax.partition: pass its own mask instead, '
        'directions=mezo_jax.Normal(mask=...).')


def _check_update(updates, params, value_fn, projected_grad):
  if params is None:
    raise ValueError(
        'spsa needs params: tx.update(None, state, params, value_fn=...).')
  if value_fn is None and projected_grad is None:
    raise ValueError(
        'spsa needs value_fn: call tx.update(None, state, params, '
        'value_fn=loss_fn, batch=batch). Wrappers that drop extra arguments, '
        "as flax's TrainState.apply_gradients does, cannot be used.")
  if value_fn is not None and projected_grad is not None:
    raise ValueError(
        'spsa was given both value_fn and projected_grad: it makes the latter '
        'of the losses, or is told it.')
  _check_holes(params)
  if jax.tree.leaves(updates):  # nnx.Optimizer makes an empty tree of None
    raise ValueError(
        'spsa makes its own updates and was handed some: it must be first in '
        'the chain and called with updates=None. A wrapper that wants a tree '
        'of updates goes around what follows, not around the estimate: '
        'chain(spsa(...), MultiSteps(rest, k).gradient_transformation()), '
        'chain(spsa(...), apply_if_finite(rest, 5)). To accumulate, use '
        'micro_batches=k.')
