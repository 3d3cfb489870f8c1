"""Turns the answers of a model into one record for each row.

A record is a dict of JSON values, a line of ``predictions.jsonl``:

* ``index``: number of the row in its file, from 0;
* ``prediction``: name of the predicted class, chosen candidate or generated
  text, or None if the scores of the row are not finite;
* ``gold``: the right answer in the same form, or a list if several are right;
* ``correct``: whether the prediction is right. A generated text is right if it
  equals a right answer after the normalisation of SQuAD;
* ``probabilities``: the softmax of the scores over the classes, as a dict from
  their names, or over the candidates of the row, as a list. Generated texts
  have none.

Rows without a right answer have neither ``gold`` nor ``correct``.
"""

from collections.abc import Sequence
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from mezo_jax.tasks import evaluate, metrics
from mezo_jax.tasks.encode import Encoded
from mezo_jax.tasks.task import Task

FILE = 'predictions.jsonl'  # name of the file in a working directory


def of_rows(task: Task, data: Encoded, answers: Any,
            index: Sequence[int] = ()) -> list[dict[str, Any]]:
  """Returns the predictions of rows, in the order of their indices.

  Args:
    task: Task of the rows.
    data: The tokenised rows.
    answers: Answers from `mezo_jax.tasks.evaluate.make_evaluator`. With None
      there are no predictions.
    index: Index of each row in its file. Defaults to (), for 0, 1, 2, ...
  """
  if answers is None:
    return []
  of_row = _of_text if data.generates else _of_scores
  out = [{'index': int(index[i]) if len(index) else i,
          **of_row(task, data, i, answers[i])} for i in range(len(data.rows))]
  return sorted(out, key=lambda row: row['index'])


def _of_text(task: Task, data: Encoded, i: int, text: str) -> dict[str, Any]:
  """Returns the prediction of a row whose answer is generated."""
  out: dict[str, Any] = {'prediction': text}
  if task.has_gold(data.rows[i]):
    right = task.references(data.rows[i])
    out['gold'] = _one_or_all(right)
    out['correct'] = bool(metrics.exact_match(text, right))
  return out


def _of_scores(task: Task, data: Encoded, i: int, scores: np.ndarray
               ) -> dict[str, Any]:
  """Returns the prediction of a row whose candidates have scores."""
  if task.traits.classes:
    names = class_names(task)
  else:
    names = [text.strip() for text in task.candidates(data.rows[i])]
  scores = np.asarray(scores, np.float64)[:len(names)]
  chosen = int(evaluate.predictions(scores[None])[0])
  out: dict[str, Any] = {'prediction': None if chosen < 0 else names[chosen]}
  golds = data.golds[i]
  if golds:
    out['gold'] = _one_or_all([names[g] for g in golds])
    out['correct'] = chosen in golds
  if chosen >= 0:
    e = np.exp(scores - scores.max())
    # Six decimals hide the rounding errors of float32.
    shares = [round(float(p), 6) for p in e / e.sum()]
    out['probabilities'] = (
        dict(zip(names, shares)) if task.traits.classes else shares)
  return out


def _one_or_all(texts: list[str]) -> Any:
  """Returns the only text of a list, or the list if there are several."""
  return texts[0] if len(texts) == 1 else texts


def class_names(task: Task) -> list[str]:
  """Returns the names by which the classes of a task are reported.

  These are the names that labels are compared with, or the label words if
  these names are not unique.

  Args:
    task: A task with classes.
  """
  return [*(task.class_names or task.label_words)]


def of_classes(task: Task, rows: Sequence[dict[str, Any]]
               ) -> dict[str, dict[str, float]]:
  """Returns how well each class is predicted.

  Args:
    task: The task.
    rows: Predictions from `of_rows`.

  Returns:
    A dict from the name of each class to ``count`` (rows of the class),
    ``predicted`` (rows with this prediction), ``precision``, ``recall`` (the
    accuracy on the rows of the class) and ``f1``. A quotient of 0 and 0 is 0.
    The result is {} if the task has no classes or rows lack a right answer.
  """
  if not (task.traits.classes and rows and all('gold' in r for r in rows)):
    return {}
  out = {}
  for name in class_names(task):
    count = sum(row['gold'] == name for row in rows)
    predicted = sum(row['prediction'] == name for row in rows)
    right = sum(row['gold'] == row['prediction'] == name for row in rows)
    out[name] = {
        'count': count, 'predicted': predicted,
        'precision': right / max(predicted, 1), 'recall': right / max(count, 1),
        'f1': 2 * right / max(predicted + count, 1)}
  return out


def report(task: Task, data: Encoded, answers: Any, metric: str
           ) -> dict[str, Any]:
  """Returns the metrics of the rows that have a right answer.

  Args:
    task: Task of the rows.
    data: The tokenised rows.
    answers: Answers from `mezo_jax.tasks.evaluate.make_predictor`.
    metric: Metric of classes or candidates in addition to the accuracy.

  Returns:
    A report as in `mezo_jax.tasks.evaluate`, or {} if no row has a right
    answer.
  """
  known = [i for i, row in enumerate(data.rows) if task.has_gold(row)]
  if not known:
    return {}
  if data.generates:
    return evaluate.report_texts(
        [answers[i] for i in known],
        [task.references(data.rows[i]) for i in known])
  return evaluate.report(
      answers[known], [data.golds[i] for i in known], metric=metric)


def write(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]]
          ) -> None:
  """Writes predictions as one JSON object a line.

  The file is replaced at once, so no reader sees a part of it.

  Args:
    path: The file.
    rows: Predictions from `of_rows`.
  """
  path = Path(path)
  part = path.with_name(path.name + '.part')
  part.write_text(''.join(map(line, rows)), encoding='utf-8')
  part.replace(path)


def line(row: dict[str, Any]) -> str:
  """Returns a prediction as a line of JSON."""
  return json.dumps(row, ensure_ascii=False) + '\n'
