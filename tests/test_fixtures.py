"""The tests' own fixtures."""

import jax
import jax.numpy as jnp


def test_a_program_is_compiled_again_as_shipped(as_shipped):
  traced = []

  @jax.jit
  def fn(x):
    traced.append(x)
    return x + 1

  fn(jnp.ones(3))
  with as_shipped():
    fn(jnp.ones(3))
    fn(jnp.ones(3))
  fn(jnp.ones(3))
  assert len(traced) == 3
