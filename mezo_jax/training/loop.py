"""The training loop, and where its steps come from."""

from collections.abc import Callable, Iterator
import dataclasses
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
  """Holds what a step reports.

  Attributes:
    values: Metrics of `mezo_jax.make_step`, as device arrays.
    tokens: Number of tokens of its batch; None for a step from the log.
  """

  values: dict[str, jax.Array]
  tokens: int | None = None


# ``source(step, state) -> state, numbers`` makes a step; it consumes the state.
Source = Callable[[int, TrainState], tuple[TrainState, Numbers]]


def from_log(step_fn: Step, log: replay.Log) -> Source:
  """Returns a source of steps that an earlier process has recorded.

  Only the update is computed, from the recorded projected gradients. The
  program of the update is that of training, so the weights are bitwise equal to
  those of the earlier process.
  """

  def source(step: int, state: TrainState) -> tuple[TrainState, Numbers]:
    *new, values = step_fn.update(*state, *log.steps.at(step))
    return TrainState(*new), Numbers(values)
  return source


def from_batches(step_fn: Step, batches: Iterator[Any],
                 frozen_of: Callable[..., Any]) -> Source:
  """Returns a source of steps from batches.

  Args:
    step_fn: The training step.
    batches: Yields ``tokens, batch, more``, in which ``more`` holds further
      arguments of the step.
    frozen_of: Returns the frozen parameters that a batch needs.
  """

  def source(step: int, state: TrainState) -> tuple[TrainState, Numbers]:
    del step
    tokens, batch, more = next(batches)
    *new, values = step_fn(*state, batch, frozen_of(batch), **more)
    return TrainState(*new), Numbers(values, tokens)
  return source


def from_replicas(step_fn: Step, batches: Iterator[Any],
                  frozen_of: Callable[..., Any], others: Any) -> Source:
  """Returns a source of steps that replicas make together.

  This process evaluates the losses of its own directions, and exchanges them
  for the numbers of all directions. Each replica then makes the same update.

  Args:
    step_fn: The training step of this replica's part of the directions.
    batches: As for `from_batches`.
    frozen_of: As for `from_batches`.
    others: The exchange, from `mezo_jax.distributed.replicas.join`.
  """

  def source(step: int, state: TrainState) -> tuple[TrainState, Numbers]:
    tokens, batch, more = next(batches)
    # If this replica sent its part of the step before it was stopped, it only
    # waits for the others. The batch is drawn nevertheless, so that the next
    # step has the next batch.
    found = () if others.has(step) else step_fn.losses(
        *state, batch, frozen_of(batch), **more)
    *new, values = step_fn.update(*state, *others.swap(step, *found))
    return TrainState(*new), Numbers(values, tokens)
  return source


def steps(state: TrainState, numbered: range, step_fn: Step, log: replay.Log,
          made: Source, evaluates: Callable[[int], bool]
          ) -> Iterator[tuple[int, TrainState, Numbers]]:
  """Yields ``step, state, numbers`` of each step, which is only dispatched.

  Steps that the log has are replayed. The next step consumes the state.

  Args:
    state: The state before the first step; it is consumed.
    numbered: Numbers of the steps.
    step_fn: The training step.
    log: Log of the run.
    made: Source of the steps that the log does not have.
    evaluates: Whether a step is evaluated. If so, accumulated updates are added
      to the weights before the evaluation.
  """
  replayed = from_log(step_fn, log)
  for step in numbered:
    source = replayed if step <= log.steps.last else made
    state, numbers = source(step, state)
    if evaluates(step):
      state = TrainState(*step_fn.flush(*state))
    yield step, state, numbers


def evaluated_steps(total: int, every: int, log: replay.Log, accumulates: bool
                    ) -> Callable[[int], bool]:
  """Returns ``evaluates(step)``: whether a step is followed by an evaluation.

  Accumulated updates are added to the weights, and rounded, where the run is
  evaluated. So a replay evaluates where the log says that they were added, even
  if ``every`` has changed since.

  Args:
    total: The last step, which is evaluated.
    every: Steps from one evaluation to the next.
    log: Log of the run.
    accumulates: Whether updates are accumulated.
  """

  def evaluates(step: int) -> bool:
    recorded = log.steps
    # Whether updates were added after the last recorded step is not known: the
    # process may have been killed before it recorded that.
    if accumulates and (step < recorded.last or step in recorded.added):
      return step in recorded.added
    return step % every == 0 or step == total
  return evaluates


# --- records ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recorder:
  """Reads the numbers of steps and evaluations, and records them.

  Attributes:
    log: Log of the steps.
    metrics: Metrics of steps and evaluations.
    progress: Shows the steps.
    checkpoints: Checkpoints of the run.
    watch: Stops a run that cannot succeed; see `mezo_jax.runs.guards`.
    host: Calls Python functions for the loss. Their errors are raised when the
      step is read.
    plan: Plan of a private run, else None.
    rank: Returns the sort key of a report on dev rows, by which checkpoints are
      compared. None if dev rows do not select a step.
    others: The exchange of replicas, else None.
    accumulates: Whether updates are accumulated.
    say: Reports an evaluation.
  """

  log: replay.Log
  metrics: loggers.Metrics
  progress: loggers.Progress
  checkpoints: checkpoint.Checkpoints
  watch: Callable[[int, dict], None]
  host: Host
  plan: privacy.Plan | None
  rank: Callable[[dict], dict | None] | None
  others: Any
  accumulates: bool
  say: Callable[[str], None]

  def step(self, step: int, numbers: Numbers) -> None:
    """Records a step, after waiting until the device has computed it."""
    values = jax.device_get(numbers.values)
    self.host.check()
    if self.plan:
      # Recording the losses of private rows would reveal more than the budget
      # allows.
      values['loss'] = np.nan
    self.progress.read(step, numbers.tokens, values)
    if step > self.log.end:
      self.log.append(step, values.get('projected_grad', ()), values['loss'])
    self.watch(step, values)

  def weights(self, step: int, state: TrainState) -> None:
    """Records the weights of a step that is evaluated.

    The log notes that accumulated updates were added to them, and replicas
    compare their checksums.
    """
    if self.accumulates:
      self.log.added(step)
    if self.others:
      self.others.mark(step, fingerprint.checksum(state.params))

  def evaluation(self, step: int, report: dict[str, Any]) -> None:
    """Records and reports an evaluation on dev rows."""
    text, spent = f'step {step}: dev {evaluate.spell(report)}', {}
    if self.plan:
      spent = {'epsilon': self.plan.spent(step)}
      text += f'; spent epsilon {spent["epsilon"]:.3f}'
    self.metrics.write('dev', step, **report, **spent)
    self.say(text)

  def save(self, step: int, state: TrainState, report: dict[str, Any] | None
           ) -> None:
    """Starts to save a checkpoint; the state may be consumed afterwards."""
    rank = self.rank(report) if self.rank and report else None
    # The log on the disk is never behind a checkpoint.
    self.log.sync()
    self.checkpoints.save(step, tuple(state), rank)


# --- the loop ---------------------------------------------------------------


def loop(state: TrainState, steps: Iterator[tuple[int, TrainState, Numbers]],
         record: Recorder, *, evaluates: Callable[[int], bool],
         checkpoint_every: int, evaluate_dev: Callable[[Any], dict[str, Any]],
         stop_wanted: Callable[[int], bool]) -> TrainState:
  """Evaluates, logs and saves while steps are made.

  A run may be killed at any moment. It resumes from its newest checkpoint, the
  log replays the steps after it, and what was evaluated and recorded is not
  evaluated again. So an evaluation is recorded before its step is saved: if the
  run is killed in between, the replayed step is saved with the recorded report.
  In the other order, the run would resume after a step whose evaluation is
  missing. (Without a log, the records after the checkpoint are dropped, and the
  steps and evaluations are computed again.)

  Args:
    state: The state before the first of the steps. It is returned if there are
      no steps.
    steps: Yields ``step, state, numbers``; the next step consumes the state.
    record: Records steps and evaluations.
    evaluates: Whether a step is evaluated. The last step must be, because a
      step is read when the next one is dispatched or when it is evaluated.
    checkpoint_every: Steps from one checkpoint to the next, in addition to
      those of evaluated steps.
    evaluate_dev: Returns the report on dev rows of parameters.
    stop_wanted: Whether the run was asked to stop, from
      `mezo_jax.runs.preemption.watched`.

  Returns:
    The state after the last step.

  Raises:
    Again: if the run was asked to stop. Nothing is lost.
    Stopped: if the run cannot succeed.
  """
  unread = None  # the step whose numbers the host has not read yet
  for step, state, numbers in steps:
    # This step has only been dispatched. While the device computes it, the host
    # reads the step before, and so never keeps the device waiting.
    if unread:
      record.step(*unread)
    unread = step, numbers
    stopping, evaluating = stop_wanted(step), evaluates(step)
    if not (stopping or evaluating or step % checkpoint_every == 0):
      continue

    # Evaluation and checkpoints need this step to be recorded.
    record.step(*unread)
    unread, report = None, None
    if stopping and evaluating and record.log.records:
      # An evaluation can take long. The run that resumes does it instead: it
      # replays this step from the log.
      record.log.sync()
      raise preemption.stopped(record.log.end)
    if evaluating:
      record.weights(step, state)
      report = record.metrics.at('dev', step)  # if it is a replayed step
      if not report:
        report = evaluate_dev(state.params)
        record.evaluation(step, report)
    record.save(step, state, report)
    if stopping:
      raise preemption.stopped(max(step, record.log.end))
    record.progress.restart()  # its seconds per step exclude evaluation
  return state
