"""Many runs, each a process of its own, and one table of their results."""

from collections.abc import Callable, Sequence
import json
import os
from pathlib import Path
import runpy
import subprocess
import sys
from typing import Any

from mezo_jax.cli.command_line import check_names, find, read_config
from mezo_jax.core import reports
from mezo_jax.core.errors import InputError
from mezo_jax.runs import loggers
from mezo_jax.runs.workdir import read_result
from mezo_jax.tasks import evaluate
from mezo_jax.training import config as config_lib
from mezo_jax.training.methods import method_of

COLUMNS = ('task', 'method', 'metric', 'score', 'calibrated', 'examples',
           'steps', 'training forwards', 'seconds', 'GiB')


def run(suite: str | os.PathLike[str], workdir: str | os.PathLike[str],
        tasks: Sequence[str] = (), methods: Sequence[str] = (),
        overrides: Sequence[str] = (), say: Callable[[str], None] = print
        ) -> tuple[Path, list[str]]:
  """Runs what a suite has no results of yet, and writes ``table.md`` and
  ``table.json``.

  A suite is a config file whose ``get_suite()`` returns ``{'TASK/METHOD':
  config}`` and whose ``get_config(name)`` returns one of them, so that
  ``mezo-jax train --config=FILE:TASK/METHOD`` is each of its runs. A run that
  was stopped is resumed, and the result of one that is finished is read.

  Args:
    suite: The file, or the name of a suite that comes with the package.
    workdir: The directory of the table. Each run has a directory
      ``TASK/METHOD`` in it.
    tasks: The tasks to run. Defaults to all.
    methods: The methods to run. Defaults to all.
    overrides: Fields of all runs, each as ``--config.FIELD=VALUE``.
    say: Reports progress.

  Returns:
    The table's path, and the names of runs that failed.

  Raises:
    MissingError: if there is no such suite.
    InputError: if it is no suite, or has no run that is wanted, or a field that
      is overridden does not exist.
  """
  suite, workdir = find(os.fspath(suite), 'suite'), Path(workdir)
  check_names(['', *overrides])
  found = runpy.run_path(suite)
  if 'get_suite' not in found or 'get_config' not in found:
    raise InputError(f'{suite} is no suite: it must define get_suite() and '
                     'get_config(name).')
  runs = {name: read_config(f'{suite}:{name}', overrides)
          for name in found['get_suite']()}
  names = [name for name in runs if _wanted(name, tasks, methods)]
  if not names:
    raise InputError(f'{suite} has no such runs; it has {", ".join(runs)}.')
  failed = []
  # Runs of one task evaluate with the same programs: compile them once.
  env = {'JAX_COMPILATION_CACHE_DIR': str((workdir / 'compiled').absolute()),
         'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
         **os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
  for name in names:
    directory = workdir / name
    if not _is_finished(directory, runs[name]):
      directory.mkdir(parents=True, exist_ok=True)
      log = directory / 'log.txt'
      say(f'{name}: running; see {log}')
      with log.open('a') as out:
        code = subprocess.run(
            [sys.executable, '-m', 'mezo_jax', 'train',
             f'--config={suite}:{name}', f'--workdir={directory}', *overrides],
            stdout=out, stderr=out, env=env).returncode
      if code or not read_result(directory):
        last = (log.read_text().strip().splitlines() or ['no output'])[-1]
        say(f'{name}: failed. {last}')
        failed.append(name)
        continue
    # The table has all that is finished, wanted or not.
    rows = {n: row_of(n, runs[n], read_result(workdir / n)) for n in runs
            if n == name or _is_finished(workdir / n, runs[n])}
    say(f'{name}: {rows[name]["metric"]} {rows[name]["score"]}')
    write_table(workdir, [*rows.values()])
  return workdir / 'table.md', failed


def _wanted(name: str, tasks, methods) -> bool:
  task, _, method = name.partition('/')
  return task in (tasks or [task]) and method in (methods or [method])


def _is_finished(directory: Path, config: config_lib.Train) -> bool:
  """Returns whether a directory has the result of this very config. Where it
  has that of another, `train` continues that run or refuses."""
  return (directory / 'result.json').is_file() and (
      loggers.read_json(directory / 'config.json')
      == config_lib.to_json(config))


def row_of(name: str, config: Any, result: dict[str, Any]) -> dict[str, Any]:
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


def write_table(workdir: Path, rows: list[dict[str, Any]]) -> None:
  """``table.md`` and ``table.json``, from a list of `row_of`."""
  (workdir / 'table.md').write_text(
      reports.markdown_table(rows, COLUMNS) + '\n')
  (workdir / 'table.json').write_text(json.dumps(rows, indent=1) + '\n')
