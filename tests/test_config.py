"""A config's checks, and its way through JSON."""

import json

import pytest
from runs import changed

from mezo_jax.core.errors import InputError
from mezo_jax.tasks import Task
from mezo_jax.training import checks
from mezo_jax.training import config as config_lib


def test_a_config_survives_json():
  config = config_lib.Train()
  config.task.label_words = ('a', 'b', 'c')
  config.spsa.eps = 0.5
  saved = json.loads(json.dumps(config_lib.to_json(config)))
  assert config_lib.from_json(saved) == config
  del saved['model']['revision']  # a run of an earlier version
  config_lib.check_same_run(config, saved)


def test_a_config_of_an_earlier_version_is_read():
  """What `spsa` has stood under `optimizer`."""
  config = changed(
      config_lib.Train(), spsa__eps=0.5, spsa__distribution='sphere',
      optimizer__groups=(('q', 1e-3, 1e-2),), optimizer__learning_rate=1e-2)
  saved = json.loads(json.dumps(config_lib.to_json(config)))
  saved['optimizer'] |= saved.pop('spsa')
  assert config_lib.from_json(saved) == config
  del saved['optimizer']['combine']
  saved['optimizer']['one_sided'] = True
  assert config_lib.from_json(saved).spsa.combine == 'one_sided'
  saved['optimizer']['one_sided'] = False
  config_lib.check_same_run(config, saved)
  config.spsa.eps = 0.25
  with pytest.raises(InputError, match='spsa.eps was 0.5 and is now 0.25'):
    config_lib.check_same_run(config, saved)


@pytest.mark.parametrize('path,same,other', [
    ('max_still', 100, 5), ('variant.stored_anchor', False, True),
    ('variant.anneal', 1.0, 4.0), ('variant.anneal_every', 8, None),
    ('variant.norm', 'grad', 'param'), ('peft.positions', 'zero', 'jump'),
    ('calibration', '', 'icl_sfc')])
def test_a_removed_field_is_read_at_its_only_value_and_else_refused(
    path, same, other):
  config = config_lib.Train()

  def saved(value):
    out = json.loads(json.dumps(config_lib.to_json(config)))
    parent, _, name = path.rpartition('.')
    (out[parent] if parent else out)[name] = value
    return out
  assert config_lib.from_json(saved(same)) == config
  config_lib.check_same_run(config, saved(same))
  if other is not None:
    for read in (config_lib.from_json,
                 lambda saved: config_lib.check_same_run(config, saved)):
      with pytest.raises(InputError, match=rf'{path} of {other!r}'):
        read(saved(other))


@pytest.mark.parametrize('changes,message', [
    (dict(optimizer__schedule='step'), 'optimizer.schedule'),
    (dict(model__dtype='int3'), "model.dtype 'int3'"),
    (dict(model__dtype='int8', method='finetune'), "model.dtype 'int8'"),
    (dict(method='quzo'), "'quzo' needs model.dtype of int8, int4, codes"),
    (dict(method='quzo', model__dtype='int4', spsa__distribution='low_rank'),
     'rounds each element of z'),
    (dict(optimizer__learning_rate=0.0), 'learning_rate must be positive'),
    (dict(spsa__eps=float('inf')), 'weight_decay must be finite'),
    (dict(spsa__eps=0.0), 'spsa.eps must be positive'),
    (dict(spsa__num_samples=0), 'num_samples must be at least 1'),
    (dict(spsa__over='all'), "spsa.over 'all'.* scan, batch, rows"),
    (dict(spsa__over='rows', spsa__num_samples=3), 'must divide data.batch'),
    (dict(spsa__over='rows', objective='f1'), 'spsa.over'),
    (dict(spsa__combine='fzoo'), 'num_samples of at least 2'),
    (dict(spsa__rank=0), 'spsa.rank must be at least 1'),
    (dict(spsa__generator='dice'), "spsa.generator 'dice'.* hash32"),
    (dict(spsa__distribution='cauchy'), "spsa.distribution 'cauchy'"),
    (dict(data__buckets=(64, 32)), 'must increase'),
    (dict(task__label_words=('one',)), 'needs two or more'),
    (dict(optimizer__micro_batches=3), 'micro_batches must divide'),
    (dict(optimizer__micro_batches=0), 'micro_batches must be at least 1'),
    (dict(peft__mask='attn/('), 'peft.mask .* regular expression'),
    (dict(peft__targets='*'), 'peft.targets .* regular expression'),
    (dict(optimizer__groups=(('[', 1e-3, 1e-3),)), 'groups .* regular'),
    (dict(method='magic'), "method 'magic'"),
    (dict(objective='accuracy', method='finetune'), 'has no derivative'),
    (dict(objective='bleu'), "objective 'bleu' does not fit"),
    (dict(calibration='no'), "calibration 'no'.* sfc"),
    (dict(calibration='sfc'), 'needs task.calibration'),
    (dict(calibration='sfc', task__calibration='', task__template='{text}{mask}'
          ), 'that a causal model scores'),
    (dict(calibration='icl_sfc'), "calibration 'icl_sfc'"),
    (dict(select='best'), "select 'best'"),
    (dict(optimizer__name='lion'), "optimizer.name 'lion'"),
    (dict(num_demos=0), 'num_demos must be'),
    (dict(method='icl', task__template='{text}{mask}'), 'needs a causal model'),
    (dict(method='linear_probe', task__kind='multiple_choice'),
     'needs a task with label words'),
    (dict(task__kind='essay'), "task.kind 'essay'"),
    (dict(task__template=''), 'task.template is empty'),
    (dict(peft__method='ia3'), "peft.method 'ia3'.* lora, prefix, prompt"),
    (dict(peft__positions='no'), "peft.positions 'no'.* zero, after"),
    (dict(peft__init='no'), "peft.init 'no'.* tokens, normal, text"),
    (dict(peft__init='text'), "'text' needs peft.text"),
    (dict(peft__rank=0), 'must be at least 1'),
    (dict(peft__adapter='x'), 'needs peft.method, one of lora'),
    (dict(method='lp_mezo', peft__mask='q'), 'peft.method and peft.mask'),
    (dict(peft__method='lora', peft__mask='attn/q'), 'leave it empty'),
    (dict(optimizer__groups=(('q', 1e-3),)), 'optimizer.groups')])
def test_bad_settings(changes, message):
  config = config_lib.Train(task=Task(
      template='{text} It was', label_words=(' terrible', ' great')))
  checks.check(config)
  with pytest.raises(InputError, match=message) as e:
    checks.check(changed(config, **changes))
  assert str(e.value).endswith('.') and '\n' not in str(e.value)
