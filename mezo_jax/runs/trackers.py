"""Copies the records of a run to TensorBoard, wandb and trackio.

``metrics.jsonl`` is the record of a run: it is always written, and a run
resumes from it. A tracker shows copies of its records elsewhere. Nothing that a
tracker does can stop a run or change its result: if it raises an exception, it
is reported once and gets no more records.
"""

from collections.abc import Callable, Sequence
import importlib.util
import os
from pathlib import Path
from typing import Any, Protocol
import uuid

import jax

from mezo_jax.core.errors import first_line, InputError
from mezo_jax.runs import loggers


class Tracker(Protocol):
  """Shows the records of a run. Each method may raise any exception."""

  def start(self, config: dict[str, Any] | None, workdir: Path, run_id: str,
            step: int, sent: int) -> None:
    """Starts or continues a run of the tracker.

    Args:
      config: The config as JSON values. None for a private run, of which only
        the records may be shown.
      workdir: Working directory of the run.
      run_id: Id of the run, the same each time that it is continued.
      step: Step after which the run continues, 0 for a new run.
      sent: Number of its records that the tracker has got already.
    """

  def log(self, step: int, kind: str, values: dict[str, float]) -> None:
    """Shows the numbers of a record."""

  def finish(self, result: dict[str, float] | None) -> None:
    """Ends the run.

    Args:
      result: Numbers of the result. None if the run was stopped.
    """


class TensorBoard:
  """Writes events to the folder ``tensorboard`` of the working directory."""

  def start(self, config, workdir, run_id, step, sent):
    del config, run_id
    # An optional package, which pyright cannot find if it is not installed.
    from tensorboardX import SummaryWriter  # pyright: ignore
    # TensorBoard hides what an earlier process wrote of the steps from here.
    self._writer = SummaryWriter(str(workdir / 'tensorboard'),
                                 purge_step=step + 1 if sent else 0)

  def log(self, step, kind, values):
    for name, value in values.items():
      self._writer.add_scalar(f'{kind}/{name}', value, step)

  def finish(self, result):
    del result
    self._writer.close()


class Wandb:
  """Logs to Weights & Biases."""

  def start(self, config, workdir, run_id, step, sent):
    del step
    import wandb  # pyright: ignore
    # Only records and the config are sent. The output, the command line, the
    # code and, in a private run, measurements of the machine are not.
    self._run = wandb.init(
        project=os.environ.get('WANDB_PROJECT', 'mezo_jax'),
        name=os.environ.get('WANDB_NAME', workdir.name), id=run_id,
        resume='allow', dir=str(workdir), config=config,
        settings=wandb.Settings(
            silent=True, console='off', disable_git=True, disable_code=True,
            x_disable_meta=True, x_disable_stats=config is None,
            x_save_requirements=False))
    # wandb orders records by a number of its own, and drops one whose number
    # is not the highest. A step may have several records, so they are counted.
    self._sent = sent
    self._run.define_metric('step')
    self._run.define_metric('*', step_metric='step')

  def log(self, step, kind, values):
    self._run.log(
        {'step': step} | {f'{kind}/{n}': v for n, v in values.items()},
        step=self._sent)
    self._sent += 1

  def finish(self, result):
    for name, value in (result or {}).items():
      self._run.summary[f'final/{name}'] = value
    self._run.finish(exit_code=1 if result is None else 0)


class Trackio:
  """Logs to trackio."""

  def start(self, config, workdir, run_id, step, sent):
    del step, sent
    import trackio  # pyright: ignore
    machine = False if config is None else None  # None leaves it to trackio
    self._run = trackio.init(
        project=os.environ.get('TRACKIO_PROJECT', 'mezo_jax'),
        name=f'{workdir.name}-{run_id}', resume='allow', config=config,
        auto_log_gpu=machine, auto_log_cpu=machine, embed=False)

  def log(self, step, kind, values):
    self._run.log({f'{kind}/{n}': v for n, v in values.items()}, step=step)

  def finish(self, result):
    if result:
      self._run.log({f'final/{n}': v for n, v in result.items()})
    self._run.finish()


# The tracker and the package of each name, in the order of the documentation.
TRACKERS: dict[str, tuple[Callable[[], Tracker], str]] = {
    'tensorboard': (TensorBoard, 'tensorboardX'),
    'wandb': (Wandb, 'wandb'), 'trackio': (Trackio, 'trackio')}
# Names that `config.loggers` may have. 'jsonl' stands for metrics.jsonl, and
# 'auto' for TensorBoard if its package is installed.
NAMES = ('auto', 'jsonl', *TRACKERS)
_FILE = 'trackers.json'


def _installed(package: str) -> bool:
  """Returns whether a package can be imported, without importing it."""
  return importlib.util.find_spec(package) is not None


def _wanted(names: Sequence[str]) -> list[str]:
  """Returns the trackers that ``config.loggers`` chooses.

  Args:
    names: Elements of `NAMES`.

  Raises:
    InputError: If the package of one is not installed.
  """
  found = {name: TRACKERS[name][1] for name in names if name in TRACKERS}
  if 'auto' in names and _installed(TRACKERS['tensorboard'][1]):
    found['tensorboard'] = TRACKERS['tensorboard'][1]
  for name, package in found.items():
    if not _installed(package):
      raise InputError(
          f'config.loggers has {name!r}, which needs the package {package}; to '
          f'install it, run: pip install {package}. Or remove it from '
          '--config.loggers.')
  return list(found)


class Mirror:
  """Copies the records of ``metrics.jsonl`` to trackers, on process 0.

  The file ``trackers.json`` of the working directory keeps the id of each
  tracker's run, so that a resumed run continues it, and the number of records
  that it has. A resumed run may compute some records again, with the same
  values. They are not sent twice, so the steps of a tracker never go back.
  """

  def __init__(self, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Stores the names of the trackers. `start` starts them.

    Args:
      names: The value of ``config.loggers``.
      say: Reports a line to the user.

    Raises:
      InputError: If the package of a tracker is not installed.
    """
    self._names = _wanted(names) if jax.process_index() == 0 else []
    self._say, self._live, self._saved, self._count = say, {}, {}, 0
    self._file: Path | None = None

  def start(self, config: dict[str, Any] | None, workdir: Path, step: int,
            kept: Sequence[dict[str, Any]], written: int) -> None:
    """Starts the trackers, and sends them the records that they lack.

    Args:
      config: The config as JSON values; None for a private run.
      workdir: Working directory of the run.
      step: Step after which the run continues, 0 for a new run.
      kept: The records of earlier processes that ``metrics.jsonl`` keeps.
      written: Number of records that it had before later ones were dropped.
    """
    if jax.process_index() > 0:
      return
    self._file = workdir / _FILE
    try:
      self._saved = loggers.read_json(self._file)
    except (InputError, OSError):  # a new run, or a file that was damaged
      self._saved = {}
    for name, entry in self._saved.items():
      if entry['on']:  # the last process sent all records that it wrote
        entry['sent'] = max(entry['sent'], written)
      entry['on'] = name in self._names
    for name in self._names:
      self._saved.setdefault(
          name, {'id': uuid.uuid4().hex[:8], 'sent': 0, 'on': True})
    if self._saved:
      loggers.write_json(self._file, self._saved)
    for name in self._names:
      entry, tracker = self._saved[name], TRACKERS[name][0]()
      sent = entry['sent']
      self._try(name, sent, tracker.start, config, workdir, entry['id'],
                step, sent)
      if name == 'tensorboard':  # it hides what was dropped
        sent = min(sent, len(kept))
      if entry['on']:
        self._live[name] = tracker, sent
    for record in kept:
      self.log(record)

  def log(self, record: dict[str, Any]) -> None:
    """Sends a record of ``metrics.jsonl`` to the trackers."""
    values = _numbers(record)
    step, kind = values.pop('step', 0), record['kind']
    for name, (tracker, sent) in [*self._live.items()]:
      if self._count >= sent:
        self._try(name, self._count, tracker.log, step, kind, values)
    self._count += 1

  def finish(self, result: dict[str, Any] | None = None) -> None:
    """Ends the runs of the trackers; another call does nothing.

    Args:
      result: Report on the test rows. Defaults to None, for a run that was
        stopped or whose result must not be shown.
    """
    values = None if result is None else _numbers(result)
    for name, (tracker, _) in [*self._live.items()]:
      self._try(name, self._count, tracker.finish, values)
    self._live = {}

  def close(self) -> None:
    """Ends the runs of the trackers if the run was stopped."""
    self.finish()

  def _try(self, name: str, sent: int, method: Callable[..., None], *args: Any
           ) -> None:
    """Calls a tracker, and gives it up if it raises an exception.

    Args:
      name: Name of the tracker.
      sent: Number of records that it has.
      method: The method to call.
      *args: Its arguments.
    """
    try:
      method(*args)
    except Exception as e:  # whatever a library does, the run goes on
      self._live.pop(name, None)
      self._say(
          f'warning: {name} failed and gets no more records '
          f'({type(e).__name__}: {first_line(e)}); metrics.jsonl has all of '
          'them, and the next start of this run tries again.')
      self._saved[name] |= {'sent': sent, 'on': False}
      assert self._file is not None  # set by `start`
      loggers.write_json(self._file, self._saved)


def _numbers(record: dict[str, Any]) -> dict[str, Any]:
  """Returns the entries of a record that are numbers."""
  return {name: value for name, value in record.items()
          if isinstance(value, (int, float))}
