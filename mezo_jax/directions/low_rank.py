r"""Defines directions of low rank: each matrix is a product of two factors.

.. math:: z = \frac{1}{\sqrt r} U V^\top, \qquad U \in \{\pm 1\}^{m \times r},
          \quad V \in \{\pm 1\}^{k \times r}

The elements of z have mean 0 and variance 1 and are uncorrelated,
:math:`E[zz^\top] = I`, as in all other distributions. The library computes with
the factors in two ways. A forward pass multiplies by the factors, so that it
needs no other array of the size of W:

.. math:: x (W + c z) = x W + \frac{c}{\sqrt r} (x U) V^\top.

An update computes the elements of z one by one. The r signs in row i of U are
the bits of a word :math:`u_i`, and the r signs in row j of V are the bits of a
word :math:`v_j`. An element is then

.. math:: z_{ij} = (r - 2\,\mathrm{popcount}(u_i \oplus v_j)) / \sqrt r.

This takes three operations per element and no matrix product. XLA fuses these
operations with the addition to the weights, which is done in place.

References:
  Chen et al., 2024, `LOZO <https://arxiv.org/abs/2410.07698>`_, and Sarkar et
  al., 2025, `EGGROLL <https://arxiv.org/abs/2511.16652>`_, both with normal
  factors in place of signs.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any, cast, ClassVar

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments, xla
from mezo_jax.core.views import Shape
from mezo_jax.directions import noise
from mezo_jax.directions import streams as streams_lib
from mezo_jax.directions.base import Directions, Rademacher
from mezo_jax.directions.displacement import Draws

_WORD = 32  # Number of signs in a random word.
# Passed to `jax.random.fold_in`, so that the keys of windows of steps differ
# from the keys of steps.
_WINDOWS = np.uint32(0x56565656)
_MANY = 3  # With this many terms, a matrix product is faster on TPUs.


@dataclasses.dataclass(frozen=True)
class LowRank(Directions):
  r"""Draws each matrix as a product of two random factors of rank r.

  .. math:: z = \frac{1}{\sqrt r} U V^\top, \qquad
            U \in \{\pm 1\}^{m \times r}, \quad V \in \{\pm 1\}^{k \times r}

  A matrix product with perturbed weights, :math:`x (W + c z)`, is computed as
  :math:`x W + \frac{c}{\sqrt r} (x U) V^\top` and builds no perturbed weights.
  There are exceptions: the perturbed weight is built if a convolution consumes
  it, if every iteration of a loop uses all of it, inside `jax.shard_map`, and
  on Explicit mesh axes.

  A leaf (or a layer of a stack) with more than two axes is treated as a matrix.
  Its first axes form the rows and the other axes form the columns. They are
  divided so that the number of rows plus the number of columns is smallest.
  Vectors, and matrices with fewer than 2r rows or columns, have no factors and
  are drawn like `Rademacher`.

  Attributes:
    rank: Rank r of the factors, at least 1. Defaults to 16. In the benchmarks
      of benchmarks/README.md, ranks 4 and 16 learned nearly as much as normal
      draws in the same number of forward passes, and more in the same time.
    generator: Name of the random bit generator, 'hash32' (the default) or
      'threefry2x32'.
    mask: The leaves that have a z. Defaults to None, for every floating-point
      leaf.
    stacked: The leaves that are stacks of layers. Defaults to None, which
      selects them by their paths and shapes.
    multiplier: A `Multiplier` of the elements of z. Defaults to None. If a leaf
      has more than a single factor, matrix products build its perturbed
      weights.

  `Directions` describes the last four attributes in full.

  Raises:
    ValueError: If ``rank`` is not an integer of at least 1, or for an attribute
      that `Directions` does not accept.

  References:
    Chen et al., 2024, `LOZO <https://arxiv.org/abs/2410.07698>`_, and Sarkar et
    al., 2025, `EGGROLL <https://arxiv.org/abs/2511.16652>`_, both with normal
    factors in place of signs.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax
    >>> step = mezo_jax.Displacement(jax.random.key(0), 1.0)
    >>> z = mezo_jax.direction(
    ...     jnp.zeros((8, 6)), step, mezo_jax.LowRank(rank=2))
    >>> int(jnp.linalg.matrix_rank(z)) <= 2
    True
  """

  _: dataclasses.KW_ONLY
  rank: int = 16

  unrolled: ClassVar[int] = 32
  # A matrix has factors only if it has at least ``least * rank`` rows and
  # columns.
  least: ClassVar[int] = 2

  def __post_init__(self) -> None:
    """Checks the fields."""
    super().__post_init__()
    arguments.whole('rank', self.rank)

  def of_leaf(self, stream: noise.Stream, coefs: jax.Array,
              shape: Shape, columns: noise.Stream | None = None
              ) -> Draws:
    """Returns draws with two streams, or with one if there are no factors."""
    signs = Rademacher(self.generator).of_leaf(stream, coefs, shape)
    first, last = int(signs.is_stack()), len(shape)
    cut = self._cut(shape[first:])
    if cut is None:
      return signs
    cut += first
    # Each row of U consists of r bits, and so takes r / 32 words, rounded up.
    # The counters of V begin after those of U, so that both factors can be
    # drawn from the same key.
    words = len(self._bits())
    after = np.uint32(words * math.prod(shape[first:cut]))
    columns = columns or stream
    zero = jnp.zeros(stream.keys.shape[:-2], jnp.uint32)
    strides = streams_lib.strides
    u = noise.Stream(stream.keys, zero, strides(shape, first, cut, words))
    v = noise.Stream(
        columns.keys, zero + after, strides(shape, cut, last, words))
    scale = np.float32(math.sqrt(self.rank))
    return Draws((u, v), coefs / scale, self.bare())

  def _cut(self, shape) -> int | None:
    """Returns how many of the first axes form the rows of the matrix.

    Returns None if a leaf of this shape has no factors.
    """
    if len(shape) < 2:
      return None
    sizes = lambda cut: (math.prod(shape[:cut]), math.prod(shape[cut:]))
    cut = min(range(1, len(shape)), key=lambda cut: sum(sizes(cut)))
    if min(sizes(cut)) < self.least * self.rank:
      return None
    return cut

  def each(self, streams: Sequence[noise.Stream], like: jax.Array
           ) -> list[jax.Array]:
    """Returns z of each direction, times the square root of the rank.

    `of_leaf` has divided the coefficients by that square root.
    """
    def words(s, i, few):
      """Returns word number i of each row, for all directions, [n, *axes]."""
      s = streams_lib.moved(s, i)
      def of_key(key):
        one = dataclasses.replace(s, keys=key[..., None, :])
        return noise.words(one, 0, like, self.generator)
      return jax.vmap(of_key, -2)(s.keys) & np.uint32(2**len(few) - 1)

    # All elements of a row or column share a word. Compute and store the words
    # first, since XLA would otherwise recompute them for every element.
    made = xla.made_first(
        lambda streams: [[words(s, i, few) for s in streams]
                         for i, few in enumerate(self._bits())], streams)
    out = []
    for j in range(streams[0].keys.shape[-2]):
      differ: Any = 0  # number of signs that differ between U and V
      for rows, columns in made:
        count = lax.population_count(rows[j] ^ columns[j])
        differ = differ + count.astype(jnp.int32)
      out.append((self.rank - 2 * differ).astype(jnp.float32))
    return out

  def at_once(self, coefs: jax.Array) -> Callable[..., Any] | None:
    """Returns `_by_product` if there are so many terms that it is faster."""
    if coefs.ndim > 1 or len(coefs) < _MANY:
      return None
    return self._by_product

  def _by_product(self, streams, coefs, start, like):
    """Returns the sum of all terms, computed as one matrix product.

    XLA for TPUs fuses the product with its addition to the weights and with
    their rounding. For any n, this takes one pass over the weights. The product
    is computed in bfloat16, which represents signs exactly. Each coefficient is
    split into a sum of two bfloat16 numbers. The columns of both factors are
    therefore repeated, once for each of these two numbers.
    """
    rows, columns = (counted(s, like.shape) for s in streams)
    u, v = (self.factor(s, like.shape, jnp.bfloat16, 2) for s in streams)
    high = coefs.astype(jnp.bfloat16)
    low = (coefs - high.astype(jnp.float32)).astype(jnp.bfloat16)
    # 0 for the columns that are multiplied by ``high``, 1 for those by ``low``.
    of = [np.repeat((0, 1), len(few)) for few in self._bits()]
    u = u * jnp.stack([high, low], -1)[:, np.concatenate(of)]
    # jnp.einsum names axes by integers: 0, 1, ... are the axes of ``like``, n
    # is that of the directions and r that of the rank.
    n, r = like.ndim, like.ndim + 1
    there = sorted({*rows, *columns})
    total = jnp.einsum(u, [*rows, n, r], v, [*columns, n, r], there,
                       preferred_element_type=jnp.float32)
    total = total.reshape(_kept(like.shape, there))
    return total if start is None else start + total

  def _bits(self) -> list[np.ndarray]:
    """Returns, for each word of a row, the positions of the bits it uses."""
    return [np.arange(min(_WORD, self.rank - at), dtype=np.uint32)
            for at in range(0, self.rank, _WORD)]

  def factor(self, stream: noise.Stream, shape: Shape,
             dtype: jax.typing.DTypeLike, times: int = 1) -> jax.Array:
    """Returns U or V of a block for all n directions.

    Args:
      stream: The stream of the rows of U, or that of the rows of V.
      shape: Shape of the block.
      dtype: Dtype of the result.
      times: How often the columns of the factor are repeated. The columns of
        one word are repeated before those of the next word follow. Defaults to
        1.

    Returns:
      An array of 1 and -1 of shape [*axes, n, times * rank]. Its leading axes
      are the axes of the block along which the factor varies; see `counted`.
    """
    axes, n = counted(stream, shape), stream.keys.shape[-2]
    # The directions are one more axis, along which only the keys differ.
    every = noise.Stream(stream.keys[..., None, :], stream.lo[..., None],
                         (*stream.strides, 0))
    like = jnp.zeros((*_kept(shape, axes), n))
    bits = []
    for i, few in enumerate(self._bits()):
      words = noise.words(
          streams_lib.moved(every, i), 0, like, self.generator)
      words = jnp.broadcast_to(words, like.shape)[..., None]
      # Under jax_numpy_rank_promotion='raise', arrays must have equally many
      # axes to broadcast, so axes of length 1 are added.
      few = np.tile(few, times).reshape((1,) * like.ndim + (-1,))
      bits.append((words >> few) & np.uint32(1))
    signs = 1 - 2 * jnp.concatenate(bits, -1).astype(jnp.int32)
    return signs.reshape(*(shape[a] for a in axes), n, -1).astype(dtype)


@dataclasses.dataclass(frozen=True)
class LazyLowRank(LowRank):
  r"""Draws low-rank matrices whose factor V stays the same for several steps.

  .. math:: z_t = \frac{1}{\sqrt r} U_t V_{\lfloor t / \nu \rfloor}^\top

  The factor U is new in each step t, and V changes every :math:`\nu` steps. The
  updates of such a window of steps add up to a matrix of rank at most n r, for
  n directions per step. Leaves without factors have a new z in each step.

  In the paper, the factors are normal and there is no :math:`1 / \sqrt r`.
  Multiply learning rates of the paper by r to use them here.

  Attributes:
    rank: Rank r of the factors, at least 1. Defaults to 16.
    every: Number of steps :math:`\nu` for which V stays the same, at least 1.
      Defaults to 50.
    generator: Name of the random bit generator, 'hash32' (the default) or
      'threefry2x32'.
    mask: The leaves that have a z. Defaults to None, for every floating-point
      leaf.
    stacked: The leaves that are stacks of layers. Defaults to None, which
      selects them by their paths and shapes.
    multiplier: A `Multiplier` of the elements of z. Defaults to None.

  `LowRank` describes when a leaf has factors; `Directions` describes the last
  four attributes in full.

  Raises:
    ValueError: If ``every`` is not an integer of at least 1, or for an
      attribute that `LowRank` does not accept.

  References:
    Chen et al., 2024, `Enhancing Zeroth-order Fine-tuning for Language Models
    with Low-rank Structures <https://arxiv.org/abs/2410.07698>`_ (LOZO),
    Algorithm 1.

  Example:
    >>> import mezo_jax
    >>> lozo = mezo_jax.mezo(
    ...     1e-6, key=0, directions=mezo_jax.LazyLowRank(rank=2, every=50),
    ...     apply_every=50)
  """

  _: dataclasses.KW_ONLY
  every: int = 50

  def __post_init__(self) -> None:
    """Checks the fields."""
    super().__post_init__()
    arguments.whole('every', self.every)

  def keys(self, key: Any, count: jax.Array | int, n: int) -> jax.Array:
    """Returns n keys, each made of a key of the step and a key of the window.

    The window is the sequence of ``every`` steps in which V stays the same. See
    `Directions.keys` for the arguments.
    """
    # The first word of a direction's key belongs to the step, the second to the
    # window. `of_columns` derives the keys of V from the second word alone.
    windows = jax.random.fold_in(key, _WINDOWS)
    step = noise.step_keys(key, count, n)
    window = noise.step_keys(windows, count // self.every, n)
    return _typed(jax.random.key_data(step)[:, 0],
                  jax.random.key_data(window)[:, 1])

  def of_columns(self, keys: jax.Array) -> jax.Array:
    """Returns n keys for V, which depend only on the window of steps."""
    words = jax.random.key_data(keys)[:, 1]
    return _typed(jnp.full_like(words, _WINDOWS), words)


def _typed(first, second):
  """Returns typed keys whose data are these two words."""
  return noise.typed(jnp.stack([first, second], -1))


def product(rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Returns ``sum_b rows[..., b] * columns[..., b]``, where axes broadcast.

  The sum consists of elementwise operations instead of a matrix product. XLA
  can therefore fuse it with the operation that uses the result, and does not
  store the result.

  Args:
    rows: The factor U, with the rank as its last axis.
    columns: The factor V, with the rank as its last axis.
  """
  return cast(jax.Array, sum(
      rows[..., b] * columns[..., b] for b in range(rows.shape[-1])))


def of_block(factor: jax.Array, stream: noise.Stream, shape: Shape
             ) -> jax.Array:
  """Reshapes a factor so that it broadcasts with its block.

  The result has one axis for each axis of the block, and then one for the rank.

  Args:
    factor: A factor of one direction, [*axes, 1, rank], from `LowRank.factor`.
    stream: The stream that the factor was drawn from.
    shape: Shape of the block. Axes along which the factor does not vary have
      length 1 in the result.
  """
  kept = _kept(shape, counted(stream, shape))
  return factor.reshape(*kept, factor.shape[-1])


def _kept(shape: Shape, axes: Sequence[int]) -> list[int]:
  """Returns a shape in which all but the given axes have length 1."""
  return [n if a in axes else 1 for a, n in enumerate(shape)]


def counted(stream: noise.Stream, shape: Shape) -> list[int]:
  """Returns the axes of a block along which the words of a stream vary."""
  shapes = [x.shape for x in (stream.keys, stream.lo, stream.hi)
            if x is not None]
  varies = lambda a: stream.strides[a] or any(x[a] > 1 for x in shapes)
  return [a for a, n in enumerate(shape) if n > 1 and varies(a)]
