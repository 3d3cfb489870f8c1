r"""Defines the directions of SubZero, which are in a random subspace.

.. math:: z = \frac{\sqrt{m k}}{r} \hat U Z \hat V^\top, \qquad
          \hat U^\top \hat U = \hat V^\top \hat V = I_r, \quad
          Z \in \mathcal{N}(0, I_{r \times r})

The bases :math:`\hat U` and :math:`\hat V` stay the same for a window of steps.
Z is new in each step. On average over bases, :math:`E[zz^\top] = I`. Within a
window, :math:`E[zz^\top]` is :math:`mk / r^2` times the projection onto the
subspace that the bases span.

The paper computes the bases by QR decompositions and stores them. Here they are
regenerated from keys: U and V are matrices of random signs, whose columns are
orthonormalised by :math:`\hat U = U L_U^{-\top}`, where :math:`L_U` is the
Cholesky factor of :math:`U^\top U`. With the r by r matrix :math:`C =
L_U^{-\top} Z L_V^{-1} \sqrt{mk} / r`, a direction and a product with perturbed
weights are

.. math:: z = U C V^\top, \qquad x (W + c z) = x W + c\, ((x U) C) V^\top.

References:
  Yu et al., 2024, `SubZero <https://arxiv.org/abs/2410.08989>`_.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import jax.scipy.linalg as linalg
import numpy as np

from mezo_jax.core import sharding, xla
from mezo_jax.core.views import Shape
from mezo_jax.directions import low_rank, noise
from mezo_jax.directions.base import Normal
from mezo_jax.directions.displacement import Draws
from mezo_jax.directions.low_rank import LazyLowRank


@dataclasses.dataclass(frozen=True)
class SubZero(LazyLowRank):
  r"""Draws matrices from a random subspace that stays the same for some steps.

  .. math:: z = \frac{\sqrt{m k}}{r} \hat U Z \hat V^\top, \qquad
            \hat U^\top \hat U = \hat V^\top \hat V = I_r, \quad
            Z \in \mathcal{N}(0, I_{r \times r})

  The bases stay the same for ``every`` steps, and Z is new in each step. Each
  of the n directions of a step has bases of its own. Leaves with fewer than 8r
  rows or columns have no bases and are drawn like `Rademacher` in each step.

  Attributes:
    rank: Rank r, so that the subspace has :math:`r^2` dimensions. Defaults to
      8. The paper uses 8 to 24.
    every: Number of steps for which the bases stay the same. Defaults to 1000.
      The paper uses 1,000 to 2,000.
    generator: Name of the random bit generator, 'hash32' (the default) or
      'threefry2x32'.
    mask: The leaves that have a z. Defaults to None, for every floating-point
      leaf.
    stacked: The leaves that are stacks of layers. Defaults to None, which
      selects them by their paths and shapes.
    multiplier: A `Multiplier` of the elements of z. Defaults to None.

  `Directions` describes the last four attributes in full.

  Raises:
    ValueError: If ``rank`` or ``every`` is not an integer of at least 1, or for
      an attribute that `Directions` does not accept.

  References:
    Yu et al., 2024, `SubZero: Random Subspace Zeroth-Order Optimization for
    Memory-Efficient LLM Fine-Tuning <https://arxiv.org/abs/2410.08989>`_,
    Algorithms 1 to 3.

  Example:
    >>> import mezo_jax
    >>> tx = mezo_jax.mezo(
    ...     1e-6, key=0, directions=mezo_jax.SubZero(rank=8, every=1000))
  """

  _: dataclasses.KW_ONLY
  rank: int = 8
  every: int = 1000

  unrolled: ClassVar[int] = 8
  # The Cholesky factor exists only if the columns of U are linearly
  # independent. With 8r rows of random signs they almost always are: two
  # columns are equal or opposite with a probability of about r^2 / 2^(8r).
  least: ClassVar[int] = 8

  def of_leaf(self, stream: noise.Stream, coefs: jax.Array,
              shape: Shape, columns: noise.Stream | None = None
              ) -> Draws:
    """Returns draws, whose first stream has the matrix C of each direction."""
    # Both bases are drawn from the key of the window. The key of the step is
    # for Z, and for leaves without bases.
    draws = super().of_leaf(columns or stream, coefs, shape)
    if len(draws.streams) < 2:
      return super().of_leaf(stream, coefs, shape)
    n, r = stream.keys.shape[-2], self.rank
    layers = shape[:int(draws.is_stack())]

    def inverse(s):
      """Returns L^{-T} of the factor of a stream, [*layers, n, r, r]."""
      signs = self.factor(s, shape, jnp.float32).reshape(*layers, -1, n, r)
      gram = jnp.einsum('...mna,...mnb->...nab', signs, signs,
                        precision='highest')
      eye = jnp.broadcast_to(jnp.eye(r), gram.shape)
      return linalg.solve_triangular(
          jnp.linalg.cholesky(gram), eye, lower=True, trans='T')

    left, right = map(inverse, draws.streams)
    core = jnp.einsum('...ab,...bc,...dc->...ad', left,
                      self._z(stream, layers), right, precision='highest')
    size = math.prod(shape) // math.prod(layers)
    core = core * np.float32(math.sqrt(size) / r)
    ones = (1,) * (len(shape) - len(layers))
    rows, others = draws.streams
    rows = dataclasses.replace(rows, core=core.reshape(*layers, *ones, n, r, r))
    return dataclasses.replace(draws, streams=(rows, others), coefs=coefs)

  def _z(self, stream, layers) -> jax.Array:
    """Returns Z, float32 [*layers, n, r, r], from the keys of the step."""
    r, n = self.rank, stream.keys.shape[-2]
    keys = stream.keys.reshape(*layers, n, 1, 1, 1, 2)
    zero = jnp.zeros(keys.shape[:-2], jnp.uint32)
    every = noise.Stream(keys, zero, (0,) * len(layers) + (0, r, 1))
    like = jnp.zeros((*layers, n, r, r))
    words = noise.words(every, 0, like, self.generator)
    return Normal(self.generator).draw(words)

  def each(self, streams: Sequence[noise.Stream], like: jax.Array
           ) -> list[jax.Array]:
    """Returns U C Vᵀ of each direction for a block."""
    def factors(streams):
      """Returns U C and V of one direction."""
      u, v = (low_rank.of_block(
          self.factor(s, like.shape, jnp.float32), s, like.shape)
              for s in streams)
      core = streams[0].core[..., 0, :, :]
      return jnp.einsum('...a,...ab->...b', u, core, precision='highest'), v

    out = []
    for j in range(streams[0].keys.shape[-2]):
      # U C and V are small, and each of their rows is used for many elements.
      # Store them, since XLA would otherwise recompute them for each use.
      u, v = xla.made_first(factors, [noise.only(s, j) for s in streams])
      out.append(low_rank.product(
          sharding.split_as(u, like), sharding.split_as(v, like)))
    return out

  def at_once(self, coefs: jax.Array) -> None:
    """Returns None, since `LowRank._by_product` does not support a matrix C."""
    return None
