"""The working directory of a run: who holds it, and what a run finds in it."""

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

LOG = 'steps.log'


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
  """Makes a directory and holds it for one run.

  The system releases it however the run ends. A directory that stays empty is
  removed.

  Raises:
    InputError: if another run is at work there, or if it cannot be written to.
  """
  local(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if not os.access(workdir, os.W_OK | os.X_OK):
    raise InputError(f'{workdir} cannot be written to; give another --workdir.')
  held = os.open(workdir, os.O_RDONLY)
  try:
    if jax.process_index() == 0:
      try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        raise InputError(f'another run is at work in {workdir}: wait for its '
                         'end, or give another --workdir.') from e
      except OSError:  # a file system that knows no locks
        pass
    yield
  finally:
    os.close(held)
    with contextlib.suppress(OSError):
      workdir.rmdir()


def last_step(workdir: Path) -> tuple[int, bool]:
  """Returns the last step that a directory holds, and whether it is final.

  Steps are in the log and in checkpoints. The last step is final where the run
  can have its result without another step: the step was evaluated, or the log
  replays it, which includes its evaluation.
  """
  held = saved = checkpoint.latest_step(workdir / 'checkpoints')
  if (workdir / LOG).is_file():
    with contextlib.suppress(Damaged):  # reported when it is opened
      held = max(held, replay.read(workdir / LOG).steps.last)
  if not held or held > saved:
    return held, True
  return held, any(r['kind'] == 'dev' and r['step'] == held
                   for r in loggers.read(workdir / 'metrics.jsonl'))


def changed(then: dict[str, Any], now: dict[str, Any], model: str, adapter: str
            ) -> str:
  """Returns what differs between two sets of inputs, in words.

  What one of them lacks, because an earlier version did not record it, is not
  compared.

  Args:
    then: The inputs that a run recorded; see `read_inputs`.
    now: The inputs of now.
    model: Name of the model.
    adapter: Directory of the adapter that the run begins with, or ''.

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
  """Returns the fingerprints that a run recorded of its inputs.

  They have the names 'weights', 'model', 'tokenizer', 'adapter' and 'rows'; {}
  if the run recorded nothing.
  """
  file = workdir / 'inputs.json'
  return loggers.read_json(file) if file.is_file() else {}


def check_inputs(workdir: Path, now: dict[str, Any], model: str, adapter: str
                 ) -> None:
  """Records the inputs of a run, or compares them with those recorded before.

  Args:
    workdir: Directory of the run.
    now: Fingerprints of the inputs.
    model: Name of the model.
    adapter: Directory of the adapter that the run begins with, or ''.

  Raises:
    InputError: if an input has changed.
  """
  then = read_inputs(workdir)
  what = changed(then, now, model, adapter)
  if what:
    raise InputError(
        f'{what} from what the run in {workdir} began with: bring that back '
        '(--config.model.name says where the model is now), or choose another '
        '--workdir.')
  if now.keys() - then.keys():
    loggers.write_json(workdir / 'inputs.json', now | then)


def open_log(workdir: Path, header: dict[str, Any], numbers: int, start: int,
             say: Callable[[str], None]) -> replay.Log:
  """Opens the log of a run's steps.

  On several processes, process 0 has the file and all know its steps.

  Args:
    workdir: Directory of the run.
    header: Header of a new log.
    numbers: Projected gradients of a step; 0 for backpropagation, whose log
      stays empty.
    start: Step of the checkpoint that the run resumes from.
    say: Reports what was wrong with the log.
  """
  log = None
  if numbers and jax.process_index() == 0:
    log, warning = replay.open_log(
        workdir / LOG, header, numbers, start,
        compare=False)  # the config was compared when the run was checked
    if warning:
      say(f'warning: {warning}.')
  steps = log.steps if log else replay.no_steps(numbers, start)
  if numbers and jax.process_count() > 1:
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
  """Returns the result of a finished run; {} of one that is not finished."""
  file = Path(workdir) / 'result.json'
  return loggers.read_json(file) if file.is_file() else {}
