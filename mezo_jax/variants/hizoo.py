r"""HiZOO: directions scaled by an estimate of the Hessian's diagonal.

With H, one positive number per weight, at first 1,

.. math::
  \ell_\pm &= \mathcal{L}(\theta \pm \epsilon H^{-1/2} z; \mathcal{B}), \quad
  g = \frac{\ell_+ - \ell_-}{2 \epsilon}, \quad
  h = \frac{|\ell_+ - 2 \ell_0 + \ell_-|}{2 \epsilon^2} \\
  \theta &\leftarrow \theta - \eta\, g H^{-1/2} z, \qquad
  H \leftarrow (1 - \alpha) H + \alpha\, h\, H \odot z^2

H is as large as float32 weights: this variant takes twice the memory of
inference (three times that of half-precision weights), and during an update as
much again. Source: Zhao et al., 2024, arXiv:2402.15173.
"""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from mezo_jax.core import arguments, paths
from mezo_jax.core.quantized import is_codes
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
  r"""SPSA along :math:`H^{-1/2} z`, with 2n + 1 evaluations per step.

  The weights move along the direction that was evaluated; H changes after them.
  With n directions, the mean of :math:`h z^2` is used. The numbers of a step
  are [2n]: first all g, then all h. The memory is :math:`H^{-1/2}`.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`, without groups.
    alpha: :math:`\alpha`. h is about half the Hessian's trace, which is large
      for a large model. The authors' example uses 1e-8.
    **options: Other options of `mezo_jax.spsa`.
  """
  spsa = Spsa(eps, combine=two_sided, **options).one_eps()
  arguments.number('alpha', alpha, least=0, below=1)
  n = spsa.num_samples

  def memory(params):
    return paths.map_named(lambda path, x, used: _ones(x, used), params,
                           spsa.directions.selected(params))

  def measure(state, params, value_fn, batch):
    # A float32 eps, as from eps_at, has a square that differs in the last bit.
    eps = arguments.at(spsa.eps, state.count)
    losses = spsa.along(multiplier=Multiplier(state.memory)).losses(
        state, params, value_fn, batch, signs=(1.0, -1.0, 0.0))
    plus, minus, clean = losses.T
    g = (plus - minus) / (2 * eps)
    h = jnp.abs(plus - 2 * clean + minus) / (2 * eps**2)
    return jnp.mean(losses[:, :2]), jnp.concatenate([g, h])

  def apply(state, params, numbers):
    g, h = jnp.split(numbers.projected_grad, 2)
    h, rate = unless_skipped(
        numbers, (h / n, jnp.float32(alpha)), (jnp.zeros(n), jnp.float32(0)))
    scaled = spsa.along(multiplier=Multiplier(state.memory))
    updates = scaled.apply(state, params, numbers._replace(projected_grad=g))
    # Draws are scaled by s = H^(-1/2), so H z^2 is (s z)^2 / s^4.
    squares = mapped(
        lambda w, draws: sum(h[j] * draws.term(j, w)**2 for j in range(n)),
        params, spsa.z(state), scaled.directions, dtype=jnp.float32)
    def after(s, square):
      if not s.ndim and square.ndim:
        return s  # the leaf has no z
      hessian = (1 - rate + rate * square / s**2) / s**2
      return jnp.minimum(jax.lax.rsqrt(hessian), jnp.float32(1e6))
    new = jax.tree.map(after, state.memory, squares)
    return updates, unless_skipped(numbers, new, state.memory)

  return Estimator(spsa, measure=measure, apply=apply, memory=memory,
                   size=2 * n)


def _ones(x, used) -> jax.Array:
  """Returns ones placed as a leaf is; one number for a leaf without z."""
  if used is False:
    return jnp.ones((), jnp.float32)
  if is_codes(x):
    return jnp.ones(x.shape, jnp.float32)
  return jnp.ones_like(x, jnp.float32)
