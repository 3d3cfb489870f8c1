"""Tests the command diagnose, at the start and at a checkpoint of a run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from mezo_jax import training
from mezo_jax.cli import commands
from mezo_jax.training import diagnosis


def flags(tiny_dir, reviews_file, *more):
  """Returns the config flags of a small run."""
  return [f'--config.model.name={tiny_dir}',
          f'--config.data.train={reviews_file}', *runs.SMALL, *more]


@pytest.fixture(scope='module')
def out(tiny_dir, reviews_file, tmp_path_factory):
  """Returns the directory of a diagnosis before training."""
  path = tmp_path_factory.mktemp('diagnosis')
  commands.main(['diagnose', f'--out={path}', '--directions=24',
                 '--derivatives=2', *flags(tiny_dir, reviews_file)])
  return path


def test_a_diagnosis_is_written_and_drawn(out):
  """Checks that the report has what the page of the documentation explains."""
  report = json.loads((out / 'diagnosis.json').read_text())
  assert report['step'] == 0 and report['configured'] == 1e-3
  assert report['loss']['value'] == pytest.approx(np.log(2), rel=0.2)
  assert {g['group'] for g in report['groups']} >= {
      'embedding and head', 'norms', 'attention', 'MLP'}
  assert report['derivatives']['batches'] == 2
  assert len(report['steps']['rates']) == len(report['steps']['decrease'])
  assert (out / 'diagnosis.png').stat().st_size > 1000
  text = diagnosis.spell(report)
  assert len(text.splitlines()) < 50 and 'nan' not in text


def test_a_checkpoint_is_measured_with_its_weights(
    tiny_dir, reviews_file, tmp_path, capsys):
  """Checks that the loss is that of the trained weights, which are kept."""
  workdir = tmp_path / 'run'
  with pytest.raises(SystemExit) as e:
    commands.main(['train', f'--workdir={workdir}', *flags(
        tiny_dir, reviews_file, '--config.optimizer.learning_rate=3e-3',
        '--config.steps=60', '--config.eval_every=30',
        '--config.select=loss')])
  assert not e.value.code
  before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
  commands.main(['diagnose', f'--run={workdir}', '--directions=16'])
  report = json.loads((workdir / 'diagnosis.json').read_text())
  assert report['step'] in (30, 60)
  assert all(p.read_bytes() == content for p, content in before.items())

  # The exported model has the same loss on the same batches, and the model
  # before training has another one.
  commands.main(['export', str(workdir), str(tmp_path / 'model')])
  losses = []
  for model in (tmp_path / 'model', tiny_dir):
    out = tmp_path / f'of_{model.name}'
    commands.main(['diagnose', f'--out={out}', '--directions=16',
                   *flags(model, reviews_file)])
    found = json.loads((out / 'diagnosis.json').read_text())
    losses.append(found['loss']['value'])
  assert report['loss']['value'] == pytest.approx(losses[0], rel=1e-4)
  assert abs(losses[1] - losses[0]) > 1e-2


@pytest.mark.parametrize('argv,names', [
    (['--config.method=finetune'], 'method'),
    (['--config.method=zero_shot'], 'method'),
    (['--config.method=private', '--config.spsa.distribution=normal'],
     'private'),
    (['--run=nowhere'], 'nowhere'), (['--step=3'], '--run'),
    (['--directions=2'], '--directions'),
    (['--run=x', '--config.steps=3'], '--config')])
def test_what_cannot_be_diagnosed_is_refused(argv, names):
  """Checks that an error names the flag or the directory."""
  with pytest.raises(SystemExit) as e:
    commands.main(['diagnose', *argv])
  assert names in str(e.value.code)


def test_any_loss_can_be_diagnosed():
  """Checks the Python function, with groups, on a loss that is not a model."""
  rng = np.random.RandomState(0)
  params = {'w': jnp.array(rng.randn(8)), 'fixed': jnp.arange(3)}

  def loss(params, x):
    return jnp.mean((x @ params['w']) ** 2)

  def batches():
    while True:
      yield {'x': jnp.array(rng.randn(64, 8))}
  report = training.diagnose(
      loss, params, batches(), key=jax.random.key(0), count=200, num_samples=2,
      groups={'weights': 'w'})
  # E[x x'] = I, so the Hessian is about 2 I: tr H = 16, rank 8.
  trace = report['trace']
  assert abs(trace['value'] - 16) < 4 * trace['error']
  assert [g['group'] for g in report['groups']] == ['weights']
  assert report['rank']['value'] == pytest.approx(8, rel=0.5)
  json.dumps(report)
