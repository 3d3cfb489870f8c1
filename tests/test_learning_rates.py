"""Tests the range test that finds a learning rate, and learning_rate='auto'."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
import runs

import mezo_jax
from mezo_jax import training
from mezo_jax.cli import command_line, commands, processes
from mezo_jax.core.errors import InputError
from mezo_jax.training import config as config_lib
from mezo_jax.training import learning_rates, run_files


def found_on(loss, steps=8000, n=1, params=None):
  """Returns the range test of MeZO on a loss without batches."""
  return training.range_test(
      lambda rate: mezo_jax.mezo(rate, 1e-3, key=0, num_samples=n),
      lambda params, batch: loss(params),
      jnp.ones(20) if params is None else params,
      lambda: itertools.repeat(jnp.zeros(1)), steps)


@pytest.mark.parametrize('n', [1, 4])
@pytest.mark.parametrize('scale', [1e-3, 1.0, 1e3])
def test_the_edge_is_where_a_quadratic_diverges(scale, n):
  """Compares with the rate above which the expected loss grows.

  With the Hessian h I in d dimensions, the mean of |x|^2 changes in each step
  by the factor 1 - 2 eta h + (eta h)^2 (d + n + 1) / n, so eta is unstable
  above 2 n / (h (d + n + 1)). The loss, which has fallen a lot, must then grow
  to more than it was at the start, so the test finds a larger rate.
  """
  found = found_on(lambda x: scale / 2 * jnp.sum(x**2), n=n)
  limit = 2 * n / (scale * (20 + n + 1))
  assert limit / 1.5 < found.edge < 4 * limit
  assert found.loss == pytest.approx(10 * scale, rel=0.01)
  assert found.steps <= 0.05 * 8000


@pytest.mark.parametrize('steps', [500, 2000, 8000, 32000])
def test_short_tests_overshoot_by_a_known_factor(steps):
  """Checks the largest stable rate of that quadratic for several lengths."""
  found = found_on(lambda x: jnp.sum(x**2) / 2, steps)
  limit = 2 / (20 + 2)
  assert limit / 3 < learning_rates.limit(found.edge, steps) < 3 * limit
  rates = [learning_rates.suggested(found.edge, steps, schedule)
           for schedule in ('constant', 'linear', 'cosine')]
  assert limit / 50 < rates[0] < rates[1] == rates[2] < limit / 2


def test_directions_count_as_steps():
  """Checks that n times the directions in as many forwards has n times the
  rate, as long as there are few directions."""
  found = [learning_rates.suggested(found_on(
      lambda x: jnp.sum(x**2) / 2, 32000 // n, n, jnp.ones(200)).edge,
      32000 // n, 'linear', n) for n in (1, 4)]
  assert 2 < found[1] / found[0] < 8


def test_changes_are_relative_to_the_loss_before_training():
  """Checks that the params do not move in the steps with the rate 0."""
  found = found_on(lambda x: jnp.sum(x**2))
  assert abs(found.changes[0]) < 1e-2 * found.loss
  assert found.changes.min() < -0.5 * found.loss  # training works in between
  assert found.steps == len(found.rates) + 64


def test_half_precision_params():
  """Checks rates that would be rounded to 0 in the dtype of the params."""
  loss = lambda x: 1e8 * jnp.sum(x.astype(jnp.float32)**2)
  found = found_on(loss, params=jnp.ones(20, jnp.float16))
  exact = found_on(loss)
  assert exact.edge < 1e-8
  assert exact.edge / 3 < found.edge < 3 * exact.edge


def test_batches_of_different_losses():
  """Checks that each batch is compared with its own loss, also if few."""
  offsets = np.random.RandomState(0).randn(5) * 100
  changes = training.range_test(
      lambda rate: mezo_jax.mezo(rate, 1e-3, key=0),
      lambda x, offset: jnp.sum(x**2) + offset, jnp.ones(20),
      lambda: iter(offsets), 8000).changes
  assert abs(changes[:5]).max() < 10


@pytest.mark.parametrize('loss,words', [
    (lambda x: 1.0 + 0 * jnp.sum(x), 'mean square'),
    (lambda x: jnp.sum(x) / 0.0, 'mean square'),
    (lambda x: jnp.tanh(jnp.mean(x)) + 100, 'did not rise')])
def test_a_loss_without_an_edge_has_no_rate(loss, words):
  """Checks that the error says why, and names the field to set."""
  with pytest.raises(InputError, match='learning_rate') as e:
    found_on(loss)
  assert words in str(e.value)


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
  found = json.loads((tmp_path / 'auto' / run_files.RATE).read_text())
  assert len(found['rates']) == len(found['changes'])
  assert 'range test: step' in capsys.readouterr().out
  assert not train(tmp_path / 'auto', *argv)
  assert 'range test: step' not in capsys.readouterr().out
  again = json.loads((tmp_path / 'auto' / run_files.RATE).read_text())
  assert again == found
  result = json.loads((tmp_path / 'auto' / 'result.json').read_text())
  assert result['learning_rate'] == found['learning_rate'] > 0
  assert result['forwards'] == 40  # without those of the test
  config = command_line.read_config('own', argv)
  assert processes.is_finished(tmp_path / 'auto', config)
  run_files.check_workdir(config, tmp_path / 'auto')

  rate = f'--config.optimizer.learning_rate={found["learning_rate"]!r}'
  assert not train(tmp_path / 'given', *argv, rate, '--config.steps=10')
  assert not train(tmp_path / 'given', *argv, rate)
  for name in ('config.json', 'steps.log'):
    assert ((tmp_path / 'auto' / name).read_bytes()
            == (tmp_path / 'given' / name).read_bytes()), name
  # A run that began with a number cannot go on with another one.
  assert 'learning_rate' in str(train(tmp_path / 'given', *argv))


def test_a_test_of_other_settings_does_not_count(
    tiny_dir, reviews_file, tmp_path):
  """Checks a run that was killed after its test and began with another eps."""
  argv = flags(tiny_dir, reviews_file)
  config = command_line.read_config('own', argv)
  found = {'learning_rate': 0.5, 'config': config_lib.bound(config)}
  (tmp_path / run_files.RATE).write_text(json.dumps(found))
  rate = lambda config: run_files.with_found_rate(
      config, tmp_path).optimizer.learning_rate
  assert rate(config) == 0.5
  config.steps = 40
  assert rate(config) == 0.5
  config.spsa.eps = 1e-2
  assert rate(config) == 'auto'


@pytest.mark.parametrize('argv,names', [
    (['--config.method=finetune'], 'finetune'),
    (['--config.spsa.combine=z_score', '--config.spsa.num_samples=4'],
     'z_score'),
    (['--config.objective=accuracy'], 'accuracy'),
    (["--config.optimizer.learning_rate=car"], 'learning_rate'),
    (['--config.optimizer.learning_rate=-1'], 'learning_rate')])
def test_what_has_no_automatic_rate_is_refused(
    tiny_dir, reviews_file, tmp_path, argv, names):
  """Checks that the error names the field."""
  assert names in str(train(tmp_path, *flags(tiny_dir, reviews_file), *argv))
