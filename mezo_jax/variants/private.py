r"""Provides SPSA with differential privacy.

A direction z does not depend on the data. A step therefore uses only one number
from each example: the difference of its losses along z. `private` clips these
numbers and adds noise to their sum. `mezo_jax.training.privacy` chooses how
much noise a privacy budget requires.
"""

from typing import Any, get_args, Literal, Unpack

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments, dtypes
from mezo_jax.directions import noise as noise_lib
from mezo_jax.perturb.api import perturbed
from mezo_jax.transforms import losses
from mezo_jax.transforms.combine import two_sided
from mezo_jax.transforms.estimator import Estimator, SampleOptions, Spsa

Mechanism = Literal['gaussian', 'laplace']
MECHANISMS = get_args(Mechanism)


def private(
    eps: Any = 1e-3,
    *,
    clip: float,
    noise_multiplier: float,
    batch_size: float,
    mechanism: Mechanism = 'gaussian',
    **options: Unpack[SampleOptions],
) -> Estimator:
  r"""Clips each example's difference of losses, and adds noise to their sum.

  .. math::
    d_i &= (\ell_i(\theta + \epsilon z) - \ell_i(\theta - \epsilon z))
           / (2 \epsilon), \\
    g &= \frac{1}{B} \Bigl( \sum_i \mathrm{clip}(d_i, \pm C) + C \sigma \xi
         \Bigr), \qquad \xi \sim \mathcal{N}(0, 1) \text{ or Laplace}(1)

  The sum runs over the examples of a Poisson sample, and B is their expected
  number. Adding or removing an example changes the sum by at most C. With n
  directions, the n differences of an example are clipped together to a
  Euclidean length of C, and noise is added to each of the n sums.

  ``update(None, state, params, value_fn=loss, noise_key=noise_key, **batch)``
  needs a key for :math:`\xi`, a new one for each step. This key is a secret of
  the caller. Never store it with anything that you publish, and do not derive
  it from something published. (The ``key`` of the directions may be published.)

  The loss returns per-example losses ``[B]``, or ``(losses, weights)``. Weights
  only mark which examples exist: those of weight 0 are ignored, and all others
  count equally. The loss of an example must not depend on other examples. A
  difference that is not finite counts as 0, so that no example can cause a step
  to be skipped.

  The state contains g, which includes the noise and may be published. The
  ``value`` of the state is always NaN, since the loss would reveal more.

  Args:
    eps: Perturbation scale :math:`\epsilon`, a number or a schedule. Defaults
      to 1e-3.
    clip: Clipping threshold C of the differences :math:`d_i`, above 0.
    noise_multiplier: Noise :math:`\sigma` relative to C, at least 0. It is the
      standard deviation of the noise for 'gaussian' and its scale for
      'laplace'.
    batch_size: Expected number B of examples in a batch, a constant above 0.
    mechanism: Distribution of the noise, 'gaussian' (the default) or 'laplace'.
      The latter needs ``num_samples`` of 1.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``num_samples``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`.

  Raises:
    ValueError: If an argument is out of range, or if ``eps`` has groups.
      ``update`` raises it if ``noise_key`` is missing or the loss does not
      return one number per example.

  References:
    Zhang et al., 2024, `DPZero <https://arxiv.org/abs/2310.09639>`_, Algorithm
    2. Tang et al., 2024, `DP-ZO <https://arxiv.org/abs/2401.04343>`_.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax
    >>> from mezo_jax import variants
    >>> tx = mezo_jax.mezo(1e-2, estimator=variants.private(
    ...     1e-3, clip=1.0, noise_multiplier=0.5, batch_size=4, key=0))
    >>> params, x = jnp.ones(3), jnp.ones((4, 3))
    >>> loss = lambda params, x: x @ params  # a number per example
    >>> updates, state = tx.update(
    ...     None, tx.init(params), params, value_fn=loss, x=x,
    ...     noise_key=jax.random.key(1))
  """
  if not isinstance(mechanism, str) or mechanism not in MECHANISMS:
    raise ValueError(
        f'mechanism must be one of {MECHANISMS}, got {mechanism!r}.')
  arguments.number('clip', clip, above=0)
  arguments.number('noise_multiplier', noise_multiplier, least=0)
  arguments.number('batch_size', batch_size, above=0)
  spsa = Spsa(eps, combine=two_sided, over='scan', **options).one_eps()
  n, parts = spsa.num_samples, spsa.micro_batches
  if mechanism == 'laplace' and n > 1:
    raise ValueError("mechanism 'laplace' needs num_samples=1.")

  def measure(state, params, value_fn, batch):
    batch = dict(batch)
    noise_key = batch.pop('noise_key', None)
    if noise_key is None:
      raise ValueError(
          'noise_key is missing: private needs a secret key for the noise of '
          'each step, tx.update(..., noise_key=...). See '
          'mezo_jax.training.privacy.')
    arguments.check_names(value_fn, noise_key=noise_key)
    batch = losses.accepted(value_fn, batch)
    displaced = perturbed(value_fn, spsa.directions)

    def rows_at(point):
      """Evaluates the per-example losses at one point, in parts."""
      def at(part):
        return _rows(displaced(params, point, **part), part)
      if parts == 1:
        return at(batch)
      rows, with_rows = losses.split_batch(batch, parts)
      found = lax.map(lambda rows: at(with_rows(rows)), rows)
      return jax.tree.map(jnp.ravel, found)

    eps = spsa.eps_at(state)
    z = spsa.z(state)
    points = z.times(eps).joined(z.times(-eps))
    # `lax.map` evaluates one point after the other, with one forward pass in
    # memory.
    values, there = lax.map(rows_at, points)
    plus, minus = jnp.split(values, 2)
    d = (plus - minus) / (2 * eps)  # [n, B]
    # An example counts as 0 if it does not exist or a difference is not finite.
    counts = there[0] & jnp.all(jnp.isfinite(d), 0)
    d = jnp.where(counts, d, 0.0)
    # Clip the n differences of each example to a Euclidean length of C.
    length = jnp.sqrt(jnp.sum(d**2, 0))
    share = jnp.minimum(1.0, clip / jnp.maximum(length, clip))
    d = d * share[None]
    scale = clip * noise_multiplier
    total = jnp.sum(d, 1) + scale * noise(noise_key, n, mechanism)
    # The loss is not reported, since it has no noise and is not private.
    return None, total / batch_size

  return Estimator(spsa, measure=measure)


def _rows(out, batch: dict) -> tuple[jax.Array, jax.Array]:
  """Returns the per-example losses [B], and whether each example exists [B].

  Args:
    out: The result of a ``value_fn``.
    batch: Its arguments.

  Raises:
    ValueError: If ``out`` is not one number per example. A mean over examples,
      or a number per token, would be clipped as if it were an example, and the
      result would not be private.
  """
  losses.sums(out)  # raises ValueError for something that is not a loss
  values, *weights = out if isinstance(out, (tuple, list)) else (out,)
  values = jnp.asarray(values)
  if not jnp.ndim(values):
    raise ValueError(
        'value_fn returned a scalar, but private clips per-example losses. '
        'Return losses [B], or (losses, weights) with weight 0 for examples '
        'that do not exist.')
  lengths = {len(x) for x in jax.tree.leaves(batch) if getattr(x, 'ndim', 0)}
  if lengths and len(values) not in lengths:
    raise ValueError(
        f'value_fn returned {len(values)} losses for a batch whose arrays have '
        f'first axes of {sorted(lengths)}. Return one loss per example, which '
        'private can clip.')
  if weights:
    there = jnp.asarray(weights[0]) > 0
  else:
    there = jnp.ones(values.shape, bool)
  return values.astype(dtypes.wide(values.dtype)), there


def noise(key: Any, n: int, mechanism: str) -> jax.Array:
  r"""Returns the noise :math:`\xi`, float32 [n].

  The noise is computed from uniform numbers of 64 bits. `jax.random.normal`
  uses 23 bits, so its results never exceed 5.4. Over thousands of steps, the
  probability of larger numbers, which are missing, is above a typical delta.

  Args:
    key: The secret key of the step.
    n: Number of directions.
    mechanism: 'gaussian', for the standard normal distribution, or 'laplace',
      for the Laplace distribution of scale 1.
  """
  if not noise_lib.is_typed(key):
    key = noise_lib.as_key(key, 'noise_key')
  high, low, other = jax.random.bits(key, (3, n), jnp.uint32).astype(
      jnp.float32)
  low = (low + 0.5) * np.float32(2**-64)
  u = high * np.float32(2**-32) + low
  # -log(u) is exponentially distributed. It is half the squared radius of the
  # Box-Muller transform, and the absolute value of a Laplace variable.
  length = -jnp.log(u)
  if mechanism == 'gaussian':
    angle = np.float32(2 * np.pi * 2**-32) * other
    return jnp.sqrt(2 * length) * jnp.cos(angle)
  return jnp.where(other < np.float32(2**31), length, -length)
