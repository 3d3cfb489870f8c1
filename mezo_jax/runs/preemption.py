"""Stops a run on SIGTERM, SIGHUP or Ctrl-C."""

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

GRACE = 10.0  # seconds; a machine that is taken away gives about 30


@contextlib.contextmanager
def watched(log: Log) -> Iterator[Callable[[int], bool]]:
  """Yields ``wanted(step)``: whether a signal has asked the run to stop.

  A second signal ends the process at once, as the first does elsewhere.

  Args:
    log: Log of the run. If steps are recorded there, nothing is lost when the
      process ends without a last checkpoint. So it ends if nobody calls
      ``wanted`` within ``GRACE`` seconds, for example because a program is
      compiled or an evaluation runs.
  """
  if jax.process_count() > 1:
    # All processes must stop after the same step, which JAX finds.
    with _as_sigterm():
      yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # Python handles signals in the main thread only
    return
  asked, noticed, before = [], threading.Event(), {}
  def handle(number, frame):
    del frame
    asked.append(number)
    signal.signal(number, signal.SIG_DFL)
  def wanted(step):
    del step
    if asked:
      noticed.set()
    return bool(asked)
  def watch():
    with open(read_end, 'rb', buffering=0) as numbers:
      while number := numbers.read(1):
        if number[0] in before and not noticed.wait(GRACE):
          _leave(log)
  if log.records:
    # Python's handlers do not run while a compiler does. So the numbers of
    # signals are also written to a pipe, which a thread reads.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    wakeup = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
  for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
      before[number] = signal.signal(number, handle)
  try:
    yield wanted
  finally:
    noticed.set()
    if log.records:
      signal.set_wakeup_fd(wakeup)
      os.close(write_end)  # this ends the thread
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _as_sigterm() -> Iterator[None]:
  """Treats SIGINT and SIGHUP as SIGTERM, the only signal of which JAX informs
  the other processes. A second signal ends the process."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = {}
  def handle(number, frame):
    del number, frame
    for number in before:
      signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
  for number in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
      before[number] = signal.signal(number, handle)
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def stopped(step: int) -> Again:
  """Returns the exception of a run that was stopped after a step."""
  return Again(f'told to stop; step {step} is saved. Run the same command '
               'again to resume.')


def _leave(log: Log) -> None:
  """Ends the process from another thread than the main one."""
  try:
    log.sync()
    print(f'\ntrain.py: {stopped(log.end)}', file=sys.stderr, flush=True)
  finally:
    os._exit(AGAIN)
