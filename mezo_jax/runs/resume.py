"""Loads the state from which a run resumes, and the best state at its end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import optax

from mezo_jax.core.errors import Again, Damaged, MissingError, Stopped
from mezo_jax.runs import checkpoint, guards


class TrainState(NamedTuple):
  """Holds the arrays that training changes.

  A step donates the arrays of its `TrainState`: the result reuses their memory,
  and they cannot be used again. So the caller of a step replaces its
  `TrainState` by the result and keeps no other reference to the old arrays.

  Attributes:
    params: The trained parameters.
    opt_state: The state of the optimizer.
  """

  params: Any
  opt_state: Any


def newest(directory: Path, keep: int, state: TrainState,
           say: Callable[[str], None]
           ) -> tuple[checkpoint.Checkpoints, int, TrainState]:
  """Opens the checkpoints of a run and loads the newest undamaged one.

  Damaged checkpoints are moved aside and reported.

  Args:
    directory: Directory of the checkpoints.
    keep: Number of the newest checkpoints to keep.
    state: State before the first step.
    say: Reports a line to the user.

  Returns:
    The checkpoints, the step of the one that was loaded, and its state. If none
    can be loaded, the step is 0 and the state is ``state``.

  Raises:
    InputError: If a checkpoint belongs to another model.
  """
  checkpoints = checkpoint.Checkpoints(directory, keep)
  for step in reversed(checkpoints.steps()):
    try:
      return checkpoints, step, load(checkpoints, step, state)
    except Damaged as e:
      say(f'warning: {e} It was moved to {checkpoints.set_aside(step)}.')
  return checkpoints, 0, state


def load(checkpoints: checkpoint.Checkpoints, step: int, like: TrainState
         ) -> TrainState:
  """Loads the state of a step.

  Args:
    checkpoints: Checkpoints of the run.
    step: A step that has a checkpoint.
    like: Arrays or shapes with the shapes, dtypes and shardings of the state.

  Raises:
    Damaged: If the checkpoint is not what was saved.
    InputError: If the checkpoint belongs to another model.
  """
  # Checkpoints contain a plain tuple. With a NamedTuple, the names of its
  # fields would become a part of the paths in the file.
  return TrainState(*checkpoints.load(step, tuple(like)))


def best(checkpoints: checkpoint.Checkpoints, state: TrainState, steps: int,
         replays: bool) -> tuple[int, Any]:
  """Returns the step that is best on the dev rows, and its parameters.

  Args:
    checkpoints: Checkpoints of the run.
    state: State after the last step.
    steps: Number of the last step.
    replays: Whether the log can replay every step.

  Returns:
    The number of the step, and the trained parameters after it.

  Raises:
    Stopped: If every step was skipped, if no step has a finite evaluation, or
      if the checkpoint of the best step is damaged for the second time.
    Again: If the checkpoint of the best step is damaged for the first time. It
      is moved aside. If the log can replay every step, a resumed run replays
      and saves that step again.
  """
  if optax.tree.get(state.opt_state, 'total_notfinite') >= steps:
    raise Stopped(
        f'the loss of all {steps} steps was not finite, so every step was '
        f'skipped and nothing was trained. {guards.TRY}')
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
      # A run resumes from its newest checkpoint. Deleting the later ones makes
      # it resume before the damaged step, which is then replayed from the log.
      checkpoints.delete_after(step)
    aside = checkpoints.set_aside(step)
    checkpoints.close()
    if damaged_before:
      # Jobs that restart on status 75 (`Again`) must not do so forever.
      raise Stopped(
          f'{e} It was moved to {aside}. So was an earlier checkpoint of this '
          'step: check the disk, or choose another --workdir.') from e
    raise Again(
        f'{e} It was moved to {aside}. Run the same command again.') from e
