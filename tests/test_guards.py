"""What stops a run that has diverged, and which losses are reported."""

import numpy as np
import pytest
import runs

from mezo_jax.core.errors import Stopped
from mezo_jax.runs import guards, replay
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods
import train


def watched(losses, said, start=0, logged=0, **changes):
  """Takes the losses of steps 1, 2, ..., of which some were made before."""
  limits = dict(max_skipped=10, max_rise=10.0) | changes
  steps = replay.Steps(1, np.array(losses[:logged], np.float32),
                       np.ones((logged, 1), np.float32), frozenset())
  log = replay.Log(None, {}, steps)
  records = [dict(step=i, loss=None if np.isnan(loss) else loss,
                  projected_grad=[1.0]) for i, loss in enumerate(losses, 1)]
  watch = guards.make(records[:logged], log, start, said.append, **limits)
  for step in range(start + 1, len(losses) + 1):
    watch(step, dict(loss=losses[step - 1], projected_grad=np.ones(1)))


def noisy(mean, steps, seed=0):
  return mean + 0.1 * np.random.default_rng(seed).normal(size=steps)


def test_a_run_that_diverges_is_stopped():
  losses = np.concatenate([noisy(1.0, 150), noisy(0.5, 150), noisy(3.0, 200)])
  with pytest.raises(Stopped) as e:
    watched(losses, [])
  message = str(e.value)
  assert 'replay --until' in message
  lowest = int(message.split('lowest up to step ')[1].split(',')[0])
  means = np.convolve(losses, np.ones(100) / 100, 'valid')[:300 - 99]
  assert abs(lowest - (100 + np.argmin(means))) <= 1
  watched(losses, [], max_rise=0.0)


def test_a_run_that_goes_on_is_judged_as_one_that_was_not_stopped():
  """By its first steps, which the log has; and it stops at the same one."""
  losses = np.concatenate([noisy(1.0, 200), noisy(3.0, 200)])
  losses[50] = np.nan
  stops = []
  for more in (dict(), dict(start=120, logged=150), dict(start=0, logged=150)):
    with pytest.raises(Stopped) as e:
      watched(losses, [], **more)
    stops.append(str(e.value))
  assert len(set(stops)) == 1


@pytest.mark.parametrize('losses', [
    noisy(1.0, 1000), np.linspace(3, 0.1, 1000), np.full(500, 0.7),
    np.full(500, np.nan), -noisy(0.5, 500),
    np.concatenate([np.full(200, 0.7), [np.nan] * 5, np.full(200, 0.69)]),
    np.concatenate([noisy(1.0, 300), noisy(0.2, 300), noisy(0.8, 300)])],
    ids=['noise', 'falling', 'constant', 'lost', 'negative', 'holes',
         'below the start'])
def test_what_is_no_divergence(losses):
  said = []
  watched(losses, said, max_skipped=10_000)
  assert not said


def test_a_jump_is_reported_once_and_not_again_by_a_run_that_goes_on():
  losses = noisy(1.0, 400)
  losses[250:253] = 4.0
  said = []
  watched(losses, said)
  assert len(said) == 1
  assert 'step 251' in said[0] and '4.000' in said[0]
  said.clear()
  watched(losses, said, start=200, logged=300)
  assert not said


# (learning rate, mean squared projected gradient, loss, steps) that runs of the
# quickstart had in their first hundred steps, and their rate over a hundred.
@pytest.mark.parametrize('rate,square,loss,steps,low', [
    (5e-4, 15.0, 0.65, 20_000, False), (5e-6, 109.0, 0.97, 20_000, True),
    (1.5e-4, 60.0, 0.8, 200, False), (1.5e-6, 100.0, 1.0, 200, True)])
def test_a_rate_that_is_too_low_is_reported_once(
    rate, square, loss, steps, low):
  rates, said = rate * (1 - np.arange(steps) / steps), []
  g = np.sqrt(square) * np.random.default_rng(0).normal(size=(200, 1))
  log = replay.Log(None, {}, replay.no_steps(1, 0))
  watch = guards.make([], log, 0, said.append, max_skipped=10, max_rise=0.0,
                      rates=rates)
  for step, losses in enumerate(noisy(loss, 200), 1):
    watch(step, dict(loss=losses, projected_grad=g[step - 1]))
  assert len(said) == low
  assert all('too low' in text for text in said)


def test_rates_are_judged_where_the_loss_and_the_step_have_one_unit():
  holds = lambda **changes: methods.lowers_by_square(
      runs.changed(config_lib.Train(), **changes))
  assert holds() and holds(spsa__num_samples=4, spsa__combine='one_sided')
  for changes in (
      dict(spsa__combine='z_score'), dict(spsa__combine='fzoo'),
      dict(method='finetune'), dict(method='sign'), dict(method='svrg'),
      dict(method='private'), dict(method='zero_shot'), dict(objective='f1'),
      dict(optimizer__groups=(('bias', 1.0, 1.0),)),
      dict(objective='reward', task__kind='generation')):
    assert not holds(**changes)


@pytest.mark.slow
def test_a_run_stops_and_stops_again(tiny_dir, reviews_file, tmp_path,
                                     monkeypatch):
  """With the same sentence, however often it is started."""
  monkeypatch.setattr(guards, 'WINDOW', 5)
  config = runs.small_config(
      tiny_dir, reviews_file, steps=60, eval_every=60, checkpoint_every=4,
      zero_shot=False, optimizer__learning_rate=3e-2, max_rise=1e-3)
  stops = []
  for _ in range(2):
    with pytest.raises(Stopped, match='optimizer.learning_rate') as e:
      train.run(config, tmp_path)
    stops.append(str(e.value))
  assert stops[0] == stops[1]
  config.max_rise = 0.0
  assert train.run(config, tmp_path)['steps'] == 60


@pytest.mark.slow
def test_without_a_log_too(tiny_dir, reviews_file, tmp_path, monkeypatch):
  """Backpropagation: a run that goes on knows how it began from its metrics."""
  monkeypatch.setattr(guards, 'WINDOW', 5)
  config = runs.small_config(
      tiny_dir, reviews_file, method='finetune', steps=60, eval_every=60,
      checkpoint_every=4, zero_shot=False, optimizer__learning_rate=0.3,
      max_rise=1e-3)
  stops = []
  for _ in range(2):
    with pytest.raises(Stopped, match='optimizer.learning_rate') as e:
      train.run(config, tmp_path)
    stops.append(str(e.value))
  assert stops[0] == stops[1] and 'replay' not in stops[0]
