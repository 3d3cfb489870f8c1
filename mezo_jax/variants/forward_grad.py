r"""Provides forward gradients, which need no finite differences."""

from typing import Unpack

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.directions.displacement import Displacement
from mezo_jax.transforms.combine import two_sided
from mezo_jax.transforms.estimator import Estimator, SampleOptions, Spsa


def forward_grad(**options: Unpack[SampleOptions]) -> Estimator:
  r"""Estimates the gradient from exact directional derivatives.

  .. math::
    \frac{1}{n} \sum_{j=1}^n g_j z_j, \qquad g_j = \frac{d}{dc}
    \mathcal{L}(\theta + c z_j; \mathcal{B}) \Big|_{c=0}
    = z_j^\top \nabla \mathcal{L}

  The finite difference of MeZO approaches :math:`g_j` as :math:`\epsilon \to
  0`. This variant is a baseline that shows how much the error of a finite
  :math:`\epsilon` costs.

  `jax.jvp` differentiates `mezo_jax.perturbed` with respect to c, so the z of
  only one layer is in memory at a time. Each direction takes one forward pass
  that also computes a tangent, which takes about as long as two evaluations of
  the loss. The loss must be differentiable.

  Args:
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``num_samples``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`.

  Raises:
    ValueError: For an option that `mezo_jax.spsa` does not accept.

  References:
    Baydin et al., 2022, `Gradients without Backpropagation
    <https://arxiv.org/abs/2202.08587>`_, Algorithm 1. Malladi et al., 2023,
    `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Appendix D.

  Example:
    >>> import mezo_jax
    >>> from mezo_jax import variants
    >>> tx = mezo_jax.mezo(1e-6, estimator=variants.forward_grad(key=0))
  """
  spsa = Spsa(1.0, combine=two_sided, over='scan', **options)

  def measure(state, params, value_fn, batch):
    loss = spsa.loss_at(params, value_fn, batch)
    def derivative(key):
      """Returns the loss and its derivative along one direction."""
      return jax.jvp(lambda c: loss(Displacement(key, c)),
                     (jnp.float32(0.0),), (jnp.float32(1.0),))
    values, g = lax.map(derivative, spsa.z(state).keys)
    return values[0], g

  return Estimator(spsa, measure=measure)
