"""QZO: integers stay, factors of their scales are trained."""

from estimators import whole
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import mezo_jax
from mezo_jax import Displacement, make_step, models, peft
from mezo_jax.core.errors import InputError
from mezo_jax.directions import noise
from mezo_jax.export.from_run import export
from mezo_jax.tasks import Task
from mezo_jax.training import build
import train

KEY, RATE, EPS = jax.random.key(5), 5e-2, 1e-2
X = np.random.RandomState(0).normal(size=(16, 64))
Y = np.random.RandomState(1).normal(size=(16, 3))
W = np.random.RandomState(2).normal(size=(64, 3)).astype(np.float32) / 8


def problem(bits):
  params = {'w': mezo_jax.quantize(W, bits), 'b': jnp.zeros(3)}
  def value(f, batch):
    p = peft.join(f, params)
    return jnp.mean((batch['x'] @ p['w'].astype(jnp.float64) + p['b']
                     - batch['y']) ** 2)
  return params, peft.factors(params), value


@pytest.mark.parametrize('bits', [8, 4])
@pytest.mark.slow_except(bits=[8])
def test_it_is_its_papers_equations(bits):
  """20 steps in NumPy, of two directions; some are clipped, some end at 0."""
  with jax.enable_x64(True):
    params, f, value = problem(bits)
    assert f['w']['factors'].shape == (2, 3)
    tx = whole.qzo(RATE, EPS, key=KEY, clip=0.5, num_samples=2)
    step, state = make_step(tx, value), tx.init(f)
    q = np.asarray(params['w'].integers(), float)
    s = np.asarray(params['w'].scales, float)
    o = params['w'].offsets
    o = 0.0 if o is None else np.repeat(np.asarray(o, float), 32, 0)
    def loss(f, t):
      w = q * np.repeat(s * f, 32, 0) + o
      rows = slice(4 * (t % 4), 4 * (t % 4) + 4)
      return np.mean((X[rows] @ w - Y[rows]) ** 2)
    want, clipped = np.ones((2, 3)), 0
    for t in range(20):
      move = 0.0
      for j in (0, 1):
        z = np.asarray(mezo_jax.direction(
            peft.factors(params), Displacement(
                noise.direction_key(KEY, t, j), 1.0))['w']['factors'], float)
        g = (loss(want + EPS * z, t) - loss(want - EPS * z, t)) / (2 * EPS)
        clipped += abs(g) > 0.5
        move = move + np.clip(g, -0.5, 0.5) * z / 2
      want = np.maximum(want - RATE * move, 0)
      rows = slice(4 * (t % 4), 4 * (t % 4) + 4)
      f, state, metrics = step(f, state, dict(
          x=jnp.asarray(X[rows]), y=jnp.asarray(Y[rows])))
  assert 0 < clipped < 40 and metrics['skipped'] == 0
  assert np.max(np.abs(want - 1)) > 0.05
  np.testing.assert_allclose(f['w']['factors'], want, rtol=1e-4, atol=1e-5)


def test_factors_are_never_below_zero():
  tx = whole.qzo(10.0, EPS, key=KEY, clip=1.0)
  params, f, _ = problem(8)
  updates, _ = tx.update(
      None, tx.init(f), f, value_fn=lambda f: jnp.sum(f['w']['factors']))
  new = f['w']['factors'] + updates['w']['factors']
  assert np.all(new >= 0) and np.any(new == 0) and np.any(new > 0)


@pytest.mark.slow
@pytest.mark.exhaustive_except(dtype=['int4'])
@pytest.mark.parametrize('dtype', ['int8', 'int4'])
def test_a_model_by_its_scales(tiny_dir, dtype):
  """Scanned layers, embedding and head: perturbed factors are a model of
  perturbed scales; what is trained is a 32nd of the weights."""
  model, params = models.load(tiny_dir, dtype=dtype, progress=False)
  ids = jax.random.randint(KEY, (2, 6), 0, 300)
  f = peft.factors(params)
  assert 30 * sum(x.size for x in jax.tree.leaves(f)) < sum(
      x.size for x in jax.tree.leaves(
          params, is_leaf=lambda x: isinstance(x, mezo_jax.QuantizedArray)))
  value = lambda f: models.apply(model, peft.join(f, params), ids)
  d = Displacement(KEY, 0.1)
  got = jax.jit(mezo_jax.perturbed(value))(f, d)
  want = jax.jit(lambda f: model.apply({'params': mezo_jax.dequantize(
      peft.join(mezo_jax.displace(f, d), params))}, ids))(f)
  helpers.assert_close(got, want, rtol=1e-4, atol=1e-4)
  assert np.max(np.abs(want - value(f))) > 1e-3


@pytest.mark.slow
@pytest.mark.exhaustive_except(mask=[''])
@pytest.mark.parametrize('mask', ['', '^last_layers/'])
def test_a_run_goes_on_and_its_integers_stay(
    tiny_dir, reviews_file, tmp_path, mask):
  config = lambda steps: runs.small_config(
      tiny_dir, reviews_file, method='qzo', model__dtype='int8', steps=steps,
      eval_every=4, checkpoint_every=2, zero_shot=False, peft__mask=mask,
      peft__num_layers=1, optimizer__learning_rate=1e-2, spsa__eps=1e-2)
  result = train.run(config(4), tmp_path / 'part')
  assert result['trained'] < 2000
  if mask:
    return
  train.run(config(2), tmp_path / 'again')
  train.run(config(4), tmp_path / 'again')
  whole = jax.device_get(runs.saved(tmp_path / 'part')[1])
  helpers.assert_bitwise(runs.saved(tmp_path / 'again')[1], whole)
  export(tmp_path / 'part', tmp_path / 'out', step=4)
  _, exported = models.load(tmp_path / 'out', progress=False)
  _, base = models.load(tiny_dir, dtype='int8', progress=False)
  helpers.assert_close(exported, mezo_jax.dequantize(peft.join(whole, base)))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_new_head_is_trained_beside_the_scales(
    tiny_dir, reviews_file, tmp_path):
  config = runs.small_config(
      tiny_dir, reviews_file, method='qzo', model__dtype='int8', steps=2,
      eval_every=2, zero_shot=False, optimizer__learning_rate=1e-1)
  config.task = Task(
      kind='head', template='{text}', label_names=('bad', 'good'))
  train.run(config, tmp_path)
  kept = jax.device_get(runs.saved(tmp_path)[1])
  start = build.build(config, say=lambda text: None).params
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), kept, start)
  assert all(jax.tree.leaves(moved['classifier'])) and any(
      jax.tree.leaves(moved['layers']))


@pytest.mark.parametrize('changes,message', [
    (dict(method='qzo'), 'model.dtype'),
    (dict(method='qzo', model__dtype='int8', peft__method='lora'),
     'peft.method'),
    (dict(method='qzo', model__dtype='int8', variant__clip=0.0), 'clip'),
    (dict(peft__method='scales'), '--config.peft.*mezo_jax.QuantizedArray')])
def test_what_is_refused(tiny_dir, reviews_file, tmp_path, changes, message):
  with pytest.raises(InputError, match=message):
    train.run(runs.small_config(tiny_dir, reviews_file, **changes), tmp_path)
