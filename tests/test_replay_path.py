"""Training again from the recorded projected gradients: bitwise the weights."""

import functools
import sys

import estimators
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mezo_jax
from mezo_jax import models, peft
from mezo_jax.core import sharding
from mezo_jax.directions import noise

pytestmark = pytest.mark.as_shipped

GROUPS = {'attn/': 1e-2, '': 1e-3}
CASES = {
    'float32': dict(),
    'bfloat16, decay and schedule': dict(
        weight_decay=0.1, decay='kernel', dtype='bfloat16',
        learning_rate=optax.linear_schedule(1e-2, 0.0, 9)),
    'groups and micro-batches': dict(
        learning_rate=GROUPS, eps=GROUPS, directions='rademacher',
        micro_batches=2, num_samples=2),
    'LoRA': dict(trained=peft.TRAINED['lora'], eps=1e-2),
}


@pytest.mark.slow
@pytest.mark.exhaustive_except(
    name=['bfloat16, decay and schedule'], devices=[8])
@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('name', CASES)
def test_recorded_gradients_give_the_weights_of_training(name, devices):
  mesh = sharding.make_mesh(2, 2, 2) if devices == 8 else None
  tx, value_fn, start, frozen, batches = helpers.replay_setup(
      **CASES[name], mesh=mesh)
  step = mezo_jax.make_step(tx, value_fn, mesh=mesh)
  copy = lambda tree: jax.tree.map(jnp.copy, tree)
  put = (lambda x: x) if mesh is None else (
      lambda batch: sharding.put_batch(jax.device_get(batch), mesh))
  params, state, log = copy(start), tx.init(start), []
  for batch in batches:
    params, state, metrics = step(params, state, put(batch), frozen)
    log.append(np.asarray(metrics['projected_grad']))
  assert metrics['skipped'] == 1 and len(step.compiled) == 2
  assert not np.isfinite(log[2]).any()

  replayed = mezo_jax.make_step(tx, None, mesh=mesh)  # it needs no loss
  got, state = copy(start), tx.init(start)
  for g in log:
    got, state, metrics = replayed.update(got, state, g)
  helpers.assert_bitwise(got, params)
  assert metrics['skipped'] == 1
  # A loop of one's own, update and apply_updates in one jit, is no other.
  if devices == 1:
    got, state = copy(start), tx.init(start)
    loop = jax.jit(lambda params, state, batch: own(
        tx, value_fn, params, state, frozen, batch))
    for batch in batches:
      got, state = loop(got, state, batch)
    helpers.assert_bitwise(got, params)


def own(tx, value_fn, params, state, frozen, batch):
  updates, state = tx.update(
      None, state, params, batch=batch, value_fn=lambda p, batch: value_fn(
          peft.join(p, frozen), batch))
  return optax.apply_updates(params, updates), state


@pytest.mark.slow
@pytest.mark.exhaustive
def test_at_the_size_of_a_real_model():
  """SmolLM2's shape, 135M parameters, of which each block is fused alike."""
  model = models.Transformer(helpers.tiny_config(
      vocab_size=49152, width=576, ff_width=1536, num_layers=30, num_heads=9,
      num_kv_heads=3, head_width=64))
  shapes = models.param_shapes(model.config)
  start = lambda: jax.tree.map(lambda x: jnp.full(x.shape, 0.02), shapes)
  loss = lambda p, ids: jnp.mean(model.apply(
      {'params': p}, ids, answer_at=jnp.full((2, 1), 7),
      token_ids=jnp.array([3, 5])) ** 2)
  tx = mezo_jax.mezo(optax.linear_schedule(1e-2, 0.0, 9), key=3,
                     weight_decay=0.1, decay='kernel')

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def loop(params, state, ids):
    updates, state = tx.update(None, state, params, value_fn=loss, ids=ids)
    return optax.apply_updates(params, updates), state

  params = start()
  params, state = loop(params, tx.init(params), jnp.full((2, 8), 3))
  want, g = jax.device_get(params), np.asarray(state[0].projected_grad)
  assert g != 0
  told, params = mezo_jax.make_step(tx, None), start()
  params, _, _ = told.update(params, tx.init(params), g)
  helpers.assert_bitwise(params, want)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_weight_decay_is_a_sum_of_rounded_products(dtype, monkeypatch):
  """Of float32, as numpy makes it: some programs would add a product that is
  not rounded, and others, as of weights in the host's memory, would not."""
  # The room exports a function with its module's name.
  module = sys.modules['mezo_jax.transforms.mezo']
  monkeypatch.setattr(module, 'rounding', lambda *args: optax.identity())
  params = {'w': jnp.asarray(
      np.random.RandomState(0).normal(size=(400, 300)), dtype)}
  tx = mezo_jax.mezo(1.0, key=3, weight_decay=0.1, decay='w')
  updates, _ = jax.jit(lambda state, params: tx.update(
      None, state, params, projected_grad=jnp.array([0.7])))(
          tx.init(params), params)
  z = mezo_jax.direction(params, mezo_jax.Displacement(
      noise.direction_key(jax.random.key(3), 0), 1.0), dtype=jnp.float32)
  want = np.float32(0.7) * np.asarray(z['w']) + (
      np.float32(0.1) * np.float32(params['w']))
  helpers.assert_bitwise(updates['w'], -want)


@pytest.mark.slow_except(name=['mezo, signs'])
@pytest.mark.exhaustive_except(name=['mezo, signs', 'mezo, low rank', 'hizoo'])
@pytest.mark.parametrize('name', [
    'mezo, signs', 'mezo, low rank', 'mezo, subzero', 'hizoo', 'lozo-m'])
def test_what_is_added_is_the_update_as_it_is_told(name):
  """Compilers make one operation of a product and a sum where they like: the
  weights would differ in a bit between programs, and between meshes."""
  rng = np.random.RandomState(0)
  params = {'layers': {'w': rng.normal(size=(2, 64, 48))},
            'e': rng.normal(size=(100, 40)), 'b': rng.normal(size=300)}
  params = jax.tree.map(jnp.float32, params)
  tx = estimators.ROWS[name](optax.linear_schedule(1e-2, 0, 9), key=0)
  update = jax.jit(lambda p, s, g: tx.update(None, s, p, projected_grad=g))
  def step(params, state, g):
    updates, state = tx.update(None, state, params, projected_grad=g)
    return optax.apply_updates(params, updates), state
  step, state = jax.jit(step), tx.init(params)
  n = optax.tree.get(state, 'projected_grad').size
  for g in rng.normal(size=(4, n)).astype(np.float32):
    told, _ = update(params, state, g)
    got, state = step(params, state, g)
    helpers.assert_bitwise(got, jax.tree.map(
        lambda p, u: np.asarray(p) + np.asarray(u), params, told))
    params = got
