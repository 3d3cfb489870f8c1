r"""Updates that are accumulated for k steps before they are applied.

The last steps are a `Displacement` like any other, so the losses of a step are
those of :math:`\theta + \sum_i c_i z_i \pm \epsilon z` without the weights
having moved. This divides the memory traffic of updates by k; with short
prompts that traffic is a large part of a step. LOZO proposed to accumulate
low-rank updates before they are applied (Chen et al., 2024, arXiv:2410.07698).
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
  """State of the updates that have not been applied yet."""

  count: jax.Array  # shape=(), dtype=int32: of the learning rate's schedule
  pending: jax.Array  # shape=(k, num_samples), dtype=float32: coefficients of z


class Rule(NamedTuple):
  """Turns projected gradients into coefficients of accumulated updates.

  Attributes:
    fn: ``(pending [k, n], slot, g [n], count, *memory) -> pending, *memory``,
      with the coefficients of the step in row ``slot``, its number modulo k.
    init: ``n -> memory``, for n directions. Defaults to None, for no memory.
    missed: ``(slot, memory) -> memory``, called with the slot of each step that
      was skipped, and with None when updates were applied out of turn.
  """

  fn: Callable
  init: Callable | None = None
  missed: Callable = lambda slot, memory: memory


def sgd(learning_rate: float | optax.Schedule) -> Rule:
  r"""Returns the rule with coefficients :math:`-\eta_t g_{t,j} / n`."""
  def fn(pending, slot, g, count):
    rate = arguments.at(learning_rate, count)
    return pending.at[slot].set(-rate * g / g.shape[0]),
  return Rule(fn)


def accumulated(estimator: Estimator, every: int, rule: Rule,
                finish: optax.GradientTransformation
                ) -> ZerothOrderTransformation:
  r"""Returns a descent whose updates are zero except for every k-th.

  That one is the sum of k updates; with the rule `sgd`

  .. math::
    u_t = -\sum_{s=t-k+1}^t \frac{\eta_s}{n} \sum_j g_{s,j} z_{s,j}
    \text{ if } k \mid t + 1, \text{ else } 0.

  ``update`` takes two more arguments: ``fold`` says whether accumulated updates
  are applied after this step, whatever its number; ``flush=True`` makes no step
  and applies them.

  Args:
    estimator: An estimator whose updates are linear in its numbers.
    every: k.
    rule: What is accumulated. Its count is that of the steps that were not
      skipped.
    finish: A transform of float32 updates, such as
      `mezo_jax.round_stochastically`.
  """
  directions = estimator.options.directions

  def init_fn(params):
    state = estimator.init(params)
    n = state.projected_grad.shape[0]
    ring = PendingState(
        jnp.zeros([], jnp.int32), jnp.zeros([every, n], jnp.float32))
    memory = () if rule.init is None else (rule.init(n),)
    return sharding.beside(
        (state, ring, finish.init(params), *memory), params)

  def update_fn(updates, state, params=None, *, value_fn=None,
                projected_grad=None, fold=None, flush=False, around=None,
                part=None, measure_only=False, **batch):
    spsa_state, ring, rest, *memory = state
    ring = jax.tree.map(jnp.asarray, ring)  # NumPy's, if it was restored
    if flush:
      added, rest = _sum(params, spsa_state, ring, directions, finish, rest,
                         spsa_state.count - 1)
      return added, (
          spsa_state, _emptied(ring), rest,
          *(rule.missed(None, m) for m in memory))

    check_update(updates, spsa_state, params, value_fn, projected_grad)
    if around is not None:
      raise ValueError('around= cannot be used together with fold_every, which '
                       'evaluates losses around the accumulated updates.')
    if value_fn is None:
      numbers = estimator.checked(batch.get('value', jnp.nan), projected_grad)
    else:
      arguments.check_names(value_fn, fold=fold, flush=flush or None, part=part,
                            measure_only=measure_only or None)
      numbers = estimator.measure(
          spsa_state, params, value_fn, batch, part=part, around=displacement(
              spsa_state, ring, directions, spsa_state.count))
      if measure_only:
        raise Measured(numbers)
    after = counted(spsa_state, numbers)
    g = numbers.projected_grad
    finite = jnp.all(jnp.isfinite(g))
    slot = spsa_state.count % every
    coefs, *new = rule.fn(ring.pending, slot, g, ring.count, *memory)
    count = cast(jax.Array, optax.safe_increment(ring.count))
    new = PendingState(count, coefs), new
    ring, memory = jax.tree.map(
        lambda x, old: jnp.where(finite, x, old), new,
        (ring, [rule.missed(slot, m) for m in memory]))

    def add(ring, rest):
      added, rest = _sum(params, after, ring, directions, finish, rest,
                         spsa_state.count)
      return added, _emptied(ring), rest
    def wait(ring, rest):
      return jax.tree.map(zeros, params), ring, rest
    if fold is None:
      out = lax.cond(is_due(state), add, wait, ring, rest)
    else:
      out = (add if fold else wait)(ring, rest)
    added, ring, rest = out
    if fold:  # perhaps out of turn
      due = is_due(state)
      memory = [jax.tree.map(lambda x, lost: jnp.where(due, x, lost), m,
                             rule.missed(None, m)) for m in memory]
    return added, (after, ring, rest, *memory)

  return ZerothOrderTransformation(init_fn, update_fn)


def is_due(state: Any) -> jax.Array:
  """Returns whether accumulated updates are applied after the next step."""
  parts = {type(x): x for x in jax.tree.leaves(
      state, is_leaf=lambda x: isinstance(x, (SpsaState, PendingState)))}
  every = parts[PendingState].pending.shape[0]
  return parts[SpsaState].count % every == every - 1


def displacement(state: SpsaState, ring: PendingState, directions: Directions,
                 count: jax.Array | int) -> Displacement:
  """Returns the updates accumulated at step number ``count``: k * n terms."""
  every, n = ring.pending.shape
  first = count - count % every
  keys = jax.vmap(lambda t: directions.keys(state.key, t, n))(
      first + jnp.arange(every))
  return Displacement(keys.reshape(-1), ring.pending.reshape(-1))


def _sum(params, state, ring, directions, finish, rest, count):
  added = direction(params, displacement(state, ring, directions, count),
                    directions, dtype=jnp.float32)
  added, rest = finish.update(added, rest, params)
  return jax.tree.map(
      lambda u: xla.rounded(u, state.count), added), rest


def _emptied(ring: PendingState) -> PendingState:
  return ring._replace(pending=jnp.zeros_like(ring.pending))
