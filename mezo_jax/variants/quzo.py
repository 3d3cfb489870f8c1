r"""QuZO: weights that are integers, evaluated and moved on their grid.

With a weight :math:`s q + o` (`mezo_jax.Codes`), :math:`\lfloor x \rceil` a
random integer next to x with :math:`E \lfloor x \rceil = x`, and one z:

.. math::
  u_1 &= \lfloor \epsilon z / s \rceil, \quad
  g = (\mathcal{L}(q + u_1) - \mathcal{L}(q - u_1)) / (2 \epsilon) \\
  q &\leftarrow q - u_2, \quad u_2 = \lfloor \eta g z / s \rceil

with independent :math:`u_1` and :math:`u_2`, so that :math:`E[s u_2] = \eta
E[zz^\top] \nabla \mathcal{L}`. Source: Zhou et al., 2025, arXiv:2502.12346,
Section 4, which rounds z and then the product; we round the product alone,
which adds less noise.
"""

from typing import Any, Unpack

from mezo_jax.core import paths
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions.low_rank import LowRank
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions


def quzo(eps: Any = 1e-3, **options: Unpack[SpsaOptions]) -> Estimator:
  r"""SPSA that evaluates `mezo_jax.Codes` on their grid.

  `mezo_jax.spsa` evaluates them off the grid, at :math:`s q + o \pm \epsilon
  z`, with less noise. That is better unless products with the weights need
  integers. `mezo_jax.mezo` moves them on their grid in any case. Weights
  that are not `Codes` (norms, biases) are trained as usual.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`. Below a step s of the grid,
      most of :math:`u_1` is 0 and the rest is as large as s.
    **options: Other options of `mezo_jax.spsa`. ``directions`` may not be of
      low rank, since their elements are never built and cannot be rounded.

  Raises:
    ValueError: For directions of low rank, or params without `Codes`.
  """
  spsa = Spsa(eps, **options).along(on_grid=True)
  if isinstance(spsa.directions, LowRank):
    raise ValueError('quzo rounds each element of z: take Normal or '
                     'Rademacher, or mezo_jax.mezo for directions of low rank.')

  def check(params):
    if not any(is_codes(x) for _, x in paths.named_leaves(params)):
      raise ValueError('quzo needs weights that are mezo_jax.Codes: see '
                       "mezo_jax.quantize and models.load(..., dtype='int8').")

  return Estimator(spsa, check=check)
