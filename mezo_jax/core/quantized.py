r"""Quantised weights: integers with a scale for each group of them.

.. math:: w = s\,q + o, \qquad q \in \{-127, \dots, 127\},
          \{-8, \dots, 7\} \text{ or } \{0, \dots, 15\}

`Codes` take the place of a weight in a tree of parameters. They should not be
built whole: `mezo_jax.perturbed` and `mezo_jax.dequantized` take views of them
(a layer, rows of an embedding, a transpose) and dequantise a weight where it is
consumed. Training moves q by integers and changes nothing else.
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

QUANTISED = ('int8', 'int4', 'codes')  # names of quantised dtypes of a model
GROUP = 32  # weights that share a scale, as GGUF has it
FACTORS = 'factors'  # name of parameters by which scales are multiplied


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('codes', 'scales', 'offsets'),
    meta_fields=('bits', 'packed', 'dtype'))
@dataclasses.dataclass(frozen=True)
class Codes:
  r"""A quantised weight :math:`s q + o`, with s and o per group of elements.

  Attributes:
    codes: The integers: int8 of the weight's shape; with 4 bits, uint8 with two
      neighbours along one axis in a byte, the first in its low half.
    scales: s, floats. Along each axis there are as many as there are groups: 1
      if all elements share one, or a divisor of the weight's length.
    offsets: o, as ``scales``, or None. Integers of 4 bits are 0 to 15 with
      offsets, and -8 to 7 without.
    bits: 8 or 4.
    packed: The axis, counted from the end, along which two integers share a
      byte; None if none do.
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
    shape = [*self.codes.shape]
    if self.packed is not None:
      shape[self.packed] *= 2
    return tuple(shape)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(self))

  def __len__(self) -> int:
    return self.shape[0]

  def __mul__(self, factor: Any) -> jax.Array:  # weight decay
    return factor * self.astype(jnp.float32)

  def __rmul__(self, factor: Any) -> jax.Array:
    return self * factor

  def __getitem__(self, rows: Any) -> jax.Array:
    rows = jnp.asarray(rows)
    rows = jnp.where(rows < 0, rows + len(self), rows)
    view = self.viewed(views.Take(0, rows))
    if view is None:
      raise IndexError(
          'rows of a weight of which two share a byte cannot be selected: '
          'quantise it along another axis.')
    return view.astype(self.dtype)

  # --- what it stands for ---

  def integers(self) -> jax.Array:
    """Returns q, int32 of the weight's shape."""
    if self.packed is None:
      return self._signed(self.codes)
    axis = self.codes.ndim + self.packed
    shifts = np.array([0, 4], np.uint8).reshape(
        (2,) + (1,) * (self.codes.ndim - axis - 1))
    halves = (jnp.expand_dims(self.codes, axis + 1) >> shifts) & np.uint8(15)
    return self._signed(halves.reshape(self.shape))

  def _signed(self, q: jax.Array) -> jax.Array:
    q = q.astype(jnp.int32)
    return (q ^ 8) - 8 if self.bits == 4 and self.offsets is None else q

  def astype(self, dtype: jax.typing.DTypeLike) -> jax.Array:
    return self.at(self.integers()).astype(dtype)

  def at(self, q: jax.Array) -> jax.Array:
    """Returns float32 weights for other integers q."""
    w = q.astype(jnp.float32) * self._each(self.scales)
    return w if self.offsets is None else w + self._each(self.offsets)

  def rescaled(self, factors: jax.Array) -> 'Codes':
    """Returns the weight with scales multiplied by factors, in float32."""
    return dataclasses.replace(
        self, scales=self.scales.astype(jnp.float32) * factors)

  def steps(self, change: jax.Array, bits: jax.Array | None) -> jax.Array:
    r"""Returns a change of the weights in steps of the grid, int32.

    Args:
      change: A change of the weights, float32.
      bits: Uniform uint32 words for stochastic rounding, after which
        :math:`E[s\,\text{steps}]` is the change, and -change gives -steps.
        None to round to nearest.
    """
    scale = self._each(self.scales)
    x = jnp.where(scale == 0, 0.0, change / jnp.where(scale == 0, 1.0, scale))
    up = np.float32(0.5) if bits is None else (
        (bits >> 8).astype(jnp.float32) * np.float32(2**-24))
    most = np.float32(2**self.bits)  # no two integers are farther apart
    far = jnp.minimum(jnp.floor(jnp.abs(x) + up), most)
    return (jnp.sign(x) * far).astype(jnp.int32)

  def moved_by(self, steps: jax.Array) -> 'Codes':
    """Returns the update that moves each integer by a number of steps, within
    its range. The update is to be added."""
    low, high = {(8, False): (-127, 127), (8, True): (-127, 127),
                 (4, False): (-8, 7), (4, True): (0, 15)}[
                     self.bits, self.offsets is not None]
    moved = lambda q, steps: jnp.clip(self._signed(q) + steps, low, high)
    if self.packed is None:
      new = moved(self.codes, steps).astype(jnp.int8)
    else:  # byte by byte, and so in place
      axis = steps.ndim + self.packed
      low_half, high_half = (
          moved(q, jax.lax.slice_in_dim(steps, i, None, 2, axis)) & 15
          for i, q in enumerate((self.codes & np.uint8(15), self.codes >> 4)))
      new = (low_half | high_half << 4).astype(jnp.uint8)
    return self.still(new - self.codes)  # modulo 256, as the sum will be

  def still(self, codes: jax.Array | None = None) -> 'Codes':
    """Returns an update that changes only ``codes``."""
    out = jax.tree.map(jnp.zeros_like, self)
    return out if codes is None else dataclasses.replace(out, codes=codes)

  def _each(self, x: jax.Array) -> jax.Array:
    return views.each(x.astype(jnp.float32), self.shape)

  # --- views ---

  def viewed(self, view: views.View) -> 'Codes | None':
    """Returns a view of the weight, or None if it cannot be one: if it would
    divide a byte, or by a reshape the elements that share a scale."""
    shape, others = self.shape, (self.scales, self.offsets)
    if view.cuts(shape, self.codes.shape) or (
        isinstance(view, views.Reshape)
        and view.cuts(shape, self.scales.shape)):
      return None
    if isinstance(view, views.Keep):  # what a lookup finds elsewhere is NaN
      scales = jnp.where(view.there, self.scales, jnp.nan)
      return dataclasses.replace(
          self, scales=scales.astype(self.scales.dtype))
    codes, new = view.array(self.codes, shape), view.shape(shape)
    scales, offsets = (
        None if x is None else view.array(x, shape) for x in others)
    packed = [a - len(new) for a, n in enumerate(new) if codes.shape[a] != n]
    return dataclasses.replace(
        self, codes=codes, scales=scales, offsets=offsets,
        packed=packed[0] if packed else None)


def is_codes(x: Any) -> 'TypeIs[Codes]':
  """Returns whether a leaf is a quantised weight."""
  return isinstance(x, Codes)


def pack(q: Any, axis: int) -> Any:
  """Returns uint8 with two neighbours along an axis (counted from the end) in
  each byte."""
  axis += q.ndim
  pairs = (q & 15).astype(np.uint8).reshape(
      *q.shape[:axis], q.shape[axis] // 2, 2, *q.shape[axis + 1:])
  shifts = np.array([1, 16], np.uint8).reshape(
      (2,) + (1,) * (q.ndim - axis - 1))
  return (pairs * shifts).sum(axis + 1, dtype=np.uint8)  # one pass over q


# --- to codes and back ------------------------------------------------------


def quantized(w: np.ndarray, bits: int, axis: int
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """Returns q, scales and offsets of a block in the host's memory.

  There is a float16 scale for each `GROUP` along an axis, or one for the whole
  axis if `GROUP` does not divide it. Integers of 8 bits are symmetric; 4 bits
  span the range from the least to the greatest weight.
  """
  n = w.shape[axis]
  run = GROUP if n % GROUP == 0 else n
  runs = w.astype(np.float32).reshape(
      *w.shape[:axis], n // run, run, *w.shape[axis + 1:])
  if bits == 8:
    scale = (np.abs(runs).max(axis + 1) / 127).astype(np.float16)
    offset = None
    low, high, start = -127, 127, 0.0
  else:
    least, most = runs.min(axis + 1), runs.max(axis + 1)
    scale = ((most - least) / 15).astype(np.float16)
    offset = least.astype(np.float16)
    low, high, start = 0, 15, np.expand_dims(
        offset.astype(np.float32), axis + 1)
  wide = np.expand_dims(scale.astype(np.float32), axis + 1)
  q = np.clip(np.rint((runs - start) / np.where(wide == 0, 1, wide)), low, high)
  return q.astype(np.int8).reshape(w.shape), scale, offset


def quantize(w: Any, bits: int = 8, axis: int = -2) -> Codes:
  """Returns a weight as `Codes`, with a scale for each 32 along an axis, or one
  for the whole axis if 32 does not divide it.

  Args:
    w: An array of floats with one axis or more.
    bits: 8 or 4.
    axis: The axis that products with it sum over: the first of a kernel
      [inputs, outputs], the last of an embedding.

  Raises:
    ValueError: For something other than floats, an axis that w does not have,
      other ``bits``, or 4 bits along an axis of odd length.
  """
  if bits not in (8, 4):
    raise ValueError(f'bits must be 8 or 4, got {bits!r}.')
  if not hasattr(w, 'dtype') or not w.ndim or not jnp.issubdtype(
      w.dtype, jnp.floating):
    raise ValueError(f'w must be an array of floats, got {w!r}.')
  if not isinstance(axis, (int, np.integer)) or not -w.ndim <= axis < w.ndim:
    raise ValueError(f'axis must be one of the {w.ndim} of w, got {axis!r}.')
  axis = axis % w.ndim - w.ndim
  if bits == 4 and w.shape[axis] % 2:
    raise ValueError('4 bits need an axis of even length, got '
                     f'{list(w.shape)} and axis {axis}.')
  q, scales, offsets = quantized(np.asarray(w), bits, axis % w.ndim)
  return assembled(jnp.asarray(q), jnp.asarray(scales), offsets if (
      offsets is None) else jnp.asarray(offsets), bits, axis, str(w.dtype))


def assembled(q: Any, scales: Any, offsets: Any, bits: int, axis: int,
              dtype: str) -> Codes:
  """Returns `Codes` from integers q, scales and offsets."""
  if bits == 8:
    return Codes(q.astype(jnp.int8), scales, offsets, 8, None, dtype)
  return Codes(pack(q, axis), scales, offsets, 4, axis, dtype)


def dequantize(params: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
  """Returns params with floats in place of `Codes`.

  Args:
    params: A tree of arrays and `Codes`.
    dtype: A floating-point dtype. Defaults to None, for each weight's own.
  """
  arguments.tree('params', params)
  arguments.floating('dtype', dtype)
  return jax.tree.map(
      lambda x: x.astype(dtype or x.dtype) if is_codes(x) else x, params,
      is_leaf=is_codes)
