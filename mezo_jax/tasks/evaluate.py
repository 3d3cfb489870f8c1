"""Evaluates the answers of a model: metrics, losses and calibration.

A *report* is a dict from the names of numbers, such as ``accuracy`` and
``loss``, to their values over some rows.
"""

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
from mezo_jax.tasks import metrics, rewards
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import score as score_lib
from mezo_jax.tasks.encode import batch_of, Encoded, Form
from mezo_jax.tasks.task import LOSS, Task

# Number of rows whose answers an evaluation keeps.
KEPT = 20


class Sizes(NamedTuple):
  """Holds limits on the shapes of evaluation batches."""

  buckets: tuple[int, ...]  # lengths that rows are padded to, in tokens
  rows: int = 32  # largest number of rows per batch
  tokens: int = 16_384  # largest number of tokens per batch, with padding


def each_batch(fn: Callable[..., Any], data: Encoded, sizes: Sizes,
               mesh: jax.sharding.Mesh) -> Callable[..., Any]:
  """Returns a function that evaluates all rows in batches.

  Args:
    fn: Function ``fn(params, batch)`` that returns a tree of arrays
      [rows, ...]. It is jitted and compiled once per bucket.
    data: The tokenised rows.
    sizes: Limits on the shapes of batches.
    mesh: Mesh of the parameters.

  Returns:
    A generator function ``run(params)``. For each batch it yields the indices
    of its rows and the result of ``fn``. If a batch is not full, the result has
    additional entries for padding at its end.
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
  """Returns the number of rows of an evaluation batch.

  Args:
    sizes: Limits on the shapes of batches.
    length: Number of tokens of each row.
    most: Number of rows that there are.
    groups: Number of groups of devices that share the rows of a batch. The
      result is rounded up to a multiple of it.
  """
  rows = min(sizes.rows, max(sizes.tokens // length, 1), most)
  return -(-rows // groups) * groups


def run_batches(fn: Callable[..., Any], data: Encoded, sizes: Sizes,
                mesh: jax.sharding.Mesh) -> Callable[..., Any]:
  """Returns a function that evaluates all rows and restores their order.

  Args:
    fn: Function as for `each_batch`.
    data: The tokenised rows.
    sizes: Limits on the shapes of batches.
    mesh: Mesh of the parameters.

  Returns:
    A function ``run(params)`` that returns a list with the result of ``fn`` for
    each row, on the host.
  """
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
  """Returns the function that computes a model's answers for a batch.

  Args:
    model: A `mezo_jax.models.Transformer`.
    task: Task of the rows. It may be None unless answers are generated.
    data: The tokenised rows.
    tokenizer: Tokenizer of the model. It may be None unless answers are
      generated.

  Returns:
    A function ``fn(params, batch)``. If answers are generated, it returns their
    tokens and whether all logits were finite. Otherwise it returns the
    ``(sums, counts)`` of `mezo_jax.tasks.score.log_likelihoods`.
  """
  if not data.generates:
    return _likelihoods(model, data.form)
  assert task is not None  # The caller passes it if answers are generated.
  return _generated(model, task.max_new_tokens,
                    score_lib.stop_ids(task, tokenizer))


# jax.jit finds its compiled programs by the identity of a function. The caches
# return the same function for equal arguments, so that dev rows, test rows and
# later runs share compiled programs.
@functools.lru_cache(maxsize=16)
def _likelihoods(model, form: Form) -> Callable:
  """Returns ``fn(params, batch)`` that scores candidates."""
  return lambda params, batch: score_lib.log_likelihoods(
      model, params, batch, form)


@functools.lru_cache(maxsize=16)
def _generated(model, max_new_tokens: int, stop_ids: tuple) -> Callable:
  """Returns ``fn(params, batch)`` that generates answers."""
  return lambda params, batch: models.generate(
      model, params, batch['input_ids'], batch['attention_mask'],
      max_new_tokens=max_new_tokens, check=True, stop_ids=stop_ids)


def make_scorer(model: Any, data: Encoded, sizes: Sizes,
                mesh: jax.sharding.Mesh) -> Callable[..., Any]:
  """Returns a function that scores the candidates of all rows.

  Args:
    model: A `mezo_jax.models.Transformer`.
    data: The tokenised rows.
    sizes: Limits on the shapes of batches.
    mesh: Mesh of the parameters.

  Returns:
    A function ``score(params)`` that returns ``(sums, counts)``, float32
    [R, C] each; see `mezo_jax.tasks.score.log_likelihoods`.
  """
  run = run_batches(
      answers(model, None, data, None), data, sizes, mesh)
  return lambda params: tuple(np.stack(x) for x in zip(*run(params)))


def make_evaluator(model: Any, task: Task, data: Encoded, tokenizer: Any,
                   sizes: Sizes, mesh: jax.sharding.Mesh,
                   prior: Encoded | None = None,
                   prior_sizes: Sizes | None = None, *,
                   objective: str | Callable[..., Any] = '',
                   gold: Encoded | None = None,
                   gold_sizes: Sizes | None = None,
                   answered: list[rewards.Answer] | None = None
                   ) -> Callable[..., Any]:
  """Returns a function that evaluates parameters on some rows.

  Args:
    model: A `mezo_jax.models.Transformer`.
    task: Task of the rows.
    data: The tokenised rows: prompts to continue, prompts with candidates, or
      prompts with right answers only. For the last, the only result is the
      language-model loss.
    tokenizer: Tokenizer of the model.
    sizes: Limits on the shapes of batches.
    mesh: Mesh of the parameters.
    prior: The same candidates after a prompt without content. Their summed
      log-likelihoods are subtracted, which is surface-form calibration
      (Holtzman et al., 2021). Defaults to None, for no calibration.
    prior_sizes: Limits on the shapes of the batches of ``prior``. Defaults to
      ``sizes``.
    objective: Objective that is trained. Defaults to '', for the task's own.
    gold: If answers are generated, the same rows with their right answers, for
      the language-model loss. Defaults to None, which leaves out that loss.
    gold_sizes: Limits on the shapes of the batches of ``gold``. Defaults to
      ``sizes``.
    answered: A list whose elements each evaluation replaces by the answers to
      the first `KEPT` rows. Defaults to None, which keeps no answers.

  Returns:
    A function ``evaluate(params, offsets=None)`` that returns
    ``(report, answers)``. The report has the metrics of the task, ``count`` and
    ``loss``; see `report`. The loss is the value of the objective over all
    rows, negated if the objective is maximised. For generated answers whose
    objective is not the language-model loss, that loss is ``cross_entropy``.
    With ``offsets`` [C] it also has metrics of ``scores + offsets``. The
    answers are the scores [R, C] of the candidates, the list of generated
    texts, or None if ``data`` has right answers only.

  Raises:
    ValueError: If the objective is 'lm' and the candidates in ``data`` were not
      encoded in full; see ``write_out`` of `mezo_jax.tasks.encode.encode`.
  """
  objective = objectives.of(task, objective)
  if data.generates:
    return _text_evaluator(model, task, data, tokenizer, sizes, mesh, objective,
                           gold, gold_sizes, answered)
  if objective == 'lm' and data.read_at is not None:
    raise ValueError(
        "the objective 'lm' needs candidates that are written out; encode the "
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
      scores = _without_prior(sums, counts, subtract(params)[0])
    loss = None
    if objective == 'lm':
      index = np.arange(len(sums)), data.labels
      loss = _lm_loss(sums[index], counts[index])
    elif subtract:
      loss = trained_loss(objective, plain, data)
    if answered is not None:
      answered[:] = _chosen(task, data, scores)
    out = choices_report(task, objective, data, scores, loss)
    if offsets is not None:
      out |= calibrated(task, objective, data, scores, offsets)
    return out, scores

  return evaluate


def make_predictor(model: Any, task: Task, data: Encoded, tokenizer: Any,
                   sizes: Sizes, mesh: jax.sharding.Mesh,
                   prior: Encoded | None = None,
                   prior_sizes: Sizes | None = None) -> Callable[..., Any]:
  """Returns a function that answers rows, which need no right answers.

  Args:
    model: A `mezo_jax.models.Transformer`.
    task: Task of the rows.
    data: The tokenised rows.
    tokenizer: Tokenizer of the model.
    sizes: Limits on the shapes of batches.
    mesh: Mesh of the parameters.
    prior: As for `make_evaluator`.
    prior_sizes: As for `make_evaluator`.

  Returns:
    A function ``predict(params)`` that returns the answers of `make_evaluator`:
    scores [R, C] or texts.
  """
  if data.generates:
    write = _make_writer(model, task, data, tokenizer, sizes, mesh)
    return lambda params: write(params)[0]
  score = make_scorer(model, data, sizes, mesh)
  subtract = prior and make_scorer(
      model, prior, prior_sizes or sizes, mesh)

  def predict(params):
    sums, counts = score(params)
    if subtract:
      return _without_prior(sums, counts, subtract(params)[0])
    return np.asarray(score_lib.scores(sums, counts))

  return predict


def _without_prior(sums: np.ndarray, counts: np.ndarray, prior: np.ndarray
                   ) -> np.ndarray:
  """Returns the scores [R, C] of surface-form calibration."""
  return np.where(counts > 0, sums - prior, -1e30)


def _make_writer(model, task, data, tokenizer, sizes, mesh) -> Callable:
  """Returns ``write(params)``, which returns (texts, whether each is finite).
  """
  run = run_batches(
      answers(model, task, data, tokenizer), data, sizes, mesh)

  def write(params):
    tokens, finite = map(np.stack, zip(*run(params)))
    # Tokens chosen from logits that are not finite are no answer.
    said = [text if fine else '' for text, fine in zip(
        score_lib.texts(tokens, task, tokenizer), finite)]
    return said, finite

  return write


def _chosen(task: Task, data: Encoded, scores: np.ndarray
            ) -> list[rewards.Answer]:
  """Returns the candidates that are chosen for the first `KEPT` rows.

  A row without finite scores has the answer ''.
  """
  return [
      rewards.Answer(row, task.answers(row)[choice] if choice >= 0 else '', {})
      for row, choice in zip(data.rows[:KEPT], predictions(scores[:KEPT]))]


def _text_evaluator(model, task, data, tokenizer, sizes, mesh, objective, gold,
                    gold_sizes, answered) -> Callable:
  """Returns the function of `make_evaluator` for generated answers."""
  write = _make_writer(model, task, data, tokenizer, sizes, mesh)
  right = gold and make_scorer(model, gold, gold_sizes or sizes, mesh)
  has_gold = all(map(task.has_gold, data.rows))

  def evaluate(params, offsets=None):
    del offsets  # Offsets are for candidates only.
    said, finite = write(params)
    out = {}
    if isinstance(objective, rewards.Reward):
      out |= objective.report(said, data.rows)
    elif callable(objective):
      out[objectives.name(objective)] = objectives.value(
          objective, said, data.rows)
    if has_gold:
      out |= report_texts(said, [task.references(r) for r in data.rows])
    out['count'] = len(said)
    if callable(objective):
      out['loss'] = -out[objectives.name(objective)]
    elif objective in ('f1', 'accuracy'):
      out['loss'] = -out['f1' if objective == 'f1' else 'exact_match']
    if right:
      out['cross_entropy' if 'loss' in out else 'loss'] = _lm_loss(
          *right(params))
    if answered is not None:
      answered[:] = (
          objective.last[:KEPT] if isinstance(objective, rewards.Reward) else
          [rewards.Answer(*pair, {}) for pair in zip(data.rows[:KEPT], said)])
    return out | _lost(finite), said

  return evaluate


def _lm_loss(sums: np.ndarray, counts: np.ndarray) -> float:
  """Returns minus the mean log-likelihood of all tokens."""
  return float(-sums.sum() / counts.sum())


def trained_loss(objective: str | Callable[..., Any], scores: np.ndarray,
                 data: Encoded) -> float:
  """Returns the value of an objective for the scores of all rows.

  As in training, the value of an objective that is maximised is negated.

  Args:
    objective: Objective over candidates, except 'lm'.
    scores: Scores [R, C] of the candidates.
    data: The tokenised rows.

  Raises:
    ValueError: If the objective cannot be computed from scores.
  """
  said = predictions(scores)
  if callable(objective):
    return -objectives.value(objective, said.tolist(), data.rows)
  if objective == 'cross_entropy':
    return float(_losses(scores, data.labels).mean())
  if objective == 'accuracy':
    return -_accuracy(said, data.golds)
  if objective == 'f1':
    return -float(metrics.macro_f1(said, data.labels))
  raise ValueError(f'objective {objective!r} cannot be computed from scores.')


def choices_report(task: Task, objective: str | Callable[..., Any],
                   data: Encoded, scores: np.ndarray, loss: float | None = None
                   ) -> dict[str, Any]:
  """Returns the report of the scores of candidates.

  If a user's function is trained, its value is in the report under the name
  from `mezo_jax.tasks.objective.name`. If some rows have no right answer,
  metrics that need one are left out.

  Args:
    task: Task of the rows.
    objective: Objective that is trained.
    data: The tokenised rows.
    scores: Scores [R, C] by which candidates are chosen.
    loss: Value of the objective, if it is not computed from these scores.
      Defaults to None.
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
  """Returns the calibrated metrics that are added to a report.

  These are the main metric and the value of a user's function, computed with
  ``scores + offsets``. Their names begin with ``calibrated_``.

  Args:
    task: Task of the rows.
    objective: Objective that is trained.
    data: The tokenised rows.
    scores: Scores [R, C] of the candidates.
    offsets: Offsets [C] of the classes, from `calibrate`.
  """
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
  """Returns the main metric that compares predictions with right answers.

  If a user's function is trained, which reads the rows itself, this is the main
  metric of the task.
  """
  return task.main_metric if callable(objective) else objectives.metric(
      task, objective)


class Evaluators(NamedTuple):
  """Holds functions of parameters that evaluate the rows of a run."""

  dev: Callable  # returns the report of the dev rows
  # Returns the report of the test rows and their answers; see `make_evaluator`.
  test: Callable
  # Returns the reports of dev and test rows, and the answers of the test rows.
  # For tasks with classes the reports have metrics that are calibrated on the
  # dev rows, too.
  both: Callable
  sizes: dict[str, Sizes]  # shapes of the batches of each split
  # Answers to the first `KEPT` dev rows in the latest evaluation of them. Empty
  # before it, and if only right answers are scored.
  answered: list[rewards.Answer]


def make_evaluators(model: Any, task: Task, objective: str | Callable[..., Any],
                    splits: data_lib.Splits, tokenizer: Any,
                    mesh: jax.sharding.Mesh, sizes: dict[str, Sizes]
                    ) -> Evaluators:
  """Returns functions that evaluate the dev and test rows of a run.

  Args:
    model: A `mezo_jax.models.Transformer`.
    task: Task of the rows.
    objective: Objective that is trained, or '' for the task's own.
    splits: The tokenised rows.
    tokenizer: Tokenizer of the model.
    mesh: Mesh of the parameters.
    sizes: Limits on the shapes of the batches of each split, from `sizes_of`.
  """
  objective, answered = objectives.of(task, objective), []
  dev, test = (make_evaluator(
      model, task, getattr(splits, name), tokenizer, sizes[name], mesh,
      splits.prior.get(name), sizes.get(f'prior_{name}'), objective=objective,
      gold=splits.gold.get(name), gold_sizes=sizes.get(f'gold_{name}'),
      answered=answered if name == 'dev' else None)
               for name in ('dev', 'test'))

  def both(params):
    """Calibrates on the dev rows and applies the offsets to the test rows."""
    on_dev, scores = dev(params)
    offsets = None
    if scores is not None and task.traits.classes and all(splits.dev.golds):
      offsets = calibrate(scores, splits.dev.labels)
      on_dev |= calibrated(task, objective, splits.dev, scores, offsets)
    return on_dev, *test(params, offsets)

  return Evaluators(lambda params: dev(params)[0], test, both, sizes, answered)


def sizes_of(splits: data_lib.Splits, rows: int, tokens: int
             ) -> dict[str, Sizes]:
  """Returns the limits on the shapes of evaluation batches for each split.

  Args:
    splits: The tokenised rows.
    rows: Largest number of rows per batch.
    tokens: Largest number of tokens per batch, with padding.
  """
  return {name: Sizes(buckets, rows, tokens)
          for name, buckets in splits.buckets.items()}


def report(scores: np.ndarray, golds: Any, offsets: np.ndarray | None = None,
           metric: str = 'accuracy', loss: float | None = None
           ) -> dict[str, Any]:
  """Computes the loss and the metrics of scores.

  A row whose highest score is not finite has no prediction and counts as wrong.

  Args:
    scores: Scores [R, C] of the candidates.
    golds: Right candidate of each row, as an integer, or as a tuple of integers
      if several are right.
    offsets: Offsets [C] of the classes. With them, the metric of
      ``scores + offsets`` is added to the report. Defaults to None.
    metric: Metric to report in addition to the accuracy. Defaults to
      'accuracy'.
    loss: Value of the objective. Defaults to None, which means the
      cross-entropy of the scores.

  Returns:
    A report with ``accuracy``, the metric, ``loss`` and ``count``, the number
    of rows. If a loss is given, the cross-entropy is in ``cross_entropy``. If
    the cross-entropy of some rows is not finite, their number is in
    ``not_finite``. With offsets the report has ``calibrated_accuracy``, or
    ``calibrated_`` with the name of another metric.
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
  """Returns the candidate of each row with the highest score.

  Args:
    scores: Scores [R, C].

  Returns:
    Integers [R], -1 if the highest score is not finite.
  """
  return np.where(np.isfinite(scores.max(-1)), scores.argmax(-1), -1)


def _losses(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns the cross-entropy [R] of each row.

  Args:
    scores: Scores [R, C].
    labels: Right candidates, integers [R].
  """
  with np.errstate(invalid='ignore'):
    shifted = scores - scores.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  return -log_p[np.arange(len(labels)), labels]


def _accuracy(said: np.ndarray, golds) -> float:
  """Returns the share of predictions that are among the right candidates."""
  return float(np.mean([p in g for p, g in zip(said, golds)]))


def report_texts(answers: list[str], references: list[list[str]]
                 ) -> dict[str, Any]:
  """Computes the metrics of generated answers.

  Each metric of a row is the best over its references. For DROP, each reference
  counts as one answer with one span.

  Args:
    answers: Generated answers [R].
    references: Acceptable answers of each row.

  Returns:
    A report with ``f1`` and ``exact_match`` as in SQuAD, ``drop_f1`` as in DROP
    and ``count``, the number of rows.
  """
  pairs = [*zip(answers, references)]
  drop = [metrics.drop_metrics(a, [[r] for r in refs]) for a, refs in pairs]
  return {
      'f1': float(np.mean([metrics.span_f1(*pair) for pair in pairs])),
      'exact_match': float(np.mean([metrics.exact_match(*p) for p in pairs])),
      'drop_f1': float(np.mean([f1 for _, f1 in drop])),
      'count': len(pairs)}


def _lost(finite: np.ndarray) -> dict:
  """Returns the entry ``not_finite`` of a report, or {} if all is finite.

  Args:
    finite: Whether each row is finite, bools [R].
  """
  lost = int(np.sum(~finite))
  return {'not_finite': lost} if lost else {}


def is_finite(report: dict[str, Any]) -> bool:
  """Returns whether all scores and numbers of a report are finite.

  If not, the report does not show how good a model is, and its step is never
  selected as the best.
  """
  return 'not_finite' not in report and all(
      np.isfinite(v) for v in report.values())


def calibrate(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Finds an offset per class that maximises the accuracy of scores.

  For two classes this is the best threshold. The offsets correct a model's
  prior for its label words without any training, so a fine-tuned model should
  beat the calibrated accuracy of the untrained one.

  The offsets are found by coordinate ascent. Among equally good ones, the
  middle one is taken. Rows with scores that are not finite are ignored.

  Args:
    scores: Scores [R, C].
    labels: Right classes, integers [R].

  Returns:
    Offsets [C] to add to scores. The first is 0.
  """
  offsets, finite = np.zeros(scores.shape[1]), np.isfinite(scores).all(-1)
  if not finite.any():
    return offsets
  scores, labels = scores[finite], labels[finite]
  for _ in range(3 if scores.shape[1] > 2 else 1):
    for c in range(1, scores.shape[1]):
      others = np.delete(scores + offsets, c, axis=1).max(-1)
      # Above its edge, an offset of class c changes a row's prediction to c.
      # Accuracy changes only there, so one offset per interval is tried.
      edges = np.sort(others - scores[:, c])
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
  """Returns the numbers by which checkpoints are compared.

  Args:
    report: Report of the dev rows.
    metric: Name of the main metric.
    select: 'loss' to compare by the loss. Otherwise the metric is compared, if
      the report has it.

  Returns:
    A dict with ``score`` (higher is better) and ``loss``, which decides between
    equal scores and is the cross-entropy if the report has one. None if the
    report is not finite.
  """
  if not is_finite(report):
    return None
  loss = report.get('loss', 0.0)
  by_loss = select == 'loss' or metric == LOSS or metric not in report
  return {'score': -loss if by_loss else report[metric],
          'loss': report.get('cross_entropy', loss)}


# Names of the numbers of a report, except the value of a user's function. Those
# in `_SHARES` are between 0 and 1 and are formatted in percent.
_SHARES = ('accuracy', 'macro_f1', 'f1', 'exact_match', 'drop_f1')
_PLAIN = ('loss', 'cross_entropy', 'matthews')


def in_percent(name: str, report: dict[str, Any]) -> bool:
  """Returns whether a number of a report is a share, to format in percent.

  The value of a user's function is not a share. The mean of several tasks
  counts as a share unless the report has the value of a user's function.

  Args:
    name: Name of the number.
    report: Report with the number.
  """
  last = lambda name: name.rpartition('/')[2].removeprefix('calibrated_')
  if name == 'mean':
    return all(last(n) in _SHARES + _PLAIN for n, value in report.items()
               if isinstance(value, float) and n != 'mean')
  return last(name) in _SHARES


def spell_value(name: str, report: dict[str, Any]) -> str:
  """Formats a number of a report for a table.

  Shares and correlations are multiplied by 100 and get one decimal. Other
  numbers get four significant digits. The result is '' if the report has no
  such number.

  Args:
    name: Name of the number.
    report: The report.
  """
  if name not in report:
    return ''
  if in_percent(name, report) or name.endswith('matthews'):
    return f'{100 * report[name]:.1f}'
  return f'{report[name]:.4g}'


def spell_number(name: str, report: dict[str, Any]) -> str:
  """Formats a number of a report for a log line: ``65.5%`` or ``0.612``.

  Args:
    name: Name of the number.
    report: Report with the number.
  """
  value = report[name]
  return f'{value:.1%}' if in_percent(name, report) else f'{value:.3f}'


def spell(report: dict[str, Any]) -> str:
  """Formats a report for a log line: ``accuracy 65.5%, loss 0.612``."""
  out = [f'{name.replace("_", " ")} {spell_number(name, report)}'
         for name, value in report.items() if isinstance(value, float)]
  if 'not_finite' in report:
    out.append(f'{report["not_finite"]} of {report["count"]} rows have scores '
               'that are not finite')
  return ', '.join(out)


def peak_memory() -> int:
  """Returns the peak memory of this process so far, in bytes.

  This is the memory of the accelerator that held the most. On a CPU, which does
  not report it, it is the memory of the whole process.
  """
  stats = [d.memory_stats() or {} for d in jax.local_devices()]
  most = max(s.get('peak_bytes_in_use', 0) for s in stats)
  # ru_maxrss is in KiB, except on macOS, where it is in bytes.
  kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return most or kib * (1 if sys.platform == 'darwin' else 1024)
