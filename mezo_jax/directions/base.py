r"""Distributions of z: `Normal`, `Rademacher`, and what all have in common.

A `Directions` and a key determine a direction.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments, paths
from mezo_jax.directions import noise
from mezo_jax.directions.displacement import Draws, Multiplier

_U32 = jnp.uint32


@dataclasses.dataclass(frozen=True)
class Directions:
  r"""A distribution of z; the base class of all distributions.

  Attributes:
    generator: Generator of random bits. 'hash32' is cheap and tested
      (benchmarks/results/noise.md). With 'threefry2x32', draws are bitwise
      those of `jax.random`.
    mask: The leaves that have a z; others are neither perturbed nor updated. It
      is None (every floating-point leaf), a tree or prefix tree of bools (or,
      for elements, bool arrays of the leaves' shapes), a function from params
      to one, or a regular expression that is searched for in the leaves' paths.
    stacked: A mask of the leaves whose first axis is that of layers, each with
      a key of its own. Defaults to None: leaves whose path has a component
      named ``layer[s]``, ``block[s]`` or ``h``, without a number, and whose
      shapes agree.
    multiplier: What each element of z is multiplied by, a `Multiplier`.
      Defaults to None, for 1.
    on_grid: Whether c z is rounded stochastically to multiples of the scale
      where it is added to quantised weights (`Codes`). Defaults to False.

  Raises:
    ValueError: For an unknown generator, or a mask that is not one.
  """

  generator: str = 'hash32'
  _: dataclasses.KW_ONLY
  mask: Any = None
  stacked: Any = None
  multiplier: Multiplier | None = None
  on_grid: bool = False

  unrolled: ClassVar[int] = 8  # terms that are added in one pass
  dear: ClassVar[bool] = False  # whether a draw costs more than to store it

  def __post_init__(self) -> None:
    if not isinstance(self.generator, str) or (
        self.generator not in noise.GENERATORS):
      raise ValueError(f'generator must be one of {noise.GENERATORS}, got '
                       f'{self.generator!r}.')
    for name in ('mask', 'stacked'):
      value = getattr(self, name)
      if isinstance(value, str):
        arguments.expression(name, value)
      elif not isinstance(value, bool) and isinstance(
          value, (int, float, complex)):
        raise ValueError(
            f'{name} must be None, a tree of bools, a function of the params '
            f'or a regular expression, got {value!r}.')
    if self.multiplier is not None and not isinstance(
        self.multiplier, Multiplier):
      raise ValueError('multiplier must be a mezo_jax.Multiplier, got '
                       f'{self.multiplier!r}.')
    arguments.boolean('on_grid', self.on_grid)

  def keys(self, key: jax.Array, count: jax.Array | int, n: int) -> jax.Array:
    """Returns the keys [n] of the directions of a step."""
    return noise.step_keys(key, count, n)

  def of_columns(self, keys: jax.Array) -> jax.Array | None:
    """Returns keys [n] for the columns of matrices, if they have their own."""
    return None

  def draw(self, bits: jax.Array) -> jax.Array:
    """Returns float32 draws with mean 0 and variance 1 from uint32 words."""
    raise NotImplementedError

  def takes(self, leaf: Any) -> bool:
    """Returns whether a leaf of this dtype can have a z."""
    return paths.is_floating(leaf)

  def of_leaf(self, stream: noise.Stream, coefs: jax.Array,
              shape: tuple[int, ...], columns: noise.Stream | None = None
              ) -> 'Draws':
    """Returns the draws of a leaf of this shape; ``columns`` is the stream with
    the keys `of_columns`."""
    del shape, columns
    return Draws((stream,), coefs, self.bare())

  def z(self, streams: Sequence[noise.Stream], j: jax.Array | int,
        like: jax.Array) -> jax.Array:
    """Returns direction j of a block, in a shape that broadcasts to that of
    ``like``."""
    return self.draw(noise.words(streams[0], j, like, self.generator))

  def each(self, streams: Sequence[noise.Stream], n: int, like: jax.Array
           ) -> list[jax.Array]:
    """Returns `z` of directions 0 to n - 1."""
    return [self.z(streams, j, like) for j in range(n)]

  def at_once(self, coefs: jax.Array) -> Callable | None:
    """Returns ``(streams, coefs, start, like) -> start + sum``, which adds all
    terms at once and is faster on TPUs; None if there is no such way."""
    return None

  def selected(self, params: Any) -> Any:
    """Returns where z is not 0: a tree of bools, with arrays for elements."""
    return paths.selected(params, self.mask, self.takes, self.stacked)

  def bare(self) -> 'Directions':
    """Returns these directions without values of leaves, which is hashable."""
    multiplier = self.multiplier
    if multiplier is not None:
      multiplier = multiplier._replace(values=None)
    return dataclasses.replace(
        self, mask=None, stacked=None, multiplier=multiplier)


class Normal(Directions):
  """Elements are independent standard normal draws (MeZO, Algorithm 1)."""

  dear = True

  def draw(self, bits: jax.Array) -> jax.Array:
    return (_quantile if self.generator == 'hash32' else _inverse)(bits)


class Rademacher(Directions):
  """Elements are 1 or -1, independently, with probability 1/2 each."""

  def draw(self, bits: jax.Array) -> jax.Array:
    one = (bits & _U32(0x80000000)) | _U32(0x3F800000)  # a sign and 1.0
    return lax.bitcast_convert_type(one, jnp.float32)


@functools.partial(jax.jit, inline=True)  # traced once, for each shape
def _inverse(bits: jax.Array) -> jax.Array:
  r"""Returns normal draws as `jax.random.normal` does: :math:`\sqrt 2\,
  \mathrm{erf}^{-1}(u)`, with u uniform on (-1, 1), of 23 bits."""
  one, low = np.float32(1), np.nextafter(np.float32(-1), np.float32(0))
  unit = lax.bitcast_convert_type(
      (bits >> 9) | _U32(0x3F800000), jnp.float32) - one
  uniform = jnp.maximum(low, unit * (one - low) + low)
  return np.float32(np.sqrt(2)) * lax.erf_inv(uniform)


@functools.partial(jax.jit, inline=True)
def _quantile(bits: jax.Array) -> jax.Array:
  r"""Returns normal draws: bit 0 is the sign, the others the two-sided tail t.

  .. math:: w = -2 \ln t, \quad y = \sqrt{w}, \quad
            |z| = \Phi^{-1}(1 - t/2) \approx w\, P_3(y) / Q_4(y)

  The form is that of Abramowitz and Stegun 26.2.23, with coefficients fitted to
  the least maximum error. In float32, |z| is within 5e-6 of the quantile for
  all t >= 2**-32, that is |z| <= 6.34. The logarithm is a polynomial in the
  fraction bits of t, so a draw takes multiplications, additions, one square
  root and one division, and no branch.
  """
  tail = ((bits >> 1).astype(jnp.int32).astype(jnp.float32)
          + np.float32(0.5)) * np.float32(2**-31)
  word = lax.bitcast_convert_type(tail, jnp.int32)
  exponent = (word - 0x3F3504F3) >> 23  # the fraction is in [sqrt(1/2), sqrt 2)
  m = lax.bitcast_convert_type(word - (exponent << 23), jnp.float32)
  m = m - np.float32(1)
  w = m * _polynomial(_LOG, m) + exponent.astype(jnp.float32) * np.float32(
      -2 * math.log(2))
  w = jnp.maximum(w, np.float32(0))
  y = jnp.sqrt(w)
  z = w * _polynomial(_P, y) / _polynomial(_Q, y)
  sign = bits << 31
  return lax.bitcast_convert_type(
      lax.bitcast_convert_type(z, jnp.uint32) | sign, jnp.float32)


_LOG = (-2.0000064, 1.0000393, -0.6660660, 0.4976268, -0.4120935, 0.3780396,
        -0.2365496)  # of -2 ln(1 + m) / m
_P = (0.6271003, 0.6916010, 0.5510004, 0.1647054)
_Q = (1.0, 1.1099032, 1.1097076, 0.5660853, 0.1643640)


def _polynomial(coefs, x):
  """Evaluates a polynomial by Horner's rule, constant coefficient first."""
  total = np.float32(coefs[-1])
  for c in coefs[-2::-1]:
    total = total * x + np.float32(c)
  return total
