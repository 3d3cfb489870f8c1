"""What stops a run that cannot come to anything, and what looks wrong in one.

Losses of single batches are noisy, so a run is judged by the mean of a window
of steps against that of its first one, which a run that goes on knows from its
metrics.
"""

import collections
from collections.abc import Callable, Sequence

import numpy as np

from mezo_jax.training import config as config_lib
from mezo_jax.runs import replay
from mezo_jax.core.errors import Stopped

TRY = ('Try a lower --config.optimizer.learning_rate, or '
       '--config.model.dtype=float32.')
WINDOW = 100  # steps
STILL = 100  # consecutive steps without any change of the weights
_SPIKE = 8.0  # standard deviations of the window before


def make(config: config_lib.Train, records: Sequence[dict], log: replay.Log,
         start: int, say: Callable[[str], None]
         ) -> Callable[[int, dict], None]:
  """``watch(step, values)``, to be called with each step's metrics in turn.

  Args:
    config: ``max_skipped`` and ``max_rise`` of it.
    records: the metrics of earlier steps, of which those up to ``start`` are
      looked at first.
    log: of the run; of steps up to its end no jump is said again.
    start: the steps that are not made again.
    say: reports losses that jump.

  Returns:
    A function that raises `Stopped` after ``max_skipped`` steps in a row whose
    loss is not finite; after `STILL` whose projected gradients are 0; and
    where the mean loss of a window is above that of the first by more than
    ``max_rise`` standard deviations of a step's.
  """
  window, still, quiet_until = collections.deque(maxlen=WINDOW), 0, log.end
  first, last, lowest = None, None, (np.inf, 0)  # of windows

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
    if config.max_rise and mean > first[0] + config.max_rise * first[1]:
      raise Stopped(
          f'the loss has risen: it was {mean:.3f} in the {WINDOW} steps up to '
          f'{step}, and {first[0]:.3f} in the first {WINDOW}, with a standard '
          f'deviation of {first[1]:.3f}. It was lowest up to step {lowest[1]}, '
          f'{lowest[0]:.3f}'
          + (', whose weights the log has (replay --until)'
             if log.records else '') + f'. {TRY}')

  def watch(step: int, values: dict) -> None:
    nonlocal still
    if values.get('skipped_in_a_row', 0) >= config.max_skipped:
      raise Stopped(
          f'the last {config.max_skipped} steps, up to {step}, gave a loss '
          'that is not finite and were skipped; the parameters are as before '
          f'them. {TRY}')
    # NaN, which is null in records, is skipped and not still.
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
  """The deviation is not below a hundredth: full batches hardly vary."""
  mean = float(np.mean(losses))
  return mean, max(float(np.std(losses)), 0.01 * abs(mean))
