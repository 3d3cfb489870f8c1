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

The paper keeps a copy of :math:`\bar\theta`. Here the weights themselves are
the anchor: the q steps after it are pending (`mezo_jax._pending`), a sum of as
many z that losses are taken around, so two points cost the memory of one, and
the anchor is exact in every precision.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax._directions import Directions, Normal
from mezo_jax._displacement import Displacement
from mezo_jax._mezo import rounding
from mezo_jax._pending import pending, Rule
from mezo_jax._spsa import as_directions, spsa


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
    anchor_learning_rate: float | optax.Schedule = 1e-3,
    anneal: float = 1.0, anneal_every: int = 100,
    directions: Directions | str = Normal(), rows: int | None = None,
    stochastic_rounding: bool = True, **options
) -> optax.GradientTransformationExtraArgs:
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
    stochastic_rounding: of half-precision weights.
    **options: ``num_samples`` and ``equal_parts`` of `mezo_jax.spsa`.

  Raises:
    ValueError: as `mezo_jax.spsa`; for ``every`` below 2, ``anneal`` below 1,
      or a batch that ``rows`` does not part equally.
  """
  directions = as_directions(directions)
  if not isinstance(every, (int, np.integer)) or every < 2:
    raise ValueError('every must be a Python integer of at least 2, got '
                     f'{every!r}.')
  if isinstance(anneal, (int, float)) and anneal < 1:
    raise ValueError(f'anneal must be at least 1, got {anneal!r}.')
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

  rate_of = lambda rate, count: rate(count) if callable(rate) else rate

  def fn(ring, slot, g, value, count, memory):
    is_anchor, n = slot == 0, g.shape[0]
    anchor_grad = jnp.where(is_anchor, g, memory.anchor_grad)
    rates = [memory.scale * rate_of(rate, count)
             for rate in (anchor_learning_rate, learning_rate)]
    # Of a batch alone the difference says nothing: without an anchor, no step.
    lost = jnp.any(jnp.isnan(anchor_grad))
    own = -jnp.where(is_anchor, rates[0], jnp.where(lost, 0.0, rates[1])) * g
    anchors = jnp.where(is_anchor | lost, 0.0, -rates[1] * anchor_grad)
    ring = ring.at[slot].set(own / n)
    return ring.at[0].add(anchors / n), _annealed(
        memory._replace(anchor_grad=anchor_grad), value, anneal, anneal_every)

  memory_of = lambda n: SvrgMemory(
      jnp.full([n], jnp.nan, jnp.float32), jnp.float32(1.0), jnp.float32(0.0),
      jnp.float32(jnp.nan), jnp.int32(0))
  forget = lambda slot, memory: memory._replace(anchor_grad=jnp.where(
      slot is None or slot == 0, jnp.nan, memory.anchor_grad))
  return pending(
      optax.GradientTransformationExtraArgs(plain.init, update_fn), every,
      directions, Rule(fn, memory_of, forget),
      rounding(key, directions, stochastic_rounding))


def _annealed(memory: SvrgMemory, value, by: float, every: int) -> SvrgMemory:
  total, steps = memory.total + value, memory.steps + 1
  due, mean = steps >= every, total / steps
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
