"""Locks the working directory of a run, and reads what it contains."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from mezo_jax.core.errors import Damaged, InputError, local
from mezo_jax.runs import checkpoint, loggers, replay

LOG = 'steps.log'  # name of the log of steps; see `mezo_jax.runs.replay`


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
  """Creates a directory and locks it for one run.

  The operating system holds the lock and releases it when the process ends for
  whatever reason. A directory that is still empty at the end is removed.

  Args:
    workdir: The directory.

  Raises:
    InputError: If another run uses the directory, or if it is not writable.
  """
  local(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if not os.access(workdir, os.W_OK | os.X_OK):
    raise InputError(f'{workdir} is not writable; choose another --workdir.')
  held = os.open(workdir, os.O_RDONLY)
  try:
    if jax.process_index() == 0:
      try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        raise InputError(f'another run is using {workdir}; wait until it ends, '
                         'or choose another --workdir.') from e
      except OSError:  # the file system does not support locks
        pass
    yield
  finally:
    os.close(held)  # releases the lock
    with contextlib.suppress(OSError):
      workdir.rmdir()


def last_step(workdir: Path) -> tuple[int, bool]:
  """Returns the last recorded step, and whether a run can end with this step.

  Steps are recorded in the log and in checkpoints. A run needs an evaluation of
  its last step. It can therefore end with the last recorded step if that step
  was evaluated, or if the step is in the log but after the newest checkpoint.
  In the second case a resumed run replays the step and evaluates it.

  Args:
    workdir: Working directory of the run, which need not exist.

  Returns:
    The number of the step, 0 for none, and whether a run with this number of
    steps can finish without training another step.
  """
  held = saved = checkpoint.latest_step(workdir / 'checkpoints')
  if (workdir / LOG).is_file():
    with contextlib.suppress(Damaged):  # reported when the run opens the log
      held = max(held, replay.read(workdir / LOG).steps.last)
  if not held or held > saved:
    return held, True
  return held, any(r['kind'] == 'dev' and r['step'] == held
                   for r in loggers.read(workdir / 'metrics.jsonl'))


def changed(then: dict[str, Any], now: dict[str, Any], model: str, adapter: str
            ) -> str:
  """Compares two sets of fingerprints of a run's inputs.

  Only entries that both sets have are compared, since an earlier version of
  this library may not have recorded all of them.

  Args:
    then: The fingerprints that the run recorded; see `read_inputs`.
    now: The current fingerprints.
    model: Name of the model, for the result.
    adapter: Directory of the adapter with which the run begins, or '' for none.

  Returns:
    A phrase such as 'the weights of X differ', or '' if nothing differs.
  """
  words = {
      'weights': f'the weights of {model} differ',
      'model': f'the config of {model} differs',
      'tokenizer': f'the tokenizer of {model} differs',
      'adapter': f'the adapter {adapter} differs',
      'rows': 'the rows, or their labels, differ'}
  for key, what in words.items():
    old, new = then.get(key), now.get(key)
    if old is None or new is None or old == new:
      continue
    if key != 'model':
      return what
    fields = [f'{field} was {old[field]!r} and is now {value!r}'
              for field, value in new.items()
              if field in old and old[field] != value]
    if fields:
      return f'{what} ({"; ".join(fields)})'
  return ''


def read_inputs(workdir: Path) -> dict[str, Any]:
  """Reads the fingerprints of its inputs that a run recorded.

  Args:
    workdir: Working directory of the run.

  Returns:
    A dict with some of the keys 'weights', 'model', 'tokenizer', 'adapter' and
    'rows'. It is empty if the run recorded nothing.
  """
  file = workdir / 'inputs.json'
  return loggers.read_json(file) if file.is_file() else {}


def check_inputs(workdir: Path, now: dict[str, Any], model: str, adapter: str
                 ) -> None:
  """Compares the inputs of a run with those that it recorded before.

  Fingerprints that were not recorded yet are recorded.

  Args:
    workdir: Working directory of the run.
    now: Current fingerprints of the inputs; see `read_inputs`.
    model: Name of the model, for the error.
    adapter: Directory of the adapter with which the run begins, or '' for none.

  Raises:
    InputError: If an input has changed.
  """
  then = read_inputs(workdir)
  what = changed(then, now, model, adapter)
  if what:
    raise InputError(
        f'{what} from what the run in {workdir} began with. Restore it (set '
        '--config.model.name if the model was moved), or choose another '
        '--workdir.')
  if now.keys() - then.keys():
    loggers.write_json(workdir / 'inputs.json', now | then)


def open_log(workdir: Path, header: dict[str, Any], numbers: int, start: int,
             say: Callable[[str], None]) -> replay.Log:
  """Opens the log of a run's steps.

  With several processes, only process 0 opens the file, and it sends the
  recorded steps to the others.

  Args:
    workdir: Working directory of the run.
    header: Header of a new log; see `mezo_jax.runs.replay.open_log`.
    numbers: Number of projected gradients per step; 0 for backpropagation,
      whose steps cannot be replayed and are not recorded.
    start: Step of the checkpoint from which the run resumes, 0 for none.
    say: Reports a line to the user, if something is wrong with the log.

  Returns:
    The log. On other processes than 0, it has the steps but writes nothing.
  """
  log = None
  if numbers and jax.process_index() == 0:
    log, warning = replay.open_log(
        workdir / LOG, header, numbers, start,
        compare=False)  # configs were compared when the run was checked
    if warning:
      say(f'warning: {warning}.')
  steps = log.steps if log else replay.no_steps(numbers, start)
  if numbers and jax.process_count() > 1:
    # The shapes are sent first, since a broadcast needs an array of the same
    # shape on every process.
    first, t = multihost_utils.broadcast_one_to_all(
        np.array([steps.first, len(steps.values)])).tolist()
    blank = (np.zeros(t, np.float32), np.zeros((t, numbers), np.float32),
             np.zeros(t, bool))
    added = [step in steps.added for step in range(first, first + t)]
    values, grads, added = multihost_utils.broadcast_one_to_all(
        (steps.values, steps.projected_grads, np.array(added, bool))
        if log else blank)
    steps = replay.Steps(first, np.asarray(values), np.asarray(grads),
                         frozenset((first + np.flatnonzero(added)).tolist()))
  return log or replay.Log(None, {}, steps)


def read_result(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads the result of a run.

  Args:
    workdir: Working directory of the run.

  Returns:
    The contents of ``result.json``, or {} if the run has not finished.
  """
  file = Path(workdir) / 'result.json'
  return loggers.read_json(file) if file.is_file() else {}


def read_dev(workdir: str | os.PathLike[str], step: int) -> dict[str, Any]:
  """Reads the report of a run on its dev rows after a step.

  Args:
    workdir: Working directory of the run.
    step: Number of the step, such as that of the result.

  Returns:
    The values of the report, or {} if the step was not evaluated.
  """
  for record in loggers.read(Path(workdir) / 'metrics.jsonl'):
    if record['kind'] == 'dev' and record['step'] == step:
      return loggers.values_of(record)
  return {}
