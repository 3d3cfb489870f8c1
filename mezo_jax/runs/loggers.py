"""Writes metrics, progress, JSON files and curves.

Metrics are written to ``metrics.jsonl``, and to TensorBoard if tensorboardX is
installed.
"""

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


class Metrics:
  """Records metrics in memory and, on process 0, in ``metrics.jsonl``.

  Each line of the file is a record: a JSON object with at least ``kind`` and
  ``step``. A number that is not finite is written as null.

  Attributes:
    records: All records, including those that were read from the file.
  """

  def __init__(self, workdir: Path, step: int = 0):
    """Opens the metrics of a run.

    Args:
      workdir: Working directory of the run, which must exist.
      step: Step from which the run resumes. Records of later steps are removed
        from the file. Defaults to 0, for a new run.
    """
    path = workdir / 'metrics.jsonl'
    self.records: list[dict[str, Any]] = [
        _plain(r) for r in read(path) if r['step'] <= step]
    self._at = {(r['kind'], r['step']): r for r in self.records}
    self._file = self._board = None
    if jax.process_index() > 0:
      return
    part = path.with_suffix('.part')
    part.write_text(''.join(json.dumps(r) + '\n' for r in self.records))
    part.replace(path)
    self._file = path.open('a', buffering=1)
    try:
      # An optional package, which pyright cannot find if it is not installed.
      from tensorboardX import SummaryWriter  # pyright: ignore
    except ImportError:
      return
    self._board = SummaryWriter(str(workdir / 'tensorboard'), purge_step=step)

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
    if self._board:
      for name in values:
        if isinstance(record[name], (int, float)):
          self._board.add_scalar(f'{kind}/{name}', record[name], step)

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
    """Closes the files."""
    for sink in (self._file, self._board):
      if sink:
        sink.close()


# Number of progress lines that a run prints if its output is not a terminal.
_LINES = 40


class Progress:
  """Shows the progress of training, and records each step in the metrics.

  On a terminal it shows a progress bar; otherwise it prints about `_LINES`
  lines in total. ``|g|`` is the mean magnitude of the projected gradients, or
  the norm of the gradient with backpropagation. Only process 0 shows anything.
  """

  def __init__(self, metrics: Metrics, total: int, start: int, loss: bool = True
               ) -> None:
    """Shows an empty bar, or one that is filled up to a resumed step.

    Args:
      metrics: Metrics of the run.
      total: Number of steps of the run.
      start: Step from which the run resumes.
      loss: Whether the loss is shown and recorded. Defaults to True; it must be
        False in a private run, whose losses reveal training rows.
    """
    self._metrics, self._clock, self._loss = metrics, time.time(), loss
    self._total, first = total, jax.process_index() == 0
    self._lines = first and not sys.stderr.isatty()
    self._bar = tqdm(
        total=total, initial=start, unit='step', dynamic_ncols=True,
        disable=not first or self._lines)

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
      seconds = time.time() - self._clock
    self.restart()
    shown = {k: v for k, v in values.items() if not k.startswith('skipped')
            and (k != 'loss' or self._loss)}
    cost = {} if tokens is None else dict(tokens=tokens, seconds=seconds)
    if not self._metrics.at('train', step):
      self._metrics.write('train', step, **shown, **cost,
                          skipped=int(values['skipped']))
    loss = f'loss {shown["loss"]:.3f}, ' if self._loss else ''
    size: Any = values.get('projected_grad', values.get('grad_norm'))
    speed = ('from the log' if tokens is None else
             f'{tokens / max(seconds, 1e-9):.0f} tokens/s')
    summary = f'{loss}|g| {np.abs(size).mean():.1f}'
    if 'reward' in values:
      summary = (
          f'reward {values["reward"]:.3g} (deviation '
          f'{values["reward_std"]:.2g}, best {values["reward_best"]:.3g}), '
          f'{values["identical"]:.0%} identical')
    text = f'{summary}, {speed}'
    self._bar.set_postfix_str(text, refresh=False)
    self._bar.update()
    every = max(self._total // _LINES, 1)
    if self._lines and (step % every == 0 or step == self._total):
      print(f'step {step} of {self._total}: {text}', flush=True)

  def restart(self) -> None:
    """Restarts the clock that measures the seconds of the next step."""
    self._clock = time.time()

  def close(self) -> None:
    """Closes the progress bar."""
    self._bar.close()


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
