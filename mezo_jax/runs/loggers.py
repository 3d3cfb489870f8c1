"""Writes metrics, progress, JSON files and curves.

Metrics are written to ``metrics.jsonl``. `mezo_jax.runs.trackers` copies them
to other places.
"""

import collections
from collections.abc import Callable
import json
import math
from pathlib import Path
import sys
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mezo_jax.core.errors import InputError
from mezo_jax.runs import checkpoint
from mezo_jax.tasks import evaluate


class Metrics:
  """Records metrics in memory and, on process 0, in ``metrics.jsonl``.

  Each line of the file is a record: a JSON object with at least ``kind`` and
  ``step``. A number that is not finite is written as null.

  Attributes:
    records: All records, including those that were read from the file.
  """

  def __init__(self, workdir: Path, step: int = 0,
               copy: Callable[[dict[str, Any]], None] = lambda record: None
               ) -> None:
    """Opens the metrics of a run.

    Args:
      workdir: Working directory of the run, which must exist.
      step: Step from which the run resumes. Records of later steps are removed
        from the file. Defaults to 0, for a new run.
      copy: Gets each record that is written. Defaults to a function that does
        nothing.
    """
    path = workdir / 'metrics.jsonl'
    self.records: list[dict[str, Any]] = [
        _plain(r) for r in read(path) if r['step'] <= step]
    self._at = {(r['kind'], r['step']): r for r in self.records}
    self._file, self._copy = None, copy
    if jax.process_index() > 0:
      return
    part = path.with_suffix('.part')
    part.write_text(''.join(json.dumps(r) + '\n' for r in self.records))
    part.replace(path)
    self._file = path.open('a', buffering=1)

  def write(self, kind: str, step: int, **values: Any) -> None:
    """Records values.

    Args:
      kind: Kind of the record, such as 'train' or 'dev'.
      step: Number of the step.
      **values: JSON values and arrays, by name.
    """
    record = _plain({'kind': kind, 'step': step, **values})
    self.records.append(record)
    self._at[kind, step] = record
    if self._file:
      self._file.write(json.dumps(record, allow_nan=False) + '\n')
    self._copy(record)

  def of(self, kind: str) -> list[dict[str, Any]]:
    """Returns all records of a kind, in the order of writing."""
    return [r for r in self.records if r['kind'] == kind]

  def at(self, kind: str, step: int) -> dict[str, Any] | None:
    """Returns the values of a record, or None if there is no such record.

    Numbers that were not finite are NaN.

    Args:
      kind: Kind of the record.
      step: Number of the step.
    """
    record = self._at.get((kind, step))
    return None if record is None else values_of(record)

  def close(self) -> None:
    """Closes the file."""
    if self._file:
      self._file.close()


# A run prints about this many lines if its output is not a terminal, and at
# most one in this many seconds.
_LINES, _SECONDS = 80, 3.0
# Number of steps over which the numbers of a line are averaged.
_WINDOW = 100


class Clock:
  """Measures the seconds of steps, without those of compiling and evaluating.
  """

  def __init__(self) -> None:
    """Starts the clock."""
    self.restart()

  def restart(self) -> None:
    """Starts again at 0."""
    self._began = time.time()

  def skip(self, seconds: float) -> None:
    """Leaves out seconds that have just passed, such as those of compiling."""
    self._began += seconds

  def seconds(self) -> float:
    """Returns the seconds since the start."""
    return max(time.time() - self._began, 0.0)


class Progress:
  """Shows the progress of training, and records each step in the metrics.

  If the errors go to a terminal, it shows a progress bar. If the output does
  not, it prints about `_LINES` lines in total. Both have means over the last
  `_WINDOW` steps of the loss (or the reward), of ``|g|`` and of the seconds.
  ``|g|`` is the mean magnitude of the projected gradients, or the norm of the
  gradient with backpropagation. Only process 0 shows anything.
  """

  def __init__(self, metrics: Metrics, total: int, start: int, clock: Clock, *,
               rates: np.ndarray, dev: Callable[[], str], eval_every: int,
               loss: bool = True) -> None:
    """Shows an empty bar, or one that is filled up to a resumed step.

    Args:
      metrics: Metrics of the run.
      total: Number of steps of the run.
      start: Step from which the run resumes.
      clock: Measures the seconds of steps. Programs that are compiled in
        between are left out by its `skip`.
      rates: Learning rate of each step, [total].
      dev: Returns the results on the dev rows so far in words, or '' for none.
      eval_every: Steps between evaluations, for the time that is left.
      loss: Whether the loss is shown and recorded. Defaults to True; it must be
        False in a private run, whose losses reveal training rows.
    """
    self._metrics, self._clock, self._loss = metrics, clock, loss
    self._total, self._every, self._rates = total, eval_every, rates
    first = jax.process_index() == 0
    bar = first and sys.stderr.isatty()
    self._lines = first and not (bar and sys.stdout.isatty())
    self._shown = self._printed = -np.inf  # when a bar, or a line, was shown
    self._evaluation = 0.0  # seconds of the last evaluation
    self._dev, self._dev_text = dev, dev()
    records = [r for r in metrics.of('train')[-_WINDOW:] if r['step'] <= start]
    self._losses = collections.deque(
        (r.get('reward', r.get('loss')) for r in records), _WINDOW)
    self._sizes = collections.deque[float](maxlen=_WINDOW)
    self._seconds = collections.deque[float](maxlen=_WINDOW)
    self._bar = tqdm(
        total=total, initial=start, dynamic_ncols=True, disable=not bar,
        bar_format='{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt}{postfix}')
    self.restart()

  def read(self, step: int, tokens: int | None, values: dict[str, Any],
           seconds: float | None = None) -> None:
    """Shows a step and records it, unless the metrics have it already.

    Args:
      step: Number of the step.
      tokens: Number of tokens in its batch; None for a replayed step, which is
        recorded without tokens and seconds.
      values: Metrics that the step of `mezo_jax.make_step` returned, on the
        host.
      seconds: How long the step took. Defaults to None, for the time since the
        last call.
    """
    if seconds is None:
      seconds = self._clock.seconds()
    self.restart()
    shown = {k: v for k, v in values.items() if not k.startswith('skipped')
            and (k != 'loss' or self._loss)}
    cost = {} if tokens is None else dict(tokens=tokens, seconds=seconds)
    if not self._metrics.at('train', step):
      self._metrics.write('train', step, **shown, **cost,
                          skipped=int(values['skipped']))
    self._losses.append(shown.get('reward', shown.get('loss')))
    size: Any = values.get('projected_grad', values.get('grad_norm'))
    self._sizes.append(np.abs(size).mean())
    if tokens is not None:
      self._seconds.append(seconds)
    if not self._bar.disable and time.time() > self._shown + 0.1:
      self._shown = time.time()
      self._bar.set_postfix_str(self._text(step, values), refresh=False)
    self._bar.update()
    every = max(self._total // _LINES, 1)
    # Slow steps get a few lines before the first regular one, too.
    regular = step % every == 0 or step < every and step & (step - 1) == 0
    if self._lines and (step == self._total or regular and (
        time.time() > self._printed + _SECONDS)):
      self._printed = time.time()
      print(f'step {step}/{self._total}: {self._text(step, values)}',
            flush=True)

  def _text(self, step: int, values: dict[str, Any]) -> str:
    """Returns what is shown after a step.

    Args:
      step: Number of the step.
      values: Its metrics, as for `read`.
    """
    words = []
    if 'reward' in values:
      of_step = (f'deviation {values["reward_std"]:.2g}, best '
                 f'{values["reward_best"]:.3g}')
      words += [f'reward {_mean(self._losses):.3g} ({of_step})',
                f'{values["identical"]:.0%} identical']
    elif self._loss:
      words.append(f'loss {_mean(self._losses):.3f}')
    if 'reward' not in values:
      words.append(f'|g| {_mean(self._sizes):.1f}')
    words.append(f'lr {self._rates[step - 1]:.2e}')
    if self._seconds:
      seconds = _mean(self._seconds)
      # The evaluation of this step has not been made yet.
      evaluations = -(-self._total // self._every) - (step - 1) // self._every
      left = seconds * (self._total - step) + self._evaluation * evaluations
      words.append(f'{_duration(seconds)}/step')
      if step < self._total:
        words.append(f'{_duration(left)} left')
    else:
      words.append('replayed from the log')
    return ', '.join([*words, self._dev_text] if self._dev_text else words)

  def evaluated(self) -> None:
    """Shows the results on the dev rows from now on."""
    self._evaluation, self._dev_text = self._clock.seconds(), self._dev()

  def restart(self) -> None:
    """Restarts the clock that measures the seconds of the next step."""
    self._clock.restart()

  def close(self) -> None:
    """Closes the progress bar."""
    self._bar.close()


def _mean(values: Any) -> float:
  """Returns the mean of the finite numbers among values, or NaN."""
  found = [v for v in values if v is not None and np.isfinite(v)]
  return float(np.mean(found)) if found else np.nan


def _duration(seconds: float) -> str:
  """Formats a duration with two or three digits: '13 ms', '4.2 min'."""
  for least, unit in ((86400, 'days'), (3600, 'h'), (60, 'min'), (1, 's')):
    if seconds >= least:
      return f'{seconds / least:.3g} {unit}'
  return f'{seconds * 1e3:.0f} ms'


def best_on_dev(metrics: Metrics, rank: Callable[[dict], dict | None]
                ) -> tuple[int, dict[str, Any]] | None:
  """Returns the step that is best on the dev rows so far, and its report.

  It is the step that `mezo_jax.runs.checkpoint.Checkpoints.best_step` finds.

  Args:
    metrics: Metrics of the run.
    rank: A function from a report to the numbers by which steps are compared.

  Returns:
    None if no step after step 0 has a finite report.
  """
  ranked = []
  for record in metrics.of('dev'):
    step, report = record['step'], metrics.at('dev', record['step'])
    if step and report and rank(report):
      ranked.append((step, report))
  return max(ranked, key=lambda x: checkpoint.order(rank(x[1])), default=None)


def spell_dev(metrics: Metrics, rank: Callable[[dict], dict | None] | None,
              name: str) -> str:
  """Formats the latest result on the dev rows, and the best.

  Args:
    metrics: Metrics of the run.
    rank: As for `best_on_dev`. None if the dev rows do not select a step.
    name: Name of the number to show, a metric or 'loss'.

  Returns:
    Words such as ``dev accuracy 81.2% (best 82.3% at step 800)``; '' before the
    first evaluation.
  """
  last = metrics.of('dev')[-1:]
  if not last or last[0].get(name) is None:
    return ''
  text = (f'dev {name.replace("_", " ")} '
          f'{evaluate.spell_number(name, last[0])}')
  best = best_on_dev(metrics, rank) if rank else None
  if best:
    step, report = best
    text += f' (best {evaluate.spell_number(name, report)} at step {step})'
  return text


def spell_program(batch: Any, compiled: Any, seconds: float) -> str:
  """Formats a line about a program that `mezo_jax.make_step` compiled.

  Args:
    batch: The batch for which the program was compiled; None for the update.
    compiled: The program, a `jax.stages.Compiled`.
    seconds: How long compiling took.
  """
  # With several tasks, a batch is wrapped in a `mezo_jax.training.mixture.Of`.
  batch = getattr(batch, 'batch', batch)
  extra = compiled.memory_analysis().temp_size_in_bytes
  what = (f'step for {batch["input_ids"].shape[-1]} tokens' if batch
          else 'update')
  return (f'compiled the {what} in {seconds:.0f} s; it needs '
          f'{extra / 2**20:.0f} MiB per device, not counting weights and batch')


def _plain(value: Any) -> Any:
  """Converts arrays to lists, and NaN and inf to None, since JSON has neither.
  """
  if isinstance(value, dict):
    return {k: _plain(v) for k, v in value.items()}
  # NumPy arrays and scalars become lists and Python numbers.
  value = value.tolist() if hasattr(value, 'tolist') else value
  if isinstance(value, (list, tuple)):
    return [*map(_plain, value)]
  lost = isinstance(value, float) and not math.isfinite(value)
  return None if lost else value


def read(path: Path) -> list[dict[str, Any]]:
  """Reads the records of a metrics file.

  A last line that is not a record is ignored, since a crash may have cut it
  short.

  Args:
    path: The file. If it does not exist, the result is empty.

  Raises:
    InputError: If another line is not a record.
  """
  if not path.is_file():
    return []
  lines = path.read_bytes().splitlines()
  records = []
  for number, line in enumerate(lines, 1):
    try:
      record = json.loads(line)
      if not (isinstance(record, dict) and isinstance(record.get('kind'), str)
              and type(record.get('step')) is int):
        raise ValueError('kind or step is missing')
      records.append(record)
    except ValueError as e:
      if number == len(lines):
        break
      raise InputError(f'{path}, line {number} is not a record of a run ({e}); '
                       'delete the line.') from e
  return records


def values_of(record: dict[str, Any]) -> dict[str, Any]:
  """Returns the values of a record. Numbers that were not finite are NaN."""
  return {name: np.nan if value is None else value
          for name, value in record.items() if name not in ('kind', 'step')}


def write_json(path: Path, value: Any) -> None:
  """Writes a value to a JSON file, on process 0.

  The file is replaced at once, so no reader sees a part of it. Missing
  directories are created. NaN and inf are written as null.

  Args:
    path: The file.
    value: JSON values and arrays.
  """
  if jax.process_index() > 0:
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  part.write_text(
      json.dumps(_plain(value), indent=2, allow_nan=False) + '\n')
  part.replace(path)


def read_json(path: Path) -> Any:
  """Reads a JSON file.

  Args:
    path: The file, which must exist.

  Raises:
    InputError: If it is not JSON.
  """
  try:
    return json.loads(path.read_text())
  except ValueError as e:
    raise InputError(f'{path} is not valid JSON ({e}); restore it.') from e


def draw_curves(path: Path, metrics: Metrics, metric: str, title: str) -> None:
  """Plots the loss and the dev metric against the steps, on process 0.

  Horizontal lines show the metric of the model before training, if it was
  evaluated.

  Args:
    path: The image file to write.
    metrics: Metrics of the run.
    metric: Name of the metric, such as 'accuracy'.
    title: Title of the figure.
  """
  if jax.process_index() > 0:
    return
  from matplotlib.figure import Figure  # slow to import
  steps, evals = metrics.of('train'), metrics.of('dev')
  figure = Figure(figsize=(10, 4), layout='constrained')
  left, right = figure.subplots(1, 2)
  if steps and 'loss' in steps[0]:
    left.plot([r['step'] for r in steps], [r['loss'] for r in steps],
              color='0.75', lw=0.8, label='training batch')
  def draw(axes, name):
    """Plots the dev evaluations that have this value."""
    found = [r for r in evals if name in r]
    axes.plot([r['step'] for r in found], [r[name] for r in found],
              'o-', color='C0', label='dev')
  draw(left, 'loss')
  left.set(xlabel='step', ylabel='loss')
  left.legend()
  draw(right, metric)
  for r in evals[:1]:
    for name, label, style in ((metric, 'zero-shot', '--'), (
        f'calibrated_{metric}', 'zero-shot, calibrated', ':')):
      if r['step'] == 0 and name in r:
        right.axhline(r[name], color='0.4', ls=style, label=label)
  right.set(xlabel='step', ylabel=metric.replace('_', ' '))
  right.legend()
  figure.suptitle(title)
  figure.savefig(path, dpi=110)
