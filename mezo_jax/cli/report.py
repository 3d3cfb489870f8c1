"""Compares runs: their curves, results, and the differences of their configs.

The report is written as Markdown and as HTML. The HTML is one file, which
contains its pictures and loads nothing.
"""

from collections.abc import Sequence
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mezo_jax.cli import report_page
from mezo_jax.core.errors import local, MissingError
from mezo_jax.runs import loggers
from mezo_jax.runs.workdir import read_result
from mezo_jax.tasks import evaluate
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods, mixture, run_files


@dataclasses.dataclass(frozen=True)
class Run:
  """Holds what a run has recorded.

  Attributes:
    name: Name of the run in the report.
    config: Config of the run.
    result: Content of ``result.json``; {} if the run is not finished.
    metric: Name of the main metric.
    train: Records of the training steps, in order; empty for a baseline.
    dev: Records of the evaluations on dev rows, in order.
  """

  name: str
  config: config_lib.Train
  result: dict[str, Any]
  metric: str
  train: list[dict[str, Any]]
  dev: list[dict[str, Any]]

  @property
  def last(self) -> int:
    """Returns the number of the last recorded step, 0 for none."""
    return self.train[-1]['step'] if self.train else 0

  @property
  def trains(self) -> bool:
    """Returns whether the method of the run has training steps."""
    return methods.method_of(self.config).steps

  def axis(self, name: str, steps: Any) -> Any:
    """Returns where steps are on an axis of the curves.

    Args:
      name: 'steps', 'row forwards' or 'seconds'.
      steps: Number of a step, or an array of such numbers.
    """
    if name == 'row forwards':  # of one row each
      rows = self.result.get('train_rows') or max(self.config.data.num_train, 0)
      of_batch = methods.forwards(self.config, rows) if self.trains else 0
      return steps * of_batch * self.config.data.batch_size
    if name == 'seconds':  # of training steps, without evaluations
      numbers = [r['step'] for r in self.train]
      spent = np.cumsum([0.0, *(r.get('seconds') or 0.0 for r in self.train)])
      return spent[np.searchsorted(numbers, steps, side='right')]
    return steps

  def best(self) -> dict[str, Any]:
    """Returns the record of the best step on dev rows so far, or {}."""
    if self.result:
      step = self.result['final'].get('step')
      return next((r for r in self.dev if r['step'] == step), {})
    ranked = []
    for record in self.dev:
      rank = evaluate.rank(
          loggers.values_of(record), self.metric, self.config.select)
      if rank and record['step']:  # step 0 is the model before training
        ranked.append(((rank['score'], -rank['loss']), record))
    return max(ranked, key=lambda pair: pair[0], default=(None, {}))[1]


def write(paths: Sequence[str], out: str) -> Path:
  """Writes a report about runs.

  Args:
    paths: Working directories of runs, or directories that contain some, such
      as that of a sweep.
    out: Directory of ``report.md``, ``report.html`` and the pictures. It is
      created if it does not exist.

  Returns:
    The path of ``report.html``.

  Raises:
    MissingError: if one of the paths is not a run and contains none.
    InputError: if a file of a run cannot be read.
  """
  runs = _read_all(paths)
  return report_page.write(local(out), runs, [_row(run) for run in runs],
                           _differences(runs), _notes(runs))


# --- reading ----------------------------------------------------------------


def _read_all(paths: Sequence[str]) -> list[Run]:
  """Reads all runs that are in some directories."""
  found = []
  for path in paths:
    directory = local(path)
    here = [directory] if (directory / 'config.json').is_file() else [
        file.parent for pattern in ('*/config.json', '*/*/config.json')
        for file in sorted(directory.glob(pattern))]
    if not here:
      raise MissingError(
          f'{path} is not a run and contains none; give the --workdir of a run '
          'or of a sweep.')
    found += [run.resolve() for run in here]
  found = [*dict.fromkeys(found)]
  above = os.path.commonpath([run.parent for run in found])
  return [_read(run, os.path.relpath(run, above)) for run in found]


def _read(directory: Path, name: str) -> Run:
  """Reads what a run has recorded."""
  config = run_files.read_config(directory, is_trained=False)
  records = loggers.read(directory / 'metrics.jsonl')
  result = read_result(directory)
  steps = config.steps if methods.method_of(config).steps else 0
  metric = mixture.MEAN if config.also else config_lib.metric(config)
  if result:
    metric = result['metric']
    if result['steps'] != steps:  # it is being continued
      result = {}
  return Run(name, config, result, metric,
             [r for r in records if r['kind'] == 'train'],
             [r for r in records if r['kind'] == 'dev'])


# --- tables -----------------------------------------------------------------


def _row(run: Run) -> dict[str, Any]:
  """Returns the row of a run in the table of results."""
  best, final = run.best(), run.result.get('final', {})
  if run.result:
    state = 'finished' if run.trains else 'baseline'
  else:
    state = f'unfinished, step {run.last} of {run.config.steps}' if (
        run.trains) else 'unfinished'
  memory = run.result.get('peak_memory')
  return {
      'run': run.name, 'state': state, 'method': run.config.method,
      'metric': run.metric, 'dev': evaluate.spell_value(run.metric, best),
      'test': evaluate.spell_value(run.metric, final),
      'best step': best.get('step', ''), 'steps': run.last,
      'row forwards': round(run.axis('row forwards', run.last)),
      'seconds': round(run.axis('seconds', run.last) if run.trains else
                       run.result.get('seconds', 0)),
      'GiB': f'{memory / 2**30:.2f}' if memory else ''}


def _flat(config: Any, before: str = '') -> dict[str, str]:
  """Returns the fields of a saved config as text, by their paths."""
  if not isinstance(config, dict):
    text = config if isinstance(config, str) else json.dumps(config)
    return {before.removesuffix('.'): text}
  return {path: text for name, value in config.items()
          for path, text in _flat(value, f'{before}{name}.').items()}


def _differences(runs: Sequence[Run]) -> list[dict[str, str]]:
  """Returns a row for each run with the fields in which configs differ."""
  flat = [_flat(config_lib.to_json(run.config)) for run in runs]
  fields = [field for field in flat[0]
            if len({each.get(field) for each in flat}) > 1]
  return [{'run': run.name, **{field: each.get(field, '') for field in fields}}
          for run, each in zip(runs, flat)] if fields else []


def _notes(runs: Sequence[Run]) -> list[str]:
  """Returns sentences that say how to read the report."""
  notes = []
  metrics: dict[str, list[str]] = {}
  for run in runs:
    metrics.setdefault(run.metric, []).append(run.name)
  if len(metrics) > 1:
    groups = '; '.join(f'{metric}: {", ".join(names)}'
                       for metric, names in metrics.items())
    notes.append('The runs have different metrics, so their scores cannot be '
                 f'compared. Each metric has its own axes. ({groups})')
  unfinished = [run.name for run in runs if not run.result]
  if unfinished:
    notes.append(f'Not finished, so without a test score: '
                 f'{", ".join(unfinished)}. The best step is that so far.')
  notes.append(
      'dev and test are the scores of the step that is best on dev rows. A '
      'row forward is a forward pass of one row in training'
      + (', and backward passes are not counted.' if any(
          methods.method_of(run.config).backprop for run in runs) else '.')
      + ' Seconds are those of training steps, or of the whole run for a '
      'baseline.')
  return notes
