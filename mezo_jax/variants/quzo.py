r"""Provides QuZO, which evaluates quantised weights at points of their grid."""

from typing import Any, Unpack

from mezo_jax.core import paths
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions.low_rank import LowRank
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions


def quzo(eps: Any = 1e-3, **options: Unpack[SpsaOptions]) -> Estimator:
  r"""Runs SPSA on quantised weights, evaluated on their grid (QuZO).

  A quantised weight is :math:`s q + o` with an integer q
  (`mezo_jax.QuantizedArray`). Let :math:`\lfloor x \rceil` be x rounded
  stochastically to an integer, so that :math:`E \lfloor x \rceil = x`. A step
  is

  .. math::
    u_1 &= \lfloor \epsilon z / s \rceil, \quad
    g = (\mathcal{L}(q + u_1) - \mathcal{L}(q - u_1)) / (2 \epsilon), \\
    q &\leftarrow q - u_2, \quad u_2 = \lfloor \eta g z / s \rceil.

  The roundings of :math:`u_1` and :math:`u_2` are independent, so that
  :math:`E[s u_2] = \eta E[zz^\top] \nabla \mathcal{L}`. The paper rounds z
  first, and then the product with the rounded z. Here only the product is
  rounded, which adds less noise.

  This estimator evaluates losses at points of the grid, and `mezo_jax.mezo`
  moves the weights on the grid. In contrast, `mezo_jax.spsa` evaluates losses
  off the grid, at :math:`s q + o \pm \epsilon z`, which adds less noise. Prefer
  `mezo_jax.spsa`, unless the matrix products of your model need integer
  weights. Weights that are not quantised (norms, biases) are trained as usual.

  Args:
    eps: Perturbation scale :math:`\epsilon`, in the forms of `mezo_jax.spsa`.
      If it is smaller than a step s of the grid, most elements of :math:`u_1`
      are 0, and the others are as large as s. Defaults to 1e-3.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``combine``, ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.
      ``directions`` must not be of low rank: matrix products use the factors of
      such directions and do not build the elements, which would be rounded.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`.

  Raises:
    ValueError: If ``directions`` are of low rank, or for an option that
      `mezo_jax.spsa` does not accept. ``init`` raises it for params without
      `QuantizedArray`.

  References:
    Zhou et al., 2025, `QuZO: Quantized Zeroth-Order Fine-Tuning for Large
    Language Models <https://arxiv.org/abs/2502.12346>`_, Section 4.

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> from mezo_jax import variants
    >>> params = {'w': mezo_jax.quantize(jnp.ones((32, 4)))}
    >>> tx = mezo_jax.mezo(1e-4, estimator=variants.quzo(1e-2, key=0))
    >>> state = tx.init(params)
  """
  spsa = Spsa(eps, **options).along(on_grid=True)
  if isinstance(spsa.directions, LowRank):
    raise ValueError('directions of low rank cannot be used with quzo, which '
                     'rounds each element of z. Use mezo_jax.Normal or '
                     'mezo_jax.Rademacher, or mezo_jax.spsa in place of quzo.')

  def check(params):
    if not any(is_codes(x) for _, x in paths.named_leaves(params)):
      raise ValueError('params: quzo needs quantised weights '
                       '(mezo_jax.QuantizedArray). '
                       "See mezo_jax.quantize and models.load(..., dtype="
                       "'int8').")

  return Estimator(spsa, check=check)
