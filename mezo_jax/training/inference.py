"""Predicts the rows of a file with a trained model."""

from collections.abc import Callable, Sequence
import dataclasses
import os
from pathlib import Path
from typing import Any

from mezo_jax import models
from mezo_jax.core.errors import InputError, local, MissingError
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import evaluate, predictions, Task, TASKS
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks.encode import after_tokens, encode, Encoded
from mezo_jax.tasks.task import columns, LOSS
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods, run_files, saved, trainable


def predict(source: str | os.PathLike[str],
            data: str | os.PathLike[str] | Sequence[dict[str, Any]], *,
            step: int | None = None, say: Callable[[str], None] = print
            ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Predicts rows with the model of a run or of an exported directory.

  Prompts are built and answers are chosen as in the run's evaluation: for the
  test rows of the run, the predictions are those of its ``predictions.jsonl``.

  Args:
    source: Working directory of a run, or a directory that ``mezo-jax export``
      wrote. If the run has several tasks, the first one is used.
    data: A .jsonl, .csv, .tsv or .parquet file with the columns of the task, or
      its rows as dicts. The column of the right answers may be missing.
    step: For a working directory, the step of the checkpoint. Defaults to None,
      for the best step on the dev rows, or the last step of a private run.
    say: Reports notes to the user. Defaults to `print`.

  Returns:
    A pair. The first is a list with one dict for each row, in the order of the
    rows: ``index``, ``prediction`` and, unless answers are generated,
    ``probabilities``; for a row with a right answer also ``gold`` and
    ``correct``. The second is a dict with the metrics of the rows that have a
    right answer; it is empty if there are none.

  Raises:
    FileNotFoundError: If there is no such run, export, step or file.
    ValueError: If files cannot be read, if the rows lack a column that the task
      needs, or if the base model of the run has changed.
  """
  directory = local(source)
  run, load = find(directory, step)
  task = run.task = _with_row_function(run.task, directory)
  file = 'the rows'
  if isinstance(data, str | os.PathLike):
    file = os.fspath(data)
    data = data_lib.load_rows(file)
  index, rows = data_lib.numbered(task, data)
  if not rows:
    raise InputError(f'{file}: the task leaves out all rows; give other ones.')
  _check_columns(task, rows, file)
  if run.also:
    say('note: the run has several tasks; the first one is used, '
        f'{task.name or task.template!r}.')
  labels = task.reading(rows)
  if labels:
    say(labels)
  prompts = _after_demonstrations(run, rows)
  found = load()
  encoded, prior = _encode(run, rows, prompts, found)
  if encoded.truncated:
    say(f'note: {encoded.truncated} of {len(rows)} rows were cut to fit.')
  answers = evaluate.make_predictor(
      found.model, task, encoded, found.tokenizer, _sizes(run, encoded, found),
      found.mesh, prior, prior and _sizes(run, prior, found))(found.params)
  return (predictions.of_rows(task, encoded, answers, index),
          predictions.report(task, encoded, answers, objectives.metric(
              task, objectives.of(task, run.objective))))


def is_trained(source: str | os.PathLike[str]) -> bool:
  """Returns whether a path is that of a run or of an exported model."""
  directory = Path(source).expanduser()
  return any((directory / name).exists() for name in (
      saved.FILE, 'checkpoints', 'result.json'))


def find(directory: Path, step: int | None
         ) -> tuple[config_lib.Train, Callable[[], saved.Trained]]:
  """Returns the config of a run or an export, and a function that loads it.

  Raises:
    MissingError: If the directory is neither.
    InputError: If its config cannot be read, or if it cannot predict.
  """
  if (directory / saved.FILE).is_file():
    if step is not None:
      raise InputError(f'{directory} is an exported model and has no other '
                       'steps; give the working directory of the run.')
    run = saved.read_export(directory)
    return run, lambda: saved.load_export(directory, run)
  has = lambda name: (directory / name).exists()
  if not (has('config.json') and (has('checkpoints') or has('result.json'))):
    what = (f'lacks {saved.FILE}' if directory.is_dir() else 'does not exist')
    raise MissingError(
        f'{directory} {what}; give the working directory of a run, or a '
        'directory that mezo-jax export wrote.')
  run = run_files.read_config(directory, is_trained=has('checkpoints'))
  method = methods.method_of(run)
  if method.steps:
    return run, lambda: saved.load_step(directory, run, step)
  if method.probe:
    raise InputError(f'{directory} is a run of method {run.method!r}, which '
                     'saves no model; use a method that trains.')
  if step is not None:
    raise InputError(f'{directory} is a run of method {run.method!r}, which '
                     'has no steps; leave out the step.')
  return run, lambda: saved.untrained(run)


def _check_columns(task: Task, rows: Sequence[dict[str, Any]], file: str
                   ) -> None:
  """Raises InputError if the rows lack a column that prompts need."""
  if task.traits.conversation:
    return  # The conversations themselves are checked when they are read.
  wanted = {*columns('template', task.template)} - {'mask', 'sep'}
  wanted |= {column for column, _ in task.limits}
  kind = task.traits
  if not (kind.classes or kind.generates):
    wanted |= {*columns('answer', task.answer)} - {'choice'} | {*task.choices}
  for row in rows:
    missing = sorted(wanted - row.keys())
    if missing:
      raise InputError(
          f'{file} has no column {missing[0]!r}, which the task with the '
          f'template {task.template!r} needs; its columns are {sorted(row)}. '
          'Rename or add the column.')


def _with_row_function(task: Task, directory: Path) -> Task:
  """Returns a task whose field ``row`` is a function again.

  A config in JSON has only the name of the function. The function is found if
  it belongs to a task that this library declares.

  Raises:
    InputError: If it is another function.
  """
  if task.row is None or callable(task.row):
    return task
  declared = TASKS.get(task.name)
  if declared is not None and declared.row is not None and (
      config_lib.name_of_function(declared.row) == task.row):
    return dataclasses.replace(task, row=declared.row)
  raise InputError(
      f'the task of {directory} changes rows with the Python function '
      f'{task.row}, which is not saved. Export the run, set task.row to null '
      f'in its {saved.FILE}, and give the rows as the function returns them.')


def _after_demonstrations(run: config_lib.Train, rows: Sequence[dict[str, Any]]
                          ) -> list[str] | None:
  """Returns the prompts of rows with demonstrations, for in-context learning.

  The test rows of the run get the same demonstrations as in its evaluation.
  Returns None for other methods, whose prompts are the task's own.
  """
  if not methods.method_of(run).demonstrations:
    return None
  task, of_run = run.task, data_lib.read_rows(run.data, run.task)
  prompt = lambda row: task.prompt(row)
  at = {prompt(row): i for i, row in reversed([*enumerate(of_run.test)])}
  demos = data_lib.demonstrations(
      task, of_run.pool, run.num_demos, len(of_run.test) + len(rows))
  return [demos[at.get(prompt(row), len(of_run.test) + i)] + prompt(row)
          for i, row in enumerate(rows)]


def soft_ids(run: config_lib.Train, config: models.Config) -> range:
  """Returns the token ids of a soft prompt, which precede each text.

  Args:
    run: Config of the run.
    config: Config of the model.
  """
  count = trainable.tokens_before(run) if methods.part_of(run).soft else 0
  return range(config.vocab_size, config.vocab_size + count)


def _encode(run: config_lib.Train, rows: list[dict[str, Any]],
            prompts: list[str] | None, found: saved.Trained
            ) -> tuple[Encoded, Encoded | None]:
  """Tokenises rows as in the run's evaluation of test rows.

  Args:
    run: Config of the run.
    rows: The rows, which need no right answers.
    prompts: Their prompts, or None for those of the task.
    found: The model.

  Returns:
    The tokenised rows and, for surface-form calibration, their candidates
    after a prompt without content, otherwise None.
  """
  task, config = run.task, found.model.config
  before, soft = trainable.tokens_before(run), soft_ids(run, config)

  def read(prompts):
    """Tokenises the rows with some prompts."""
    return after_tokens(encode(
        task, rows, found.tokenizer,
        min(_longest(run, config), config.max_length - before), prompts=prompts,
        causal=config.causal, needs_gold=False, write_out=objectives.gold_only(
            objectives.of(task, run.objective))), soft)

  encoded, prior = read(prompts), None
  if run.calibration and encoded.width > 1:
    prior = read([task.prior(row) for row in rows])
  return encoded, prior


def _longest(run: config_lib.Train, config: models.Config) -> int:
  """Returns the largest number of tokens of a row with its answer.

  It is that of the run's evaluation. A run that is evaluated by the loss of
  conversations has written no answers, which would need room beyond the
  conversations; its answers may be as long as the model allows.
  """
  if config_lib.metric(run) == LOSS:
    return config.max_length
  return min(run.data.max_length, config.max_length)


def _sizes(run: config_lib.Train, data: Encoded, found: saved.Trained
           ) -> evaluate.Sizes:
  """Returns the shapes of the batches of rows."""
  most = _longest(run, found.model.config)
  if data.generates:
    most -= run.task.max_new_tokens
  return evaluate.Sizes(
      data_lib.buckets_for(data, run.data.buckets, most), run.eval_batch_size,
      run.eval_batch_tokens)
