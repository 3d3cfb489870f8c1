"""Controls where and when XLA computes a value, to save memory and time."""

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

  XLA:CPU schedules a computation as early as it can. Large intermediate values
  may therefore be stored long before they are used. XLA does not move
  computations out of a function that is not inlined.

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

  Outside of `jax.jit`, and on other platforms, ``fn`` is called as usual.
  """
  if not _is_traced(args):
    return fn(*args)
  return lax.platform_dependent(*args, cpu=apart(fn), default=fn)


def entries(x: jax.Array, indices: Sequence[int]) -> list[jax.Array]:
  """Returns the entries ``x[i]`` of the first axis, with one kernel for all.

  XLA:CPU takes 10 ms to compile each distinct kernel, however small it is. It
  compiles equal kernels only once. If XLA fuses a static slice with its use,
  the kernels of two entries differ in the index. In a model of many layers, the
  random draws of every weight would be such kernels.

  This function puts the slice into a function that is not inlined and takes the
  index as an argument. A barrier keeps XLA from propagating the constant index
  into that function. All entries therefore share one kernel.

  Args:
    x: An array.
    indices: Python integers, the entries to return.
  """
  sliced = lambda x: [x[i] for i in indices]
  if not _is_traced(x):
    return sliced(x)
  barrier = lax.optimization_barrier
  return lax.platform_dependent(
      x, cpu=lambda x: [_entry(x, barrier(np.int32(i))) for i in indices],
      default=sliced)


@apart
def _entry(x, i):
  """Returns ``x[i]`` for an index that is known only at run time."""
  start = [i] + [np.int32(0)] * (x.ndim - 1)
  out = lax.dynamic_slice(
      x, start, (1, *x.shape[1:]), allow_negative_indices=False)
  return out.reshape(x.shape[1:])


def _is_traced(tree) -> bool:
  """Returns whether a leaf of the tree is a tracer."""
  return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def rounded(x: jax.Array, number: jax.Array | None = None) -> jax.Array:
  """Forces the compiler to round a product before it is added to something.

  Compilers fuse a product and a sum into one operation (FMA) in some loops and
  not in others. Without this function, sums could differ in the last bit
  between programs and meshes. The function reinterprets the product as
  integers, applies an exclusive or with a zero that the compiler cannot prove
  to be zero, and converts it back. Compilers do not fuse through integers. A
  `select` would not work, since the compiler would move it out of the loop.

  Args:
    x: The product, a float32 or float64 array. Arrays of other dtypes are
      returned as they are, since half precision is rounded when it is stored.
    number: An int32 scalar that is at least 0 at run time. Its sign bit serves
      as the zero. Defaults to None, which tests each element for NaN and uses
      the result as the zero. (If an element is NaN, this changes its lowest
      bit, so that it is still NaN.)

  Returns:
    The product, unchanged.
  """
  if x.dtype not in (jnp.float32, jnp.float64):
    return x
  words = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
  zero = x != x if number is None else number >> 31
  bits = lax.bitcast_convert_type(x, words) ^ zero.astype(words)
  return lax.bitcast_convert_type(bits, x.dtype)


def made_first(fn: Callable[..., Any], *args: Any) -> Any:
  """Returns ``fn(*args)``, which XLA computes once and stores.

  Without this function, XLA may fuse the computation into each use of its
  result and so repeat it.
  """
  return lax.platform_dependent(
      *args, cpu=apart(fn), default=lambda *args: _barrier(fn(*args)))


def _barrier(tree):
  """Passes a tree through optimization barriers, without changing its types.

  Values that vary over the same manual axes of `jax.shard_map` share a barrier.
  After a single barrier for all, each value would count as varying over the
  axes of every value, which would change its type.
  """
  leaves, structure = jax.tree.flatten(tree)
  kinds = [jax_versions.manual_axis_type(x) for x in leaves]
  behind = {kind: iter(lax.optimization_barrier(
      [x for x, k in zip(leaves, kinds) if k == kind]))
            for kind in dict.fromkeys(kinds)}
  return jax.tree.unflatten(structure, [next(behind[kind]) for kind in kinds])
