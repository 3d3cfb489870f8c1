r"""Replicas: machines that keep their own weights and exchange numbers.

Experimental. Of the n directions of a step, each of R replicas evaluates n / R
on the same rows, and all make the same update with

.. math::
  g_{t,1}, \dots, g_{t,n}, \qquad g_{t,j} = (\ell_+ - \ell_-) / 2 \epsilon,

so their weights stay the same bit for bit (on one kind of processor, or with
Rademacher directions).

The replicas exchange their numbers through a directory that all of them see.
Each appends the projected gradients and the mean loss of its own directions to
a log of its own (the format of `mezo_jax.runs.replay`: 16 bytes a step with one
direction) and reads the logs of the others. Checksums of the weights are in a
JSON file next to each log. A replica that was killed, or lost its disk, makes
its weights again from the logs.
"""

import json
import os
from pathlib import Path
import time
from typing import Any

import numpy as np

from mezo_jax.core.errors import Again, InputError
from mezo_jax.runs import replay

_POLL = 0.002, 0.1  # Seconds between two looks at a file, at first and then.
_PATIENCE = 60.0  # Seconds to wait for the others at the end.


class _Peer:
  """Holds what was read from the log of one replica.

  Attributes:
    last: Number of its last step, 0 for none.
    steps: ``{step: (projected gradients [m], loss)}``.
  """

  def __init__(self, directory: Path, replica: int, header: dict):
    self.path = directory / f'replica-{replica}.log'
    self.marks_path = directory / f'replica-{replica}.weights.json'
    self.replica, self.last, self.steps = replica, 0, {}
    self._header = header | {'replica': replica}
    self._size, self._check = 0, 0

  def read(self) -> None:
    """Reads what is new; a record that is not whole waits.

    Raises:
      InputError: If the replica runs something else.
    """
    if not self._size:
      if not self.path.is_file():
        return
      found = replay.read(self.path)
      if any(found.header.get(k) != v for k, v in self._header.items()):
        raise InputError(
            f'replica {self.replica} runs something else: {self.path} is of '
            'other weights, another config, version or number of replicas. '
            'Start all replicas with the same, or choose another --exchange.')
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
    """Returns checksums of its weights, by step."""
    try:
      text = self.marks_path.read_text()
    except FileNotFoundError:
      return {}
    return {int(step): checksum for step, checksum in json.loads(text).items()}


class Exchange:
  """The place of one replica among all, for its training loop."""

  def __init__(self, directory: str | os.PathLike[str], run: str, replica: int,
               replicas: int, num_samples: int, timeout: float = 1800.0
               ) -> None:
    """Opens the log of this replica and reads those of the others.

    Args:
      directory: Directory that all replicas see, for this run alone.
      run: What must be the same for all replicas, as text.
      replica: Number of this replica, from 0.
      replicas: Number of replicas.
      num_samples: Number of directions of a step, a multiple of ``replicas``.
      timeout: Seconds after which a late replica ends this one.

    Raises:
      InputError: If another replica runs something else.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    header = dict(run=run, replicas=replicas, num_samples=num_samples)
    self._peers = [_Peer(directory, i, header) for i in range(replicas)]
    self._mine, self._timeout = self._peers[replica], timeout
    self._sums = {}  # Checksums of this replica's weights, by step.
    self.part: tuple[int, int] = replica, replicas  # For `mezo_jax.make_step`.
    self._read()
    self._log, _ = replay.open_log(
        self._mine.path, header | {'replica': replica}, num_samples // replicas)
    self._mine.read()

  def known(self) -> int:
    """Returns the last step that all replicas have recorded."""
    self._read()
    return min(peer.last for peer in self._peers)

  def at(self, step: int) -> tuple[np.ndarray, np.float32]:
    """Returns the projected gradients [n] and the mean loss of a step that all
    replicas have recorded."""
    grads, values = zip(*(peer.steps[step] for peer in self._peers))
    return np.concatenate(grads), np.mean(np.array(values), dtype=np.float32)

  def catch_up(self, log: replay.Log, added: Any = lambda step: False) -> None:
    """Copies steps that all replicas have recorded into the log of the run, and
    steps of that log into this replica's log of a new exchange.

    Args:
      log: Log of the run.
      added: Returns whether accumulated updates are applied after a step.

    Raises:
      InputError: If the log does not begin early enough.
    """
    first = self._mine.last + 1
    if first < log.steps.first and first <= log.end:
      raise InputError(
          f'the log begins with step {log.steps.first}, and the records of '
          f'replica {self._mine.replica} end with step {first - 1}: bring back '
          'what --exchange had, or start this replica in an empty --workdir.')
    for step in range(first, log.end + 1):
      self._record(step, *log.steps.at(step))
    log.extend((step, *self.at(step), added(step))
               for step in range(log.end + 1, self.known() + 1))

  def has(self, step: int) -> bool:
    """Returns whether this replica recorded a step before it was stopped."""
    return step <= self._mine.last

  def swap(self, step: int, projected_grad: Any = None, value: Any = None
           ) -> tuple[np.ndarray, np.float32]:
    """Records this replica's part of a step, and waits for the others'.

    Args:
      step: Number of the step, from 1.
      projected_grad: [n], of which this replica's part counts; None if it
        `has` the step.
      value: Mean loss of its part.

    Returns:
      The projected gradients [n] of all replicas, and the mean loss.

    Raises:
      Again: If another replica is late.
      InputError: If another replica runs something else.
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
            f'{self._timeout:g} s: see whether it runs. Nothing is lost; start '
            'this replica again when it does.')
      time.sleep(_POLL[waited > 2.0])
    return self.at(step)

  def mark(self, step: int, checksum: int) -> None:
    """Records a checksum of the weights after a step, and compares it.

    Raises:
      InputError: If the weights of another replica were others then.
    """
    self._sums[step] = checksum
    part = self._mine.marks_path.with_suffix('.part')
    part.write_text(json.dumps(self._mine.marks() | {step: checksum}))
    part.replace(self._mine.marks_path)
    self._compare()

  def close(self) -> None:
    """Waits, for a minute at most, until all replicas have recorded what their
    weights are.

    Raises:
      InputError: If the weights of another replica are others.
    """
    last, began = max(self._sums, default=0), time.monotonic()
    while last and any(last not in peer.marks() for peer in self._peers) and (
        time.monotonic() - began < min(self._timeout, _PATIENCE)):
      time.sleep(_POLL[1])
    self._compare()
    self._log.close()

  def _record(self, step: int, projected_grad, value) -> None:
    replica, replicas = self.part
    grads = np.split(np.asarray(projected_grad), replicas)[replica]
    self._log.append(step, grads, value)
    self._mine.read()

  def _read(self) -> None:
    for peer in self._peers:
      peer.read()

  def _compare(self) -> None:
    for peer in self._peers:
      marks = peer.marks()
      for step in marks.keys() & self._sums.keys():
        if marks[step] != self._sums[step]:
          raise InputError(
              f'after step {step} the weights of replica {peer.replica} are '
              f'not those of replica {self._mine.replica}: processors of '
              'different kinds round normal directions differently. Start all '
              "anew with --config.spsa.distribution='rademacher', or on "
              'machines of one kind.')
