"""Tests the range test that finds a learning rate, and learning_rate='auto'."""

import itertools
import json

import jax.numpy as jnp
import pytest
import runs

import mezo_jax
from mezo_jax.cli import commands
from mezo_jax.core.errors import InputError
from mezo_jax.training import learning_rates


def found_on(loss, steps=8000, n=1, params=None):
  """Returns the range test of MeZO on a loss without batches."""
  return learning_rates.range_test(
      lambda rate: mezo_jax.mezo(rate, 1e-3, key=0, num_samples=n),
      lambda params, batch: loss(params),
      jnp.ones(20) if params is None else params,
      itertools.repeat(jnp.zeros(1)), steps)


@pytest.mark.parametrize('n', [1, 4])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_the_edge_is_where_a_quadratic_diverges(scale, n):
  """Compares with the rate above which the expected loss grows.

  With the Hessian h I in d dimensions, the mean of |x|^2 changes in each step
  by the factor 1 - 2 eta h + (eta h)^2 (d + n + 1) / n, so eta is unstable
  above 2 n / (h (d + n + 1)). The loss must first grow again to more than it
  was at the start, so the test finds a rate that is a bit larger.
  """
  found = found_on(lambda x: scale / 2 * jnp.sum(x**2), n=n)
  limit = 2 * n / (scale * (20 + n + 1))
  assert limit / 1.5 < found.edge < 4 * limit
  assert found.loss == pytest.approx(10 * scale, rel=0.01)
  assert found.steps <= 0.05 * 8000


def test_the_params_do_not_move_in_the_first_half():
  """Checks that the changes are relative to the loss before training."""
  found = found_on(lambda x: jnp.sum(x**2))
  assert abs(found.changes[0]) < 1e-2 * found.loss
  assert found.changes.min() < -0.5 * found.loss  # training works in between


@pytest.mark.parametrize('loss', [
    lambda x: 1.0 + 0 * jnp.sum(x), lambda x: jnp.sum(x) / 0.0])
def test_a_loss_without_gradient_has_no_rate(loss):
  """Checks that the error names the field to set."""
  with pytest.raises(InputError, match='learning_rate'):
    found_on(loss)


def flags(tiny_dir, reviews_file, *more):
  """Returns the config of a small run."""
  return [f'--config.model.name={tiny_dir}',
          f'--config.data.train={reviews_file}', *runs.SMALL,
          '--config.optimizer.learning_rate=auto', '--config.steps=20',
          '--config.eval_every=10', *more]


def train(workdir, *argv):
  """Trains in this process, and returns the exit status."""
  with pytest.raises(SystemExit) as e:
    commands.main(['train', f'--workdir={workdir}', *argv])
  return e.value.code


def test_a_run_finds_its_rate_once(tiny_dir, reviews_file, tmp_path, capsys):
  """Checks resume, and equality with a run that is given the same rate."""
  argv = flags(tiny_dir, reviews_file)
  assert not train(tmp_path / 'auto', *argv, '--config.steps=10')
  found = json.loads((tmp_path / 'auto' / learning_rates.FILE).read_text())
  assert len(found['rates']) == len(found['changes'])
  assert capsys.readouterr().out.count('range test: ') == 1
  assert not train(tmp_path / 'auto', *argv)
  assert 'range test: ' not in capsys.readouterr().out
  again = json.loads((tmp_path / 'auto' / learning_rates.FILE).read_text())
  assert again == found
  result = json.loads((tmp_path / 'auto' / 'result.json').read_text())
  assert result['learning_rate'] == found['learning_rate'] > 0
  assert result['forwards'] == 40

  rate = f'--config.optimizer.learning_rate={found["learning_rate"]!r}'
  assert not train(tmp_path / 'given', *argv, rate, '--config.steps=10')
  assert not train(tmp_path / 'given', *argv, rate)
  for name in ('config.json', 'steps.log'):
    assert ((tmp_path / 'auto' / name).read_bytes()
            == (tmp_path / 'given' / name).read_bytes()), name
  # A run that began with a number cannot go on with another one.
  assert 'learning_rate' in str(train(tmp_path / 'given', *argv))


@pytest.mark.parametrize('argv,names', [
    (['--config.method=finetune'], 'finetune'),
    (['--config.spsa.combine=z_score', '--config.spsa.num_samples=4'],
     'z_score'),
    (["--config.optimizer.learning_rate=car"], 'learning_rate'),
    (['--config.optimizer.learning_rate=-1'], 'learning_rate')])
def test_what_has_no_automatic_rate_is_refused(
    tiny_dir, reviews_file, tmp_path, argv, names):
  """Checks that the error names the field."""
  assert names in str(train(tmp_path, *flags(tiny_dir, reviews_file), *argv))
