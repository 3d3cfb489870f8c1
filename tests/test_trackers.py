"""Trackers: they show what metrics.jsonl has, and never disturb a run."""

import json
import time

import helpers
import pytest
import runs

from mezo_jax.core.errors import InputError
from mezo_jax.runs import loggers, trackers
from mezo_jax.training import checks
from mezo_jax.training import config as config_lib
import train


class Fake:
  """Keeps what it gets, and raises an exception in the methods of `fails`."""

  fails, calls = '', []

  def start(self, config, workdir, run_id, step, sent):
    self._call('start', run_id, config, step, sent)

  def log(self, step, kind, values):
    self._call('log', step, kind, values)

  def finish(self, result):
    self._call('finish', result)

  def _call(self, name, *values):
    if name == self.fails:
      raise RuntimeError('no\nnetwork')
    self.calls.append((name, *values))


@pytest.fixture
def fake(monkeypatch):
  """Returns a tracker named 'fake', which keeps its calls."""
  class Mine(Fake):
    calls = []
  monkeypatch.setitem(trackers.TRACKERS, 'fake', (Mine, 'json'))
  monkeypatch.setattr(trackers, 'NAMES', (*trackers.NAMES, 'fake'))
  return Mine


def process(workdir, start, end, names=('fake',), said=None, config=None):
  """Records steps up to ``end`` as a run that resumes from ``start`` does."""
  said = [] if said is None else said
  earlier = loggers.read(workdir / 'metrics.jsonl')
  mirror = trackers.Mirror(names, said.append)
  metrics = loggers.Metrics(workdir, start, mirror.log)
  mirror.start(config, workdir, start, metrics.records, len(earlier))
  for step in range(start + 1, end + 1):
    metrics.write('train', step, loss=1 / step, projected_grad=[1.0])
    if step % 4 == 0:
      metrics.write('dev', step, accuracy=0.5, count=3)
  metrics.close()
  return mirror


def sent(fake):
  """Returns the steps and kinds of all records that the tracker got."""
  return [call[1:3] for call in fake.calls if call[0] == 'log']


def written(workdir):
  """Returns the same of metrics.jsonl."""
  return [(r['step'], r['kind'])
          for r in loggers.read(workdir / 'metrics.jsonl')]


def test_a_tracker_gets_the_numbers_of_each_record_once(fake, tmp_path):
  """Also if a resumed run computes steps again, twice."""
  process(tmp_path, 0, 6, config={'steps': 9})
  process(tmp_path, 3, 5, config={'steps': 9})
  process(tmp_path, 4, 9, config={'steps': 9}).finish({'accuracy': 0.5})
  assert sent(fake) == written(tmp_path)
  starts = [call for call in fake.calls if call[0] == 'start']
  assert len({run_id for _, run_id, *_ in starts}) == 1
  assert [call[3:] for call in starts] == [(0, 0), (3, 7), (4, 7)]
  assert starts[0][2] == {'steps': 9}
  assert fake.calls[1] == ('log', 1, 'train', {'loss': 1.0})
  assert fake.calls[-1] == ('finish', {'accuracy': 0.5})


def test_a_tracker_that_is_added_gets_what_it_lacks(fake, tmp_path):
  process(tmp_path, 0, 3, ('jsonl',))
  assert not fake.calls and not (tmp_path / 'trackers.json').exists()
  process(tmp_path, 3, 5)
  process(tmp_path, 5, 8, ())
  process(tmp_path, 8, 9)
  assert sent(fake) == written(tmp_path)


@pytest.mark.parametrize('method', ['start', 'log', 'finish'])
def test_a_tracker_that_fails_is_reported_once(fake, tmp_path, method):
  fake.fails, said = method, []
  process(tmp_path, 0, 5, said=said).finish({'accuracy': 0.5})
  assert len(said) == 1 and 'RuntimeError' in said[0] and '\n' not in said[0]
  assert len(written(tmp_path)) == 6
  fake.fails = ''  # the next process sends what is missing
  process(tmp_path, 5, 6, said=said)
  assert len(said) == 1 and sent(fake) == written(tmp_path)


def test_a_file_of_ids_that_is_damaged_starts_another_run(fake, tmp_path):
  process(tmp_path, 0, 2)
  (tmp_path / 'trackers.json').write_text('{"fake": {"id"')
  process(tmp_path, 2, 3)
  assert len({call[1] for call in fake.calls if call[0] == 'start'}) == 2


def test_names_and_packages_are_checked(monkeypatch):
  config = runs.small_config('model', 'rows.jsonl', loggers=('wandb', 'wand'))
  with pytest.raises(InputError, match='loggers.*wandb'):
    checks.check_config(config)
  monkeypatch.setattr(trackers, '_installed', lambda package: False)
  trackers.Mirror(('auto', 'jsonl'), print)
  for name, (_, package) in trackers.TRACKERS.items():
    with pytest.raises(InputError, match=f'pip install {package}'):
      trackers.Mirror((name,), print)


def test_a_run_may_resume_with_other_trackers():
  config = config_lib.Train(loggers=('wandb',))
  config_lib.check_same_run(config, config_lib.to_json(config_lib.Train()))


def test_tensorboard_is_written(tmp_path):
  pytest.importorskip('tensorboardX')
  process(tmp_path, 0, 4, ('tensorboard',)).finish(None)
  files = [*(tmp_path / 'tensorboard').iterdir()]
  assert files and b'train/loss' in b''.join(f.read_bytes() for f in files)


def stored(data):
  """Yields the records in a file of wandb, which has the format of LevelDB."""
  at, whole, block = 7, b'', 2**15
  while at < len(data):
    if block - at % block < 7:  # too short for a header
      at += block - at % block
      continue
    length, kind = int.from_bytes(data[at + 4:at + 6], 'little'), data[at + 6]
    whole, at = whole + data[at + 7:at + 7 + length], at + 7 + length
    if kind in (1, 4):  # a whole record, or its last part
      yield whole
      whole = b''


@pytest.mark.slow
def test_wandb_continues_its_run(tmp_path, monkeypatch):
  pytest.importorskip('wandb')
  from wandb.proto import wandb_internal_pb2
  monkeypatch.setenv('WANDB_MODE', 'offline')
  said = []
  process(tmp_path, 0, 4, ('wandb',), said, {'steps': 6}).finish(None)
  time.sleep(2.0)  # wandb names its files by the second in which it starts
  process(tmp_path, 2, 6, ('wandb',), said, {'steps': 6}).finish(
      {'accuracy': 0.5})
  assert not said
  ids, steps, numbers = set(), [], []
  for file in sorted((tmp_path / 'wandb').glob('offline-run-*/*.wandb')):
    for data in stored(file.read_bytes()):
      record = wandb_internal_pb2.Record.FromString(data)
      if record.HasField('run'):
        ids.add(record.run.run_id)
      if record.HasField('history'):
        items = {'/'.join(item.nested_key) or item.key: item.value_json
                 for item in record.history.item}
        kind, = {name.partition('/')[0] for name in items if '/' in name}
        steps.append((int(items['step']), kind))
        numbers.append(int(items['_step']))
  assert ids == {json.loads(
      (tmp_path / 'trackers.json').read_text())['wandb']['id']}
  assert steps == written(tmp_path) and numbers == [*range(len(steps))]


@pytest.mark.slow
def test_trackio_gets_the_records(tmp_path, monkeypatch):
  # trackio reads the variable when it is imported.
  monkeypatch.setenv('TRACKIO_DIR', str(tmp_path / 'trackio'))
  pytest.importorskip('trackio')
  said = []
  process(tmp_path, 0, 4, ('trackio',), said).finish({'accuracy': 0.5})
  assert not said
  assert [*(tmp_path / 'trackio').rglob('*mezo_jax*')]


@pytest.mark.slow
@pytest.mark.parametrize('fails', ['', 'log'])
def test_a_run_is_the_same_with_a_tracker(
    fake, fails, tiny_dir, reviews_file, tmp_path, capsys):
  """And the tracker has the config, the records and the result."""
  fake.fails = fails
  config = runs.small_config(tiny_dir, reviews_file, loggers=('jsonl',))
  train.run(config, tmp_path / 'alone')
  config.loggers = ('fake',)
  result = train.run(config, tmp_path / 'mine')
  assert runs.records(tmp_path / 'mine') == runs.records(tmp_path / 'alone')
  helpers.assert_bitwise(runs.saved(tmp_path / 'mine')[1],
                         runs.saved(tmp_path / 'alone')[1])
  assert ('fake failed' in capsys.readouterr().out) == bool(fails)
  if not fails:
    assert sent(fake) == written(tmp_path / 'mine')
    assert fake.calls[0][2]['steps'] == config.steps
    assert fake.calls[-1][1]['accuracy'] == result['final']['accuracy']


@pytest.mark.slow
def test_a_private_run_shows_its_records_alone(
    fake, tiny_dir, reviews_file, tmp_path, capsys):
  pytest.importorskip('dp_accounting')
  config = runs.small_config(
      tiny_dir, reviews_file, method='private', loggers=('fake',),
      data__max_length=32, data__buckets=(32,))
  train.run(config, tmp_path)
  assert fake.calls[0][2] is None and fake.calls[-1] == ('finish', {})
  assert sent(fake) == written(tmp_path)
  assert not any('loss' in values for _, _, kind, values in (
      call for call in fake.calls if call[0] == 'log') if kind == 'train')
  assert not (tmp_path / 'answers.jsonl').exists()
  assert ' -> ' not in capsys.readouterr().out
