"""Compares predicted classes with labels and generated texts with answers.

Macro F1 and the Matthews correlation are computed over all rows at once, by
scikit-learn. Exact match, token F1 and the two metrics of DROP are computed per
row and are then averaged over rows. Their value for a row is the best over its
acceptable answers.
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
  """Returns the mean of F1 over the classes that occur.

  A class occurs if it is among the predictions or the labels. F1 is 0 for a
  class that is only among one of them.

  Args:
    predictions: Predicted classes [R].
    labels: Right classes [R].

  Raises:
    ValueError: If there are no rows, or if the lengths differ.
  """
  from sklearn.metrics import f1_score  # slow to import
  zero: Any = 0  # scikit-learn takes a number but annotates a str.
  return float(f1_score(
      labels, predictions, average='macro', zero_division=zero))


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> float:
  """Returns the Matthews correlation for any number of classes.

  It is 0 if all predictions or all labels are of one class.

  Args:
    predictions: Predicted classes [R].
    labels: Right classes [R].

  Raises:
    ValueError: If there are no rows, or if the lengths differ.

  References:
    Gorodkin (2004), Comparing two K-category assignments by a K-category
      correlation coefficient.
  """
  from sklearn.metrics import matthews_corrcoef  # slow to import
  classes = np.unique(np.concatenate([predictions, labels]))
  if len(classes) == 1:  # scikit-learn would print a warning.
    return 0.0
  return float(matthews_corrcoef(labels, predictions))


def normalize_answer(text: str) -> str:
  """Normalises a text as the script of SQuAD v1.1 does.

  The result is in lower case, without ASCII punctuation and without the
  articles a, an and the. Its words are separated by single spaces.

  Args:
    text: Text to normalise.

  References:
    Rajpurkar et al. (2016), SQuAD: 100,000+ Questions for Machine Comprehension
      of Text.
  """
  bare = text.lower().translate(_NO_PUNCTUATION)
  return ' '.join(_ARTICLES.sub(' ', bare).split())


def _check(answers) -> None:
  """Raises ValueError unless the answers are a list of at least one."""
  if isinstance(answers, str) or not len(answers):
    raise ValueError(
        f'answers must be a list of at least one answer, got {answers!r}.')


def exact_match(prediction: str, answers: Sequence[str]) -> float:
  """Returns 1 if the prediction equals an answer after normalisation, else 0.

  This is exact match as in SQuAD v1.1 (Rajpurkar et al., 2016).

  Args:
    prediction: Generated text.
    answers: Acceptable answers.

  Raises:
    ValueError: If there are no answers, or if they are one text.
  """
  _check(answers)
  prediction = normalize_answer(prediction)
  return float(any(prediction == normalize_answer(a) for a in answers))


def span_f1(prediction: str, answers: Sequence[str]) -> float:
  r"""Returns the F1 of the tokens of a prediction with the best answer.

  For the multisets P and A of normalised tokens of prediction and answer,

  .. math:: F_1 = \frac{2 |P \cap A|}{|P| + |A|},

  or 0 if both are empty, as in SQuAD v1.1 (Rajpurkar et al., 2016).

  If the first answer is ``'CANNOTANSWER'`` or ``'no answer'``, the question has
  no answer. The result is then `exact_match` with that text, as in the code of
  Malladi et al. (2023).

  Args:
    prediction: Generated text.
    answers: Acceptable answers.

  Raises:
    ValueError: If there are no answers, or if they are one text.
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
  r"""Returns exact match and F1 of DROP, each with the best answer.

  The prediction and every answer are a list of spans, or one span. Spaces and
  hyphens separate the tokens of a span. Tokens are in lower case, without
  punctuation and articles, and numbers are written as ``str(float(token))``.

  F(P, G) is the F1 of the *sets* of tokens of a predicted span P and a gold
  span G. It is 0 if the gold span contains numbers and the predicted span
  contains none of them. Over the one-to-one matchings M of m predicted spans to
  n gold spans,

  .. math:: F_1 = \max_M \frac{1}{\max(m, n)} \sum_{(P, G) \in M} F(P, G),

  rounded to two decimals. The match is exact if prediction and answer have the
  same number of spans and the same spans, with the tokens of a span in the same
  order. An answer whose first span is blank counts as 0.

  The metrics are those of the later version of the script of Dua et al. (2019).
  Its first version matched spans greedily and did not penalise superfluous
  spans.

  Args:
    prediction: Predicted spans.
    answers: Acceptable answers.

  Returns:
    A pair (exact match, F1) of floats in [0, 1].

  Raises:
    ValueError: If there are no answers, if they are one text, or if an answer
      has no spans.

  References:
    Dua et al. (2019), DROP: A Reading Comprehension Benchmark Requiring
      Discrete Reasoning Over Paragraphs; allennlp_models, rc/tools/drop.py.
  """
  _check(answers)
  found = [_drop_tokens(span) for span in _spans(prediction)]
  best_match, best_f1 = 0.0, 0.0
  for spans in map(_spans, answers):
    if not spans:
      raise ValueError(f'an answer in {answers!r} has no spans; each needs at '
                       'least one.')
    if spans[0].strip():
      gold = [_drop_tokens(span) for span in spans]
      match = set(found) == set(gold) and len(found) == len(gold)
      best_match = max(best_match, float(match))
      best_f1 = max(best_f1, _drop_f1(found, gold))
  return best_match, best_f1


def _spans(spans: str | Sequence[str]) -> list[str]:
  """Returns one span or several spans as a list."""
  return [spans] if isinstance(spans, str) else list(spans)


def _number(token: str) -> str | None:
  """Returns the normalised text of a number, or None for another token."""
  try:
    return str(float(token))
  except ValueError:
    return None


def _drop_tokens(span: str) -> tuple[str, ...]:
  """Splits a span into the normalised tokens of DROP."""
  tokens = []
  for token in re.split('[ -]', span.lower()):
    bare = token.translate(_NO_PUNCTUATION)
    # '1.5' is a number as it is and keeps its point. '$1,500' becomes a number
    # only without punctuation.
    token = _number(token) or _number(bare) or bare
    tokens += _ARTICLES.sub(' ', token).split()
  return tuple(tokens)


def _drop_f1(found: list[tuple[str, ...]], gold: list[tuple[str, ...]]):
  """Returns the F1 of two lists of spans under the best one-to-one matching."""
  from scipy.optimize import linear_sum_assignment  # slow to import
  scores = np.zeros((len(gold), len(found)))
  for i, g in enumerate(map(set, gold)):
    numbers = set(filter(_number, g))
    for j, p in enumerate(map(set, found)):
      common = len(p & g)
      if common and (not numbers or numbers & p):
        # 2 common / (|P| + |G|) is the same in exact arithmetic. But its last
        # bit may differ from DROP's script, and could change the rounding.
        precision, recall = common / len(p), common / len(g)
        scores[i, j] = 2 * precision * recall / (precision + recall)
      elif not p and not g:  # Both have only articles and punctuation.
        scores[i, j] = 1
  rows, columns = linear_sum_assignment(scores, maximize=True)
  matched = np.zeros(max(scores.shape))
  matched[rows] = scores[rows, columns]
  return float(np.round(matched.mean(), 2))
