"""Runs named configs with ``mezo-jax train``, each in a process of its own."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import math
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

from mezo_jax.core.errors import Again, InputError
from mezo_jax.runs import loggers
from mezo_jax.runs.workdir import read_result
from mezo_jax.training import config as config_lib
from mezo_jax.training import run_files

# A program that prints the kind and the number of the devices that a run has.
_DEVICES = 'import jax; print(jax.default_backend(), jax.local_device_count())'


@dataclasses.dataclass(frozen=True)
class Run:
  """Describes a run.

  Attributes:
    config: Config of the run.
    arguments: Arguments with which ``mezo-jax train`` reads this config.
  """

  config: config_lib.Train
  arguments: tuple[str, ...]


def run_all(runs: Mapping[str, Run], workdir: Path, jobs: int = 1,
            say: Callable[[str], None] = print) -> Iterator[tuple[str, str]]:
  """Executes runs, except those that are finished.

  A run that was stopped is resumed. SIGTERM, SIGHUP and Ctrl-C stop the runs
  after their current steps.

  Args:
    runs: The runs by name. The working directory of a run has this name in
      ``workdir``. Its output is appended to ``log.txt`` there.
    workdir: Directory of all runs.
    jobs: Number of processes at a time. Defaults to 1. If it is more, each gets
      one GPU; a TPU serves one process, so the runs follow each other.
    say: A function that reports a line of progress. Defaults to `print`.

  Yields:
    The name of each run when it has ended, and the reason if it failed, or ''.

  Raises:
    Again: if a signal stopped the runs. The same call resumes them.
  """
  # Runs of the same task use the same evaluation programs. With a shared
  # compilation cache, each program is compiled only once.
  env = {'JAX_COMPILATION_CACHE_DIR': str((workdir / 'compiled').absolute()),
         'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
         **os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
  waiting, active = [], {}
  for name, run in runs.items():
    if is_finished(workdir / name, run.config):
      yield name, ''
    else:
      waiting.append(name)
  free = _places(jobs, env, say) if len(waiting) > 1 else [{}]
  with _signals() as received:
    try:
      while active or waiting:
        if received:
          break
        while waiting and free:
          name, place = waiting.pop(0), free.pop(0)
          active[name] = _start(workdir / name, runs[name], env | place), place
          say(f'{name}: running; see {workdir / name / "log.txt"}')
        time.sleep(0.1)
        for name in [n for n, (p, _) in active.items() if p.poll() is not None]:
          process, place = active.pop(name)
          free.append(place)
          # A process that ends with the signal of its group has not failed.
          if not received:
            yield name, _failure(workdir / name, process.returncode)
    finally:
      # This is also reached if the caller fails, for example on a full disk.
      for process, _ in active.values():
        process.send_signal(_other(received[0] if received else None))
      for process, _ in active.values():
        process.wait()
  if received:
    raise Again('stopped by a signal. Run the same command again to resume.')


def is_finished(directory: Path, config: config_lib.Train) -> bool:
  """Returns whether a directory has the result of exactly this config.

  If it has the result of another config, the run is started: `train` continues
  it (with more steps, for example) or rejects the change.
  """
  config = run_files.with_found_rate(config, directory)
  return (directory / 'result.json').is_file() and (
      loggers.read_json(directory / 'config.json')
      == config_lib.to_json(config))


def _places(jobs: int, env: Mapping[str, str], say: Callable[[str], None]
            ) -> list[dict[str, str]]:
  """Returns the variables that give each of several processes its device.

  Args:
    jobs: Number of processes that were asked for.
    env: Environment of the processes.
    say: As for `run_all`.
  """
  if jobs == 1:
    return [{}]
  # This process must not occupy a device, so another one looks at them.
  found = subprocess.run([sys.executable, '-c', _DEVICES], env=env, text=True,
                         capture_output=True)
  if found.returncode:
    last = (found.stderr.strip().splitlines() or ['no output'])[-1]
    raise InputError(f'JAX does not find its devices: {last}')
  kind, count = found.stdout.split()[-2:]
  if kind == 'tpu':
    say('one run at a time, whatever --jobs is: a TPU serves one process')
    return [{}]
  if kind != 'gpu':
    return [{}] * jobs
  ids = env.get('CUDA_VISIBLE_DEVICES') or ','.join(map(str, range(int(count))))
  gpus = ids.split(',')
  shared = math.ceil(jobs / len(gpus))
  # A process of JAX takes three quarters of a GPU's memory when it starts.
  memory = {} if shared == 1 or 'XLA_PYTHON_CLIENT_MEM_FRACTION' in env else {
      'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{0.9 / shared:.2f}'}
  return [{'CUDA_VISIBLE_DEVICES': gpus[i % len(gpus)], **memory}
          for i in range(jobs)]


def _start(directory: Path, run: Run, env: Mapping[str, str]
           ) -> subprocess.Popen:
  """Starts the process of a run."""
  directory.mkdir(parents=True, exist_ok=True)
  with (directory / 'log.txt').open('a') as out:
    return subprocess.Popen(
        [sys.executable, '-m', 'mezo_jax', 'train', *run.arguments,
         f'--workdir={directory}'], stdout=out, stderr=out, env=env)


def _failure(directory: Path, code: int) -> str:
  """Returns why the process of a run failed, or '' if it did not.

  Args:
    directory: Working directory of the run.
    code: Exit status of the process.
  """
  if code < 0:
    return f'the process was ended by {signal.Signals(-code).name}'
  if code or not read_result(directory):
    lines = (directory / 'log.txt').read_text().strip().splitlines()
    return (lines or ['no output'])[-1].removeprefix('mezo-jax train: ')
  return ''


# --- signals ----------------------------------------------------------------


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Yields a list that the first SIGTERM, SIGHUP or SIGINT is added to.

  A second signal of the same kind ends the process.
  """
  received, before = [], {}
  def handle(number, frame):
    """Records a signal, and restores its default for a second one."""
    del frame
    received.append(number)
    signal.signal(number, signal.SIG_DFL)
  for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    # A signal that is ignored stays so: nohup ignores SIGHUP.
    if signal.getsignal(number) != signal.SIG_IGN:
      before[number] = signal.signal(number, handle)
  try:
    yield received
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def _other(number: int | None) -> int:
  """Returns a signal that asks a run to stop, other than one that it got.

  A terminal, and most schedulers, signal all processes of a group. A run that
  gets the same signal twice ends at once, without saving.

  Args:
    number: The signal that this process got, or None.
  """
  ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
  if number == signal.SIGTERM and not ignored:
    return signal.SIGINT
  return signal.SIGTERM
