"""MaZO: scores by forward passes, and what they leave alone."""

import sys

from estimators import whole
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs

import mezo_jax
from mezo_jax import Displacement, make_step, models, variants
from mezo_jax.directions import noise
import train

KEY, RATE, EPS = jax.random.key(3), 1e-2, 1e-2
# Of a quadratic: curvature and optimum of each weight.
CURVE = np.random.RandomState(0).uniform(0.5, 2.0, (4, 6)).astype(np.float32)
GOAL = np.random.RandomState(1).normal(size=(4, 6)).astype(np.float32) * (
    np.random.RandomState(2).rand(4, 6) < 0.4)


def value_fn(params, batch=None):
  del batch
  return jnp.sum(CURVE * (params['w'] - GOAL) ** 2) / 2 + jnp.sum(
      (params['b'] - 1.0) ** 2)


START = {'w': jnp.zeros((4, 6)), 'b': jnp.zeros(3)}


def direction(like, key):
  return {k: np.asarray(x, np.float64) for k, x in mezo_jax.direction(
      like, Displacement(key, 1.0)).items()}


def scores(n, alpha, beta, tasks=1):
  """In NumPy, of the directions that `saliency` draws."""
  loss = lambda p: np.sum(CURVE * (p['w'] - GOAL) ** 2) / 2 + np.sum(
      (p['b'] - 1.0) ** 2)
  total = np.zeros((4, 6))
  for t in range(tasks):
    grad, curve = np.zeros((4, 6)), np.zeros((4, 6))
    for j in range(n):
      z = direction(START, noise.direction_key(KEY, t, j))
      plus, minus, clean = (
          (1 + t) * loss({k: s * EPS * z[k] for k in z}) for s in (1, -1, 0))
      grad += (plus - minus) / (2 * EPS) * z['w'] / n
      curve += (plus - 2 * clean + minus) / EPS**2 * (z['w']**2 - 1) / (2 * n)
    curve = np.maximum(np.abs(curve), np.abs(curve).mean(-1, keepdims=True))
    score = grad**2 / (2 * curve) + alpha * grad**2 + beta * 0.0
    total += score / score.sum(-1, keepdims=True)
  return total


@pytest.mark.parametrize('tasks', [1, 2])
def test_the_mask_is_that_of_its_equations(tasks):
  with jax.enable_x64(True):  # of second differences float32 leaves little
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), START)
    mask = variants.saliency(
        [lambda p, t=t: (1 + t) * value_fn(p) for t in range(tasks)], params,
        KEY, share=1 / 3, num_samples=12, eps=EPS, alpha=0.5)
  want = scores(12, 0.5, 0.0, tasks)
  assert mask['b'] is True  # no matrix
  assert np.array_equal(mask['w'], want >= np.sort(want, -1)[:, -2:-1])
  assert np.all(np.sum(mask['w'], -1) == 2)


def test_many_directions_find_the_weights_that_matter():
  """Those with a gradient; of 500 directions for 27 elements."""
  mask = variants.saliency([value_fn], START, KEY, share=1 / 3, eps=0.1,
                           num_samples=500)
  gain = CURVE * GOAL**2
  best = gain >= np.sort(gain, -1)[:, -2:-1]
  real = gain > 0
  assert np.mean(np.asarray(mask['w'])[best & real]) > 0.8


def test_the_rest_is_neither_perturbed_nor_moved():
  """And what is chosen makes 20 steps of MeZO, in NumPy."""
  mask = variants.saliency([value_fn], START, KEY, share=0.5, eps=EPS)
  m = np.asarray(mask['w'])
  assert m.sum(-1).tolist() == [3] * 4

  def watched(params, batch):
    touched = jnp.any(jnp.where(m, False, params['w'] != 0.0))
    return jnp.where(touched, jnp.nan, value_fn(params))
  tx = whole.mazo(RATE, EPS, key=KEY, mask=mask)
  step, params = make_step(tx, watched), jax.tree.map(jnp.copy, START)
  state = tx.init(params)
  theta = {k: np.zeros(x.shape) for k, x in START.items()}
  loss = lambda p: np.sum(CURVE * (p['w'] - GOAL) ** 2) / 2 + np.sum(
      (p['b'] - 1.0) ** 2)
  for t in range(20):
    z = direction(START, noise.direction_key(KEY, t))
    z['w'] = z['w'] * m
    at = lambda s, theta=theta, z=z: loss(
        {k: theta[k] + s * EPS * z[k] for k in z})
    g = (at(1) - at(-1)) / (2 * EPS)
    theta = {k: theta[k] - RATE * g * z[k] for k in z}
    params, state, metrics = step(params, state, jnp.zeros(1))
  assert metrics['skipped'] == 0
  for k in theta:
    np.testing.assert_allclose(params[k], theta[k], rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_scores_are_those_of_each_layer_and_row():
  """Whatever part of a leaf is scored at once: stacks, three axes, many rows.
  """
  params = jax.tree.map(lambda s: jax.random.normal(KEY, s), {
      'layers': {'w': (2, 6, 3, 8)}, 'head': (60, 8), 'b': (8,)},
                        is_leaf=lambda x: isinstance(x, tuple))
  pull = jax.tree.map(lambda x: jnp.flip(x, 0), params)
  loss = lambda p: sum(jnp.sum(jnp.sin(x) * c) for x, c in zip(
      jax.tree.leaves(p), jax.tree.leaves(pull)))
  made = lambda: variants.saliency([loss], params, KEY, share=0.25,
                                   num_samples=5, eps=0.1)
  whole = made()
  assert jax.tree.map(jnp.shape, whole) == jax.tree.map(
      jnp.shape, params) | {'b': ()}
  with pytest.MonkeyPatch.context() as m:
    m.setattr(sys.modules['mezo_jax.variants.mazo'], '_PART', 40)
    parts = made()
  helpers.assert_bitwise(parts, whole)
  for mask in (whole['layers']['w'], whole['head']):
    assert np.all(np.sum(mask, -1) == 2)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.as_shipped
def test_scoring_keeps_nothing_of_the_weights_size_but_the_mask():
  """135 million float32 parameters, two tasks."""
  config = helpers.tiny_config(
      vocab_size=49152, width=576, ff_width=1536, num_layers=30, num_heads=9,
      num_kv_heads=3, head_width=64)
  model, params = models.Transformer(config), models.param_shapes(config)
  size = sum(4 * x.size for x in jax.tree.leaves(params))
  loss = helpers.lm_loss(model)
  ids = jnp.zeros((4, 16), jnp.int32)
  memory = jax.jit(lambda p: variants.saliency(
      [lambda p: loss(p, ids)] * 2, p, 0, num_samples=4)).lower(
          params).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.1 * size
  assert memory.output_size_in_bytes < 0.26 * size  # a byte an element


def test_the_mask_is_what_the_state_has():
  """So a checkpoint has it, and programs do not."""
  mask = variants.saliency([value_fn], START, KEY, share=0.5, eps=EPS)
  tx = whole.mazo(RATE, EPS, key=KEY, mask=mask)
  state = tx.init(START)
  (kept,) = optax.tree.get(state, 'memory')
  helpers.assert_bitwise(kept, mask['w'])
  step = jax.jit(lambda s: tx.update(None, s, START, value_fn=value_fn)[0])
  assert np.array_equal(step(state)['w'] != 0, mask['w'])
  other = optax.tree.set(state, memory=[~kept])
  assert np.array_equal(step(other)['w'] != 0, ~np.asarray(mask['w']))
  none = variants.no_scores(START)
  assert none['b'] is True and not none['w'].any()


def test_what_is_refused():
  for more, message in (
      (dict(directions=mezo_jax.Rademacher()), 'directions .*Normal'),
      (dict(directions=mezo_jax.Normal(mask={'w': jnp.ones((4, 6), bool),
                                             'b': True})), 'directions.*mask')):
    with pytest.raises(ValueError, match=message):
      variants.saliency([value_fn], START, KEY, **more)
  with pytest.raises(ValueError, match='QuantizedArray'):
    variants.saliency([value_fn], {'w': mezo_jax.quantize(
        jnp.ones((4, 32)), 8)}, KEY)
  with pytest.raises(ValueError, match='share .*0.0'):
    variants.saliency([value_fn], START, KEY, share=0.0)
  with pytest.raises(ValueError, match='mask'):
    whole.mazo(RATE, EPS, key=KEY, mask=None,
                  directions=mezo_jax.Normal(mask='w'))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_goes_on_with_the_mask_it_began_with(
    tiny_dir, reviews_file, tmp_path, capsys):
  """Which is that of the weights before training, and in its checkpoint."""
  config = lambda steps: runs.small_config(
      tiny_dir, reviews_file, method='mazo', steps=steps, eval_every=2,
      checkpoint_every=2, zero_shot=False, peft__method='lora', peft__rank=4,
      optimizer__learning_rate=1e-2, variant__share=0.5, variant__num_scores=4)
  train.run(config(4), tmp_path / 'whole')
  train.run(config(2), tmp_path / 'part')
  assert 'scoring pass' in capsys.readouterr().out
  train.run(config(4), tmp_path / 'part')
  assert 'scoring pass' not in capsys.readouterr().out
  whole = runs.saved(tmp_path / 'whole')[1]
  helpers.assert_bitwise(runs.saved(tmp_path / 'part')[1], whole)
  b = np.asarray(whole['layers']['attn']['q']['lora_b'])  # began as 0
  assert np.all((b != 0).sum(-1) == b.shape[-1] // 2)
