"""Where and when XLA makes a value: what a program alone does not tell it."""

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
import jax.numpy as jnp


def apart(fn):
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


def made_first(fn, *args):
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
    alike.setdefault(jax.typeof(x).mat, []).append(i)
  for members in alike.values():
    behind = lax.optimization_barrier([leaves[i] for i in members])
    for i, x in zip(members, behind):
      leaves[i] = x
  return jax.tree.unflatten(structure, leaves)
