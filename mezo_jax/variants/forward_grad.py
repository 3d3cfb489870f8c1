r"""The directional derivative itself, by forward-mode differentiation.

.. math:: g = \frac{d}{dc} \mathcal{L}(\theta + c z; \mathcal{B}) \Big|_{c=0}
            = z^\top \nabla \mathcal{L}

MeZO's difference approaches it as :math:`\epsilon \to 0`. It is the baseline
that shows what the error and the choice of :math:`\epsilon` cost. Source:
Baydin et al., 2022, "Gradients without backpropagation"; Malladi et al., 2023,
Appendix D.
"""

from typing import Unpack

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.directions.displacement import Displacement
from mezo_jax.transforms.combine import two_sided
from mezo_jax.transforms.estimator import Estimator, SampleOptions, Spsa


def forward_grad(**options: Unpack[SampleOptions]) -> Estimator:
  r"""Estimates the gradient as :math:`\frac{1}{n} \sum_j (z_j^\top \nabla
  \mathcal{L}) z_j`.

  A direction takes one evaluation with its tangent, about as long as two. The
  derivative is taken with respect to c through `mezo_jax.perturbed`, so the z
  of one layer is in memory at a time. The loss must have a derivative.

  Args:
    **options: Options of `mezo_jax.spsa`.
  """
  spsa = Spsa(1.0, combine=two_sided, over='scan', **options)

  def measure(state, params, value_fn, batch):
    loss = spsa.loss_at(params, value_fn, batch)
    def derivative(key):
      return jax.jvp(lambda c: loss(Displacement(key, c)),
                     (jnp.float32(0.0),), (jnp.float32(1.0),))
    values, g = lax.map(derivative, spsa.z(state).keys)
    return values[0], g

  return Estimator(spsa, measure=measure)
