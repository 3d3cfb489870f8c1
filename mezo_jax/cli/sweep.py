"""Runs a grid of configs on several seeds, and chooses the best on dev rows.

Test rows have no part in the choice. Only the results of the chosen point are
reported on them.
"""

from collections.abc import Callable, Mapping, Sequence
import json
from pathlib import Path
import shlex
from typing import Any

import numpy as np

from mezo_jax.cli import grid as grids
from mezo_jax.cli import processes, sweep_figure
from mezo_jax.core import reports
from mezo_jax.core.errors import InputError, local
from mezo_jax.runs.workdir import read_dev, read_result
from mezo_jax.tasks import evaluate
from mezo_jax.training import config as config_lib
from mezo_jax.training import run_files


def run(words: Sequence[str], workdir: str, grid: Mapping[str, Sequence[str]],
        seeds: int = 1, jobs: int = 1, say: Callable[[str], None] = print
        ) -> Path:
  """Runs a sweep and writes ``table.md``, ``table.json`` and ``sweep.png``.

  Args:
    words: ``--config`` and ``--config.FIELD=VALUE``, as for `train`.
    workdir: Directory of the files and of the runs.
    grid: The values of each field as they were written.
    seeds: Number of seeds, counted from that of the config. Defaults to 1.
    jobs: Number of processes at a time. Defaults to 1.
    say: A function that reports a line of progress. Defaults to `print`.

  Returns:
    The path of ``table.md``.

  Raises:
    InputError: if a run cannot start, or if no point has all its results.
    Again: if a signal stopped the runs. The same call resumes them.
  """
  for name, number in (('seeds', seeds), ('jobs', jobs)):
    if number < 1:
      raise InputError(f'--{name} is {number} and must be at least 1.')
  directory = local(workdir)
  points = grids.points_of(words, grid, seeds)
  runs = {name: run for point in points for name, run in point.runs.items()}
  for name, one in runs.items():
    try:
      run_files.check_workdir(one.config, directory / name)
    except InputError as e:
      raise InputError(f'{directory / name}: {e}') from e
  rows = {name: {'name': name, 'seed': one.config.seed}
          for name, one in runs.items()}
  measured, ended, failures = [], 0, []
  for name, why in processes.run_all(runs, directory, jobs, say):
    rows[name] |= _outcome(directory / name, runs[name].config, why)
    if 'failed' in rows[name]:
      text = f'failed: {rows[name]["failed"]}'
      failures.append(rows[name]['failed'])
    else:
      text = (f'dev {evaluate.spell(rows[name]["dev"])} (step '
              f'{rows[name]["step"]})')
    ended += 1
    say(f'{ended} of {len(runs)}, {name}: {text}')
    measured = [_measure(point, [rows[n] for n in point.runs])
                for point in points]
    _write(directory, _table(measured), measured)
  best = _best(measured)
  sweep_figure.draw(directory / 'sweep.png', measured)
  if best is None:
    raise InputError(
        'no point of the grid has a result for each seed; see '
        f'{directory / "table.md"}. The first failure: {failures[0]}')
  _write(directory, f'{_table(measured, best)}\n\n' + _conclusion(
      best, directory, words, points[measured.index(best)]), measured, best)
  return directory / 'table.md'


def _outcome(directory: Path, config: config_lib.Train, why: str
             ) -> dict[str, Any]:
  """Returns what is known of a run that has ended, as JSON values.

  Args:
    directory: Working directory of the run.
    config: Config of the run.
    why: Why the run failed, or ''.

  Returns:
    A dict with the reason as ``failed``, or with the ``metric``, the best
    ``step``, its report ``dev``, and the numbers of `evaluate.rank`.
  """
  if why:
    return {'failed': why}
  result = read_result(directory)
  metric, step = result['metric'], result['final']['step']
  dev = read_dev(directory, step)
  ranked = evaluate.rank(dev, metric, config.select)
  if not dev or ranked is None:
    return {'failed': f'metrics.jsonl has no report of step {step}'}
  return {'metric': metric, 'step': step, 'dev': dev, **ranked}


def _measure(point: grids.Point, rows: Sequence[dict[str, Any]]
             ) -> dict[str, Any]:
  """Returns what is known of a point, as JSON values.

  Args:
    point: The point.
    rows: A dict for each of its runs: its name, its seed, and if it has ended
      what `_outcome` returns.

  Returns:
    A dict with the ``values`` of the fields, with the ``runs``, and in ``dev``
    with the statistics of the metric and the loss of those that are finished.
  """
  found = [row for row in rows if 'score' in row]
  names = dict.fromkeys([*(row['metric'] for row in found), 'loss'])
  return {'values': point.values, 'runs': [*rows], 'dev': {
      name: _statistics([row['dev'] for row in found], name) for name in names
      if found and all(name in row['dev'] for row in found)}}


def _statistics(reports: Sequence[dict[str, Any]], name: str
                ) -> dict[str, Any]:
  """Returns the mean of a number of several reports, and its standard error.

  The result also has both as text. A single report has the error None.
  """
  values, error = [report[name] for report in reports], None
  mean = float(np.mean(values))
  text = evaluate.spell_value(name, reports[0] | {name: mean})
  if len(values) > 1:
    error = float(np.std(values, ddof=1) / len(values) ** 0.5)
    text += ' ± ' + evaluate.spell_value(name, reports[0] | {name: error})
  return {'mean': mean, 'error': error, 'text': text}


def _is_complete(measured: dict[str, Any]) -> bool:
  """Returns whether all runs of a point have a result."""
  return all('score' in row for row in measured['runs'])


def _best(measured: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
  """Returns the complete point with the best mean score on the dev rows.

  Among equal scores, the mean loss decides.
  """
  def mean(point, name):
    return float(np.mean([row[name] for row in point['runs']]))
  return max(filter(_is_complete, measured), default=None,
             key=lambda point: (mean(point, 'score'), -mean(point, 'loss')))


def _table(measured: Sequence[dict[str, Any]],
           best: dict[str, Any] | None = None) -> str:
  """Returns the Markdown table of the points."""
  short = grids.short_names([*measured[0]['values']])
  rows = []
  for point in measured:
    runs = [row for row in point['runs'] if 'score' in row]
    failed = [row for row in point['runs'] if 'failed' in row]
    cells = {short[field]: grids.spell(value) or "''"
             for field, value in point['values'].items()}
    for name, statistics in point['dev'].items():
      cells[f'dev {name}'] = statistics['text']
    cells['best step'] = ', '.join(str(row['step']) for row in runs)
    cells['runs'] = f'{len(runs)} of {len(point["runs"])}'
    cells['note'] = 'best' if point is best else (
        f'failed: {failed[0]["failed"]}' if failed else '')
    rows.append({name: reports.cell(text) for name, text in cells.items()})
  columns = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True)
                          for name in row)
  return reports.markdown_table(rows, [*columns])


def _conclusion(best: dict[str, Any], directory: Path, words: Sequence[str],
                point: grids.Point) -> str:
  """Reports the chosen point on test rows, and the command that trains it."""
  for row in best['runs']:
    row['test'] = read_result(directory / row['name'])['final']
  test = [row['test'] for row in best['runs']]
  best['test'] = {name: _statistics(test, name) for name in best['dev']}
  scores = ', '.join(f'{name} {statistics["text"]}'
                     for name, statistics in best['test'].items())
  what = ', '.join(f'{field} {grids.spell(value)}'
                   for field, value in best['values'].items())
  many = f'mean ± standard error of {len(test)} seeds' if test[1:] else (
      'one seed')
  return (f'Best on dev rows: {what}. On test rows: {scores} ({many}).\n\n'
          f'    mezo-jax train {shlex.join([*words, *point.arguments])}')


def _write(directory: Path, text: str, measured: Sequence[dict[str, Any]],
           best: dict[str, Any] | None = None) -> None:
  """Writes ``table.md`` and ``table.json``."""
  (directory / 'table.md').write_text(text + '\n')
  (directory / 'table.json').write_text(json.dumps(
      {'points': measured, 'best': best}, indent=1) + '\n')
