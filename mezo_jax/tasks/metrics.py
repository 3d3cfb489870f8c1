"""Metrics of classes against labels and of texts against answers.

Macro F1 and Matthews correlation, by scikit-learn, are computed over all rows
at once. Exact match, token F1 and the two metrics of DROP are computed for one
row, to be averaged over rows. Each is the best over the row's acceptable
answers.
"""

from collections import Counter
from collections.abc import Sequence
import re
import string
from typing import Any

import numpy as np

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_NO_PUNCTUATION = str.maketrans('', '', string.punctuation)
_UNANSWERABLE = ('CANNOTANSWER', 'no answer')


def macro_f1(predictions: Sequence[int] | np.ndarray,
             labels: Sequence[int] | np.ndarray) -> float:
  """Returns the mean of F1 over the classes that labels or predictions have.

  Raises:
    ValueError: If there are no rows, or the two do not match in length.
  """
  from sklearn.metrics import f1_score  # slow to import
  zero: Any = 0  # scikit-learn takes numbers too, and annotates texts alone
  return float(f1_score(
      labels, predictions, average='macro', zero_division=zero))


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> float:
  """Returns the Matthews correlation of any number of classes (Gorodkin, 2004).

  It is 0 where all predictions or all labels are of one class.

  Raises:
    ValueError: If there are no rows, or the two do not match in length.
  """
  from sklearn.metrics import matthews_corrcoef  # slow to import
  classes = np.unique(np.concatenate([predictions, labels]))
  if len(classes) == 1:  # scikit-learn would print a warning
    return 0.0
  return float(matthews_corrcoef(labels, predictions))


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
