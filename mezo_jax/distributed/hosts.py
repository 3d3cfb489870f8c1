"""Joins the processes of a run, and ends them together if one of them dies.

JAX's coordination service, which is part of process 0, brings the processes
together and receives a heartbeat from each. Where JAX alone aborts a process,
this module prints a message and sets the exit status. It relies on JAX to
detect failures: with `jax_enable_recoverability`,
`jax.experimental.multihost_utils.live_devices` tells which processes died. Even
so, JAX aborts the other processes when process 0 dies. It has no working hook
for that (`missed_heartbeat_callback` of the client throws std::bad_cast in jax
0.10.2 and 0.12.0.1), so `_before_abort` adds one.

The table shows what the other processes do after ``kill -9`` of one. It was
measured with two and three processes over loopback on CPU and jax 0.10.2, in a
collective, in a wait on the host and in a Python loop:

  =========  =============================  ===================================
  killed     JAX alone, heartbeats of 10 s  `watch`, heartbeats of 15 s
  =========  =============================  ===================================
  a worker   SIGABRT after 6 to 10 s, with  status 75 and one message, after
             20 to 60 lines of log          14 to 19 s
  process 0  SIGABRT after 0.3 s, with 20   status 75 after 0.2 to 4 s; the
             lines of log                   message follows JAX's 20 lines
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

HEARTBEAT = 15  # seconds without a heartbeat after which a process is dead
JOIN = 300  # seconds to wait for the other processes of a run
_TURN = 1.0  # seconds between two requests to the coordination service
# Prefix of a key in JAX's key-value store, under which a process that failed
# stores its number.
_FAILED = 'mezo_jax/failed/'
_EXITED = 'exited (see its output). Restart all processes to resume.'
# Signal handlers that C code calls. C holds no reference to them, so they are
# stored here to keep Python from freeing them.
_handlers = []


def check_devices() -> None:
  """Checks that JAX finds devices of the platform that was requested.

  Raises:
    InputError: If it finds none.
  """
  try:
    jax.devices()
  except Exception as e:  # JAX raises many types here, even AssertionError
    platforms = getattr(jax.config, 'jax_platforms', None)
    asked = f' of JAX_PLATFORMS={platforms}' if platforms else ''
    raise InputError(
        f'JAX finds no device{asked} ({first_line(e)[:300]}). Install JAX for '
        'this kind of device and check its driver, or set '
        'JAX_PLATFORMS=cpu.') from e


# --- joining ----------------------------------------------------------------


def join(coordinator: str | None = None, num_processes: int | None = None,
         process_id: int | None = None) -> None:
  """Joins this process with the others of a run.

  Missing arguments are read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, or from torchrun's MASTER_ADDR, MASTER_PORT, WORLD_SIZE and
  RANK. Without these, JAX gets them from Slurm, Open MPI, Kubernetes or the TPU
  pod.

  If the other processes do not join within `JOIN` seconds, this process prints
  a message and exits with status 1.

  Args:
    coordinator: HOST:PORT at which process 0 listens.
    num_processes: Number of processes of the run.
    process_id: Number of this process, from 0.

  Raises:
    InputError: If the arguments are invalid or incomplete, or if process 0 was
      started with another number of processes.
  """
  arguments: dict[str, Any] = dict(
      coordinator=coordinator, num_processes=num_processes,
      process_id=process_id)
  arguments = {k: v for k, v in arguments.items() if v is not None}
  given = _environment() | arguments
  if not arguments and {*given} == {'coordinator'}:
    # JAX reads the address from this variable and the rest from the cluster.
    given = {}
  if given:
    _check_given(given)
  # With this option JAX does not abort the other processes when one dies, so
  # that `watch` can end them with a message.
  jax.config.update('jax_enable_recoverability', True)
  try:
    jax.distributed.initialize(
        given.get('coordinator'), given.get('num_processes'),
        given.get('process_id'), initialization_timeout=JOIN,
        heartbeat_timeout_seconds=HEARTBEAT)
  except (RuntimeError, ValueError) as e:
    raise InputError(
        f'--distributed finds no other processes ({first_line(e)}). Start one '
        'process per host with srun or mpirun, or with --coordinator=HOST:PORT '
        '--num_processes=N --process_id=I; omit --distributed on a single '
        'host.') from e
  finally:
    _before_abort(None)
  check_devices()
  # If the numbers differ, JAX uses that of process 0 without an error.
  count = given.get('num_processes', jax.process_count())
  if count != jax.process_count():
    raise InputError(
        f'--num_processes is {count} here and {jax.process_count()} on process '
        '0; start all processes with the same number.')


def _check_given(given: dict[str, Any]) -> None:
  """Checks the arguments of `join`, and prepares for a failure to join.

  If the other processes do not join in time, JAX aborts this one. This function
  arranges for a message and exit status 1 instead.

  Args:
    given: The arguments that are known, by name.

  Raises:
    InputError: If arguments are missing or invalid.
  """
  missing = {'coordinator', 'num_processes', 'process_id'} - {*given}
  if missing:
    raise InputError(
        f'--{" and --".join(sorted(missing))} must be given together with '
        f'--{" and --".join(sorted(given))}.')
  index, count = given['process_id'], given['num_processes']
  if not 0 <= index < count:
    raise InputError(f'--process_id is {index}, but must be at least 0 and '
                     f'below --num_processes ({count}).')
  where = given['coordinator']
  host, _, port = where.rpartition(':')
  if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
    raise InputError(
        f'--coordinator is {where!r}, but must be HOST:PORT of process 0, with '
        'a port from 1 to 65535.')
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
    """Prints what to check, and ends the process."""
    print(
        f'{who}: not all processes joined at {where} within {JOIN} s. Start '
        '--num_processes processes, each with its own --process_id from 0 and '
        'all with the same --coordinator and --num_processes. Start process 0 '
        'on the host of --coordinator, whose port must be open.',
        file=sys.stderr, flush=True)
    os._exit(1)

  _before_abort(give_up)


def _check_port(port: int) -> None:
  """Checks that process 0 can listen on its port.

  Without this check, JAX ends with a segmentation fault if it cannot.

  Raises:
    InputError: If the port cannot be used.
  """
  both = socket.has_dualstack_ipv6()
  try:
    socket.create_server(
        ('', port), family=socket.AF_INET6 if both else socket.AF_INET,
        dualstack_ipv6=both).close()
  except OSError as e:
    raise InputError(f'--coordinator: process 0 cannot listen on port {port} '
                     f'({e.strerror}); choose another port.') from e


def _environment() -> dict[str, Any]:
  """Returns the arguments of `join` that are set in the environment.

  Raises:
    InputError: If a variable that should be a number is not one.
  """
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
      raise InputError(f'{name} is {env[name]!r}, but must be a number.')
    if name in env:
      found[argument] = int(env[name])
  return found


# --- watching ---------------------------------------------------------------


@contextlib.contextmanager
def watch(program: str) -> Iterator[None]:
  """Ends this process when another process of the run dies or fails.

  If another process died, for example because its machine was taken away, this
  one prints a message and exits with status `AGAIN`, so that all can be
  restarted. If another process failed with an error, this one exits with status
  1, since restarting would not help.

  An error in the body ends this process without waiting for the others, and is
  reported to them.

  Args:
    program: Name of the program, which begins the message.
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
    """Prints a message if JAX aborts because process 0 died."""
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
      # This error may be a consequence of the death of another process. Then
      # `_follow` ends this process, with the right message, in the meantime.
      time.sleep(HEARTBEAT + 5)
    status = _status_of(e)
    sys.stdout.flush()
    sys.stderr.flush()
    if status != AGAIN:
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.key_value_set(f'{_FAILED}{jax.process_index()}', '')
      time.sleep(2 * _TURN)  # gives the others time to read it
    ending.set()
    _leave(status)


def _follow(program: str, client: Any, ending: threading.Event) -> None:
  """Ends this process when another one has died or failed; runs in a thread.

  It returns after ``ending`` was set. On process 0 it returns only when all
  others have left, since they need its coordination service until then.

  Args:
    program: Name of the program, which begins the message.
    client: Client of the coordination service.
    ending: Event that is set when this process is about to end.
  """
  devices, gone = jax.devices(), set()
  first, count = jax.process_index() == 0, jax.process_count()
  while not ending.is_set() or first and len(gone) < count - 1:
    try:
      with multihost_utils.live_devices(devices) as alive:
        gone = {*range(count)} - {device.process_index for device in alive}
        failed = client.key_value_dir_get(_FAILED)
        # The same error often occurs in all processes, so this process gets
        # some time to report its own.
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
      continue  # the next turn tells which process died
    except jax.errors.JaxRuntimeError:
      return  # the service is gone, so JAX aborts this process; see `watch`


def _report(program: str, number: int, what: str) -> None:
  """Prints what happened to the process with this number."""
  print(f'{program}: process {number} of {jax.process_count()} {what}',
        file=sys.stderr, flush=True)


def _leave(status: int) -> None:
  """Ends this process at once, or a little later if it is process 0.

  The other processes need the service of process 0 to learn why they end.

  Args:
    status: The exit status.
  """
  _before_abort(lambda: os._exit(status))
  if jax.process_index() == 0:
    time.sleep(3 * _TURN)
  os._exit(status)


def _status_of(e: BaseException) -> int:
  """Prints an exception and returns its exit status, as Python would."""
  if not isinstance(e, SystemExit):
    traceback.print_exc()
    return 1
  if isinstance(e.code, str):
    print(e.code, file=sys.stderr)
    return 1
  return e.code or 0


def _coordinator_is_gone() -> bool:
  """Returns whether the coordination service of process 0 has ended.

  That is so if nothing listens at its address any more.
  """
  address = str(jax_versions.distributed_state().coordinator_address)
  host, _, port = address.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), 5.0).close()
  except OSError:
    return True
  return False


def _before_abort(act: Callable[[], object] | None) -> None:
  """Makes a function run before JAX aborts this process.

  JAX does not report the loss of its service to the program: it logs the error
  and calls abort(), which raises SIGABRT. A handler of Python's signal module
  would run too late, because Python only notes the signal in C and runs the
  handler later, when abort() has already ended the process. So the handler is
  registered with C's signal().

  Args:
    act: The function. None restores the default.
  """
  handler = None
  if act is not None:
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: act())
    _handlers.append(handler)
  ctypes.CDLL(None).signal(signal.SIGABRT, handler)
