r"""Provides momentum and Adam that are recomputed from the last h steps.

A gradient estimate is determined by the key and the projected gradients of its
step. The moments of an optimizer can therefore be recomputed from the last h
steps, element by element, while they are added to the weights. No array of the
size of the weights is stored.
"""

from collections.abc import Callable
from typing import Any, Unpack

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import arguments
from mezo_jax.perturb.api import direction, mapped
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions


def momentum_by_history(eps: Any = 1e-3, *, beta: float = 0.9, window: int = 8,
                        **options: Unpack[SpsaOptions]) -> Estimator:
  r"""Adds heavy-ball momentum to SPSA, recomputed from the last h steps.

  .. math:: u_t = \sum_{s=t-h+1}^{t} \beta^{t-s}
            \frac{1}{n} \sum_{j=1}^n g_{s,j} z_{s,j}

  This equals ``chain(spsa(...), optax.trace(beta))``, except that only the last
  h steps count. The weight of an older step would be at most :math:`\beta^h`.

  An update draws h times as many directions as an update of SPSA. Prefer
  `mezo_jax.Rademacher` or `mezo_jax.LowRank`, which are cheap to draw. If the
  number h n of terms is above 8 (32 for `LowRank`), the sum is computed in a
  loop, which needs a float32 array of the size of the largest leaf.

  Args:
    eps: Perturbation scale :math:`\epsilon`, a number or a schedule. Defaults
      to 1e-3.
    beta: Decay rate :math:`\beta`, at least 0 and below 1. Defaults to 0.9.
    window: Number of steps h. Defaults to 8.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``combine``, ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`. Its memory
    has the projected gradients of the last h steps, float32 [h, n].

  Raises:
    ValueError: If ``beta`` or ``window`` is out of range, if ``eps`` has
      groups, or for an option that `mezo_jax.spsa` does not accept.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Appendix B.2.

  Example:
    >>> import mezo_jax
    >>> from mezo_jax import variants
    >>> tx = mezo_jax.mezo(1e-6, estimator=variants.momentum_by_history(
    ...     1e-3, key=0, directions=mezo_jax.Rademacher()))
  """
  spsa = Spsa(eps, **options).one_eps()
  arguments.number('beta', beta, least=0, below=1)

  def update(params, z, g, weights):
    coefs = g * (weights(beta) / spsa.num_samples)[:, None]
    return direction(params, z.times(coefs.ravel()), spsa.directions,
                     dtype=jnp.float32)

  return _of_history(spsa, window, update)


def adam_by_history(
    eps: Any = 1e-3,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    window: int = 8,
    adam_eps: float = 1e-8,
    **options: Unpack[SpsaOptions],
) -> Estimator:
  r"""Rescales SPSA like Adam, with moments recomputed from the last h steps.

  Let :math:`\hat g_s = \frac{1}{n} \sum_j g_{s,j} z_{s,j}` be the estimate of
  step s. For each element,

  .. math::
    m = \frac{\sum_s \beta_1^{t-s} \hat g_s}{\sum_s \beta_1^{t-s}}, \quad
    v = \frac{\sum_s \beta_2^{t-s} \hat g_s^2}{\sum_s \beta_2^{t-s}}, \quad
    u_t = \frac{m}{\sqrt v + \epsilon_{Adam}}.

  The sums run over the last h steps that were not skipped. With one
  `mezo_jax.Rademacher` direction per step, v is the same for all elements, and
  `scalar_adam` is a cheaper choice.

  Args:
    eps: Perturbation scale :math:`\epsilon`, a number or a schedule. Defaults
      to 1e-3.
    b1: Decay rate :math:`\beta_1` of the first moment, at least 0 and below 1.
      Defaults to 0.9.
    b2: Decay rate :math:`\beta_2` of the second moment, at least 0 and below 1.
      Defaults to 0.99.
    window: Number of steps h. The h n draws of an element are computed in one
      fused operation. Defaults to 8.
    adam_eps: Term :math:`\epsilon_{Adam}` that is added to the denominator.
      Defaults to 1e-8.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``combine``, ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`. Its memory
    has the projected gradients of the last h steps, float32 [h, n].

  Raises:
    ValueError: If an argument is out of range, if ``eps`` has groups, or for an
      option that `mezo_jax.spsa` does not accept.

  References:
    `AdaMeZO <https://arxiv.org/abs/2605.00650>`_. Malladi et al., 2023,
    `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Appendix B.2.

  Example:
    >>> import mezo_jax
    >>> from mezo_jax import variants
    >>> tx = mezo_jax.mezo(1e-4, estimator=variants.adam_by_history(
    ...     1e-3, key=0, directions=mezo_jax.LowRank(), window=4))
  """
  spsa = Spsa(eps, **options).one_eps()
  arguments.number('b1', b1, least=0, below=1)
  arguments.number('b2', b2, least=0, below=1)
  arguments.number('adam_eps', adam_eps, least=0)

  n = spsa.num_samples

  def update(params, z, g, weights):
    def normalised(beta):
      """Returns weights [h] whose sum is 1."""
      w = weights(beta)
      return w / jnp.maximum(jnp.sum(w), 1e-30)
    w1, w2 = normalised(b1), normalised(b2)
    g = g / n

    def moments(w, draws):
      """Returns the update of one leaf."""
      m = v = jnp.zeros(w.shape, jnp.float32)
      # This loop is unrolled, so that XLA fuses all terms. A `lax.fori_loop`
      # would store m and v, which are as large as the leaf.
      for s in range(window):
        estimate = sum(g[s, j] * draws.term(s * n + j, w) for j in range(n))
        m += w1[s] * estimate
        v += w2[s] * estimate**2
      return draws.masked(w, m / (jnp.sqrt(v) + adam_eps), 0.0)

    return mapped(moments, params, z, spsa.directions, dtype=jnp.float32)

  return _of_history(spsa, window, update)


def _of_history(spsa: Spsa, window: int, update: Callable) -> Estimator:
  """Returns an estimator whose updates depend on the last h steps.

  Args:
    spsa: SPSA, which measures projected gradients.
    window: Number of steps h.
    update: A function ``(params, z, g, weights) -> updates``. ``z`` is a
      displacement of h * n terms with coefficients of 1, the oldest step first.
      ``g`` has the projected gradients [h, n]. ``weights`` is a function of a
      decay rate that returns its powers [h], the last of which is 1. Both are
      0 for skipped steps and for those before the first.
  """
  arguments.whole('window', window)

  def memory(_):
    return jnp.full((window, spsa.num_samples), jnp.nan, jnp.float32)

  def apply(state, params, numbers):
    past = jnp.concatenate([state.memory[1:], numbers.projected_grad[None]])
    age = window - 1 - jnp.arange(window)
    skipped = jnp.isnan(past)

    def weights(beta):
      # `lax.pow` works under strict dtype promotion, unlike ``**``.
      powers = lax.pow(jnp.full(window, beta), age)
      return jnp.where(skipped[:, 0], 0.0, powers)

    z = jax.vmap(lambda t: spsa.z(state, t))(state.count - age)
    z = jax.tree.map(jnp.ravel, z)
    return update(params, z, jnp.where(skipped, 0.0, past), weights), past

  return Estimator(spsa, apply=apply, memory=memory)
