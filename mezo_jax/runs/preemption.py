"""Stops a run after the current step on SIGTERM, SIGHUP or Ctrl-C."""

from collections.abc import Callable, Iterator
import contextlib
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

from mezo_jax.core.errors import AGAIN, Again
from mezo_jax.runs.replay import Log

# Seconds that a run has to react to a signal before the process is ended. Cloud
# providers give about 30 seconds before they take a machine away.
GRACE = 10.0


@contextlib.contextmanager
def watched(log: Log) -> Iterator[Callable[[int], bool]]:
  """Handles signals while a run trains.

  The first signal asks the run to stop. A second one of the same kind ends the
  process at once.

  If the log records steps, the run can be resumed without a last checkpoint. So
  if ``wanted`` is not called within `GRACE` seconds after a signal, for example
  because a program is being compiled or an evaluation runs, the process ends
  with status `AGAIN` without waiting any longer. With several processes there
  is no such limit: each continues until all can stop after the same step.

  Args:
    log: Log of the run.

  Yields:
    A function ``wanted(step)`` that returns whether the run should stop after
    this step. With several processes, all must call it after each step.
  """
  if jax.process_count() > 1:
    # All processes must stop after the same step, which JAX chooses.
    with _as_sigterm():
      yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():
    # Python can set signal handlers in the main thread only.
    yield lambda step: False
    return
  asked, noticed, before = [], threading.Event(), {}
  def handle(number, frame):
    """Records a signal, and restores its default for a second one."""
    del frame
    asked.append(number)
    signal.signal(number, signal.SIG_DFL)
  def wanted(step):
    """Returns whether a signal was received. If so, it also stops `watch`."""
    del step
    if asked:
      noticed.set()
    return bool(asked)
  def watch():
    """Ends the process if the run does not react to a signal in time."""
    with open(read_end, 'rb', buffering=0) as numbers:
      while number := numbers.read(1):
        if number[0] in before and not noticed.wait(GRACE):
          _leave(log)
  if log.records:
    # Python runs signal handlers only between bytecode instructions of the main
    # thread, so a long call such as a compilation delays them. Therefore the
    # number of each signal is also written to a pipe at once, from which a
    # thread reads it.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
  for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    # A signal that is ignored stays so: nohup ignores SIGHUP.
    if signal.getsignal(number) != signal.SIG_IGN:
      before[number] = signal.signal(number, handle)
  try:
    yield wanted
  finally:
    noticed.set()
    if log.records:
      signal.set_wakeup_fd(wakeup)
      os.close(write_end)  # ends the thread, which reads the other end
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _as_sigterm() -> Iterator[None]:
  """Forwards SIGINT and SIGHUP as SIGTERM while a run trains.

  SIGTERM is the only signal of which JAX informs the other processes. A second
  SIGINT or SIGHUP ends the process.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {}
  def handle(number, frame):
    """Restores the defaults for a second signal, and sends SIGTERM."""
    del number, frame
    for number in before:
      signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
  for number in (signal.SIGHUP, signal.SIGINT):
    # A signal that is ignored stays so: nohup ignores SIGHUP.
    if signal.getsignal(number) != signal.SIG_IGN:
      before[number] = signal.signal(number, handle)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def stopped(step: int) -> Again:
  """Returns the exception that ends a run which a signal stopped.

  Args:
    step: The last step that is saved in a checkpoint or in the log.
  """
  return Again(f'stopped by a signal; step {step} is saved. Run the same '
               'command again to resume.')


def _leave(log: Log) -> None:
  """Saves the log and ends the process, from a thread other than the main one.

  `sys.exit` would only end that thread.
  """
  try:
    log.sync()
    print(f'\nmezo-jax: {stopped(log.end)}', file=sys.stderr, flush=True)
  finally:
    os._exit(AGAIN)
