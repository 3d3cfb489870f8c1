r"""Accumulates updates for k steps before it applies them to the weights.

The accumulated updates are a `Displacement` :math:`\sum_i c_i z_i`, which is
stored as keys and coefficients. Losses are evaluated at :math:`\theta + \sum_i
c_i z_i \pm \epsilon z`, so the trajectory is the same as if each step changed
the weights. The weights are read and written only once in k steps. If prompts
are short, this saves a large part of the time of a step.

References:
  Chen et al., 2024, `LOZO <https://arxiv.org/abs/2410.07698>`_, which
  accumulates low-rank updates before it applies them.
"""

from collections.abc import Callable
from typing import Any, cast, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, sharding, xla
from mezo_jax.directions.base import Directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import direction, zeros
from mezo_jax.transforms.estimator import (
  check_update,
  counted,
  Estimator,
  Measured,
  SpsaState,
)
from mezo_jax.transforms.types import ZerothOrderTransformation


class PendingState(NamedTuple):
  """Holds the coefficients of updates that have not been applied yet.

  Attributes:
    count: Number of steps so far that were not skipped, for schedules. int32
      [].
    pending: Coefficients of z of the accumulated updates, float32 [k, n]. Row
      ``t % k`` belongs to step t, for each of the last k steps.
  """

  count: jax.Array
  pending: jax.Array


class Rule(NamedTuple):
  """Describes how projected gradients become accumulated coefficients of z.

  Attributes:
    fn: A function ``(pending, slot, g, count, *memory) -> (pending, *memory)``.
      It adds the coefficients of a step to ``pending`` [k, n], usually in row
      ``slot``, which is the number of the step modulo k. ``g`` has the
      projected gradients [n], and ``count`` is the number of steps so far that
      were not skipped.
    init: A function ``n -> memory`` that returns the first memory, given the
      number of directions. Defaults to None, for no memory.
    missed: A function ``(slot, memory) -> memory`` that returns the memory
      after the step of a slot was skipped. If accumulated updates are applied
      early, before k steps are complete, it is called with None as the slot.
      Defaults to a function that keeps the memory.
  """

  fn: Callable
  init: Callable | None = None
  missed: Callable = lambda slot, memory: memory


def sgd(learning_rate: float | optax.Schedule) -> Rule:
  r"""Returns the rule of SGD, with the coefficients :math:`-\eta g_j / n`.

  Args:
    learning_rate: The learning rate :math:`\eta`, a number or a schedule.
  """
  def fn(pending, slot, g, count):
    rate = arguments.at(learning_rate, count)
    return pending.at[slot].set(-rate * g / g.shape[0]),
  return Rule(fn)


def accumulated(estimator: Estimator, every: int, rule: Rule,
                finish: optax.GradientTransformation
                ) -> ZerothOrderTransformation:
  r"""Returns an optimizer that applies its updates every k steps.

  The updates of all other steps are zero. With the rule `sgd`,

  .. math::
    u_t = -\sum_{s=t-k+1}^t \frac{\eta_s}{n} \sum_j g_{s,j} z_{s,j}
    \text{ if } k \mid t + 1, \text{ else } 0.

  ``update`` takes two more arguments. ``apply`` is a Python bool: whether to
  apply the accumulated updates after this step. It defaults to None, which
  applies them after every k-th step. ``apply_only=True`` applies the
  accumulated updates without making a step.

  Args:
    estimator: An estimator whose updates are linear in its numbers.
    every: Number of steps k.
    rule: A `Rule` that turns projected gradients into coefficients.
    finish: A transform of the summed float32 updates, such as
      `mezo_jax.round_stochastically`.
  """
  directions = estimator.options.directions

  def init_fn(params):
    state, n = estimator.init(params), estimator.size
    ring = PendingState(
        jnp.zeros([], jnp.int32), jnp.zeros([every, n], jnp.float32))
    memory = () if rule.init is None else (rule.init(n),)
    state = state, ring, finish.init(params), *memory
    return sharding.beside(state, params)

  def add_all(params, state, ring, rest, count):
    """Applies the accumulated updates.

    Returns:
      The updates, the state without accumulated updates, and the next state of
      ``finish``.
    """
    terms = displacement(state, ring, directions, count)
    added = direction(params, terms, directions, dtype=jnp.float32)
    added, rest = finish.update(added, rest, params)
    added = jax.tree.map(lambda u: xla.rounded(u, state.count), added)
    return added, ring._replace(pending=jnp.zeros_like(ring.pending)), rest

  @arguments.renamed(fold='apply', flush='apply_only')
  def update_fn(updates, state, params=None, *, value_fn=None,
                projected_grad=None, apply=None, apply_only=False,
                around=None, part=None, measure_only=False, **batch):
    spsa_state, ring, rest, *memory = state
    # The arrays of a restored state may be NumPy arrays, which have no `.at`.
    ring = jax.tree.map(jnp.asarray, ring)
    if apply_only:  # Apply the updates of earlier steps, and make no step.
      added, ring, rest = add_all(
          params, spsa_state, ring, rest, spsa_state.count - 1)
      memory = [rule.missed(None, m) for m in memory]
      return added, (spsa_state, ring, rest, *memory)

    check_update(updates, spsa_state, params, value_fn, projected_grad)
    if around is not None:
      raise ValueError('around= cannot be combined with apply_every, which '
                       'uses around= itself, for the accumulated updates.')
    # Measure the numbers of this step, or take recorded ones.
    count = spsa_state.count
    if value_fn is None:
      numbers = estimator.checked(batch.get('value', jnp.nan), projected_grad)
    else:
      arguments.check_names(
          value_fn, apply=apply, apply_only=apply_only or None, part=part,
          measure_only=measure_only or None)
      pending = displacement(spsa_state, ring, directions, count)
      numbers = estimator.measure(
          spsa_state, params, value_fn, batch, part=part, around=pending)
      if measure_only:
        raise Measured(numbers)
    # Add the coefficients of this step. A skipped step adds none.
    after = counted(spsa_state, numbers)
    g, slot = numbers.projected_grad, count % every
    coefs, *new = rule.fn(ring.pending, slot, g, ring.count, *memory)
    steps = cast(jax.Array, optax.safe_increment(ring.count))
    missed = [rule.missed(slot, m) for m in memory]
    ring, memory = optax.tree.where(
        jnp.all(jnp.isfinite(g)), (PendingState(steps, coefs), new),
        (ring, missed))

    add = lambda ring, rest: add_all(params, after, ring, rest, count)
    wait = lambda ring, rest: (jax.tree.map(zeros, params), ring, rest)
    # Every k-th step applies the sum. If ``apply`` is passed, the caller has
    # decided already, as `make_step` does.
    if apply is None:
      added, ring, rest = lax.cond(is_due(state), add, wait, ring, rest)
    elif apply:
      added, ring, rest = add(ring, rest)
      # The caller may have decided before k steps were complete.
      missed = [rule.missed(None, m) for m in memory]
      memory = optax.tree.where(is_due(state), memory, missed)
    else:
      added, ring, rest = wait(ring, rest)
    return added, (after, ring, rest, *memory)

  return ZerothOrderTransformation(init_fn, update_fn)


def is_due(state: Any) -> jax.Array:
  """Returns whether the next step is one that applies accumulated updates."""
  is_part = lambda x: isinstance(x, (SpsaState, PendingState))
  parts = {type(x): x for x in jax.tree.leaves(state, is_leaf=is_part)}
  every = parts[PendingState].pending.shape[0]
  return parts[SpsaState].count % every == every - 1


def displacement(state: SpsaState, ring: PendingState, directions: Directions,
                 count: jax.Array | int) -> Displacement:
  """Returns the accumulated updates as a displacement of k * n terms.

  Args:
    state: State of the estimator, for its key.
    ring: The accumulated coefficients of k steps.
    directions: Distribution of z.
    count: Number of any of these k steps. They begin at a multiple of k: at
      step ``count - count % k``.
  """
  every, n = ring.pending.shape
  first = count - count % every
  keys = jax.vmap(lambda t: directions.keys(state.key, t, n))(
      first + jnp.arange(every))
  return Displacement(keys.reshape(-1), ring.pending.reshape(-1))
