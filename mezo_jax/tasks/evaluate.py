"""Evaluates what a model answers: metrics, losses and calibration."""

from collections.abc import Callable
import functools
import resource
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from mezo_jax import models
from mezo_jax.core import sharding
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import metrics
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import score as score_lib
from mezo_jax.tasks.encode import batch_of, Encoded, Form
from mezo_jax.tasks.task import Task


class Sizes(NamedTuple):
  """The shapes of evaluation batches."""

  buckets: tuple[int, ...]  # of lengths
  rows: int = 32  # a batch, at most
  tokens: int = 16_384  # a batch, padding included, at most


def each_batch(fn: Callable[..., Any], data: Encoded, sizes: Sizes,
               mesh: jax.sharding.Mesh) -> Callable[..., Any]:
  """``run(params)`` yields (numbers of rows, ``fn(params, batch)``), batch by
  batch, every row once.

  ``fn`` is jitted, once per bucket; its result is a tree of arrays [rows, ...],
  of which a batch that is not full has more than there are numbers.
  """
  mesh = sharding.without_directions(mesh)
  groups = sharding.row_groups(mesh)
  jitted = jax.jit(fn, out_shardings=sharding.replicated(mesh))

  def run(params):
    for length in data_lib.used_lengths(data.lengths, sizes.buckets):
      rows = rows_of_batch(sizes, length, len(data.prompts), groups)
      for index in data_lib.rows_of(
          data.lengths, sizes.buckets, length, rows):
        batch = sharding.put_batch(batch_of(data, index, length, rows), mesh)
        with jax.set_mesh(mesh):
          values = jitted(params, batch)
        yield index, values

  return run


def rows_of_batch(sizes: Sizes, length: int, most: int, groups: int) -> int:
  """The rows of a batch of so many tokens each, of ``most`` that there are."""
  rows = min(sizes.rows, max(sizes.tokens // length, 1), most)
  return -(-rows // groups) * groups


def run_batches(fn: Callable[..., Any], data: Encoded, sizes: Sizes,
                mesh: jax.sharding.Mesh) -> Callable[..., Any]:
  """``run(params)``: the rows' values of ``fn(params, batch)``, in order."""
  batches = each_batch(fn, data, sizes, mesh)

  def run(params) -> list:
    out = [None] * len(data.prompts)
    for index, values in [*batches(params)]:
      values = jax.device_get(values)
      for i, row in enumerate(index):
        out[row] = jax.tree.map(lambda x, i=i: x[i], values)
    return out

  return run


def answers(model: Any, task: Task | None, data: Encoded, tokenizer: Any
            ) -> Callable[..., Any]:
  """``fn(params, batch)`` that batches of the rows are evaluated by: generated
  tokens and whether all logits were finite; or ``(sums, counts)``, see
  `mezo_jax.tasks.score.log_likelihoods`."""
  if not data.generates:
    return _likelihoods(model, data.form)
  assert task is not None  # generated answers need their task
  return _generated(model, task.max_new_tokens,
                    score_lib.stop_ids(task, tokenizer))


# Dev and test rows, and those of other runs, share what is compiled: jax knows
# the programs of a function again.
@functools.lru_cache(maxsize=16)
def _likelihoods(model, form: Form) -> Callable:
  return lambda params, batch: score_lib.log_likelihoods(
      model, params, batch, form)


@functools.lru_cache(maxsize=16)
def _generated(model, max_new_tokens: int, stop_ids: tuple) -> Callable:
  return lambda params, batch: models.generate(
      model, params, batch['input_ids'], batch['attention_mask'],
      max_new_tokens=max_new_tokens, check=True, stop_ids=stop_ids)


def make_scorer(model: Any, data: Encoded, sizes: Sizes,
                mesh: jax.sharding.Mesh) -> Callable[..., Any]:
  """``score(params) -> (sums, counts)``, float32 [R, C] over all rows; see
  `mezo_jax.tasks.score.log_likelihoods`."""
  run = run_batches(
      answers(model, None, data, None), data, sizes, mesh)
  return lambda params: tuple(np.stack(x) for x in zip(*run(params)))


def make_evaluator(model: Any, task: Task, data: Encoded, tokenizer: Any,
                   sizes: Sizes, mesh: jax.sharding.Mesh,
                   prior: Encoded | None = None,
                   prior_sizes: Sizes | None = None, *,
                   objective: str | Callable[..., Any] = '',
                   gold: Encoded | None = None, gold_sizes: Sizes | None = None
                   ) -> Callable[..., Any]:
  """Returns ``evaluate(params, offsets=None) -> (report, scores)`` of ``data``.

  A report has the task's metrics, ``count``, and ``loss``: the value of the
  objective on all rows, as steps report that of their batch (of a metric or a
  function, minus its value). See `report` for the rest. Scores are [R, C], or
  None where answers are generated.

  Args:
    model: a `mezo_jax.models.Transformer`.
    task: of the rows.
    data: the rows; prompts to be continued, candidates, or right answers alone
      (then the LM loss is all there is to say).
    tokenizer: the model's.
    sizes: of the batches.
    mesh: that parameters are on.
    prior: the same candidates after a prompt without content, whose summed
      log-likelihoods are subtracted: surface-form calibration (Holtzman et al.,
      2021).
    prior_sizes: of its batches, if not the same.
    objective: What is trained; the task's own if ''.
    gold: Where answers are generated, the same rows with their right answers,
      for the LM loss; None to leave that out.
    gold_sizes: The sizes of its batches, if they are not the same.
  """
  objective = objectives.of(task, objective)
  if data.generates:
    return _text_evaluator(model, task, data, tokenizer, sizes, mesh, objective,
                           gold, gold_sizes)
  if objective == 'lm' and data.read_at is not None:
    raise ValueError(
        "the objective 'lm' needs candidates that are laid out: encode the "
        'rows with write_out=True.')
  score = make_scorer(model, data, sizes, mesh)
  subtract = prior and make_scorer(
      model, prior, prior_sizes or sizes, mesh)

  def evaluate(params, offsets=None):
    sums, counts = score(params)
    if data.width == 1:
      return {'loss': _lm_loss(sums, counts), 'count': len(sums),
              **_lost(np.isfinite(sums[:, 0]))}, None
    plain = np.asarray(score_lib.scores(sums, counts))
    scores = plain
    if subtract:
      scores = np.where(counts > 0, sums - subtract(params)[0], -1e30)
    loss = None
    if objective == 'lm':
      index = np.arange(len(sums)), data.labels
      loss = _lm_loss(sums[index], counts[index])
    elif subtract:
      loss = trained_loss(objective, plain, data)
    out = choices_report(task, objective, data, scores, loss)
    if offsets is not None:
      out |= calibrated(task, objective, data, scores, offsets)
    return out, scores

  return evaluate


def _text_evaluator(model, task, data, tokenizer, sizes, mesh, objective, gold,
                    gold_sizes) -> Callable:
  """Returns `make_evaluator` of rows whose answers are generated."""
  run = run_batches(
      answers(model, task, data, tokenizer), data, sizes, mesh)
  right = gold and make_scorer(model, gold, gold_sizes or sizes, mesh)
  has_gold = all(map(task.has_gold, data.rows))

  def evaluate(params, offsets=None):
    del offsets  # of candidates
    tokens, finite = map(np.stack, zip(*run(params)))
    said = [text if fine else '' for text, fine in zip(
        score_lib.texts(tokens, task, tokenizer), finite)]
    out = {}
    if callable(objective):
      out[objectives.name(objective)] = objectives.value(
          objective, said, data.rows)
    if has_gold:
      out |= report_texts(said, [task.references(r) for r in data.rows])
    out['count'] = len(said)
    if right:
      out['loss'] = _lm_loss(*right(params))
    elif callable(objective):
      out['loss'] = -out[objectives.name(objective)]
    elif objective in ('f1', 'accuracy'):
      out['loss'] = -out['f1' if objective == 'f1' else 'exact_match']
    return out | _lost(finite), None

  return evaluate


def _lm_loss(sums: np.ndarray, counts: np.ndarray) -> float:
  return float(-sums.sum() / counts.sum())


def trained_loss(objective: str | Callable[..., Any], scores: np.ndarray,
                 data: Encoded) -> float:
  """Returns the value of an objective over candidates, but for 'lm', as steps
  minimise it, of the scores [R, C] of all rows."""
  said = predictions(scores)
  if callable(objective):
    return -objectives.value(objective, said.tolist(), data.rows)
  if objective == 'cross_entropy':
    return float(_losses(scores, data.labels).mean())
  if objective == 'accuracy':
    return -_accuracy(said, data.golds)
  if objective == 'f1':
    return -float(metrics.macro_f1(said, data.labels))
  raise ValueError(f'objective {objective!r} needs more than scores.')


def choices_report(task: Task, objective: str | Callable[..., Any],
                   data: Encoded, scores: np.ndarray, loss: float | None = None
                   ) -> dict[str, Any]:
  """Returns the report of scores [R, C] of candidates.

  The value of a function that is trained is in it, under
  `mezo_jax.tasks.objective.name`. Where some rows have no right answer,
  metrics that need one are not.

  Args:
    task: The rows' task.
    objective: What is trained.
    data: The rows.
    scores: By which candidates are chosen.
    loss: The objective's value, where it is not that of these scores.
  """
  out = {}
  if callable(objective):
    value = -trained_loss(objective, scores, data)
    out[objectives.name(objective)] = value
    loss = -value if loss is None else loss
  elif loss is None and objective != 'cross_entropy':
    loss = trained_loss(objective, scores, data)
  if all(data.golds):
    return out | report(scores, data.golds, metric=_of_golds(task, objective),
                        loss=loss)
  return out | {'loss': loss, 'count': len(scores),
                **_lost(np.isfinite(scores.max(-1)))}


def calibrated(task: Task, objective: str | Callable[..., Any], data: Encoded,
               scores: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
  """Returns what `choices_report` adds for ``scores + offsets``: the main
  metrics, as ``calibrated_``."""
  out, scores = {}, scores + offsets
  if all(data.golds):
    metric = _of_golds(task, objective)
    out[f'calibrated_{metric}'] = report(
        scores, data.golds, metric=metric)[metric]
  if callable(objective):
    out[f'calibrated_{objectives.name(objective)}'] = -trained_loss(
        objective, scores, data)
  return out


def _of_golds(task: Task, objective: str | Callable) -> str:
  """Returns the main metric of those that compare with right answers."""
  return task.main_metric if callable(objective) else objectives.metric(
      task, objective)


class Evaluators(NamedTuple):
  """Functions of parameters."""

  dev: Callable  # -> report
  test: Callable  # -> report
  both: Callable  # -> (report, report), of classes also calibrated on dev
  sizes: dict[str, Sizes]  # of the batches of train, dev and test


def make_evaluators(model: Any, task: Task, objective: str | Callable[..., Any],
                    splits: data_lib.Splits, tokenizer: Any,
                    mesh: jax.sharding.Mesh, sizes: dict[str, Sizes]
                    ) -> Evaluators:
  """Returns functions that evaluate the dev and test rows of a run.

  Args:
    model: A `mezo_jax.models.Transformer`.
    task: Task of the rows.
    objective: What is trained; the task's own if ''.
    splits: The rows.
    tokenizer: Tokenizer of the model.
    mesh: Mesh that parameters are on.
    sizes: Shapes of the batches of each split, from `sizes_of`.
  """
  objective = objectives.of(task, objective)
  dev, test = (make_evaluator(
      model, task, getattr(splits, name), tokenizer, sizes[name], mesh,
      splits.prior.get(name), sizes.get(f'prior_{name}'), objective=objective,
      gold=splits.gold.get(name), gold_sizes=sizes.get(f'gold_{name}'))
               for name in ('dev', 'test'))

  def both(params):
    on_dev, scores = dev(params)
    offsets = None
    if scores is not None and task.traits.classes and all(splits.dev.golds):
      offsets = calibrate(scores, splits.dev.labels)
      on_dev |= calibrated(task, objective, splits.dev, scores, offsets)
    return on_dev, test(params, offsets)[0]

  return Evaluators(lambda params: dev(params)[0],
                    lambda params: test(params)[0], both, sizes)


def sizes_of(splits: data_lib.Splits, rows: int, tokens: int
             ) -> dict[str, Sizes]:
  """Returns the shapes of the evaluation batches of each split.

  Args:
    splits: The rows.
    rows: Rows of a batch, at most.
    tokens: Tokens of a batch, at most, padding included.
  """
  return {name: Sizes(buckets, rows, tokens)
          for name, buckets in splits.buckets.items()}


def report(scores: np.ndarray, golds: Any, offsets: np.ndarray | None = None,
           metric: str = 'accuracy', loss: float | None = None
           ) -> dict[str, Any]:
  """Returns loss and metrics of scores [R, C].

  A row whose highest score is not finite has no answer: it counts as wrong,
  and ``not_finite`` is the number of such rows, if there are any.

  Args:
    scores: of the candidates.
    golds: [R] integers, or [R] tuples of them where any will do.
    offsets: [C]; adds the metric of ``scores + offsets``, as ``calibrated_``.
    metric: of the predictions, in addition to their accuracy.
    loss: The value of the objective, where that is not the cross-entropy of
      these scores. It is then ``loss`` and the cross-entropy has its own name,
      ``cross_entropy``.
  """
  several = [g if isinstance(g, tuple) else (int(g),) for g in golds]
  labels = np.array([g[0] for g in several])
  losses = _losses(scores, labels)

  def measure(name, scores):
    said = predictions(scores)
    if name == 'accuracy':
      return _accuracy(said, several)
    return float(getattr(metrics, name)(said, labels))

  out = {name: measure(name, scores)
         for name in dict.fromkeys(('accuracy', metric))}
  cross_entropy = float(losses.mean())
  out |= {'loss': cross_entropy} if loss is None else {
      'loss': loss, 'cross_entropy': cross_entropy}
  out |= {'count': len(labels), **_lost(np.isfinite(losses))}
  if offsets is not None:
    out[f'calibrated_{metric}'] = measure(metric, scores + offsets)
  return out


def predictions(scores: np.ndarray) -> np.ndarray:
  """Returns the candidates [R] with the highest scores [R, C], -1 where that
  is not finite."""
  return np.where(np.isfinite(scores.max(-1)), scores.argmax(-1), -1)


def _losses(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns the cross-entropies [R] of scores [R, C]."""
  with np.errstate(invalid='ignore'):
    shifted = scores - scores.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  return -log_p[np.arange(len(labels)), labels]


def _accuracy(said: np.ndarray, golds) -> float:
  return float(np.mean([p in g for p, g in zip(said, golds)]))


def report_texts(answers: list[str], references: list[list[str]]
                 ) -> dict[str, Any]:
  """F1 and exact match of generated answers, the paper's (SQuAD's) and DROP's.

  Each is the best over the references of a row; each of these counts as one
  annotation of DROP.
  """
  pairs = [*zip(answers, references)]
  drop = [metrics.drop_metrics(a, [[r] for r in refs]) for a, refs in pairs]
  return {
      'f1': float(np.mean([metrics.span_f1(*pair) for pair in pairs])),
      'exact_match': float(np.mean([metrics.exact_match(*p) for p in pairs])),
      'drop_f1': float(np.mean([f1 for _, f1 in drop])),
      'count': len(pairs)}


def _lost(finite: np.ndarray) -> dict:
  """``not_finite`` of a report, if any of the rows [R] is not."""
  lost = int(np.sum(~finite))
  return {'not_finite': lost} if lost else {}


def is_finite(report: dict[str, Any]) -> bool:
  """Returns whether all scores and numbers of a report are finite. If not, it
  does not show how good a model is, and its step is never the best."""
  return 'not_finite' not in report and all(
      np.isfinite(v) for v in report.values())


def calibrate(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """One offset a class that makes scores [R, C] most accurate on their rows.

  For two classes this is the best threshold. A model's prior for its label
  words is corrected so without any training, which is what a fine-tuned model
  has to beat. Coordinate ascent; of equally good offsets, the middle one. Rows
  with scores that are not finite have no say.
  """
  offsets, finite = np.zeros(scores.shape[1]), np.isfinite(scores).all(-1)
  if not finite.any():
    return offsets
  scores, labels = scores[finite], labels[finite]
  for _ in range(3 if scores.shape[1] > 2 else 1):
    for c in range(1, scores.shape[1]):
      others = np.delete(scores + offsets, c, axis=1).max(-1)
      edges = np.sort(others - scores[:, c])  # row turns to c at its edge
      tries = np.concatenate(
          [[edges[0] - 1], (edges[1:] + edges[:-1]) / 2, [edges[-1] + 1]])
      hits = []
      for offset in tries:
        offsets[c] = offset
        hits.append(np.sum((scores + offsets).argmax(-1) == labels))
      best = np.flatnonzero(np.array(hits) == max(hits))
      offsets[c] = tries[best[len(best) // 2]]
  return offsets


def rank(report: dict[str, Any], metric: str, select: str
         ) -> dict[str, Any] | None:
  """Returns what checkpoints are compared by: ``score`` first, then ``loss``,
  which is the cross-entropy where there is one; None for a report that is not
  finite."""
  if not is_finite(report):
    return None
  loss = report.get('loss', 0.0)
  by_loss = select == 'loss' or metric not in report
  return {'score': -loss if by_loss else report[metric],
          'loss': report.get('cross_entropy', loss)}


_SHARES = ('accuracy', 'macro_f1', 'f1', 'exact_match', 'drop_f1')
_PLAIN = ('loss', 'cross_entropy', 'matthews')


def in_percent(name: str, report: dict[str, Any]) -> bool:
  """Returns whether a number of a report is a share of 1; the values of a
  user's function are not. A mean of several tasks is one if all are."""
  last = lambda name: name.rpartition('/')[2].removeprefix('calibrated_')
  if name == 'mean':
    return all(last(n) in _SHARES + _PLAIN for n, value in report.items()
               if isinstance(value, float) and n != 'mean')
  return last(name) in _SHARES


def spell_value(name: str, report: dict[str, Any]) -> str:
  """Returns a number of a report as a table has it: shares, and correlations,
  times 100 with one digit, others as they are; '' if it is not there."""
  if name not in report:
    return ''
  if in_percent(name, report) or name.endswith('matthews'):
    return f'{100 * report[name]:.1f}'
  return f'{report[name]:.4g}'


def spell_number(name: str, report: dict[str, Any]) -> str:
  """Returns a number of a report as text: ``65.5%`` or ``0.612``."""
  value = report[name]
  return f'{value:.1%}' if in_percent(name, report) else f'{value:.3f}'


def spell(report: dict[str, Any]) -> str:
  """Returns a report as text: ``accuracy 65.5%, loss 0.612``."""
  out = [f'{name.replace("_", " ")} {spell_number(name, report)}'
         for name, value in report.items() if isinstance(value, float)]
  if 'not_finite' in report:
    out.append(f'scores of {report["not_finite"]} of {report["count"]} rows '
               'not finite')
  return ', '.join(out)


def peak_memory() -> int:
  """Bytes that this process has held at most: of its fullest accelerator, or
  where that is the CPU of the whole process."""
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  most = max(s.get('peak_bytes_in_use', 0) for s in stats)
  kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return most or kib * (1 if sys.platform == 'darwin' else 1024)
