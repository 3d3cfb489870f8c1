"""The state that a run goes on from, and the one that it comes to."""

from collections.abc import Callable
from pathlib import Path

import optax

from mezo_jax.core.errors import Again, MissingError, Stopped
from mezo_jax.runs import checkpoint, guards, workdir
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods


def newest(directory: Path, config: config_lib.Train, metric: str,
           params: dict, opt_state, say: Callable[[str], None]):
  """``checkpoints, step, params, opt_state`` of a working directory: the newest
  that is whole (damaged ones are put aside), or an earlier one where the log
  makes the best step again; as they are, with step 0, where there is none.

  Args:
    directory: of the run.
    config: of the run.
    metric: of dev rows, by which the best step is known.
    params: as the model's files have them.
    opt_state: before the first step.
    say: reports what was damaged.

  Raises:
    InputError: if a checkpoint is of another model.
  """
  checkpoints = checkpoint.Checkpoints(
      directory / 'checkpoints', config.keep_checkpoints)
  until = workdir.lost_best(directory, config, metric, checkpoints.steps())
  for step in reversed(checkpoints.steps()):
    if until is not None and step > until:
      continue
    try:
      return (checkpoints, step,
              *checkpoints.load(step, (params, opt_state)))
    except checkpoint.Damaged as e:
      say(f'warning: {e} It is now {checkpoints.set_aside(step)}.')
  return checkpoints, 0, params, opt_state


def best(config: config_lib.Train, checkpoints: checkpoint.Checkpoints,
         params: dict, opt_state):
  """``step, params`` of the step that is a run's result: the best on dev rows,
  or the last, which these are, where dev rows select none.

  Raises:
    Stopped: if no step is any good, or its checkpoint is damaged once more.
    Again: if its checkpoint is damaged: the log makes it again.
  """
  if not methods.selects(config):
    return config.steps, params
  if optax.tree.get(opt_state, 'total_notfinite') >= config.steps:
    raise Stopped(
        f'each of the {config.steps} steps gave a loss that is not finite and '
        f'was skipped: nothing was trained. {guards.TRY}')
  try:
    step = checkpoints.best_step()
  except MissingError as e:
    raise Stopped(f'{e} {guards.TRY}') from e
  if step == config.steps:
    return step, params
  try:
    return step, checkpoints.load(step, (params, opt_state))[0]
  except checkpoint.Damaged as e:
    before = checkpoints.was_set_aside(step)
    aside = checkpoints.set_aside(step)
    checkpoints.close()
    if before:  # Running again would not help, and must not be asked for.
      raise Stopped(
          f'{e} It is now {aside}, as one of the same step was before: what is '
          'written to this directory cannot be read. Check the disk, or choose '
          'another --workdir.') from e
    raise Again(f'{e} It is now {aside}. Run the same command again.') from e
