"""A config's checks, and its way through JSON."""

import json

import pytest
from runs import changed

from mezo_jax.core.errors import InputError
from mezo_jax.directions import by_name, noise
from mezo_jax.tasks import Task
from mezo_jax.training import checks
from mezo_jax.training import config as config_lib
from mezo_jax.transforms import evaluate_points


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
      config_lib.Train(), spsa__eps=0.5, spsa__distribution='rademacher',
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
  with pytest.raises(InputError, match=r'spsa\.eps.*0\.5.*0\.25'):
    config_lib.check_same_run(config, saved)


def test_names_are_those_of_the_mathematics():
  assert set(checks.DISTRIBUTIONS) == {*by_name.KINDS}
  assert set(checks.GENERATORS) == {*noise.GENERATORS}
  assert set(checks.OVER) == {*evaluate_points.OVER}
  assert set(checks.COMBINES) == {*evaluate_points.COMBINES}



@pytest.mark.parametrize('changes,message', [
    (dict(optimizer__schedule='step'), 'optimizer.schedule'),
    (dict(model__dtype='int3'), "model.dtype 'int3'"),
    (dict(model__dtype='int8', method='finetune'), "model.dtype 'int8'"),
    (dict(method='quzo'), 'model.dtype'),
    (dict(method='quzo', model__dtype='int4', spsa__distribution='low_rank'),
     'spsa.distribution'),
    (dict(optimizer__learning_rate=0.0), 'optimizer.learning_rate'),
    (dict(spsa__eps=float('inf')), 'spsa.eps'),
    (dict(spsa__eps=0.0), 'spsa.eps'),
    (dict(spsa__num_samples=0), 'spsa.num_samples'),
    (dict(spsa__over='all'), "spsa.over 'all'"),
    (dict(spsa__over='rows', spsa__num_samples=3), 'spsa.num_samples'),
    (dict(spsa__over='rows', objective='f1'), "objective 'f1'"),
    (dict(spsa__combine='fzoo'), "spsa.combine 'fzoo'"),
    (dict(spsa__rank=0), 'spsa.rank'),
    (dict(spsa__generator='dice'), "spsa.generator 'dice'"),
    (dict(spsa__distribution='cauchy'), "spsa.distribution 'cauchy'"),
    (dict(data__buckets=(64, 32)), 'data.buckets'),
    (dict(task__label_words=('one',)), 'task.label_words'),
    (dict(optimizer__micro_batches=3), 'optimizer.micro_batches'),
    (dict(optimizer__micro_batches=0), 'optimizer.micro_batches'),
    (dict(peft__mask='attn/('), r'peft.mask .*attn/\('),
    (dict(peft__targets='*'), r'peft.targets .*\*'),
    (dict(optimizer__groups=(('[', 1e-3, 1e-3),)), r'optimizer.groups .*\['),
    (dict(method='magic'), "method 'magic'"),
    (dict(objective='accuracy', method='finetune'), "objective 'accuracy'"),
    (dict(objective='bleu'), "objective 'bleu'"),
    (dict(calibration='no'), "calibration 'no'"),
    (dict(calibration='sfc'), 'task.calibration'),
    (dict(calibration='sfc', task__calibration='', task__template='{text}{mask}'
          ), 'task.calibration'),
    (dict(calibration='icl_sfc', task__calibration=''), "'icl_sfc'"),
    (dict(select='best'), "select 'best'"),
    (dict(optimizer__name='lion'), "optimizer.name 'lion'"),
    (dict(num_demos=0), 'num_demos'),
    (dict(method='icl', task__template='{text}{mask}'), "method 'icl'"),
    (dict(method='linear_probe', task__kind='multiple_choice'),
     "method 'linear_probe'"),
    (dict(task__kind='essay'), "task.kind 'essay'"),
    (dict(task__template=''), 'task.template'),
    (dict(peft__method='ia3'), "peft.method 'ia3'"),
    (dict(peft__positions='no'), "peft.positions 'no'"),
    (dict(peft__init='no'), "peft.init 'no'"),
    (dict(peft__init='text'), 'peft.text'),
    (dict(peft__rank=0), 'peft.rank'),
    (dict(peft__adapter='x'), 'peft.adapter'),
    (dict(method='lp_mezo', peft__mask='q'), "method 'lp_mezo'"),
    (dict(peft__method='lora', peft__mask='attn/q'), "peft.mask 'attn/q'"),
    (dict(optimizer__groups=(('q', 1e-3),)), 'optimizer.groups')])
def test_bad_settings(changes, message):
  config = config_lib.Train(task=Task(
      template='{text} It was', label_words=(' terrible', ' great')))
  checks.check(config)
  with pytest.raises(InputError, match=message) as e:
    checks.check(changed(config, **changes))
  assert str(e.value).endswith('.') and '\n' not in str(e.value)
