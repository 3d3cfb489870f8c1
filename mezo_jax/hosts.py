"""A run of several processes: how they find each other, that they run the same
thing, and that none waits for one that is not there any more.

Every process holds a connection to process 0. The system closes it when a
process dies, however that is, so the others know within a second; where a whole
machine goes down, within `SILENT` seconds.
"""

from collections.abc import Callable, Iterator
import contextlib
import hashlib
import json
import os
from pathlib import Path
import secrets
import socket
import struct
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed
from jax.experimental import multihost_utils
import numpy as np

from mezo_jax.errors import AGAIN, first_line, InputError

SILENT = 30  # seconds without an answer after which a machine is lost
_WAIT = 3.0  # seconds for a process to say itself why it ends
_LEFT = 0xFFFFFFFF  # sent instead of the number of a process that died


# --- joining ----------------------------------------------------------------


def join(coordinator: str | None = None, num_processes: int | None = None,
         process_id: int | None = None) -> None:
  """Joins the processes of a run.

  What is not said is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, or torchrun's MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK;
  else it is found where Slurm, Open MPI, Kubernetes or a TPU pod tells it.

  Args:
    coordinator: host:port of process 0, which listens there.
    num_processes: of the run.
    process_id: of this one, from 0.

  Raises:
    InputError: if the others cannot be found.
  """
  told = {k: v for k, v in dict(
      coordinator=coordinator, num_processes=num_processes,
      process_id=process_id).items() if v is not None}
  given = _environment() | told
  if not told and {*given} == {'coordinator'}:
    given = {}  # JAX reads it too, and has the rest of a cluster
  if given and len(given) < 3:
    missing = {'coordinator', 'num_processes', 'process_id'} - {*given}
    raise InputError(
        f'several processes: --{" and --".join(sorted(missing))} must be given '
        f'beside --{" and --".join(sorted(given))}.')
  if given and not 0 <= given['process_id'] < given['num_processes']:
    raise InputError(
        f'--process_id is {given["process_id"]} and must be at least 0 and '
        f'below --num_processes, {given["num_processes"]}.')
  if given and not given['coordinator'].rpartition(':')[2].isdigit():
    raise InputError(f'--coordinator is {given["coordinator"]!r} and must be '
                     'HOST:PORT, of process 0.')
  try:
    jax.distributed.initialize(
        given.get('coordinator'), given.get('num_processes'),
        given.get('process_id'), heartbeat_timeout_seconds=2 * SILENT)
  except (RuntimeError, ValueError) as e:
    raise InputError(
        f'--distributed finds no other processes: {first_line(e)} Start it '
        'on each host with srun or mpirun, or with --coordinator=HOST:PORT '
        '--num_processes=N --process_id=I, or leave it out on one host.') from e


def _environment() -> dict:
  env = os.environ
  if 'JAX_COORDINATOR_ADDRESS' in env:
    names = ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
    found = dict(coordinator=env['JAX_COORDINATOR_ADDRESS'])
  elif {'MASTER_ADDR', 'MASTER_PORT', 'WORLD_SIZE', 'RANK'} <= {*env}:
    names = ('WORLD_SIZE', 'RANK')
    found = dict(coordinator=f'{env["MASTER_ADDR"]}:{env["MASTER_PORT"]}')
  else:
    return {}
  for what, name in zip(('num_processes', 'process_id'), names):
    if name in env and not env[name].isdigit():
      raise InputError(f'{name} is {env[name]!r} and must be a number.')
    found |= {what: int(env[name])} if name in env else {}
  return found


# --- agreeing ---------------------------------------------------------------


def agree(what: str, digest: Callable[[], str], mend: str) -> None:
  """Raises InputError, on all, where a process has not what process 0 has.

  Args:
    what: that must be the same, in words.
    digest: gives hexadecimal digits of it; not called in a run of one process.
    mend: what to do where it is not.
  """
  if jax.process_count() == 1:
    return
  found = multihost_utils.process_allgather(
      np.frombuffer(bytes.fromhex(digest()), np.uint8))
  others = np.flatnonzero((found != found[0]).any(-1))
  if others.size:
    raise InputError(f'process {", ".join(map(str, others))} and process 0 '
                     f'differ in {what}: {mend}.')


def agree_on(what: str, values: dict, mend: str) -> None:
  """Raises InputError, on all, where a process has not the values of process 0;
  it names those that differ.

  Args:
    what: What must be the same, in words.
    values: A dict of JSON values, also nested, with the same keys everywhere.
    mend: What to do where they are not the same.
  """
  if jax.process_count() == 1:
    return

  def leaves(values, before=''):
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
                     f'differ in {what}, {mine}: {mend}.')


def share(directory: Path) -> None:
  """Raises InputError, on all, where a process sees another directory."""
  if jax.process_count() == 1:
    return
  file, token = directory / '.shared', np.frombuffer(
      secrets.token_bytes(16), np.uint8)
  token = np.asarray(multihost_utils.broadcast_one_to_all(token)).tobytes()
  if jax.process_index() == 0:
    file.write_bytes(token)
  multihost_utils.sync_global_devices('written')
  seen = False
  for _ in range(20):  # a file system may take a moment to show it
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
        f'{directory}: give one on a file system that all hosts share.')


# --- watching ---------------------------------------------------------------


@contextlib.contextmanager
def watch(program: str) -> Iterator[None]:
  """Ends this process, with a sentence and the status that says "start me
  again", when another one has died; JAX alone would wait for minutes.

  An error ends it without waiting for the others, which hear of it.
  """
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    yield
    return
  left = threading.Event()
  peers = _connect(program)
  for index, peer in peers.items():
    threading.Thread(target=_follow, daemon=True, args=(
        program, index, peer, peers, left)).start()
  try:
    yield
    multihost_utils.sync_global_devices('the end')
    left.set()
    _tell(peers, _LEFT)
  except BaseException as e:
    if not isinstance(e, SystemExit):
      time.sleep(3 * _WAIT)  # for if another died, that is what broke
    left.set()
    status = _status_of(e)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
      time.sleep(_WAIT)  # JAX aborts those that are there when it is gone
    os._exit(status)


def _status_of(e: BaseException) -> int:
  """Says what ends the process, as Python would."""
  if not isinstance(e, SystemExit):
    traceback.print_exc()
    return 1
  if isinstance(e.code, str):
    print(e.code, file=sys.stderr)
    return 1
  return e.code or 0


def _connect(program: str) -> dict[int, socket.socket]:
  """Of process 0 the connections of all others; of them, that to it."""
  # JAX tells it nowhere else, and only this address is sure to be reachable.
  host = distributed.global_state.coordinator_address.rpartition(':')[0]
  host, both = host.strip('[]'), socket.has_dualstack_ipv6()
  first, peers = jax.process_index() == 0, {}
  server = socket.create_server(
      ('', 0), family=socket.AF_INET6 if both else socket.AF_INET,
      dualstack_ipv6=both) if first else None
  port = int(multihost_utils.broadcast_one_to_all(
      np.int32(server.getsockname()[1] if first else 0)))
  try:
    if not first:
      peer = socket.create_connection((host, port), SILENT)
      peer.sendall(struct.pack('<I', jax.process_index()))
      peers = {0: peer}
    else:
      server.settimeout(SILENT)
      while len(peers) < jax.process_count() - 1:
        peer, _ = server.accept()
        peer.settimeout(SILENT)
        peers[struct.unpack('<I', _read(peer))[0]] = peer
  except (OSError, struct.error) as e:
    print(f'{program}: warning: the processes cannot reach each other at '
          f'{host}:{port} ({e}): one that dies will be noticed late.',
          file=sys.stderr)
  for peer in peers.values():
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (('TCP_KEEPIDLE', SILENT // 3),
                        ('TCP_KEEPINTVL', SILENT // 6), ('TCP_KEEPCNT', 4)):
      if hasattr(socket, name):
        peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
  return peers


def _read(peer: socket.socket) -> bytes:
  """Four bytes, or fewer of a connection that was closed."""
  data = b''
  with contextlib.suppress(OSError):
    while len(data) < 4 and (more := peer.recv(4 - len(data))):
      data += more
  return data


def _tell(peers: dict[int, socket.socket], number: int) -> None:
  for peer in peers.values():
    with contextlib.suppress(OSError):
      peer.sendall(struct.pack('<I', number))


def _follow(program: str, index: int, peer: socket.socket,
            peers: dict[int, socket.socket], left: threading.Event) -> None:
  data = _read(peer)
  dead = struct.unpack('<I', data)[0] if len(data) == 4 else index
  if dead == _LEFT or left.is_set():
    return
  first = jax.process_index() == 0
  if first:
    _tell({i: p for i, p in peers.items() if i != dead}, dead)
  # Time to say something itself; but JAX aborts it when process 0 is gone.
  if data and left.wait(_WAIT) or first and left.wait(2 * _WAIT):
    return
  print(f'{program}: process {dead} of {jax.process_count()} has ended; what '
        'it said tells why. Start all of them again to resume.',
        file=sys.stderr, flush=True)
  os._exit(AGAIN)
