r"""The log of a run, and the run made again from it.

What MeZO does to the weights in step t hangs on its projected gradients
:math:`g_t` alone, since z is made from a key:

.. math:: \theta_{t+1} = \theta_t - \eta_t\, \frac1n \sum_j g_{t,j}\, z_{t,j}.

So a log is a line of JSON, the header, which has all else that z and the
updates depend on (a config, what the weights were), and a record a step:

  ======  =============================================================
  uint32  number of the step, from 1; bit 31: what was pending has been added
          to the weights after this step, and the rest says nothing
  uint32  CRC-32 of the other fields, and of all that was before them
  float32 the loss, NaN where it is not to be told
  float32 the projected gradients, as many as a step has
  ======  =============================================================

in little-endian order: 16 bytes with one direction. A learning rate and a decay
are functions of the header and of the step's number. Where a crash, or a bad
disk, has damaged a record, the log ends before it.

A log that is shared, `write_shared`, has the numbers alone, 4 bytes each, and
one CRC-32 at its end: 80 kB for the paper's 20,000 steps (Malladi et al., 2023,
on storage: a seed and 2 bytes a step, less than 0.1 MB).

Steps are made again through the door of `mezo_jax.spsa`, by the program that
made them first. So weights are those of training bit for bit, on any mesh;
with normal directions on processors of the same kind (others round
differently).
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

FORMAT = 1  # of a log
_ADDED = 1 << 31  # in a step's number
_LONGEST = 1 << 20  # bytes of a header
_OWN = ('format', 'numbers', 'first')  # entries of every header
_OF_SHARED = ('shared', 'steps', 'added')  # and of those that are shared


class Steps(NamedTuple):
  """What T steps in a row came to."""

  first: int  # the number of the first
  values: np.ndarray  # float32 [T]
  projected_grads: np.ndarray  # float32 [T, n]
  added: frozenset[int]  # after which of them what was pending was added

  @property
  def last(self) -> int:
    return self.first + len(self.values) - 1

  def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The projected gradients [n] and the loss of step number ``step``."""
    i = step - self.first
    if i < 0:
      raise IndexError(f'step {step} was before the first, {self.first}.')
    return self.projected_grads[i], self.values[i]

  def until(self, step: int) -> 'Steps':
    """Up to this one."""
    t = max(step - self.first + 1, 0)
    return Steps(self.first, self.values[:t], self.projected_grads[:t],
                 frozenset(x for x in self.added if x <= step))


def no_steps(n: int, start: int = 0) -> Steps:
  """None yet, after ``start`` of which nothing is known."""
  return Steps(start + 1, np.zeros(0, np.float32),
               np.zeros((0, n), np.float32), frozenset())


class Recorded(NamedTuple):
  """A log as it was read."""

  header: dict[str, Any]
  steps: Steps
  size: int  # bytes that are whole
  damaged: int  # bytes after them
  check: int  # the last CRC-32


# --- records ----------------------------------------------------------------


def _record(n: int) -> np.dtype:
  return np.dtype([('step', '<u4'), ('check', '<u4'), ('value', '<f4'),
                   ('projected_grad', '<f4', (n,))])


def _check(record: np.ndarray, before: int) -> int:
  data = record.tobytes()
  return zlib.crc32(data[8:], zlib.crc32(data[:4], before))


def _line(header: dict) -> bytes:
  """A header as a line with a checksum of its own."""
  text = json.dumps(header, sort_keys=True).encode()
  line = b'%08x %s\n' % (zlib.crc32(text), text)
  if len(line) > _LONGEST:
    raise InputError(f'the header of a log has {len(line)} bytes, above '
                     f'{_LONGEST}: it cannot be read again; make it shorter.')
  return line


class Log:
  """A log that grows: each record is one unbuffered write.

  Attributes:
    steps: those that were there when it was opened.
    end: the number of the last step.
    records: whether steps are recorded, on process 0; all know it.
  """

  def __init__(self, path: Path | None, header: dict[str, Any], steps: Steps,
               recorded: Recorded | None = None) -> None:
    """See `open_log`; without a path nothing is written."""
    self.steps: Steps = steps
    self.end: int = steps.last
    self._path = path
    self.records: bool = steps.projected_grads.shape[1] > 0
    self._file = None
    if path is None:
      return
    if recorded is None:
      line = _line(header)
      part = path.with_name(path.name + '.part')
      part.write_bytes(line)
      part.replace(path)
      self._check = zlib.crc32(line)
    else:
      os.truncate(path, recorded.size)
      self._check = recorded.check
    self._file = path.open('ab', buffering=0)

  def append(self, step: int, projected_grad: Any, value: Any = np.nan) -> None:
    """Records step number ``step``, which is the next."""
    if step != self.end + 1:
      raise ValueError(f'step {step} cannot follow step {self.end} in a log.')
    projected_grad = _numbers(
        'projected_grad', projected_grad, self.steps.projected_grads.shape[1])
    value = _numbers('value', value, 1)[0]
    self._write(step, projected_grad, value)
    self.end = step

  def extend(self, steps: Iterable[Any]) -> None:
    """Records steps that others made, ``(step, projected_grad, value, whether
    what was pending was added)``, as if they had been there."""
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
    """Records that after this step, the last, what was pending was added."""
    if step == self.end and step not in self.steps.added:
      self._write(step | _ADDED, 0, 0)

  def _write(self, step: int, projected_grad, value) -> None:
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
    """Returns when what was written is on the disk.

    Raises:
      InputError: if the file is not there any more.
    """
    if self._file is None or self._path is None:
      return
    if not self._path.exists() or not os.path.samestat(
        os.stat(self._path), os.fstat(self._file.fileno())):
      raise InputError(
          f'{self._path} was removed or replaced while the run wrote to it: '
          'leave the working directory of a run alone, and start it again.')
    os.fsync(self._file.fileno())

  def close(self) -> None:
    if self._file is not None:
      self._file.close()
      self._file = None


def open_log(path: str | os.PathLike[str], header: dict[str, Any], n: int,
             start: int = 0, *, compare: bool = True) -> tuple[Log, str]:
  """Opens the log of a run that goes on, or a new one.

  A log that is there keeps its header. Entries that only one of the two headers
  has, or that have other values in it, are named in the sentence that is
  returned: steps of another learning rate or key replay to other weights. A
  file that is not a log is kept under a name that ends in ``.damaged``.

  Args:
    path: The file, which need not be there; its directory must be.
    header: The header of a new log: a dict of JSON values, without the names
      that logs use themselves. An empty one is not compared.
    n: How many numbers a step has.
    start: How many steps the run has made without the log.
    compare: Whether the header is compared with that of a log that is there.
      Defaults to True. `mezo_jax.runs.resume` compares configs itself.

  Returns:
    The log, and a sentence if something was wrong, else ''.

  Raises:
    InputError: if the file is a log, but of another format or number of
      directions, or if there can be no file of this path.
    ValueError: for arguments that cannot be those of a log.
  """
  path = _path(path)
  n = arguments.whole('n', n)
  start = arguments.whole('start', start, least=0)
  header = _json_values(header)
  if path.is_dir():
    raise ExistsError(f'{path} is a directory: give the path of a file.')
  if not path.parent.is_dir():
    raise MissingError(
        f'{path.parent} is not a directory: make it, or choose another path.')
  recorded, said = None, ''
  if path.is_file():
    try:
      recorded = read(path)
    except Damaged as e:
      said = f'{e} Steps are recorded from step {start + 1} on'
      if path.stat().st_size:
        kept = path.with_name(path.name + '.damaged')
        path.replace(kept)
        said += f', and what was there is kept as {kept}'
    if recorded and recorded.header.get('shared'):
      raise InputError(f'{path} is a log that was shared, which cannot grow: '
                       'move it away.')
    if recorded and recorded.steps.projected_grads.shape[1] != n:
      raise InputError(
          f'{path} has {recorded.steps.projected_grads.shape[1]} numbers a '
          f'step, and this run {n}: it is of another run; choose another '
          'file, or another --workdir.')
    if recorded and recorded.steps.last < start:
      said = (f'{path} ends with step {recorded.steps.last}, before the '
              f'checkpoint of step {start}: steps are recorded from there on')
      recorded = None
    elif recorded and recorded.steps.first > start + 1:
      said = (f'{path} begins with step {recorded.steps.first}, and the run '
              f'goes on from step {start}: steps are recorded from there on')
      recorded = None
    elif recorded and recorded.damaged >= _record(n).itemsize:
      said = (f'{path} is damaged after step {recorded.steps.last}: from there '
              'on steps are made anew')
    if recorded and compare:
      said = '. '.join(filter(None, (said, _differs(path, header, recorded))))
  elif start:
    said = f'{path} is not there: steps are recorded from {start + 1} on'
  header = header | {'format': FORMAT, 'numbers': n, 'first': start + 1}
  steps = recorded.steps if recorded else no_steps(n, start)
  return Log(path, header, steps, recorded), said


def _path(path) -> Path:
  """Returns the path of a file, with ~ for the home directory."""
  try:
    return Path(path).expanduser()
  except (TypeError, RuntimeError) as e:
    raise ValueError(f'path must be that of a file, got {path!r}.') from e


def _json_values(header) -> dict:
  """Returns a header as it is read again.

  Raises:
    ValueError: if it is not a dict of JSON values.
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
    raise ValueError(f'header has {", ".join(map(repr, taken))}, which a log '
                     'has for itself: choose other names.')
  return header


def _numbers(name: str, x, n: int) -> np.ndarray:
  """Returns n numbers of a step as float32.

  Raises:
    ValueError: if they are something else.
  """
  try:
    if x is None:
      raise ValueError
    return np.reshape(np.asarray(x, np.float32), n)
  except (TypeError, ValueError) as e:
    raise ValueError(
        f'{name} must be {n} number{"s" if n > 1 else ""}, got {x!r}.') from e


def _differs(path: Path, header: dict, recorded: Recorded) -> str:
  """Returns a sentence about entries of a log's header that are others now."""
  if not header:
    return ''
  own = {k: v for k, v in recorded.header.items() if k not in _OWN}
  # As text two NaNs are equal; as values 1 and 1.0 are.
  as_text = lambda x: json.dumps(x, sort_keys=True)
  names = sorted(
      k for k in header.keys() | own.keys() if k not in own or k not in header
      or own[k] != header[k] and as_text(own[k]) != as_text(header[k]))
  if not names:
    return ''
  return (f'{path} has another header ({", ".join(names)} differ), which it '
          'keeps: its steps replay with what that says')


# --- files ------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Recorded:
  """A log, up to what is damaged.

  Raises:
    MissingError: if the file is not there.
    Damaged: if it has no header of a log.
    InputError: if it is of another format, or is a shared log and not whole.
  """
  path = _path(path)
  if not path.is_file():
    raise MissingError(f'{path} is not there, or no file: give that of a log.')
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
  """Returns the steps of records, up to one that is damaged or not whole.

  Args:
    data: The records.
    n: Number of projected gradients of a step.
    first: Number of the first step.
    check: CRC-32 of all that is before the records.

  Returns:
    The steps, the number of bytes that are whole, and the last CRC-32.
  """
  kind = _record(n)
  records = np.frombuffer(data[:len(data) // kind.itemsize * kind.itemsize],
                          kind)
  kept, added, good = [], [], 0
  for i, record in enumerate(records):
    step, new = int(record['step']), _check(record, check)
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
  """The header, checked."""
  whole = line.endswith(b'\n') and line[8:9] == b' '
  if not whole or line[:8] != b'%08x' % zlib.crc32(line[9:-1]):
    raise Damaged(f'{path} is not the log of a run, or its first line is '
                  'damaged.')
  header = json.loads(line[9:])
  if header.get('format') != FORMAT:
    raise InputError(
        f'{path} has the format {header.get("format")!r} and this version '
        f'reads {FORMAT}: use the version of mezo_jax that wrote it, '
        f'{header.get("mezo_jax")!r}.')
  counts = [header.get(k) for k in ('numbers', 'first')]
  counts += [header.get('steps')] if header.get('shared') else []
  if not all(isinstance(x, int) and x >= 0 for x in counts) or not counts[0]:
    raise Damaged(f'{path} has a header that no version writes.')
  return header


def write_shared(path: Path, header: dict[str, Any], steps: Steps) -> None:
  """A log to be shared: of no more than what makes the weights again."""
  line = _line(header | {
      'format': FORMAT, 'numbers': steps.projected_grads.shape[1],
      'first': steps.first, 'shared': True, 'steps': len(steps.values),
      'added': sorted(steps.added)})
  body = steps.projected_grads.astype('<f4').tobytes()
  check = zlib.crc32(body, zlib.crc32(line))
  path.write_bytes(line + body + check.to_bytes(4, 'little'))


def _shared(path: Path, header: dict, rest: bytes, check: int,
            at: int) -> Recorded:
  n, t = header['numbers'], header['steps']
  body, end = rest[:4 * n * t], rest[4 * n * t:]
  if len(end) != 4 or zlib.crc32(body, check) != int.from_bytes(end, 'little'):
    raise InputError(f'{path} is damaged: it is not what was written; fetch it '
                     'again.')
  return Recorded(header, Steps(
      header['first'], np.full(t, np.nan, np.float32),
      np.frombuffer(body, '<f4').astype(np.float32).reshape(t, n),
      frozenset(header['added'])), at + len(rest), 0, check)


# --- steps ------------------------------------------------------------------


def rebuild(step: Any, params: Any, state: Any, steps: Steps
            ) -> tuple[Any, Any]:
  """``params, state`` after these steps; both are donated.

  Args:
    step: of `mezo_jax.make_step`; its ``value_fn`` may be None.
    params: before the first of them.
    state: of the optimizer, before the first of them.
    steps: of a log.
  """
  for number in range(steps.first, steps.last + 1):
    params, state, _ = step.update(params, state, *steps.at(number))
    if number in steps.added:
      params, state = step.flush(params, state)
  return params, state
