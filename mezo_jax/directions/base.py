r"""What z is: its distribution, its generator, where it is not zero.

A `Directions` says all that there is to say of a direction but its key, and
nothing else does.
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
  r"""What z is, as a function of a key; base of the kinds of it.

  Attributes:
    generator: 'hash32', cheap and tested (benchmarks/results/noise.md); or
      'threefry2x32', with which draws are, bit for bit, those of `jax.random`.
    mask: where z is not 0: None (every floating-point leaf), a tree or prefix
      tree of bools (or, for elements, bool arrays of the leaves' shapes), a
      function from params to one, or a regular expression that is searched for
      in the leaves' paths. Leaves without z are neither perturbed nor updated.
    stacked: a mask of the leaves whose first axis is that of layers, each with
      a key of its own. Defaults to None: leaves whose path has a component
      named ``layer[s]``, ``block[s]`` or ``h``, without a number, and whose
      shapes agree.
    multiplier: What each element of z is multiplied by, a `Multiplier`.
      Defaults to None, for 1.
    on_grid: whether `Codes` are evaluated at codes, c z rounded to their grid
      stochastically with bits of its key; or else wherever c z leads.

  Raises:
    ValueError: for an unknown generator, or a mask that is not one.
  """

  generator: str = 'hash32'
  _: dataclasses.KW_ONLY
  mask: Any = None
  stacked: Any = None
  multiplier: Multiplier | None = None
  on_grid: bool = False

  unrolled: ClassVar[int] = 8  # terms that are added in one pass
  dear: ClassVar[bool] = False  # cost of a draw: better kept than made again

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
    """The keys [n] of the directions of step number ``count`` of a run."""
    return noise.step_keys(key, count, n)

  def of_columns(self, keys: jax.Array) -> jax.Array | None:
    """Keys [n] that columns are drawn with, where it is not with these."""
    return None

  def draw(self, bits: jax.Array) -> jax.Array:
    """float32 draws of mean 0 and variance 1 from uint32 words."""
    raise NotImplementedError

  def takes(self, leaf: Any) -> bool:
    """Whether z has a part for a leaf of this dtype."""
    return paths.is_floating(leaf)

  def of_leaf(self, stream: noise.Stream, coefs: jax.Array,
              shape: tuple[int, ...], columns: noise.Stream | None = None
              ) -> 'Draws':
    """The draws of a leaf of this shape; ``columns`` is its stream of the keys
    `of_columns`."""
    del shape, columns
    return Draws((stream,), coefs, self.bare())

  def z(self, streams: Sequence[noise.Stream], j: jax.Array | int,
        like: jax.Array) -> jax.Array:
    """Direction j of the streams of a block, in a shape that broadcasts to
    that of ``like``."""
    return self.draw(noise.words(streams[0], j, like, self.generator))

  def each(self, streams: Sequence[noise.Stream], n: int, like: jax.Array
           ) -> list[jax.Array]:
    """`z` of directions 0 to n - 1, each in a shape that broadcasts to that of
    ``like``."""
    return [self.z(streams, j, like) for j in range(n)]

  def at_once(self, coefs: jax.Array) -> Callable | None:
    """``(streams, coefs, start, like) -> start + sum``, a way to add all terms
    that costs a TPU less than one after the other; None where there is none."""
    return None

  def selected(self, params: Any) -> Any:
    """Where z is not 0: a tree of bools, or arrays of them for elements."""
    return paths.selected(params, self.mask, self.takes)

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
  r"""Normal draws as `jax.random.normal` makes them: :math:`\sqrt 2\,
  \mathrm{erf}^{-1}(u)`, u uniform on (-1, 1) of 23 bits."""
  one, low = np.float32(1), np.nextafter(np.float32(-1), np.float32(0))
  unit = lax.bitcast_convert_type(
      (bits >> 9) | _U32(0x3F800000), jnp.float32) - one
  uniform = jnp.maximum(low, unit * (one - low) + low)
  return np.float32(np.sqrt(2)) * lax.erf_inv(uniform)


@functools.partial(jax.jit, inline=True)
def _quantile(bits: jax.Array) -> jax.Array:
  r"""Normal draws: bit 0 is the sign, the others the two-sided tail t.

  .. math:: w = -2 \ln t, \quad y = \sqrt{w}, \quad
            |z| = \Phi^{-1}(1 - t/2) \approx w\, P_3(y) / Q_4(y)

  The form is that of Abramowitz and Stegun 26.2.23; the coefficients are our
  least-maximum fit; in float32 |z| is within 5e-6 of the quantile for all
  t >= 2**-32, that is |z| <= 6.34. The logarithm is a polynomial too, in the
  fraction bits of t: multiplications, additions, one square root, one division,
  no branch.
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
  """Horner's rule, constant coefficient first."""
  total = np.float32(coefs[-1])
  for c in coefs[-2::-1]:
    total = total * x + np.float32(c)
  return total
