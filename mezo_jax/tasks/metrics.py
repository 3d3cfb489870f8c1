r"""How good predictions are: classes against labels, texts against answers.

Accuracy, macro F1 and Matthews correlation are of all rows at once. Exact
match, token F1 and DROP's pair are of one row, to be averaged over rows; each
is the best over the row's acceptable answers.
"""

from collections import Counter
from collections.abc import Sequence
import re
import string

import numpy as np

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)
_UNANSWERABLE = ('CANNOTANSWER', 'no answer')


def _confusion(predictions, labels) -> np.ndarray:
  """Counts [C, C] by (label, prediction) over the C classes that occur."""
  predictions, labels = np.asarray(predictions), np.asarray(labels)
  if predictions.shape != labels.shape or labels.ndim != 1 or not labels.size:
    raise ValueError(
        'predictions and labels have to be two [R] arrays of at least one row, '
        f'not of shapes {predictions.shape} and {labels.shape}.')
  classes, index = np.unique(
      np.concatenate([labels, predictions]), return_inverse=True)
  counts = np.zeros((len(classes), len(classes)), np.int64)
  np.add.at(counts, tuple(np.split(index, 2)), 1)
  return counts


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
  """The share of rows whose prediction is the label; [R] integers each.

  Raises:
    ValueError: if there are no rows, or the two do not match in shape.
  """
  counts = _confusion(predictions, labels)
  return float(np.trace(counts) / counts.sum())


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
  r"""The mean over classes of F1; [R] integers each.

  With TP, FP and FN the true positives, false positives and false negatives of
  one class,

  .. math:: F_1 = \frac{2 TP}{2 TP + FP + FN}

  The classes are those that occur among the labels or the predictions, as in
  scikit-learn's ``f1_score(average='macro')``.

  Raises:
    ValueError: if there are no rows, or the two do not match in shape.
  """
  counts = _confusion(predictions, labels)
  return float(np.mean(
      2 * np.diag(counts) / (counts.sum(0) + counts.sum(1))))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
  r"""Matthews correlation of any number of classes; [R] integers each.

  With c of s rows right, class k predicted for :math:`p_k` of them and true of
  :math:`t_k`,

  .. math::

    R_K = \frac{c s - \sum_k p_k t_k}
               {\sqrt{(s^2 - \sum_k p_k^2)(s^2 - \sum_k t_k^2)}}

  and 0 where that is 0 / 0, because all predictions or all labels are one
  class (Gorodkin, 2004). Two classes give the usual formula (Matthews, 1975).

  Raises:
    ValueError: if there are no rows, or the two do not match in shape.
  """
  counts = _confusion(predictions, labels)
  c, s = np.trace(counts), counts.sum()
  p, t = counts.sum(0), counts.sum(1)
  # Their product is of order s^4, which int64 holds to 55 000 rows only.
  spread = float(s**2 - p @ p) * float(s**2 - t @ t)
  return float((c * s - p @ t) / np.sqrt(spread)) if spread else 0.0


def normalize_answer(text: str) -> str:
  """Lower case, no ASCII punctuation, no a, an or the, single spaces.

  As in the script of SQuAD v1.1 (Rajpurkar et al., 2016).
  """
  bare = text.lower().translate(_NO_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', bare).split())


def _check(answers) -> None:
  if isinstance(answers, str) or not len(answers):
    raise ValueError(
        f'the answers have to be a list of at least one, not {answers!r}.')


def exact_match(prediction: str, answers: Sequence[str]) -> float:
  """1 if the prediction is one of the answers, both normalised; else 0.

  SQuAD v1.1 (Rajpurkar et al., 2016).

  Raises:
    ValueError: if there are no answers, or one text instead of a list.
  """
  _check(answers)
  prediction = normalize_answer(prediction)
  return float(any(prediction == normalize_answer(a) for a in answers))


def span_f1(prediction: str, answers: Sequence[str]) -> float:
  r"""F1 of the tokens of prediction and answer, with the best of the answers.

  With the multisets P and A of their tokens, normalised,

  .. math:: F_1 = \frac{2 |P \cap A|}{|P| + |A|}

  and 0 if both are empty (SQuAD v1.1, Rajpurkar et al., 2016). A question
  without an answer, whose first one is ``'CANNOTANSWER'`` or ``'no answer'``,
  counts as `exact_match` with that (Malladi et al., 2023, in its code).

  Raises:
    ValueError: if there are no answers, or one text instead of a list.
  """
  _check(answers)
  if answers[0] in _UNANSWERABLE:
    return exact_match(prediction, answers[:1])
  found = normalize_answer(prediction).split()

  def f1(answer: str) -> float:
    tokens = normalize_answer(answer).split()
    common = (Counter(found) & Counter(tokens)).total()
    return 2 * common / max(1, len(found) + len(tokens))

  return max(map(f1, answers))


def drop_metrics(prediction: str | Sequence[str],
                 answers: Sequence[str | Sequence[str]]) -> tuple[float, float]:
  r"""Exact match and F1 of DROP, each the best over the answers.

  The prediction and every answer are a list of spans, or one span. A span's
  tokens are what spaces and hyphens separate: lower case, without punctuation
  and articles, numbers as ``str(float(token))``. With F(P, G) the F1 of the
  *sets* of tokens of a predicted and a gold span, but 0 where the gold span
  holds numbers and the predicted one none of them, and M the one-to-one
  matchings of m predicted to n gold spans,

  .. math:: F_1 = \max_M \frac{1}{\max(m, n)} \sum_{(P, G) \in M} F(P, G)

  to two decimals. The match is exact if both have as many spans and the same
  ones, their tokens in order. An answer whose first span is blank counts 0.

  As in the script of Dua et al. (2019), in its later form (allennlp_models,
  rc/tools/drop.py); the first one matched greedily and let superfluous spans
  pass.

  Raises:
    ValueError: if there are no answers, one text instead of a list, or an
      answer without spans.
  """
  _check(answers)
  found = [_drop_tokens(span) for span in _spans(prediction)]
  best_match, best_f1 = 0.0, 0.0
  for spans in map(_spans, answers):
    if not spans:
      raise ValueError(f'one of the answers {answers!r} has no spans.')
    if spans[0].strip():
      gold = [_drop_tokens(span) for span in spans]
      match = set(found) == set(gold) and len(found) == len(gold)
      best_match = max(best_match, float(match))
      best_f1 = max(best_f1, _drop_f1(found, gold))
  return best_match, best_f1


def _spans(spans: str | Sequence[str]) -> list[str]:
  return [spans] if isinstance(spans, str) else list(spans)


def _number(token: str) -> str | None:
  try:
    return str(float(token))
  except ValueError:
    return None


def _drop_tokens(span: str) -> tuple[str, ...]:
  tokens = []
  for token in re.split('[ -]', span.lower()):
    bare = token.translate(_NO_PUNCTUATION)
    # 1.5 is a number and keeps its point; $1,500 is one without punctuation.
    token = _number(token) or _number(bare) or bare
    tokens += _ARTICLES.sub(' ', token).split()
  return tuple(tokens)


def _drop_f1(found: list[tuple[str, ...]], gold: list[tuple[str, ...]]):
  """F1 of two lists of spans under the best one-to-one matching."""
  from scipy.optimize import linear_sum_assignment  # slow to import
  scores = np.zeros((len(gold), len(found)))
  for i, g in enumerate(map(set, gold)):
    numbers = set(filter(_number, g))
    for j, p in enumerate(map(set, found)):
      common = len(p & g)
      if common and (not numbers or numbers & p):
        # Not 2 common / (|P| + |G|): the last bit can decide the rounding.
        precision, recall = common / len(p), common / len(g)
        scores[i, j] = 2 * precision * recall / (precision + recall)
      elif not p and not g:  # nothing but articles and punctuation
        scores[i, j] = 1
  rows, columns = linear_sum_assignment(scores, maximize=True)
  matched = np.zeros(max(scores.shape))
  matched[rows] = scores[rows, columns]
  return float(np.round(matched.mean(), 2))
