r"""MeZO-SVRG: differences to an anchor, whose gradient is of many rows.

Gautam et al. (2024, arXiv:2404.08080), Algorithm 1. Every q steps, on all rows
:math:`\mathcal{D}`, or many of them,

.. math:: \bar\theta \leftarrow \theta, \quad \bar g \leftarrow
          \hat\nabla \mathcal{L}(\bar\theta; \mathcal{D}), \quad
          \theta \leftarrow \theta - \eta_1 \bar g

and between, on a batch, with one and the same z at both points,

.. math:: \theta \leftarrow \theta - \eta_2 \left[
          \hat\nabla \mathcal{L}(\theta; \mathcal{B}) -
          \hat\nabla \mathcal{L}(\bar\theta; \mathcal{B}) + \bar g \right].

The paper keeps a copy of :math:`\bar\theta`, as ``stored_anchor`` does. Without
it the weights themselves are the anchor: the q steps after it are pending
(as with ``fold_every`` of `mezo_jax.mezo`), a sum of as many z that losses are
taken around, so two points cost the memory of one, and the anchor is exact in
every precision.
"""

from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, sharding
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import direction
from mezo_jax.transforms.accumulate import pending, Rule
from mezo_jax.transforms.mezo import rounding
from mezo_jax.transforms.not_finite import skip_not_finite
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.types import ZerothOrderTransformation
from mezo_jax.variants._told import check_one_eps, Remembering


class SvrgMemory(NamedTuple):
  """What is remembered of the anchor, and of the losses since."""

  anchor_grad: jax.Array  # shape=(num_samples,): of its z; NaN for none
  scale: jax.Array  # shape=(): of both learning rates
  total: jax.Array  # shape=(): of the losses since rates were looked at
  before: jax.Array  # shape=(): mean of those before; NaN for none
  steps: jax.Array  # shape=(), int32: that are in the total


def svrg(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, every: int = 2,
    anchor_learning_rate: float | optax.Schedule = 1e-3, anneal: float = 1.0,
    anneal_every: int = 100, directions: Directions | str = Normal(),
    rows: int | None = None, stored_anchor: bool = False,
    stochastic_rounding: bool = True, **options: Any
) -> ZerothOrderTransformation:
  r"""MeZO-SVRG as a whole optimiser, which owns its two learning rates.

  Step number t is an anchor's where ``every`` divides t: hand that one
  ``update`` (or `mezo_jax.make_step`'s step) a batch of all rows, or of many. A
  step between takes 4 evaluations of a direction, an anchor's 2. Updates are
  zero but for those of each ``every``-th step, as with `mezo_jax.mezo`'s
  ``fold_every``: evaluate after such a one, or ``step.flush`` first, after
  which no weight moves until the next anchor.

  Args:
    learning_rate: :math:`\eta_2`, a number or a schedule of the steps that were
      not skipped.
    eps: see `mezo_jax.spsa`; no groups.
    key: a `jax.random.key` or an integer seed.
    every: q.
    anchor_learning_rate: :math:`\eta_1`, likewise.
    anneal: :math:`\kappa` of the paper, at least 1, by which both rates are
      divided whenever the mean loss of ``anneal_every`` steps is more than 1.05
      times that of as many before.
    anneal_every: steps; the paper has one look an epoch.
    directions: what z is. Losses are taken around q of them.
    rows: a batch of more is evaluated in equal parts of at most so many; None
      for whole.
    stored_anchor: keep a copy of the anchor, beside the weights, which then
      move every step.
    stochastic_rounding: of half-precision weights.
    **options: ``num_samples`` and ``equal_parts`` of `mezo_jax.spsa`.

  Raises:
    ValueError: as `mezo_jax.spsa`; for ``every`` below 2, ``anneal`` below 1,
      groups of eps, or a batch that ``rows`` does not part equally.
  """
  check_one_eps(eps)
  directions = as_directions(directions)
  learning_rate, anchor_learning_rate = (
      arguments.rate(name, rate, groups=False) for name, rate in (
          ('learning_rate', learning_rate),
          ('anchor_learning_rate', anchor_learning_rate)))
  arguments.whole('every', every, 2)
  arguments.number('anneal', anneal, least=1)
  arguments.whole('anneal_every', anneal_every)
  arguments.boolean('stored_anchor', stored_anchor)
  if rows is not None:
    arguments.whole('rows', rows)
  of_parts = lambda parts: spsa(
      eps, key=key, directions=directions, micro_batches=parts, **options)
  plain = of_parts(None)

  def update_fn(updates, state, params=None, *, value_fn=None, around=None,
                projected_grad=None, **extra_args):
    if value_fn is None:
      return plain.update(updates, state, params,
                          projected_grad=projected_grad, **extra_args)
    estimate = of_parts(_parts(extra_args, rows))
    told = lambda state, at: estimate.update(
        updates, state, params, value_fn=value_fn, around=at, **extra_args)[1]
    here = told(state, around)
    # One after the other: collectives of both would wait for each other.
    again = Displacement(state.key, 1.0).after(here.value).keys
    there = lax.cond(
        state.count % every == 0,
        lambda key: jnp.zeros_like(here.projected_grad),
        lambda key: told(state._replace(key=key), None).projected_grad, again)
    return plain.update(
        updates, state, params, value=here.value,
        projected_grad=here.projected_grad - there)

  rate_of = arguments.at

  def coefs(is_anchor, g, value, count, memory):
    """Of the step's z and of the anchor's; what is remembered."""
    n, anchor_grad = g.shape[0], jnp.where(is_anchor, g, memory.anchor_grad)
    rates = [memory.scale * rate_of(rate, count)
             for rate in (anchor_learning_rate, learning_rate)]
    # Of a batch alone the difference says nothing: without an anchor, no step.
    lost = jnp.any(jnp.isnan(anchor_grad))
    own = -jnp.where(is_anchor, rates[0], jnp.where(lost, 0.0, rates[1])) * g
    anchors = jnp.where(is_anchor | lost, 0.0, -rates[1] * anchor_grad)
    return own / n, anchors / n, _annealed(
        memory._replace(anchor_grad=anchor_grad), value, anneal, anneal_every)

  def fn(ring, slot, g, value, count, memory):
    own, anchors, memory = coefs(slot == 0, g, value, count, memory)
    return ring.at[slot].set(own).at[0].add(anchors), memory

  forget = lambda slot, memory: memory._replace(anchor_grad=jnp.where(
      slot is None or slot == 0, jnp.nan, memory.anchor_grad))
  if stored_anchor:
    return _stored(plain, of_parts, rows, every, directions, coefs,
                   rounding(key, directions, stochastic_rounding))
  return pending(
      ZerothOrderTransformation(plain.init, update_fn), every,
      directions, Rule(fn, _no_memory, forget),
      rounding(key, directions, stochastic_rounding))


def _no_memory(n: int) -> SvrgMemory:
  return SvrgMemory(
      jnp.full([n], jnp.nan, jnp.float32), jnp.float32(1.0), jnp.float32(0.0),
      jnp.float32(jnp.nan), jnp.int32(0))


def _stored(plain, of_parts, rows, every: int, directions: Directions, coefs,
            finish: optax.GradientTransformation):
  """The same with a copy of the anchor, to which no step is pending."""
  def init_fn(params):
    state = plain.init(params)
    return sharding.beside(Remembering(state, (
        _no_memory(state.projected_grad.shape[0]),
        jax.tree.map(jnp.copy, params))), params)

  def update_fn(updates, state, params=None, *, value_fn=None,
                projected_grad=None, value=None, **extra_args):
    old, (memory, anchor) = state
    since = old.count % every
    is_anchor, own = since == 0, old
    if value_fn is not None:
      estimate = of_parts(_parts(extra_args, rows))
      told = lambda state, params, given: estimate.update(
          updates, state, params, value_fn=value_fn, **given)[1]
      here = told(old, params, extra_args | (
          {} if projected_grad is None else {'projected_grad': projected_grad}))
      again = lambda value: old._replace(
          key=Displacement(old.key, 1.0).after(value).keys)
      there = lax.cond(
          is_anchor, lambda state: jnp.zeros_like(here.projected_grad),
          lambda state: told(state, anchor, extra_args).projected_grad,
          again(here.value))
      projected_grad, value = here.projected_grad - there, here.value
      own, extra_args = again(here.value), {}
    given = {} if value is None else dict(value=value)
    _, new = plain.update(  # its updates are not used, nor made
        updates, own, params, projected_grad=projected_grad, **given,
        **extra_args)
    g, n = new.projected_grad, new.projected_grad.shape[0]
    there = jnp.all(jnp.isfinite(g))
    made = old.count - old.total_notfinite  # what a schedule counts
    step, back, after = coefs(is_anchor, g, new.value, made, memory)
    lost = memory._replace(anchor_grad=jnp.where(
        is_anchor, jnp.nan, memory.anchor_grad))
    memory = jax.tree.map(lambda a, b: jnp.where(there, a, b), after, lost)
    keys = jnp.concatenate([directions.keys(own.key, old.count, n),
                            directions.keys(own.key, old.count - since, n)])
    moves = jnp.where(there, jnp.concatenate([step, back]), 0.0)
    updates = direction(params, Displacement(keys, moves), directions,
                        dtype=jnp.float32)
    anchor = jax.tree.map(
        lambda x, a: jnp.where(is_anchor & there, x, a), params, anchor)
    return updates, Remembering(new._replace(key=old.key), (memory, anchor))

  return skip_not_finite(optax.chain(
      ZerothOrderTransformation(init_fn, update_fn), finish))


def _annealed(memory: SvrgMemory, value, by: float, every: int) -> SvrgMemory:
  total, steps = memory.total + value, memory.steps + 1
  due, mean = steps >= every, total / steps.astype(jnp.float32)
  worse = due & (mean > 1.05 * memory.before)
  return memory._replace(
      scale=jnp.where(worse, memory.scale / by, memory.scale),
      total=jnp.where(due, 0.0, total), steps=jnp.where(due, 0, steps),
      before=jnp.where(due, mean, memory.before))


def _parts(batch: dict, rows: int | None) -> int | None:
  sizes = {jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
  if rows is None or max(sizes, default=0) <= rows:
    return None
  if len(sizes) > 1 or max(sizes) % rows:
    raise ValueError(f'a batch of {sorted(sizes)} rows has no equal parts of '
                     f'{rows}.')
  return max(sizes) // rows
