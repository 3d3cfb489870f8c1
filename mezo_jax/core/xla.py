"""Works around the compiler: controls where and when XLA computes a value."""

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

  XLA:CPU schedules a computation as early as it can, so large intermediate
  values may be stored long before they are used. It does not move computations
  out of a function that is not inlined.

  Args:
    fn: A function that JAX can trace. Functions that it calls may be inlined
      into it.
  """
  def alone(*args):
    """Calls ``fn``, inside of the function that is not inlined."""
    with set_xla_metadata(inlineable=None):  # callees of `fn` may be inlined
      return fn(*args)
  jitted = jax.jit(alone)
  def called(*args):
    """Calls the compiled function with the mark that forbids inlining."""
    with set_xla_metadata(inlineable='false'):
      return jitted(*args)
  return called


def apart_on_cpu(fn: Callable[..., Any], *args: Any) -> Any:
  """Returns ``fn(*args)``, computed in a function that XLA:CPU does not inline.

  Outside of `jax.jit` and on other platforms, it just calls ``fn``.
  """
  if not _is_traced(args):
    return fn(*args)
  return lax.platform_dependent(*args, cpu=apart(fn), default=fn)


def entries(x: jax.Array, indices: Sequence[int]) -> list[jax.Array]:
  """Returns the entries ``x[i]`` of the first axis, with one kernel for all.

  XLA:CPU takes 10 ms to compile each distinct kernel, however small it is, and
  compiles equal kernels once. It fuses a static slice with its use, so the
  kernels of two entries differ in an index. In a model of many layers that
  applies to the random draws of each weight. Here the slice is in a function
  that is not inlined and takes the index as an argument. A barrier keeps XLA
  from propagating the constant index into the function. So all entries share
  one kernel.

  Args:
    x: An array.
    indices: Python integers, the entries to return.
  """
  if not _is_traced(x):
    return [x[i] for i in indices]
  return lax.platform_dependent(
      x, cpu=lambda x: [
          _entry(x, lax.optimization_barrier(np.int32(i))) for i in indices],
      default=lambda x: [x[i] for i in indices])


@apart
def _entry(x, i):
  """Returns ``x[i]`` for an index that is known only at run time."""
  out = lax.dynamic_slice(x, [i, *[np.int32(0)] * (x.ndim - 1)],
                          (1, *x.shape[1:]), allow_negative_indices=False)
  return out.reshape(x.shape[1:])


def _is_traced(tree) -> bool:
  """Returns whether a leaf of the tree is a tracer."""
  return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def rounded(x: jax.Array, number: jax.Array | None = None) -> jax.Array:
  """Returns a product that is rounded before something is added to it.

  Compilers fuse a product and a sum into one operation (FMA) in some loops and
  not in others, so sums could differ in the last bit between programs and
  meshes. This function casts the product to integers, applies an exclusive or
  with a zero that the compiler cannot prove to be zero, and casts it back:
  compilers do not fuse through integers. A `select` would not do, since it
  would be moved out of the loop.

  Args:
    x: A float32 or float64 array. Arrays of other dtypes are returned as they
      are, since storing half precision rounds it.
    number: int32 [], at least 0 at run time. Its sign bit is the zero. Defaults
      to None: then the zero is the result of testing each element for NaN. (For
      a NaN that changes the lowest bit; it stays NaN.)
  """
  if x.dtype not in (jnp.float32, jnp.float64):
    return x
  words = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
  zero = (x != x if number is None else number >> 31).astype(words)
  return lax.bitcast_convert_type(
      lax.bitcast_convert_type(x, words) ^ zero, x.dtype)


def made_first(fn: Callable[..., Any], *args: Any) -> Any:
  """Returns ``fn(*args)``, computed once and stored instead of once per use.

  Otherwise XLA may fuse the computation into each of its uses.
  """
  return lax.platform_dependent(
      *args, cpu=apart(fn), default=lambda *args: _barrier(fn(*args)))


def _barrier(tree):
  """Returns the tree behind optimization barriers, with its types unchanged.

  Values that vary over the same manual axes of `jax.shard_map` share a barrier.
  With a single barrier, each value would vary over the axes of all of them.
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
