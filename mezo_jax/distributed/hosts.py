"""A run of several processes: how they join, and how they end together.

JAX's coordination service, which is part of process 0, brings the processes
together and receives a heartbeat of each. This module adds a sentence and an
exit status where JAX alone aborts a process. It uses JAX's own detection: with
`jax_enable_recoverability`, `jax.experimental.multihost_utils.live_devices`
names the processes that died. The loss of process 0 is fatal in JAX even so,
and there is no hook for it (`missed_heartbeat_callback` of the client throws
std::bad_cast in jax 0.10.2 and 0.12.0.1), so `_before_abort` adds one.

What the other processes do after ``kill -9`` of one, with two and three
processes over loopback on CPU and jax 0.10.2, in a collective, in a wait on the
host and in a loop of Python:

  =========  =============================  ===================================
  killed     JAX alone, heartbeats of 10 s  `watch`, heartbeats of 15 s
  =========  =============================  ===================================
  a worker   SIGABRT after 6 to 10 s, with  status 75 and one sentence, after
             20 to 60 lines of log          14 to 19 s
  process 0  SIGABRT after 0.3 s, with 20   status 75 after 0.2 to 4 s; the
             lines of log                   sentence follows JAX's 20 lines
  =========  =============================  ===================================
"""

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any

import jax
from jax.experimental import multihost_utils

from mezo_jax.core import jax_versions
from mezo_jax.core.errors import AGAIN, first_line, InputError

HEARTBEAT = 15  # Seconds without a heartbeat after which a process is dead.
JOIN = 300  # Seconds to wait for the other processes of a run.
_TURN = 1.0  # Seconds between two questions to the coordination service.
_FAILED = 'mezo_jax/failed/'  # Where a process that failed leaves its number.
_EXITED = 'exited (see its output). Restart all processes to resume.'
_handlers = []  # Functions that C calls, which keeps no reference to them.


def check_devices() -> None:
  """Raises InputError if JAX finds no device of the platform that it is asked
  for."""
  try:
    jax.devices()
  except Exception as e:  # of many types, an AssertionError among them
    platforms = getattr(jax.config, 'jax_platforms', None)
    asked = f' of JAX_PLATFORMS={platforms}' if platforms else ''
    raise InputError(
        f'JAX finds no device{asked} ({first_line(e)[:300]}). Install JAX for '
        'that kind of device and see that its driver works, or set '
        'JAX_PLATFORMS=cpu.') from e


# --- joining ----------------------------------------------------------------


def join(coordinator: str | None = None, num_processes: int | None = None,
         process_id: int | None = None) -> None:
  """Joins the processes of a run.

  Arguments that are missing are read from JAX_COORDINATOR_ADDRESS,
  JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from torchrun's MASTER_ADDR,
  MASTER_PORT, WORLD_SIZE and RANK. Without these, JAX asks Slurm, Open MPI,
  Kubernetes or the TPU pod.

  Args:
    coordinator: HOST:PORT of process 0, which listens there.
    num_processes: Number of processes of the run.
    process_id: Number of this process, from 0.

  Raises:
    InputError: If the arguments cannot work, or if process 0 was started with
      another number of processes. If the others do not come within `JOIN`
      seconds, the process ends with a sentence.
  """
  arguments: dict[str, Any] = dict(
      coordinator=coordinator, num_processes=num_processes,
      process_id=process_id)
  arguments = {k: v for k, v in arguments.items() if v is not None}
  given = _environment() | arguments
  if not arguments and {*given} == {'coordinator'}:
    given = {}  # JAX reads this variable too, and asks the cluster for the rest
  if given:
    _check_given(given)
  # A process that dies must not make JAX abort the others: `watch` ends them.
  jax.config.update('jax_enable_recoverability', True)
  try:
    jax.distributed.initialize(
        given.get('coordinator'), given.get('num_processes'),
        given.get('process_id'), initialization_timeout=JOIN,
        heartbeat_timeout_seconds=HEARTBEAT)
  except (RuntimeError, ValueError) as e:
    raise InputError(
        f'--distributed finds no other processes: {first_line(e)} Start it '
        'on each host with srun or mpirun, or with --coordinator=HOST:PORT '
        '--num_processes=N --process_id=I, or leave it out on one host.') from e
  finally:
    _before_abort(None)
  check_devices()
  # JAX takes the number of process 0 where the numbers differ.
  count = given.get('num_processes', jax.process_count())
  if count != jax.process_count():
    raise InputError(
        f'--num_processes is {count} here and {jax.process_count()} on process '
        '0: start all with the same number.')


def _check_given(given: dict[str, Any]) -> None:
  """Raises InputError for arguments of `join` that cannot work, and arranges
  for a sentence if the others do not come."""
  missing = {'coordinator', 'num_processes', 'process_id'} - {*given}
  if missing:
    raise InputError(
        f'several processes: --{" and --".join(sorted(missing))} must be given '
        f'along with --{" and --".join(sorted(given))}.')
  index, count = given['process_id'], given['num_processes']
  if not 0 <= index < count:
    raise InputError(f'--process_id is {index} and must be at least 0 and '
                     f'below --num_processes, {count}.')
  where = given['coordinator']
  host, _, port = where.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise InputError(
        f'--coordinator is {where!r} and must be HOST:PORT of the first '
        'process, with a port from 1 to 65535.')
  if index == 0 and 'JAX_COORDINATOR_BIND_ADDRESS' not in os.environ:
    _check_port(int(port))
  who, why = f'process {index} of {count}', ''
  try:
    socket.getaddrinfo(host.strip('[]'), port)
  except (OSError, UnicodeError) as e:
    why = f' ({first_line(e)})'
  print(f'{who}: joining the others at {where}{why}', file=sys.stderr,
        flush=True)

  def give_up():
    print(
        f'{who}: the others did not all come to {where} within {JOIN} s. Start '
        '--num_processes processes, each with another --process_id from 0 and '
        'all with the same --coordinator and --num_processes; the first one on '
        'the host of --coordinator, whose port must be open.', file=sys.stderr,
        flush=True)
    os._exit(1)

  _before_abort(give_up)


def _check_port(port: int) -> None:
  """Raises InputError if process 0 cannot listen at its port, which is a
  segmentation fault in JAX."""
  both = socket.has_dualstack_ipv6()
  try:
    socket.create_server(
        ('', port), family=socket.AF_INET6 if both else socket.AF_INET,
        dualstack_ipv6=both).close()
  except OSError as e:
    raise InputError(f'--coordinator: process 0 cannot listen at port {port} '
                     f'({e.strerror}); choose another port.') from e


def _environment() -> dict[str, Any]:
  """Returns arguments of `join` that the environment has."""
  env = os.environ
  found: dict[str, Any]
  if 'JAX_COORDINATOR_ADDRESS' in env:
    names = ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
    found = dict(coordinator=env['JAX_COORDINATOR_ADDRESS'])
  elif {'MASTER_ADDR', 'MASTER_PORT', 'WORLD_SIZE', 'RANK'} <= {*env}:
    names = ('WORLD_SIZE', 'RANK')
    found = dict(coordinator=f'{env["MASTER_ADDR"]}:{env["MASTER_PORT"]}')
  else:
    return {}
  for argument, name in zip(('num_processes', 'process_id'), names):
    if name in env and not env[name].isdigit():
      raise InputError(f'{name} is {env[name]!r} and must be a number.')
    if name in env:
      found[argument] = int(env[name])
  return found


# --- watching ---------------------------------------------------------------


@contextlib.contextmanager
def watch(program: str) -> Iterator[None]:
  """Ends this process, with a sentence and the status `AGAIN`, when another
  process of the run has died.

  An error in this process ends it without waiting for the others. They end
  too: with status 1, since running again would not help.

  Args:
    program: Name of the program, with which the sentence begins.
  """
  if not jax.distributed.is_initialized() or jax.process_count() == 1:
    yield
    return
  client: Any = jax_versions.distributed_state().client
  ending = threading.Event()
  follower = threading.Thread(
      target=_follow, args=(program, client, ending), daemon=True)
  follower.start()

  def lost():
    if _coordinator_is_gone():
      _report(program, 0, _EXITED)
      os._exit(AGAIN)

  _before_abort(lost)
  try:
    yield
    multihost_utils.sync_global_devices('the end')
    ending.set()
    follower.join()
    jax.distributed.shutdown()
    _before_abort(None)
  except BaseException as e:
    if not isinstance(e, SystemExit):
      # If another process died, that broke this one too: `_follow` says so.
      time.sleep(HEARTBEAT + 5)
    status = _status_of(e)
    sys.stdout.flush()
    sys.stderr.flush()
    if status != AGAIN:
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f'{_FAILED}{jax.process_index()}', '')
      time.sleep(2 * _TURN)  # The others read it.
    ending.set()
    _leave(status)


def _follow(program: str, client: Any, ending: threading.Event) -> None:
  """Ends this process when another one has died or failed.

  It returns after ``ending``; on process 0, whose service all others need in
  order to leave, when they have left.
  """
  devices, gone = jax.devices(), set()
  first, count = jax.process_index() == 0, jax.process_count()
  while not ending.is_set() or first and len(gone) < count - 1:
    try:
      with multihost_utils.live_devices(devices) as alive:
        gone = {*range(count)} - {device.process_index for device in alive}
        failed = client.key_value_dir_get(_FAILED)
        # An error of one is often one of all: this process may report its own.
        if failed and not ending.wait(3 * _TURN):
          name, _ = failed[0]
          number = int(name.rpartition('/')[2])
          _report(program, number, 'failed (see its output).')
          _leave(1)
        if gone and not ending.is_set():
          _report(program, min(gone), _EXITED)
          _leave(AGAIN)
        time.sleep(_TURN)
    except jax_versions.PROCESS_DIED:
      continue  # The next turn says which.
    except jax.errors.JaxRuntimeError:
      return  # The service is gone, so JAX aborts: see `watch`.


def _report(program: str, number: int, what: str) -> None:
  print(f'{program}: process {number} of {jax.process_count()} {what}',
        file=sys.stderr, flush=True)


def _leave(status: int) -> None:
  """Ends this process at once; process 0, whose service the others need to
  learn why they end, a little later."""
  _before_abort(lambda: os._exit(status))
  if jax.process_index() == 0:
    time.sleep(3 * _TURN)
  os._exit(status)


def _status_of(e: BaseException) -> int:
  """Returns the exit status of an exception, and prints it, as Python does."""
  if not isinstance(e, SystemExit):
    traceback.print_exc()
    return 1
  if isinstance(e.code, str):
    print(e.code, file=sys.stderr)
    return 1
  return e.code or 0


def _coordinator_is_gone() -> bool:
  """Returns whether nothing listens at process 0's address any more."""
  address = str(jax_versions.distributed_state().coordinator_address)
  host, _, port = address.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), 5.0).close()
  except OSError:
    return True
  return False


def _before_abort(act: Callable[[], object] | None) -> None:
  """Calls a function before JAX aborts this process; None undoes that.

  JAX does not report the loss of its service to a program: it logs the error
  and calls abort(). A handler of Python's signal module would run too late,
  after abort() has ended the process, so this one is called by C.
  """
  handler = None
  if act is not None:
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: act())
    _handlers.append(handler)
  ctypes.CDLL(None).signal(signal.SIGABRT, handler)
