"""A run that is asked to stop by SIGTERM, SIGHUP or Ctrl-C."""

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
  """``wanted(step)``: whether a signal asks for a last checkpoint. A second one
  ends the process at once, as outside of this each does.

  Args:
    log: of the run. If it has records, nothing is lost where nobody asks
      ``wanted`` within ``GRACE`` seconds, as while something is compiled or
      evaluated: then the process ends.
  """
  if jax.process_count() > 1:  # all processes must agree on the step
    with _as_sigterm():
      yield multihost_utils.reached_preemption_sync_point
    return
  if threading.current_thread() is not threading.main_thread():
    yield lambda step: False  # signals are the main thread's
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
    with open(told, 'rb', buffering=0) as numbers:
      while number := numbers.read(1):
        if number[0] in before and not noticed.wait(GRACE):
          _leave(log)
  if log.records:  # Python's handlers wait for a compiler, a pipe does not
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    wakeup = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
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
      os.close(tell)  # which ends the thread
    for number, handler in before.items():
      signal.signal(number, handler)


@contextlib.contextmanager
def _as_sigterm() -> Iterator[None]:
  """Treats SIGINT and SIGHUP as SIGTERM, which is all that JAX makes known to
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


def told(step: int) -> Again:
  return Again(f'told to stop; step {step} is saved. Run the same command '
               'again to resume.')


def _leave(log: Log) -> None:
  try:
    log.sync()
    print(f'\ntrain.py: {told(log.end)}', file=sys.stderr, flush=True)
  finally:
    os._exit(AGAIN)
