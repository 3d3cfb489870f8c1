r"""Updates that are added every k steps, and evaluated until then.

The last steps are a `Displacement` like any other, so the losses of a step are
those of :math:`\theta + \sum_i c_i z_i \pm \epsilon z` without the weights
having moved: the traffic of an update, which at short prompts is a good part of
a step's, is divided by k. The idea of adding up what is factorised before it
touches the weights is LOZO's (Chen et al., 2024, arXiv:2410.07698).
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
from mezo_jax.transforms.spsa import SpsaState
from mezo_jax.transforms.types import ZerothOrderTransformation


class PendingState(NamedTuple):
  """State of the updates that are still to be added."""

  count: jax.Array  # shape=(), dtype=int32: of the learning rate's schedule
  pending: jax.Array  # shape=(k, num_samples), dtype=float32: coefficients of z


class Rule(NamedTuple):
  """From projected gradients to the coefficients of what is pending.

  Attributes:
    fn: ``(pending [k, n], slot, g [n], count, *memory) -> pending, *memory``,
      with the step's own coefficients in row ``slot``, its number modulo k. Of
      a g that is not finite nothing is kept: the row is 0.
    init: ``n -> memory``, of n directions; None for no memory.
    missed: ``(slot, memory) -> memory``, when that step was skipped; with None
      for a slot, when all was added out of turn.
  """

  fn: Callable
  init: Callable | None = None
  missed: Callable = lambda slot, memory: memory


def sgd(learning_rate: float | optax.Schedule) -> Rule:
  r"""Coefficients :math:`-\eta_t g_{t,j} / n`."""
  def fn(pending, slot, g, count):
    rate = arguments.at(learning_rate, count)
    return pending.at[slot].set(-rate * g / g.shape[0]),
  return Rule(fn)


def pending(estimate: ZerothOrderTransformation, every: int,
            directions: Directions, rule: Rule,
            finish: optax.GradientTransformation) -> ZerothOrderTransformation:
  r"""Descent on an estimate of `mezo_jax.spsa`, whose updates are zero but for
  each ``every``-th, which is the sum of as many; with `sgd`

  .. math::
    u_t = -\sum_{s=t-k+1}^t \frac{\eta_s}{n} \sum_j g_{s,j} z_{s,j}
    \text{ if } k \mid t + 1, \text{ else } 0.

  ``update`` takes two arguments more: ``fold``, whether this step's is such a
  one, instead of by its number; and ``flush=True``, which makes no step and
  gives what is pending.

  Args:
    estimate: from `mezo_jax.spsa`, with these directions.
    every: k.
    directions: what z is.
    rule: what is pending; its count is of the steps that were not skipped.
    finish: of float32 updates, such as `mezo_jax.round_stochastically`.
  """
  def init_fn(params):
    state = estimate.init(params)
    n = state.projected_grad.shape[0]
    ring = PendingState(
        jnp.zeros([], jnp.int32), jnp.zeros([every, n], jnp.float32))
    memory = () if rule.init is None else (rule.init(n),)
    return sharding.beside(
        (state, ring, finish.init(params), *memory), params)

  def update_fn(updates, state, params=None, *, value_fn=None, fold=None,
                flush=False, **extra_args):
    spsa_state, ring, rest, *memory = state
    ring = jax.tree.map(jnp.asarray, ring)  # NumPy's, if it was restored
    if value_fn is not None:
      arguments.check_names(
          value_fn, fold=fold, flush=True if flush else None)
    if flush:
      added, rest = _sum(params, spsa_state, ring, directions, finish, rest,
                         spsa_state.count - 1)
      return added, (
          spsa_state, _emptied(ring), rest,
          *(rule.missed(None, m) for m in memory))

    _, after = estimate.update(  # what it gives is not used, nor made
        updates, spsa_state, params, value_fn=value_fn,
        around=displacement(spsa_state, ring, directions, spsa_state.count),
        **extra_args)
    g = after.projected_grad
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
    return added, (after, ring, rest, *memory)

  return ZerothOrderTransformation(init_fn, update_fn)


def is_due(state: Any) -> jax.Array:
  """Whether the step that is to be made from a state adds what is pending."""
  parts = {type(x): x for x in jax.tree.leaves(
      state, is_leaf=lambda x: isinstance(x, (SpsaState, PendingState)))}
  every = parts[PendingState].pending.shape[0]
  return parts[SpsaState].count % every == every - 1


def displacement(state: SpsaState, ring: PendingState, directions: Directions,
                 count: jax.Array | int) -> Displacement:
  """What is pending at step number ``count``, as terms of [k * n] keys."""
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
