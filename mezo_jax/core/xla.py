"""Where and when XLA makes a value: what a program alone does not tell it."""

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
  """``fn`` as a function that XLA:CPU does not inline: it builds all that it
  can as soon as it can, but what happens in there it leaves there."""
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

  The time that XLA:CPU takes to compile a program is that of its distinct
  kernels, 10 ms each however small they are; equal ones are compiled once. A
  static slice is fused with its use, and then the uses of all entries differ in
  an index: in a model of many layers, the noise of each weight. A function that
  is not inlined takes its index from outside, behind a barrier that keeps it
  from being propagated into it, so all entries share a kernel.

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
  """``x``, a product, rounded before something is added to it.

  Compilers make one operation of both in some loops and not in others, so that
  sums would differ in a bit between programs and between meshes. What comes of
  integers they do not join; a `select` they move out of the loop.

  Args:
    x: of float32 or float64, any shape; of any other dtype it is returned as it
      is (half precision is rounded by being stored).
    number: int32 [], 0 or more, which no compiler can know: its sign is a 0.
      None where none is at hand: then the 0 says that an element is not NaN
      (the lowest bit of one that is changes; it stays NaN).
  """
  if x.dtype not in (jnp.float32, jnp.float64):
    return x
  words = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
  zero = (x != x if number is None else number >> 31).astype(words)
  return lax.bitcast_convert_type(
      lax.bitcast_convert_type(x, words) ^ zero, x.dtype)


def made_first(fn: Callable[..., Any], *args: Any) -> Any:
  """Returns ``fn(*args)``, in memory before it is used: not again for each use.
  """
  return lax.platform_dependent(
      *args, cpu=apart(fn), default=lambda *args: _barrier(fn(*args)))


def _barrier(tree):
  """Returns the same values behind a barrier, with the same types.

  One barrier would have all values vary over the manual axes that any of them
  varies over; in `jax.shard_map` those that vary alike have one.
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
