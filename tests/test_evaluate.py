"""Reports of scores and of texts."""

import conftest
import helpers
import numpy as np
import pytest
import runs

from mezo_jax import peft
from mezo_jax.tasks import evaluate
from mezo_jax.training import build


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


def test_dev_and_test_rows_share_programs(reviews_file, tmp_path):
  model_dir = conftest.write_tiny_model(  # no test before has its programs
      tmp_path / 'model', intermediate_size=48)
  config = runs.small_config(model_dir, reviews_file, data__num_dev=40)
  built = build.build(config, say=lambda text: None)
  params = peft.join(built.params, built.frozen)
  asked = []
  for _ in range(2):  # a run after another, too
    ask = build.make_evaluators(
        config, built.model, built.splits, built.tokenizer, built.mesh)
    with helpers.compilations() as seen:
      asked.append((ask.dev(params), len(seen)))
      asked.append((ask.test(params)[0], len(seen)))
  assert 0 < asked[0][1] == asked[1][1] and asked[-1][1] == 0
  assert asked[0][0] == asked[2][0] != asked[1][0] == asked[3][0]


def test_reports_of_texts():
  report = evaluate.report_texts(
      ['the Denver Broncos!', '7', ''],
      [['no', 'Denver Broncos'], ['7 points', 'eight'], ['a word']])
  assert report == {
      'f1': pytest.approx((1 + 2 / 3 + 0) / 3),
      'exact_match': pytest.approx(1 / 3),
      'drop_f1': pytest.approx((1 + 0.67 + 0) / 3), 'count': 3}
