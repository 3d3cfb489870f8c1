"""Views: a lookup, a slice, a transpose or a reshape, described once.

A weight comes with other arrays: the scales of quantised weights, the keys of
its layers, the counters of its draws. Each has one entry for each *group* of
consecutive elements. Along an axis of the weight, such an array has as many
entries as there are groups: 1 if all elements share one, or a divisor of the
axis's length. It may have more axes after those of the weight.

A view is a small object. ``view.array(x, shape)`` applies it to an array that
belongs to a weight of this shape, and ``view.shape(shape)`` to the shape. One
description serves the weight, its scales and its draws.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp


class Take(NamedTuple):
  """Looks up entries of an axis; the axes of the index take its place.

  Attributes:
    axis: An axis of the weight.
    index: Integers within the axis, of any shape.
  """

  axis: int
  index: jax.Array

  def shape(self, old: Sequence[int]) -> tuple[int, ...]:
    return (*old[:self.axis], *self.index.shape, *old[self.axis + 1:])

  def cuts(self, shape: Sequence[int], entries: Sequence[int]) -> bool:
    """Returns whether groups are divided, given an array's entries."""
    return entries[self.axis] != shape[self.axis]

  def array(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
    axis, index = self.axis, self.index
    if x.shape[axis] == 1 < shape[axis]:
      return x.reshape(
          x.shape[:axis] + (1,) * index.ndim + x.shape[axis + 1:])
    run = shape[axis] // x.shape[axis]
    index = index if run == 1 else index // run
    if not index.ndim:
      return lax.dynamic_index_in_dim(x, index, axis, keepdims=False)
    return jnp.take(x, index, axis=axis, mode='clip')


class Window(NamedTuple):
  """Selects ``x[start:start + size * step:step]`` along each axis.

  Attributes:
    starts: Integers or arrays, one for each axis.
    sizes: Lengths of the result.
    steps: Strides.
  """

  starts: Sequence[Any]
  sizes: Sequence[int]
  steps: Sequence[int]

  def shape(self, old: Sequence[int]) -> tuple[int, ...]:
    del old
    return tuple(self.sizes)

  def cuts(self, shape: Sequence[int], entries: Sequence[int]) -> bool:
    return any(
        m != n and not self._is_whole(axis, n) and not self._is_aligned(
            axis, n // m)
        for axis, (n, m) in enumerate(zip(shape, entries)))

  def array(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
    for axis, n in enumerate(shape):
      m = x.shape[axis]
      if m == 1 or self._is_whole(axis, n):
        continue
      start, size, step = (
          part[axis] for part in (self.starts, self.sizes, self.steps))
      run = n // m
      if self._is_aligned(axis, run):
        x = lax.slice_in_dim(x, start // run, (start + size) // run, axis=axis)
      else:
        at = start + step * jnp.arange(size)
        x = jnp.take(x, at if run == 1 else at // run, axis=axis, mode='clip')
    return x

  def _is_whole(self, axis: int, n: int) -> bool:
    start = self.starts[axis]
    return isinstance(start, int) and start == 0 and (
        self.sizes[axis] == n and self.steps[axis] == 1)

  def _is_aligned(self, axis: int, run: int) -> bool:
    start, size = self.starts[axis], self.sizes[axis]
    return isinstance(start, int) and self.steps[axis] == 1 and (
        start % run == size % run == 0)


class Transpose(NamedTuple):
  """Puts axis ``order[a]`` in the place of axis a."""

  order: Sequence[int]

  def shape(self, old: Sequence[int]) -> tuple[int, ...]:
    return tuple(old[a] for a in self.order)

  def cuts(self, shape: Sequence[int], entries: Sequence[int]) -> bool:
    del shape, entries
    return False

  def array(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
    return x.transpose(*self.order, *range(len(shape), x.ndim))


class Reshape(NamedTuple):
  """Reshapes a weight to ``new``, row by row."""

  new: Sequence[int]

  def shape(self, old: Sequence[int]) -> tuple[int, ...]:
    del old
    return tuple(self.new)

  def cuts(self, shape: Sequence[int], entries: Sequence[int]) -> bool:
    return any(self._entries(shape, entries, was, will) is None
               for was, will in axis_groups(shape, self.new))

  def array(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
    rest, ndim, sizes = x.shape[len(shape):], len(shape), []
    for was, will in axis_groups(shape, self.new):
      found = self._entries(shape, x.shape, was, will)
      if found is None:  # groups are divided: one entry for each element
        full = [shape[a] if a in was else n for a, n in enumerate(x.shape)]
        x = jnp.broadcast_to(each(x, [
            shape[a] if a in was else x.shape[a] for a in range(ndim)]), full)
        found = [self.new[b] for b in will]
      sizes += found
    return x.reshape(*sizes, *rest)

  def _entries(self, shape, entries, was, will) -> list[int] | None:
    """Returns how many entries an array has along the new axes of a group of
    axes, or None if groups of elements would be divided."""
    have, there = [shape[a] for a in was], [entries[a] for a in was]
    want = [self.new[b] for b in will]
    if have == there:
      return want
    if all(n == 1 for n in there):
      return [1] * len(want)
    run = have[-1] // there[-1]
    if there[:-1] == have[:-1] and want[-1] % run == 0:
      return [*want[:-1], want[-1] // run]
    return None


class Keep(NamedTuple):
  """Marks the elements that a lookup found within bounds.

  Attributes:
    there: Bools that broadcast with the weight.
  """

  there: jax.Array

  def shape(self, old: Sequence[int]) -> tuple[int, ...]:
    return tuple(old)

  def cuts(self, shape: Sequence[int], entries: Sequence[int]) -> bool:
    del shape, entries
    return False

  def array(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
    del shape
    return x


View = Take | Window | Transpose | Reshape | Keep


def each(x: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Returns an array with one entry for each element, where it has one for each
  group of them. Axes of length 1 are left as they are."""
  for axis, n in enumerate(shape):
    m = x.shape[axis]
    if 1 < m < n:
      x = jnp.broadcast_to(
          jnp.expand_dims(x, axis + 1),
          (*x.shape[:axis + 1], n // m, *x.shape[axis + 1:]))
      x = x.reshape(*x.shape[:axis], n, *x.shape[axis + 2:])
  return x


def axis_groups(old: Sequence[int], new: Sequence[int]
                ) -> list[tuple[list[int], list[int]]]:
  """Returns which axes hold the same elements before and after a reshape.

  Returns:
    Pairs of lists of neighbouring axes, old and new, each as short as possible.
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
