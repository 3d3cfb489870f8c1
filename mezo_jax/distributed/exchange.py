r"""Exchanges projected gradients between replicas through a shared directory.

Experimental. A replica is a machine that has its own copy of the weights. Each
of R replicas evaluates n / R of the n directions of a step, on the same rows,
and all make the same update with all of the projected gradients

.. math::
  g_{t,1}, \dots, g_{t,n}, \qquad g_{t,j} = (\ell_+ - \ell_-) / 2 \epsilon,

so their weights stay equal bit for bit (on processors of the same kind, or with
Rademacher directions).

Each replica appends the projected gradients and the mean loss of its own
directions to its own log in a directory that all replicas see, and reads the
logs of the others. The logs have the format of `mezo_jax.runs.replay`: 16 bytes
per step with one direction. A JSON file next to each log contains checksums of
the weights. A replica that was killed, or lost its disk, rebuilds its weights
by replaying the logs.
"""

import json
import os
from pathlib import Path
import time
from typing import Any

import numpy as np

from mezo_jax.core.errors import Again, InputError
from mezo_jax.runs import replay

# Seconds between two reads of a log, while a wait is shorter than two seconds
# and when it is longer.
_POLL = 0.002, 0.1
_PATIENCE = 60.0  # seconds to wait for the other replicas at the end


class _Peer:
  """Reads the log of one replica.

  Attributes:
    path: File of the log.
    marks_path: File of the checksums of the replica's weights.
    replica: Number of the replica, from 0.
    last: Number of the last step that was read, 0 for none.
    steps: The steps that were read, ``{step: (projected gradients [m], loss)}``
      with the m directions of the replica.
  """

  def __init__(self, directory: Path, replica: int, header: dict):
    """Reads nothing yet; the files need not exist.

    Args:
      directory: Directory of the exchange.
      replica: Number of the replica.
      header: Entries that the header of its log must have.
    """
    self.path = directory / f'replica-{replica}.log'
    self.marks_path = directory / f'replica-{replica}.weights.json'
    self.replica, self.last, self.steps = replica, 0, {}
    self._header = header | {'replica': replica}
    self._size, self._check = 0, 0

  def read(self) -> None:
    """Reads the records that were added since the last call.

    A record that is not complete yet is left for a later call.

    Raises:
      InputError: If the header of the log differs from that of this run.
    """
    if not self._size:
      if not self.path.is_file():
        return
      found = replay.read(self.path)
      if any(found.header.get(k) != v for k, v in self._header.items()):
        raise InputError(
            f'replica {self.replica} belongs to another run: {self.path} was '
            'written with other weights, another config, version or number of '
            'replicas. Start all replicas with the same settings, or choose '
            'another --exchange.')
      self._numbers = found.header['numbers']
      steps, self._size, self._check = found.steps, found.size, found.check
    else:
      with self.path.open('rb') as file:
        file.seek(self._size)
        data = file.read()
      steps, size, self._check = replay.parse(
          data, self._numbers, self.last + 1, self._check)
      self._size += size
    for step in range(steps.first, steps.last + 1):
      self.steps[step] = steps.at(step)
      self.last = step

  def marks(self) -> dict[int, int]:
    """Returns the checksums of the replica's weights, by step."""
    try:
      text = self.marks_path.read_text()
    except FileNotFoundError:
      return {}
    return {int(step): checksum for step, checksum in json.loads(text).items()}


class Exchange:
  """Exchanges the steps of one replica with those of the others.

  Attributes:
    part: ``(replica, replicas)``, as the argument `part` of
      `mezo_jax.make_step` needs it.
  """

  def __init__(self, directory: str | os.PathLike[str], run: str, replica: int,
               replicas: int, num_samples: int, timeout: float = 1800.0
               ) -> None:
    """Opens the log of this replica and reads those of the others.

    Args:
      directory: Directory that all replicas see, for this run only.
      run: A fingerprint of everything that must be the same for all replicas.
      replica: Number of this replica, from 0.
      replicas: Number of replicas.
      num_samples: Number of directions of a step, a multiple of ``replicas``.
      timeout: Seconds to wait for another replica before this one ends.
        Defaults to half an hour.

    Raises:
      InputError: If another replica belongs to another run.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    header = dict(run=run, replicas=replicas, num_samples=num_samples)
    self._peers = [_Peer(directory, i, header) for i in range(replicas)]
    self._mine, self._timeout = self._peers[replica], timeout
    self._sums = {}  # checksums of this replica's weights, by step
    self.part: tuple[int, int] = replica, replicas
    self._read()
    self._log, _ = replay.open_log(
        self._mine.path, header | {'replica': replica}, num_samples // replicas)
    self._mine.read()

  def known(self) -> int:
    """Returns the last step that all replicas have recorded."""
    self._read()
    return min(peer.last for peer in self._peers)

  def at(self, step: int) -> tuple[np.ndarray, np.float32]:
    """Returns the projected gradients [n] and the mean loss of a step.

    Args:
      step: Number of a step that all replicas have recorded.
    """
    grads, values = zip(*(peer.steps[step] for peer in self._peers))
    return np.concatenate(grads), np.mean(np.array(values), dtype=np.float32)

  def catch_up(self, log: replay.Log, added: Any = lambda step: False) -> None:
    """Copies steps between the log of the run and the exchange.

    First, steps that are in the log but not in this replica's exchange file are
    written to that file, for example after the old directory of the exchange
    was lost. Then steps that all replicas have recorded are added to the log.

    Args:
      log: Log of the run.
      added: Function that returns whether accumulated updates are applied after
        a step. Defaults to never.

    Raises:
      InputError: If the log begins too late to fill the exchange.
    """
    first = self._mine.last + 1
    if first < log.steps.first and first <= log.end:
      raise InputError(
          f'the log begins with step {log.steps.first}, but the records of '
          f'replica {self._mine.replica} end with step {first - 1}. Restore '
          'the files of --exchange, or choose an empty --workdir.')
    for step in range(first, log.end + 1):
      self._record(step, *log.steps.at(step))
    log.extend((step, *self.at(step), added(step))
               for step in range(log.end + 1, self.known() + 1))

  def has(self, step: int) -> bool:
    """Returns whether this replica has recorded a step already.

    If this replica was stopped, that is the case for some of the steps that it
    repeats after it resumed.
    """
    return step <= self._mine.last

  def swap(self, step: int, projected_grad: Any = None, value: Any = None
           ) -> tuple[np.ndarray, np.float32]:
    """Records this replica's part of a step, and waits for the other parts.

    Args:
      step: Number of the step, from 1.
      projected_grad: Array [n]; only the elements of this replica's directions
        are used. Defaults to None, for a step that this replica `has` already.
      value: Mean loss of this replica's directions. Defaults to None, like
        ``projected_grad``.

    Returns:
      The projected gradients [n] of all replicas, and the mean loss.

    Raises:
      Again: If another replica does not record the step in time.
      InputError: If another replica belongs to another run.
    """
    if not self.has(step):
      self._record(step, projected_grad, value)
    began = time.monotonic()
    while late := [peer for peer in self._peers if peer.last < step]:
      self._read()
      waited = time.monotonic() - began
      if waited > self._timeout:
        raise Again(
            f'replica {late[0].replica} has not recorded step {step} within '
            f'{self._timeout:g} s. No step is lost: check whether that replica '
            'is running, and start this one again when it is.')
      time.sleep(_POLL[waited > 2.0])
    return self.at(step)

  def mark(self, step: int, checksum: int) -> None:
    """Records a checksum of the weights, and compares it with the others.

    Args:
      step: Number of the step after which the weights had the checksum.
      checksum: The checksum; see `mezo_jax.core.fingerprint.checksum`.

    Raises:
      InputError: If another replica had different weights after a step.
    """
    self._sums[step] = checksum
    part = self._mine.marks_path.with_suffix('.part')
    part.write_text(json.dumps(self._mine.marks() | {step: checksum}))
    part.replace(self._mine.marks_path)
    self._compare()

  def close(self) -> None:
    """Waits for the checksums of the other replicas, and closes the log.

    It waits at most a minute until all replicas have recorded the last checksum
    that this replica recorded.

    Raises:
      InputError: If another replica has different weights.
    """
    last, began = max(self._sums, default=0), time.monotonic()
    while last and any(last not in peer.marks() for peer in self._peers) and (
        time.monotonic() - began < min(self._timeout, _PATIENCE)):
      time.sleep(_POLL[1])
    self._compare()
    self._log.close()

  def _record(self, step: int, projected_grad, value) -> None:
    """Appends this replica's part of a step to its log."""
    replica, replicas = self.part
    grads = np.split(np.asarray(projected_grad), replicas)[replica]
    self._log.append(step, grads, value)
    self._mine.read()

  def _read(self) -> None:
    """Reads the new records of all replicas."""
    for peer in self._peers:
      peer.read()

  def _compare(self) -> None:
    """Raises InputError if checksums of another replica differ."""
    for peer in self._peers:
      marks = peer.marks()
      for step in marks.keys() & self._sums.keys():
        if marks[step] != self._sums[step]:
          raise InputError(
              f'after step {step} the weights of replica {peer.replica} differ '
              f'from those of replica {self._mine.replica}, probably because '
              'processors of different kinds round normal directions '
              'differently. Start all replicas from scratch with '
              "--config.spsa.distribution='rademacher', or on machines of the "
              'same kind.')
