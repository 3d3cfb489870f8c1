"""What stops a run that cannot come to anything, and what looks wrong in one.

Losses of single batches are noisy, so a run is judged by the mean of a window
of steps against that of its first one; and the same for a run that goes on,
whose earlier steps the log has.
"""

import collections
from collections.abc import Callable

import numpy as np

from mezo_jax import config as config_lib
from mezo_jax import replay
from mezo_jax.errors import Stopped

TRY = ('Try a lower --config.optimizer.learning_rate, or '
       '--config.model.dtype=float32.')
WINDOW = 100  # steps
_SPIKE = 8.0  # standard deviations of the window before


def make(config: config_lib.Train, log: replay.Log, start: int,
         say: Callable[[str], None]) -> Callable[[int, dict], None]:
  """``watch(step, values)``, to be called with each step's metrics in turn.

  Args:
    config: ``max_skipped``, ``max_still`` and ``max_rise`` of it.
    log: whose steps up to ``start`` are looked at first.
    start: the steps that are not made again.
    say: reports losses that jump, of steps that the log did not have.

  Returns:
    A function that raises `Stopped` after ``max_skipped`` steps in a row whose
    loss is not finite; after ``max_still`` whose projected gradients are 0; and
    where the mean loss of a window is above that of the first by more than
    ``max_rise`` standard deviations of a step's.
  """
  window, still, quiet_until = collections.deque(maxlen=WINDOW), 0, 0
  first, lowest, made = None, (np.inf, 0), log.end
  has_log = log.steps.projected_grads.shape[1] > 0

  def watch_loss(step: int, loss: float) -> None:
    nonlocal first, lowest, quiet_until
    if not np.isfinite(loss):
      return
    if len(window) == WINDOW and step > max(quiet_until, made):
      mean, deviation = _mean_deviation(window)
      if loss > mean + _SPIKE * deviation:
        say(f'warning: the loss of step {step} is {loss:.3f}; the {WINDOW} '
            f'steps before had {mean:.3f}, with a standard deviation of '
            f'{deviation:.3f}.')
        quiet_until = step + WINDOW
    window.append(loss)
    if len(window) < WINDOW:
      return
    mean, deviation = _mean_deviation(window)
    first, lowest = first or (mean, deviation), min(lowest, (mean, step))
    if config.max_rise and mean > first[0] + config.max_rise * first[1]:
      raise Stopped(
          f'the loss has risen: it was {mean:.3f} in the {WINDOW} steps up to '
          f'{step}, and {first[0]:.3f} in the first {WINDOW}, with a standard '
          f'deviation of {first[1]:.3f}. It was lowest up to step {lowest[1]}, '
          f'{lowest[0]:.3f}'
          + (', whose weights the log has (replay --until)' if has_log else '')
          + f'. {TRY}')

  def watch(step: int, values: dict) -> None:
    nonlocal still
    if values.get('skipped_in_a_row', 0) >= config.max_skipped:
      raise Stopped(
          f'the last {config.max_skipped} steps, up to {step}, gave a loss '
          'that is not finite and were skipped; the parameters are as before '
          f'them. {TRY}')
    moved = np.any(values.get('projected_grad', 1.0))  # NaN is skipped
    still = 0 if moved else still + 1
    if still and still == config.max_still:
      raise Stopped(
          f'the projected gradients have been 0 since step {step - still}: '
          'the weights do not move any more, and may be lost; the log has '
          f'those of any step before (replay --until). {TRY}')
    watch_loss(step, float(values.get('loss', np.nan)))

  for step in range(log.steps.first, min(start, log.steps.last) + 1):
    projected_grad, loss = log.steps.at(step)
    watch(step, dict(projected_grad=projected_grad, loss=loss))
  return watch


def _mean_deviation(losses) -> tuple[float, float]:
  """The deviation is not below a hundredth: full batches hardly vary."""
  mean = float(np.mean(losses))
  return mean, max(float(np.std(losses)), 0.01 * abs(mean))
