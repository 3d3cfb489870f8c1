"""Each way to train few parameters, through train.py: run, resume, export."""

import json

import helpers
import jax
import numpy as np
import pytest
from runs import saved, small_config

from mezo_jax import models, peft
from mezo_jax.core.errors import InputError
from mezo_jax.export.from_run import export
from mezo_jax.training import config as config_lib
from mezo_jax.training import trainable
import train

WAYS = {
    'lora': dict(peft__method='lora', peft__rank=2,
                 optimizer__learning_rate=1e-3),
    'prefix': dict(peft__method='prefix', optimizer__learning_rate=1e-2,
                   spsa__eps=1e-2),
    'prompt': dict(peft__method='prompt', optimizer__learning_rate=1e-2,
                   peft__init='text', peft__text='a good film'),
    'last_layers': dict(peft__method='last_layers', peft__num_layers=1,
                        optimizer__learning_rate=1e-2),
    'head': dict(peft__method='head', optimizer__learning_rate=1e-2),
    'mask': dict(peft__mask='attn/(q|v)/', optimizer__learning_rate=1e-2),
    'lora with Adam': dict(peft__method='lora', method='finetune',
                           optimizer__learning_rate=1e-3),
    'groups': dict(peft__method='lora', peft__mask='lora_b$',
                   optimizer__learning_rate=1e-2,
                   optimizer__groups=(('attn/q', 3e-2, 1e-2),))}


@pytest.mark.slow_except(way=['lora'])
@pytest.mark.exhaustive_except(way=['lora', 'groups'])
@pytest.mark.parametrize('way', WAYS)
def test_run_resume_and_export(way, tiny_dir, reviews_file, tmp_path):
  resumes = way == 'lora'  # the same code for all
  for steps, where in (*(((2, 'b'), (4, 'b')) if resumes else ()), (4, 'a')):
    config = small_config(tiny_dir, reviews_file, steps=steps, eval_every=2,
                          **WAYS[way])
    result = train.run(config, tmp_path / where)
  if resumes:
    helpers.assert_bitwise(saved(tmp_path / 'a')[1], saved(tmp_path / 'b')[1])

  # A checkpoint holds what is trained and nothing else.
  kinds = {'lora': ('lora_a', 'lora_b'), 'prefix': ('prefix_k', 'prefix_v')}
  names = {p[-1].key for p, _ in jax.tree_util.tree_flatten_with_path(
      saved(tmp_path / 'a')[1])[0]}
  if way in kinds:
    assert names == set(kinds[way])
  elif way == 'groups':
    assert names == {'lora_b'}
  model, base = models.load(tiny_dir, progress=False)
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  assert size(saved(tmp_path / 'a')[1]) < size(base)

  # What is exported gives the result's predictions again, not the base's.
  assert abs(result['final']['loss'] - result['zero_shot']['loss']) > 3e-4
  out = export(tmp_path / 'a', tmp_path / 'out')
  adapts = config.peft.method in ('lora', 'prefix', 'prompt')
  assert (out / 'adapter_config.json').is_file() == adapts
  if adapts:
    again = small_config(tiny_dir, reviews_file, method='zero_shot',
                         peft__method=config.peft.method,
                         peft__adapter=str(out))
  else:
    again = small_config(out, reviews_file, method='zero_shot')
  found = train.run(again, tmp_path / 'again')['final']
  np.testing.assert_allclose(found['loss'], result['final']['loss'], rtol=2e-5)
  assert found['accuracy'] == result['final']['accuracy']
  if way == 'lora':
    export(tmp_path / 'a', tmp_path / 'merged', merged=True)
    again = small_config(tmp_path / 'merged', reviews_file, method='zero_shot')
    found = train.run(again, tmp_path / 'again_merged')['final']
    np.testing.assert_allclose(
        found['loss'], result['final']['loss'], rtol=2e-5)
  elif config.peft.method != 'lora':
    with pytest.raises(ValueError, match='LoRA'):
      export(tmp_path / 'a', tmp_path / 'merged', merged=True)


@pytest.mark.slow
def test_training_goes_on_from_adapters(tiny_dir, reviews_file, tmp_path):
  first = small_config(tiny_dir, reviews_file, **WAYS['lora'])
  train.run(first, tmp_path / 'a')
  out = export(tmp_path / 'a', tmp_path / 'out')
  second = small_config(tiny_dir, reviews_file, peft__adapter=str(out),
                        **WAYS['lora'])
  result = train.run(second, tmp_path / 'b')
  plain = train.run(small_config(tiny_dir, reviews_file, method='zero_shot'),
                    tmp_path / 'c')
  # Zero-shot is the model without them.
  assert result['zero_shot']['loss'] == pytest.approx(plain['final']['loss'])
  _, was, _ = peft.load(out, models.load(tiny_dir, progress=False)[0])
  now = saved(tmp_path / 'b')[1]['layers']['attn']['q']['lora_b']
  was = was['layers']['attn']['q']['lora_b']
  assert was.any() and (now != was).all()  # from zero it would be `was` again
  with pytest.raises(ValueError, match="kind 'lora'"):
    train.run(small_config(
        tiny_dir, reviews_file, peft__method='prefix',
        peft__adapter=str(out)), tmp_path / 'd')


@pytest.mark.slow
def test_biases_alone(tmp_path):
  """BitFit, and a model that has none says so."""
  for changes, message in ((dict(norm='layer', qkv_bias=True), ''),
                           (dict(), "'bitfit'")):
    _, params, _ = helpers.tiny_model(**changes)
    config = config_lib.Train(peft=config_lib.Peft(method='bitfit'))
    if message:
      with pytest.raises(ValueError, match=message):
        trainable.split(config, params)
      continue
    chosen, _ = trainable.split(config, params)
    assert {p[-1].key for p, _ in jax.tree_util.tree_flatten_with_path(
        chosen)[0]} == {'bias'}


@pytest.mark.slow
def test_a_task_s_new_head_is_trained_with_few_parameters():
  _, params, _ = helpers.tiny_model()
  whole = peft.join(params, peft.lora.init(params, jax.random.key(0)), {
      'classifier': {'kernel': np.zeros((32, 2), np.float32)}})
  config = config_lib.Train(peft=config_lib.Peft(method='lora'))
  assert 'classifier' not in trainable.split(config, whole)[0]
  config.task.kind = 'head'
  assert 'classifier' in trainable.split(config, whole)[0]
  config.peft.mask = 'lora_b$'
  assert trainable.split(config, whole)[0].keys() == {'layers', 'classifier'}
  config.peft.mask, config.peft.method = '', 'head'
  assert trainable.split(config, whole)[0].keys() == {'classifier'}


@pytest.mark.parametrize('changes,message', [
    (dict(optimizer__groups=(('none', 1e-3, 1e-3),)),
     "optimizer.groups: .*'none'"),
    (dict(peft__method='prompt', peft__adapter='nowhere'),
     'nowhere .*adapter_config.json'),
    (dict(peft__method='lora', peft__targets='query'), "'query' .*layers"),
    (dict(peft__method='prefix', peft__mask='^last_layers/.*prefix'),
     'peft.mask'),
    (dict(peft__method='last_layers', peft__num_layers=9), '9 last layers')])
def test_bad_settings(changes, message, tiny_dir, reviews_file, tmp_path):
  with pytest.raises(InputError, match=message):
    train.run(small_config(tiny_dir, reviews_file, **changes), tmp_path)
  assert not (tmp_path / 'checkpoints').exists()


@pytest.mark.slow
def test_the_log_says_what_is_trained(tiny_dir, reviews_file, tmp_path, capsys):
  train.run(small_config(tiny_dir, reviews_file, peft__method='lora',
                         peft__rank=2), tmp_path)
  said = capsys.readouterr().out
  # q: 3 layers of 2 * (32 + 32); v: of 2 * (32 + 16).
  assert '672 of 38,150' in said
  assert 'warning: optimizer.learning_rate' in said
  assert json.loads((tmp_path / 'config.json').read_text())['peft']['rank'] == 2
