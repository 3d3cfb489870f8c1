"""What frozen layers give is computed once, and nothing else changes."""

import functools
import json
import resource

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import records, saved, small_config

from mezo_jax import models, peft
from mezo_jax.core.errors import InputError
from mezo_jax.export.from_run import export
from mezo_jax.tasks.encode import batch_of
from mezo_jax.training import build, frozen_features
from mezo_jax.training import config as config_lib
import train

LAST = dict(peft__method='last_layers', peft__num_layers=1,
            optimizer__learning_rate=1e-2)
KINDS = {
    'llama': {}, 'of no frozen layer': dict(num_layers=2),
    'masked': dict(causal=False, masked_head=True, embed_norm=True, rope=None,
                   token_types=2, norm='layer'),
    'learned positions': dict(rope=None, embed_width=16, norm='layer'),
    'local': dict(local_layers=(True, False, True), window=4)}


@pytest.mark.slow
@pytest.mark.exhaustive_except(kind=['llama', 'masked'])
@pytest.mark.parametrize('kind', KINDS)
def test_frozen_layers_and_top_are_the_model(kind):
  model, params, ids = helpers.tiny_model(**KINDS[kind])
  params = peft.split_layers(params, 2)
  mask = jnp.arange(12) < jnp.array([12, 9, 5, 1])[:, None]
  types = ids % 2 if model.config.token_types else None
  apply = lambda params, **kwargs: helpers.quick_jit(functools.partial(
      model.apply, features=kwargs.pop('features', '')))(
          {'params': params}, ids, mask, token_type_ids=types, **kwargs)
  x = apply(params, features='hidden_states')
  top = {name: x for name, x in params.items() if name not in (
      'positions', 'types', 'embed_norm', 'project_in', 'layers')}
  assert x.shape == (4, 12, model.config.width)
  there = np.asarray(mask)
  x = x.at[~there].set(0.0)  # what is kept has nothing at padding
  helpers.assert_close(
      apply(params)[there], apply(top, hidden_states=x)[there], rtol=2e-5,
      atol=2e-5)
  at = jnp.array([[11, 3], [8, 0], [4, 1], [0, 0]])
  want = apply(params)[jnp.arange(4)[:, None], at]
  for last in (2, 1):  # of one, no more than is read is computed
    apart = peft.split_layers(peft.join_layers(params), last)
    helpers.assert_close(apply(apart, answer_at=at), want, rtol=2e-5, atol=2e-5)
  helpers.assert_close(
      apply(top, hidden_states=x, answer_at=at), want, rtol=2e-5, atol=2e-5)


def test_a_cache_is_of_all_layers():
  model, params, ids = helpers.tiny_model()
  cache = models.make_cache(model.config, 4, 12, jnp.float32)
  with pytest.raises(ValueError, match='cache'):
    model.apply({'params': params}, ids, features='hidden_states', cache=cache)


WAYS = {
    'last_layers': LAST,
    'LoRA above': dict(peft__method='lora', peft__num_layers=2,
                       peft__targets='^last_layers/attn/(q|v)$',
                       optimizer__learning_rate=1e-2),
    'a mask above': dict(
        peft__mask='^last_layers/attn|^norm', peft__num_layers=1,
        optimizer__learning_rate=1e-2),
    'laid-out candidates': LAST | dict(
        task__label_words=(' a great film', ' bad'), calibration='',
        spsa__num_samples=4, spsa__over='rows',
        spsa__distribution='low_rank', spsa__rank=4),
    'head': dict(peft__method='head', optimizer__learning_rate=1e-2),
    'new head': dict(
        peft__method='head', task__kind='head', task__template='{text}',
        task__label_words=(), task__label_names=('a', 'b'),
        optimizer__learning_rate=1e-2),
    'Adam': LAST | dict(method='finetune', optimizer__learning_rate=1e-3)}


def of(built, data, params):
  """The rows' losses of a batch of the training rows."""
  batch = batch_of(data, range(8), built.splits.buckets['train'][-1], 8)
  values, weights = helpers.quick_jit(built.loss_fn)(
      peft.join(params, built.frozen), batch)
  return values * weights


@pytest.mark.slow
@pytest.mark.exhaustive_except(way=['last_layers', 'LoRA above'])
@pytest.mark.parametrize('way', WAYS)
def test_losses_are_those_of_the_whole_model(way, tiny_dir, reviews_file,
                                             tmp_path):
  """At other weights than those of the hidden states, too."""
  config = small_config(tiny_dir, reviews_file, **WAYS[way])
  built = build.build(config, say=lambda text: None)
  kept = frozen_features.keep(config, built, tmp_path, lambda text: None)
  assert 'layers' in built.frozen and 'layers' not in kept.frozen
  moved = jax.tree.map(lambda x: x + 0.01, built.params)
  a, b = (of(x, x.splits.train, moved) for x in (built, kept))
  assert np.any(a != of(built, built.splits.train, built.params))
  helpers.assert_close(a, b, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive_except(way=['Adam'])
@pytest.mark.parametrize('way', ['laid-out candidates', 'Adam'])
def test_a_run_is_the_same_with_cached_activations(
    way, tiny_dir, reviews_file, tmp_path, capsys):
  results = []
  for keeps in (False, True):
    config = small_config(
        tiny_dir, reviews_file, cache_frozen=keeps, **WAYS[way])
    results.append(train.run(config, tmp_path / str(keeps)))
    assert ('caching frozen' in capsys.readouterr().out) == keeps
  plain, kept = results
  for part in ('zero_shot', 'final'):
    assert plain[part].keys() == kept[part].keys()
    np.testing.assert_allclose(
        plain[part]['loss'], kept[part]['loss'], rtol=1e-4)
  losses = [[r['loss'] for r in records(tmp_path / str(keeps))
             if r['kind'] == 'train'] for keeps in (False, True)]
  np.testing.assert_allclose(*losses, rtol=1e-4)
  assert abs(plain['final']['loss'] - plain['zero_shot']['loss']) > 1e-5
  if way != 'Adam':  # whose first steps are signs of small numbers
    helpers.assert_close(*(saved(tmp_path / str(keeps))[1] for keeps in (
        False, True)), rtol=2e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_lora_of_the_last_layers_is_peft_s(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, **WAYS['LoRA above'])
  result = train.run(config, tmp_path / 'a')
  out = export(tmp_path / 'a', tmp_path / 'out')
  about = json.loads((out / 'adapter_config.json').read_text())
  assert '(1|2)' in about['target_modules']
  again = small_config(tiny_dir, reviews_file, method='zero_shot',
                       peft__method='lora', peft__adapter=str(out))
  found = train.run(again, tmp_path / 'b')['final']
  np.testing.assert_allclose(found['loss'], result['final']['loss'], rtol=2e-5)

  # And trained on: the layers without an adapter stay without one.
  again = config_lib.from_json(config_lib.to_json(config))
  again.peft.adapter = str(out)
  with pytest.raises(InputError, match="peft.mask='\\^last_layers"):
    train.run(again, tmp_path / 'c')
  again.peft.mask = '^last_layers/.*lora_[ab]$'
  more = train.run(again, tmp_path / 'c')
  assert saved(tmp_path / 'c')[1].keys() == {'last_layers'}
  second = export(tmp_path / 'c', tmp_path / 'out2')
  both = [peft.load(o, models.load(tiny_dir, progress=False)[0])[1][
      'layers']['attn']['q']['lora_b'] for o in (out, second)]
  assert not both[1][0].any() and np.all(both[0][1:] != both[1][1:])
  assert more['final']['loss'] != result['final']['loss']

  transformers, peft_ = map(pytest.importorskip, ('transformers', 'peft'))
  torch = pytest.importorskip('torch')
  theirs = peft_.PeftModel.from_pretrained(
      transformers.AutoModelForCausalLM.from_pretrained(tiny_dir), out).eval()
  ids = np.arange(2, 14)[None]
  model, params = models.load(tiny_dir, progress=False)
  model, adapters, _ = peft.load(out, model)
  ours = model.apply({'params': peft.join(params, adapters)}, ids)
  with torch.no_grad():
    np.testing.assert_allclose(
        ours, theirs(torch.tensor(ids)).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.exhaustive_except(gib=[0.0])
@pytest.mark.parametrize('gib', [4.0, 0.0])
def test_a_stopped_run_ends_as_one_that_was_not(gib, tiny_dir, reviews_file,
                                                tmp_path):
  """And its files are found again."""
  for steps, where in ((2, 'b'), (4, 'b'), (4, 'a')):
    config = small_config(
        tiny_dir, reviews_file, steps=steps, eval_every=2, zero_shot=False,
        cache_memory=gib, **LAST)
    held = lambda where: {p: p.stat().st_mtime_ns
                          for p in (tmp_path / where).glob('hidden_states/*')}
    files = held(where)
    train.run(config, tmp_path / where)
    now = held(where)
    assert len(now) == (0 if gib else 3)
    if files:
      assert files == now
  helpers.assert_bitwise(saved(tmp_path / 'a')[1], saved(tmp_path / 'b')[1])


@pytest.mark.slow
def test_files_are_of_these_rows_and_weights(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, cache_memory=0.0, **LAST)
  built = build.build(config, say=lambda text: None)
  names = []
  for change in (lambda x: x, lambda x: x.at[0, 3, 1].add(1e-6),
                 lambda x: x[:, ::-1]):
    other = built._replace(frozen=jax.tree.map(lambda x: x, built.frozen))
    q = other.frozen['layers']['attn']['q']
    q['kernel'] = change(q['kernel'])
    kept = frozen_features.keep(config, other, tmp_path, lambda text: None)
    names.append(sorted(p.name for p in tmp_path.iterdir()))
    assert len(names[-1]) == 3  # those of other weights are gone
    assert kept.splits.train.hidden_states.values.shape[1] == 32
  assert len({*map(tuple, names)}) == 3


@pytest.mark.slow
def test_a_disk_without_room(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, cache_memory=0.0, **LAST)
  built = build.build(config, say=lambda text: None)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
  try:
    with pytest.raises(InputError, match='GiB'):
      frozen_features.keep(
          config, built, tmp_path / 'hidden_states', lambda text: None)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert not [*(tmp_path / 'hidden_states').iterdir()]


def test_the_weights_below_are_let_go(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, **LAST)
  for abstract in (False, True):
    built = build.build(config, abstract=abstract, say=lambda text: None)
    kept = frozen_features.keep(config, built, tmp_path, lambda text: None)
    assert 'layers' in built.frozen and kept.frozen.keys() == {'embed', 'norm'}
    batch = build.batch_shapes(kept.splits.train, 16, 8, built.mesh)
    assert batch['hidden_states'].shape == (8, 16, 32)
  all_trained = build.build(
      small_config(tiny_dir, reviews_file), say=lambda text: None)
  assert frozen_features.keep(config, all_trained, tmp_path) is all_trained


@pytest.mark.slow
def test_answers_are_generated_by_the_whole_model(tiny_dir, reviews_file,
                                                  tmp_path):
  config = small_config(
      tiny_dir, reviews_file, task__kind='generation', task__label_words=(),
      task__answers_column='text', task__template='{label} It was',
      task__max_new_tokens=4, select='loss', **LAST)
  built = build.build(config, say=lambda text: None)
  kept = frozen_features.keep(config, built, tmp_path, lambda text: None)
  assert kept.splits.train.hidden_states and not kept.splits.test.hidden_states
  assert kept.frozen is built.frozen
