r"""Stops a run that cannot succeed, and warns about losses that jump or stay.

The loss of a single batch is noisy, so the mean loss of a window of steps is
compared with that of the first window. A resumed run computes the latter from
the metrics that it recorded before.

A step of MeZO moves the weights by :math:`-\eta g z`, where the projected
gradient g is the slope of the batch's loss along z. To first order, it
therefore lowers this loss by :math:`\eta g^2`. Curvature, and the difference
between batches, leave less of it. If the sum over all steps is small in
comparison with the loss, the learning rate is too low.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mezo_jax.core.errors import Stopped
from mezo_jax.runs import replay

TRY = ('Try a lower --config.optimizer.learning_rate, or '
       '--config.model.dtype=float32.')
WINDOW = 100  # number of steps over which losses are averaged
# Number of consecutive steps with a projected gradient of 0 that stop a run.
STILL = 100
# A jump of the loss is reported above this many standard deviations of the
# losses in the window before.
_SPIKE = 8.0
# A learning rate is reported as too low if the first-order changes of the loss
# are below both limits, as multiples of the loss: for all steps together, and
# for a step on average. With the rates of configs/quickstart.py, a step reaches
# 6e-3 and more. With a hundredth of them, it reaches 3e-4 at most.
_ENOUGH, _ENOUGH_PER_STEP = 10.0, 1e-3


def make(records: Sequence[dict[str, Any]], log: replay.Log, start: int,
         say: Callable[[str], None], *, max_skipped: int, max_rise: float,
         rates: np.ndarray | None = None
         ) -> Callable[[int, dict[str, Any]], None]:
  """Returns a function that watches the metrics of each step.

  Args:
    records: Metrics of the steps that were recorded before this process
      started. Those up to step ``start`` are passed to the function before it
      is returned, so that it continues where the earlier process stopped.
    log: Log of the run. Jumps of the loss in steps that it already contains
      were reported before and are not reported again.
    start: Step of the checkpoint from which the run resumes, 0 for none.
    say: Reports a line to the user; called for jumps of the loss.
    max_skipped: Number of consecutive steps with a loss that is not finite
      after which the run is stopped.
    max_rise: Limit on the rise of the mean loss from the first window to the
      current one, in standard deviations of the losses in the first window. 0
      means no limit.
    rates: Learning rate of each step of the whole run, to warn if they are too
      low. Defaults to None, for methods whose steps do not lower the loss by
      the rate times the squared projected gradient, to first order.

  Returns:
    A function ``watch(step, values)``, to be called once for each step, in
    order. It raises `Stopped` if one of the limits is reached, or after `STILL`
    consecutive steps whose projected gradients are 0.
  """
  window, still, quiet_until = collections.deque(maxlen=WINDOW), 0, log.end
  # (mean, standard deviation) of the first and of the latest window, and
  # (lowest mean, the last step of its window).
  first, last, lowest = None, None, (np.inf, 0)
  squares = []  # squared projected gradients of the first window

  def watch_loss(step: int, loss: float) -> None:
    """Reports a jump of the loss, and stops a run whose loss has risen."""
    nonlocal first, last, lowest, quiet_until
    if not np.isfinite(loss):
      return
    if last and step > quiet_until and loss > last[0] + _SPIKE * last[1]:
      say(f'warning: the loss jumped to {loss:.3f} in step {step}; over the '
          f'{WINDOW} steps before, its mean is {last[0]:.3f} and its standard '
          f'deviation {last[1]:.3f}.')
      quiet_until = step + WINDOW
    window.append(loss)
    if len(window) < WINDOW:
      return
    last = mean, _ = _mean_deviation(window)
    first, lowest = first or last, min(lowest, (mean, step))
    if max_rise and mean > first[0] + max_rise * first[1]:
      raise Stopped(
          f'the mean loss has risen to {mean:.3f} in the {WINDOW} steps up to '
          f'{step}, from {first[0]:.3f} in the first {WINDOW} steps (standard '
          f'deviation {first[1]:.3f}). It was lowest up to step {lowest[1]}, '
          f'at {lowest[0]:.3f}'
          + ('; mezo-jax replay --until rebuilds the weights of that step'
             if log.records else '') + f'. {TRY}')

  def watch_rate(step: int, rates: np.ndarray, grads: Any) -> None:
    """Reports rates that are too low, when the first window is complete."""
    squares.append(np.mean(np.square(np.array(grads, float))))
    if len(squares) < WINDOW or not first or step <= log.end:
      return
    change = float(np.nanmean(squares) * np.sum(rates) / abs(first[0]))
    if change < _ENOUGH and change / len(rates) < _ENOUGH_PER_STEP:
      say('warning: the learning rate is probably too low: to first order, a '
          f'step lowers the loss by only {change / len(rates):.2g} of its '
          f'value, and all {len(rates)} steps together by {change:.2g} of it, '
          'of which noise and curvature leave a part. Compare with a rate that '
          'is 10 or 100 times as high.')

  def watch(step: int, values: dict) -> None:
    """Checks the metrics of one step; raises `Stopped` at a limit."""
    nonlocal still
    if values.get('skipped_in_a_row', 0) >= max_skipped:
      raise Stopped(
          f'the loss of the last {max_skipped} steps, up to step {step}, was '
          'not finite; these steps were skipped and left the parameters '
          f'unchanged. {TRY}')
    # A skipped step has NaN here (null in records), which does not count as 0.
    # Backpropagation has no projected gradient, so it counts as moving.
    moved = np.any(np.array(values.get('projected_grad', 1.0), float))
    still = 0 if moved else still + 1
    if still == STILL:
      raise Stopped(
          f'all projected gradients after step {step - still} are 0, so the '
          'weights no longer change and may be unusable; mezo-jax replay '
          f'--until rebuilds the weights of an earlier step. {TRY} If rewards '
          'are trained, all members got the same ones: raise spsa.eps.')
    loss = values.get('loss')
    watch_loss(step, np.nan if loss is None else float(loss))
    if rates is not None and len(squares) < WINDOW:
      watch_rate(step, rates, values['projected_grad'])

  for record in records:
    if record['step'] <= start:
      watch(record['step'], record)
  return watch


def _mean_deviation(losses) -> tuple[float, float]:
  """Returns the mean and the standard deviation of losses.

  The result for the deviation is at least 1 % of the mean. If every batch is
  the whole data set, losses hardly vary, and without this lower bound a tiny
  rise would exceed the limits.
  """
  mean = float(np.mean(losses))
  return mean, max(float(np.std(losses)), 0.01 * abs(mean))
