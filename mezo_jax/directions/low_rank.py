r"""Directions whose matrices are products of two narrow ones.

.. math:: z = \frac{1}{\sqrt r} U V^\top, \qquad U \in \{\pm 1\}^{m \times r},
          \quad V \in \{\pm 1\}^{k \times r}

Elements have mean 0 and variance 1 and are uncorrelated, :math:`E[zz^\top] =
I`, as in every other distribution. A product with perturbed weights is then

.. math:: x (W + c z) = x W + \frac{c}{\sqrt r} (x U) V^\top,

which builds nothing of the size of W. Element by element, with the r signs of a
row of U and of V in the bits of one word each, :math:`z_{ij} = (r - 2\,
\mathrm{popcount}(u_i \oplus v_j)) / \sqrt r`. That takes three operations per
element and no matrix product, so an update is added in one pass, in place.

Source: factors in place of z, Chen et al., 2024 (LOZO, arXiv:2410.07698) and
Sarkar et al., 2025 (EGGROLL, arXiv:2511.16652), both with normal factors.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, cast, ClassVar

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import xla
from mezo_jax.directions import noise
from mezo_jax.directions import streams as streams_lib
from mezo_jax.directions.base import Directions, Rademacher
from mezo_jax.directions.displacement import Draws

_WORD = 32
_WINDOWS = np.uint32(0x56565656)  # separates keys of windows and of steps
_MANY = 3  # terms from which on a matrix product is faster on TPUs


@dataclasses.dataclass(frozen=True)
class LowRank(Directions):
  r"""Matrices of rank r, :math:`UV^\top / \sqrt r`, with factors of signs.

  A leaf (or layer) with more than two axes counts as a matrix: the cut between
  its axes is where the numbers of rows and columns are most equal. Vectors, and
  matrices with fewer than 2r rows or columns, have no factors and are drawn as
  signs.

  Products with perturbed weights build no weights. They are built for a
  convolution, for a weight that a loop uses whole, inside `jax.shard_map` and
  on Explicit mesh axes.

  Attributes:
    rank: r. Defaults to 16. In benchmarks/README.md, ranks 4 and 16 learned
      about as well as normal draws per forward pass, and more per second.
    generator, mask, stacked, multiplier: See `Directions`.

  Raises:
    ValueError: For a rank below 1, or an unknown generator.
  """

  _: dataclasses.KW_ONLY
  rank: int = 16

  unrolled: ClassVar[int] = 32
  least: ClassVar[int] = 2  # times the rank: rows (columns) of what has factors

  def __post_init__(self) -> None:
    super().__post_init__()
    if not isinstance(self.rank, int) or isinstance(
        self.rank, bool) or self.rank < 1:
      raise ValueError(f'rank must be an integer of at least 1, got '
                       f'{self.rank!r}.')

  def of_leaf(self, stream: noise.Stream, coefs: jax.Array,
              shape: tuple[int, ...], columns: noise.Stream | None = None
              ) -> Draws:
    signs = Rademacher(self.generator).of_leaf(stream, coefs, shape)
    layers = int(signs.is_stack())
    cut = self._cut(shape[layers:])
    if cut is None:
      return signs
    # A row has as many words as r bits need. Those of columns follow.
    words, cut = -(-self.rank // _WORD), layers + cut
    zero = jnp.zeros(stream.keys.shape[:-2], jnp.uint32)
    strides = lambda first, last: tuple(
        words * math.prod(shape[a + 1:last])
        if first <= a < last and shape[a] > 1 else 0
        for a in range(len(shape)))
    rows = noise.Stream(stream.keys, zero, strides(layers, cut))
    columns = noise.Stream(
        (columns or stream).keys,
        zero + np.uint32(words * math.prod(shape[layers:cut])),
        strides(cut, len(shape)))
    return Draws((rows, columns), coefs / np.float32(math.sqrt(self.rank)),
                 self.bare())

  def _cut(self, shape) -> int | None:
    """Returns how many axes are rows; None for a leaf without factors."""
    sizes = lambda cut: (math.prod(shape[:cut]), math.prod(shape[cut:]))
    cut = min(range(1, max(len(shape), 2)), key=lambda cut: sum(sizes(cut)))
    least = self.least * self.rank
    return cut if len(shape) > 1 and least <= min(sizes(cut)) else None

  def z(self, streams: Sequence[noise.Stream], j: jax.Array | int,
        like: jax.Array) -> jax.Array:
    """Returns z times the root of the rank, by which coefficients are divided.
    """
    return self.each([noise.only(s, j) for s in streams], 1, like)[0]

  def each(self, streams: Sequence[noise.Stream], n: int, like: jax.Array
           ) -> list[jax.Array]:
    parts = [*map(len, self._bits(1))]
    def words(s, i, bits):  # [n, *axes], for all terms
      s, of_key = streams_lib.moved(s, i), lambda key: noise.words(
          dataclasses.replace(s, keys=key[..., None, :]), 0, like,
          self.generator)
      return jax.vmap(of_key, -2)(s.keys) & np.uint32(2**bits - 1)
    # These few words serve many elements: a loop would draw them for each.
    made = xla.made_first(lambda streams: [
        [words(s, i, bits) for s in streams] for i, bits in enumerate(parts)],
                                streams)
    apart = lambda j: cast(jax.Array, sum(
        lax.population_count(rows[j] ^ columns[j]).astype(jnp.int32)
        for rows, columns in made))
    return [(self.rank - 2 * apart(j)).astype(jnp.float32) for j in range(n)]

  def at_once(self, coefs: jax.Array) -> Callable[..., Any] | None:
    if coefs.ndim > 1 or len(coefs) < _MANY:
      return None
    return self._by_product

  def _by_product(self, streams, coefs, start, like):
    """Returns the same sum by a matrix product.

    A TPU fuses adding it to weights and rounding them with the product, so it
    takes one pass for any n. Factors are exact in bfloat16, and coefficients
    are sums of two bfloat16.
    """
    axes = [counted(s, like.shape) for s in streams]
    u, v = (self.factor(s, like.shape, jnp.bfloat16, 2) for s in streams)
    high = coefs.astype(jnp.bfloat16)
    low = (coefs - high.astype(jnp.float32)).astype(jnp.bfloat16)
    of = np.concatenate([np.repeat((0, 1), len(b) // 2) for b in self._bits(2)])
    u = u * jnp.stack([high, low], -1)[:, of]
    n, r = like.ndim, like.ndim + 1  # names of axes that like does not have
    there = sorted({*axes[0], *axes[1]})
    total = jnp.einsum(
        u, [*axes[0], n, r], v, [*axes[1], n, r], there,
        preferred_element_type=jnp.float32)
    total = total.reshape([m if a in there else 1
                           for a, m in enumerate(like.shape)])
    return total if start is None else start + total

  def _bits(self, times: int) -> list[np.ndarray]:
    """Returns which bits of each word are signs, repeated."""
    return [np.tile(np.arange(min(_WORD, self.rank - at), dtype=np.uint32),
                    times) for at in range(0, self.rank, _WORD)]

  def factor(self, stream: noise.Stream, shape: tuple[int, ...],
             dtype: jax.typing.DTypeLike, times: int = 1) -> jax.Array:
    """Returns U or V of a block for all n directions: 1 and -1, of the shape
    [*axes, n, times * rank].

    Args:
      stream: The stream of its rows or of its columns.
      shape: Shape of the block. Axes that the stream does not count are left
        out.
      dtype: Dtype of the result.
      times: How often the columns of each word are repeated.
    """
    axes, n = counted(stream, shape), stream.keys.shape[-2]
    kept = tuple(x if a in axes else 1 for a, x in enumerate(shape))
    every = noise.Stream(stream.keys[..., None, :], stream.lo[..., None],
                          (*stream.strides, 0))
    like = jnp.zeros((*kept, n))
    bits = []
    for word, few in enumerate(self._bits(times)):
      moved = streams_lib.moved(every, word)
      words = noise.words(moved, 0, like, self.generator)
      words = jnp.broadcast_to(words, like.shape)
      few = few.reshape((1,) * words.ndim + few.shape)  # no rank promotion
      bits.append((words[..., None] >> few) & np.uint32(1))
    signs = 1 - 2 * jnp.concatenate(bits, -1).astype(jnp.int32)
    return signs.reshape(*(shape[a] for a in axes), n, -1).astype(dtype)


@dataclasses.dataclass(frozen=True)
class LazyLowRank(LowRank):
  r"""`LowRank` with the same V for a window of steps, and a new U in each step.

  .. math:: z_t = \frac{1}{\sqrt r} U_t V_{\lfloor t / \nu \rfloor}^\top

  With n directions per step, all steps of a window together change a matrix by
  one of rank n r. Leaves without factors are drawn anew in each step. The key
  of a direction has two words: one belongs to the step, and one to the window.
  V depends on the latter alone.

  Source: Chen et al., 2024, LOZO (arXiv:2410.07698), with normal factors and
  without the root, for which its learning rates compensate.

  Attributes:
    every: :math:`\nu`, the number of steps of a window.
    rank, generator, mask, stacked, multiplier: see `LowRank`.

  Raises:
    ValueError: As `LowRank`; for ``every`` below 1.
  """

  _: dataclasses.KW_ONLY
  every: int = 50

  def __post_init__(self) -> None:
    super().__post_init__()
    if not isinstance(self.every, int) or isinstance(
        self.every, bool) or self.every < 1:
      raise ValueError('every must be an integer of at least 1, got '
                       f'{self.every!r}.')

  def keys(self, key: Any, count: jax.Array | int, n: int) -> jax.Array:
    step = jax.random.key_data(noise.step_keys(key, count, n))
    window = jax.random.key_data(noise.step_keys(
        jax.random.fold_in(key, _WINDOWS), count // self.every, n))
    return self._typed(step[:, 0], window[:, 1])

  def of_columns(self, keys: jax.Array) -> jax.Array:
    words = jax.random.key_data(keys)[:, 1]
    return self._typed(jnp.full_like(words, _WINDOWS), words)

  def _typed(self, first, second):
    return jax.random.wrap_key_data(
        jnp.stack([first, second], -1), impl='threefry2x32')


def product(rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Returns ``sum_b rows[..., b] * columns[..., b]``, where axes broadcast.

  It is computed element by element, so it fuses and takes no memory.
  """
  return cast(jax.Array, sum(
      rows[..., b] * columns[..., b] for b in range(rows.shape[-1])))


def of_block(factor: jax.Array, stream: noise.Stream, shape: tuple[int, ...]
             ) -> jax.Array:
  """Returns a factor of one direction, [*axes, 1, rank], with all axes of a
  block."""
  axes = counted(stream, shape)
  return factor.reshape(*(n if a in axes else 1 for a, n in enumerate(shape)),
                        factor.shape[-1])


def counted(stream: noise.Stream, shape: tuple[int, ...]) -> list[int]:
  """Returns the axes of a block along which the words of a stream differ."""
  arrays = stream.keys, stream.lo, *jax.tree.leaves(stream.hi)
  return [a for a, n in enumerate(shape) if n > 1 and (
      stream.strides[a] or any(x.shape[a] > 1 for x in arrays))]
