"""Leaves of all sorts, their names, and where they are."""

import helpers
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import mezo_jax
from mezo_jax import _paths

STEP = mezo_jax.Displacement(jax.random.key(4), 0.05)
OTHERS = {
    'int4': lambda: jnp.arange(4).astype(jnp.int4),
    'int32': lambda: jnp.array([2**24 + 1, 3]),
    'bool': lambda: jnp.array([True, False]),
    'float8': lambda: jnp.ones(4, jnp.float8_e4m3fn),
    'Python float': lambda: 1.5,
    'Python int': lambda: 2**24 + 1,
    'numpy': lambda: np.ones(3),
    'complex': lambda: jnp.ones(3, jnp.complex64),
    'key': lambda: jax.random.key(3),
    'keys': lambda: jax.random.split(jax.random.key(3)),
}


def same(a, b):
  words = lambda x: jax.random.key_data(x) if jnp.issubdtype(
      jnp.result_type(x), jax.dtypes.prng_key) else x
  assert jnp.result_type(a) == jnp.result_type(b)
  np.testing.assert_array_equal(words(a), words(b))


@pytest.mark.parametrize('make', [
    lambda z: mezo_jax.mezo(
        1e-2, key=0, directions=z, weight_decay=0.1, decay='^w'),
    lambda z: mezo_jax.spsa(1e-2, key=0, directions=z)])
@pytest.mark.parametrize('name', OTHERS)
def test_leaves_that_are_not_selected_are_not_touched(name, make):
  other = OTHERS[name]()
  params = {'w': jnp.ones((3, 3)), 'other': other}
  loss = lambda p: jnp.sum(p['w'] ** 2)
  for mask in ('^w$', {'w': True, 'other': False}):
    z = mezo_jax.Normal(mask=mask)
    moved = mezo_jax.displace(params, STEP, z)
    assert moved['other'] is other
    near = mezo_jax.perturbed(loss, z)(params, STEP)
    np.testing.assert_allclose(near, loss(moved), rtol=1e-5)
    tx = make(z)
    updates, state = jax.jit(lambda s, p, tx=tx: tx.update(
        None, s, p, value_fn=loss))(tx.init(params), params) if (
            'key' not in name) else tx.update(
                None, tx.init(params), params, value_fn=loss)
    assert np.any(updates['w'])
    if 'key' in name:  # to which optax cannot add anything
      assert updates['other'].dtype == jax.dtypes.float0
    else:
      got = optax.apply_updates(params, updates)['other']
      if name != 'Python float' and name != 'Python int':
        same(got, other)
      assert np.all(np.asarray(got, np.float64 if name not in (
          'complex', 'float8') else None) == np.asarray(other))


def test_weights_of_eight_bits_are_refused_where_they_are_selected():
  params = {'w': jnp.ones((3, 3)), 'q': jnp.ones(4, jnp.float8_e4m3fn)}
  for mask in (None, 'q'):
    with pytest.raises(ValueError, match="'q' is float8_e4m3fn.*mask"):
      mezo_jax.displace(params, STEP, mezo_jax.Normal(mask=mask))


# --- names -------------------------------------------------------------------


def test_a_parameter_may_be_called_value():
  params = {'attn': {n: jnp.ones((2, 2)) for n in ('query', 'key', 'value')}}
  assert [p for p, _ in _paths.named_leaves(params)] == [
      'attn/key', 'attn/query', 'attn/value']
  chosen = _paths.selected(params, 'attn/value$')
  assert chosen == {'attn': {'query': False, 'key': False, 'value': True}}
  z = mezo_jax.direction({'a': {
      'value': jnp.ones(9), 'raw_value': jnp.ones(9)}}, STEP)['a']
  assert not np.any(np.isclose(z['value'], z['raw_value']))


def test_variables_of_nnx_have_their_own_names():
  from flax import nnx
  class Attention(nnx.Module):
    def __init__(self, rngs):
      self.query, self.value = (nnx.Linear(2, 2, rngs=rngs) for _ in range(2))
  state = nnx.split(Attention(nnx.Rngs(0)))[1]
  assert [p for p, _ in _paths.named_leaves(state)] == [
      'query/bias', 'query/kernel', 'value/bias', 'value/kernel']


def test_equal_paths_are_refused():
  params = {'a/b': jnp.ones(2), 'a': {'b': jnp.ones(2)}}
  for fn in (lambda: mezo_jax.direction(params, STEP),
             lambda: mezo_jax.mezo(1e-2, key=0).init(params)):
    with pytest.raises(ValueError, match="two parameters have the path 'a/b'"):
      fn()


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="generator must be one of.*'mt19937'"):
    mezo_jax.Normal('mt19937')
  with pytest.raises(ValueError, match="directions must be one.*'cauchy'"):
    mezo_jax.mezo(1e-2, key=0, directions='cauchy')


# --- places ------------------------------------------------------------------


@pytest.mark.parametrize('make', [
    lambda: mezo_jax.mezo(1e-2, key=0),
    lambda: optax.chain(mezo_jax.spsa(key=0), optax.sgd(1e-2))])
def test_params_on_a_mesh_compile_one_step(make):
  """The state starts where the step leaves it."""
  mesh = helpers.mesh_of(2, 4)
  params = {'w': jax.device_put(
      jnp.ones((8, 8)), jax.NamedSharding(mesh, P(None, 'fsdp')))}
  tx = make()
  @jax.jit
  def step(params, state):
    updates, state = tx.update(
        None, state, params, value_fn=lambda p: jnp.sum(p['w'] ** 2))
    return optax.apply_updates(params, updates), state
  params, state = step(params, tx.init(params))
  with helpers.compilations() as seen:
    params, state = step(params, state)
  assert not seen
