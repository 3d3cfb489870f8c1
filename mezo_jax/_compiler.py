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


def rounded(x: jax.Array, number: jax.Array) -> jax.Array:
  """A product, rounded before something is added to it: compilers make one
  operation of both where they like, another one in each loop of a program, and
  the sum has other bits by that.

  Args:
    x: float32; any other is returned as it is.
    number: int32, never below 0, which no compiler knows.
  """
  if x.dtype != jnp.float32:
    return x
  none = (number >> 31).astype(jnp.uint32)
  return lax.bitcast_convert_type(
      lax.bitcast_convert_type(x, jnp.uint32) ^ none, jnp.float32)


def made_first(fn, *args):
  """``fn(*args)``, in memory before it is used: not again for each use."""
  return lax.platform_dependent(
      *args, cpu=apart(fn),
      default=lambda *args: lax.optimization_barrier(fn(*args)))
