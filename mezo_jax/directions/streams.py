"""Computes the streams of parameter leaves and of their views.

A `Stream` assigns a counter to each element of a block, from which the element
of z is drawn. To compute the stream of a view (a lookup, a slice, a transpose
or a reshape), nothing is drawn. Only the counters of the selected elements are
computed.
"""

from collections.abc import Sequence
import contextlib
import contextvars
import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import paths, views, xla
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


def of_leaves(keys: jax.Array, leaves: dict[str, tuple[tuple[int, ...], bool]]
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
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
  found = {path: paths.locate(path, stacked)
           for path, (_, stacked) in leaves.items()}
  hashes = {path: np.uint32(zlib.crc32(name.encode()))
            for path, (name, _, _) in found.items()}
  # Keys depend on the hash of a path without its layer number, so leaves of
  # several layers may share a hash. Each distinct hash is folded into the keys
  # only once. ``rank`` numbers the distinct hashes.
  rank = {h: i for i, h in enumerate(dict.fromkeys(hashes.values()))}
  own = fold(keys, jnp.asarray([*rank], jnp.uint32))  # [names, n]
  by_name = {path: rank[h] for path, h in hashes.items()}
  numbered = [p for p, (_, layer, _) in found.items() if layer is not None]
  of_layer = None
  if numbered:
    layers = jnp.asarray([found[p][1] for p in numbered], jnp.uint32)
    parents = own[np.array([by_name[p] for p in numbered])]
    of_layer = jax.random.key_data(jax.vmap(
        jax.vmap(jax.random.fold_in, (0, None)))(parents, layers))
  # Each table holds the keys of several leaves, [entries, n, 2], or [entries,
  # layers, n, 2] for stacks. The table 'numbered' is for leaves with a layer
  # number in their path. A table whose name is an integer is for stacks with
  # that many layers. The table 'own' is for all other leaves.
  tables: dict[str | int, jax.Array] = {'own': jax.random.key_data(own)}
  if of_layer is not None:
    tables['numbered'] = of_layer
  rows: dict[str, tuple[str | int, int]] = {
      path: ('numbered', i) for i, path in enumerate(numbered)}
  for path, (shape, stacked) in leaves.items():
    if path in rows:
      continue
    rows[path] = shape[0] if stacked else 'own', by_name[path]
    # All stacks of the same depth share a table of keys.
    if stacked and shape[0] not in tables:
      layers = jnp.arange(shape[0], dtype=jnp.uint32) + _first.get()
      tables[shape[0]] = jax.random.key_data(
          jax.vmap(lambda k, layers=layers: fold(k, layers))(own))
  # Take the entry of each leaf from its table.
  out = {}
  for name, table in tables.items():
    mine = [path for path in leaves if rows[path][0] == name]
    words = xla.entries(table, [rows[path][1] for path in mine])
    out.update((path, _whole(x, leaves[path][0]))
               for path, x in zip(mine, words))
  return {path: out[path] for path in leaves}


def of_leaf(keys: jax.Array, path: str, shape: tuple[int, ...]) -> Stream:
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


def _whole(words: jax.Array, shape: tuple[int, ...]) -> Stream:
  """Returns the stream of a whole leaf.

  Args:
    words: Raw data of the leaf's keys, [n, 2], or [layers, n, 2] for a stack.
    shape: Shape of the leaf.
  """
  # Insert an axis of length 1 for each axis of the leaf that is not a layer.
  inner, first = len(shape), words.ndim - 2
  words = words.reshape(words.shape[:first] + (1,) * (inner - first)
                        + words.shape[first:])
  strides = [0] * first + [
      math.prod(shape[a + 1:]) if shape[a] > 1 else 0
      for a in range(first, inner)]
  zero = jnp.zeros(words.shape[:-2], jnp.uint32)
  wide = math.prod(shape[first:]) > 2**32
  s = Stream(words, zero, tuple(strides), zero if wide else None)
  # Strides, and the indices by which they are multiplied, must fit in 32 bits.
  # Replace the strides of leading axes by a first counter for each entry, until
  # the remaining axes have at most 2**32 elements.
  axis = first
  while math.prod(shape[axis:]) > 2**32:
    s, axis = spread(s, axis, shape[axis]), axis + 1
  return s


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


def viewed(s: Stream, view: views.View, shape: Sequence[int]) -> Stream | None:
  """Returns the stream of a view of a block.

  Args:
    s: Stream of the block.
    view: The view.
    shape: Shape of the block.

  Returns:
    The stream of the view, or None if the counters of the view are not an
    affine function of the index. This is only possible for a reshape.
  """
  strides: list[int] | None = [*s.strides]
  if isinstance(view, views.Reshape):
    strides = _reshaped_strides(s, shape, view.new)
  elif isinstance(view, views.Transpose):
    strides = [s.strides[a] for a in view.order]
  elif isinstance(view, views.Window):
    strides = [x * step for x, step in zip(s.strides, view.steps)]
  elif isinstance(view, views.Take):
    strides[view.axis:view.axis + 1] = [0] * view.index.ndim
  if strides is None:
    return None
  new = view.shape(shape)
  out = jax.tree.map(lambda x: views.each(view.array(x, shape), new), s)
  out = dataclasses.replace(out, strides=tuple(strides))
  if isinstance(view, views.Take) and s.strides[view.axis]:
    after = len(s.strides) - view.axis - 1
    index = view.index.reshape(view.index.shape + (1,) * after)
    return _moved(out, index, s.strides[view.axis])
  if isinstance(view, views.Window):
    for start, stride in zip(view.starts, s.strides):
      if stride and not (isinstance(start, int) and start == 0):
        out = _moved(out, jnp.asarray(start), stride)
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
  index = jnp.arange(size, dtype=jnp.uint32)
  index = index.reshape((-1,) + (1,) * (len(s.strides) - axis - 1))
  step = s.strides[axis]
  s = dataclasses.replace(s, strides=tuple(
      0 if a == axis else x for a, x in enumerate(s.strides)))
  return _moved(s, index, step)


def _reshaped_strides(s: Stream, old: Sequence[int], new: Sequence[int]
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
  strides = []
  for was, will in views.axis_groups(old, new):
    step = [s.strides[a] for a in was]
    if not spread_axes & set(was):
      # The axes can be merged only if their elements are evenly spaced.
      if any(x != y * old[b] for x, y, b in zip(step, step[1:], was[1:])):
        return None
      last = step[-1] if step else 0
      strides += [last * math.prod(new[b + 1:will[-1] + 1])
                  if new[b] > 1 else 0 for b in will]
    elif any(step):
      # Counters along these axes depend both on arrays and on strides. That can
      # be represented only for an axis that the reshape leaves as it is.
      if len(was) > 1 or len(will) > 1:
        return None
      strides += step
    else:  # counters depend on arrays only, which are reshaped, too
      strides += [0] * len(will)
  return strides
