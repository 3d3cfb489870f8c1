"""Many runs of ``train.py``, each a process of its own, and one table."""

from collections.abc import Callable, Sequence
import json
import os
from pathlib import Path
import runpy
import subprocess
import sys

from mezo_jax.core import reports
from mezo_jax.core.errors import InputError, MissingError
from mezo_jax.runs.workdir import read_result
from mezo_jax.tasks import evaluate
from mezo_jax.training.methods import method_of

COLUMNS = ('task', 'method', 'metric', 'score', 'calibrated', 'examples',
           'steps', 'training forwards', 'seconds', 'GiB')


def run(suite: str | os.PathLike, workdir: str | os.PathLike,
        tasks: Sequence[str] = (), methods: Sequence[str] = (),
        say: Callable[[str], None] = print) -> tuple[Path, list[str]]:
  """Runs what is not done yet of a suite and writes ``table.md`` and ``.json``.

  A suite is a config file whose ``get_suite()`` gives ``{'TASK/METHOD':
  config}`` and whose ``get_config(name)`` gives one of them, so that
  ``python train.py --config=FILE:TASK/METHOD`` is each of its runs. A run that
  was stopped is resumed, one that is finished is read.

  Args:
    suite: the file.
    workdir: of the table; each run has a directory ``TASK/METHOD`` in it.
    tasks: those wanted; all if empty.
    methods: those wanted; all if empty.
    say: reports what is going on.

  Returns:
    The table's path, and the names of runs that failed.

  Raises:
    FileNotFoundError: if there is no such file, or no train.py beside the
      package or here.
    ValueError: if it is no suite, or has no run that is wanted.
  """
  suite, workdir = Path(suite), Path(workdir)
  if not suite.is_file():
    raise MissingError(f'there is no suite {suite}.')
  found = runpy.run_path(str(suite))
  if 'get_suite' not in found or 'get_config' not in found:
    raise InputError(f'{suite} is no suite: it must define get_suite() and '
                     'get_config(name).')
  runs = found['get_suite']()
  names = [name for name in runs if _wanted(name, tasks, methods)]
  if not names:
    raise InputError(f'{suite} has no such runs; it has {", ".join(runs)}.')
  script, failed = _train_script(), []
  # Runs of one task evaluate with the same programs: compile them once.
  env = {'JAX_COMPILATION_CACHE_DIR': str((workdir / 'compiled').absolute()),
         'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5'} | os.environ
  for name in names:
    directory = workdir / name
    result = directory / 'result.json'
    if not result.is_file():
      directory.mkdir(parents=True, exist_ok=True)
      log = directory / 'log.txt'
      say(f'{name}: running; see {log}')
      with log.open('a') as out:
        code = subprocess.run(
            [sys.executable, script, f'--config={suite}:{name}',
             f'--workdir={directory}'], stdout=out, stderr=out, env=env
        ).returncode
      if code or not result.is_file():
        last = (log.read_text().strip().splitlines() or ['no output'])[-1]
        say(f'{name}: failed. {last}')
        failed.append(name)
        continue
    # All that is finished, wanted or not: the table never loses a line.
    results = {n: workdir / n / 'result.json' for n in runs}
    rows = {n: row_of(n, runs[n], read_result(r.parent))
            for n, r in results.items() if r.is_file()}
    say(f'{name}: {rows[name]["metric"]} {rows[name]["score"]}')
    write_table(workdir, [*rows.values()])
  return workdir / 'table.md', failed


def _wanted(name: str, tasks, methods) -> bool:
  task, _, method = name.partition('/')
  return task in (tasks or [task]) and method in (methods or [method])


def _train_script() -> Path:
  for folder in (Path(__file__).parents[2], Path.cwd()):
    if (folder / 'train.py').is_file():
      return folder / 'train.py'
  raise MissingError(
      'there is no train.py beside the package or in this directory: run this '
      'in a clone of the repository.')


def row_of(name: str, config, result: dict) -> dict:
  """One line of the table."""
  task, _, method = name.partition('/')
  metric, final = result['metric'], result['final']
  examples = result['forwards'] * config.data.batch_size + (
      result['train_rows'] if method_of(config).probe else 0)
  return dict(zip(COLUMNS, (
      task, method, metric, evaluate.spell_value(metric, final),
      evaluate.spell_value(f'calibrated_{metric}', final), final['count'],
      result['steps'],
      examples, round(result['seconds']),
      f'{result["peak_memory"] / 2**30:.2f}')))


def write_table(workdir: Path, rows: list[dict]) -> None:
  """``table.md`` and ``table.json``, from a list of `row_of`."""
  (workdir / 'table.md').write_text(
      reports.markdown_table(rows, COLUMNS) + '\n')
  (workdir / 'table.json').write_text(json.dumps(rows, indent=1) + '\n')
