"""Runs a suite of configs, one process per run, and tabulates the results."""

from collections.abc import Callable, Sequence
import json
import os
from pathlib import Path
import runpy
from typing import Any

from mezo_jax.cli import processes
from mezo_jax.cli.command_line import check_names, find, read_config
from mezo_jax.core import reports
from mezo_jax.core.errors import InputError
from mezo_jax.runs.workdir import read_result
from mezo_jax.tasks import evaluate
from mezo_jax.training.methods import method_of

COLUMNS = ('task', 'method', 'metric', 'score', 'calibrated', 'examples',
           'steps', 'row forwards', 'seconds', 'GiB')


def run(suite: str | os.PathLike[str], workdir: str | os.PathLike[str],
        tasks: Sequence[str] = (), methods: Sequence[str] = (),
        overrides: Sequence[str] = (), say: Callable[[str], None] = print
        ) -> tuple[Path, list[str]]:
  """Runs the configs of a suite and writes a table of their results.

  A suite is a config file whose ``get_suite()`` returns ``{'TASK/METHOD':
  config}`` and whose ``get_config(name)`` returns one of these configs. So
  ``mezo-jax train --config=FILE:TASK/METHOD`` executes one run of the suite. A
  run that was stopped is resumed, and a run that is finished is not repeated.

  Args:
    suite: The file, or the name of a suite that comes with the package.
    workdir: The directory of ``table.md`` and ``table.json``. The working
      directory of each run is ``TASK/METHOD`` in it.
    tasks: The tasks to run. Defaults to all.
    methods: The methods to run. Defaults to all.
    overrides: Fields to set in all configs, each as ``--config.FIELD=VALUE``.
      Defaults to none.
    say: A function that reports a line of progress. Defaults to `print`.

  Returns:
    The path of ``table.md``, and the names of the runs that failed.

  Raises:
    MissingError: if the suite does not exist.
    InputError: if the file is not a suite, if it has no run of the given tasks
      and methods, or if an overridden field does not exist.
    Again: if a signal stopped the runs. The same call resumes them.
  """
  suite, workdir = find(os.fspath(suite), 'suite'), Path(workdir)
  check_names(['', *overrides])
  found = runpy.run_path(suite)
  if 'get_suite' not in found or 'get_config' not in found:
    raise InputError(f'{suite} is not a suite: define get_suite() and '
                     'get_config(name) in it.')
  runs = {name: processes.Run(
      read_config(f'{suite}:{name}', overrides),
      (f'--config={suite}:{name}', *overrides))
          for name in found['get_suite']()}
  names = [name for name in runs if _wanted(name, tasks, methods)]
  if not names:
    raise InputError(f'--tasks and --methods: {suite} has no such runs; choose '
                     f'from {", ".join(runs)}.')
  failed = []
  wanted = {name: runs[name] for name in names}
  for name, why in processes.run_all(wanted, workdir, say=say):
    if why:
      say(f'{name}: failed. {why}')
      failed.append(name)
      continue
    # The table includes finished runs of an earlier call with other tasks or
    # methods.
    rows = {n: row_of(n, runs[n].config, read_result(workdir / n))
            for n in runs
            if n == name or processes.is_finished(
                workdir / n, runs[n].config)}
    say(f'{name}: {rows[name]["metric"]} {rows[name]["score"]}')
    write_table(workdir, [*rows.values()])
  return workdir / 'table.md', failed


def _wanted(name: str, tasks, methods) -> bool:
  """Returns whether a run is selected by --tasks and --methods."""
  task, _, method = name.partition('/')
  return task in (tasks or [task]) and method in (methods or [method])


def row_of(name: str, config: Any, result: dict[str, Any]) -> dict[str, Any]:
  """Returns one row of the table, as a dict with the keys `COLUMNS`.

  'row forwards' is the number of forward passes of single rows in training.
  Unlike ``forwards`` of the result, which counts batches, it compares runs with
  batches of different sizes.

  Args:
    name: Name of the run, ``TASK/METHOD``.
    config: Config of the run.
    result: Content of the run's ``result.json``.
  """
  task, _, method = name.partition('/')
  metric, final = result['metric'], result['final']
  # A probe runs the model once on each train row; its run has no steps.
  examples = result['forwards'] * config.data.batch_size + (
      result['train_rows'] if method_of(config).probe else 0)
  return dict(zip(COLUMNS, (
      task, method, metric, evaluate.spell_value(metric, final),
      evaluate.spell_value(f'calibrated_{metric}', final), final['count'],
      result['steps'],
      examples, round(result['seconds']),
      f'{result["peak_memory"] / 2**30:.2f}')))


def write_table(workdir: Path, rows: list[dict[str, Any]]) -> None:
  """Writes ``table.md`` and ``table.json``.

  Args:
    workdir: The directory of the files.
    rows: Rows of the table, from `row_of`.
  """
  (workdir / 'table.md').write_text(
      reports.markdown_table(rows, COLUMNS) + '\n')
  (workdir / 'table.json').write_text(json.dumps(rows, indent=1) + '\n')
