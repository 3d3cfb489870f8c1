"""Predictions of a run, and of new rows by the model of a run or an export."""

import dataclasses
import json
import shutil

import conftest
import numpy as np
import pytest
import runs

from mezo_jax import training
from mezo_jax.cli import commands
from mezo_jax.core.errors import InputError, MissingError
from mezo_jax.export.from_run import export
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import predictions, Task
from mezo_jax.tasks.encode import encode
import train

WORDS = conftest.WORDS
TASKS = {
    'classification': Task(
        template='{text} It was', label_words=(' terrible', ' great'),
        label_names=('negative', 'positive')),
    'choice': Task(kind='multiple_choice', template='{text} was'),
    'generation': Task(kind='generation', template='{text} was', stop='the',
                       max_new_tokens=3),
    'head': Task(kind='head', template='{text}', label_names=('bad', 'good'))}


def numbers(row):
  """Removes the probabilities from a prediction and returns them as a list."""
  found = row.pop('probabilities', [])
  return [*found.values()] if isinstance(found, dict) else found


def silent(text):
  """Reports nothing."""


def rows_of(number, seed=0):
  """Rows with the columns of all tasks."""
  rng, out = np.random.RandomState(seed), []
  for i in range(number):
    words = [str(w) for w in rng.choice(WORDS[4:], rng.randint(2, 7))]
    right = ('bad', 'good')[i % 2]
    out.append({'text': ' '.join([*words, right]), 'label': i % 2,
                'choices': ['bad', 'good', 'a film'][:2 + i % 2],
                'answers': [right]})
  return out


def write(path, rows):
  """Writes a jsonl file."""
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return path


def read(path):
  """Reads a jsonl file."""
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def config(tiny_dir, tmp_path):
  """Returns a function from a kind of task to the config of a small run, whose
  test rows are a shuffled file."""
  def make(kind, **changes):
    config = runs.small_config(
        tiny_dir, write(tmp_path / 'train.jsonl', rows_of(60)),
        **{'steps': 2, 'eval_every': 1, 'zero_shot': False, 'data__num_test': 0,
           'optimizer__learning_rate': 1e-3})
    config.task = dataclasses.replace(TASKS[kind])
    config.data.test = str(write(tmp_path / 'test.jsonl', rows_of(30, seed=1)))
    return runs.changed(config, **changes)
  return make


CASES = [
    ('classification', {}), ('choice', {}), ('generation', {}), ('head', {}),
    ('classification', dict(peft__method='lora')),
    ('generation', dict(peft__method='prefix', peft__num_tokens=2)),
    ('classification', dict(peft__method='prompt', peft__num_tokens=2)),
    ('classification', dict(peft__method='last_layers', peft__num_layers=1)),
    ('classification', dict(calibration='sfc', task__calibration='It was')),
    ('choice', dict(calibration='sfc', task__calibration='It was')),
    ('classification', dict(objective='lm')),
    ('classification', dict(model__dtype='int8')),
    ('classification', dict(model__dtype='bfloat16')),
    ('head', dict(peft__method='lora'))]


@pytest.mark.slow_except(kind=['classification'], changes=[{}])
@pytest.mark.parametrize('kind,changes', CASES)
def test_test_rows_are_predicted_as_in_the_run(kind, changes, config, tmp_path):
  """Line for line those of predictions.jsonl, in the order of the file; and
  those of an export, up to rounding."""
  result = train.run(config(kind, **changes), tmp_path / 'run')
  file, out = tmp_path / 'test.jsonl', tmp_path / 'out.jsonl'
  commands.main(['predict', str(tmp_path / 'run'), f'--data={file}',
                 f'--out={out}'])
  want = tmp_path / 'run' / 'predictions.jsonl'
  assert out.read_bytes() == want.read_bytes()
  rows = read(want)
  assert [row['index'] for row in rows] == [*range(30)]
  right = np.mean([row['correct'] for row in rows])
  name = 'exact_match' if kind == 'generation' else 'accuracy'
  assert result['final'][name] == pytest.approx(right)

  if kind == 'head' and changes:  # an adapter with a head
    model = export(tmp_path / 'run', tmp_path / 'm', merged=True, say=silent)
  else:
    model = export(tmp_path / 'run', tmp_path / 'm', say=silent)
  again, report = training.predict(model, file, say=silent)
  exact = 'model__dtype' not in changes
  for row, other in zip(rows, again, strict=True):
    np.testing.assert_allclose(
        numbers(row), numbers(other), atol=2e-5 if exact else 0.02)
    if exact:
      assert row == other
  assert report['count'] == 30


@pytest.fixture(scope='module')
def finished(tiny_dir, tmp_path_factory):
  """A finished run of classification."""
  where = tmp_path_factory.mktemp('finished')
  config = runs.small_config(
      tiny_dir, write(where / 'train.jsonl', rows_of(120)), steps=2,
      eval_every=1, keep_checkpoints=2)
  config.task = TASKS['classification']
  return where / 'run', train.run(config, where / 'run'), where / 'train.jsonl'


def test_the_index_finds_the_row_in_its_file(finished):
  run, result, file = finished
  rows, found = read(file), read(run / 'predictions.jsonl')
  assert len(found) == 40
  assert [row['index'] for row in found] == sorted(
      {row['index'] for row in found})
  for row in found:
    assert row['gold'] == ('negative', 'positive')[rows[row['index']]['label']]
    assert row['correct'] == (row['gold'] == row['prediction'])
    assert row['prediction'] == max(
        row['probabilities'], key=row['probabilities'].get)
    assert sum(row['probabilities'].values()) == pytest.approx(1, abs=1e-5)
  del result


def test_the_result_has_dev_scores_and_classes(finished):
  run, result, _ = finished
  assert json.loads((run / 'result.json').read_text()) == result
  dev = [r for r in runs.records(run) if r['kind'] == 'dev'
         and r['step'] == result['final']['step']]
  assert result['dev']['accuracy'] == dev[-1]['accuracy']
  assert result['seed'] == 0 and result['learning_rate'] == 1e-6
  assert result['forwards'] == 4
  assert [*result['classes']] == ['negative', 'positive']
  each = result['classes'].values()
  assert sum(c['count'] for c in each) == 40 == sum(
      c['predicted'] for c in each)
  right = sum(c['recall'] * c['count'] for c in each)
  assert right / 40 == pytest.approx(result['final']['accuracy'])
  assert right == pytest.approx(sum(c['precision'] * c['predicted']
                                    for c in each))


def test_scores_of_classes():
  """Against scikit-learn's."""
  from sklearn.metrics import precision_recall_fscore_support
  task = Task(template='{x}', label_words=(' a', ' b', ' c', ' d'))
  rng = np.random.RandomState(0)
  gold, said = rng.randint(3, size=50), rng.randint(3, size=50)
  found = predictions.of_classes(task, [
      {'gold': 'abcd'[g], 'prediction': 'abcd'[s], 'index': 0}
      for g, s in zip(gold, said)])
  want = precision_recall_fscore_support(
      gold, said, labels=range(4), zero_division=0)
  np.testing.assert_allclose(
      [[c[name] for c in found.values()]
       for name in ('precision', 'recall', 'f1', 'count')], want)
  assert predictions.of_classes(task, [{'prediction': 'a'}]) == {}


def test_rows_without_a_right_answer(finished, tmp_path, capsys):
  """In any format; as many as have one are measured."""
  run = finished[0]
  (tmp_path / 'x.csv').write_text('text\na good film\nthe dull plot\n')
  capsys.readouterr()
  commands.main(['predict', str(run), '--data', str(tmp_path / 'x.csv')])
  found = capsys.readouterr()
  rows = [json.loads(line) for line in found.out.splitlines()]
  assert [row['index'] for row in rows] == [0, 1]
  assert all(row.keys() == {'index', 'prediction', 'probabilities'}
             for row in rows)
  assert 'accuracy' not in found.err
  rows, report = training.predict(
      run, [{'text': 'a good film', 'label': None},
            {'text': 'the dull plot', 'label': 'negative'}], say=silent)
  assert 'correct' not in rows[0] and report['count'] == 1
  assert report['accuracy'] == rows[1]['correct']


def test_another_step(finished, tmp_path):
  run, result, _ = finished
  other = 3 - result['final']['step']
  rows = [{'text': 'a good film'}]
  best, _ = training.predict(run, rows, say=silent)
  assert best == training.predict(
      run, rows, step=result['final']['step'], say=silent)[0]
  assert best != training.predict(run, rows, step=other, say=silent)[0]
  with pytest.raises(MissingError, match='1, 2'):
    training.predict(run, rows, step=7, say=silent)


@pytest.mark.parametrize('file,text,message', [
    ('a.csv', 'sentence\ngood\n', "a.csv .*'text'"),
    ('a.jsonl', '{"text": null}\n', "'text'"),
    ('a.csv', 'text,label\ngood,neutral\n', "'neutral'"),
    ('a.csv', 'text\n', 'a.csv has no rows'), ('a.txt', 'good', 'a.txt'),
    ('a.jsonl', '{"text": \n', 'a.jsonl'), ('', '', 'none.csv')])
def test_files_that_cannot_be_predicted(
    file, text, message, finished, tmp_path):
  if file:
    (tmp_path / file).write_text(text)
  with pytest.raises(InputError, match=message):
    training.predict(finished[0], tmp_path / (file or 'none.csv'), say=silent)


def test_directories_that_cannot_predict(finished, tiny_dir, tmp_path):
  rows = [{'text': 'good'}]
  for directory, message in (
      (tmp_path / 'none', 'does not exist'), (tmp_path, 'mezo_jax.json'),
      (tiny_dir, 'mezo_jax.json')):
    with pytest.raises(MissingError, match=message):
      training.predict(directory, rows, say=silent)
  (tmp_path / 'mezo_jax.json').write_text('{"config": {"no_such": 1}}')
  with pytest.raises(InputError, match='no_such'):
    training.predict(tmp_path, rows, say=silent)


@pytest.mark.slow
def test_demonstrations_are_those_of_the_evaluation(config, tmp_path):
  """Also of rows in another order, and of test rows out of the train file."""
  train.run(config('classification', method='icl', num_demos=3),
            tmp_path / 'a')
  rows = read(tmp_path / 'test.jsonl')
  want = read(tmp_path / 'a' / 'predictions.jsonl')
  found, _ = training.predict(tmp_path / 'a', rows[::-1], say=silent)
  assert [row | {'index': 0} for row in found[::-1]] == [
      row | {'index': 0} for row in want]
  settings = config('classification', method='icl', num_demos=3,
                    data__num_test=10, data__num_dev=10)
  settings.data.test = ''
  train.run(settings, tmp_path / 'b')
  want = read(tmp_path / 'b' / 'predictions.jsonl')
  rows = read(tmp_path / 'train.jsonl')
  found, _ = training.predict(
      tmp_path / 'b', [rows[row['index']] for row in want], say=silent)
  assert [row | {'index': 0} for row in found] == [
      row | {'index': 0} for row in want]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['zero_shot', 'linear_probe'])
def test_baselines(method, config, tmp_path):
  result = train.run(config('classification', method=method), tmp_path / 'run')
  want = read(tmp_path / 'run' / 'predictions.jsonl')
  assert np.mean([row['correct'] for row in want]) == pytest.approx(
      result['final']['accuracy'])
  assert 'learning_rate' not in result and result['forwards'] == 0
  if method == 'linear_probe':  # which is not saved
    with pytest.raises(InputError, match='linear_probe'):
      training.predict(tmp_path / 'run', tmp_path / 'test.jsonl', say=silent)
  else:
    assert 'accuracy' in result['dev']
    assert training.predict(
        tmp_path / 'run', tmp_path / 'test.jsonl', say=silent)[0] == want


def test_records_of_rows_with_several_right_answers(tiny_dir):
  """Of candidates that not all rows have, and of scores that are not finite."""
  from mezo_jax import models
  task = Task(kind='multiple_choice', template='{text} was')
  rows = [{'text': 'film', 'choices': ['bad', 'good', 'fun'], 'label': [1, 2]},
          {'text': 'film', 'choices': ['bad', 'good'], 'label': 'bad'},
          {'text': 'film', 'choices': ['bad', 'good']}]
  data = encode(task, rows, models.load_tokenizer(tiny_dir), 60,
                needs_gold=False)
  scores = np.array([[0, 1, 2], [0, np.log(3), -1e30], [np.nan, 0, -1e30]])
  found = predictions.of_rows(task, data, scores, [7, 3, 5])
  assert found == [
      {'index': 3, 'prediction': 'good', 'gold': 'bad', 'correct': False,
       'probabilities': [0.25, 0.75]},
      {'index': 5, 'prediction': None},
      {'index': 7, 'prediction': 'fun', 'gold': ['good', 'fun'],
       'correct': True, 'probabilities': [0.090031, 0.244728, 0.665241]}]


def test_rows_that_a_task_leaves_out_keep_their_index(tmp_path):
  """A row's index is that in its file."""
  task = Task(template='{text}', label_words=(' a', ' b'),
              row=lambda row: row if len(row['text']) > 1 else None)
  rows = [{'text': text, 'label': 0} for text in ('aa', 'b', 'cc', 'd', 'ee')]
  found = data_lib.numbered(task, rows)
  assert found == ([0, 2, 4], rows[::2])


@pytest.mark.slow
def test_a_function_that_changes_rows(config, tmp_path):
  """That of a declared task is found again; another is refused by name."""
  settings = config('classification')
  settings.task = Task(
      template='{text} It was', label_words=(' terrible', ' great'),
      row=lambda row: row | {'text': row['text'].strip()})
  train.run(settings, tmp_path / 'run')
  with pytest.raises(InputError, match='test_predict.*mezo_jax.json'):
    training.predict(tmp_path / 'run', tmp_path / 'test.jsonl', say=silent)
  model = export(tmp_path / 'run', tmp_path / 'm', say=silent)
  about = json.loads((model / 'mezo_jax.json').read_text())
  about['config']['task']['row'] = None
  (model / 'mezo_jax.json').write_text(json.dumps(about))
  training.predict(model, tmp_path / 'test.jsonl', say=silent)
  from mezo_jax import tasks
  settings.task = tasks.get('copa')
  rows = [{'premise': 'the film was dull', 'question': 'effect', 'label': i % 2,
           'choice1': 'the cast was bad', 'choice2': f'the plot was {w}'}
          for i, w in enumerate(WORDS * 5)]
  settings.data.train = str(write(tmp_path / 'c.jsonl', rows[:60]))
  settings.data.test = str(write(tmp_path / 'd.jsonl', rows[60:]))
  train.run(settings, tmp_path / 'copa')
  assert training.predict(
      tmp_path / 'copa', tmp_path / 'd.jsonl', say=silent)[0] == read(
          tmp_path / 'copa' / 'predictions.jsonl')


@pytest.mark.slow
def test_a_chat_is_predicted_in_its_template(config, tiny_dir, tmp_path):
  from mezo_jax import models
  base = tmp_path / 'base'
  shutil.copytree(tiny_dir, base)
  tokenizer = models.load_tokenizer(base)
  tokenizer.add_special_tokens({'additional_special_tokens': ['<end>']})
  tokenizer.chat_template = (
      '{% for m in messages %}It was {{ m.content }} <end>{% endfor %}'
      '{% if add_generation_prompt %} the{% endif %}')
  tokenizer.save_pretrained(base)
  settings = config('generation', task__chat=True, task__stop='')
  settings.objective = 'f1'
  settings.model.name = str(base)
  train.run(settings, tmp_path / 'run')
  file, want = tmp_path / 'test.jsonl', tmp_path / 'run' / 'predictions.jsonl'
  assert training.predict(tmp_path / 'run', file, say=silent)[0] == read(want)
  model = export(tmp_path / 'run', tmp_path / 'm', say=silent)
  assert training.predict(model, file, say=silent)[0] == read(want)
  plain = dataclasses.replace(settings.task, chat=False)
  about = json.loads((model / 'mezo_jax.json').read_text())
  about['config']['task'] = dataclasses.asdict(plain)
  (model / 'mezo_jax.json').write_text(json.dumps(about))
  assert training.predict(model, file, say=silent)[0] != read(want)
  generation = json.loads((model / 'generation_config.json').read_text())
  assert generation == {
      'eos_token_id': tokenizer.convert_tokens_to_ids('<end>'),
      'pad_token_id': tokenizer.pad_token_id}
