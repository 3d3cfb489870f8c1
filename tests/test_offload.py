"""Layers in the host's memory: the same run, one layer on the device at a time.

JAX's types say where arrays are, on a CPU too, and refuse what would compute
with one that is on the host.
"""

import helpers
import jax
from jax.extend import core as jex
from jax.interpreters import partial_eval as pe
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import records, small_config

import mezo_jax
from mezo_jax import models
from mezo_jax.core import fingerprint, sharding
from mezo_jax.core.errors import InputError
from mezo_jax.export.from_run import export, rebuild
from mezo_jax.training import checks
import train

pytestmark = pytest.mark.as_shipped

FORMS = {
    'normal': (jnp.float32, dict()), 'signs, two directions': (
        jnp.bfloat16, dict(directions=mezo_jax.Rademacher(), num_samples=2)),
    'low rank, pending': (jnp.float32, dict(
        directions=mezo_jax.LowRank(rank=4), apply_every=4)),
    'decay': (jnp.bfloat16, dict(weight_decay=0.1, decay='kernel'))}


@pytest.fixture(scope='module')
def problem():
  model, params, _ = helpers.tiny_model(num_layers=4, width=32, ff_width=64)
  ids = np.asarray(jax.random.randint(jax.random.key(2), (8, 6), 0, 64))
  def loss_fn(params, batch):
    return -model.apply({'params': params}, batch, targets=batch).mean(-1)
  return jax.device_get(params), ids, loss_fn


def placed(params, mesh, offload, dtype=jnp.float32):
  places = sharding.param_shardings(params, mesh)
  if offload:
    places = places | {'layers': jax.tree.map(
        lambda x, s: sharding.on_host(s) if x.ndim > 2 else s,
        params['layers'], places['layers'])}
  return jax.device_put(jax.tree.map(lambda x: x.astype(dtype), params), places)


@pytest.mark.slow
@pytest.mark.exhaustive_except(form=['signs, two directions'])
@pytest.mark.parametrize('form', FORMS)
def test_fifty_steps_are_those_without(form, problem):
  """Bitwise, given the projected gradients; losses to rounding."""
  (host, ids, loss_fn), (dtype, how) = problem, FORMS[form]
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  ends, told = [], []
  for offload in (False, True):
    params = placed(host, mesh, offload, dtype)
    tx = mezo_jax.mezo(1e-3, key=0, **how)
    state, step = tx.init(params), mezo_jax.make_step(tx, loss_fn, mesh=mesh)
    for t in range(50):
      g, value = step.losses(params, state, ids)
      if not offload:
        told.append((np.asarray(g), np.asarray(value)))
      if t == 0:
        np.testing.assert_allclose(value, told[0][1], rtol=1e-6)
        np.testing.assert_allclose(g, told[0][0], atol=2e-3)
      params, state, _ = step.update(params, state, *told[t])
    params, state = step.apply_accumulated(params, state)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(params['layers'])}
    assert ('pinned_host' in kinds) == offload
    ends.append(params)
  helpers.assert_bitwise(*map(jax.device_get, ends))
  assert fingerprint.of_weights(ends[0]) == fingerprint.of_weights(ends[1])
  moved = lambda tree: np.asarray(tree['layers']['mlp']['up']['kernel'])
  assert not np.array_equal(moved(ends[0]), moved(host).astype(dtype))


def on_device(jaxpr):
  """The sizes of all that a program makes in the memory of the device."""
  for eqn in jaxpr.eqns:
    for v in eqn.outvars:
      if getattr(v.aval, 'memory_space', None) != jax.memory.Space.Host:
        yield getattr(v.aval, 'size', 0), eqn.primitive.name
    for x in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(
        x, (jex.Jaxpr, jex.ClosedJaxpr))):
      if isinstance(x, (jex.Jaxpr, jex.ClosedJaxpr)):
        yield from on_device(getattr(x, 'jaxpr', x))


@pytest.mark.slow
def test_no_more_than_a_layer_is_on_the_device(problem):
  """Nothing that either program makes there is as large as two matrices."""
  host, ids, loss_fn = problem
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  params = placed(host, mesh, True)
  tx = mezo_jax.mezo(1e-3, key=0)
  step = mezo_jax.make_step(tx, loss_fn, mesh=mesh)
  largest = max(x[0].size for x in jax.tree.leaves(params['layers'])
                if x.ndim > 2)
  table = params['embed']['embedding'].size
  for traced in step.trace(params, tx.init(params), ids):
    jaxpr = traced.jaxpr.jaxpr
    live, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    made = [*on_device(live)]
    assert max(made)[0] <= max(largest, table) * 2
    assert any(name == 'device_put' for _, name in made)


def test_what_cannot_be_updated_by_layers_is_refused(problem):
  host, ids, loss_fn = problem
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  params = placed(host, mesh, True)
  tx = optax.chain(mezo_jax.spsa(1e-3, key=0), optax.trace(0.9))
  with pytest.raises(ValueError, match='mezo_jax.mezo'):
    step = mezo_jax.make_step(tx, loss_fn, mesh=mesh)
    step.update(params, jax.eval_shape(tx.init, host), np.ones(1, np.float32))
  odd = params | {'embed': jax.device_put(params['embed'], sharding.on_host(
      jax.tree.map(lambda x: x.sharding, params['embed'])))}
  tx = mezo_jax.mezo(1e-3, key=0)
  with pytest.raises(ValueError, match='embed/embedding'):
    mezo_jax.make_step(tx, loss_fn, mesh=mesh).update(
        odd, tx.init(odd), np.ones(1, np.float32))


@pytest.mark.slow
def test_a_model_is_read_into_the_host_s_memory(tiny_dir):
  mesh = sharding.make_mesh()
  model, params = models.load(tiny_dir, mesh, progress=False, offload=True)
  shapes = models.param_shapes(model.config, mesh, offload=True)
  for x, like in zip(jax.tree.leaves(params), jax.tree.leaves(shapes)):
    assert x.sharding == like.sharding
    assert sharding.is_on_host(x) == sharding.is_on_host(like)
  assert sharding.is_on_host(params['layers']['mlp']['up']['kernel'])
  assert not sharding.is_on_host(params['embed']['embedding'])
  _, plain = models.load(tiny_dir, mesh, progress=False)
  helpers.assert_bitwise(*map(jax.device_get, (params, plain)))
  ids = np.arange(6)[None] + 4
  one, two = (np.asarray(model.apply({'params': p}, ids))
              for p in (params, plain))
  np.testing.assert_array_equal(one, two)
  tokens = [models.generate(model, p, ids, max_new_tokens=4)
            for p in (params, plain)]
  np.testing.assert_array_equal(*tokens)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_train_py_with_and_without(tiny_dir, reviews_file, tmp_path):
  """A run that is stopped after three of six steps, without, goes on with; its
  log makes the same weights without, bit for bit."""
  config = small_config(
      tiny_dir, reviews_file, steps=3, zero_shot=False,
      model__dtype='bfloat16', spsa__distribution='rademacher')
  run = tmp_path / 'run'
  train.run(config, run)
  config.steps, config.model.offload = 6, True
  train.run(config, run)
  assert [r['step'] for r in records(run) if r['kind'] == 'train'] == [
      *range(1, 7)]
  got = export(run, tmp_path / 'exported', step=6)
  want = rebuild(tiny_dir, run / 'steps.log', tmp_path / 'again')
  helpers.assert_bitwise(*(
      models.load(x, progress=False)[1] for x in (got, want)))


def test_configs_that_cannot(tiny_dir, reviews_file):
  for change in (dict(method='finetune'), dict(model__dtype='int8'),
                 dict(peft__method='last_layers'), dict(method='sign')):
    config = small_config(tiny_dir, reviews_file, model__offload=True, **change)
    with pytest.raises(InputError, match='model.offload'):
      checks.check_config(config)
