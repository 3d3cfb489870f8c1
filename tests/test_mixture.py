"""Several tasks in one run."""

import dataclasses
import functools
import json

import helpers
import jax
import numpy as np
import pytest
import runs

from mezo_jax import peft
from mezo_jax.tasks import Task
from mezo_jax.training import build, checks, mixture, trainable
from mezo_jax.training import config as config_lib
from mezo_jax.training.config import Also
import train


@pytest.fixture
def config(tiny_dir, reviews_file):
  """Label words at the end; candidates of two words, whose LM loss is trained,
  of weight 3."""
  base = runs.small_config(
      tiny_dir, reviews_file, steps=6, eval_every=3, checkpoint_every=3,
      optimizer__learning_rate=1e-3)
  other = Task(template='a film {text} was', objective='lm', metric='macro_f1',
               label_words=(' bad film', ' good'))
  data = dataclasses.replace(base.data, batch_size=16, seed=1, num_test=30)
  base.also = (Also('other', other, data, 3.0),)
  return base


@pytest.mark.slow
def test_a_run_and_its_table(config, tmp_path, capsys):
  """Stopped after three steps and gone on with, it is bitwise the run that was
  not; each task has its metric, and their mean."""
  whole = train.run(config, tmp_path / 'whole')
  said = capsys.readouterr().out
  part = tmp_path / 'part'
  train.run(dataclasses.replace(config, steps=3), part)
  train.run(config, part)
  helpers.assert_bitwise(runs.saved(part)[1], runs.saved(tmp_path / 'whole')[1])
  final = whole['final']
  assert whole['metric'] == 'mean'
  np.testing.assert_allclose(final['mean'], np.mean(
      [final['first/accuracy'], final['other/macro_f1']]))
  np.testing.assert_allclose(final['loss'], (
      final['first/loss'] + 3 * final['other/loss']) / 4)
  assert final['first/count'] == 40 and final['other/count'] == 30
  for name in ('first', 'other'):
    assert f'| {name} |' in said
  assert f'{100 * final["other/macro_f1"]:.1f}' in said.split('| other |')[1]
  dev = [r for r in runs.records(tmp_path / 'whole') if r['kind'] == 'dev']
  assert [r['step'] for r in dev] == [0, 3, 6]
  best = max(dev[1:], key=lambda r: r['mean'])
  assert final['step'] == best['step']


@pytest.mark.slow
def test_tasks_are_drawn_by_weight_wherever_a_run_begins(config, tmp_path):
  config.steps = 2000
  built = build.build(config, say=lambda text: None)
  mix = mixture.make(config, built, tmp_path, lambda text: None)
  feed = mix.feed(built.mesh, 0, config.steps)
  first = [next(feed) for _ in range(40)]
  later = mix.feed(built.mesh, 25, config.steps)
  for tokens, of, _ in first[25:]:
    tokens_, of_, _ = next(later)
    assert (tokens, of.task) == (tokens_, of_.task)
    helpers.assert_bitwise(of.batch['row'], of_.batch['row'])
  drawn = np.array([of.task for _, of, _ in first])
  assert {*drawn} == {0, 1}
  assert [of.batch['row'].shape[0] for _, of, _ in first] == [
      16 if i else 8 for i in drawn]
  many = np.random.RandomState(config.seed).choice(2, 2000, p=[0.25, 0.75])
  assert np.array_equal(many[:40], drawn)
  assert abs(many.mean() - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 2000)

  # Each batch's loss is its own task's.
  whole = peft.join(built.params, built.frozen)
  for part in (0, 1):
    of = next(of for _, of, _ in first if of.task == part)
    got = jax.jit(mix.value_fn)(whole, of)
    want = jax.jit(mix.parts[part].built.loss_fn)(whole, of.batch)
    helpers.assert_bitwise(got, want)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_zero_shot_has_no_part_of_an_adapter(config, tmp_path):
  """Nor the frozen one."""
  def tasks_of(config):
    built = build.build(config, say=lambda text: None)
    return built, mixture.make(config, built, tmp_path, lambda text: None)
  plain, tasks = tasks_of(config)
  want = tasks.ask().dev(plain.params)
  config.peft.method, config.peft.mask = 'prefix', 'prefix_v'
  built, tasks = tasks_of(config)
  untrained = functools.partial(trainable.before_training, config)
  assert tasks.ask(untrained).dev(untrained(built.params)) == want
  assert tasks.ask().dev(built.params)['loss'] != want['loss']


def test_the_config_is_kept(config):
  saved = json.loads(json.dumps(config_lib.to_json(config)))
  assert config_lib.from_json(saved) == config
  config_lib.check_same_run(config, saved)
  config.also[0].weight = 2.0
  with pytest.raises(
      ValueError, match=r'also\[0\]\.weight .*3\.0 .*2\.0'):
    config_lib.check_same_run(config, saved)


@pytest.mark.parametrize('change, message', [
    (dict(method='icl'), "method 'icl'.*also"),
    (dict(weight=0.0), 'also: .*weights'),
    (dict(name='first'), 'also: .*first, first'),
    (dict(name='a b'), 'also: .*a b'),
    (dict(task=Task(kind='head', template='{text}', label_names=('a', 'b'))),
     "also: .*kind 'head'"),
    (dict(task=Task(template='no column {text}')), "task 'other': ")])
def test_what_cannot_be_is_refused(config, change, message):
  if 'method' in change:
    config.method = change['method']
  else:
    config.also = (dataclasses.replace(config.also[0], **change),)
  with pytest.raises(ValueError, match=message):
    checks.check_config(config)
