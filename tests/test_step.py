"""The step: what it gives, what it donates, how often it is compiled."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mezo_jax
from mezo_jax import peft
from mezo_jax.core import sharding
from mezo_jax.transforms import backprop
from mezo_jax.transforms.step import make_step

pytestmark = pytest.mark.as_shipped

X = np.arange(8, dtype=np.float32).reshape(4, 2)


def params():
  return {'a': jnp.array([1.0, 2.0]), 'b': {'value': jnp.array([3.0])}}


def quadratic(params, batch):
  return jnp.mean(jnp.sum((params['a'] - batch['x']) ** 2, -1)) + jnp.sum(
      params['b']['value'] ** 2)


OPTIMIZERS = {
    'mezo': lambda: mezo_jax.mezo(1e-2, key=0),
    'two directions, Adam': lambda: optax.chain(
        mezo_jax.spsa(key=0, num_samples=2), optax.adam(1e-2)),
    'backprop': lambda: optax.chain(
        backprop.backprop(), optax.adam(1e-2))}


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.slow_except(name=['mezo'])
def test_a_step_is_the_usual_one(name):
  """Also with a parameter that is called as a field of the state is."""
  tx, mine, theirs = OPTIMIZERS[name](), params(), params()
  step = make_step(tx, quadratic)
  state, other = tx.init(mine), tx.init(theirs)

  @jax.jit
  def usual(params, state, batch):
    updates, state = tx.update(
        None, state, params, value_fn=quadratic, batch=batch)
    return optax.apply_updates(params, updates), state
  for _ in range(2):
    mine, state, metrics = step(mine, state, {'x': X})
    theirs, other = usual(theirs, other, {'x': X})
  helpers.assert_bitwise(mine, theirs)
  helpers.assert_bitwise(
      *(jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(
          x.dtype, jax.dtypes.prng_key) else x, s) for s in (state, other)))
  assert metrics['loss'] == other[0].value
  size = 'grad_norm' if name == 'backprop' else 'projected_grad'
  np.testing.assert_array_equal(metrics[size], getattr(other[0], size))
  assert metrics.keys() == {'loss', size, 'skipped', 'skipped_in_a_row'}
  programs = step.lower(mine, state, {'x': X})
  assert len(programs) == (1 if name == 'backprop' else 2)


def test_skipped_steps_are_counted():
  tx, w = mezo_jax.mezo(1e-2, key=0), params()
  step, state, found = make_step(tx, quadratic), tx.init(w), []
  for x in (X * np.nan, X * np.nan, X, X * np.nan):
    w, state, metrics = step(w, state, {'x': x})
    found.append((int(metrics['skipped']), int(metrics['skipped_in_a_row'])))
  assert found == [(1, 1), (2, 2), (2, 0), (3, 1)]
  assert len(step.compiled) == 2  # the losses, and the update


def test_what_is_frozen_is_seen_and_left_alone():
  w = params()
  trained, frozen = peft.split(w, '^b/')
  tx = mezo_jax.mezo(1e-2, key=0)
  step = make_step(tx, quadratic)
  trained, state, metrics = step(trained, tx.init(trained), {'x': X}, frozen)
  assert trained.keys() == {'b'} and trained['b']['value'] != 3
  assert not frozen['a'].is_deleted()
  np.testing.assert_allclose(
      metrics['loss'], quadratic(params(), {'x': X}), rtol=1e-4)


def test_it_is_compiled_once_for_each_shape_and_in_place():
  said = []
  step = make_step(
      mezo_jax.mezo(1e-2, key=0), quadratic,
      on_compile=lambda batch, compiled, seconds: said.append(
          (batch and batch['x'].shape, compiled.memory_analysis() is not None)))
  w = params()
  state = mezo_jax.mezo(1e-2, key=0).init(w)
  with helpers.compilations() as seen:
    for x in (X, X[:2], X, X[:2]):
      old = w
      w, state, _ = step(w, state, {'x': x})
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
  assert len(seen) == len(step.compiled) == 3
  assert said == [((4, 2), True), (None, True), ((2, 2), True)]
  step(w, state, {'x': X.astype(np.float16)})
  assert len(step.compiled) == 4


def test_on_a_mesh_everything_lies_where_it_did():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  place = jax.NamedSharding(mesh, jax.P('fsdp'))
  w = {'a': jax.device_put(jnp.arange(8.0), place)}
  value_fn = lambda params, batch: jnp.mean((params['a'] - batch['x']) ** 2)
  tx = mezo_jax.mezo(1e-2, key=0)
  state = jax.device_put(tx.init(w), sharding.replicated(mesh))
  batch = sharding.put_batch({'x': np.ones((8, 8), np.float32)}, mesh)
  step = make_step(tx, value_fn, mesh=mesh)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=x.sharding), (w, state, batch))
  losses, update = (x.compile().memory_analysis() for x in step.lower(*shapes))
  assert update.alias_size_in_bytes > 0 and not step.compiled
  assert not losses.alias_size_in_bytes
  w, state, metrics = step(w, state, batch)
  assert w['a'].sharding == place
  assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
  assert metrics['loss'].sharding.is_fully_replicated
