r"""Trains one task, or a mixture of several tasks.

A mixture minimises the weighted mean of the losses of its tasks,

.. math:: \mathcal{L} = \sum_t w_t \mathcal{L}_t / \sum_t w_t.

The batch of a step belongs to a single task, which is drawn with a probability
proportional to its weight. So the expected loss of a step is the weighted mean.
A program is compiled for each task and sequence length. The best step is the
one with the best mean of the tasks' main metrics (or losses, with select
'loss') on their dev rows.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mezo_jax import peft
from mezo_jax.core import reports
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import evaluate, predictions, Task
from mezo_jax.training import build as build_lib
from mezo_jax.training import config as config_lib
from mezo_jax.training import feed, frozen_features, methods, privacy

MEAN = 'mean'  # name of the mean of the tasks' main metrics in reports


# The number of the task is metadata of the pytree, not data, so that it is
# static under `jax.jit` and a step is compiled for each task.
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('batch',), meta_fields=('task',))
@dataclasses.dataclass(frozen=True)
class Of:
  """Holds a batch and the number of its task."""

  batch: Any
  task: int


class TrainedTask(NamedTuple):
  """Holds one task of a run.

  Attributes:
    name: Name of the task in reports.
    task: The task.
    weight: Weight of its loss.
    metric: Name of its main metric.
    drawn: How its batches are drawn.
    built: The parts of the run with the task's rows and loss, and with the
      frozen parameters that steps and evaluations still read.
    ask: Functions that evaluate its dev and test rows.
  """

  name: str
  task: Task
  weight: float
  metric: str
  drawn: feed.Drawn
  built: build_lib.Built
  ask: evaluate.Evaluators


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Holds the tasks of a run. Use `make` to build it.

  With a single task, all methods behave as if there were no mixture.

  Attributes:
    parts: The tasks; the first one is ``config.task``.
  """

  parts: tuple[TrainedTask, ...]

  @property
  def metric(self) -> str:
    """Returns the name of the metric by which steps and runs are compared."""
    first, *others = self.parts
    return MEAN if others else first.metric

  @property
  def splits(self) -> list[data_lib.Splits]:
    """Returns the encoded rows of each task."""
    return [part.built.splits for part in self.parts]

  def value_fn(self, params: Any, of: Of, step: Any = None) -> Any:
    """Returns the losses of a batch, computed by its task's objective.

    Args:
      params: All parameters of the model.
      of: The batch and its task.
      step: Number of the step, for the objective 'reward'. Defaults to None.
    """
    loss_fn = self.parts[of.task].built.loss_fn
    assert loss_fn is not None  # every method that trains has one
    return loss_fn(params, of.batch, *(() if step is None else (step,)))

  def frozen(self, of: Of) -> dict[str, Any]:
    """Returns the frozen parameters that the task of a batch needs."""
    return self.parts[of.task].built.frozen

  def feed(self, mesh: jax.sharding.Mesh, start: int, steps: int, *,
           plan: privacy.Plan | None = None, secret: bytes | None = None
           ) -> Iterator[tuple[int, Of, dict[str, Any]]]:
    """Yields ``(tokens, batch, more)`` for one batch after the other.

    See `mezo_jax.training.feed.batches`; the batch is an `Of`.

    Args:
      mesh: Mesh that the batches are put on.
      start: Number of the first batch, from 0. A resumed run gets the same
        batches as one that was not stopped.
      steps: Number of steps of the whole run.
      plan: Plan of a private run. Defaults to None, for another run.
      secret: Secret of a private run. Defaults to None, for another run.
    """
    if plan:
      assert secret is not None  # every private run has one
      part, = self.parts
      sources = [feed.private(plan, secret, part.built.splits, mesh, start)]
      tasks = itertools.repeat(0)
    else:
      # Draw the tasks of all steps at once. A resumed run then knows how many
      # batches of each task came before `start`.
      weights = np.array([part.weight for part in self.parts])
      drawn = np.random.RandomState(self.parts[0].drawn.seed).choice(
          len(weights), steps, p=weights / weights.sum())
      sources = [
          feed.batches(part.drawn, part.built.splits, mesh,
                       int(np.sum(drawn[:start] == i)))
          for i, part in enumerate(self.parts)]
      tasks = drawn[start:].tolist()
    for i in tasks:
      tokens, batch, more = next(sources[i])
      yield tokens, Of(batch, i), more

  def lengths(self, plan: privacy.Plan | None = None) -> list[str]:
    """Returns the sequence lengths for which a step is compiled, as text.

    With several tasks each length follows the name of its task.

    Args:
      plan: Plan of a private run. Defaults to None, for another run.
    """
    return [f'{part.name} {length}' if len(self.parts) > 1 else f'{length}'
            for part in self.parts for length in feed.lengths(
                part.built.splits, part.drawn.batch_size, plan)]

  def ask(self, change: Callable = lambda params: params
          ) -> evaluate.Evaluators:
    """Returns functions of the trained parameters that evaluate all tasks.

    Args:
      change: A function that is applied first, to the trained and to the frozen
        parameters, for example to remove adapters. Defaults to the identity.
    """
    def of_each(params):
      for part in self.parts:
        yield part, peft.join(change(params), change(part.built.frozen))
    def dev(params):
      return self.joined(
          [part.ask.dev(whole) for part, whole in of_each(params)])
    def test(params):
      found = [part.ask.test(whole) for part, whole in of_each(params)]
      reports, answers = zip(*found)
      return self.joined(reports), answers
    def both(params):
      found = [part.ask.both(whole) for part, whole in of_each(params)]
      on_dev, on_test, answers = zip(*found)
      return self.joined(on_dev), self.joined(on_test), answers
    first = self.parts[0].ask
    return evaluate.Evaluators(dev, test, both, first.sizes, first.answered)

  def predictions(self, answers: Sequence[Any]) -> list[dict[str, Any]]:
    """Returns the predictions of the test rows, as in ``predictions.jsonl``.

    With several tasks each prediction also has the name of its ``task``.

    Args:
      answers: Answers of the test rows of each task, from `ask`.
    """
    out = []
    for part, said in zip(self.parts, answers):
      splits = part.built.splits
      named = {'task': part.name} if len(self.parts) > 1 else {}
      out += [named | row for row in predictions.of_rows(
          part.task, splits.test, said, splits.test_index)]
    return out

  def classes(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns how well each class is predicted; {} for tasks without classes.

    With several tasks the name of a class is ``TASK/CLASS``.

    Args:
      rows: Predictions from `predictions`.
    """
    if len(self.parts) == 1:
      return predictions.of_classes(self.parts[0].task, rows)
    return {f'{part.name}/{name}': value for part in self.parts
            for name, value in predictions.of_classes(part.task, [
                row for row in rows if row['task'] == part.name]).items()}

  def joined(self, reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combines the reports of the tasks into one.

    With several tasks the result has the weighted mean of their losses as
    ``loss``, the mean of their main metrics as ``mean`` (if all were measured),
    the total ``count``, and the entries of each report as ``NAME/...``.

    Args:
      reports: The report of each task.
    """
    if len(self.parts) == 1:
      return reports[0]
    found, out = [*zip(self.parts, reports)], {}
    if all(part.metric in report for part, report in found):
      out[MEAN] = float(np.mean(
          [report[part.metric] for part, report in found]))
    if all('loss' in report for report in reports):
      out['loss'] = float(np.average(
          [report['loss'] for report in reports],
          weights=[part.weight for part in self.parts]))
    out['count'] = sum(report['count'] for report in reports)
    lost = sum(report.get('not_finite', 0) for report in reports)
    out |= {'not_finite': lost} if lost else {}
    return out | {f'{part.name}/{name}': value for part, report in found
                  for name, value in report.items() if name != 'not_finite'}

  def table(self, zero_shot: dict[str, Any], final: dict[str, Any]) -> str:
    """Returns a Markdown table of the results; '' for a single task.

    It has a row for each task and one for their mean.

    Args:
      zero_shot: Report of the untrained model on the test rows; may be empty.
      final: Report of the trained model on the test rows.
    """
    if len(self.parts) == 1:
      return ''
    rows = []
    for part in self.parts:
      name = f'{part.name}/{part.metric}'
      rows.append({
          'task': part.name, 'weight': f'{part.weight:g}',
          'metric': part.metric,
          'zero-shot': evaluate.spell_value(name, zero_shot),
          'zero-shot, calibrated': evaluate.spell_value(
              f'{part.name}/calibrated_{part.metric}', zero_shot),
          'final': evaluate.spell_value(name, final),
          'test rows': final[f'{part.name}/count']})
    rows.append({'task': MEAN, 'zero-shot': evaluate.spell_value(
        MEAN, zero_shot), 'final': evaluate.spell_value(MEAN, final)})
    return reports.markdown_table(rows)


def alone(config: config_lib.Train) -> list[tuple[Any, ...]]:
  """Splits a config with several tasks into one config per task.

  Args:
    config: Config of the run.

  Returns:
    A list of tuples (name, weight, config), one for each task.
  """
  first = dataclasses.replace(config, also=())
  return [(config.task.name or 'first', 1.0, first), *(
      (a.name, a.weight, dataclasses.replace(first, task=a.task, data=a.data))
      for a in config.also)]


def make(config: config_lib.Train, built: build_lib.Built, directory: Path,
         say: Callable[[str], None]) -> Mixture:
  """Builds the tasks of a run.

  Args:
    config: Config of the run.
    built: The parts of the run from `mezo_jax.training.build.build`, with the
      rows of the first task.
    directory: Directory for files of cached activations.
    say: A function that reports a line to the user.

  Returns:
    The tasks of the run. They hold no reference to the trained parameters.

  Raises:
    InputError: if a task, its rows and the model do not fit each other.
  """
  parts = []
  for i, (name, weight, own) in enumerate(alone(config)):
    found = built
    if i:
      say(f'task {name}:')
      splits = build_lib.encode_rows(
          own, data_lib.read_rows(own.data, own.task), built.model.config,
          built.tokenizer, say)
      found = built._replace(splits=splits, loss_fn=build_lib.make_loss_fn(
          own, built.model, splits.train, built.tokenizer,
          built.host or jax.pure_callback))
    found = frozen_features.keep(
        own, found, directory / name if config.also else directory, say)
    ask = build_lib.make_evaluators(
        own, found.model, found.splits, found.tokenizer, found.mesh)
    every = methods.anchor_every(own)
    drawn = feed.Drawn(
        own.data.batch_size, own.seed, every,
        methods.anchor_batches(own, len(found.splits.train.prompts))
        if every else 0)
    parts.append(TrainedTask(
        name, own.task, weight, config_lib.metric(own), drawn,
        found._replace(params=None, opt_state=None), ask))
  return Mixture(tuple(parts))
