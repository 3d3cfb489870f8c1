r"""Replicas: machines that keep their own weights and exchange numbers.

Of the n directions of a step each of R replicas evaluates n / R, on the same
rows, and all make the same update of

.. math::
  g_{t,1}, \dots, g_{t,n}, \qquad g_{t,j} = (\ell_+ - \ell_-) / 2 \epsilon,

so their weights stay the same bit for bit (of one kind of processor, or with
signs for directions). What crosses the network in a step are n pairs (key, g):
a key is a step's number and the replica's, so an entry of one direction is 16
bytes.

Every replica has entries of its own, numbered from 0, which only it adds to:

  ======  =============================================================
  uint32  the step's number, from 1; bit 31: the rest says what the weights were
          after this step
  uint32  CRC-32 of the other fields, and of all entries before
  float32 the mean loss of its directions; or a checksum of the weights
  float32 the projected gradients of its directions
  ======  =============================================================

They are kept in a file for each replica, and travel as parts of a directory
that all see, or over sockets (`mezo_jax.distributed.mirror`), which bring every
replica all files. An entry that is late is waited for; one that was lost is
sent again; one that comes twice, or before its turn, is known by its number;
and one that is not what it was, by its checksum. So a replica that lost its
disk, or joins late, makes the weights again from the entries.
"""

import json
from pathlib import Path
import threading
import time
import zlib

import numpy as np

from mezo_jax.core.errors import Again, InputError
from mezo_jax.runs.replay import Log

FORMAT = 1
_MARK = 1 << 31  # in a step's number
_POLL = 0.002, 0.1  # seconds from look to look, at first and then
_PATIENCE = 60.0  # seconds, at the end


class Entries:
  """What one replica has told so far; see the module.

  Attributes:
    last: the last step, 0 for none.
    steps: ``{step: (projected gradients [m], loss)}``.
    marks: ``{step: checksum of the weights}``.
    data: the entries as bytes.
  """

  def __init__(self, path: Path, run: str, replica: int, replicas: int,
               numbers: int):
    self.path, self.replica, self.last = path, replica, 0
    self.steps, self.marks, self.data = {}, {}, []
    self.kind = np.dtype([
        ('step', '<u4'), ('check', '<u4'), ('value', '<f4'),
        ('projected_grad', '<f4', (numbers,))])
    header = dict(format=FORMAT, run=run, replica=replica, replicas=replicas,
                  numbers=numbers)
    self._header = json.dumps(header, sort_keys=True).encode() + b'\n'
    self._check, self._size, self._file = zlib.crc32(self._header), 0, None

  def read(self) -> None:
    """Takes what the file has more; what is not whole waits.

    Raises:
      InputError: if it is of another run.
    """
    if not self.path.is_file():
      return
    with self.path.open('rb') as file:
      if not self._size:
        line = file.read(len(self._header))
        if line != self._header[:len(line)]:
          raise InputError(
              f'{self.path} is of another run: other weights, config, versions '
              'or numbers of replicas and directions. Start all replicas with '
              'the same, or choose another --exchange.')
        if len(line) < len(self._header):
          return
        self._size = len(line)
      file.seek(self._size)
      data, n = file.read(), self.kind.itemsize
    for at in range(0, len(data) - n + 1, n):
      if not self._note(data[at:at + n]):
        return
      self._size += n

  def write(self) -> None:
    """Opens the file, to be added to; what is not whole at its end goes."""
    self.read()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    if not self._size:
      part = self.path.with_name(self.path.name + '.part')
      part.write_bytes(self._header)
      part.replace(self.path)
      self._size = len(self._header)
    self._file = self.path.open('r+b', buffering=0)
    self._file.truncate(self._size)
    self._file.seek(self._size)

  def put(self, step: int, value, projected_grad) -> None:
    """Adds an entry of this replica's own."""
    entry = np.zeros(1, self.kind)
    entry['step'], entry['value'] = step, value
    entry['projected_grad'] = projected_grad
    self._add(entry)

  def mark(self, step: int, checksum: int) -> None:
    """Adds what the weights are after a step."""
    entry = np.zeros(1, self.kind)
    entry['step'] = step | _MARK
    entry['value'] = np.uint32(checksum).view(np.float32)
    self._add(entry)

  def take(self, index: int, data: bytes) -> str:
    """Takes an entry that was sent: 'new', 'doubled' or 'early'.

    Raises:
      InputError: if it is not the one that was sent before, or does not follow.
    """
    if index < len(self.data):
      if self.data[index] == data:
        return 'doubled'
    elif index > len(self.data):
      return 'early'
    elif self._note(data):
      if self._file:
        self._file.write(data)
      return 'new'
    raise InputError(
        f'replica {self.replica} has sent two different things as its entry '
        f'{index}: it was started anew without its entries, or they are '
        'damaged. Choose another --exchange for all replicas; their logs keep '
        'the steps that were made.')

  def close(self) -> None:
    if self._file:
      self._file.close()
      self._file = None

  def _add(self, entry: np.ndarray) -> None:
    entry['check'] = self._sum(entry.tobytes())
    data = entry.tobytes()
    if not self._note(data):
      raise ValueError(f'entry {entry} does not follow step {self.last}.')
    if self._file:
      self._file.write(data)

  def _sum(self, data: bytes) -> int:
    return zlib.crc32(data[8:], zlib.crc32(data[:4], self._check))

  def _note(self, data: bytes) -> bool:
    """Whether this is the next entry; then it is remembered."""
    entry, = np.frombuffer(data, self.kind)
    step, check = int(entry['step']), self._sum(data)
    if check != int(entry['check']):
      return False
    if step & _MARK:
      if step & ~_MARK != self.last:
        return False
      self.marks[step & ~_MARK] = int(entry['value'].view(np.uint32))
    elif step != self.last + 1:
      return False
    else:
      self.last = step
      self.steps[step] = (
          entry['projected_grad'].astype(np.float32),
          np.float32(entry['value']))
    self._check = check
    self.data.append(data)
    return True


class Exchange:
  """One replica's end: see `over_files` and
  `mezo_jax.distributed.mirror.over_sockets`."""

  def __init__(self, entries: list[Entries], replica: int, timeout: float,
               mirror=None):
    self.replica, self._timeout, self._mirror = replica, timeout, mirror
    self._all, self._mine = entries, entries[replica]
    self._sums = {}  # of this one's weights, by step
    self._changed = mirror.changed if mirror else threading.Condition()

  @property
  def part(self) -> tuple[int, int]:
    """For `mezo_jax.make_step`: this replica, and how many there are."""
    return self.replica, len(self._all)

  def known(self) -> int:
    """The last step that all have told."""
    self._read()
    return min(e.last for e in self._all)

  def told(self, step: int) -> tuple[np.ndarray, np.float32]:
    """The projected gradients [n] of a step that all have told, and its loss.
    """
    grads, values = zip(*(e.steps[step] for e in self._all))
    return np.concatenate(grads), np.mean(np.array(values), dtype=np.float32)

  def catch_up(self, log: Log, added=lambda step: False) -> None:
    """Gives a log the steps that all have told and it has not; and tells those
    of the log that this replica's entries, of a new exchange, have not.

    Args:
      log: of the run.
      added: whether what was pending is added to the weights after a step.

    Raises:
      InputError: if the log does not begin early enough for that.
    """
    first = self._mine.last + 1
    if first < log.steps.first and first <= log.end:
      raise InputError(
          f'the log begins with step {log.steps.first}, and the entries of '
          f'replica {self.replica} end with step {first - 1}: bring back what '
          '--exchange had, or start this replica in an empty --workdir.')
    for step in range(first, log.end + 1):
      grads, value = log.steps.at(step)
      self._put(step, grads, value)
    log.extend((step, *self.told(step), added(step))
               for step in range(log.end + 1, self.known() + 1))

  def has(self, step: int) -> bool:
    """Whether this replica told a step before it was stopped."""
    return step in self._mine.steps

  def swap(self, step: int, projected_grad=None, value=None
           ) -> tuple[np.ndarray, np.float32]:
    """Tells this replica's part of a step, and waits for the others'.

    Args:
      step: its number, from 1.
      projected_grad: [n], of which its part counts; None if it `has` the step.
      value: the mean loss of its part.

    Returns:
      The projected gradients [n] of all, and the mean loss.

    Raises:
      Again: if another replica's do not come in time.
      InputError: if the weights, or what was sent, are not the same everywhere.
    """
    if not self.has(step):
      self._put(step, projected_grad, value)
    began = time.monotonic()
    while late := [e for e in self._all if step not in e.steps]:
      self._read()
      waited = time.monotonic() - began
      if waited > self._timeout:
        raise Again(
            f'replica {late[0].replica} has not told step {step} within '
            f'{self._timeout:g} s{self._why(late[0])}: see whether it runs. '
            'Nothing is lost; start this one again when it does.')
      with self._changed:  # two that wait for each other nap alike
        self._changed.wait(_POLL[waited > 2.0])
    self._compare()
    return self.told(step)

  def mark(self, step: int, checksum: int) -> None:
    """Tells what the weights are after a step, to be compared.

    Raises:
      InputError: if those of another replica were something else then.
    """
    self._sums[step] = checksum
    with self._changed:
      if step == self._mine.last and step not in self._mine.marks:
        self._mine.mark(step, checksum)
        self._changed.notify_all()
    self._compare()

  def close(self) -> None:
    """Ends when all have told what their weights are, if this one has, and over
    sockets have what it told; or when they do not within a minute.

    Raises:
      InputError: if the weights of another replica are something else.
    """
    last, began = max(self._sums, default=0), time.monotonic()
    others = [e for e in self._all if e is not self._mine]
    while last and any(last not in e.marks for e in others) and (
        time.monotonic() - began < min(self._timeout, _PATIENCE)):
      self._read()
      with self._changed:
        self._changed.wait(_POLL[0])
    self._compare()
    if self._mirror:
      self._mirror.close(min(self._timeout, _PATIENCE))
    for e in self._all:
      e.close()

  def _put(self, step: int, projected_grad, value) -> None:
    m = self._mine.kind['projected_grad'].shape[0]
    grads = np.asarray(projected_grad)[self.replica * m:][:m]
    with self._changed:
      self._mine.put(step, np.asarray(value), grads)
      self._changed.notify_all()

  def _read(self) -> None:
    if self._mirror:
      self._mirror.check()
      return
    for e in self._all:
      if e is not self._mine:
        e.read()

  def _why(self, late: Entries) -> str:
    return '' if not self._mirror else self._mirror.why(late.replica)

  def _compare(self) -> None:
    for e in self._all:
      for step in e.marks.keys() & self._sums.keys():
        if e.marks[step] != self._sums[step]:
          raise InputError(
              f'after step {step} the weights of replica {e.replica} are not '
              f'those of this one, {self.replica}: processors of different '
              'kinds round normal directions differently. Start all anew with '
              "--config.spsa.distribution='rademacher', or on machines of one "
              'kind.')


def open_entries(directory: Path, run: str, replica: int, replicas: int,
                 numbers: int) -> list[Entries]:
  """Those of all replicas; this one's own, to be added to.

  Raises:
    InputError: for a replica that is none, directions that they cannot share
      out, or files of another run.
  """
  if not 0 <= replica < replicas:
    raise InputError(f'--replica is {replica} and must be at least 0 and below '
                     f'--replicas, {replicas}.')
  if numbers % replicas:
    raise InputError(
        f'{replicas} replicas cannot share out the {numbers} directions of a '
        'step: make --config.spsa.num_samples a multiple of --replicas.')
  found = [Entries(directory / f'replica-{i}.pairs', run, i, replicas,
                   numbers // replicas) for i in range(replicas)]
  for e in found:
    e.write() if e.replica == replica else e.read()
  return found


def over_files(directory: Path, run: str, replica: int, replicas: int,
               numbers: int, timeout: float = 1800.0) -> Exchange:
  """An exchange through a directory that all replicas see.

  Args:
    directory: of the files, for this run alone.
    run: what must be the same for all, as text.
    replica: the number of this one, from 0.
    replicas: how many there are.
    numbers: n, directions of a step.
    timeout: seconds after which a late replica ends this one.
  """
  return Exchange(
      open_entries(Path(directory), run, replica, replicas, numbers), replica,
      timeout)
