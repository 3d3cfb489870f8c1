"""Tests which arguments the functions of `mezo_jax.models` take or refuse."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mezo_jax
from mezo_jax import models, peft

LENGTH = 16
LEARNED = dict(rope=None, norm='layer', max_length=LENGTH)
POSITIONS = dict(opt=dict(family='opt', position_offset=2, **LEARNED),
                 gpt2=dict(family='gpt2', **LEARNED))
MASKED = dict(family='bert', causal=False, token_types=2, masked_head=True,
              **LEARNED)


@functools.cache
def tiny(**changes):
  model, params, _ = helpers.tiny_model(num_layers=1, **changes)
  return model, params


def ids_with(token, at=1):
  ids = np.full((2, 6), 7)
  ids[1, at] = token
  return ids


# --- tokens that the model does not have ------------------------------------


@pytest.mark.parametrize('token', [64, 1000, -1, -100, 2**32 + 3])
def test_known_tokens_are_refused(token):
  model, params = tiny()
  ids = ids_with(token)
  with pytest.raises(ValueError, match=f'input_ids has {token}.* 0 to 63'):
    model.apply({'params': params}, ids)
  with pytest.raises(ValueError, match=f'input_ids has {token}'):
    models.generate(model, params, ids, max_new_tokens=2)
  with pytest.raises(ValueError, match=f'targets has {token}'):
    model.apply({'params': params}, ids_with(7), targets=ids)
  with pytest.raises(ValueError, match=f'token_ids has {token}'):
    model.apply({'params': params}, ids_with(7), token_ids=[3, token])
  with pytest.raises(ValueError, match=f'input_ids has {token}'):  # closed over
    jax.jit(lambda p: model.apply({'params': p}, ids))(params)


@pytest.mark.slow
@pytest.mark.exhaustive_except(token=[64])
@pytest.mark.parametrize('token', [64, -1])
def test_tokens_given_to_a_program_make_nan(token):
  """In the row that has one, and with perturbed weights too; what is right is
  bitwise what it was."""
  model, params = tiny()
  good, bad = jnp.asarray(ids_with(7)), jnp.asarray(ids_with(token))
  at = mezo_jax.Displacement(jax.random.key(0), 0.1)
  for run in (
      lambda p, ids: model.apply({'params': p}, ids),
      lambda p, ids: mezo_jax.perturbed(lambda p: model.apply(
          {'params': p}, ids))(p, at)):
    run = helpers.quick_jit(run)
    want, got = np.asarray(run(params, good)), np.asarray(run(params, bad))
    assert np.isnan(got[1]).any() and np.isnan(got[1, 1:]).all()
    helpers.assert_bitwise(got[0], want[0])
    assert np.isfinite(want).all()
  run = helpers.quick_jit(lambda p, ids: model.apply(
      {'params': p}, good, targets=ids))
  got = np.asarray(run(params, bad))
  assert np.isnan(got[1, 1]) and np.isnan(got).sum() == 1
  run = helpers.quick_jit(lambda p, ids: model.apply(
      {'params': p}, good, token_ids=ids))
  got = np.asarray(run(params, jnp.array([token, 5])))
  assert np.isnan(got[..., 0]).all() and np.isfinite(got[..., 1]).all()
  tokens, finite = jax.jit(lambda p, ids: models.generate(
      model, p, ids, max_new_tokens=2, check=True))(params, bad)
  assert [*finite] == [True, False]


@pytest.mark.slow
def test_soft_tokens_are_tokens():
  model, params = tiny()
  params = params | peft.prefix.init_prompt(
      model, params, jax.random.key(0), num_tokens=3)
  ids = ids_with(66)
  assert np.isfinite(model.apply({'params': params}, ids)).all()
  run = helpers.quick_jit(model.apply)
  assert np.isfinite(run({'params': params}, ids)).all()
  assert np.isnan(run({'params': params}, ids + 1)[1]).any()
  with pytest.raises(ValueError, match='input_ids has 67'):
    model.apply({'params': params}, ids + 1)
  models.generate(model, params, ids, max_new_tokens=2)


def test_token_types():
  model, params = tiny(**MASKED)
  good, run = ids_with(7), helpers.quick_jit(
      lambda p, types: model.apply({'params': p}, good, token_type_ids=types))
  assert np.isfinite(run(params, jnp.asarray(ids_with(1) % 2))).all()
  assert np.isnan(run(params, jnp.asarray(ids_with(2) % 7))[1]).any()
  for wrong in (2, -1):
    with pytest.raises(ValueError, match=f'token_type_ids has {wrong}'):
      model.apply({'params': params}, good, token_type_ids=ids_with(wrong) * (
          ids_with(wrong) != 7))
  with pytest.raises(ValueError, match='llama .*token_type_ids'):
    tiny()[0].apply({'params': tiny()[1]}, good, token_type_ids=0 * good)


# --- positions that it does not have ----------------------------------------


@pytest.mark.slow_except(family=['opt'])
@pytest.mark.parametrize('family', POSITIONS)
def test_positions_beyond_the_table(family):
  model, params = tiny(**POSITIONS[family])
  long = np.full((1, LENGTH + 1), 7)
  with pytest.raises(ValueError, match='17 .* 16 positions'):
    model.apply({'params': params}, long)
  with pytest.raises(ValueError, match='max_new_tokens=2 .* 16 positions'):
    models.generate(model, params, long[:, :-2], max_new_tokens=2)
  models.generate(model, params, long[:, :-2], max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_texts_that_share_a_prompt_and_are_too_long():
  """20 tokens in a row: with its prompt each text fits, or one does not."""
  model, params = tiny(**POSITIONS['opt'])
  ids = jnp.full((1, 24), 7)
  row = lambda *lengths: np.repeat(
      [*range(1, len(lengths)), 0], lengths)[None]
  fits, long = row(10, 6, 4, 4), row(10, 8, 2, 4)
  padded = row(4, 2, 1, 17)  # of padding the positions do not matter
  run = helpers.quick_jit(lambda p, mask: model.apply(
      {'params': p}, ids, mask, shared_prompt=True))
  for mask in (fits, padded):
    got = np.asarray(run(params, mask))[mask > 0]
    assert np.isfinite(got).all()
    model.apply({'params': params}, ids, mask, shared_prompt=True)
  assert np.isnan(run(params, long)).any()
  with pytest.raises(ValueError, match='16 positions'):
    model.apply({'params': params}, ids, long, shared_prompt=True)


@pytest.mark.slow
def test_a_cache_that_is_full():
  model, params = tiny()
  ids = jnp.full((1, 3), 7)
  step = lambda cache: model.apply({'params': params}, ids, cache=cache)
  _, cache = step(models.make_cache(model.config, 1, 5, jnp.float32))
  with pytest.raises(ValueError, match='cache .* 3 .* 5'):
    step(cache)
  assert np.isnan(helpers.quick_jit(step)(cache)[0]).all()


# --- whatever jax takes -----------------------------------------------------


IDS, MASK = np.arange(10).reshape(2, 5), np.array([[0, 1, 1, 1, 1], [1] * 5])


@pytest.mark.slow
@pytest.mark.parametrize('kind,of_mask', [
    (np.int64, np.int64), (np.uint8, bool), (np.int32, np.float32),
    (jnp.asarray, lambda x: jnp.asarray(x, bool)),
    (np.ndarray.tolist, np.ndarray.tolist),
    (lambda x: tuple(map(tuple, x)), jnp.asarray)])
def test_arrays_of_any_kind(kind, of_mask):
  model, params = tiny()
  want, tokens = expected()
  as_ = lambda f, x: x.astype(f) if isinstance(f, type) else f(x)
  ids, mask = as_(kind, IDS), as_(of_mask, MASK)
  helpers.assert_bitwise(model.apply({'params': params}, ids, mask), want)
  helpers.assert_bitwise(
      models.generate(model, params, ids, mask, max_new_tokens=3), tokens)


@functools.cache
def expected():
  model, params = tiny()
  return (model.apply({'params': params}, jnp.asarray(IDS), jnp.asarray(MASK)),
          models.generate(model, params, jnp.asarray(IDS), jnp.asarray(MASK),
                          max_new_tokens=3))


@pytest.mark.parametrize('given', ['ids', 'mask', 'both', 'none', 'made'])
@pytest.mark.slow_except(given=['ids'])
@pytest.mark.exhaustive_except(given=['ids', 'none'])
def test_generate_within_a_program(given):
  """Ids, a mask, both or neither of which are the program's arguments."""
  model, params = tiny()
  ids, mask = jnp.asarray(IDS), jnp.asarray(MASK)
  run = functools.partial(models.generate, model, max_new_tokens=3)
  got = {
      'ids': lambda: jax.jit(lambda p, x: run(p, x, mask))(params, ids),
      'mask': lambda: jax.jit(lambda p, m: run(p, ids, m))(params, mask),
      'both': lambda: jax.jit(run)(params, ids, mask),
      'none': lambda: jax.jit(lambda p: run(p, ids, mask))(params),
      'made': lambda: jax.jit(lambda p: run(
          p, ids, jnp.ones((2, 5)).at[0, 0].set(0)))(params)}[given]()
  helpers.assert_bitwise(got, expected()[1])
  with pytest.raises(ValueError, match='padding.*left'):
    jax.jit(lambda p: run(p, ids, MASK[:, ::-1]))(params)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_draws_within_a_program():
  """A temperature and a top_p may be its arguments, and 0 among them."""
  model, params = tiny()
  draw = lambda t, top_p, key=jax.random.key(1): models.generate(
      model, params, IDS, MASK, max_new_tokens=3, temperature=t, top_p=top_p,
      key=key)
  inside = jax.jit(draw)
  helpers.assert_bitwise(inside(0.9, 0.5), draw(0.9, 0.5))
  helpers.assert_bitwise(inside(0.0, 0.5), expected()[1])
  helpers.assert_bitwise(draw(np.float32(0.9), np.float64(0.5)),
                         draw(jnp.float32(0.9), jnp.float32(0.5)))
  helpers.assert_bitwise(draw(0.9, 0.5, 1), draw(0.9, 0.5))
  helpers.assert_bitwise(
      models.generate(model, params, IDS, MASK, max_new_tokens=np.int64(3),
                      pad_id=jnp.int32(0), stop_ids=np.array([63]), top_k=99),
      models.generate(model, params, IDS, MASK, max_new_tokens=3, stop_ids=63))


@pytest.mark.parametrize('change,error,message', [
    (dict(input_ids=IDS[0]), ValueError, r'input_ids .*\(5,\)'),
    (dict(input_ids=IDS[None]), ValueError, r'input_ids .*\(1, 2, 5\)'),
    (dict(input_ids=IDS[:, :0], attention_mask=None), ValueError, 'prompts'),
    (dict(input_ids=IDS / 1), TypeError, 'input_ids .*float64'),
    (dict(input_ids=IDS > 3), TypeError, 'input_ids .*bool'),
    (dict(attention_mask=MASK[:, 1:]), ValueError, r'_mask .*\(2, 4\)'),
    (dict(attention_mask=MASK[0]), ValueError, r'attention_mask .*\(5,\)'),
    (dict(attention_mask=MASK[:, None]), ValueError, r'_mask .*\(2, 1, 5\)'),
    (dict(attention_mask=MASK * -1e9), ValueError, 'attention_mask'),
    (dict(attention_mask=MASK / 2), ValueError, 'attention_mask'),
    (dict(attention_mask=MASK * 2), ValueError, 'attention_mask'),
    (dict(attention_mask=MASK * 0), ValueError, 'padding'),
    (dict(max_new_tokens=2.0), TypeError, 'max_new_tokens'),
    (dict(max_new_tokens=None), TypeError, 'max_new_tokens'),
    (dict(max_new_tokens=-1), ValueError, 'max_new_tokens is -1'),
    (dict(stop_ids=[None]), TypeError, 'stop_ids'),
    (dict(stop_ids=None), TypeError, 'stop_ids'),
    (dict(pad_id=None), TypeError, 'pad_id'),
    (dict(top_k=1.5), TypeError, 'top_k'),
    (dict(temperature=float('nan')), ValueError, 'temperature=nan'),
    (dict(temperature=float('inf')), ValueError, 'temperature=inf'),
    (dict(temperature=np.ones(2)), ValueError, 'temperature'),
    (dict(params={'params': {}}), ValueError, 'params .*embed')])
def test_what_is_refused(change, error, message):
  model, params = tiny()
  with pytest.raises(error, match=message):
    models.generate(**dict(
        model=model, params=params, input_ids=IDS, attention_mask=MASK,
        max_new_tokens=2, key=jax.random.key(0)) | change)


def test_numbers_that_a_program_would_have_to_know():
  model, params = tiny()
  for name in ('max_new_tokens', 'top_k', 'pad_id'):
    with pytest.raises(TypeError, match=name):
      jax.jit(lambda n, name=name: models.generate(
          model, params, IDS, **dict(max_new_tokens=2) | {name: n}))(2)


@pytest.mark.parametrize('change,message', [
    (dict(features='tail'), "features='tail'"),
    (dict(answer_at=[[5], [0]]), 'answer_at has 5'),
    (dict(answer_at=[[-6], [0]]), 'answer_at has -6'),
    (dict(answer_at=[1, 2]), r'answer_at .*\(2,\)'),
    (dict(targets=IDS[:1]), r'targets .*\(1, 5\)'),
    (dict(targets=IDS[:, 1:]), r'targets .*\(2, 4\)'),
    (dict(token_ids=3), r'token_ids .*\(\)'),
    (dict(attention_mask=MASK[:1, 1:]), r'attention_mask .*\(1, 4\)')])
def test_what_does_not_fit(change, message):
  model, params = tiny()
  with pytest.raises(ValueError, match=message):
    model.apply({'params': params}, IDS, **change)


@pytest.mark.parametrize('dtype', ['int32', np.int8, bool, 'float12', 5])
def test_what_is_no_dtype_of_weights(dtype, tiny_dir):
  with pytest.raises(ValueError, match='dtype'):
    models.load(tiny_dir, dtype=dtype, progress=False)
  with pytest.raises(ValueError, match='dtype'):
    models.param_shapes(models.load_config(tiny_dir), dtype=dtype)


def test_a_text_to_start_from_is_of_the_vocabulary():
  """jax would read the last row of the embedding."""
  model, params = tiny()
  for init in (peft.prefix.init, peft.prefix.init_prompt):
    with pytest.raises(ValueError, match='token_ids has 64'):
      init(model, params, jax.random.key(0), init='text', token_ids=[3, 64])
