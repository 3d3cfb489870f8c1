r"""Records the steps of a run in a log, and replays them.

The update of MeZO in step t depends only on its projected gradients
:math:`g_t`, since z is regenerated from a PRNG key:

.. math:: \theta_{t+1} = \theta_t - \eta_t\, \frac1n \sum_j g_{t,j}\, z_{t,j}.

So a log consists of a header and one record per step. The header is a line of
JSON with everything else on which z and the updates depend, such as the config
and a fingerprint of the initial weights. A record has these fields, in
little-endian order:

  =======  =================================================================
  uint32   The number of the step, from 1. If bit 31 is set, the record says
           only that accumulated updates were applied to the weights after
           this step; its loss and projected gradients have no meaning.
  uint32   The CRC-32 of the other fields and of everything before them.
  float32  The loss; NaN if it must not be recorded.
  float32  The projected gradients, one or more.
  =======  =================================================================

With one direction these are 16 bytes. The learning rate and the weight decay
are not recorded, since they are functions of the header and the step number. If
a crash or a bad disk damaged a record, the records before it can still be read.

A shared log (`write_shared`) has only the header, the projected gradients
(4 bytes each) and one CRC-32 at its end. The 20,000 steps of the paper take 80
kB (Malladi et al., 2023, estimate less than 0.1 MB, with a seed and 2 bytes per
step).

Steps are replayed with the replay path of `mezo_jax.spsa` (`projected_grad=`),
by the same program that made them. So the replayed weights are equal to those
of training bit for bit, on any mesh. With normal directions that holds only on
processors of the same kind, since other kinds round normal draws differently.
"""

from collections.abc import Iterable
import json
import os
from pathlib import Path
from typing import Any, NamedTuple
import zlib

import numpy as np

from mezo_jax.core import arguments
from mezo_jax.core.errors import (
  Damaged,
  ExistsError,
  first_line,
  InputError,
  MissingError,
)

FORMAT = 1  # version of the file format
# Bit in a step's number: accumulated updates were applied after the step.
_ADDED = 1 << 31
_LONGEST = 1 << 20  # largest number of bytes of a header
# Entries that this module adds to every header, and to those of shared logs.
_OWN = ('format', 'numbers', 'first')
_OF_SHARED = ('shared', 'steps', 'added')


class Steps(NamedTuple):
  """Holds the results of T consecutive steps.

  Attributes:
    first: Number of the first step.
    values: Losses, float32 [T].
    projected_grads: Projected gradients, float32 [T, n].
    added: Numbers of the steps after which accumulated updates were applied.
  """

  first: int
  values: np.ndarray
  projected_grads: np.ndarray
  added: frozenset[int]

  @property
  def last(self) -> int:
    """Returns the number of the last step; ``first - 1`` if there are none."""
    return self.first + len(self.values) - 1

  def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the projected gradients [n] and the loss of a step.

    Args:
      step: Number of the step.

    Raises:
      IndexError: If the step is not among these.
    """
    i = step - self.first
    if i < 0:
      raise IndexError(f'step {step} is before the first one, {self.first}.')
    return self.projected_grads[i], self.values[i]

  def until(self, step: int) -> 'Steps':
    """Returns the steps up to and including this one."""
    t = max(step - self.first + 1, 0)
    return Steps(self.first, self.values[:t], self.projected_grads[:t],
                 frozenset(x for x in self.added if x <= step))


def no_steps(n: int, start: int = 0) -> Steps:
  """Returns an empty sequence of steps.

  Args:
    n: Number of projected gradients per step.
    start: Number of steps that were made before and are not recorded. Defaults
      to 0.
  """
  return Steps(start + 1, np.zeros(0, np.float32),
               np.zeros((0, n), np.float32), frozenset())


class Recorded(NamedTuple):
  """Holds the contents of a log file.

  Attributes:
    header: The header, with the entries that this module adds.
    steps: The steps, up to the first damaged record.
    size: Number of bytes up to the first damaged record.
    damaged: Number of bytes after that.
    check: The CRC-32 of everything that was read. The CRC-32 of the next record
      is computed from it.
  """

  header: dict[str, Any]
  steps: Steps
  size: int
  damaged: int
  check: int


# --- records ----------------------------------------------------------------


def _record(n: int) -> np.dtype:
  """Returns the dtype of a record with n projected gradients."""
  return np.dtype([('step', '<u4'), ('check', '<u4'), ('value', '<f4'),
                   ('projected_grad', '<f4', (n,))])


def _check(record: np.ndarray, before: int) -> int:
  """Returns the CRC-32 of a record, continued from the one before it."""
  data = record.tobytes()
  return zlib.crc32(data[8:], zlib.crc32(data[:4], before))


def _line(header: dict) -> bytes:
  """Returns a header as a line that begins with its CRC-32.

  Raises:
    InputError: If the line is longer than `read` accepts.
  """
  text = json.dumps(header, sort_keys=True).encode()
  line = b'%08x %s\n' % (zlib.crc32(text), text)
  if len(line) > _LONGEST:
    raise InputError(f'the header of the log has {len(line)} bytes, but at '
                     f'most {_LONGEST} can be read; make it shorter.')
  return line


class Log:
  """Appends steps to a log file. Each record is one unbuffered write.

  Attributes:
    steps: The steps that the log had when it was opened, and those that
      `extend` added.
    end: Number of the last recorded step.
    records: Whether steps are recorded at all. It has the same value on all
      processes, although only process 0 writes to the file.
  """

  def __init__(self, path: Path | None, header: dict[str, Any], steps: Steps,
               recorded: Recorded | None = None) -> None:
    """Opens the file; use `open_log` instead.

    Args:
      path: The file. None for a log that writes nothing.
      header: Header of a new file.
      steps: The steps that are in the file.
      recorded: Contents of an existing file, which is continued. Its damaged
        end is cut off. None creates a new file.
    """
    self.steps: Steps = steps
    self.end: int = steps.last
    self._path = path
    self.records: bool = steps.projected_grads.shape[1] > 0
    self._file = None
    if path is None:
      return
    if recorded is None:
      line = _line(header)
      # Written under another name first, so that no file has half a header.
      part = path.with_name(path.name + '.part')
      part.write_bytes(line)
      part.replace(path)
      self._check = zlib.crc32(line)
    else:
      os.truncate(path, recorded.size)
      self._check = recorded.check
    self._file = path.open('ab', buffering=0)

  def append(self, step: int, projected_grad: Any, value: Any = np.nan) -> None:
    """Records the next step.

    Args:
      step: Number of the step, ``end + 1``.
      projected_grad: The projected gradients [n] of the step.
      value: The loss. Defaults to NaN.

    Raises:
      ValueError: If it is not the next step, or if the numbers are not of the
        expected shape.
      OSError: If the file cannot be written.
    """
    if step != self.end + 1:
      raise ValueError(f'step {step} cannot follow step {self.end} in a log.')
    projected_grad = _numbers(
        'projected_grad', projected_grad, self.steps.projected_grads.shape[1])
    value = _numbers('value', value, 1)[0]
    self._write(step, projected_grad, value)
    self.end = step

  def extend(self, steps: Iterable[Any]) -> None:
    """Records steps that other replicas made, for this run to replay.

    They are also added to ``steps``, as if they had been in the file before.

    Args:
      steps: Tuples ``(step, projected_grad, value, added)``, where ``added``
        tells whether accumulated updates were applied after the step.
    """
    first, new = self.end + 1, [*steps]
    for step, projected_grad, value, added in new:
      self.append(step, projected_grad, value)
      if added:
        self.added(step)
    if new:
      old = self.steps.until(first - 1)
      self.steps = Steps(
          old.first,
          np.append(old.values, np.array(
              [v for _, _, v, _ in new], np.float32)),
          np.concatenate([old.projected_grads, [g for _, g, _, _ in new]]),
          old.added | {step for step, _, _, added in new if added})

  def added(self, step: int) -> None:
    """Records that accumulated updates were applied after the last step.

    Nothing is written if ``step`` is not the last step, or if the log has the
    record already.

    Args:
      step: Number of the step.
    """
    if step == self.end and step not in self.steps.added:
      self._write(step | _ADDED, 0, 0)

  def _write(self, step: int, projected_grad, value) -> None:
    """Writes one record, if there is a file."""
    if self._file is None:
      return
    record = np.zeros(1, _record(self.steps.projected_grads.shape[1]))
    record['step'], record['value'] = step, value
    record['projected_grad'] = np.ravel(projected_grad)
    record['check'] = self._check = _check(record, self._check)
    try:
      self._file.write(record.tobytes())
    except OSError as e:
      e.filename = e.filename or str(self._path)
      raise

  def sync(self) -> None:
    """Waits until all records are on the disk.

    Raises:
      InputError: If the file was removed or replaced.
    """
    if self._file is None or self._path is None:
      return
    if not self._path.exists() or not os.path.samestat(
        os.stat(self._path), os.fstat(self._file.fileno())):
      raise InputError(
          f'{self._path} was removed or replaced while the run wrote to it. '
          'Start the run again, and do not change its working directory.')
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()
      self._file = None


def open_log(path: str | os.PathLike[str], header: dict[str, Any], n: int,
             start: int = 0, *, compare: bool = True) -> tuple[Log, str]:
  """Opens the log of a resumed run, or creates a new one.

  An existing log keeps its header. If its entries differ from those of
  ``header``, the returned warning names them: with another learning rate or
  key, the recorded steps replay to other weights. A log that ends before step
  ``start``, or begins after the next step, is replaced. A file that is not a
  log is kept under a name that ends in ``.damaged``.

  Args:
    path: The file, which need not exist. Its directory must exist.
    header: The header of a new log: a dict of JSON values, without the names
      that this module uses itself. An empty header is not compared.
    n: Number of projected gradients per step.
    start: Step of the checkpoint from which the run resumes. Defaults to 0, for
      a run that starts with step 1.
    compare: Whether ``header`` is compared with that of an existing log.
      Defaults to True.

  Returns:
    The log, and a warning without a final period, or '' if nothing is wrong.

  Raises:
    InputError: If the file is a log of another format, a shared log, or has
      another number of projected gradients; or if the path is a directory, or
      its directory does not exist.
    ValueError: If an argument is invalid.
  """
  path = _path(path)
  n = arguments.whole('n', n)
  start = arguments.whole('start', start, least=0)
  header = _json_values(header)
  if path.is_dir():
    raise ExistsError(f'{path} is a directory; pass the path of a file.')
  if not path.parent.is_dir():
    raise MissingError(
        f'{path.parent} is not a directory; create it or choose another path.')
  recorded, said = None, ''
  if path.is_file():
    try:
      recorded = read(path)
    except Damaged as e:
      said = f'{e} A new log begins with step {start + 1}'
      if path.stat().st_size:
        kept = path.with_name(path.name + '.damaged')
        path.replace(kept)
        said += f', and the old file is kept as {kept}'
    if recorded and recorded.header.get('shared'):
      raise InputError(f'{path} is a shared log, to which steps cannot be '
                       'added; move it away.')
    if recorded and recorded.steps.projected_grads.shape[1] != n:
      raise InputError(
          f'{path} has {recorded.steps.projected_grads.shape[1]} projected '
          f'gradients per step, but this run has {n}, so it belongs to another '
          'run. Choose another file, or another --workdir.')
    if recorded and recorded.steps.last < start:
      said = (f'{path} ended with step {recorded.steps.last}, before the '
              f'checkpoint of step {start}; a new log begins after that step')
      recorded = None
    elif recorded and recorded.steps.first > start + 1:
      said = (f'{path} began with step {recorded.steps.first}, but the run '
              f'resumes from step {start}; a new log begins after that step')
      recorded = None
    elif recorded and recorded.damaged >= _record(n).itemsize:
      said = (f'{path} is damaged after step {recorded.steps.last}; the steps '
              'after that are computed again')
    if recorded and compare:
      said = '. '.join(filter(None, (said, _differs(path, header, recorded))))
  elif start:
    said = f'{path} does not exist; a new log begins with step {start + 1}'
  header = header | {'format': FORMAT, 'numbers': n, 'first': start + 1}
  steps = recorded.steps if recorded else no_steps(n, start)
  return Log(path, header, steps, recorded), said


def _path(path) -> Path:
  """Returns the path of a file, with ``~`` expanded.

  Raises:
    ValueError: If it is not a path.
  """
  try:
    return Path(path).expanduser()
  except (TypeError, RuntimeError) as e:
    raise ValueError(f'path must be the path of a file, got {path!r}.') from e


def _json_values(header) -> dict:
  """Converts a header to JSON and back, to what a reader of the log will get.

  Raises:
    ValueError: If it is not a dict of JSON values, or has reserved entries.
  """
  if not isinstance(header, dict):
    raise ValueError(f'header must be a dict of JSON values, got {header!r}.')
  try:
    header = json.loads(json.dumps(header))
  except (TypeError, ValueError) as e:
    raise ValueError(
        f'header must be a dict of JSON values: {first_line(e)}.') from e
  taken = [name for name in (*_OWN, *_OF_SHARED) if name in header]
  if taken:
    raise ValueError(f'header has {", ".join(map(repr, taken))}, which logs '
                     'use themselves; choose other names.')
  return header


def _numbers(name: str, x, n: int) -> np.ndarray:
  """Returns n numbers of a step as float32 [n].

  Args:
    name: Name of the argument, for the error.
    x: The numbers.
    n: The expected number of them.

  Raises:
    ValueError: If ``x`` is something else.
  """
  try:
    if x is None:
      raise ValueError
    return np.reshape(np.asarray(x, np.float32), n)
  except (TypeError, ValueError) as e:
    raise ValueError(
        f'{name} must be {n} number{"s" if n > 1 else ""}, got {x!r}.') from e


def _differs(path: Path, header: dict, recorded: Recorded) -> str:
  """Returns a warning that names the entries in which two headers differ.

  Args:
    path: File of the log, for the warning.
    header: Header of the current run; an empty one is not compared.
    recorded: Contents of the log.

  Returns:
    The warning, or '' if the headers are equal.
  """
  if not header:
    return ''
  own = {k: v for k, v in recorded.header.items() if k not in _OWN}
  # Entries are equal if their values or their texts are: 1 and 1.0 have equal
  # values, and two NaNs have equal texts.
  as_text = lambda x: json.dumps(x, sort_keys=True)
  names = sorted(
      k for k in header.keys() | own.keys() if k not in own or k not in header
      or own[k] != header[k] and as_text(own[k]) != as_text(header[k]))
  if not names:
    return ''
  return (f'{path} has a different header ({", ".join(names)} differ); the log '
          'keeps its own header, which applies when its steps are replayed')


# --- files ------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Recorded:
  """Reads a log, up to the first damaged record.

  Args:
    path: The file.

  Raises:
    MissingError: If the file does not exist.
    Damaged: If it does not begin with the header of a log.
    InputError: If it has another format, or if it is a shared log and damaged.
  """
  path = _path(path)
  if not path.is_file():
    raise MissingError(f'{path} is not a file; pass the path of a log.')
  with path.open('rb') as file:
    line = file.readline(_LONGEST)
    header = _header(path, line)
    n, first, at = header['numbers'], header['first'], len(line)
    rest = file.read()
  check = zlib.crc32(line)
  if header.get('shared'):
    return _shared(path, header, rest, check, at)
  steps, size, check = parse(rest, n, first, check)
  return Recorded(header, steps, at + size, len(rest) - size, check)


def parse(data: bytes, n: int, first: int, check: int
          ) -> tuple[Steps, int, int]:
  """Parses records, up to the first that is damaged or incomplete.

  Args:
    data: The bytes of the records.
    n: Number of projected gradients per step.
    first: Number of the first step.
    check: CRC-32 of everything before the records.

  Returns:
    The steps, the number of bytes that were parsed, and the last CRC-32.
  """
  kind = _record(n)
  records = np.frombuffer(data[:len(data) // kind.itemsize * kind.itemsize],
                          kind)
  kept, added, good = [], [], 0
  for i, record in enumerate(records):
    step, new = int(record['step']), _check(record, check)
    # A step has the next number. A record with bit 31 repeats the number of the
    # step before it.
    number = step & ~_ADDED
    follows = number == first + len(kept) - bool(step & _ADDED)
    if new != int(record['check']) or not follows:
      break
    check, good = new, i + 1
    if step & _ADDED:
      added.append(number)
    else:
      kept.append(i)
  chosen = records[kept]
  return Steps(
      first, chosen['value'].astype(np.float32),
      chosen['projected_grad'].astype(np.float32).reshape(-1, n),
      frozenset(added)), good * kind.itemsize, check


def _header(path: Path, line: bytes) -> dict:
  """Returns the header from the first line of a log.

  Raises:
    Damaged: If the line is not a header.
    InputError: If the log has another format.
  """
  whole = line.endswith(b'\n') and line[8:9] == b' '
  if not whole or line[:8] != b'%08x' % zlib.crc32(line[9:-1]):
    raise Damaged(f'{path} is not the log of a run, or its header is '
                  'damaged.')
  header = json.loads(line[9:])
  if header.get('format') != FORMAT:
    raise InputError(
        f'{path} has the log format {header.get("format")!r}, but this version '
        f'reads format {FORMAT}. Use the version of mezo_jax that wrote it, '
        f'{header.get("mezo_jax")!r}.')
  counts = [header.get(k) for k in ('numbers', 'first')]
  counts += [header.get('steps')] if header.get('shared') else []
  if not all(isinstance(x, int) and x >= 0 for x in counts) or not counts[0]:
    raise Damaged(f'{path} has an invalid header.')
  return header


def write_shared(path: Path, header: dict[str, Any], steps: Steps) -> None:
  """Writes a shared log, from which others can rebuild the weights.

  It contains the projected gradients but no losses.

  Args:
    path: The file.
    header: The header. This module's own entries are replaced.
    steps: The steps.
  """
  line = _line(header | {
      'format': FORMAT, 'numbers': steps.projected_grads.shape[1],
      'first': steps.first, 'shared': True, 'steps': len(steps.values),
      'added': sorted(steps.added)})
  body = steps.projected_grads.astype('<f4').tobytes()
  check = zlib.crc32(body, zlib.crc32(line))
  part = path.with_name(path.name + '.part')
  part.write_bytes(line + body + check.to_bytes(4, 'little'))
  part.replace(path)


def _shared(path: Path, header: dict, rest: bytes, check: int,
            at: int) -> Recorded:
  """Returns the contents of a shared log.

  Args:
    path: The file, for the error.
    header: The header.
    rest: The bytes after the header.
    check: CRC-32 of the header's line.
    at: Number of bytes of the header's line.

  Raises:
    InputError: If the checksum differs.
  """
  n, t = header['numbers'], header['steps']
  body, end = rest[:4 * n * t], rest[4 * n * t:]
  if len(end) != 4 or zlib.crc32(body, check) != int.from_bytes(end, 'little'):
    raise InputError(f'{path} is damaged (its checksum differs); copy or '
                     'download it again.')
  return Recorded(header, Steps(
      header['first'], np.full(t, np.nan, np.float32),
      np.frombuffer(body, '<f4').astype(np.float32).reshape(t, n),
      frozenset(header['added'])), at + len(rest), 0, check)


# --- steps ------------------------------------------------------------------


def rebuild(step: Any, params: Any, state: Any, steps: Steps
            ) -> tuple[Any, Any]:
  """Replays steps, without data or forward passes.

  Args:
    step: A step of `mezo_jax.make_step`; its ``value_fn`` may be None.
    params: The parameters before the first of the steps. They are donated.
    state: State of the optimizer before the first of the steps. It is donated.
    steps: The steps to replay, from a log.

  Returns:
    The parameters and the state after the last step.
  """
  for number in range(steps.first, steps.last + 1):
    params, state, _ = step.update(params, state, *steps.at(number))
    if number in steps.added:
      params, state = step.apply_accumulated(params, state)
  return params, state
