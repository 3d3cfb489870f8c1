"""What a person sees of a run: its progress, its answers and its trace."""

import gzip
import json
import sys

import numpy as np
import pytest
import runs

from mezo_jax.core.errors import InputError
from mezo_jax.runs import loggers
from mezo_jax.tasks import Task
import train


class Time:
  """Stands for the time, which only `sleep` moves."""

  def __init__(self):
    self.now = 1000.0

  def time(self):
    return self.now

  def sleep(self, seconds):
    self.now += seconds


@pytest.fixture
def time(monkeypatch):
  """Returns the time of loggers, and lets the output be a file."""
  mine = Time()
  monkeypatch.setattr(loggers, 'time', mine)
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: False, raising=False)
  return mine


def rank(report):
  return {'score': report['accuracy'], 'loss': report['loss']}


def watched(tmp_path, time, steps, seconds, losses=None, eval_every=1000,
            start=0):
  """Shows steps that take some seconds each; returns the metrics."""
  metrics = loggers.Metrics(tmp_path, start)
  dev = lambda: loggers.spell_dev(metrics, rank, 'accuracy')
  progress = loggers.Progress(
      metrics, steps, start, loggers.Clock(), dev=dev, eval_every=eval_every,
      rates=1e-3 * (1 - np.arange(steps) / steps))
  for step in range(start + 1, steps + 1):
    time.sleep(seconds)
    progress.read(step, 10, dict(
        loss=1.0 if losses is None else losses[step - 1], skipped=False,
        projected_grad=np.array([2.0])))
    if step % eval_every == 0:
      time.sleep(10 * seconds)
      metrics.write('dev', step, accuracy=1 / step, loss=0.5)
      progress.evaluated()
      progress.restart()
  progress.close()
  metrics.close()
  return metrics


@pytest.mark.parametrize('steps,seconds,least,most', [
    (20_000, 0.01, 30, 85), (20_000, 10, 80, 100), (1000, 0.001, 1, 2),
    (30, 60, 30, 30)])
def test_the_number_of_lines_is_limited(
    tmp_path, time, capsys, steps, seconds, least, most):
  watched(tmp_path, time, steps, seconds)
  lines = capsys.readouterr().out.splitlines()
  assert least <= len(lines) <= most
  assert f'{steps}/{steps}' in lines[-1]


def test_the_first_line_of_slow_steps_comes_early(tmp_path, time, capsys):
  watched(tmp_path, time, 20_000, 10)
  assert 'step 1/20000' in capsys.readouterr().out.splitlines()[0]


def test_a_line_has_what_one_asks_for(tmp_path, time, capsys):
  """Means over a hundred steps, without the time of evaluations."""
  losses = np.concatenate([np.full(100, 5.0), np.tile([1.0, 2.0], 150)])
  watched(tmp_path, time, 400, 30, losses, eval_every=100)
  line = next(line for line in capsys.readouterr().out.splitlines()
              if 'step 300/400' in line)
  for text in ('loss 1.500', '|g| 2.0', 'lr 2.5', '30 s/step',
               'dev accuracy 0.5%', 'best 1.0% at step 100'):
    assert text in line
  # 100 steps, and two evaluations of 300 s
  assert '1 h left' in line


def test_seconds_are_without_those_of_compiling(time):
  clock = loggers.Clock()
  time.sleep(60)
  clock.skip(58)
  assert clock.seconds() == 2


def test_a_resumed_run_goes_on_with_its_mean_and_its_best(
    tmp_path, time, capsys):
  watched(tmp_path, time, 20, 5, np.arange(20.0), eval_every=10)
  capsys.readouterr()
  metrics = loggers.Metrics(tmp_path, 15)
  progress = loggers.Progress(
      metrics, 20, 15, loggers.Clock(), rates=np.ones(20), eval_every=10,
      dev=lambda: loggers.spell_dev(metrics, rank, 'accuracy'))
  progress.read(16, None, dict(loss=15.0, skipped=False,
                               projected_grad=np.ones(1)))
  line = capsys.readouterr().out
  assert f'loss {np.mean(np.arange(16)):.3f}' in line
  assert 'best 10.0% at step 10' in line
  progress.close()


def test_a_private_line_has_no_loss(tmp_path, time, capsys):
  metrics = loggers.Metrics(tmp_path)
  progress = loggers.Progress(
      metrics, 1, 0, loggers.Clock(), rates=np.ones(1), eval_every=1,
      dev=lambda: '', loss=False)
  progress.read(1, 10, dict(loss=np.nan, skipped=False,
                            projected_grad=np.ones(1)))
  progress.close()
  assert 'loss' not in capsys.readouterr().out
  assert 'loss' not in metrics.records[0]


def test_a_tie_goes_to_the_lower_loss_and_then_to_the_first(tmp_path):
  metrics = loggers.Metrics(tmp_path)
  for step, accuracy, loss in ((0, 0.9, 0.1), (1, 0.5, 0.7), (2, 0.8, 0.6),
                               (3, 0.8, 0.5), (4, 0.8, 0.5)):
    metrics.write('dev', step, accuracy=accuracy, loss=loss)
  step, report = loggers.best_on_dev(metrics, rank)
  assert step == 3 and report == {'accuracy': 0.8, 'loss': 0.5}


# --- whole runs -------------------------------------------------------------


def answers(workdir):
  """Returns the records of answers.jsonl."""
  return [json.loads(line) for line in (
      workdir / 'answers.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_answers_are_shown_and_kept(tiny_dir, reviews_file, tmp_path, capsys):
  """Those that the accuracy of the report counts; and a trace, if wanted."""
  config = runs.small_config(tiny_dir, reviews_file, loggers=())
  train.run(config, tmp_path / 'a', profile=range(2, 4))
  out = capsys.readouterr().out
  found = answers(tmp_path / 'a')
  assert [each['step'] for each in found] == [0] * 20 + [3] * 20 + [6] * 20
  for record in loggers.read(tmp_path / 'a/metrics.jsonl'):
    if record['kind'] == 'dev':
      right = [each['answer'] == each['right'] for each in found
               if each['step'] == record['step']]
      assert np.mean(right) == pytest.approx(record['accuracy'])
  assert out.count(' -> ') == 9
  assert {each['answer'] for each in found} <= {' terrible', ' great'}
  assert 'the best so far' in out

  # The trace has the steps, and the run is the one without it.
  path, = (tmp_path / 'a/profile').rglob('perfetto_trace.json.gz')
  events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
  assert sum(event.get('name') == 'step' for event in events) == 2
  train.run(config, tmp_path / 'b')
  assert runs.records(tmp_path / 'a') == runs.records(tmp_path / 'b')
  assert not (tmp_path / 'b/profile').exists()
  with pytest.raises(InputError, match='profile'):
    train.run(config, tmp_path / 'c', profile=range(5, 9))


@pytest.mark.slow
def test_generated_answers_and_their_cross_entropy(tiny_dir, tmp_path):
  rows = [{'text': f'a story {i}', 'answers': ['great fun']} for i in range(40)]
  data = tmp_path / 'rows.jsonl'
  data.write_text('\n'.join(map(json.dumps, rows)))
  config = runs.small_config(
      tiny_dir, data, data__num_train=16, data__num_dev=8, data__num_test=8,
      objective='f1', loggers=(), steps=2, eval_every=1)
  config.task = Task(kind='generation', template='{text} was', max_new_tokens=3)
  train.run(config, tmp_path / 'run')
  dev = [r for r in loggers.read(tmp_path / 'run/metrics.jsonl')
         if r['kind'] == 'dev']
  assert all(r['loss'] == -r['f1'] and r['cross_entropy'] > 1 for r in dev)
  config.objective = 'lm'  # whose loss is the cross-entropy
  train.run(config, tmp_path / 'lm')
  first = next(r for r in loggers.read(tmp_path / 'lm/metrics.jsonl')
               if r['kind'] == 'dev')
  assert dev[0]['cross_entropy'] == pytest.approx(first['loss'])
  assert all(each['right'] == 'great fun' for each in answers(
      tmp_path / 'run'))
