"""A config's checks, and its way through JSON."""

import json
import typing

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
    (dict(calibration='icl_sfc'), "calibration 'icl_sfc'"),
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
  checks.check_config(config)
  with pytest.raises(InputError, match=message) as e:
    checks.check_config(changed(config, **changes))
  assert str(e.value).endswith('.') and '\n' not in str(e.value)


def test_the_types_of_fields_name_what_the_tables_have():
  from mezo_jax.core.quantized import QUANTISED
  from mezo_jax.directions import by_name, noise
  from mezo_jax.peft import adapter_config, kinds, prefix
  from mezo_jax.tasks import task
  from mezo_jax.training import methods, optimizer
  from mezo_jax.transforms import combine, evaluate_points
  from mezo_jax.variants.private import MECHANISMS
  for cls, name, known in (
      (config_lib.Model, 'dtype',
       ('float32', 'bfloat16', 'float16', *QUANTISED)),
      (config_lib.Optimizer, 'name', methods.OPTIMIZERS),
      (config_lib.Optimizer, 'schedule', optimizer.SCHEDULES),
      (config_lib.Spsa, 'over', evaluate_points.OVER),
      (config_lib.Spsa, 'distribution', by_name.KINDS),
      (config_lib.Spsa, 'generator', noise.GENERATORS),
      (config_lib.Spsa, 'combine', combine.COMBINES),
      (config_lib.Privacy, 'mechanism', MECHANISMS),
      (config_lib.Peft, 'method', kinds.PARTS),
      (config_lib.Peft, 'init', prefix.INITS),
      (config_lib.Peft, 'positions', adapter_config.PLACES),
      (task.Task, 'kind', task.KINDS)):
    hint = typing.get_type_hints(cls)[name]
    assert {*typing.get_args(hint)} == {*known}, (cls, name)
