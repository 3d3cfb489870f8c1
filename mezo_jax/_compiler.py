"""Where and when XLA makes a value: what a program alone does not tell it."""

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


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


def made_first(fn, *args):
  """``fn(*args)``, in memory before it is used: not again for each use."""
  return lax.platform_dependent(
      *args, cpu=apart(fn),
      default=lambda *args: lax.optimization_barrier(fn(*args)))
