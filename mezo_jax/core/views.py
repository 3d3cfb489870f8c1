"""Describes views of a weight: a lookup, slice, transpose or reshape.

Several arrays belong to a weight: the scales if it is quantised, the keys of
its layers, the counters of its random draws. Such an array has one entry for
each *group* of consecutive elements of the weight. Its first axes correspond to
those of the weight. The length of an axis is the number of groups along it,
which divides the length of the weight's axis. It is 1 if all elements share an
entry. More axes may follow.

The same view must be applied to all of these arrays, so it is represented by a
small object with three methods:

- ``view.shape(shape)`` returns the shape of the view of a weight.
- ``view.array(x, shape)`` applies the view to an array ``x`` that belongs to a
  weight of this shape (or is the weight).
- ``view.cuts(shape, entries)`` returns whether the view would separate elements
  of a group. ``entries`` is the number of groups along each axis.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

# Also used for other sequences of one integer for each axis.
Shape = Sequence[int]


class Take(NamedTuple):
  """Looks up entries along an axis. The axes of the index replace that axis.

  Attributes:
    axis: An axis of the weight.
    index: Integers of any shape, at least 0 and below the axis's length.
  """

  axis: int
  index: jax.Array

  def shape(self, old: Shape) -> tuple[int, ...]:
    """Returns the shape of the view of a weight of shape ``old``."""
    return (*old[:self.axis], *self.index.shape, *old[self.axis + 1:])

  def cuts(self, shape: Shape, entries: Shape) -> bool:
    """Returns whether a group along the axis has more than one element."""
    return entries[self.axis] != shape[self.axis]

  def array(self, x: jax.Array, shape: Shape) -> jax.Array:
    """Returns the view of an array that belongs to a weight of this shape."""
    axis, index = self.axis, self.index
    # If all elements of the axis share one entry, so do all that are looked up.
    if x.shape[axis] == 1 < shape[axis]:
      ones = (1,) * index.ndim
      return x.reshape(*x.shape[:axis], *ones, *x.shape[axis + 1:])
    run = shape[axis] // x.shape[axis]
    if run > 1:
      index = index // run
    if not index.ndim:
      return lax.dynamic_index_in_dim(x, index, axis, keepdims=False)
    return jnp.take(x, index, axis=axis, mode='clip')


class Window(NamedTuple):
  """Selects ``x[start:start + size * step:step]`` along each axis.

  Attributes:
    starts: Integers or arrays, one for each axis.
    sizes: Length of the result along each axis.
    steps: Stride along each axis.
  """

  starts: Sequence[Any]
  sizes: Shape
  steps: Shape

  def shape(self, old: Shape) -> tuple[int, ...]:
    """Returns the shape of the view."""
    del old
    return tuple(self.sizes)

  def cuts(self, shape: Shape, entries: Shape) -> bool:
    """Returns whether the window begins or ends within a group."""
    for axis, (n, m) in enumerate(zip(shape, entries)):
      whole = m == n or self._is_whole(axis, n)
      if not whole and not self._is_aligned(axis, n // m):
        return True
    return False

  def array(self, x: jax.Array, shape: Shape) -> jax.Array:
    """Returns the view of an array that belongs to a weight of this shape.

    Along an axis where the window contains only a part of some group, the
    result has one entry for each element.
    """
    for axis, n in enumerate(shape):
      if x.shape[axis] == 1 or self._is_whole(axis, n):
        continue
      start, size = self.starts[axis], self.sizes[axis]
      run = n // x.shape[axis]
      if self._is_aligned(axis, run):
        x = lax.slice_in_dim(x, start // run, (start + size) // run, axis=axis)
        continue
      index = start + self.steps[axis] * jnp.arange(size)
      if run > 1:
        index = index // run
      x = jnp.take(x, index, axis=axis, mode='clip')
    return x

  def starts_at_zero(self, axis: int) -> bool:
    """Returns whether the window is known to start at index 0 of an axis."""
    start = self.starts[axis]
    return isinstance(start, int) and start == 0

  def _is_whole(self, axis: int, n: int) -> bool:
    """Returns whether the window is known to be a whole axis of length n."""
    return self.starts_at_zero(axis) and (
        self.sizes[axis] == n and self.steps[axis] == 1)

  def _is_aligned(self, axis: int, run: int) -> bool:
    """Returns whether the window is known to consist of whole groups."""
    start, size = self.starts[axis], self.sizes[axis]
    return isinstance(start, int) and self.steps[axis] == 1 and (
        start % run == size % run == 0)


class Transpose(NamedTuple):
  """Moves axis ``order[a]`` to position a.

  Attributes:
    order: A permutation of the axes of the weight.
  """

  order: Shape

  def shape(self, old: Shape) -> tuple[int, ...]:
    """Returns the shape of the view of a weight of shape ``old``."""
    return tuple(old[a] for a in self.order)

  def cuts(self, shape: Shape, entries: Shape) -> bool:
    """Returns False: a transpose keeps groups together."""
    del shape, entries
    return False

  def array(self, x: jax.Array, shape: Shape) -> jax.Array:
    """Returns the view of an array that belongs to a weight of this shape."""
    return x.transpose(*self.order, *range(len(shape), x.ndim))


class Reshape(NamedTuple):
  """Reshapes a weight in row-major order.

  Attributes:
    new: The new shape.
  """

  new: Shape

  def shape(self, old: Shape) -> tuple[int, ...]:
    """Returns the shape of the view."""
    del old
    return tuple(self.new)

  def cuts(self, shape: Shape, entries: Shape) -> bool:
    """Returns whether a group would no longer be consecutive on one axis."""
    return any(self._entries(shape, entries, was, will) is None
               for was, will in axis_groups(shape, self.new))

  def array(self, x: jax.Array, shape: Shape) -> jax.Array:
    """Returns the view of an array that belongs to a weight of this shape.

    Along axes where the reshape breaks up groups, the result has one entry for
    each element.
    """
    rest, sizes = x.shape[len(shape):], []
    for was, will in axis_groups(shape, self.new):
      found = self._entries(shape, x.shape, was, will)
      if found is None:  # expand these axes to one entry for each element
        full = [shape[a] if a in was else n for a, n in enumerate(x.shape)]
        x = jnp.broadcast_to(each(x, full), full)
        found = [self.new[b] for b in will]
      sizes += found
    return x.reshape(*sizes, *rest)

  def _entries(self, shape, entries, was, will) -> list[int] | None:
    """Returns how many entries an array has along the axes after a reshape.

    Args:
      shape: Shape of the weight.
      entries: Number of entries of the array along each axis of the weight.
      was: Neighbouring axes of the weight; see `axis_groups`.
      will: The new axes into which the axes ``was`` are reshaped.

    Returns:
      The number of entries along each axis of ``will``, or None if the reshape
      would break up groups.
    """
    have, there = [shape[a] for a in was], [entries[a] for a in was]
    want = [self.new[b] for b in will]
    if have != there and max(there) == 1:
      return [1] * len(want)
    if have[:-1] != there[:-1]:
      return None
    # Groups along the last old axis stay consecutive if they fit into the last
    # new axis and all other axes have an entry for each element.
    if have != there:
      run = have[-1] // there[-1]
      if want[-1] % run:
        return None
      want[-1] //= run
    return want


class Keep(NamedTuple):
  """Marks the elements that a lookup found within bounds.

  This view does not change arrays. The code that applies it decides which value
  an element out of bounds gets, such as NaN.

  Attributes:
    there: Bools that broadcast with the weight; False for out of bounds.
  """

  there: jax.Array

  def shape(self, old: Shape) -> tuple[int, ...]:
    """Returns the same shape."""
    return tuple(old)

  def cuts(self, shape: Shape, entries: Shape) -> bool:
    """Returns False: elements are neither moved nor removed."""
    del shape, entries
    return False

  def array(self, x: jax.Array, shape: Shape) -> jax.Array:
    """Returns the array as it is."""
    del shape
    return x


View = Take | Window | Transpose | Reshape | Keep


def each(x: jax.Array, shape: Shape) -> jax.Array:
  """Repeats the entry of each group, so that there is one for each element.

  Axes of length 1 are not expanded, since they broadcast.

  Args:
    x: An array that belongs to a weight, with one entry per group.
    shape: Shape of the weight.
  """
  for axis, n in enumerate(shape):
    m = x.shape[axis]
    if 1 < m < n:
      before, after = x.shape[:axis + 1], x.shape[axis + 1:]
      x = jnp.broadcast_to(
          jnp.expand_dims(x, axis + 1), (*before, n // m, *after))
      x = x.reshape(*before[:-1], n, *after)
  return x


def axis_groups(old: Shape, new: Shape
                ) -> list[tuple[list[int], list[int]]]:
  """Finds which axes a reshape turns into which other axes.

  Args:
    old: The shape before the reshape.
    new: The shape after it.

  Returns:
    Pairs (old axes, new axes). Both are lists of neighbouring axes, with the
    same number of elements in total. The lists are as short as possible.
  """
  groups, a, b = [], 0, 0
  while a < len(old) or b < len(new):
    was, will = [], []
    size_was = size_will = 1
    # An old axis of length 1 forms a pair without a new axis. Otherwise axes
    # are added to the side with fewer elements until the sides are equal.
    while not was + will or size_was != size_will:
      if a < len(old) and (size_was < size_will or not was + will):
        was.append(a)
        size_was *= old[a]
        a += 1
      else:
        will.append(b)
        size_will *= new[b]
        b += 1
    groups.append((was, will))
  return groups
