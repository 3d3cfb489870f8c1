"""Workarounds that control where and when XLA computes a value."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.experimental.xla_metadata import set_xla_metadata
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import jax_versions


def apart(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Returns ``fn`` as a function that XLA:CPU does not inline.

  XLA:CPU computes values as soon as it can, but does not move them out of such
  a function.
  """
  def alone(*args):
    with set_xla_metadata(inlineable=None):  # what it calls may be
      return fn(*args)
  jitted = jax.jit(alone)
  def called(*args):
    with set_xla_metadata(inlineable='false'):
      return jitted(*args)
  return called


def apart_on_cpu(fn: Callable[..., Any], *args: Any) -> Any:
  """Returns ``fn(*args)``; XLA:CPU does not inline the function."""
  if not _is_traced(args):
    return fn(*args)
  return lax.platform_dependent(*args, cpu=apart(fn), default=fn)


def entries(x: jax.Array, indices: Sequence[int]) -> list[jax.Array]:
  """Returns the entries ``x[i]`` of the first axis.

  XLA:CPU takes 10 ms to compile each distinct kernel, however small it is;
  equal kernels are compiled once. A static slice is fused with its use, and
  then the uses of all entries differ in an index, for example the draws of each
  weight in a model of many layers. A function that is not inlined gets its
  index from outside, behind a barrier that keeps it from being propagated into
  the function, so all entries share a kernel.

  Args:
    x: An array.
    indices: Python integers.
  """
  if not _is_traced(x):
    return [x[i] for i in indices]
  return lax.platform_dependent(
      x, cpu=lambda x: [
          _entry(x, lax.optimization_barrier(np.int32(i))) for i in indices],
      default=lambda x: [x[i] for i in indices])


@apart
def _entry(x, i):
  out = lax.dynamic_slice(x, [i, *[np.int32(0)] * (x.ndim - 1)],
                          (1, *x.shape[1:]), allow_negative_indices=False)
  return out.reshape(x.shape[1:])


def _is_traced(tree) -> bool:
  return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def rounded(x: jax.Array, number: jax.Array | None = None) -> jax.Array:
  """Returns ``x``, a product, rounded before something is added to it.

  Compilers fuse a product and a sum into one operation (FMA) in some loops and
  not in others, so sums would differ in a bit between programs and meshes. They
  do not fuse through integers. A `select` would be moved out of the loop.

  Args:
    x: A float32 or float64 array. Arrays of other dtypes are returned as they
      are, since storing half precision rounds it.
    number: int32 [], 0 or more, whose sign the compiler cannot know to be 0.
      Defaults to None: then the 0 is whether an element is NaN. (The lowest bit
      of a NaN changes; it stays NaN.)
  """
  if x.dtype not in (jnp.float32, jnp.float64):
    return x
  words = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
  zero = (x != x if number is None else number >> 31).astype(words)
  return lax.bitcast_convert_type(
      lax.bitcast_convert_type(x, words) ^ zero, x.dtype)


def made_first(fn: Callable[..., Any], *args: Any) -> Any:
  """Returns ``fn(*args)``, stored before it is used instead of recomputed for
  each use."""
  return lax.platform_dependent(
      *args, cpu=apart(fn), default=lambda *args: _barrier(fn(*args)))


def _barrier(tree):
  """Returns the same values behind barriers, with the same types.

  Values that vary over the same manual axes of `jax.shard_map` share a barrier;
  behind one barrier, all would vary over the axes of any of them.
  """
  leaves, structure = jax.tree.flatten(tree)
  alike = {}
  for i, x in enumerate(leaves):
    alike.setdefault(jax_versions.manual_axis_type(x), []).append(i)
  for members in alike.values():
    behind = lax.optimization_barrier([leaves[i] for i in members])
    for i, x in zip(members, behind):
      leaves[i] = x
  return jax.tree.unflatten(structure, leaves)
