"""Checks that all processes of a run have the same inputs.

All processes must call these functions. An error is raised on all of them, so
that none waits for another that has ended.
"""

from collections.abc import Callable
import contextlib
import hashlib
import json
from pathlib import Path
import secrets
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from mezo_jax.core.errors import InputError


def agree(what: str, digest: Callable[[], str], fix: str) -> None:
  """Checks that a digest is the same on all processes.

  Args:
    what: Description of what must be the same, for the error.
    digest: Function that returns hexadecimal digits; the number of digits is
      even and equal on all processes. It is not called in a run of one process.
    fix: What the user can do about a difference, for the error.

  Raises:
    InputError: On all processes, if one has another digest than process 0.
  """
  if jax.process_count() == 1:
    return
  found = multihost_utils.process_allgather(
      np.frombuffer(bytes.fromhex(digest()), np.uint8))
  others = np.flatnonzero((found != found[0]).any(-1))
  if others.size:
    raise InputError(f'process {", ".join(map(str, others))} and process 0 '
                     f'differ in {what}: {fix}.')


def agree_on(what: str, values: dict[str, Any], fix: str) -> None:
  """Checks that values are the same on all processes.

  Args:
    what: Description of the values, for the error.
    values: A dict of JSON values, possibly nested, with the same keys on all
      processes.
    fix: What the user can do about a difference, for the error.

  Raises:
    InputError: On all processes, if one has other values than process 0. It
      names the values that differ.
  """
  if jax.process_count() == 1:
    return

  def leaves(values, before=''):
    """Yields pairs (name such as 'spsa.eps', value as JSON)."""
    for name, value in values.items():
      if isinstance(value, dict):
        yield from leaves(value, f'{before}{name}.')
      else:
        yield before + name, json.dumps(value)
  here = dict(leaves(values))
  digests = [hashlib.blake2b(text.encode(), digest_size=16).digest()
             for text in here.values()]
  found = multihost_utils.process_allgather(
      np.frombuffer(b''.join(digests), np.uint8).reshape(len(here), 16))
  differs = (found != found[0]).any(-1)  # [processes, values]
  others = np.flatnonzero(differs.any(-1))
  if others.size:
    names = [name for name, d in zip(here, differs.any(0)) if d]
    mine = ', '.join(f'{name} (here {here[name]})' for name in names)
    raise InputError(f'process {", ".join(map(str, others))} and process 0 '
                     f'differ in {what}, {mine}: {fix}.')


def check_shared(directory: Path) -> None:
  """Checks that all processes see the same directory.

  Process 0 writes a random token into a file, and all try to read it.

  Args:
    directory: Path of the directory, which must exist on process 0.

  Raises:
    InputError: On all processes, if one cannot read the token.
  """
  if jax.process_count() == 1:
    return
  file, token = directory / '.shared', np.frombuffer(
      secrets.token_bytes(16), np.uint8)
  token = np.asarray(multihost_utils.broadcast_one_to_all(token)).tobytes()
  if jax.process_index() == 0:
    file.write_bytes(token)
  multihost_utils.sync_global_devices('written')
  seen = False
  for _ in range(20):  # a network file system may show the file with a delay
    with contextlib.suppress(OSError):
      seen = file.read_bytes() == token
    if seen:
      break
    time.sleep(0.5)
  found = multihost_utils.process_allgather(np.array(seen))
  if jax.process_index() == 0:
    file.unlink(missing_ok=True)
  if not found.all():
    others = ', '.join(map(str, np.flatnonzero(~found)))
    raise InputError(
        f'process {others} does not see the working directory of process 0, '
        f'{directory}; choose one on a file system that all hosts share.')
