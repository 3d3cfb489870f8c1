"""Backpropagation in MeZO's place."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mezo_jax.transforms import backprop

PARAMS = {'a': jnp.array([1.0, 2.0]), 'b': {'c': jnp.array([3.0])}}


def quadratic(params, x):
  a, c = params['a'], params['b']['c']
  return jnp.sum((a - x) ** 2, -1) + jnp.sum(c * a[:1]) * x[:, 0]


X = jnp.arange(8.0).reshape(4, 2)


@pytest.mark.parametrize('parts', [1, 2, 4])
def test_backprop_is_the_optimizer_on_the_gradient(parts):
  inner = optax.adam(1e-2)
  tx = optax.chain(
      backprop.backprop(micro_batches=parts), inner)
  params, theirs = PARAMS, PARAMS
  state, other = tx.init(params), inner.init(theirs)
  for _ in range(3):
    updates, state = tx.update(None, state, params, value_fn=quadratic, x=X)
    value, grads = jax.value_and_grad(
        lambda params: jnp.mean(quadratic(params, X)))(theirs)
    steps, other = inner.update(grads, other, theirs)
    np.testing.assert_allclose(state[0].value, value, rtol=1e-6)
    np.testing.assert_allclose(
        state[0].grad_norm, optax.global_norm(grads), rtol=1e-6)
    params = optax.apply_updates(params, updates)
    theirs = optax.apply_updates(theirs, steps)
  helpers.assert_close(params, theirs)
  assert state[0].count == 3


def test_backprop_refuses_updates_of_others():
  tx = backprop.backprop()
  with pytest.raises(ValueError, match='backprop'):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=quadratic, x=X)
