r"""QuZO: weights that are integers, evaluated and moved on their grid.

With a weight :math:`s q + o` (`mezo_jax.Codes`), :math:`\lfloor x \rceil` an
integer next to x by chance such that :math:`E \lfloor x \rceil = x`, and one z:

.. math::
  u_1 &= \lfloor \epsilon z / s \rceil, \quad
  g = (\mathcal{L}(q + u_1) - \mathcal{L}(q - u_1)) / (2 \epsilon) \\
  q &\leftarrow q - u_2, \quad u_2 = \lfloor \eta g z / s \rceil

with chances of :math:`u_1` and :math:`u_2` that are independent, so that
:math:`E[s u_2] = \eta E[zz^\top] \nabla \mathcal{L}`. (Zhou et al., 2025,
arXiv:2502.12346, Section 4: it rounds z and then the product; we round the
product alone, which adds less noise. Its public code makes both roundings with
one seed, and moves no quantised weight.)
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import optax

from mezo_jax.core import paths
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.low_rank import LowRank
from mezo_jax.transforms.mezo import mezo
from mezo_jax.transforms.types import ZerothOrderTransformation


def quzo(
    learning_rate: float | optax.Schedule | Mapping[str, Any],
    eps: float | optax.Schedule | Mapping[str, Any] = 1e-3, *,
    directions: Directions | str = Normal(), **options: Any
) -> ZerothOrderTransformation:
  r"""MeZO of `mezo_jax.Codes`, on their grid.

  `mezo` itself moves them on their grid too, and evaluates them beside it, at
  :math:`s q + o \pm \epsilon z`: less noise, and all that is needed where what
  multiplies by them computes with floats, as it does here. What is no `Codes`
  (norms, biases) is trained as ever.

  Args:
    learning_rate: :math:`\eta`.
    eps: see `mezo_jax.mezo`; below a step s of the grid most of :math:`u_1` is
      0 and the rest as large as s.
    directions: what z is; not of low rank, which builds nothing to be rounded.
    **options: of `mezo_jax.mezo`, ``key`` among them.

  Raises:
    ValueError: as `mezo_jax.mezo`; for directions of low rank; for params
      without `Codes`.
  """
  directions = as_directions(directions)
  if isinstance(directions, LowRank):
    raise ValueError('quzo rounds each element of z: take Normal or '
                     'Rademacher, or mezo_jax.mezo for directions of low rank.')
  tx = mezo(learning_rate, eps, directions=dataclasses.replace(
      directions, on_grid=True), **options)

  def init_fn(params):
    if not any(is_codes(x) for _, x in paths.named_leaves(params)):
      raise ValueError('quzo needs weights that are mezo_jax.Codes: see '
                       "mezo_jax.quantize and models.load(..., dtype='int8').")
    return tx.init(params)

  return ZerothOrderTransformation(init_fn, tx.update)
