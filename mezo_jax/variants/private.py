r"""Private MeZO: each row's difference is clipped, and their sum is noised.

A direction knows nothing of the data, so all that a step tells of a row is one
number, of which the sum is released with noise:

.. math::
  d_i &= (\ell_i(\theta + \epsilon z) - \ell_i(\theta - \epsilon z))
         / (2 \epsilon) \\
  g &= \frac{1}{B} \Bigl( \sum_i \mathrm{clip}(d_i, \pm C) + C \sigma \xi
       \Bigr), \qquad \xi \sim \mathcal{N}(0, 1) \text{ or Laplace}(1)

DPZero (Zhang et al., 2024, arXiv:2310.09639, Algorithm 2) and DP-ZO (Tang et
al., 2024, arXiv:2401.04343). The sum over the rows of a Poisson sample, B the
number that is expected of them, changes by at most C when a row is added or
removed: docs/relatives.md tells how to find the :math:`\sigma` for a budget.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax.core import arguments, dtypes
from mezo_jax.directions import noise as noise_lib
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import perturbed
from mezo_jax.transforms import losses
from mezo_jax.transforms.mezo import descent
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.types import ZerothOrderTransformation

MECHANISMS = ('gaussian', 'laplace')


def private(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, clip: float, noise_multiplier: float,
    batch_size: float, mechanism: str = 'gaussian',
    directions: Directions | str = Normal(), num_samples: int | None = None,
    micro_batches: int | None = None, weight_decay: float = 0.0,
    decay: Any = None, stochastic_rounding: bool = True
) -> ZerothOrderTransformation:
  r"""MeZO whose steps tell of the rows what a privacy budget allows.

  ``update(None, state, params, value_fn=..., noise_key=...)``: the key of
  :math:`\xi`, new for each step, is the caller's secret. It is kept nowhere,
  and depends on nothing that is published; ``key`` may be. ``value_fn`` returns
  the rows' values ``[B]``, or ``(values, weights)``, where rows of weight 0
  are not there and all others count the same; a row's value is to depend on no
  other row. A row whose difference is not finite counts as 0, so that any
  row's part is bounded, and no row's losses can have a step skipped.

  The state has g as it is released; its ``value`` is NaN: the loss of the rows
  is not. With several directions a row's n differences are clipped together,
  to a Euclidean length of C, and noised each: one release of n numbers.

  Args:
    learning_rate: :math:`\eta`.
    eps: see `mezo_jax.spsa`; no groups.
    key: of the directions; a `jax.random.key` or an integer seed.
    clip: C, in units of g.
    noise_multiplier: :math:`\sigma`; of 'gaussian' the standard deviation, of
      'laplace' the scale, over C.
    batch_size: B, the number of rows that is *expected*: a constant.
    mechanism: 'gaussian' or 'laplace'.
    directions: what z is.
    num_samples: directions a step; 1 if None, and with 'laplace'.
    micro_batches: parts that the rows are evaluated in.
    weight_decay: as of `mezo_jax.mezo`, and the next two.
    decay: which leaves are decayed.
    stochastic_rounding: of half-precision weights.

  Raises:
    ValueError: for an option out of range; in ``update`` without ``noise_key``,
      and for a ``value_fn`` that returns a scalar.
  """
  if not isinstance(mechanism, str) or mechanism not in MECHANISMS:
    raise ValueError(
        f'mechanism must be one of {MECHANISMS}, got {mechanism!r}.')
  for name, value in (('clip', clip), ('batch_size', batch_size),
                      ('noise_multiplier', noise_multiplier)):
    arguments.number(name, value)
  if not (clip > 0 and noise_multiplier >= 0 and batch_size > 0):
    raise ValueError(
        'clip and batch_size must be positive and noise_multiplier not '
        f'negative, got {clip}, {batch_size} and {noise_multiplier}.')
  if mechanism == 'laplace' and num_samples not in (None, 1):
    raise ValueError("mechanism 'laplace' needs num_samples of 1.")
  if isinstance(eps, Mapping):
    raise ValueError('private takes one eps, no groups.')
  eps = arguments.rate('eps', eps, above=0, groups=False)
  directions = as_directions(directions)
  n = 1 if num_samples is None else arguments.whole('num_samples', num_samples)
  estimate = spsa(eps, key=key, directions=directions, num_samples=n,
                  micro_batches=micro_batches, dtype=jnp.float32)

  def released(state, params, value_fn, noise_key, extra_args):
    """g [n]."""
    keys = directions.keys(state.key, state.count, n)
    epsilon = arguments.at(eps, state.count)
    batch = losses.accepted(value_fn, extra_args)

    def rows_at(point):  # one forward pass is in memory at a time
      at = lambda part: _rows(
          perturbed(value_fn, directions)(params, point, **part), part)
      if micro_batches is None or micro_batches == 1:
        return at(batch)
      rows, with_rows = losses.split_batch(batch, micro_batches)
      parts = lax.map(lambda rows: at(with_rows(rows)), rows)
      return jax.tree.map(jnp.ravel, parts)

    values, there = lax.map(rows_at, Displacement(
        jnp.repeat(keys, 2), jnp.tile(jnp.float32([epsilon, -epsilon]), n)))
    plus, minus = values.reshape(n, 2, -1).swapaxes(0, 1)
    d = (plus - minus) / (2 * epsilon)  # [n, B]
    d = jnp.where(jnp.all(jnp.isfinite(d), 0) & there[0], d, 0.0)
    length = jnp.sqrt(jnp.sum(d**2, 0))
    d = d * jnp.minimum(1.0, clip / jnp.maximum(length, clip))[None]
    scale = clip * noise_multiplier
    return (jnp.sum(d, 1) + scale * noise(noise_key, n, mechanism)) / batch_size

  def update_fn(updates, state, params=None, *, value_fn=None,
                projected_grad=None, noise_key=None, **extra_args):
    if projected_grad is None and value_fn is not None and params is not None:
      if noise_key is None:
        raise ValueError(
            'private needs the secret key of its noise, a new one for each '
            'step: tx.update(..., noise_key=...); see '
            'mezo_jax.training.privacy.')
      arguments.check_names(value_fn, noise_key=noise_key)
      projected_grad = released(state, params, value_fn, noise_key, extra_args)
      value_fn, extra_args = None, {}
    return estimate.update(
        updates, state, params, value_fn=value_fn,
        projected_grad=projected_grad, **extra_args)

  return descent(
      ZerothOrderTransformation(estimate.init, update_fn),
      learning_rate, key=key, directions=directions, weight_decay=weight_decay,
      decay=decay, stochastic_rounding=stochastic_rounding)


def _rows(out, batch: dict) -> tuple[jax.Array, jax.Array]:
  """Returns values [B], and which rows are there [B].

  Args:
    out: What a value_fn returned.
    batch: Its arguments.

  Raises:
    ValueError: if it is not one number for each row. A mean over rows, or a
      value for each token, would be clipped as if it were a row.
  """
  losses.sums(out)  # refuses what is no loss
  values, *weights = out if isinstance(out, (tuple, list)) else (out,)
  values = jnp.asarray(values)
  if not jnp.ndim(values):
    raise ValueError(
        'private clips what each row adds: value_fn must return the rows\' '
        'values [B], or (values, weights) with weight 0 for rows that are not '
        'there, and returned a scalar.')
  lengths = {jnp.shape(x)[0] for x in jax.tree.leaves(batch)
             if hasattr(x, 'shape') and jnp.ndim(x)}
  if lengths and len(values) not in lengths:
    raise ValueError(
        f'private clips what each row adds: value_fn returned {len(values)} '
        f'values for a batch whose arrays have {sorted(lengths)} rows; it must '
        'return one for each row.')
  there = jnp.ones(values.shape, bool)
  if weights:
    there = jnp.asarray(weights[0]) > 0
  return values.astype(dtypes.wide(values.dtype)), there


def noise(key: Any, n: int, mechanism: str) -> jax.Array:
  r""":math:`\xi`, float32 [n]: standard normal, or Laplace's of scale 1.

  Of uniform numbers u of 64 bits, of which :math:`-\ln u` goes up to 45. Those
  of `jax.random` have 23 bits: its normal draws end at 5.4, and in thousands of
  steps what lies beyond is likelier than any delta.
  """
  if not noise_lib.is_typed(key):
    key = noise_lib.as_key(key, 'noise_key')
  high, low, other = jax.random.bits(key, (3, n), jnp.uint32).astype(
      jnp.float32)
  u = high * np.float32(2**-32) + (low + 0.5) * np.float32(2**-64)
  length = -jnp.log(u)  # Box and Muller's, and Laplace's size
  if mechanism == 'gaussian':
    return jnp.sqrt(2 * length) * jnp.cos(
        np.float32(2 * np.pi * 2**-32) * other)
  return jnp.where(other < np.float32(2**31), length, -length)
