r"""Defines distributions of z: the base class, `Normal` and `Rademacher`.

An instance of `Directions` and a PRNG key together determine a direction z.
The low-rank distributions are in `mezo_jax.directions.low_rank` and
`mezo_jax.directions.subzero`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
import numbers
from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments, paths
from mezo_jax.core.views import Shape
from mezo_jax.directions import noise
from mezo_jax.directions.displacement import Draws, Multiplier

_U32 = jnp.uint32


@dataclasses.dataclass(frozen=True)
class Directions:
  r"""Describes a distribution of z. All distributions derive from this class.

  Before a multiplier is applied, the elements of z have mean 0 and variance 1
  and are uncorrelated:

  .. math:: E[z] = 0, \qquad E[zz^\top] = I.

  A subclass overrides `draw`, which turns random bits into independent
  elements. `LowRank` overrides other methods too, because its elements are not
  independent.

  Attributes:
    generator: Name of the random bit generator. 'hash32', the default, is a
      cheap hash whose statistics are tested in benchmarks/results/noise.md.
      With 'threefry2x32', `Normal` draws the same float32 bits as
      `jax.random.normal`.
    mask: The leaves that have a z. All other leaves are neither perturbed nor
      updated. A mask is a tree or prefix tree of bools, a function that returns
      such a tree for the params, or a regular expression that is searched for
      in the path of each leaf. In a tree, a bool array of a leaf's shape
      selects single elements. Defaults to None, which selects every
      floating-point leaf.
    stacked: The leaves that stack the weights of all layers along their first
      axis, in the same forms as ``mask``. Each layer of a stack has its own
      key. Defaults to None, which selects leaves by their paths and shapes: a
      component of the path must be named ``layer[s]``, ``block[s]`` or ``h``,
      without a number, and the shapes below it must look like stacks.
    multiplier: A `Multiplier`, which scales the elements of z or sets some of
      them to 0. Defaults to None, which leaves z as it is drawn.
    on_grid: Whether a perturbation of quantised weights (`QuantizedArray`) is
      rounded stochastically to whole steps of their grid. Defaults to False,
      which adds the perturbation to the dequantised weights.

  Raises:
    ValueError: If ``generator`` is unknown, if ``mask`` or ``stacked`` is a
      number or an invalid regular expression, if ``multiplier`` is not a
      `Multiplier`, or if ``on_grid`` is not a bool.

  References:
    Spall, 1992, "Multivariate stochastic approximation using a simultaneous
    perturbation gradient approximation".

  Example:
    >>> import mezo_jax
    >>> directions = mezo_jax.Normal(mask='attn/(q|v)/')  # queries and values
    >>> directions.generator
    'hash32'
  """

  generator: noise.Generator = 'hash32'
  _: dataclasses.KW_ONLY
  mask: Any = None
  stacked: Any = None
  multiplier: Multiplier | None = None
  on_grid: bool = False

  # Largest number of terms c_j z_j that are added in one fused operation.
  # `Draws` adds more terms than this in a loop.
  unrolled: ClassVar[int] = 8
  # Whether drawing an element of z costs more than storing and reloading it.
  dear: ClassVar[bool] = False

  def __post_init__(self) -> None:
    """Checks the fields."""
    arguments.check(
        isinstance(self.generator, str) and self.generator in noise.GENERATORS,
        'generator', f'one of {noise.GENERATORS}', self.generator)
    for name in ('mask', 'stacked'):
      value = getattr(self, name)
      if isinstance(value, str):
        arguments.expression(name, value)
      arguments.check(
          isinstance(value, bool) or not isinstance(value, numbers.Number),
          name, 'None, a tree of bools, a function from the params to such a '
          'tree, or a regular expression', value)
    arguments.check(
        isinstance(self.multiplier, (Multiplier, type(None))), 'multiplier',
        'a mezo_jax.Multiplier or None', self.multiplier)
    arguments.boolean('on_grid', self.on_grid)

  def keys(self, key: jax.Array, count: jax.Array | int, n: int) -> jax.Array:
    """Returns the keys of the directions of one step.

    Args:
      key: The key of the whole run.
      count: Number of the step, counted from 0.
      n: Number of directions per step.

    Returns:
      Typed keys of shape [n].
    """
    return noise.step_keys(key, count, n)

  def of_columns(self, keys: jax.Array) -> jax.Array | None:
    """Returns the keys from which a low-rank distribution draws V in z = U Vᵀ.

    Args:
      keys: Typed keys [n], one for each direction.

    Returns:
      Typed keys [n], or None if this distribution has no separate keys for V.
    """
    return None

  def draw(self, bits: jax.Array) -> jax.Array:
    """Converts random uint32 words to float32 draws, one draw for each word."""
    raise NotImplementedError

  def takes(self, leaf: Any) -> bool:
    """Returns whether a leaf can have a z, which depends on its dtype."""
    return paths.is_floating(leaf)

  def of_leaf(self, stream: noise.Stream, coefs: jax.Array,
              shape: Shape, columns: noise.Stream | None = None
              ) -> 'Draws':
    """Returns the part of a displacement in one leaf, as `Draws`.

    Args:
      stream: The stream of the leaf's elements.
      coefs: Coefficients of the n directions, float32 [n].
      shape: Shape of the leaf.
      columns: The stream with the keys that `of_columns` returned. Defaults to
        None, for distributions without such keys.
    """
    del shape, columns
    return Draws((stream,), coefs, self.bare())

  def each(self, streams: Sequence[noise.Stream], like: jax.Array
           ) -> list[jax.Array]:
    """Returns z of each direction for a block, which is a leaf or a view of it.

    Args:
      streams: The streams of the block; see `Draws`.
      like: An array with the shape and the sharding of the block.

    Returns:
      A list of float32 arrays that broadcast to the shape of ``like``.
    """
    stream = streams[0]
    return [self.draw(noise.words(stream, j, like, self.generator))
            for j in range(stream.keys.shape[-2])]

  def at_once(self, coefs: jax.Array) -> Callable | None:
    """Returns a function that adds all terms c_j z_j in one operation, or None.

    `Draws` calls the function on TPUs only, where it is faster than adding term
    by term.

    Args:
      coefs: Coefficients of the n directions.

    Returns:
      ``(streams, coefs, start, like) -> start + sum``, or None if the
      distribution has no such function.
    """
    return None

  def selected(self, params: Any) -> Any:
    """Returns the mask as a tree of bools with the structure of the params.

    A bool array in place of a bool selects single elements of its leaf.
    """
    return paths.selected(params, self.mask, self.takes, self.stacked)

  def bare(self) -> 'Directions':
    """Returns these directions without masks and without multiplier values.

    The result is hashable, so that JAX can use it as static data of a pytree.
    """
    multiplier = self.multiplier
    if multiplier is not None:
      multiplier = multiplier._replace(values=None)
    return dataclasses.replace(
        self, mask=None, stacked=None, multiplier=multiplier)


class Normal(Directions):
  r"""Draws the elements of z independently from the standard normal.

  .. math:: z_i \sim \mathcal{N}(0, 1)

  Attributes:
    generator: Name of the random bit generator, 'hash32' (the default) or
      'threefry2x32'.
    mask: The leaves that have a z. Defaults to None, for every floating-point
      leaf.
    stacked: The leaves that are stacks of layers. Defaults to None, which
      selects them by their paths and shapes.
    multiplier: A `Multiplier` of the elements of z. Defaults to None.
    on_grid: Whether perturbations of quantised weights are rounded to the grid
      of the weights. Defaults to False.

  `Directions` describes these attributes in full.

  Raises:
    ValueError: See `Directions`.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax
    >>> params = {'w': jnp.zeros((2, 3)), 'b': jnp.zeros(3)}
    >>> z = mezo_jax.direction(
    ...     params, mezo_jax.Displacement(jax.random.key(0), 1.0),
    ...     mezo_jax.Normal(mask='w'))
    >>> z['w'].shape, bool(jnp.all(z['b'] == 0))
    ((2, 3), True)
  """

  dear = True

  def draw(self, bits: jax.Array) -> jax.Array:
    if self.generator == 'hash32':
      return _quantile(bits)
    return _inverse(bits)


class Rademacher(Directions):
  r"""Draws each element of z as 1 or -1, with probability 1/2 each.

  .. math:: P(z_i = 1) = P(z_i = -1) = \tfrac{1}{2}

  On a CPU, adding Rademacher draws to weights takes about a quarter of the time
  of adding normal draws (benchmarks/results/noise.md).

  Attributes:
    generator: Name of the random bit generator, 'hash32' (the default) or
      'threefry2x32'.
    mask: The leaves that have a z. Defaults to None, for every floating-point
      leaf.
    stacked: The leaves that are stacks of layers. Defaults to None, which
      selects them by their paths and shapes.
    multiplier: A `Multiplier` of the elements of z. Defaults to None.
    on_grid: Whether perturbations of quantised weights are rounded to the grid
      of the weights. Defaults to False.

  `Directions` describes these attributes in full.

  Raises:
    ValueError: See `Directions`.

  References:
    Spall, 1992, "Multivariate stochastic approximation using a simultaneous
    perturbation gradient approximation".

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax
    >>> z = mezo_jax.direction(
    ...     jnp.zeros(4), mezo_jax.Displacement(jax.random.key(0), 1.0),
    ...     mezo_jax.Rademacher())
    >>> bool(jnp.all(jnp.abs(z) == 1))
    True
  """

  def draw(self, bits: jax.Array) -> jax.Array:
    # The top bit of the word becomes the sign bit of the float 1.0.
    return _as_float((bits & _U32(0x80000000)) | _U32(0x3F800000))


def _as_float(bits) -> jax.Array:
  """Returns the floats that have these bits."""
  return lax.bitcast_convert_type(bits, jnp.float32)


# `jax.jit` caches the trace, so that leaves of one shape are traced once.
@functools.partial(jax.jit, inline=True)
def _inverse(bits: jax.Array) -> jax.Array:
  r"""Returns the normal draws of `jax.random.normal`.

  A draw is :math:`\sqrt 2\, \mathrm{erf}^{-1}(u)`, where u is uniform on (-1,
  1) and has 23 random bits.
  """
  one, low = np.float32(1), np.nextafter(np.float32(-1), np.float32(0))
  unit = _as_float((bits >> 9) | _U32(0x3F800000)) - one
  uniform = jnp.maximum(low, unit * (one - low) + low)
  return np.float32(np.sqrt(2)) * lax.erf_inv(uniform)


@functools.partial(jax.jit, inline=True)
def _quantile(bits: jax.Array) -> jax.Array:
  r"""Returns normal draws by an approximate quantile function.

  Bit 0 of a word is the sign of the draw. The other 31 bits are the two-sided
  tail probability t of its absolute value.

  .. math:: w = -2 \ln t, \quad y = \sqrt{w}, \quad
            |z| = \Phi^{-1}(1 - t/2) \approx w\, P_3(y) / Q_4(y)

  This rational form follows Abramowitz and Stegun, 26.2.23. Its coefficients
  were fitted to minimise the largest error. In float32, |z| is within 5e-6 of
  the exact quantile for all t >= 2**-32, which means |z| <= 6.34. A polynomial
  in the fraction bits of t replaces the logarithm. A draw therefore takes
  multiplications, additions, one square root and one division, and no branch.
  """
  whole = (bits >> 1).astype(jnp.int32).astype(jnp.float32)
  tail = (whole + np.float32(0.5)) * np.float32(2**-31)
  word = lax.bitcast_convert_type(tail, jnp.int32)
  # 0x3F3504F3 is the float32 nearest to sqrt(1/2). Subtracting it splits t into
  # 2**exponent times a fraction in [sqrt(1/2), sqrt(2)).
  exponent = (word - 0x3F3504F3) >> 23
  m = _as_float(word - (exponent << 23)) - np.float32(1)
  w = m * _polynomial(_LOG, m) + exponent.astype(jnp.float32) * np.float32(
      -2 * math.log(2))
  w = jnp.maximum(w, np.float32(0))
  y = jnp.sqrt(w)
  z = w * _polynomial(_P, y) / _polynomial(_Q, y)
  sign = bits << 31
  return _as_float(lax.bitcast_convert_type(z, jnp.uint32) | sign)


# Coefficients of the polynomial that approximates -2 ln(1 + m) / m.
_LOG = (-2.0000064, 1.0000393, -0.6660660, 0.4976268, -0.4120935, 0.3780396,
        -0.2365496)
# Coefficients of the numerator and of the denominator in `_quantile`.
_P = (0.6271003, 0.6916010, 0.5510004, 0.1647054)
_Q = (1.0, 1.1099032, 1.1097076, 0.5660853, 0.1643640)


def _polynomial(coefs, x):
  """Evaluates a polynomial; ``coefs`` begins with the constant coefficient."""
  total = np.float32(coefs[-1])
  for c in coefs[-2::-1]:
    total = total * x + np.float32(c)
  return total
