r"""Private MeZO: each row's difference is clipped, and their sum is noised.

A direction does not depend on the data, so all that a step reveals of a row is
one number. The sum of these numbers is released with noise:

.. math::
  d_i &= (\ell_i(\theta + \epsilon z) - \ell_i(\theta - \epsilon z))
         / (2 \epsilon) \\
  g &= \frac{1}{B} \Bigl( \sum_i \mathrm{clip}(d_i, \pm C) + C \sigma \xi
       \Bigr), \qquad \xi \sim \mathcal{N}(0, 1) \text{ or Laplace}(1)

The sum runs over the rows of a Poisson sample, and B is their expected number.
Adding or removing a row changes the sum by at most C. Source: DPZero (Zhang et
al., 2024, arXiv:2310.09639, Algorithm 2) and DP-ZO (Tang et al., 2024,
arXiv:2401.04343). `mezo_jax.training.privacy` computes :math:`\sigma` for a
budget.
"""

from typing import Any, Unpack

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments, dtypes
from mezo_jax.directions import noise as noise_lib
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import perturbed
from mezo_jax.transforms import losses
from mezo_jax.transforms.combine import two_sided
from mezo_jax.transforms.estimator import Estimator, SampleOptions, Spsa

MECHANISMS = ('gaussian', 'laplace')


def private(eps: Any = 1e-3, *, clip: float, noise_multiplier: float,
            batch_size: float, mechanism: str = 'gaussian',
            **options: Unpack[SampleOptions]) -> Estimator:
  r"""SPSA whose steps reveal of each row only what a privacy budget allows.

  ``update(None, state, params, value_fn=..., noise_key=...)`` needs the key of
  :math:`\xi`, a new one for each step. It is the caller's secret: it is stored
  nowhere and depends on nothing that is published (``key`` may be published).
  ``value_fn`` returns per-example losses ``[B]``, or ``(losses, weights)``,
  where rows of weight 0 are absent and all others count equally. The loss of a
  row must not depend on other rows. A row whose difference is not finite counts
  as 0, so no row can cause a step to be skipped.

  The state has g as it is released. Its ``value`` is NaN, because the loss of
  the rows is not released. With several directions, the n differences of a row
  are clipped together to a Euclidean length of C, and each gets noise: one
  release of n numbers.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`, without groups.
    clip: C, in units of g.
    noise_multiplier: :math:`\sigma`: the standard deviation (for 'gaussian') or
      scale (for 'laplace') of the noise divided by C.
    batch_size: B, the expected number of rows, a constant.
    mechanism: 'gaussian' or 'laplace', which needs one direction.
    **options: Other options of `mezo_jax.spsa`.

  Raises:
    ValueError: For an option out of range; in ``update``, without ``noise_key``
      or for a ``value_fn`` that returns a scalar.
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
  spsa = Spsa(eps, combine=two_sided, over='scan', **options).one_eps()
  n, parts = spsa.num_samples, spsa.micro_batches
  if mechanism == 'laplace' and n > 1:
    raise ValueError("mechanism 'laplace' needs num_samples of 1.")

  def measure(state, params, value_fn, batch):
    batch = dict(batch)
    noise_key = batch.pop('noise_key', None)
    if noise_key is None:
      raise ValueError(
          'private needs the secret key of its noise, a new one for each step: '
          'tx.update(..., noise_key=...); see mezo_jax.training.privacy.')
    arguments.check_names(value_fn, noise_key=noise_key)
    batch = losses.accepted(value_fn, batch)
    displaced = perturbed(value_fn, spsa.directions)
    eps = spsa.eps_at(state)

    def rows_at(point):  # one forward pass is in memory at a time
      at = lambda part: _rows(displaced(params, point, **part), part)
      if parts == 1:
        return at(batch)
      rows, with_rows = losses.split_batch(batch, parts)
      found = lax.map(lambda rows: at(with_rows(rows)), rows)
      return jax.tree.map(jnp.ravel, found)

    values, there = lax.map(rows_at, Displacement(
        jnp.repeat(spsa.z(state).keys, 2),
        jnp.tile(jnp.float32([eps, -eps]), n)))
    plus, minus = values.reshape(n, 2, -1).swapaxes(0, 1)
    d = (plus - minus) / (2 * eps)  # [n, B]
    d = jnp.where(jnp.all(jnp.isfinite(d), 0) & there[0], d, 0.0)
    length = jnp.sqrt(jnp.sum(d**2, 0))
    d = d * jnp.minimum(1.0, clip / jnp.maximum(length, clip))[None]
    scale = clip * noise_multiplier
    total = jnp.sum(d, 1) + scale * noise(noise_key, n, mechanism)
    return None, total / batch_size

  return Estimator(spsa, measure=measure)


def _rows(out, batch: dict) -> tuple[jax.Array, jax.Array]:
  """Returns values [B], and whether each row is present [B].

  Args:
    out: What a value_fn returned.
    batch: Its arguments.

  Raises:
    ValueError: if it is not one number for each row. A mean over rows, or a
      value for each token, would be clipped as if it were a row.
  """
  losses.sums(out)  # raises for something that is not a loss
  values, *weights = out if isinstance(out, (tuple, list)) else (out,)
  values = jnp.asarray(values)
  if not jnp.ndim(values):
    raise ValueError(
        'private clips per-example losses, and value_fn returned a scalar: '
        'return losses [B], or (losses, weights) with weight 0 for rows that '
        'are absent.')
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
  r"""Returns :math:`\xi`, float32 [n]: standard normal, or Laplace of scale 1.

  They are computed from 64-bit uniform numbers. `jax.random.normal` uses 23
  bits and never exceeds 5.4; over thousands of steps, the missing tail would be
  more likely than any delta.
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
