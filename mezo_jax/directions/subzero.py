r"""SubZero: directions in a subspace of matrices that is kept for a window.

.. math:: z = \frac{\sqrt{m k}}{r} \hat U Z \hat V^\top, \qquad
          \hat U^\top \hat U = \hat V^\top \hat V = I_r, \quad
          Z \in \mathcal{N}(0, I_{r \times r})

The bases are the same for a window of steps, and Z is new in each step. Over
bases, :math:`E[zz^\top] = I`; within a window it is :math:`mk / r^2` times the
projection on the subspace. Source: Yu et al., 2024, arXiv:2410.08989.

The paper's bases come from a QR decomposition and are stored. Here they come
from factors of signs, :math:`\hat U = U L^{-\top}` with :math:`L L^\top =
U^\top U`, and are regenerated from keys. With the r by r matrix :math:`C =
L_U^{-\top} Z L_V^{-1} \sqrt{mk} / r`,

.. math:: z = U C V^\top, \qquad x (W + c z) = x W + c\, ((x U) C) V^\top.
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
from mezo_jax.directions import low_rank, noise
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.displacement import Draws
from mezo_jax.directions.low_rank import LazyLowRank


@dataclasses.dataclass(frozen=True)
class SubZero(LazyLowRank):
  r"""Matrices in a subspace of :math:`r \times r` dimensions, which is the same
  for ``every`` steps.

  Leaves with fewer than 8r rows or columns are drawn as signs in each step.

  Attributes:
    rank: r. The paper uses 8 to 24.
    every: Number of steps of a window, in which each direction of a step keeps
      its own subspace. The paper uses 1,000 to 2,000.
    generator, mask, stacked, multiplier: see `Directions`.

  Raises:
    ValueError: as `LazyLowRank`.
  """

  _: dataclasses.KW_ONLY
  rank: int = 8
  every: int = 1000

  unrolled: ClassVar[int] = 8
  # With 8r rows, signs are almost never dependent: r^2 / 2^(8r) pairs are.
  least: ClassVar[int] = 8

  def of_leaf(self, stream: noise.Stream, coefs: jax.Array,
              shape: tuple[int, ...], columns: noise.Stream | None = None
              ) -> Draws:
    draws = super().of_leaf(columns or stream, coefs, shape)
    if len(draws.streams) < 2:
      return super().of_leaf(stream, coefs, shape)
    n, r = stream.keys.shape[-2], self.rank
    layers = shape[:int(draws.is_stack())]
    def inverse(s):  # L^{-T}, [*layers, n, r, r]
      signs = self.factor(s, shape, jnp.float32)
      signs = signs.reshape(*layers, -1, n, r)
      gram = jnp.einsum('...mna,...mnb->...nab', signs, signs,
                        precision='highest')
      eye = jnp.broadcast_to(jnp.eye(r), gram.shape)
      return linalg.solve_triangular(
          jnp.linalg.cholesky(gram), eye, lower=True, trans='T')
    left, right = map(inverse, draws.streams)
    size = math.prod(shape) // math.prod(layers)
    core = jnp.einsum(
        '...ab,...bc,...dc->...ad', left, self._z(stream, layers), right,
        precision='highest') * np.float32(math.sqrt(size) / r)
    rows, others = draws.streams
    rows = dataclasses.replace(rows, core=core.reshape(
        *layers, *(1,) * (len(shape) - len(layers)), n, r, r))
    return dataclasses.replace(draws, streams=(rows, others), coefs=coefs)

  def _z(self, stream, layers) -> jax.Array:
    """Returns Z, [*layers, n, r, r], from the keys of the step."""
    r, n = self.rank, stream.keys.shape[-2]
    keys = stream.keys.reshape(*layers, n, 1, 1, 1, 2)
    every = noise.Stream(
        keys, jnp.zeros(keys.shape[:-2], jnp.uint32),
        (0,) * len(layers) + (0, r, 1))
    return Normal(self.generator).draw(noise.words(
        every, 0, jnp.zeros((*layers, n, r, r)), self.generator))

  def z(self, streams: Sequence[noise.Stream], j: jax.Array | int,
        like: jax.Array) -> jax.Array:
    def factors(streams, j):
      rows, columns = (noise.only(s, j) for s in streams)
      u, v = (low_rank.of_block(
          self.factor(s, like.shape, jnp.float32), s, like.shape)
              for s in (rows, columns))
      assert rows.core is not None  # every stream of SubZero has one
      return jnp.einsum('...a,...ab->...b', u, rows.core[..., j, :, :],
                        precision='highest'), v
    u, v = xla.made_first(factors, streams, j)
    return low_rank.product(
        sharding.split_as(u, like), sharding.split_as(v, like))

  def each(self, streams: Sequence[noise.Stream], n: int, like: jax.Array
           ) -> list[jax.Array]:
    return Directions.each(self, streams, n, like)

  def at_once(self, coefs: jax.Array) -> None:
    return None
