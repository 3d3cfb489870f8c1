"""Updates that wait: the same steps, and weights that are left alone."""

import contextlib

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import saved, small_config

import mezo_jax
from mezo_jax import LowRank, models, Rademacher
from mezo_jax.core import sharding
from mezo_jax.core.errors import Stopped
from mezo_jax.export.from_run import export
from mezo_jax.runs import preemption
import train

KINDS = {
    'signs, two directions, masked': dict(
        directions=Rademacher(mask='attn|mlp'), num_samples=2),
    'low rank of rows': dict(
        directions=LowRank(rank=4), num_samples=2, over='rows'),
    'low rank, micro-batches': dict(
        directions=LowRank(rank=4), micro_batches=2)}


def setup(apply_every, dtype='float32', mesh=None, **options):
  tx, value_fn, params, _, batches = helpers.replay_setup(
      dtype, None, optax.linear_schedule(1e-2, 0.0, 9), mesh, eps=1e-2,
      apply_every=apply_every, **options)
  step = mezo_jax.make_step(tx, value_fn, mesh=mesh)
  return tx, value_fn, step, params, batches


def run(tx, value_fn, step, params, batches, apply_after=()):
  del value_fn
  params = jax.tree.map(jnp.copy, params)
  state, log, seen = tx.init(params), [], []
  for t, batch in enumerate(batches):
    params, state, metrics = step(params, state, batch)
    log.append(np.asarray(metrics['projected_grad']))
    seen.append(jax.device_get(params))
    if t in apply_after:
      params, state = step.apply_accumulated(params, state)
  return params, state, log, seen


@pytest.mark.slow
@pytest.mark.exhaustive_except(kind=['low rank, micro-batches'])
@pytest.mark.parametrize('kind', KINDS)
def test_the_steps_are_those_of_updates_at_once(kind):
  """A skipped one among them; and the weights move at every fourth alone."""
  at_once = run(*setup(1, **KINDS[kind]))
  made = setup(4, **KINDS[kind])
  (_, _, step, params, _), (end, state, log, seen) = made, run(*made)
  for a, b in zip(seen, [params, *seen]):
    moved = any(np.any(x != y) for x, y in zip(
        jax.tree.leaves(a), jax.tree.leaves(b)))
    assert moved == (a is seen[3])
  np.testing.assert_allclose(log, at_once[2], rtol=1e-2, atol=2e-3)
  end, state = step.apply_accumulated(end, state)
  helpers.assert_close(end, at_once[0], rtol=1e-3, atol=2e-5)
  again, state = step.apply_accumulated(jax.tree.map(jnp.copy, end), state)
  helpers.assert_bitwise(again, end)
  assert len(step.compiled) == 3
  assert state[0].total_notfinite == 1


@pytest.mark.slow
@pytest.mark.exhaustive_except(devices=[8])
@pytest.mark.as_shipped
@pytest.mark.parametrize('dtype,devices', [('bfloat16', 1), ('float32', 8)])
def test_the_door_gives_the_same_weights(dtype, devices):
  mesh = sharding.make_mesh(2, 2, 2) if devices == 8 else None
  tx, value_fn, step, params, batches = setup(
      3, dtype, mesh, directions=LowRank(rank=4))
  if mesh is not None:
    batches = [sharding.put_batch(jax.device_get(b), mesh) for b in batches]
  end, _, log, _ = run(tx, value_fn, step, params, batches, apply_after=[3])
  got, state = jax.tree.map(jnp.copy, params), tx.init(params)
  for t, g in enumerate(log):
    got, state, _ = step.update(got, state, g)
    if t == 3:
      got, state = step.apply_accumulated(got, state)
  helpers.assert_bitwise(got, end)
  assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(
      jax.tree.leaves(end), jax.tree.leaves(params)))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_loop_of_one_s_own_folds_too():
  made = tx, value_fn, _, params, batches = setup(
      2, directions=LowRank(rank=4))
  want, _, _, _ = run(*made)
  @jax.jit
  def own(params, state, batch):
    updates, state = tx.update(
        None, state, params, value_fn=value_fn, batch=batch)
    return optax.apply_updates(params, updates), state
  state = tx.init(params)
  for batch in batches:
    params, state = own(params, state, batch)
  helpers.assert_close(params, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.as_shipped
def test_no_weights_are_built_nor_copied():
  """What is pending is evaluated by factors; an update that waits is no copy
  of the weights, of which both ways of it are one program."""
  model = models.Transformer(helpers.tiny_config(
      width=256, ff_width=512, num_layers=6, num_kv_heads=4, head_width=64))
  shapes = models.param_shapes(model.config)
  value_fn = lambda p, ids: -jnp.mean(
      model.apply({'params': p}, ids, targets=ids), -1)
  ids = jax.ShapeDtypeStruct((4, 8), jnp.int32)
  size = sum(4 * x.size for x in jax.tree.leaves(shapes))
  memory = []
  for every in (1, 8):
    tx = mezo_jax.mezo(1e-3, key=0, directions=LowRank(rank=4),
                       apply_every=every)
    step = mezo_jax.make_step(tx, value_fn)
    memory.append([p.compile().memory_analysis() for p in step.lower(
        shapes, jax.eval_shape(tx.init, shapes), ids)])
  (losses, update), (of_pending, folding, _) = memory
  assert folding.alias_size_in_bytes >= size
  layer = 4 * sum(x.size // 6 for x in jax.tree.leaves(shapes['layers']))
  for now, before in ((folding, update), (of_pending, losses)):
    more = now.temp_size_in_bytes - before.temp_size_in_bytes
    assert more < layer / 2


@pytest.mark.parametrize('options,message', [
    (dict(apply_every=0), 'apply_every .* 0'),
    (dict(weight_decay=0.1), 'weight_decay'),
    (dict(eps={'a': 1e-3, '': 1e-2}), 'apply_every'),
    (dict(learning_rate={'a': 1e-3, '': 1e-2}), 'apply_every')])
def test_options_are_checked(options, message):
  with pytest.raises(ValueError, match=message):
    mezo_jax.mezo(**dict(learning_rate=1e-3, key=0, apply_every=2) | options)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_that_is_stopped_and_exported(tiny_dir, reviews_file, tmp_path,
                                            monkeypatch):
  """With updates pending: nothing is lost, and evaluation adds them."""
  config = small_config(
      tiny_dir, reviews_file, steps=8, eval_every=4, zero_shot=False,
      spsa__apply_every=3, spsa__distribution='low_rank', spsa__rank=2,
      optimizer__learning_rate=1e-2)
  result = train.run(config, tmp_path / 'a')
  with monkeypatch.context() as m, pytest.raises(Stopped, match='step 5'):
    m.setattr(preemption, 'watched', lambda log: contextlib.nullcontext(
        lambda step: step == 5))
    train.run(config, tmp_path / 'b')
  train.run(config, tmp_path / 'b')
  helpers.assert_bitwise(saved(tmp_path / 'a')[1], saved(tmp_path / 'b')[1])
  out = export(tmp_path / 'a', tmp_path / 'out')
  found = train.run(small_config(out, reviews_file, method='zero_shot'),
                    tmp_path / 'again')['final']
  np.testing.assert_allclose(
      found['loss'], result['final']['loss'], rtol=2e-5)


def test_around_is_refused_where_updates_accumulate():
  tx = mezo_jax.mezo(1e-3, key=0, apply_every=2)
  params = {'w': jnp.ones(3)}
  with pytest.raises(ValueError, match='around'):
    tx.update(None, tx.init(params), params, value_fn=lambda p: p['w'].sum(),
              around=mezo_jax.Displacement(jax.random.key(1), 1.0))
