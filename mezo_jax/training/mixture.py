r"""The tasks of a run: one, or several that are trained together.

Several tasks minimise the weighted mean of their losses,
:math:`\sum_t w_t \mathcal{L}_t / \sum_t w_t`. The batch of a step is of one
task, which the run's seed draws by weight, so the loss of a step is right on
average. A program is compiled for each task and length. The dev rows of all
tasks choose the best step, by the mean of their metrics.
"""

from collections.abc import Callable, Iterator
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
from mezo_jax.tasks import evaluate, score
from mezo_jax.training import build as build_lib
from mezo_jax.training import config as config_lib
from mezo_jax.training import feed, frozen_features, methods, privacy

MEAN = 'mean'  # name of the mean of the main metrics of several tasks


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('batch',), meta_fields=('task',))
@dataclasses.dataclass(frozen=True)
class Of:
  """A batch, and the number of its task."""

  batch: Any
  task: int


class TrainedTask(NamedTuple):
  """One task of a run.

  Attributes:
    name: Name in reports.
    weight: Weight of its loss.
    metric: Name of the number by which steps and runs are compared.
    drawn: How its batches are drawn.
    built: Its rows and loss, and the frozen parameters that are still read.
    ask: Functions that evaluate its dev and test rows.
  """

  name: str
  weight: float
  metric: str
  drawn: feed.Drawn
  built: build_lib.Built
  ask: evaluate.Evaluators


@dataclasses.dataclass(frozen=True)
class Mixture:
  """The tasks of a run; `make` makes it."""

  parts: tuple[TrainedTask, ...]

  @property
  def metric(self) -> str:
    """Returns the name of the number by which runs and steps are compared."""
    first, *others = self.parts
    return MEAN if others else first.metric

  @property
  def splits(self) -> list[data_lib.Splits]:
    return [part.built.splits for part in self.parts]

  def value_fn(self, params: Any, of: Of) -> Any:
    """Returns the per-example losses of a batch by its task's objective."""
    loss_fn = self.parts[of.task].built.loss_fn
    assert loss_fn is not None  # a method with steps has one
    return loss_fn(params, of.batch)

  def frozen(self, of: Of) -> dict[str, Any]:
    return self.parts[of.task].built.frozen

  def feed(self, mesh: jax.sharding.Mesh, start: int, steps: int, *,
           plan: privacy.Plan | None = None, secret: bytes | None = None
           ) -> Iterator[tuple[int, Of, dict[str, Any]]]:
    """Yields ``tokens, batch, more`` from batch number ``start`` on.

    Args:
      mesh: Mesh that batches are put on.
      start: Number of the first batch, from 0.
      steps: Number of batches of the whole run.
      plan: Plan of a private run.
      secret: Secret of a private run.
    """
    if plan:
      assert secret is not None  # a private run has one
      part, = self.parts
      sources = [feed.private(plan, secret, part.built.splits, mesh, start)]
      tasks = itertools.repeat(0)
    else:
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
    """Returns the lengths, by task, that a step is compiled for."""
    return [f'{part.name} {length}' if len(self.parts) > 1 else f'{length}'
            for part in self.parts for length in feed.lengths(
                part.built.splits, part.drawn.batch_size, plan)]

  def ask(self, change: Callable = lambda params: params
          ) -> evaluate.Evaluators:
    """Returns functions of the trained parameters that evaluate all tasks.

    Args:
      change: A function of parameters that is applied to the trained and to the
        frozen ones first. Defaults to the identity.
    """
    def of_each(params):
      for part in self.parts:
        yield part, peft.join(change(params), change(part.built.frozen))
    dev, test = (lambda params, which=which: self.joined(
        [getattr(part.ask, which)(whole) for part, whole in of_each(params)])
                 for which in ('dev', 'test'))
    def both(params):
      reports = [part.ask.both(whole) for part, whole in of_each(params)]
      return tuple(self.joined(list(of_all)) for of_all in zip(*reports))
    return evaluate.Evaluators(dev, test, both, self.parts[0].ask.sizes)

  def joined(self, reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns one report from the reports of the tasks.

    With several tasks it has the weighted mean ``loss``, ``mean`` of their
    metrics if all were measured, and the entries of each as ``NAME/...``.
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
    """Returns a Markdown table with a line for each task and for their mean.

    It is '' for a single task.
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
  """Returns (name, weight, config) of each task, as if it were alone."""
  first = dataclasses.replace(config, also=())
  return [(config.task.name or 'first', 1.0, first), *(
      (a.name, a.weight, dataclasses.replace(first, task=a.task, data=a.data))
      for a in config.also)]


def make(config: config_lib.Train, built: build_lib.Built, directory: Path,
         say: Callable[[str], None]) -> Mixture:
  """Builds the tasks of a run.

  Args:
    config: Config of the run.
    built: What `mezo_jax.training.build.build` made of it: the first task, and
      the weights.
    directory: Directory for files of cached activations.
    say: Reports what is found.

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
      found = built._replace(splits=splits, loss_fn=score.make_loss_fn(
          built.model, splits.train, own.task, config_lib.objective(own),
          built.tokenizer, *([built.host] if built.host else ())))
    found = frozen_features.keep(
        own, found, directory / name if config.also else directory, say)
    ask = build_lib.make_evaluators(
        own, found.model, found.splits, found.tokenizer, found.mesh)
    every = methods.anchor_every(own)
    drawn = feed.Drawn(
        own.data.batch_size, own.seed, every,
        methods.anchor_batches(own, len(found.splits.train.prompts))
        if every else 0)
    parts.append(TrainedTask(name, weight, config_lib.metric(own), drawn,
                      found._replace(params=None, opt_state=None), ask))
  return Mixture(tuple(parts))
