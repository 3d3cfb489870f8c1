"""Weights as integer codes: what they stand for, where they are consumed, how
they move, and what a run with them is."""

import dataclasses

from estimators import whole
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mezo_jax
from mezo_jax import Displacement, make_step, models
from mezo_jax.core import paths
from mezo_jax.directions import displacement, streams
from mezo_jax.directions import noise as noise_lib
from mezo_jax.transforms import stochastic_rounding

KEY = jax.random.key(5)


def coded(params, bits=8):
  """Matrices as codes; embeddings share scales along their last axis."""
  return paths.map_named(lambda path, x: mezo_jax.quantize(
      x, bits, -1 if 'embed' in path else -2) if path.endswith(
          ('a', 'kernel', 'embedding')) else x, params)


@pytest.fixture(scope='module')
def tiny():
  return helpers.tiny_model(vocab_size=96, width=64, ff_width=128)


# --- what they stand for ----------------------------------------------------


@pytest.mark.parametrize('bits, axis', [(8, 0), (4, 0), (8, 2), (4, 1)])
def test_codes_are_the_nearest_on_their_grid(bits, axis):
  """By NumPy, with a scale for each 32 weights, or for all of an axis."""
  w = np.random.RandomState(0).normal(size=(64, 32, 6)).astype(np.float32)
  x = mezo_jax.quantize(w, bits, axis)
  got = np.asarray(mezo_jax.dequantize({'w': x})['w'])
  runs_ = np.moveaxis(w, axis, -1)
  n = 32 if runs_.shape[-1] % 32 == 0 else runs_.shape[-1]
  runs_ = runs_.reshape(*runs_.shape[:-1], -1, n)
  if bits == 8:
    step = np.abs(runs_).max(-1, keepdims=True) / 127
  else:
    step = np.ptp(runs_, axis=-1, keepdims=True) / 15
  error = np.moveaxis(got - w, axis, -1).reshape(runs_.shape)
  # Half a step, and float16's rounding of scales and offsets.
  assert np.all(np.abs(error) < 0.5 * step + 4e-3 * np.abs(runs_).max())
  assert x.nbytes / w.nbytes < (0.3 if bits == 8 else 0.2) or n < 32
  assert x.shape == w.shape and len(x) == 64


def uses(p, ids):
  """Each way to read a weight: rows, a transpose, runs, heads, a scan."""
  x = p['embed'][ids]
  def layer(x, w):
    heads = jnp.einsum('bsd,hdk->bshk', x, w['kernel'].reshape(
        64, 4, 16).transpose(1, 0, 2))
    return jnp.tanh(heads.sum(2) @ w['kernel'][:16]), None
  x, _ = jax.lax.scan(layer, x, p['layers'])
  x = x @ p['other'][:64, 3:35] + x @ p['other'][5:69, :32]
  return jnp.sum(x @ p['embed'].T[:32]) + jnp.sum(p['other'][::3, 1:60:2])


@pytest.mark.slow
@pytest.mark.exhaustive_except(bits=[4])
@pytest.mark.as_shipped  # quick compilation rounds normal draws otherwise
@pytest.mark.parametrize('bits', [8, 4])
def test_however_they_are_read_they_are_the_same_weights(bits):
  w = lambda i, *shape, axis=-2: mezo_jax.quantize(
      jax.random.normal(jax.random.key(i), shape), bits, axis)
  p = {'embed': w(0, 96, 64, axis=-1), 'layers': {'kernel': w(1, 3, 64, 64)},
       'other': w(2, 96, 64)}
  dense, ids = mezo_jax.dequantize(p), jnp.array([[3, 90, 0], [7, 7, 1]])
  helpers.assert_close(jax.jit(mezo_jax.dequantized(uses))(p, ids),
                       jax.jit(uses)(dense, ids), rtol=2e-6)
  by = Displacement(jax.random.key(2), 0.1)
  for directions in (mezo_jax.Normal(), mezo_jax.LowRank(rank=2),
                     mezo_jax.Rademacher(mask='layers')):
    at = jax.jit(mezo_jax.perturbed(uses, directions))
    helpers.assert_close(at(p, by, ids), at(dense, by, ids), rtol=1e-5)


def test_a_row_beyond_the_last_is_not_a_number():
  w = mezo_jax.quantize(jnp.ones((40, 64)), 8, -1)
  look = mezo_jax.dequantized(lambda w, i: jnp.take(w, i, axis=0))
  found = look(w, jnp.array([39, 40]))
  assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


# --- how they move ----------------------------------------------------------


def value_fn(params, batch):
  h = jnp.tanh(batch['x'] @ params['a'])
  return jnp.mean((h @ params['b'] - batch['y']) ** 2, -1)


def small(bits):
  rng = np.random.RandomState(1)
  floats = {'a': rng.normal(size=(32, 6)), 'b': rng.normal(size=(6, 4))}
  batch = {'x': rng.normal(size=(8, 32)), 'y': rng.normal(size=(8, 4))}
  f32 = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
  return coded(f32(floats), bits), f32(batch)


@pytest.mark.slow
@pytest.mark.parametrize('bits', [8, 4])
def test_it_is_quzo(bits):
  """20 steps in NumPy, of integers, given the words of z and of roundings."""
  rate, eps = 3e-3, 2e-2
  params, batch = small(bits)
  tx = whole.quzo(rate, eps, key=KEY)
  step, state = make_step(tx, value_fn), tx.init(params)

  wide = lambda x: np.repeat(np.asarray(x, np.float64), 32, 0)
  q = np.asarray(params['a'].integers(), np.int64)
  s = wide(params['a'].scales)
  o = 0.0 if bits == 8 else wide(params['a'].offsets)
  low, high = (-127, 127) if bits == 8 else (0, 15)
  b = np.asarray(params['b'], np.float64)
  x, y = (np.asarray(batch[k], np.float64) for k in 'xy')
  def loss(q, b):
    return np.mean((np.tanh(x @ (s * q + o)) @ b - y) ** 2)
  def rounded(x, words):
    up = (np.asarray(words) >> 8) * 2.0**-24
    return np.sign(x) * np.floor(np.abs(x) + up)
  def words(key):
    return noise_lib.words(streams.of_leaf(key, 'a', (32, 6)), 0,
                        jnp.zeros((32, 6)), 'rounding')

  like, moved = {'a': jnp.zeros((32, 6)), 'b': jnp.zeros((6, 4))}, 0
  for t in range(20):
    key = noise_lib.direction_key(KEY, t)
    z = mezo_jax.direction(like, Displacement(key, 1.0))
    za, zb = (np.asarray(z[k], np.float64) for k in 'ab')
    stream = streams.of_leaf(key[None], 'a', (32, 6))
    first = noise_lib.words(
        dataclasses.replace(stream, keys=stream.keys ^ displacement._ROUNDED),
        0, jnp.zeros((32, 6)), 'rounding')
    second = words(noise_lib.direction_key(
        KEY, t, stochastic_rounding._SAMPLE)[None])
    u = rounded(eps * za / s, first)
    g = (loss(q + u, b + eps * zb) - loss(q - u, b - eps * zb)) / (2 * eps)
    new = np.clip(q - rounded(rate * g * za / s, second), low, high)
    moved, q = moved + np.sum(new != q), new
    b = b - rate * g * zb
    params, state, metrics = step(params, state, batch)
    np.testing.assert_allclose(metrics['projected_grad'][0], g, rtol=2e-3)
  got = np.asarray(params['a'].integers())
  assert moved > 200  # codes did move
  # A product next to where a rounding turns may be rounded otherwise.
  assert np.mean(got != q) < 0.02 and np.abs(got - q).max() <= 1
  np.testing.assert_allclose(params['b'], b, rtol=1e-3, atol=1e-4)
  assert params['a'].codes.dtype == (jnp.int8 if bits == 8 else jnp.uint8)


@pytest.mark.parametrize('bits', [8, 4])
def test_updates_are_right_on_average_and_stay_on_the_grid(bits):
  """Over 400 sets of bits; towards the ends of the grid nothing goes on."""
  w = mezo_jax.quantize(jnp.linspace(-1, 1, 64 * 4).reshape(64, 4), bits)
  update = 0.3 * jnp.sin(jnp.arange(256.0)).reshape(64, 4) * (
      w.scales.max().astype(jnp.float32))
  tx = mezo_jax.round_stochastically(KEY)

  def moved(i):
    state = tx.init(w)._replace(count=i)
    u, _ = tx.update(update, state, w)
    return optax.apply_updates(w, u).integers()
  q = np.asarray(jax.jit(lambda n: jax.lax.map(moved, n))(
      jnp.arange(400)), np.float64)
  low, high = (-127, 127) if bits == 8 else (0, 15)
  assert q.min() >= low and q.max() <= high
  before = np.asarray(w.integers())
  inside = (before > low) & (before < high)
  scale = np.repeat(np.asarray(w.scales, np.float64), 32, 0)
  change = (q - before) * scale
  error = change.mean(0) - np.asarray(update)
  bound = 5 * scale * np.sqrt(0.25 / 400)
  assert np.all(np.abs(error)[inside] < bound[inside])
  assert np.mean(np.std(change, 0) > 0) > 0.5


@pytest.mark.slow
def test_both_roundings_are_independent():
  """Of one z: what evaluation and update add to it by chance is unrelated."""
  shape = (256, 64)
  w = mezo_jax.quantize(jax.random.normal(KEY, shape), 4)
  directions = mezo_jax.Normal(on_grid=True)
  c = 0.3 * float(w.scales.astype(jnp.float32).mean())
  at = mezo_jax.perturbed(lambda w: jnp.eye(256) @ w, directions)
  key = noise_lib.direction_key(KEY, 0)
  z = np.asarray(mezo_jax.direction(w, Displacement(key, 1.0), directions))
  plus = np.asarray(at(w, Displacement(key, c)))
  minus = np.asarray(at(w, Displacement(key, -c)))
  clean = np.asarray(w.astype(jnp.float32))
  scale = np.repeat(np.asarray(w.scales, np.float32), 32, 0)
  np.testing.assert_allclose(plus - clean, clean - minus, atol=1e-6)
  steps = (plus - clean) / scale
  np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
  first = steps - c * z / scale
  tx = mezo_jax.round_stochastically(KEY)
  u, _ = tx.update(jnp.asarray(c * z), tx.init(w), w)
  moved = np.asarray(optax.apply_updates(w, u).integers() - w.integers())
  second = moved - c * z / scale
  q = np.asarray(w.integers())
  inside = (q > 3) & (q < 12)  # the grid does not end there
  for x in (first, first * z, second, second * z, first * second):
    x = x[inside]
    assert abs(np.mean(x)) < 5 * x.std() / np.sqrt(len(x))
  assert min(first[inside].std(), second[inside].std()) > 0.1


def test_what_is_refused():
  floats = {'w': jnp.ones((64, 4))}
  with pytest.raises(ValueError, match='quzo .*mezo_jax.QuantizedArray'):
    whole.quzo(1e-3, key=0).init(floats)
  with pytest.raises(ValueError, match='low rank'):
    whole.quzo(1e-3, key=0, directions='low_rank')
  with pytest.raises(ValueError, match='bits .*3'):
    mezo_jax.quantize(floats['w'], 3)
  with pytest.raises(ValueError, match=r'bits=4 .*\[5, 4\]'):
    mezo_jax.quantize(jnp.ones((5, 4)), 4)


# --- the laws of the house --------------------------------------------------


def run(tx, params, batch, loss_fn, steps=4):
  step, state, pairs = make_step(tx, loss_fn), tx.init(params), []
  params = jax.tree.map(jnp.copy, params)
  for _ in range(steps):
    params, state, metrics = step(params, state, batch)
    pairs.append(metrics['projected_grad'])
  return params, state, pairs, step


@pytest.mark.slow
@pytest.mark.exhaustive_except(bits=[8])
@pytest.mark.parametrize('bits', [8, 4])
def test_replay_masks_and_losses_that_are_not_finite(tiny, bits):
  model, floats, ids = tiny
  params = coded(floats, bits)
  loss_fn = lambda p, batch: jnp.where(
      batch['bad'], jnp.nan, helpers.lm_loss(model)(p, batch['ids']))
  batch = {'ids': ids, 'bad': jnp.bool_(False)}
  tx = whole.quzo(1e-2, 1e-2, key=0,
                     directions=mezo_jax.Normal(mask='attn/(q|v)'))
  moved, state, pairs, step = run(tx, params, batch, loss_fn)
  again, fresh = jax.tree.map(jnp.copy, params), tx.init(params)
  for g in pairs:
    again, fresh, _ = step.update(again, fresh, g)
  helpers.assert_bitwise(again, moved)
  for (path, x), (_, y) in zip(paths.named_leaves(moved),
                               paths.named_leaves(params)):
    same = [bool(jnp.all(a == b)) for a, b in zip(
        jax.tree.leaves(x), jax.tree.leaves(y))]
    trained = 'attn/q' in path or 'attn/v' in path
    assert all(same) != trained, path
    assert not trained or same[1:] == [True] * (len(same) - 1)  # codes alone

  before = jax.tree.map(jnp.copy, moved)
  with helpers.compilations() as seen:
    moved, state, metrics = step(
        moved, state, batch | {'bad': jnp.bool_(True)})
  helpers.assert_bitwise(moved, before)
  assert metrics['skipped'] == 1 and not seen


@pytest.mark.slow
def test_the_mesh_changes_nothing(tiny):
  """QuantizedArray, scales and their update, split over eight devices."""
  model, floats, ids = tiny
  params = coded(floats)
  loss_fn = helpers.lm_loss(model)
  tx = whole.quzo(1e-2, 1e-2, key=0)
  want, _, pairs, _ = run(tx, params, ids, loss_fn, 2)
  mesh = helpers.mesh_of(2, 4)
  def place(path, x):
    spec = jax.P(*(None,) * (x.ndim - 1), 'fsdp') if (
        x.ndim > 1 and x.shape[-1] % 4 == 0) else jax.P()
    return jax.device_put(x, jax.NamedSharding(mesh, spec))
  split = paths.map_named(
      lambda path, x: jax.tree.map(lambda a: place(path, a), x), params)
  step = make_step(tx, loss_fn, mesh=mesh)
  state = tx.init(split)
  for g in pairs:
    split, state, _ = step.update(split, state, g)
  helpers.assert_bitwise(split, want)
  _, _, metrics = step(split, state, ids)
  assert np.isfinite(metrics['loss'])


@pytest.mark.slow
def test_pending_updates_are_rounded_once():
  """k updates that are kept and added together move as far, with less noise:
  the residual of the rounding is carried, exactly."""
  w = mezo_jax.quantize(jax.random.normal(KEY, (256, 64)))
  size = float(w.scales.astype(jnp.float32).mean())
  errors = {}
  for k in (1, 16):
    tx = mezo_jax.mezo(1.0, 1e-3, key=0, apply_every=k)
    params = jax.tree.map(jnp.copy, w)
    step, state = make_step(tx, None), tx.init(params)
    for _ in range(16):
      params, state, _ = step.update(
          params, state, jnp.full(1, 0.05 * size))
    exact = sum(mezo_jax.direction(
        jnp.zeros(w.shape), Displacement(noise_lib.direction_key(
            jax.random.key(0), t), -0.05 * size)) for t in range(16))
    errors[k] = float(jnp.std(
        params.astype(jnp.float32) - w.astype(jnp.float32) - exact))
  assert errors[16] < 0.6 * errors[1]


@pytest.mark.slow_except(bits=[8])
@pytest.mark.parametrize('bits', [8, 4])
def test_weights_decay_on_their_grid(bits):
  """By eta * lambda of what they are, within 5 standard errors."""
  w = mezo_jax.quantize(jax.random.normal(KEY, (256, 64)), bits)
  tx = mezo_jax.mezo(0.1, key=0, weight_decay=0.5, decay=lambda p: True)
  step = make_step(tx, None)
  old = np.asarray(w.astype(jnp.float32))
  new, _, _ = step.update(jax.tree.map(jnp.copy, w), tx.init(w), jnp.zeros(1))
  moved = np.asarray(new.astype(jnp.float32)) - old
  share = np.vdot(moved, old) / np.vdot(old, old)
  noise = np.std(moved - share * old) / np.linalg.norm(old)
  assert noise < 1e-3 and abs(share + 0.05) < 5 * noise


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.as_shipped
@pytest.mark.parametrize('dtype, most', [('int8', 0.3), ('int4', 0.21)])
def test_memory_is_that_of_quantised_inference(dtype, most):
  """SmolLM2's shape: a step's losses over float32 inference, activations and
  all; and its update, which is in place."""
  config = helpers.tiny_config(
      vocab_size=49152, width=576, ff_width=1536, num_layers=30, num_heads=9,
      num_kv_heads=3, head_width=64)
  model = models.Transformer(config)
  ids = jax.ShapeDtypeStruct((4, 16), jnp.int32)
  def loss_fn(params, ids):
    logits = model.apply({'params': params}, ids, token_ids=jnp.arange(2),
                         answer_at=jnp.full((4, 1), 15))
    return jnp.mean(logits ** 2)
  def peak(compiled):
    m = compiled.memory_analysis()
    return (m.argument_size_in_bytes + m.output_size_in_bytes
            - m.alias_size_in_bytes + m.temp_size_in_bytes)
  floats = models.param_shapes(config)
  inference = peak(jax.jit(loss_fn).lower(floats, ids).compile())
  params = models.param_shapes(config, dtype=dtype)
  tx = whole.quzo(1e-3, key=0)
  step = make_step(tx, loss_fn)
  losses, update = (peak(program.compile()) for program in step.lower(
      params, jax.eval_shape(tx.init, params), ids))
  assert losses < most * inference
  assert update < (0.27 if dtype == 'int8' else 0.18) * inference


def test_rows_are_counted_from_the_end_too():
  w = mezo_jax.quantize(jnp.arange(96.0).reshape(3, 32), axis=-1)
  rows = w.astype(jnp.float32)
  helpers.assert_bitwise(w[-1], rows[-1])
  helpers.assert_bitwise(w[np.array([-1, 0])], rows[np.array([-1, 0])])
