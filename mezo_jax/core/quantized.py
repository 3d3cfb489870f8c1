r"""Weights as integers with a scale for each run of them.

.. math:: w = s\,q + o, \qquad q \in \{-127, \dots, 127\},
          \{-8, \dots, 7\} \text{ or } \{0, \dots, 15\}

`Codes` stand in the place of a weight in a tree of parameters. What reads them
is not to build them whole: `mezo_jax.perturbed` and `mezo_jax.dequantized` take
views of them (a layer, rows of an embedding, a transpose) and dequantise where
a weight is consumed. Training moves q by integers, and nothing else.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments

if TYPE_CHECKING:  # in typing from Python 3.13 on
  from typing_extensions import TypeIs

QUANTISED = ('int8', 'int4', 'codes')  # names of quantised dtypes of a model
GROUP = 32  # weights that share a scale, as GGUF has it
FACTORS = 'factors'  # a name: of what scales are multiplied by


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('codes', 'scales', 'offsets'),
    meta_fields=('bits', 'packed', 'dtype'))
@dataclasses.dataclass(frozen=True)
class Codes:
  r"""A quantised weight: :math:`s q + o`, with s and o for each run.

  Attributes:
    codes: int8 of the weight's shape; or, of 4 bits, uint8 with two neighbours
      along one axis in a byte, the first in its low half.
    scales: floats, along each axis as many as there are runs: 1 where all share
      one, or a divisor of the weight's.
    offsets: as ``scales``, or None. With them 4 bits are 0 to 15, without -8 to
      7.
    bits: 8 or 4.
    packed: the axis, counted from the end, along which two are in a byte.
    dtype: name of what the weight is to whoever reads it.
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
    view = self.take(0, jnp.asarray(rows))
    if view is None:
      raise IndexError(
          'rows that share a byte or a scale cannot be taken apart.')
    return view.astype(self.dtype)

  # --- what it stands for ---

  def integers(self) -> jax.Array:
    """q, int32 of the weight's shape."""
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
    """float32 weights of other integers q."""
    w = q.astype(jnp.float32) * self._each(self.scales)
    return w if self.offsets is None else w + self._each(self.offsets)

  def rescaled(self, factors: jax.Array) -> 'Codes':
    """With scales multiplied, in float32."""
    return dataclasses.replace(
        self, scales=self.scales.astype(jnp.float32) * factors)

  def steps(self, change: jax.Array, bits: jax.Array | None) -> jax.Array:
    r"""int32: a float32 change of the weights in steps of the grid.

    Args:
      change: of the weights.
      bits: uint32, uniform: rounded stochastically, :math:`E[s\,\text{steps}]`
        is the change, and -change gives -steps; None to round to nearest.
    """
    scale = self._each(self.scales)
    x = jnp.where(scale == 0, 0.0, change / jnp.where(scale == 0, 1.0, scale))
    up = np.float32(0.5) if bits is None else (
        (bits >> 8).astype(jnp.float32) * np.float32(2**-24))
    most = np.float32(2**self.bits)  # as far as any code is from any other
    far = jnp.minimum(jnp.floor(jnp.abs(x) + up), most)
    return (jnp.sign(x) * far).astype(jnp.int32)

  def moved_by(self, steps: jax.Array) -> 'Codes':
    """The update, to be added, that takes each code so many steps on, and none
    off the grid."""
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
    """An update that changes nothing but ``codes``."""
    out = jax.tree.map(jnp.zeros_like, self)
    return out if codes is None else dataclasses.replace(out, codes=codes)

  def _each(self, x: jax.Array) -> jax.Array:
    """Of runs: of elements, or of length 1 where all share one."""
    x = x.astype(jnp.float32)
    for axis, n in enumerate(self.shape):
      m = x.shape[axis]
      if 1 < m < n:
        x = jnp.broadcast_to(
            jnp.expand_dims(x, axis + 1),
            (*x.shape[:axis + 1], n // m, *x.shape[axis + 1:]))
        x = x.reshape(*x.shape[:axis], n, *x.shape[axis + 2:])
    return x

  # --- views ---

  def viewed(self, move: Callable) -> 'Codes | None':
    """Returns a view, or None if there is none.

    Args:
      move: Returns the view of a `GroupedArray`, or None.
    """
    codes = move(GroupedArray(self.codes, self.shape, whole=True))
    others = [None if x is None else move(GroupedArray(x, self.shape))
              for x in (self.scales, self.offsets)]
    if codes is None or others[0] is None:
      return None
    packed = [a - len(codes.shape) for a, n in enumerate(codes.shape)
              if codes.array.shape[a] != n]
    return dataclasses.replace(
        self, codes=codes.array, scales=others[0].array,
        offsets=others[1] and others[1].array,
        packed=packed[0] if packed else None)

  def transpose(self, order: Sequence[int]) -> 'Codes':
    view = self.viewed(lambda part: part.transpose(order))
    assert view is not None  # axes can always be exchanged
    return view

  def reshape(self, new: Sequence[int]) -> 'Codes | None':
    return self.viewed(lambda part: part.reshape(self.shape, new))

  def take(self, axis: int, index: jax.Array) -> 'Codes | None':
    return self.viewed(lambda part: part.take(axis, index))


def is_codes(x: Any) -> 'TypeIs[Codes]':
  """Returns whether a leaf is a quantised weight."""
  return isinstance(x, Codes)


def pack(q: Any, axis: int) -> Any:
  """uint8: two neighbours along an axis (counted from the end) in a byte."""
  axis += q.ndim
  pairs = (q & 15).astype(np.uint8).reshape(
      *q.shape[:axis], q.shape[axis] // 2, 2, *q.shape[axis + 1:])
  shifts = np.array([1, 16], np.uint8).reshape(
      (2,) + (1,) * (q.ndim - axis - 1))
  return (pairs * shifts).sum(axis + 1, dtype=np.uint8)  # one pass over q


@dataclasses.dataclass(frozen=True)
class GroupedArray:
  """An array with one entry for each group of consecutive elements of a block.

  It has the methods of `Draws` that make views.

  Attributes:
    array: The entries. Along each axis it has as many as there are groups.
    shape: Shape of the block.
    whole: Whether a group must not be divided by a view.
  """

  array: jax.Array
  shape: tuple[int, ...]
  whole: bool = False

  def _run(self, axis) -> int:
    return self.shape[axis] // self.array.shape[axis]

  def _with(self, array, shape) -> 'GroupedArray':
    return GroupedArray(array, tuple(shape), self.whole)

  def take(self, axis: int, index: jax.Array) -> 'GroupedArray | None':
    x, run = self.array, self._run(axis)
    shape = (*self.shape[:axis], *index.shape, *self.shape[axis + 1:])
    if self.whole and run > 1:
      return None
    if x.shape[axis] == 1:
      return self._with(x.reshape(
          x.shape[:axis] + (1,) * index.ndim + x.shape[axis + 1:]), shape)
    return self._with(jnp.take(x, index // run, axis=axis, mode='clip'), shape)

  def window(self, starts: Sequence[Any], sizes: Sequence[int],
             steps: Sequence[int]) -> 'GroupedArray | None':
    x = self.array
    for axis, (start, size, step) in enumerate(zip(starts, sizes, steps)):
      run = self._run(axis)
      all_of_it = isinstance(start, int) and size == self.shape[axis]
      if all_of_it or (x.shape[axis] == 1 and not (self.whole and run > 1)):
        continue
      aligned = (isinstance(start, int) and step == 1
                 and start % run == size % run == 0)
      if aligned:
        x = jax.lax.slice_in_dim(
            x, start // run, (start + size) // run, axis=axis)
      elif self.whole and run > 1:
        return None
      else:
        at = start + step * jnp.arange(size)
        x = jnp.take(x, at // run, axis=axis, mode='clip')
    return self._with(x, sizes)

  def transpose(self, order: Sequence[int]) -> 'GroupedArray':
    return self._with(self.array.transpose(order),
                      [self.shape[a] for a in order])

  def reshape(self, old: Sequence[int], new: Sequence[int]
              ) -> 'GroupedArray | None':
    sizes = []
    for was, will in axis_groups(old, new):
      there = [self.array.shape[a] for a in was]
      have, want = [old[a] for a in was], [new[a] for a in will]
      run = have[-1] // there[-1] if have else 1
      if have == there:
        sizes += want
      elif all(n == 1 for n in there) and not self.whole:
        sizes += [1] * len(want)
      elif there[:-1] == have[:-1] and want[-1] % run == 0:
        sizes += [*want[:-1], want[-1] // run]  # runs stay beside each other
      else:
        return None
    return self._with(self.array.reshape(sizes), new)

  def where(self, there: jax.Array) -> 'GroupedArray':
    """Not a number elsewhere, as what a lookup finds beyond the last row."""
    if self.whole:
      return self
    return self._with(
        jnp.where(there, self.array, jnp.nan).astype(self.array.dtype),
        self.shape)


# --- to codes and back ------------------------------------------------------


def quantized(w: np.ndarray, bits: int, axis: int
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
  """(q, scales, offsets) of a block on the host: float16 for each `GROUP`
  along an axis, or for all of it where that does not divide it. Of 8 bits
  symmetric, of 4 from the least to the greatest."""
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
  """Returns a weight as `Codes`, with a scale for each 32 along an axis.

  Args:
    w: An array of floats, of one axis or more.
    bits: 8 or 4.
    axis: The axis that products with it sum over: of a kernel [inputs, outputs]
      the first of these two, of an embedding the last.

  Raises:
    ValueError: for something else than floats, an axis that w has not, other
      ``bits``, or 4 along an axis of odd length.
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
  """Codes of integers q and what they are scaled by."""
  if bits == 8:
    return Codes(q.astype(jnp.int8), scales, offsets, 8, None, dtype)
  return Codes(pack(q, axis), scales, offsets, 4, axis, dtype)


def dequantize(params: Any, dtype: jax.typing.DTypeLike | None = None) -> Any:
  """Returns params with floats in the place of `Codes`.

  Args:
    params: A tree of arrays and `Codes`.
    dtype: A floating-point dtype of these floats; None for each weight's own.
  """
  arguments.tree('params', params)
  arguments.floating('dtype', dtype)
  return jax.tree.map(
      lambda x: x.astype(dtype or x.dtype) if is_codes(x) else x, params,
      is_leaf=is_codes)


def axis_groups(old: Sequence[int], new: Sequence[int]
                ) -> list[tuple[list[int], list[int]]]:
  """Returns which axes hold the same elements before and after a reshape.

  Returns:
    Pairs of lists of neighbouring axes, old and new, each as short as can be.
  """
  groups, a, b = [], 0, 0
  while a < len(old) or b < len(new):
    was, will = [], []
    size_was = size_will = 1
    if a < len(old):
      was, size_was, a = [a], old[a], a + 1
    if b < len(new) and (size_was > 1 or not was):
      will, size_will, b = [b], new[b], b + 1
    while size_was != size_will:
      if size_was < size_will:
        was, size_was, a = [*was, a], size_was * old[a], a + 1
      else:
        will, size_will, b = [*will, b], size_will * new[b], b + 1
    groups.append((was, will))
  return groups
