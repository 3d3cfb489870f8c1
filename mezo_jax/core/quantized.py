r"""Represents quantised weights: integers with a scale per group of elements.

.. math:: w = s\,q + o, \qquad q \in \{-127, \dots, 127\},
          \{-8, \dots, 7\} \text{ or } \{0, \dots, 15\}

A `QuantizedArray` object replaces a weight in a tree of parameters. Training
does not dequantise the whole weight: `mezo_jax.perturbed` and
`mezo_jax.dequantized` take views of the `QuantizedArray` (a layer, rows of an
embedding, a transpose) and dequantise a weight where an operation consumes it.
Training adds integers to q and leaves s and o unchanged.
"""

import dataclasses
import functools
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments, views

if TYPE_CHECKING:  # in typing from Python 3.13 on
  from typing_extensions import TypeIs

# Values of `model.dtype` in a config that select quantised weights.
QUANTISED = ('int8', 'int4', 'codes')
GROUP = 32  # number of weights that share a scale, as in GGUF
# Name of the trained parameters that multiply the scales of a quantised weight
# (see `mezo_jax.variants.qzo`).
FACTORS = 'factors'


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('codes', 'scales', 'offsets'),
    meta_fields=('bits', 'packed', 'dtype'))
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
  r"""Holds a quantised weight :math:`w = s q + o`.

  It has those parts of the interface of an array that models need: `shape`,
  indexing by rows, `astype`, and multiplication by a number. The last three
  return dequantised arrays.

  Attributes:
    codes: The integers q. With 8 bits, int8 in the weight's shape. With 4 bits,
      uint8 with two neighbouring elements along one axis in each byte, the
      first in the low half.
    scales: The scales s, floats, with as many axes as the weight. The length of
      an axis is the number of groups along it, which divides the length of the
      weight's axis. It is 1 if all elements along the axis share a scale.
    offsets: The offsets o, in the shape of ``scales``, or None for none. With 4
      bits, q ranges from 0 to 15 with offsets and from -8 to 7 without.
    bits: Number of bits of an integer, 8 or 4.
    packed: The axis, counted from the end, along which two integers share a
      byte. None if each integer has a byte of its own.
    dtype: Name of the dtype that the weight is dequantised to.
  """

  codes: jax.Array
  scales: jax.Array
  offsets: jax.Array | None = None
  bits: int = 8
  packed: int | None = None
  dtype: str = 'float32'

  @property
  def shape(self) -> tuple[int, ...]:
    """Returns the shape of the weight."""
    shape = [*self.codes.shape]
    if self.packed is not None:
      shape[self.packed] *= 2
    return tuple(shape)

  @property
  def ndim(self) -> int:
    """Returns the number of axes of the weight."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """Returns the number of elements of the weight."""
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    """Returns the number of bytes of the integers, scales and offsets."""
    return sum(x.nbytes for x in jax.tree.leaves(self))

  def __len__(self) -> int:
    """Returns the length of the first axis."""
    return self.shape[0]

  def __mul__(self, factor: Any) -> jax.Array:
    """Returns the dequantised weight times a factor; weight decay uses it."""
    return factor * self.astype(jnp.float32)

  def __rmul__(self, factor: Any) -> jax.Array:
    """Returns the same as ``self * factor``."""
    return self * factor

  def __getitem__(self, rows: Any) -> jax.Array:
    """Returns dequantised rows along the first axis, as an embedding lookup.

    Args:
      rows: Integers of any shape; negative ones count from the end.

    Raises:
      IndexError: If two rows share a byte.
    """
    rows = jnp.asarray(rows)
    rows = jnp.where(rows < 0, rows + len(self), rows)
    view = self.viewed(views.Take(0, rows))
    if view is None:
      raise IndexError(
          'cannot select rows of this 4-bit weight, because two rows share a '
          'byte; quantise it along another axis.')
    return view.astype(self.dtype)

  # --- values and updates ---

  def integers(self) -> jax.Array:
    """Returns the integers q, unpacked, as int32 in the weight's shape."""
    if self.packed is None:
      return self._signed(self.codes)
    # A new axis of length 2 holds the low and the high half of each byte.
    axis = self.codes.ndim + self.packed
    shifts = np.array([0, 4], np.uint8)
    shifts = shifts.reshape(2, *(1,) * (-1 - self.packed))
    halves = (jnp.expand_dims(self.codes, axis + 1) >> shifts) & np.uint8(15)
    return self._signed(halves.reshape(self.shape))

  def _signed(self, q: jax.Array) -> jax.Array:
    """Converts stored integers to int32, and restores the sign of 4-bit ones.
    """
    q = q.astype(jnp.int32)
    if self.bits == 8 or self.offsets is not None:
      return q
    # This extends the sign bit of a 4-bit two's complement number.
    return (q ^ 8) - 8

  def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns the dequantised weight, computed in float32, in this dtype."""
    return self.at(self.integers()).astype(dtype)

  def at(self, q: jax.Array) -> jax.Array:
    """Dequantises integers, with the scales and offsets of this weight.

    Args:
      q: Integers in the weight's shape, in place of those of this weight.

    Returns:
      A float32 array.
    """
    w = q.astype(jnp.float32) * self._each(self.scales)
    if self.offsets is None:
      return w
    return w + self._each(self.offsets)

  def rescaled(self, factors: jax.Array) -> 'QuantizedArray':
    """Returns the weight with its scales multiplied by factors, in float32.

    Args:
      factors: Floats in the shape of ``scales``.
    """
    return dataclasses.replace(
        self, scales=self.scales.astype(jnp.float32) * factors)

  def steps(self, change: jax.Array, bits: jax.Array | None) -> jax.Array:
    r"""Converts a change of the weight to integers that can be added to q.

    Args:
      change: The change of the weight, float32 in its shape.
      bits: Uniform uint32 words in the same shape, for stochastic rounding.
        Then :math:`E[s\,\text{steps}]` equals the change, and the opposite
        change with the same words gives the opposite steps. None rounds to
        nearest.

    Returns:
      The steps, int32 in the weight's shape.
    """
    scale = self._each(self.scales)
    x = jnp.where(scale == 0, 0.0, change / jnp.where(scale == 0, 1.0, scale))
    # The magnitude is rounded down after adding 1/2 (to nearest) or a uniform
    # number in [0, 1) (stochastically); the sign is restored afterwards.
    up = np.float32(0.5)
    if bits is not None:
      up = (bits >> 8).astype(jnp.float32) * np.float32(2**-24)
    # The difference of two integers q is never larger than this. Larger steps
    # are clipped to the range of q anyway, and could overflow int32.
    most = np.float32(2**self.bits)
    far = jnp.minimum(jnp.floor(jnp.abs(x) + up), most)
    return (jnp.sign(x) * far).astype(jnp.int32)

  def moved_by(self, steps: jax.Array) -> 'QuantizedArray':
    """Returns an optax update that adds steps to q and clips q to its range.

    `optax.apply_updates` applies it by adding the arrays of the update to those
    of the weight.

    Args:
      steps: Integers in the weight's shape, such as those of `steps`.
    """
    low, high = -127, 127
    if self.bits == 4:
      low, high = (-8, 7) if self.offsets is None else (0, 15)
    moved = lambda q, steps: jnp.clip(self._signed(q) + steps, low, high)
    if self.packed is None:
      new = moved(self.codes, steps).astype(jnp.int8)
    else:
      # Both halves of a byte are computed separately and joined, without
      # unpacking the whole weight, so that XLA can update it in place.
      axis = steps.ndim + self.packed
      half = lambda q, first: moved(
          q, jax.lax.slice_in_dim(steps, first, None, 2, axis)) & 15
      low_half = half(self.codes & np.uint8(15), 0)
      new = low_half | half(self.codes >> 4, 1) << 4
      new = new.astype(jnp.uint8)
    # The difference of two bytes may wrap around modulo 256. When the update is
    # added, the sum wraps around, too, so that the result is exactly `new`.
    return self.still(new - self.codes)

  def still(self, codes: jax.Array | None = None) -> 'QuantizedArray':
    """Returns an update that leaves scales and offsets unchanged.

    Args:
      codes: The array that the update adds to ``self.codes``. Defaults to None,
        for zeros.
    """
    out = jax.tree.map(jnp.zeros_like, self)
    if codes is None:
      return out
    return dataclasses.replace(out, codes=codes)

  def _each(self, x: jax.Array) -> jax.Array:
    """Repeats scales or offsets, so that each element has its own, float32."""
    return views.each(x.astype(jnp.float32), self.shape)

  # --- views ---

  def viewed(self, view: views.View) -> 'QuantizedArray | None':
    """Returns a view of the weight without dequantising it.

    Args:
      view: The view; see `mezo_jax.core.views`.

    Returns:
      The view. None if the view would separate two integers that share a byte,
      or if it is a reshape that would separate elements that share a scale.
    """
    shape = self.shape
    if view.cuts(shape, self.codes.shape):
      return None
    if isinstance(view, views.Reshape) and view.cuts(shape, self.scales.shape):
      return None
    if isinstance(view, views.Keep):
      # A lookup out of bounds gives NaN. Integers cannot be NaN, but the scale
      # by which they are multiplied can.
      scales = jnp.where(view.there, self.scales, jnp.nan)
      return dataclasses.replace(
          self, scales=scales.astype(self.scales.dtype))
    out = jax.tree.map(lambda x: view.array(x, shape), self)
    new, packed = view.shape(shape), None
    for axis, length in enumerate(new):
      if out.codes.shape[axis] != length:
        packed = axis - len(new)
    return dataclasses.replace(out, packed=packed)


def is_codes(x: Any) -> 'TypeIs[QuantizedArray]':
  """Returns whether a leaf is a quantised weight."""
  return isinstance(x, QuantizedArray)


def pack(q: Any, axis: int) -> Any:
  """Packs two neighbouring 4-bit integers along an axis into each byte.

  Args:
    q: Integers of 4 bits, signed or unsigned. The first of two neighbours is
      stored in the low half.
    axis: The axis, counted from the end (negative). Its length is even.

  Returns:
    A uint8 array, half as long as ``q`` along the axis.
  """
  after = q.shape[axis:][1:]
  pairs = (q & 15).astype(np.uint8)
  pairs = pairs.reshape(*q.shape[:axis], q.shape[axis] // 2, 2, *after)
  shifts = np.array([1, 16], np.uint8).reshape(2, *(1,) * len(after))
  # The halves do not overlap, so the sum joins them, in one pass over q.
  return (pairs * shifts).sum(axis, dtype=np.uint8)


# --- quantise and dequantise ------------------------------------------------


def quantized(w: np.ndarray, bits: int, axis: int
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Quantises a block of a weight in the host's memory.

  There is one float16 scale for each `GROUP` of elements along an axis, or one
  for the whole axis if `GROUP` does not divide its length. Quantisation with 8
  bits is symmetric about zero. With 4 bits it spans the range from the smallest
  to the largest weight of a group, with a float16 offset.

  Args:
    w: Floats.
    bits: 8 or 4.
    axis: The axis along which elements are grouped, 0 or more.

  Returns:
    The integers (int8 in the shape of ``w``), the scales, and the offsets (None
    with 8 bits).
  """
  n, within = w.shape[axis], axis + 1
  run = GROUP if n % GROUP == 0 else n
  runs = w.astype(np.float32).reshape(
      *w.shape[:axis], n // run, run, *w.shape[within:])
  each = lambda x: np.expand_dims(x.astype(np.float32), within)
  if bits == 8:
    low, high, offset = -127, 127, None
    scale = np.abs(runs).max(within) / high
  else:
    low, high, offset = 0, 15, runs.min(within).astype(np.float16)
    scale = (runs.max(within) - runs.min(within)) / high
    runs = runs - each(offset)
  scale = scale.astype(np.float16)
  wide = each(scale)
  q = np.rint(runs / np.where(wide == 0, 1, wide))
  return np.clip(q, low, high).astype(np.int8).reshape(w.shape), scale, offset


def quantize(w: Any, bits: int = 8, axis: int = -2) -> QuantizedArray:
  """Quantises a weight.

  There is one scale for each 32 elements along an axis, or one for the whole
  axis if 32 does not divide its length.

  Args:
    w: An array of floats with at least one axis.
    bits: Number of bits of an integer, 8 or 4. Defaults to 8.
    axis: The axis along which elements share scales. It should be the one that
      matrix products sum over: the first of a kernel [inputs, outputs], the
      last of an embedding. Defaults to -2.

  Returns:
    The quantised weight. It is dequantised to the dtype of ``w``.

  Raises:
    ValueError: If ``w`` is not an array of floats or does not have this axis,
      if ``bits`` is neither 8 nor 4, or if ``bits`` is 4 and the length of the
      axis is odd.
  """
  arguments.check(bits in (8, 4), 'bits', '8 or 4', bits)
  arguments.check(
      hasattr(w, 'dtype') and w.ndim and jnp.issubdtype(w.dtype, jnp.floating),
      'w', 'an array of floats', w)
  arguments.check(
      isinstance(axis, (int, np.integer)) and -w.ndim <= axis < w.ndim,
      'axis', f'one of the {w.ndim} axes of w', axis)
  axis %= w.ndim
  if bits == 4 and w.shape[axis] % 2:
    raise ValueError('bits=4 needs an axis of even length, got w of shape '
                     f'{list(w.shape)} and axis {axis - w.ndim}.')
  q, scales, offsets = quantized(np.asarray(w), bits, axis)
  packed = None
  if bits == 4:
    packed = axis - w.ndim
    q = pack(jnp.asarray(q), packed)
  q, scales, offsets = jax.tree.map(jnp.asarray, (q, scales, offsets))
  return QuantizedArray(q, scales, offsets, bits, packed, str(w.dtype))


def dequantize(params: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
  """Replaces each `QuantizedArray` in a tree by an array of floats.

  Args:
    params: A tree of arrays and `QuantizedArray`.
    dtype: Floating-point dtype of the dequantised weights. Defaults to None,
      for the dtype that each `QuantizedArray` records.

  Returns:
    A tree of arrays. Those that were not quantised are unchanged.

  Raises:
    ValueError: If ``params`` is None or ``dtype`` is not a floating-point
      dtype.
  """
  arguments.tree('params', params)
  arguments.floating('dtype', dtype)
  return jax.tree.map(
      lambda x: x.astype(dtype or x.dtype) if is_codes(x) else x, params,
      is_leaf=is_codes)
