r"""Provides MeZO-SVRG, which reduces variance by differences to an anchor.

The anchor :math:`\bar\theta` is a point at which the weights were at an earlier
step. The paper stores a copy of it. Here the stored weights are the anchor.
Later updates are accumulated as coefficients of z, as with ``apply_every`` of
`mezo_jax.mezo`, and losses are evaluated at the stored weights plus these
updates. Both points together therefore take the memory of one model, and the
anchor is exact in every precision.
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
  """Holds the memory that the coefficients of later steps depend on.

  Attributes:
    anchor_grad: Projected gradients at the anchor, float32 [n]. NaN if there is
      no anchor.
  """

  anchor_grad: jax.Array


def svrg(
    learning_rate: float | optax.Schedule,
    eps: float | optax.Schedule = 1e-3,
    *,
    every: int = 2,
    anchor_learning_rate: float | optax.Schedule = 1e-3,
    rows: int | None = None,
    stochastic_rounding: bool = True,
    **options: Unpack[LossOptions],
) -> ZerothOrderTransformation:
  r"""Optimizes with MeZO-SVRG, which has two learning rates.

  Every q steps, a step sets a new anchor. It is made on all examples
  :math:`\mathcal{D}`, or many of them:

  .. math:: \bar\theta \leftarrow \theta, \quad \bar g \leftarrow
            \hat\nabla \mathcal{L}(\bar\theta; \mathcal{D}), \quad
            \theta \leftarrow \theta - \eta_1 \bar g.

  The other steps evaluate a batch at both points, with the same z:

  .. math:: \theta \leftarrow \theta - \eta_2 \left[
            \hat\nabla \mathcal{L}(\theta; \mathcal{B}) -
            \hat\nabla \mathcal{L}(\bar\theta; \mathcal{B}) + \bar g \right].

  Step number t, counted from 0, sets an anchor if q divides t. For such a step,
  pass a batch of many examples to ``update`` (or to the step of
  `mezo_jax.make_step`). A step that sets an anchor takes 2n evaluations. Every
  other step takes 4n.

  As with ``apply_every`` of `mezo_jax.mezo`, the weights change only every q
  steps, and all other updates are zero. Evaluate your model after a step that
  changes the weights. To evaluate it at another time, call
  ``step.apply_accumulated`` first. This removes the anchor, so that the steps
  up to the next anchor do not change the weights.

  The paper also divides both learning rates by a constant when losses rise.
  This is not implemented.

  Args:
    learning_rate: Learning rate :math:`\eta_2` of the steps between anchors. A
      number, or a schedule of the steps that were not skipped.
    eps: Perturbation scale :math:`\epsilon`, a number or a schedule. Defaults
      to 1e-3.
    every: Number q of steps from one anchor to the next, at least 2. Defaults
      to 2.
    anchor_learning_rate: Learning rate :math:`\eta_1` of anchors, a number or a
      schedule. Defaults to 1e-3.
    rows: Largest number of examples that are evaluated at once. A batch with
      more examples is evaluated in parts of exactly this size. Defaults to
      None, for no limit.
    stochastic_rounding: Whether half-precision and quantised weights are
      rounded stochastically. Defaults to True.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``num_samples``, ``over`` and ``dtype``.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Unlike the other variants, it is
    a whole optimizer and does not go into `mezo_jax.mezo`.

  Raises:
    ValueError: If an argument is out of range, if ``eps`` or a learning rate
      has groups, or for an option that `mezo_jax.spsa` does not accept.
      ``update`` raises it if a batch cannot be divided into parts of ``rows``.

  References:
    Gautam et al., 2024, `Variance-reduced Zeroth-Order Methods for Fine-Tuning
    Language Models <https://arxiv.org/abs/2404.08080>`_, Algorithm 1.

  Example:
    >>> import jax.numpy as jnp
    >>> from mezo_jax import variants
    >>> tx = variants.svrg(1e-4, every=2, key=0)
    >>> loss = lambda params, x: jnp.mean(x @ params)
    >>> params, state = jnp.ones(3), tx.init(jnp.ones(3))
    >>> updates, state = tx.update(  # step 0 sets an anchor
    ...     None, state, params, value_fn=loss, x=jnp.ones((8, 3)))
  """
  spsa = Spsa(eps, combine=two_sided, **options).one_eps()
  if spsa.micro_batches > 1:
    raise ValueError('micro_batches must be 1 for svrg. Pass rows= to evaluate '
                     'a large batch in parts.')
  learning_rate = arguments.rate('learning_rate', learning_rate, groups=False)
  anchor_learning_rate = arguments.rate(
      'anchor_learning_rate', anchor_learning_rate, groups=False)
  arguments.whole('every', every, 2)
  if rows is not None:
    arguments.whole('rows', rows)

  def measure(state, params, value_fn, batch, around=None):
    parts = dataclasses.replace(spsa, micro_batches=_parts(batch, rows))
    value, here = parts.measure(state, params, value_fn, batch, around=around)

    def at_anchor(key):
      """Returns the projected gradients at the anchor."""
      return parts.measure(with_key(state, key), params, value_fn, batch)[1]

    # Evaluate the anchor after the weights. On several devices, two evaluations
    # at the same time could deadlock in their collectives.
    key = after(state.key, value)
    anchors = lax.cond(state.count % every == 0,
                       lambda key: jnp.zeros_like(here), at_anchor, key)
    return value, here - anchors

  def fn(ring, slot, g, count, memory):
    """Adds the coefficients of a step, the first of which sets the anchor."""
    is_anchor = slot == 0
    anchor_grad = jnp.where(is_anchor, g, memory.anchor_grad)
    rate = arguments.at(learning_rate, count)
    anchor_rate = arguments.at(anchor_learning_rate, count)
    # Without an anchor, the difference on a batch does not estimate the
    # gradient, so the weights are not changed.
    lost = jnp.any(jnp.isnan(anchor_grad))
    own = -jnp.where(is_anchor, anchor_rate, jnp.where(lost, 0.0, rate)) * g
    ring = ring.at[slot].set(own / len(g))
    # The gradient at the anchor is added once more, along the z of row 0.
    again = jnp.where(is_anchor | lost, 0.0, -rate * anchor_grad)
    ring = ring.at[0].add(again / len(g))
    return ring, SvrgMemory(anchor_grad)

  def init(n):
    """Returns the memory before the first anchor."""
    return SvrgMemory(jnp.full([n], jnp.nan, jnp.float32))

  def forget(slot, memory):
    """Removes the anchor.

    This happens if the step that should have set it was skipped, or if the
    accumulated updates have been applied, so that the weights have changed.
    """
    lost = True if slot is None else slot == 0
    return SvrgMemory(jnp.where(lost, jnp.nan, memory.anchor_grad))

  return accumulated(
      Estimator(spsa, measure=measure), every, Rule(fn, init, forget),
      rounding(spsa.key, spsa.directions, stochastic_rounding))


def _parts(batch, rows: int | None) -> int | None:
  """Returns into how many parts a batch is divided; None for no division."""
  sizes = [len(x) for x in jax.tree.leaves(batch) if jnp.ndim(x)]
  size = max(sizes, default=0)
  if rows is None or size <= rows:
    return None
  if size % rows:
    raise ValueError(f'rows={rows}: a batch of {size} rows cannot be divided '
                     'into parts of this size.')
  return size // rows
