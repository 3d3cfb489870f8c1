"""A run of several processes: how they find each other, that they run the same
thing, and that none waits for one that is not there any more.

Every process holds a connection to process 0. The system closes it when a
process dies, however that is, so the others know within a second; where a whole
machine goes down, within `SILENT` seconds.
"""

from collections.abc import Iterator
import contextlib
import os
import socket
import struct
import sys
import threading
import time
import traceback

import jax
from jax.experimental import multihost_utils
import numpy as np

from mezo_jax.core import jax_versions
from mezo_jax.core.errors import AGAIN, first_line, InputError

SILENT = 30  # seconds without an answer after which a machine is lost
JOIN = 300  # seconds to wait for the other processes of a run
_NAME = 10  # seconds to wait for a name that no resolver knows
_SAY = 5  # seconds after which it is said what is waited for
_WAIT = 3.0  # seconds for a process to say itself why it ends
_LEFT = 0xFFFFFFFF  # sent instead of the number of a process that died
_FAILED = 1 << 31  # added to it if running again would not help


def check_devices() -> None:
  """Raises InputError if JAX finds no device of the platform that it is asked
  for."""
  try:
    jax.devices()
  except Exception as e:  # of many types, an AssertionError among them
    platforms = jax.config.jax_platforms
    asked = f' of JAX_PLATFORMS={platforms}' if platforms else ''
    raise InputError(
        f'JAX finds no device{asked} ({first_line(e)[:300]}). Install JAX for '
        'that kind of device and see that its driver works, or set '
        'JAX_PLATFORMS=cpu.') from e


# --- joining ----------------------------------------------------------------


def join(coordinator: str | None = None, num_processes: int | None = None,
         process_id: int | None = None) -> None:
  """Joins the processes of a run.

  What is not said is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, or torchrun's MASTER_ADDR, MASTER_PORT, WORLD_SIZE and RANK;
  else it is found where Slurm, Open MPI, Kubernetes or a TPU pod tells it.

  Args:
    coordinator: host:port of process 0, which listens there.
    num_processes: The number of processes of the run.
    process_id: The number of this one, from 0.

  Raises:
    InputError: if the others cannot be found. If they do not come within
      `JOIN` seconds the process ends.
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
  if given:
    host, port = address('--coordinator', given['coordinator'])
    with _patience(given):
      if given['process_id'] == 0:
        _check_port(port)
      else:
        _reach(host, port, given)
      _initialize(given)
  else:
    _initialize(given)


def _initialize(given: dict) -> None:
  try:
    jax.distributed.initialize(
        given.get('coordinator'), given.get('num_processes'),
        given.get('process_id'), heartbeat_timeout_seconds=2 * SILENT,
        # `_patience` ends the process before JAX would abort it.
        initialization_timeout=2 * JOIN)
  except (RuntimeError, ValueError) as e:
    raise InputError(
        f'--distributed finds no other processes: {first_line(e)} Start it '
        'on each host with srun or mpirun, or with --coordinator=HOST:PORT '
        '--num_processes=N --process_id=I, or leave it out on one host.') from e


def address(flag: str, text: str) -> tuple[str, int]:
  """Returns the host and the port that a flag names.

  Raises:
    InputError: if it names none.
  """
  host, _, port = text.rpartition(':')
  host = host.strip('[]')
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise InputError(f'{flag} is {text!r} and must be HOST:PORT of the first '
                     'process, with a port from 1 to 65535.')
  return host, int(port)


@contextlib.contextmanager
def _patience(given: dict) -> Iterator[None]:
  """Says what is waited for, and ends the process with a sentence if the others
  do not come; JAX would end it with an abort."""
  joined = threading.Event()
  who = f'process {given["process_id"]} of {given["num_processes"]}'
  where = given['coordinator']

  def wait():
    if joined.wait(_SAY):
      return
    print(f'{who}: waiting for the other processes at {where}',
          file=sys.stderr, flush=True)
    if joined.wait(JOIN):
      return
    print(f'{who}: the others did not all come to {where} within {JOIN} s. '
          'Start --num_processes processes, each with another --process_id '
          'from 0 and all with the same --coordinator and --num_processes; the '
          'first one on the host of --coordinator, whose port must be open.',
          file=sys.stderr, flush=True)
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
  try:
    yield
  finally:
    joined.set()


def _check_port(port: int) -> None:
  """Raises InputError if the coordinator cannot listen at its port. JAX shares
  a port with another program that listens there."""
  if 'JAX_COORDINATOR_BIND_ADDRESS' in os.environ:
    return
  try:
    _listen(port).close()
  except OSError as e:
    raise InputError(f'--coordinator: process 0 cannot listen at port {port} '
                     f'({e.strerror}); choose another port.') from e


def _listen(port: int) -> socket.socket:
  both = socket.has_dualstack_ipv6()
  return socket.create_server(
      ('', port), family=socket.AF_INET6 if both else socket.AF_INET,
      dualstack_ipv6=both)


def _reach(host: str, port: int, given: dict) -> None:
  """Waits until process 0 listens.

  Raises:
    InputError: if no resolver knows the host.
  """
  began, said = time.monotonic(), False
  while True:
    try:
      socket.create_connection((host, port), timeout=2.0).close()
      return
    except (OSError, UnicodeError) as e:
      unknown = isinstance(e, (socket.gaierror, UnicodeError))
      if unknown and time.monotonic() - began > _NAME:
        raise InputError(f'--coordinator: no host is known by the name '
                         f'{host!r} ({e}).') from e
      if not said:
        print(f'process {given["process_id"]} of {given["num_processes"]}: '
              f'waiting for {host}:{port} ({e})',
              file=sys.stderr, flush=True)
        said = True
    time.sleep(0.2)


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
    if status != AGAIN:  # A job must not requeue itself for the others.
      _tell(peers, _FAILED | jax.process_index())
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
  host = jax_versions.distributed_state().coordinator_address.rpartition(':')[0]
  host = host.strip('[]')
  first, peers = jax.process_index() == 0, {}
  server = _listen(0) if first else None
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
  number = struct.unpack('<I', data)[0] if len(data) == 4 else index
  if number == _LEFT or left.is_set():
    return
  dead, failed = number & ~_FAILED, bool(number & _FAILED)
  first = jax.process_index() == 0
  if first:
    _tell({i: p for i, p in peers.items() if i != dead}, number)
  # Time to say something itself; but JAX aborts it when process 0 is gone.
  if data and left.wait(_WAIT) or first and left.wait(2 * _WAIT):
    return
  what = ('failed (see its output).' if failed else
          'exited (see its output). Restart all processes to resume.')
  print(f'{program}: process {dead} of {jax.process_count()} {what}',
        file=sys.stderr, flush=True)
  os._exit(1 if failed else AGAIN)
