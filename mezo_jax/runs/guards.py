"""Stops a run that cannot succeed, and warns about a loss that jumps.

Losses of single batches are noisy. So the mean loss of a window of steps is
compared with that of the first window, which a resumed run computes from its
metrics.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mezo_jax.core.errors import Stopped
from mezo_jax.runs import replay

TRY = ('Try a lower --config.optimizer.learning_rate, or '
       '--config.model.dtype=float32.')
WINDOW = 100  # steps
STILL = 100  # consecutive steps without any change of the weights
_SPIKE = 8.0  # standard deviations of the window before


def make(records: Sequence[dict[str, Any]], log: replay.Log, start: int,
         say: Callable[[str], None], *, max_skipped: int, max_rise: float
         ) -> Callable[[int, dict[str, Any]], None]:
  """Returns ``watch(step, values)``, to be called with each step's metrics.

  Args:
    records: The metrics of earlier steps. Those up to ``start`` are looked at
      first.
    log: The log of the run. A jump of the loss up to its end was reported
      before, and is not reported again.
    start: Number of steps that are not replayed.
    say: Reports a loss that jumps.
    max_skipped: Number of steps in a row whose loss is not finite that stop the
      run.
    max_rise: Standard deviations of a step's loss by which the mean of a window
      may be above that of the first; 0 for no limit.

  Returns:
    A function that raises `Stopped` where one of these limits is reached, or
    after `STILL` steps in a row whose projected gradients are 0.
  """
  window, still, quiet_until = collections.deque(maxlen=WINDOW), 0, log.end
  # Mean and deviation of the first and the last window; the lowest mean and
  # its step.
  first, last, lowest = None, None, (np.inf, 0)

  def watch_loss(step: int, loss: float) -> None:
    nonlocal first, last, lowest, quiet_until
    if not np.isfinite(loss):
      return
    if last and step > quiet_until and loss > last[0] + _SPIKE * last[1]:
      say(f'warning: the loss of step {step} is {loss:.3f}; the {WINDOW} steps '
          f'before had {last[0]:.3f}, with a standard deviation of '
          f'{last[1]:.3f}.')
      quiet_until = step + WINDOW
    window.append(loss)
    if len(window) < WINDOW:
      return
    last = mean, _ = _mean_deviation(window)
    first, lowest = first or last, min(lowest, (mean, step))
    if max_rise and mean > first[0] + max_rise * first[1]:
      raise Stopped(
          f'the loss has risen: it was {mean:.3f} in the {WINDOW} steps up to '
          f'{step}, and {first[0]:.3f} in the first {WINDOW}, with a standard '
          f'deviation of {first[1]:.3f}. It was lowest up to step {lowest[1]}, '
          f'{lowest[0]:.3f}'
          + (', whose weights the log has (replay --until)'
             if log.records else '') + f'. {TRY}')

  def watch(step: int, values: dict) -> None:
    nonlocal still
    if values.get('skipped_in_a_row', 0) >= max_skipped:
      raise Stopped(
          f'the last {max_skipped} steps, up to {step}, gave a loss '
          'that is not finite and were skipped; the parameters are as before '
          f'them. {TRY}')
    # A skipped step has NaN (null in records), which does not count as 0.
    moved = np.any(np.array(values.get('projected_grad', 1.0), float))
    still = 0 if moved else still + 1
    if still == STILL:
      raise Stopped(
          f'the projected gradients have been 0 since step {step - still}: '
          'the weights do not move any more, and may be lost; the log has '
          f'those of any step before (replay --until). {TRY}')
    loss = values.get('loss')
    watch_loss(step, np.nan if loss is None else float(loss))

  for record in records:
    if record['step'] <= start:
      watch(record['step'], record)
  return watch


def _mean_deviation(losses) -> tuple[float, float]:
  """Returns the mean and the standard deviation of losses.

  The deviation is at least 1 % of the mean: losses of full batches hardly vary.
  """
  mean = float(np.mean(losses))
  return mean, max(float(np.std(losses)), 0.01 * abs(mean))
