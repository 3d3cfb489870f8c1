"""Implements the training loop and the sources of its steps.

A step comes from one of three sources: from a batch, from the log of an earlier
process, or from a group of replicas. `steps` chooses the source of each step
and dispatches it; `loop` reads the results, evaluates and saves; and `Recorder`
writes everything that is recorded.
"""

from collections.abc import Callable, Generator, Iterator
import dataclasses
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from mezo_jax.core import fingerprint
from mezo_jax.runs import checkpoint, loggers, preemption, replay
from mezo_jax.runs.resume import TrainState
from mezo_jax.tasks import evaluate
from mezo_jax.tasks.score import Host
from mezo_jax.training import privacy
from mezo_jax.transforms.step import Step

# --- steps ------------------------------------------------------------------


class Numbers(NamedTuple):
  """Holds the metrics of a step.

  Attributes:
    values: The metrics that the step of `mezo_jax.make_step` returned, as
      device arrays that may not be computed yet, or numbers of the host.
    tokens: Number of tokens in its batch; None for a step from the log.
    seconds: How long it took, if the host waited for it. None otherwise.
  """

  values: dict[str, jax.Array]
  tokens: int | None = None
  seconds: float | None = None


# A function ``source(step, state) -> (state, numbers)`` that dispatches a step.
# The state that it gets is donated and cannot be used again.
Source = Callable[[int, TrainState], tuple[TrainState, Numbers]]


def from_log(step_fn: Step, log: replay.Log) -> Source:
  """Returns a source that replays the steps that an earlier process recorded.

  Only the update is computed, from the recorded projected gradients, without
  forward passes. It is the same compiled program as in training, so the weights
  are bitwise equal to those of the earlier process.

  Args:
    step_fn: The training step.
    log: Log of the run.
  """

  def source(step: int, state: TrainState) -> tuple[TrainState, Numbers]:
    *new, values = step_fn.update(*state, *log.steps.at(step))
    return TrainState(*new), Numbers(values)
  return source


def from_batches(step_fn: Step, batches: Iterator[Any],
                 frozen_of: Callable[..., Any]) -> Source:
  """Returns a source that trains on the next batch.

  Args:
    step_fn: The training step.
    batches: Yields ``(tokens, batch, more)``: the number of tokens, the batch,
      and a dict of further keyword arguments of the step.
    frozen_of: A function from a batch to the frozen parameters that it needs.
  """

  def source(step: int, state: TrainState) -> tuple[TrainState, Numbers]:
    del step
    tokens, batch, more = next(batches)
    began = time.time()
    *new, values = step_fn(*state, batch, frozen_of(batch), **more)
    # With rewards, the host has waited for the rollouts.
    seconds = time.time() - began if 'reward' in values else None
    tokens = values.get('generated_tokens', tokens)
    return TrainState(*new), Numbers(values, tokens, seconds)
  return source


def from_replicas(step_fn: Step, batches: Iterator[Any],
                  frozen_of: Callable[..., Any], others: Any) -> Source:
  """Returns a source of steps that several replicas compute together.

  Each replica evaluates its own part of the directions, and receives the
  projected gradients of the other parts. All replicas then apply the same
  update to their own copies of the weights.

  Args:
    step_fn: The training step of this replica's part of the directions.
    batches: As for `from_batches`.
    frozen_of: As for `from_batches`.
    others: The `mezo_jax.distributed.exchange.Exchange` of the run.
  """

  def source(step: int, state: TrainState) -> tuple[TrainState, Numbers]:
    tokens, batch, more = next(batches)
    # If this replica had sent its part of the step before it was stopped, it
    # need not compute it again and only waits for the others. The batch is
    # drawn nevertheless, so that the next step gets the next batch.
    found = () if others.has(step) else step_fn.losses(
        *state, batch, frozen_of(batch), **more)
    *new, values = step_fn.update(*state, *others.swap(step, *found))
    return TrainState(*new), Numbers(values, tokens)
  return source


def steps(state: TrainState, numbered: range, step_fn: Step, log: replay.Log,
          made: Source, evaluates: Callable[[int], bool]
          ) -> Generator[tuple[int, TrainState, Numbers]]:
  """Dispatches steps, and yields ``(step, state, numbers)`` of each.

  The device may not have computed the step yet when it is yielded. The state is
  donated to the next step, so use it before you request the next item.

  Args:
    state: The state before the first step. It is donated.
    numbered: Numbers of the steps.
    step_fn: The training step.
    log: Log of the run. The steps that it has are replayed.
    made: Source of the steps that the log does not have.
    evaluates: A function of the step number that returns whether the step is
      evaluated. If it is, accumulated updates are applied to the weights first.
  """
  replayed = from_log(step_fn, log)
  for step in numbered:
    source = replayed if step <= log.steps.last else made
    state, numbers = source(step, state)
    if evaluates(step):
      state = TrainState(*step_fn.apply_accumulated(*state))
    yield step, state, numbers


def evaluated_steps(total: int, every: int, log: replay.Log, accumulates: bool
                    ) -> Callable[[int], bool]:
  """Returns a function ``evaluates(step) -> bool``.

  Before an evaluation, accumulated updates are applied to the weights, which
  rounds the weights. A replay must round at the same steps to give the same
  bits. It therefore evaluates at the steps where the log records that updates
  were applied, even if ``every`` has changed since.

  Args:
    total: Number of the last step, which is always evaluated.
    every: Steps from one evaluation to the next.
    log: Log of the run.
    accumulates: Whether updates are accumulated over several steps.
  """

  def evaluates(step: int) -> bool:
    recorded = log.steps
    # For the last recorded step the log does not decide: the process may have
    # been killed after the step and before it recorded that updates were
    # applied.
    if accumulates and (step < recorded.last or step in recorded.added):
      return step in recorded.added
    return step % every == 0 or step == total
  return evaluates


def traced(steps: Iterator[tuple[int, TrainState, Numbers]], start: int,
           profile: range, directory: Path
           ) -> Generator[tuple[int, TrainState, Numbers]]:
  """Yields steps, and writes a trace of some of them.

  The trace can be opened in Perfetto and in xprof. It includes what the host
  does between these steps, such as an evaluation.

  Args:
    steps: Yields ``(step, state, numbers)``; see the function `steps`.
    start: Number of the first step that it yields.
    profile: Numbers of the steps to trace.
    directory: Directory of the trace.
  """
  on, step = False, start
  try:
    while True:
      # A step is dispatched when it is requested, so start before that.
      if step in profile and not on:
        jax.profiler.start_trace(directory, create_perfetto_trace=True)
        on = True
      with jax.profiler.StepTraceAnnotation('step', step_num=step):
        item = next(steps, None)
      if item is None:
        return
      yield item
      if on and step == profile[-1]:
        jax.block_until_ready(item[-1].values)
        jax.profiler.stop_trace()
        on = False
      step += 1
  finally:
    if on:
      jax.profiler.stop_trace()


# --- records ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recorder:
  """Records steps, evaluations and checkpoints.

  Attributes:
    log: Log of the steps, from which they can be replayed.
    metrics: Metrics of steps and evaluations, for the user.
    progress: Progress bar.
    checkpoints: Checkpoints of the run.
    watch: A function of (step, metrics) that raises `Stopped` if the run cannot
      succeed; see `mezo_jax.runs.guards`.
    host: Calls the Python functions that the loss needs. Their errors are
      raised when the step is recorded.
    plan: Plan of a private run; None for another run.
    rank: A function from a report on the dev rows to the sort key by which the
      best checkpoint is found; None if the dev rows do not select a step.
    answers: A function of the step number that writes the answers of the
      latest evaluation, and returns lines that show some of them.
    others: The exchange of a run with replicas; None for another run.
    accumulates: Whether updates are accumulated over several steps.
    say: A function that prints a line for the user.
  """

  log: replay.Log
  metrics: loggers.Metrics
  progress: loggers.Progress
  checkpoints: checkpoint.Checkpoints
  watch: Callable[[int, dict], None]
  host: Host
  plan: privacy.Plan | None
  rank: Callable[[dict], dict | None] | None
  answers: Callable[[int], list[str]]
  others: Any
  accumulates: bool
  say: Callable[[str], None]

  def step(self, step: int, numbers: Numbers) -> None:
    """Waits until the device has computed a step, and records it.

    Args:
      step: Number of the step.
      numbers: The metrics of the step.
    """
    values = jax.device_get(numbers.values)
    self.host.check()
    if self.plan:
      # The losses of private rows would reveal more than the budget allows, so
      # they are not recorded.
      values['loss'] = np.nan
    self.progress.read(step, numbers.tokens, values, numbers.seconds)
    if step > self.log.end:
      self.log.append(step, values.get('projected_grad', ()), values['loss'])
    self.watch(step, values)

  def weights(self, step: int, state: TrainState) -> None:
    """Records that the weights after a step are evaluated.

    If updates accumulate, the log records that they were applied at this step.
    With replicas, a checksum of the weights is recorded for comparison.

    Args:
      step: Number of the step.
      state: The state after the step.
    """
    if self.accumulates:
      self.log.added(step)
    if self.others:
      self.others.mark(step, fingerprint.checksum(state.params))

  def evaluation(self, step: int, report: dict[str, Any]) -> None:
    """Records and prints an evaluation on the dev rows, and some answers.

    Args:
      step: Number of the step.
      report: The report on the dev rows.
    """
    text, spent = f'step {step}: dev {evaluate.spell(report)}', {}
    if self.plan:
      spent = {'epsilon': self.plan.spent(step)}
      text += f'; spent epsilon {spent["epsilon"]:.3f}'
    lines = self.answers(step)
    self.metrics.write('dev', step, **report, **spent)
    self.progress.evaluated()
    best = loggers.best_on_dev(self.metrics, self.rank) if self.rank else None
    if best and best[0] == step:
      text += '; the best so far'
    elif best:
      text += f'; the best so far is step {best[0]}, {evaluate.spell(best[1])}'
    for line in (text, *lines):
      self.say(line)

  def save(self, step: int, state: TrainState, report: dict[str, Any] | None
           ) -> None:
    """Starts to save a checkpoint. The state may be donated afterwards.

    Args:
      step: Number of the step.
      state: The state after the step.
      report: The report on the dev rows, by which the best checkpoint is found;
        None if the step was not evaluated.
    """
    rank = self.rank(report) if self.rank and report else None
    # Write the log to disk first, so that it always reaches at least to the
    # newest checkpoint.
    self.log.sync()
    self.checkpoints.save(step, tuple(state), rank)


# --- the loop ---------------------------------------------------------------


def loop(state: TrainState, steps: Iterator[tuple[int, TrainState, Numbers]],
         record: Recorder, *, evaluates: Callable[[int], bool],
         checkpoint_every: int,
         evaluate_dev: Callable[[Any], dict[str, Any]],
         stop_wanted: Callable[[int], bool]) -> TrainState:
  """Runs the training loop: records, evaluates and saves the steps.

  A run may be killed at any moment. It then resumes from its newest checkpoint,
  replays the later steps from the log, and does not repeat evaluations that
  were recorded. The order of writes follows from this: an evaluation is
  recorded before the checkpoint of its step is saved. If the run is killed in
  between, the step is replayed and its checkpoint is saved with the recorded
  report. In the other order, the run would resume after a step whose evaluation
  is missing. (A run without a log drops the records after its checkpoint and
  computes these steps and evaluations again.)

  Args:
    state: The state before the first step. It is returned if there are no
      steps.
    steps: Yields ``(step, state, numbers)``; see the function `steps`.
    record: Records steps, evaluations and checkpoints.
    evaluates: A function of the step number that returns whether the step is
      evaluated. It must return True for the last step, so that this step is
      recorded: a step is recorded when the next one has been dispatched, or
      before it is evaluated or saved.
    checkpoint_every: Steps from one checkpoint to the next. Evaluated steps are
      saved in addition.
    evaluate_dev: A function from the trained parameters to the report on the
      dev rows.
    stop_wanted: A function of the step number that returns whether a signal has
      asked the run to stop, from `mezo_jax.runs.preemption.watched`.

  Returns:
    The state after the last step.

  Raises:
    Again: if the run was asked to stop. The same command resumes it.
    Stopped: if the run cannot succeed.
  """
  unread = None  # the step that was dispatched but not recorded yet
  for step, state, numbers in steps:
    # This step has only been dispatched. While the device computes it, the host
    # records the previous step, so the device never waits for the host.
    if unread:
      record.step(*unread)
    unread = step, numbers
    stopping, evaluating = stop_wanted(step), evaluates(step)
    if not (stopping or evaluating or step % checkpoint_every == 0):
      continue

    # Record this step before it is evaluated or saved.
    record.step(*unread)
    unread, report = None, None
    if stopping and evaluating and record.log.records:
      # An evaluation may take longer than the time that is left. Leave it to
      # the resumed run, which replays this step from the log.
      record.log.sync()
      raise preemption.stopped(record.log.end)
    if evaluating:
      record.weights(step, state)
      # A replayed step may have been evaluated already.
      report = record.metrics.at('dev', step)
      if not report:
        report = evaluate_dev(state.params)
        record.evaluation(step, report)
    record.save(step, state, report)
    if stopping:
      raise preemption.stopped(max(step, record.log.end))
    # Restart the clock, so that evaluation does not count in seconds per step.
    record.progress.restart()
  return state
