r"""Provides HiZOO, which scales directions by an estimate of the Hessian."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from mezo_jax.core import arguments, paths
from mezo_jax.directions.displacement import Multiplier
from mezo_jax.perturb.api import mapped
from mezo_jax.transforms.combine import two_sided
from mezo_jax.transforms.estimator import (
  Estimator,
  LossOptions,
  Spsa,
  unless_skipped,
)


def hizoo(eps: Any = 1e-3, *, alpha: float = 1e-8,
          **options: Unpack[LossOptions]) -> Estimator:
  r"""Runs SPSA along directions scaled by an estimate of the Hessian (HiZOO).

  The estimate H has one positive number per weight, which is 1 at first and
  approaches the diagonal of the Hessian. With one direction,

  .. math::
    \ell_\pm &= \mathcal{L}(\theta \pm \epsilon H^{-1/2} z; \mathcal{B}), \quad
    g = \frac{\ell_+ - \ell_-}{2 \epsilon}, \quad
    h = \frac{|\ell_+ - 2 \ell_0 + \ell_-|}{2 \epsilon^2}, \\
    \theta &\leftarrow \theta - \eta\, g H^{-1/2} z, \qquad
    H \leftarrow (1 - \alpha) H + \alpha\, h\, H \odot z^2.

  The weights move along the direction that was evaluated, and H changes
  afterwards. With n directions, the means of :math:`g z` and of :math:`h z^2`
  are used. A step takes 2n + 1 evaluations.

  H takes as much memory as float32 weights. Weights and H together take twice
  the memory of float32 weights, or three times that of half-precision weights.
  During an update, the new H takes the memory of H once more.

  Args:
    eps: Perturbation scale :math:`\epsilon`, a number or a schedule. Defaults
      to 1e-3.
    alpha: Weight :math:`\alpha` of the curvature of a step, at least 0 and
      below 1. It must be small, since h is about half the trace of the Hessian,
      which is large for a large model. Defaults to 1e-8, as in the authors'
      example.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`. A step has
    2n numbers: first the g, then the h of all directions. The memory of its
    state is :math:`H^{-1/2}`, float32, a tree like the params.

  Raises:
    ValueError: If ``alpha`` is out of range, if ``eps`` has groups, or for an
      option that `mezo_jax.spsa` does not accept.

  References:
    Zhao et al., 2024, `Second-Order Fine-Tuning without Pain for LLMs: A
    Hessian Informed Zeroth-Order Optimizer
    <https://arxiv.org/abs/2402.15173>`_, Algorithm 1.

  Example:
    >>> import mezo_jax
    >>> from mezo_jax import variants
    >>> tx = mezo_jax.mezo(1e-6, estimator=variants.hizoo(1e-3, key=0))
  """
  spsa = Spsa(eps, combine=two_sided, **options).one_eps()
  arguments.number('alpha', alpha, least=0, below=1)
  n = spsa.num_samples

  def memory(params):
    def ones(path, x, used):
      """Returns ones with the sharding of a leaf, or 1 for one without a z."""
      del path
      return jnp.ones_like(jnp.float32(1) if used is False else x, jnp.float32)
    return paths.map_named(ones, params, spsa.directions.selected(params))

  def measure(state, params, value_fn, batch):
    # Read eps from the options, since `eps_at` returns a float32 array. The
    # square of that would differ in the last bit from that of a Python number.
    eps = arguments.at(spsa.eps, state.count)
    scaled = spsa.along(multiplier=Multiplier(state.memory))
    losses = scaled.losses(
        state, params, value_fn, batch, signs=(1.0, -1.0, 0.0))
    plus, minus, clean = losses.T
    g = (plus - minus) / (2 * eps)
    h = jnp.abs(plus - 2 * clean + minus) / (2 * eps**2)
    return jnp.mean(losses[:, :2]), jnp.concatenate([g, h])

  def apply(state, params, numbers):
    g, h = jnp.split(numbers.projected_grad, 2)
    h, rate = h / n, jnp.float32(alpha)
    scaled = spsa.along(multiplier=Multiplier(state.memory))
    updates = scaled.apply(state, params, numbers._replace(projected_grad=g))
    # ``draws.term`` is s z with s = H^(-1/2), and H z^2 equals (s z)^2 / s^4.
    def mean_square(w, draws):
      return sum(h[j] * draws.term(j, w)**2 for j in range(n))
    squares = mapped(mean_square, params, spsa.z(state), scaled.directions,
                     dtype=jnp.float32)
    def after(s, square):
      if not s.ndim and square.ndim:
        return s  # The leaf has no z. Its memory is the number 1.
      hessian = (1 - rate + rate * square / s**2) / s**2
      return jnp.minimum(jax.lax.rsqrt(hessian), jnp.float32(1e6))
    new = jax.tree.map(after, state.memory, squares)
    return updates, unless_skipped(numbers, new, state.memory)

  return Estimator(spsa, measure=measure, apply=apply, memory=memory,
                   size=2 * n)
