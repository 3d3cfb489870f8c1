"""The state that a run resumes from, and the state that is its result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optax

from mezo_jax.core.errors import Again, Damaged, MissingError, Stopped
from mezo_jax.runs import checkpoint, guards


class TrainState(NamedTuple):
  """The arrays that training changes.

  A step consumes a `TrainState`: its arrays are donated, so that the result
  takes their memory, and they cannot be used again. So whoever makes a step
  replaces its `TrainState` by the result, and no array of it has another name.

  Attributes:
    params: The trained parameters.
    opt_state: The state of the optimizer.
  """

  params: Any
  opt_state: Any


def newest(directory: Path, keep: int, state: TrainState,
           say: Callable[[str], None]
           ) -> tuple[checkpoint.Checkpoints, int, TrainState]:
  """Opens the checkpoints of a run and loads the newest that is whole.

  Damaged ones are moved aside and reported.

  Args:
    directory: Directory of the checkpoints.
    keep: Number of the newest checkpoints that are kept.
    state: State before the first step.
    say: Reports what was damaged.

  Returns:
    The checkpoints, the step of the one that was loaded, and its state. Without
    a checkpoint these are 0 and ``state``.

  Raises:
    InputError: if a checkpoint is of another model.
  """
  checkpoints = checkpoint.Checkpoints(directory, keep)
  for step in reversed(checkpoints.steps()):
    try:
      return checkpoints, step, load(checkpoints, step, state)
    except Damaged as e:
      say(f'warning: {e} It is now {checkpoints.set_aside(step)}.')
  return checkpoints, 0, state


def load(checkpoints: checkpoint.Checkpoints, step: int, like: TrainState
         ) -> TrainState:
  """Loads the state of a step.

  Args:
    checkpoints: Checkpoints of the run.
    step: A step that has a checkpoint.
    like: Arrays or shapes, which the result equals in shape, dtype and
      sharding.

  Raises:
    Damaged: if the checkpoint is not what was saved.
    InputError: if the checkpoint is of another model.
  """
  # Checkpoints hold a plain tuple: the names of a NamedTuple's fields would
  # become part of the paths in the file.
  return TrainState(*checkpoints.load(step, tuple(like)))


def best(checkpoints: checkpoint.Checkpoints, state: TrainState, steps: int,
         replays: bool) -> tuple[int, Any]:
  """Returns the step that is best on dev rows, and its parameters.

  Args:
    checkpoints: Checkpoints of the run.
    state: State after the last step.
    steps: Number of the last step.
    replays: Whether the log can replay every step.

  Raises:
    Stopped: if no step has a finite evaluation, or if the checkpoint of the
      best step is damaged once more after it was saved again.
    Again: if the checkpoint of the best step is damaged. It is moved aside, and
      the run that resumes replays and saves that step again.
  """
  if optax.tree.get(state.opt_state, 'total_notfinite') >= steps:
    raise Stopped(
        f'each of the {steps} steps gave a loss that is not finite and '
        f'was skipped: nothing was trained. {guards.TRY}')
  try:
    step = checkpoints.best_step()
  except MissingError as e:
    raise Stopped(f'{e} {guards.TRY}') from e
  if step == steps:
    return step, state.params
  try:
    return step, load(checkpoints, step, state).params
  except Damaged as e:
    damaged_before = checkpoints.was_set_aside(step)
    if replays and not damaged_before:
      # A run resumes from its newest checkpoint. Without the later ones that is
      # one before the damaged step, which is then replayed from the log.
      checkpoints.delete_after(step)
    aside = checkpoints.set_aside(step)
    checkpoints.close()
    if damaged_before:
      # A job that runs itself again on status 75 must not do so for ever.
      raise Stopped(
          f'{e} It is now {aside}, as one of the same step was before: what is '
          'written to this directory cannot be read. Check the disk, or choose '
          'another --workdir.') from e
    raise Again(f'{e} It is now {aside}. Run the same command again.') from e
