"""Tests that the objective is reported, and chooses the best step."""

import dataclasses
import json

import conftest
import jax
import numpy as np
import pytest
import runs

from mezo_jax.cli import suite
from mezo_jax.core.errors import InputError
from mezo_jax.runs import checkpoint
from mezo_jax.runs.loggers import read
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import evaluate, Task
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks.encode import batch_of
from mezo_jax.training import build, checks, mixture
from mezo_jax.training import config as config_lib
from mezo_jax.training.config import Also
from mezo_jax.transforms import losses as losses_lib
import train

WORDS = conftest.WORDS
ROWS = [{'text': f'{WORDS[i]} {WORDS[(3 * i) % 16]} story', 'label': i % 2,
         'choices': [WORDS[i], f'{WORDS[5]} {WORDS[(i + 1) % 16]}',
                     f'the {WORDS[(7 * i + 2) % 16]} plot'][:2 + i % 2],
         'answers': [WORDS[(i + 3) % 16], 'a film']} for i in range(12)]
BARE = [{k: row[k] for k in ('text', 'choices')} for row in ROWS]
TASKS = {
    'words': Task(template='{text} It was', label_words=(' bad', ' good')),
    'long words': Task(template='{text} It was',
                       label_words=(' bad film', ' good')),
    'choice': Task(kind='multiple_choice', template='{text} was'),
    'generation': Task(kind='generation', template='{text} was',
                       max_new_tokens=3, stop='the'),
    'head': Task(kind='head', template='{text}', label_names=('bad', 'good'))}


def taste(predictions, examples):
  """A value of texts or numbers that needs no right answer."""
  return sum((len(p) if isinstance(p, str) else 3 * p + 1) * (i + 1)
             for i, p in enumerate(predictions)) / len(examples)


def config_of(model, kind, **changes):
  config = runs.small_config(model, 'x.jsonl', steps=4, eval_every=1,
                             spsa__eps=1e-1, data__num_test=20)
  config.task = dataclasses.replace(TASKS[kind])
  return runs.changed(config, **changes)


CASES = [(kind, objective, {}) for kind, some in (
    ('words', ('cross_entropy', 'lm', 'accuracy', 'f1', taste)),
    ('long words', ('cross_entropy', 'lm', 'f1')),
    ('choice', ('cross_entropy', 'lm', 'accuracy', 'f1', taste)),
    ('generation', ('lm', 'accuracy', 'f1', taste)),
    ('head', ('cross_entropy', 'accuracy', 'f1', taste)))
         for objective in some]
CASES += [(kind, objective, dict(calibration='sfc', task__calibration='It was'))
          for kind in ('words', 'choice')
          for objective in ('cross_entropy', 'lm', 'accuracy', taste)]
CASES += [('generation', 'lm', dict(select='loss')),
          ('generation', taste, dict(select='loss')),
          ('choice', 'lm', dict(select='loss'))]


@pytest.mark.slow_except(kind=['words'], objective=['cross_entropy'])
@pytest.mark.exhaustive_except(objective=['cross_entropy', taste], changes=[{}])
@pytest.mark.parametrize('kind,objective,changes', CASES)
def test_the_loss_of_rows_is_what_steps_minimise(
    tiny_dir, kind, objective, changes):
  """On the same rows the two are equal, whatever is trained."""
  config = config_of(tiny_dir, kind, objective=objective, **changes)
  built = build.build(
      config, say=lambda text: None, rows=data_lib.Rows(ROWS, ROWS, ROWS, ROWS),
      mesh=build.make_mesh(config, jax.devices()[:1]))
  params, rows = built.params, built.splits.train
  ask = build.make_evaluators(
      config, built.model, built.splits, built.tokenizer, built.mesh)
  length = int(rows.lengths.max())
  batch = batch_of(rows, np.arange(len(ROWS)), length, len(ROWS))
  want = jax.jit(lambda params, batch: losses_lib.mean(built.loss_fn(
      params, batch)))(params, batch)
  metric = config_lib.metric(config)
  for report in (
      ask.dev(params), ask.test(params)[0], *ask.both(params)[:2]):
    np.testing.assert_allclose(report['loss'], want, rtol=2e-5)
  report, _ = ask.test(params)
  assert metric in report
  if callable(objective):
    assert metric == 'taste'
    if not config.calibration:
      assert report['taste'] == -report['loss']
  if 'cross_entropy' in report:
    assert objective != 'cross_entropy' or config.calibration
  other = objective != 'lm' if kind == 'generation' else (
      objective != 'cross_entropy' or config.calibration)
  assert ('cross_entropy' in report) == bool(other)


@pytest.mark.slow
def test_a_label_that_no_row_has(tiny_dir):
  """A head has as many classes as names, whatever labels rows have."""
  rows = [row | {'label': 0} for row in ROWS]
  config = config_of(tiny_dir, 'head', objective='accuracy')
  config.task.label_names = ('bad', 'good', 'fair')
  built = build.build(config, rows=data_lib.Rows(rows, rows, rows, rows),
                      say=lambda text: None)
  assert built.splits.train.width == built.splits.dev.width == 3
  ask = build.make_evaluators(
      config, built.model, built.splits, built.tokenizer, built.mesh)
  report = ask.dev(built.params)
  batch = batch_of(built.splits.train, np.arange(12), 8, 12)
  values, _ = jax.jit(built.loss_fn)(built.params, batch)
  assert report['accuracy'] == -np.mean(values) < 1


@pytest.mark.parametrize('kind,objective,metric,want', [
    ('words', '', '', 'accuracy'), ('words', 'f1', '', 'macro_f1'),
    ('words', 'accuracy', 'matthews', 'matthews'),
    ('words', taste, 'matthews', 'taste'), ('choice', 'lm', '', 'accuracy'),
    ('generation', 'accuracy', '', 'exact_match'),
    ('generation', 'f1', 'drop_f1', 'drop_f1'), ('generation', 'lm', '', 'f1'),
    ('words', lambda predictions, examples: 0, '', 'objective')])
def test_the_main_number(kind, objective, metric, want):
  task = dataclasses.replace(TASKS[kind], metric=metric)
  assert objectives.metric(task, objectives.of(task, objective)) == want


def test_names_of_functions():
  def accuracy(predictions, examples):
    return 0.0
  class Model:
    def __call__(self, predictions, examples):
      return 0.0
  assert objectives.name(accuracy) == 'objective'  # reports have that name
  assert objectives.name(Model()) == 'objective'
  for function in (accuracy, Model(), taste, lambda p, e: 0):
    config = config_lib.Train(objective=function)
    assert json.dumps(config_lib.to_json(config))


@pytest.mark.parametrize('value', [None, 'high', [1.0, 2.0], {}])
def test_a_function_returns_one_number(value):
  with pytest.raises(InputError, match='objective'):
    objectives.value(lambda p, e: value, ['a'], [{}])
  for number in (2, 2.0, np.float32(2), jax.numpy.array(2.0), [2.0]):
    assert objectives.value(
        lambda p, e, number=number: number, ['a'], [{}]) == 2.0


@pytest.mark.parametrize('changes', [
    dict(method='svrg'), dict(method='private'), dict(method='finetune'),
    dict(optimizer__micro_batches=2)])
def test_a_function_that_a_method_cannot_train_is_named(changes):
  config = runs.changed(config_lib.Train(
      task=TASKS['words'], objective=taste), **changes)
  with pytest.raises(InputError, match='objective taste '):
    checks.check_config(config)


def test_an_anchor_of_one_batch_can_have_any_objective():
  checks.check_config(runs.changed(
      config_lib.Train(task=TASKS['words'], objective=taste), method='svrg',
      variant__anchor_rows=16))


def test_a_function_that_fails_is_named_with_its_line():
  def taste(predictions, examples):
    return examples[0]['missing']
  with pytest.raises(InputError, match=r"taste .*KeyError: 'missing' "
                     r".*test_reported\.py, line \d+"):
    objectives.value(taste, ['a'], [{}])


@pytest.mark.slow
def test_a_function_that_fails_in_a_step_ends_the_run(
    tiny_dir, reviews_file, tmp_path):
  """Also on several devices, of which one alone calls it."""
  def taste(predictions, examples):
    if len(examples) < 20:  # of a step, not of an evaluation
      raise RuntimeError('no such taste')
    return 1.0
  config = runs.small_config(tiny_dir, reviews_file, objective=taste)
  with pytest.raises(InputError, match='taste .*RuntimeError'):
    train.run(config, tmp_path / 'w')
  steps = (tmp_path / 'w' / 'metrics.jsonl').read_text().count('"train"')
  assert steps == 0  # nothing of it is in the log


@pytest.fixture
def data(tmp_path):
  def write(rows, name='x.jsonl'):
    path = tmp_path / name
    path.write_text('\n'.join(json.dumps(
        row | {'text': f'{word} {row["text"]}'})
        for word in WORDS[:5] for row in rows))
    return str(path)
  return write


def dev_rows(workdir):
  return [r for r in read(workdir / 'metrics.jsonl') if r['kind'] == 'dev']


@pytest.mark.slow
@pytest.mark.exhaustive_except(select=['loss'])
@pytest.mark.parametrize('select', ['metric', 'loss'])
def test_a_function_chooses_the_best_step(tiny_dir, data, tmp_path, select):
  """Against the labels: the lowest accuracy wins."""
  def wrong(predictions, examples):
    return float(np.mean([p != e['label'] for p, e in zip(
        predictions, examples)]))
  config = config_of(
      tiny_dir, 'words', objective=wrong, select=select, data__train=data(ROWS),
      data__num_train=20, optimizer__learning_rate=3e-2, steps=6,
      keep_checkpoints=9)
  result = train.run(config, tmp_path / 'w')
  dev = dev_rows(tmp_path / 'w')
  for r in dev:
    assert r['wrong'] == pytest.approx(1 - r['accuracy'])
    assert r['loss'] == -r['wrong']
  best = max(r['wrong'] for r in dev[1:])
  chosen, = (r for r in dev if r['step'] == result['final']['step'])
  assert chosen['wrong'] == best and result['metric'] == 'wrong'
  assert 'wrong' in result['final'] and 'wrong' in result['zero_shot']
  assert 'calibrated_wrong' in result['final']
  assert len({r['wrong'] for r in dev}) > 1, 'nothing to choose'
  assert checkpoint.Checkpoints(
      tmp_path / 'w/checkpoints').best_step() == result['final']['step']


@pytest.mark.slow
@pytest.mark.exhaustive_except(kind=['generation'])
@pytest.mark.parametrize('kind', ['generation', 'words', 'choice', 'head'])
def test_rows_without_right_answers(tiny_dir, data, tmp_path, capsys, kind):
  config = config_of(
      tiny_dir, kind, objective=taste, data__train=data(BARE), steps=2,
      data__num_train=20, data__num_dev=8, data__num_test=8)
  result = train.run(config, tmp_path / 'w')
  assert result['final'].keys() == {'taste', 'loss', 'count', 'step'}
  said = capsys.readouterr().out
  for split in ('dev', 'test'):
    assert f'8 of 8 {split} rows' in said
  assert config.task.main_metric in said


@pytest.mark.parametrize('kind,column', [
    ('generation', 'answers'), ('words', 'label'), ('choice', 'label')])
def test_objectives_that_read_right_answers_say_that_there_are_none(
    tiny_dir, data, kind, column):
  config = config_of(tiny_dir, kind, objective='f1', data__train=data(BARE),
                     data__num_train=20)
  with pytest.raises(InputError, match=f"column '{column}'"):
    build.build(config, say=lambda text: None)


@pytest.mark.slow
@pytest.mark.exhaustive_except(method=['icl'])
@pytest.mark.parametrize('method', ['zero_shot', 'icl', 'linear_probe'])
def test_a_function_is_measured_without_training(
    tiny_dir, data, tmp_path, method):
  config = config_of(
      tiny_dir, 'words', objective=taste, method=method, num_demos=1,
      data__train=data(ROWS), data__num_train=20)
  result = train.run(config, tmp_path / 'w')
  assert result['metric'] == 'taste'
  assert result['final']['taste'] == -result['final']['loss']
  row = suite.row_of(f'x/{method}', config, result)
  assert float(row['score']) == pytest.approx(
      result['final']['taste'], rel=1e-3)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_several_tasks_report_the_mean_that_is_trained(
    tiny_dir, data, tmp_path, capsys):
  """Generation has its language-model loss in it, not 0."""
  config = config_of(tiny_dir, 'words', data__train=data(ROWS),
                     data__num_train=20, steps=1)
  own = dataclasses.replace(config.data)
  config.also = (Also('texts', TASKS['generation'], own, 3.0),
                 Also('choices', TASKS['choice'], own, 1.0))
  final = train.run(config, tmp_path / 'w')['final']
  losses = [final[f'{name}/loss'] for name in ('first', 'texts', 'choices')]
  np.testing.assert_allclose(
      final['loss'], np.average(losses, weights=(1, 3, 1)))
  assert final['mean'] == pytest.approx(np.mean(
      [final['first/accuracy'], final['texts/f1'], final['choices/accuracy']]))
  assert 'choices/cross_entropy' in final
  assert (tmp_path / 'w/curves.png').is_file()

  # By loss, texts of dev rows need not be generated, so there is no mean.
  config.select = 'loss'
  result = train.run(config, tmp_path / 'v')
  dev = dev_rows(tmp_path / 'v')
  assert 'mean' not in dev[-1] and np.isfinite(dev[-1]['loss'])
  assert result['final']['step'] == 1
  assert '| texts |' in capsys.readouterr().out


def test_values_are_written_as_what_they_are():
  report = {'taste': -12.5, 'accuracy': 0.5, 'first/taste': 1.0, 'loss': 0.25,
            'matthews': 0.5}
  assert evaluate.spell_value('taste', report) == '-12.5'
  assert evaluate.spell_value('accuracy', report) == '50.0'
  assert evaluate.spell_value('matthews', report) == '50.0'
  assert evaluate.spell_value('none', report) == ''
  said = evaluate.spell(report)
  for text in ('taste -12.500', 'accuracy 50.0%', 'loss 0.250'):
    assert text in said
  assert evaluate.in_percent('mean', {'mean': 0.5, 'a/f1': 0.2, 'a/loss': 1.0})
  assert not evaluate.in_percent('mean', {'mean': 0.5, 'a/taste': 0.2})
  assert mixture.MEAN == 'mean'
