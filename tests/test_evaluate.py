"""Reports of scores and of texts."""

import numpy as np
import pytest

from mezo_jax import evaluate


def test_reports_of_scores():
  scores = np.log([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
  report = evaluate.report(
      scores, [(0, 2), (1,), (1, 0)], metric='macro_f1')
  assert report['accuracy'] == pytest.approx(2 / 3)
  assert report['loss'] == pytest.approx(-np.log([0.2, 0.3, 0.8]).mean())
  # Of the first right answers 0, 1, 1 and predictions 2, 0, 1.
  assert report['macro_f1'] == pytest.approx((0 + 2 / 3 + 0) / 3)
  assert report['count'] == 3
  shifted = evaluate.report(
      scores, np.array([0, 1, 1]), offsets=np.array([0, 1.0, 0]))
  assert shifted['accuracy'] == pytest.approx(1 / 3)
  assert shifted['calibrated_accuracy'] == pytest.approx(2 / 3)


def test_reports_of_texts():
  report = evaluate.report_texts(
      ['the Denver Broncos!', '7', ''],
      [['no', 'Denver Broncos'], ['7 points', 'eight'], ['a word']])
  assert report == {
      'f1': pytest.approx((1 + 2 / 3 + 0) / 3),
      'exact_match': pytest.approx(1 / 3),
      'drop_f1': pytest.approx((1 + 0.67 + 0) / 3), 'count': 3}
