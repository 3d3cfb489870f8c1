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
from typing import Any, cast, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax.core import arguments, sharding
from mezo_jax.directions import noise
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import direction
from mezo_jax.transforms import chain
from mezo_jax.transforms import losses as losses_lib
from mezo_jax.transforms.evaluate_points import (
  as_combine,
  check_displacement,
  check_over,
  Combine,
  estimate,
  two_sided,
)
from mezo_jax.transforms.types import ZerothOrderTransformation


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
    eps: float | optax.Schedule | Mapping[str, Any] = 1e-3,
    *,
    key: jax.Array | int,
    directions: Directions | str = Normal(),
    combine: Combine | str = two_sided,
    num_samples: int | None = None,
    over: str = 'scan',
    micro_batches: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> ZerothOrderTransformation:
  r"""Estimates the gradient by simultaneous perturbation.

  With n = ``num_samples`` directions the updates are

  .. math::
    \frac{1}{n} \sum_{j=1}^n g_j z_j, \qquad g_j =
    \frac{\mathcal{L}(\theta + \epsilon z_j; \mathcal{B})
    - \mathcal{L}(\theta - \epsilon z_j; \mathcal{B})}{2 \epsilon}
    \approx z_j^\top \nabla \mathcal{L},

  an estimate of :math:`E[zz^\top]\nabla\mathcal{L} = \nabla\mathcal{L}` that is
  unbiased up to :math:`O(\epsilon^2)`. ``update`` needs ``params`` and
  ``value_fn`` and makes its own updates, so it must be the first link of any
  chain and is called with ``None`` in their place. Links before it would do
  nothing, and are refused.

  Args:
    eps: perturbation scale :math:`\epsilon`, a number or a schedule of the
      step number; or groups of them, ``{regular expression: number or
      schedule}``, by the first that is found in a parameter's path. With
      :math:`\epsilon_i` for the parameters of group i, :math:`g z` is
      :math:`(\ell_+ - \ell_-) / (2 \epsilon_i) \cdot z` there, and the state
      has ``projected_grad`` with that of the first group.
    key: a `jax.random.key` or an integer seed; fixes every direction of the
      run. Step t, direction j uses ``fold_in(fold_in(key, t), j)``.
    directions: What z is: its distribution and generator, and which leaves have
      it (`mezo_jax.Normal`, `Rademacher`, ...), or its name. The other leaves
      get zero updates.
    combine: How losses become :math:`g`: `two_sided`; `one_sided`,
      :math:`(\mathcal{L}(\theta + \epsilon z) - \mathcal{L}(\theta)) /
      \epsilon`: n + 1 evaluations instead of 2n, with a bias of
      :math:`O(\epsilon)`; `fzoo`, the same differences over the standard
      deviation of the n losses (of signs, FZOO); their names; or a `Combine`.
    num_samples: directions per step (n-SPSA), 1 if None. For their sum instead
      of their mean, multiply the learning rate by n.
    over: how they are evaluated: 'scan', one after the other; 'batch', all in
      one pass, both signs too; 'rows', in one pass, each with 1 / n of the
      batch's rows for its own. See `estimate`.
    micro_batches: Evaluate the batch in this many equal parts (1 if None), all
      with one z: gradient accumulation. Every array with axes that is passed on
      to ``value_fn`` counts as batch and is split along its leading axis;
      arrays whose leading axes differ are refused. Close over arrays that do
      not have one entry for each row, such as class weights; numbers and arrays
      without axes are passed on whole. The value is that of the whole batch, so
      ``value_fn`` must return per-example losses ``[B]`` or ``(values,
      weights)``.
    dtype: of the updates; None for each parameter's own.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its ``update(None, state,
    params, value_fn=..., **kwargs)`` calls ``value_fn(params, ...)`` with those
    of ``kwargs`` that it takes by name. That returns a scalar, the rows'
    values ``[B]`` or ``(values, weights)``, in float32 or float64. A value or
    projected gradient that is not finite gives zero updates and is counted in
    the state. Leaves that are not of floating point get zero updates. PRNG keys
    get an update with which `optax.apply_updates` leaves them as they are.

    *The door*: ``update(None, state, params, projected_grad=g)``, with g [n] as
    the state of a step has it (and ``value=``, to be kept in the state), is the
    same update without the evaluations: replay, directions of other hosts,
    losses computed elsewhere. One that is not finite is a skipped step.

    ``around=``, a `Displacement` whose z are those of ``directions``, takes the
    losses at params that are so displaced; the updates are what they were.

    ``part=(i, r)`` evaluates the i-th of r equal parts of the directions; the
    others' ``projected_grad`` are NaN. It is for the losses alone: replicas put
    their parts together (docs/replicas.md) and go through the door. It needs a
    `Combine` with ``by_direction``.

    ``value_fn`` cannot have arguments of these names.

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
  num_samples = 1 if num_samples is None else arguments.whole(
      'num_samples', num_samples)
  micro_batches = 1 if micro_batches is None else arguments.whole(
      'micro_batches', micro_batches)
  directions, combine = as_directions(directions), as_combine(combine)
  eps = arguments.rate('eps', eps, above=0)
  noise.check_key(key)
  arguments.floating('dtype', dtype)
  check_over(over)
  if over == 'rows' and num_samples % micro_batches:
    raise ValueError(f"with over='rows' micro_batches={micro_batches} must "
                     f'divide num_samples={num_samples}.')

  def init_fn(params):
    arguments.tree('params', params)
    _check_holes(params)
    directions.selected(params)
    return sharding.beside(SpsaState(
        count=jnp.zeros([], jnp.int32),
        key=noise.state_key(key),  # the caller's own may not be donated
        value=jnp.zeros([], jnp.float32),
        projected_grad=jnp.zeros([num_samples], jnp.float32),
        notfinite_count=jnp.zeros([], jnp.int32),
        total_notfinite=jnp.zeros([], jnp.int32)), params)

  def update_fn(updates, state, params=None, *, value_fn=None,
                projected_grad=None, around=None, part=None, **extra_args):
    _check_update(updates, state, params, value_fn, projected_grad)
    keys = directions.keys(state.key, state.count, num_samples)
    z = Displacement(keys, jnp.ones(num_samples, jnp.float32))
    epsilon = _at(eps, state.count)

    if projected_grad is None:
      assert value_fn is not None  # _check_update wants one of the two
      arguments.check_names(value_fn, around=around, part=part)
      if around is not None:
        check_displacement('around', around)
      mine = z if part is None else jax.tree.map(
          lambda x: x[_part(part, num_samples, combine)], z)
      losses = estimate(  # of θ ± εz
          value_fn, params, mine, epsilon, directions, signs=combine.signs,
          over=over, micro_batches=micro_batches, around=around,
          batch=losses_lib.accepted(value_fn, extra_args))
      value, g = combine.apply(losses, _first(epsilon))
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
    updates = direction(params, z.times(of_group), directions, dtype=dtype)
    return updates, SpsaState(
        count=cast(jax.Array, optax.safe_increment(state.count)),
        key=state.key,
        value=value,
        projected_grad=g,
        notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
        total_notfinite=state.total_notfinite + (1 - finite.astype(jnp.int32)))

  return ZerothOrderTransformation(init_fn, update_fn)


def _part(part: tuple[int, int], n: int, combine: Combine) -> slice:
  """Returns which of the n directions are evaluated."""
  i, parts = check_part(part)
  if n % parts:
    raise ValueError(f'part={part} of num_samples={n} directions: the number '
                     'of parts must divide them.')
  if parts > 1 and not combine.by_direction:
    raise ValueError(
        f'part={part} evaluates some of the directions, and {combine!r} may '
        'need the losses of all, as fzoo does for their deviation. If each '
        'coefficient depends on the losses of its own direction alone, say '
        'Combine(..., by_direction=True).')
  return slice(i * n // parts, (i + 1) * n // parts)


def check_part(part: Any) -> tuple[int, int]:
  """Returns ``(i, r)``, part i of r.

  Raises:
    ValueError: if it is something else.
  """
  is_pair = isinstance(part, (tuple, list)) and len(part) == 2 and all(
      isinstance(x, (int, np.integer)) and not isinstance(x, bool)
      for x in part)
  if not is_pair or not 0 <= part[0] < part[1]:
    raise ValueError('part must be (i, r), part number i of r, with i from 0 '
                     f'to r - 1, got {part!r}.')
  return int(part[0]), int(part[1])


def _at(eps, count):
  """Returns epsilon at a step; for groups an OrderedDict."""
  now = lambda e: jnp.asarray(arguments.at(e, count), jnp.float32)
  if isinstance(eps, Mapping):
    return OrderedDict((group, now(e)) for group, e in eps.items())
  return now(eps)


def _first(epsilon) -> jax.Array:
  """The epsilon that ``projected_grad`` is told in: of groups, the first's."""
  return jax.tree.leaves(epsilon)[0]


def _checked(projected_grad, num_samples: int) -> jax.Array:
  """Returns projected gradients [n] as an array."""
  g = arguments.array('projected_grad', projected_grad)
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


def _check_update(updates, state, params, value_fn, projected_grad):
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
        'spsa was given both value_fn and projected_grad: give value_fn to '
        'evaluate losses, or projected_grad to make an update without them.')
  if value_fn is not None:
    arguments.function('value_fn', value_fn)
  if not isinstance(state, SpsaState):
    raise ValueError('state must be the SpsaState that tx.init returned, got a '
                     f'{type(state).__name__}.')
  _check_holes(params)
  chain.check_first('spsa')
  if jax.tree.leaves(updates):  # nnx.Optimizer makes an empty tree of None
    raise ValueError(
        'spsa makes its own updates and was handed some: it must be first in '
        'the chain and called with updates=None. A wrapper that wants a tree '
        'of updates goes around what follows, not around the estimate: '
        'chain(spsa(...), MultiSteps(rest, k).gradient_transformation()), '
        'chain(spsa(...), apply_if_finite(rest, 5)). To accumulate, use '
        'micro_batches=k.')
