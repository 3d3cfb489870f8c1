"""Computes the streams of parameter leaves and of their views.

A `Stream` assigns a counter to each element of a block, from which the element
of z is drawn. To compute the stream of a view (a lookup, a slice, a transpose
or a reshape), nothing is drawn. Only the counters of the selected elements are
computed.
"""

from collections.abc import Mapping
import contextlib
import contextvars
import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import paths, views, xla
from mezo_jax.core.views import Shape
from mezo_jax.directions.noise import Stream

_U32 = jnp.uint32
# Number of the first layer of every stack; see `stacks_begin_at`.
_first: contextvars.ContextVar[np.uint32 | jax.Array] = contextvars.ContextVar(
    '_first', default=np.uint32(0))


@contextlib.contextmanager
def stacks_begin_at(layer: int | jax.Array):
  """Declares that the first entry of every stack is layer number ``layer``.

  Within this context, the first entry of a stack has the z of that layer
  instead of the z of layer 0. This is used to update weights in the host's
  memory layer by layer.

  Args:
    layer: Number of the layer.
  """
  token = _first.set(jnp.asarray(layer).astype(jnp.uint32))
  try:
    yield
  finally:
    _first.reset(token)


def of_leaves(keys: jax.Array, leaves: Mapping[str, tuple[Shape, bool]]
              ) -> dict[str, Stream]:
  """Returns the streams of whole leaves.

  The keys of all leaves are derived together, in a few batched operations. This
  keeps programs short, however many leaves there are.

  Args:
    keys: Typed keys [n], one for each direction.
    leaves: For each path, the shape of the leaf and whether the leaf is a stack
      of layers.

  Returns:
    The stream of each path. A stacked leaf has one key per layer and direction.
    If a leaf or a layer has more than 2**32 elements, ``lo`` and ``hi`` hold a
    first counter for each entry of its leading axes.
  """
  # Keys depend on the hash of a path without its layer number, so leaves of
  # several layers may share a hash. Each distinct hash is folded into the keys
  # only once. ``rows`` numbers the distinct hashes.
  rows: dict[int, int] = {}
  # Leaves with keys of one kind share a table of keys, [entries, n], or
  # [entries, layers, n] for stacks. The kind 'numbered' is for leaves with a
  # layer number in their path. An integer is for stacks with that many layers.
  # The kind 'own' is for all other leaves.
  kinds: dict[str | int, list[str]] = {}
  row_of, layer_of = {}, {}
  for path, (shape, stacked) in leaves.items():
    name, layer_of[path], _ = paths.locate(path, stacked)
    row_of[path] = rows.setdefault(zlib.crc32(name.encode()), len(rows))
    kind = shape[0] if stacked else 'own'
    if layer_of[path] is not None:
      kind = 'numbered'
    kinds.setdefault(kind, []).append(path)

  fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
  own = fold(keys, jnp.asarray([*rows], jnp.uint32))
  out = {}
  for kind, members in kinds.items():
    table, entries = own, [row_of[path] for path in members]
    if kind == 'numbered':
      layers = jnp.asarray([layer_of[path] for path in members], jnp.uint32)
      each = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)))
      table, entries = each(own[np.array(entries)], layers), range(len(members))
    elif kind != 'own':
      layers = jnp.arange(kind, dtype=jnp.uint32) + _first.get()
      table = jax.vmap(fold, (0, None))(own, layers)
    words = xla.entries(jax.random.key_data(table), entries)
    for path, x in zip(members, words):
      out[path] = _whole(x, leaves[path][0])
  return out


def of_leaf(keys: jax.Array, path: str, shape: Shape) -> Stream:
  """Returns the stream of one leaf.

  The leaf counts as a stack of layers if its path looks like that of a stack
  (see `paths.locate`), since the shapes of the other leaves are not known here.

  Args:
    keys: Typed keys [n], one for each direction.
    path: Path of the leaf.
    shape: Shape of the leaf.
  """
  stacked = paths.locate(path)[2] and bool(shape)
  return of_leaves(keys, {path: (shape, stacked)})[path]


def _whole(words: jax.Array, shape: Shape) -> Stream:
  """Returns the stream of a whole leaf.

  Args:
    words: Raw data of the leaf's keys, [n, 2], or [layers, n, 2] for a stack.
    shape: Shape of the leaf.
  """
  # Insert an axis of length 1 for each axis of the leaf that is not a layer.
  ndim, first = len(shape), words.ndim - 2
  ones = (1,) * (ndim - first)
  words = words.reshape(*words.shape[:first], *ones, *words.shape[first:])
  zero = jnp.zeros(words.shape[:-2], jnp.uint32)
  wide = math.prod(shape[first:]) > 2**32
  s = Stream(words, zero, strides(shape, first, ndim), zero if wide else None)
  # Strides, and the indices by which they are multiplied, must fit in 32 bits.
  # Replace the strides of leading axes by a first counter for each entry, until
  # the remaining axes have at most 2**32 elements.
  for axis in range(first, ndim):
    if math.prod(shape[axis:]) > 2**32:
      s = spread(s, axis, shape[axis])
  return s


def strides(shape: Shape, first: int, last: int, step: int = 1
            ) -> tuple[int, ...]:
  """Returns row-major strides for some neighbouring axes.

  Args:
    shape: Shape of a block.
    first: The first of the axes.
    last: The axis after the last of them.
    step: Stride of the last of them. Defaults to 1.

  Returns:
    A stride for each axis of the block, which is 0 for all other axes and for
    axes of length 1.
  """
  out = [0] * len(shape)
  for axis in reversed(range(first, last)):
    if shape[axis] > 1:
      out[axis] = step
    step *= shape[axis]
  return tuple(out)


def _moved(s: Stream, index: jax.Array, step: int) -> Stream:
  """Returns the stream with ``index * step`` added to its counters.

  The sum is computed in 64 bits if the counters have upper 32 bits.

  Args:
    s: A stream.
    index: Integers that broadcast with ``s.lo``.
    step: A Python integer.
  """
  index = index.astype(jnp.uint32)
  if s.hi is None:
    return dataclasses.replace(s, lo=s.lo + index * _U32(step))
  hi, low = _mul_wide(index, step)
  lo = s.lo + low
  return dataclasses.replace(
      s, lo=lo, hi=s.hi + hi + (lo < s.lo).astype(jnp.uint32))


def moved(s: Stream, steps: int) -> Stream:
  """Returns the stream with the Python integer ``steps`` added to all counters.

  Only the lower 32 bits are changed, so the sum must fit in them.
  """
  return dataclasses.replace(s, lo=s.lo + _U32(steps)) if steps else s


def _mul_wide(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
  """Returns the upper and lower 32 bits of the 64-bit product of a and b.

  JAX has no 64-bit integers by default, so the factors are multiplied in halves
  of 16 bits.

  Args:
    a: A uint32 array.
    b: A Python integer below 2**64.
  """
  if b >= 2**32:
    hi, lo = _mul_wide(a, b % 2**32)
    return hi + a * _U32(b >> 32), lo
  b0, b1, mask = _U32(b & 0xFFFF), _U32(b >> 16), _U32(0xFFFF)
  a0, a1 = a & mask, a >> 16
  mid = a1 * b0 + ((a0 * b0) >> 16)
  low_mid = (mid & mask) + a0 * b1
  return a1 * b1 + (mid >> 16) + (low_mid >> 16), a * _U32(b)


def viewed(s: Stream, view: views.View, shape: Shape) -> Stream | None:
  """Returns the stream of a view of a block.

  Args:
    s: Stream of the block.
    view: The view.
    shape: Shape of the block.

  Returns:
    The stream of the view, or None if the counters of the view are not an
    affine function of the index. This is only possible for a reshape.
  """
  steps = [*s.strides]
  shifts = []  # pairs of an index, and the stride by which it is multiplied
  if isinstance(view, views.Reshape):
    steps = _reshaped_strides(s, shape, view.new)
    if steps is None:
      return None
  elif isinstance(view, views.Transpose):
    steps = view.shape(steps)
  elif isinstance(view, views.Window):
    for axis, stride in enumerate(s.strides):
      steps[axis] *= view.steps[axis]
      if stride and not view.starts_at_zero(axis):
        shifts.append((jnp.asarray(view.starts[axis]), stride))
  elif isinstance(view, views.Take):
    axis, index = view.axis, view.index
    steps[axis:axis + 1] = [0] * index.ndim
    if s.strides[axis]:
      after = (1,) * (len(shape) - axis - 1)
      shifts = [(index.reshape(index.shape + after), s.strides[axis])]
  new = view.shape(shape)
  out = jax.tree.map(lambda x: views.each(view.array(x, shape), new), s)
  out = dataclasses.replace(out, strides=tuple(steps))
  for index, stride in shifts:
    out = _moved(out, index, stride)
  return out


def spread(s: Stream, axis: int, size: int) -> Stream:
  """Replaces the stride of an axis by an array of first counters.

  The array has one counter for each entry along the axis, and the elements keep
  their counters. `lax.scan` over the axis needs this form, since it scans over
  arrays with one entry for each iteration.

  Args:
    s: A stream.
    axis: An axis of the block.
    size: Length of the block along this axis.
  """
  if s.lo.shape[axis] == size:
    return s
  steps = [*s.strides]
  step, steps[axis] = steps[axis], 0
  index = jnp.arange(size, dtype=jnp.uint32)
  index = index.reshape((-1,) + (1,) * (len(steps) - axis - 1))
  return _moved(dataclasses.replace(s, strides=tuple(steps)), index, step)


def _reshaped_strides(s: Stream, old: Shape, new: Shape
                      ) -> list[int] | None:
  """Returns the strides of a block after a row-major reshape.

  Returns:
    A stride for each new axis, or None if the counters of the reshaped block
    are not an affine function of the index.
  """
  if 0 in old:
    return None
  # Axes along which the keys, first counters or matrices differ.
  arrays = jax.tree.leaves((s.keys, s.lo, s.hi, s.core))
  spread_axes = {a for x in arrays for a in range(len(old)) if x.shape[a] > 1}
  out = []
  for was, will in views.axis_groups(old, new):
    step = [s.strides[a] for a in was]
    if not spread_axes & set(was):
      # The axes can be merged only if their elements are evenly spaced.
      if any(x != y * old[b] for x, y, b in zip(step, step[1:], was[1:])):
        return None
      last = step[-1] if step else 0
      out += strides([new[b] for b in will], 0, len(will), last)
    elif not any(step):  # only arrays, which are reshaped, too
      out += [0] * len(will)
    elif len(was) == len(will) == 1:
      out += step
    else:
      # Counters along these axes depend both on arrays and on strides. That can
      # be represented only for an axis that the reshape leaves as it is.
      return None
  return out
