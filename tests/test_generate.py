"""Decoding: the cache, draws, stops, perturbed weights, the real model."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mezo_jax
from mezo_jax import models
from mezo_jax.tasks import quickstart_data


@pytest.fixture(scope='module')
def tiny():
  """A model whose next-token probabilities are far from uniform."""
  model, params, ids = helpers.tiny_model(window=3, local_layers=(
      True, False, True))
  return model, jax.tree.map(lambda x: 4 * x, params), ids


@pytest.mark.slow
def test_a_cache_changes_nothing(tiny):
  """Logits of 12 tokens in pieces of 5, 4, 1, 1 and 1, with left padding."""
  model, params, ids = tiny
  mask = (np.arange(12) >= np.array([[0], [3], [1], [4]])).astype(np.int32)
  apply, at = helpers.quick_jit(model.apply), 0
  want = np.asarray(apply({'params': params}, ids, mask))
  room = np.concatenate([mask, np.ones((4, 3), np.int32)], 1)
  cache = models.make_cache(model.config, 4, 15, jnp.float32)
  for n in (5, 4, 1, 1, 1):
    got, cache = apply({'params': params}, ids[:, at:at + n], room, cache=cache)
    seen = mask[:, at:at + n] == 1
    np.testing.assert_allclose(
        np.asarray(got)[seen], want[:, at:at + n][seen], rtol=1e-4, atol=1e-5)
    at += n
  assert cache.length == 12


@pytest.mark.slow
@pytest.mark.exhaustive
def test_draws_follow_the_softmax(tiny):
  """Frequencies of 8,000 first tokens within 5 standard errors."""
  model, params, ids = tiny
  n, apply = 8_000, helpers.quick_jit(model.apply)
  logits = apply({'params': params}, ids[:1])[0, -1]
  for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0),
                                    (1.0, 0, 0.6), (1.5, 8, 0.8)):
    p = np.asarray(jax.nn.softmax(logits / temperature), np.float64)
    order = np.argsort(-p)
    kept = order[:top_k or None]
    q = p[kept] / p[kept].sum()
    kept = kept[:np.searchsorted(np.cumsum(q), top_p) + 1]
    want = np.zeros_like(p)
    want[kept] = p[kept] / p[kept].sum()
    drawn = np.asarray(models.generate(
        model, params, np.repeat(ids[:1], n, 0), max_new_tokens=1,
        temperature=temperature, top_k=top_k, top_p=top_p,
        key=jax.random.key(1)))
    got = np.bincount(drawn[:, 0], minlength=len(p)) / n
    assert (got[want == 0] == 0).all()
    error = np.sqrt(want * (1 - want) / n) + 1e-9
    assert np.max(np.abs(got - want) / error) < 5
    assert 1 < len(kept) <= len(p)


@pytest.mark.slow
def test_rows_draw_on_their_own_and_keys_repeat(tiny):
  model, params, ids = tiny
  draw = lambda seed: np.asarray(models.generate(
      model, params, np.repeat(ids[:1], 8, 0), max_new_tokens=10,
      temperature=1.0, key=jax.random.key(seed)))
  np.testing.assert_array_equal(draw(0), draw(0))
  assert len({tuple(row) for row in draw(0)}) == 8
  assert (draw(0) != draw(1)).any()
  cold = models.generate(model, params, ids, max_new_tokens=10,
                         temperature=1e-4, key=jax.random.key(0))
  np.testing.assert_array_equal(
      cold, models.generate(model, params, ids, max_new_tokens=10))


@pytest.mark.slow
def test_stops(tiny):
  """The stop token is part of the row; after it there is only padding."""
  model, params, ids = tiny
  free = np.asarray(models.generate(model, params, ids, max_new_tokens=12))
  stop_ids = (int(free[0, 3]), int(free[2, 0]))
  got = np.asarray(models.generate(
      model, params, ids, max_new_tokens=12, stop_ids=stop_ids, pad_id=63))
  for row, unstopped in zip(got, free):
    ends = np.flatnonzero(np.isin(unstopped, stop_ids))
    n = ends[0] + 1 if len(ends) else 12
    np.testing.assert_array_equal(row[:n], unstopped[:n])
    assert (row[n:] == 63).all()


@pytest.mark.slow
def test_rows_whose_logits_are_not_finite_are_told(tiny):
  model, params, ids = tiny
  run = lambda p: models.generate(model, p, ids, max_new_tokens=4, check=True)
  tokens, finite = run(params)
  np.testing.assert_array_equal(
      tokens, models.generate(model, params, ids, max_new_tokens=4))
  assert finite.all()
  assert not run(jax.tree.map(lambda x: x * jnp.nan, params))[1].any()


@pytest.mark.slow
def test_perturbed_generation_is_that_of_built_weights(tiny):
  model, params, ids = tiny
  step = mezo_jax.Displacement(jax.random.key(5), 0.3)
  run = lambda p: models.generate(model, p, ids, max_new_tokens=10)
  got = helpers.quick_jit(
      lambda p: mezo_jax.perturbed(run)(p, step))(params)
  built = helpers.quick_jit(lambda p: mezo_jax.displace(p, step))(params)
  np.testing.assert_array_equal(got, run(built))
  assert (np.asarray(got) != np.asarray(run(params))).any()


def test_one_program_for_prompts_of_one_shape(tiny):
  model, params, ids = tiny
  run = lambda ids, seed: models.generate(
      model, params, ids, max_new_tokens=7, temperature=0.5 + seed,
      key=jax.random.key(seed), pad_id=1)
  run(ids, 0)
  with helpers.compilations() as seen:
    run(ids[::-1], 1)
  assert len(seen) <= 1  # ids[::-1] itself


@pytest.mark.parametrize('kwargs,message', [
    (dict(max_new_tokens=60), 'max_new_tokens=60 .* 64'),
    (dict(max_new_tokens=0), 'max_new_tokens'),
    (dict(max_new_tokens=2, temperature=1.0), 'temperature.* key'),
    (dict(max_new_tokens=2, temperature=-1.0), 'temperature=-1.0'),
    (dict(max_new_tokens=2, top_p=0.0), 'top_p=0.0'),
    (dict(max_new_tokens=2, attention_mask=np.tril(np.ones((4, 12)))),
     'padding.*left')])
def test_what_cannot_be_generated(tiny, kwargs, message):
  model, params, ids = tiny
  with pytest.raises(ValueError, match=message):
    models.generate(model, params, ids, **kwargs)
  masked = models.Transformer(helpers.tiny_config(causal=False))
  with pytest.raises(ValueError, match='masked model'):
    models.generate(masked, params, ids, max_new_tokens=2)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_real_model_out_and_in_and_its_english(tmp_path):
  """SmolLM2-135M from GGUF, and from the safetensors that we write of it."""
  if not quickstart_data.model_path(fetch=False):
    pytest.skip('the quickstart model is not in the cache')
  path = quickstart_data.model_path()
  model, params = models.load(path, dtype='float32', progress=False)
  tokenizer = models.load_tokenizer(path)
  models.save(tmp_path / 'm', model, params, tokenizer=tokenizer,
              max_shard_bytes=200 * 2**20, progress=False)
  again, back = models.load(tmp_path / 'm', progress=False)
  helpers.assert_bitwise(params, back)
  assert again.config == model.config
  tokenizer = models.load_tokenizer(tmp_path / 'm')
  tokenizer.padding_side = 'left'
  prompts = tokenizer(['The capital of France is',
                       'Once upon a time, there was a little'],
                      padding=True, return_tensors='np')
  out = np.asarray(models.generate(
      again, back, prompts['input_ids'], prompts['attention_mask'],
      max_new_tokens=12, stop_ids=[tokenizer.eos_token_id]))
  first, second = tokenizer.batch_decode(out)
  assert first.startswith(' Paris.')
  assert second.startswith(' girl named')
