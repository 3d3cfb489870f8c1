r"""MeZO-SVRG: differences to an anchor whose gradient is of many rows.

Gautam et al. (2024, arXiv:2404.08080), Algorithm 1. Every q steps, on all rows
:math:`\mathcal{D}`, or many of them,

.. math:: \bar\theta \leftarrow \theta, \quad \bar g \leftarrow
          \hat\nabla \mathcal{L}(\bar\theta; \mathcal{D}), \quad
          \theta \leftarrow \theta - \eta_1 \bar g

and in between, on a batch, with one and the same z at both points,

.. math:: \theta \leftarrow \theta - \eta_2 \left[
          \hat\nabla \mathcal{L}(\theta; \mathcal{B}) -
          \hat\nabla \mathcal{L}(\bar\theta; \mathcal{B}) + \bar g \right].

The paper keeps a copy of :math:`\bar\theta`. Here the weights themselves are
the anchor: the updates of the q steps after it are accumulated
(as with ``fold_every`` of `mezo_jax.mezo`) as a sum of as many z, around which
losses are evaluated. So two points cost the memory of one, and the anchor is
exact in every precision. (The paper also divides both learning rates by a
constant when losses rise; this is not done here.)
"""

import dataclasses
from typing import NamedTuple, Unpack

import jax
from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments
from mezo_jax.transforms.accumulate import accumulated, Rule
from mezo_jax.transforms.combine import two_sided
from mezo_jax.transforms.estimator import (
  after,
  Estimator,
  LossOptions,
  Spsa,
  with_key,
)
from mezo_jax.transforms.mezo import rounding
from mezo_jax.transforms.types import ZerothOrderTransformation


class SvrgMemory(NamedTuple):
  """State of the anchor."""

  # shape=(num_samples,), float32: its projected gradients; NaN for no anchor
  anchor_grad: jax.Array


def svrg(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, every: int = 2, anchor_learning_rate: float | optax.Schedule = 1e-3,
    rows: int | None = None, stochastic_rounding: bool = True,
    **options: Unpack[LossOptions]) -> ZerothOrderTransformation:
  r"""MeZO-SVRG as a whole optimizer, with its two learning rates.

  Step number t is an anchor's if ``every`` divides t: pass that ``update`` (or
  `mezo_jax.make_step`'s step) a batch of all rows, or of many. A step in
  between takes 4 evaluations of a direction, an anchor's 2. Updates are zero
  except for those of each ``every``-th step, as with `mezo_jax.mezo`'s
  ``fold_every``: evaluate after such a step, or call ``step.flush`` first,
  after which no weight moves until the next anchor.

  Args:
    learning_rate: :math:`\eta_2`, a number or a schedule of the steps that were
      not skipped.
    eps: Perturbation scale, as for `mezo_jax.spsa`, without groups.
    every: q, the number of steps from one anchor to the next.
    anchor_learning_rate: :math:`\eta_1`, a number or a schedule.
    rows: A larger batch is evaluated in equal parts of at most this many rows.
      None for no limit.
    stochastic_rounding: Whether half-precision weights are rounded
      stochastically.
    **options: Other options of `mezo_jax.spsa`.

  Raises:
    ValueError: As `mezo_jax.spsa`; for ``every`` below 2, groups of eps, or a
      batch that ``rows`` does not divide.
  """
  spsa = Spsa(eps, combine=two_sided, **options).one_eps()
  if spsa.micro_batches > 1:
    raise ValueError('svrg evaluates a large batch in parts of rows=: leave '
                     'micro_batches at 1.')
  learning_rate, anchor_learning_rate = (
      arguments.rate(name, rate, groups=False) for name, rate in (
          ('learning_rate', learning_rate),
          ('anchor_learning_rate', anchor_learning_rate)))
  arguments.whole('every', every, 2)
  if rows is not None:
    arguments.whole('rows', rows)

  def measure(state, params, value_fn, batch, around=None):
    parts = dataclasses.replace(spsa, micro_batches=_parts(batch, rows))
    value, here = parts.measure(state, params, value_fn, batch, around=around)
    # One after the other: collectives of both would wait for each other.
    key = after(state.key, value)
    def there(key):
      return parts.measure(with_key(state, key), params, value_fn, batch)[1]
    anchors = lax.cond(state.count % every == 0,
                       lambda key: jnp.zeros_like(here), there, key)
    return value, here - anchors

  def coefs(is_anchor, g, count, memory):
    """Returns the coefficients of the step's z and of the anchor's z, and the
    new memory."""
    n, anchor_grad = g.shape[0], jnp.where(is_anchor, g, memory.anchor_grad)
    rates = [arguments.at(rate, count)
             for rate in (anchor_learning_rate, learning_rate)]
    # Without an anchor the difference on one batch means nothing: no step.
    lost = jnp.any(jnp.isnan(anchor_grad))
    own = -jnp.where(is_anchor, rates[0], jnp.where(lost, 0.0, rates[1])) * g
    anchors = jnp.where(is_anchor | lost, 0.0, -rates[1] * anchor_grad)
    return own / n, anchors / n, SvrgMemory(anchor_grad)

  def fn(ring, slot, g, count, memory):
    own, anchors, memory = coefs(slot == 0, g, count, memory)
    return ring.at[slot].set(own).at[0].add(anchors), memory

  def forget(slot, memory):
    lost = True if slot is None else slot == 0
    return SvrgMemory(jnp.where(lost, jnp.nan, memory.anchor_grad))

  return accumulated(
      Estimator(spsa, measure=measure), every, Rule(fn, _no_memory, forget),
      rounding(spsa.key, spsa.directions, stochastic_rounding))


def _no_memory(n: int) -> SvrgMemory:
  return SvrgMemory(jnp.full([n], jnp.nan, jnp.float32))


def _parts(batch, rows: int | None) -> int | None:
  sizes = {jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
  if rows is None or max(sizes, default=0) <= rows:
    return None
  if len(sizes) > 1 or max(sizes) % rows:
    raise ValueError(f'a batch of {sorted(sizes)} rows has no equal parts of '
                     f'{rows}.')
  return max(sizes) // rows
