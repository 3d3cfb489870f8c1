"""Losses, scores, parameters that are not finite: no result, said plainly."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from runs import small_config

from mezo_jax import models
from mezo_jax.core.errors import Stopped
from mezo_jax.export.from_run import export
from mezo_jax.runs import checkpoint, guards
from mezo_jax.tasks import Task
import train


@pytest.fixture(scope='module')
def lost(tiny_dir, reviews_file, tmp_path_factory):
  """A run whose parameters are not finite from its first step on."""
  workdir = tmp_path_factory.mktemp('lost')
  config = small_config(
      tiny_dir, reviews_file, steps=30, optimizer__learning_rate=3e38,
      max_skipped=4)
  with pytest.raises(Stopped, match='4 steps.*optimizer.learning_rate'):
    train.run(config, workdir)
  return workdir, config


def strict(path):
  """The records of a log, in which NaN and Infinity are no JSON."""
  def refuse(name):
    raise AssertionError(f'{name} in {path}')
  return [json.loads(line, parse_constant=refuse)
          for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_losses_that_are_not_finite_stop_the_run(lost):
  rows = strict(lost[0] / 'metrics.jsonl')
  assert [r['loss'] for r in rows if r['kind'] == 'dev'][-1] is None
  rows = [r for r in rows if r['kind'] == 'train']
  assert rows[-1]['skipped'] >= 4 and rows[-1]['loss'] is None


def test_a_run_without_a_finite_evaluation_has_no_result(lost):
  workdir, config = lost
  with pytest.raises(Stopped, match='checkpoints .*finite'):
    train.run(dataclasses.replace(config, steps=5, max_skipped=9), workdir)
  assert not (workdir / 'result.json').exists()


@pytest.mark.slow
def test_a_run_that_skipped_every_step_has_no_result(
    tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, steps=2, spsa__eps=3e38)
  with pytest.raises(Stopped, match='2 steps.*optimizer.learning_rate'):
    train.run(config, tmp_path)
  assert not (tmp_path / 'result.json').exists()


@pytest.mark.slow
def test_a_run_that_does_not_move_any_more_stops(
    tiny_dir, reviews_file, tmp_path, monkeypatch):
  """RMSNorm keeps the loss of lost weights finite, and every difference 0."""
  config = small_config(
      tiny_dir, reviews_file, steps=30, optimizer__learning_rate=1e8)
  monkeypatch.setattr(guards, 'STILL', 5)
  with pytest.raises(Stopped, match='after step [0-9]+'):
    train.run(config, tmp_path)


@pytest.fixture(scope='module')
def nan_dir(tiny_dir, tmp_path_factory):
  """A model that computes NaN."""
  model, params = models.load(tiny_dir, progress=False)
  params['embed']['embedding'] *= np.nan
  return models.save(tmp_path_factory.mktemp('nan') / 'm', model, params,
                     progress=False, tokenizer=models.load_tokenizer(tiny_dir))


@pytest.mark.parametrize('method,message', [
    ('zero_shot', 'zero_shot .*40 of 40'),
    ('icl', 'icl .*40 of 40'), ('linear_probe', 'probe .*40 of 40')])
@pytest.mark.slow_except(method=['zero_shot'])
def test_a_model_that_is_not_finite_has_no_result(
    nan_dir, reviews_file, tmp_path, method, message):
  config = small_config(nan_dir, reviews_file, method=method, num_demos=2)
  with pytest.raises((Stopped, ValueError), match=message):
    train.run(config, tmp_path)
  assert not (tmp_path / 'result.json').exists()


@pytest.mark.slow
def test_texts_of_a_model_that_is_not_finite_are_no_result(nan_dir, tmp_path):
  row = json.dumps({'question': 'a film', 'answers': ['good']})
  data = tmp_path / 'qa.jsonl'
  data.write_text('\n'.join([row] * 100))
  config = small_config(nan_dir, data, method='zero_shot')
  config.task = Task(kind='generation', template='{question} It was',
                     stop='the', max_new_tokens=3)
  with pytest.raises(Stopped, match='f1 0.0%.*40 of 40'):
    train.run(config, tmp_path / 'w')


def test_scores_that_are_not_finite_are_never_the_best(tmp_path):
  state, nan = {'w': jax.numpy.arange(4.0)}, float('nan')
  kept = checkpoint.Checkpoints(tmp_path)
  kept.save(1, state, {'score': nan, 'loss': nan})
  with pytest.raises(FileNotFoundError, match='best step'):
    kept.best_step()
  for step, score, loss in ((2, .6, .5), (3, .6, nan), (4, nan, .1),
                            (5, .5, float('-inf'))):
    kept.save(step, state, {'score': score, 'loss': loss})
  assert kept.best_step() == 2 and kept.steps() == [2, 5]
  kept.close()


def test_parameters_that_are_not_finite_are_not_exported(lost, tmp_path):
  step = checkpoint.latest_step(lost[0] / 'checkpoints')
  with pytest.raises(ValueError, match='embed/embedding of step [35]'):
    export(lost[0], tmp_path / 'm', step)
  assert not (tmp_path / 'm').exists()
