"""One run, any mesh: equal losses, bitwise equal directions and updates."""

import functools
import re

import helpers
import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import optax
import pytest

import mezo_jax
from mezo_jax import models
from mezo_jax.core import sharding
from mezo_jax.directions import noise

MESHES = [(1, 1), (8, 1), (1, 8), (2, 4)]
COLLECTIVE = re.compile(r'all-gather|all-reduce|collective|all-to-all')


def wide_model():
  """Large enough that `param_spec` shards it."""
  return helpers.tiny_model(width=256, ff_width=512, vocab_size=512)


def place(params, mesh):
  """A copy on the mesh, that can be donated."""
  return jax.device_put(
      jax.device_get(params), sharding.param_shardings(params, mesh))


@pytest.mark.slow_except(generator=['hash32'])
@pytest.mark.as_shipped
@pytest.mark.parametrize('generator', noise.GENERATORS)
def test_directions_are_bitwise_equal_on_every_mesh(generator):
  _, params, _ = wide_model()
  want = None
  for shape in MESHES:
    mesh = helpers.mesh_of(*shape)
    shardings = sharding.param_shardings(params, mesh)
    if shape[1] > 1:
      assert any(s.spec for s in jax.tree.leaves(shardings))
    draw = jax.jit(
        lambda p, k: mezo_jax.displace(
            p, mezo_jax.Displacement(k, 0.3), mezo_jax.Normal(generator)),
        in_shardings=(shardings, None), out_shardings=shardings)
    placed = place(params, mesh)
    text = draw.lower(placed, jax.random.key(5)).compile().as_text()
    assert not COLLECTIVE.search(text), 'noise must not communicate'
    got = jax.device_get(draw(placed, jax.random.key(5)))
    want = want or got
    helpers.assert_bitwise(want, got)


def make_step(tx, loss_fn, out_shardings):
  @functools.partial(helpers.quick_jit, donate_argnums=(0, 1),
                     out_shardings=out_shardings)
  def step(params, state, ids):
    updates, state = tx.update(
        None, state, params, value_fn=loss_fn, ids=ids)
    return optax.apply_updates(params, updates), state
  return step


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_is_the_same_on_every_mesh():
  model, params, _ = wide_model()
  ids = jax.random.randint(jax.random.key(2), (8, 12), 0, 512)
  runs = {}
  for shape in MESHES:
    mesh = helpers.mesh_of(*shape)
    tx = mezo_jax.mezo(1e-4, 1e-3, key=3)
    wanted = sharding.param_shardings(params, mesh)
    step = make_step(tx, helpers.lm_loss(model),
                     (wanted, sharding.replicated(mesh)))
    p = place(params, mesh)
    state = jax.device_put(tx.init(p), sharding.replicated(mesh))
    batch = sharding.put_batch(np.asarray(ids), mesh)
    p, state = step(p, state, batch)
    losses = [float(state[0].value)]
    with helpers.compilations() as seen:
      for _ in range(3):
        p, state = step(p, state, batch)
        losses.append(float(state[0].value))
    assert not seen, 'the step was compiled again'
    runs[shape] = losses, jax.device_get(p)
  losses, final = runs[1, 1]
  assert losses[0] != losses[-1]
  for other, end in runs.values():
    np.testing.assert_allclose(other, losses, rtol=2e-6)
    helpers.assert_close(end, final, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('family', ['llama', 'opt'])
def test_split_layers_give_the_same_run(family):
  """Rows over 2, width over 2, heads, feed-forward and vocabulary over 2."""
  changes = dict(norm='layer', activation='relu', gated=False,
                 rope=None,
                 position_offset=2) if family == 'opt' else {}
  model, params, _ = helpers.tiny_model(
      width=256, ff_width=512, vocab_size=512, family=family,
      num_kv_heads=4, head_width=64, **changes)
  ids = jax.random.randint(jax.random.key(2), (8, 12), 0, 512)
  def loss_fn(params, ids):
    return -model.apply({'params': params}, ids, targets=ids).mean()
  runs = []
  for shape in ((1, 1, 8), (2, 2, 2), (8, 1, 1)):
    mesh = sharding.make_mesh(*shape)
    wanted = jax.tree.map(lambda x: x.sharding,
                          models.param_shapes(model.config, mesh))
    axes = {a for s in jax.tree.leaves(wanted) for a in s.spec if a}
    assert axes == {a for a, n in mesh.shape.items() if n > 1} - {'data'}
    tx = mezo_jax.mezo(1e-4, 1e-3, key=3)
    p = jax.device_put(jax.device_get(params), wanted)
    state = jax.device_put(tx.init(p), sharding.replicated(mesh))
    step = make_step(tx, loss_fn, (wanted, sharding.replicated(mesh)))
    batch = sharding.put_batch(np.asarray(ids), mesh)
    losses = []
    with jax.set_mesh(mesh):
      for _ in range(3):
        p, state = step(p, state, batch)
        losses.append(float(state[0].value))
    runs.append((losses, jax.device_get(p)))
  for losses, end in runs[1:]:
    np.testing.assert_allclose(losses, runs[0][0], rtol=2e-6)
    helpers.assert_close(end, runs[0][1], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.as_shipped
def test_the_noise_of_a_sharded_step_does_not_communicate():
  """What crosses devices is floating point: no integer array of a layer's
  size (counters, bits) is ever gathered or reduced."""
  model, params, _ = wide_model()
  mesh = helpers.mesh_of(1, 8)
  tx = mezo_jax.mezo(1e-4, 1e-3, key=3)
  p = place(params, mesh)
  state = jax.device_put(tx.init(p), sharding.replicated(mesh))
  batch = sharding.put_batch(np.zeros((8, 12), np.int32), mesh)
  step = make_step(tx, helpers.lm_loss(model), None)
  text = step.lower(p, state, batch).compile().as_text()
  lines = [x for x in text.splitlines() if re.search(
      r'= \(?[a-z0-9]+\[.* (all-gather|all-reduce|all-to-all|collective)', x)]
  assert lines, 'a sharded forward must communicate'
  for line in lines:
    for dims in re.findall(r'u32\[([\d,]+)\]', line.split(' all-')[0]):
      assert np.prod([int(d) for d in dims.split(',')]) < 2**12, line


def test_explicit_axis_types():
  mesh = helpers.mesh_of(1, 8, AxisType.Explicit)
  with jax.set_mesh(mesh):
    w = jax.device_put(jnp.ones((16, 64)), jax.NamedSharding(
        mesh, jax.P(None, 'fsdp')))
    loss_fn = lambda p, x: jnp.sum((p['w'] * 2 - x) ** 2)
    tx = mezo_jax.mezo(1e-3, key=0)
    state = tx.init({'w': w})
    step = jax.jit(lambda p, s: tx.update(None, s, p, value_fn=loss_fn, x=1.0))
    updates, new = step({'w': w}, state)
    assert jax.typeof(updates['w']).sharding == jax.typeof(w).sharding
    assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)


def test_meshes_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='8 device'):
    sharding.make_mesh(3, 2)
  with pytest.raises(ValueError, match='8 device'):
    sharding.make_mesh(-1, -1)
  assert dict(sharding.make_mesh(2, -1).shape) == {
      'direction': 1, 'data': 2, 'fsdp': 4, 'tensor': 1}
