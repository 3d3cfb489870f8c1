"""Data of one's own: how rows are split, and what is said about it."""

import json

import conftest
import pytest
import runs

from mezo_jax.cli.command_line import read_config
from mezo_jax.core.errors import InputError
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import Task
from mezo_jax.training import build, checks
from mezo_jax.training import config as config_lib
from mezo_jax.training.config import Data
import train

OWN = str(conftest.ROOT / 'configs/own.py')
TASK = Task(template='{text} It was', label_words=(' terrible', ' great'))


def rows_of(number, label=lambda i: i % 2):
  words = conftest.WORDS
  return [{'text': f'{words[i % 16]} {words[i // 16 % 16]} story',
           'label': label(i)} for i in range(number)]


def write(path, rows):
  path.write_text('\n'.join(map(json.dumps, rows)))
  return str(path)


def split(path, **changes):
  d = Data(**dict(train=path, num_train=-1, num_dev=-1, num_test=-1) | changes)
  rows = data_lib.read_rows(d, TASK)
  return len(rows.train), len(rows.dev), len(rows.test)


@pytest.mark.parametrize('rows,numbers,want', [
    (230, (-1, -1, -1), (138, 46, 46)), (230, (100, 50, -1), (100, 50, 80)),
    (230, (100, -1, -1), (100, 65, 65)), (230, (-1, 50, 80), (100, 50, 80)),
    (230, (-1, -1, 0), (173, 57, 0)), (230, (100, 50, 80), (100, 50, 80)),
    (100_000, (-1, -1, -1), (98_500, 500, 1000)), (3, (-1, -1, -1), (1, 1, 1)),
    (2, (-1, -1, 0), (1, 1, 0))])
def test_shares(rows, numbers, want):
  assert data_lib.share_out(rows, *numbers) == want


@pytest.mark.parametrize('changes,fields', [
    (dict(num_train=100, num_dev=50, num_test=400), ['data.num_test to 80']),
    (dict(num_train=1000, num_dev=50, num_test=40), ['data.num_train to 140']),
    (dict(num_train=100, num_dev=500, num_test=40), ['data.num_dev to 90']),
    (dict(num_train=1000, num_dev=500, num_test=1000),
     ['num_test, ', 'num_dev, ', 'num_train']),
    (dict(num_train=230), ['num_train 230']),
    (dict(num_train=200, num_dev=30), ['num_train 200', 'num_dev 30']),
    (dict(k_shot=100), ['k_shot']),
    (dict(k_shot=20, num_test=200), ['k_shot', 'num_test'])])
def test_too_few_rows_name_the_number_to_lower(tmp_path, changes, fields):
  path = write(tmp_path / 'x.jsonl', rows_of(230))
  with pytest.raises(InputError) as e:
    split(path, **changes)
  for field in fields:
    assert field in str(e.value)


@pytest.mark.parametrize('number', [1, 2])
def test_one_row(tmp_path, number):
  path = write(tmp_path / 'x.jsonl', rows_of(number))
  with pytest.raises(InputError, match=f' {number} row'):
    split(path)


def test_a_test_file_without_a_dev_file(tmp_path):
  """Dev rows come from the train file; test rows are all of the test file."""
  path = write(tmp_path / 'x.jsonl', rows_of(40))
  test = write(tmp_path / 'y.jsonl', rows_of(30))
  assert split(path, test=test) == (30, 10, 30)
  assert split(path, test=test, num_test=0) == (30, 10, 30)
  assert split(path, test=test, num_test=9) == (30, 10, 9)
  with pytest.raises(InputError, match='data.num_train to 35'):
    split(path, test=test, num_train=36, num_dev=5, num_test=9)


def test_k_rows_of_each_label(tmp_path):
  path = write(tmp_path / 'x.jsonl', rows_of(100))
  assert split(path, k_shot=8) == (16, 16, 20)
  path = write(tmp_path / 'z.jsonl', rows_of(100, lambda i: 0))
  with pytest.raises(InputError, match='label 1, .*data.k_shot'):
    split(path, k_shot=8)


@pytest.mark.parametrize('changes,message', [
    (dict(num_dev=0), 'data.num_dev is 0'),
    (dict(num_train=0), 'data.num_train is 0'),
    (dict(num_train=-2), 'data.num_train is -2'),
    (dict(num_test=0), 'data.num_test is 0 .*data.test'),
    (dict(k_shot=-1), 'data.k_shot is -1'), (dict(seed=-1), 'data.seed is -1')])
def test_numbers_that_cannot_be(changes, message):
  config = config_lib.Train(task=TASK, data=Data(train='x', **changes))
  with pytest.raises(InputError, match=message):
    checks.check_config(config)


@pytest.fixture
def own(tiny_dir, tmp_path):
  """A config as README's command for own data makes it, of 230 rows."""
  path = write(tmp_path / 'x.jsonl', rows_of(230))
  return read_config(OWN, [
      f'--config.model.name={tiny_dir}', f'--config.data.train={path}',
      '--config.task.template={text} It was', '--config.data.max_length=100',
      "--config.task.label_words=(' terrible', ' great')",
      '--config.data.num_train=100', '--config.data.num_dev=50',
      '--config.steps=2', '--config.eval_every=2'])


def test_the_config_for_own_data(own):
  """It inherits nothing from the quickstart."""
  checks.check_config(own)
  o = own.optimizer
  assert (own.peft.method, own.peft.mask, o.schedule) == ('', '', 'constant')
  assert o.learning_rate == 1e-6
  for variant, method in (('last_layer', 'last_layers'), ('lora', 'lora')):
    assert read_config(f'{OWN}:{variant}').peft.method == method


@pytest.mark.slow
@pytest.mark.exhaustive
def test_config_and_split_are_said_first(own, tmp_path, capsys):
  """And more steps may be made later, or it is said why not."""
  train.run(own, tmp_path / 'w', source='configs/own.py')
  first, *rest = capsys.readouterr().out.splitlines()
  for text in ('configs/own.py', 'mezo', 'all parameters', '1e-06', 'constant',
               '2 steps'):
    assert text in first
  assert any('230 rows' in line and '100 train, 50 dev, 80 test' in line
             for line in rest[:3])
  own.steps = 4
  assert train.run(own, tmp_path / 'w')['steps'] == 4
  own.optimizer.schedule = 'linear'
  saved = config_lib.to_json(own)
  own.steps = 6
  with pytest.raises(InputError) as e:
    config_lib.check_same_run(own, saved)
  for text in ('steps was 4 and is now 6', 'optimizer.schedule', 'linear'):
    assert text in str(e.value)


def warnings(config):
  said = []
  build.build(config, say=said.append)
  return [text for text in said if text.startswith('warning: ')]


def test_too_few_rows_for_a_batch_are_refused_before_the_model_is_read(
    own, tmp_path, monkeypatch):
  own.data = Data(train=write(tmp_path / 'x.jsonl', rows_of(20)), num_train=-1,
                  num_dev=-1, num_test=-1)
  monkeypatch.setattr(build, 'load', None)
  with pytest.raises(InputError, match='12 .*data.batch_size'):
    build.build(own, say=lambda text: None)


def test_demonstrations_that_there_are_too_few_rows_for(own):
  own.method, own.num_demos = 'icl', 200
  with pytest.raises(
      InputError, match='150 .* 200 .*--config.num_demos'):
    build.build(own, say=lambda text: None)


@pytest.mark.slow
def test_rows_that_look_like_a_mistake(own, tmp_path):
  assert not warnings(own)
  own.data.train = write(tmp_path / 'a.jsonl', rows_of(230, lambda i: 0))
  one, = warnings(own)
  assert "no train row has the label 1 (' great')" in one
  own.data.train = own.data.test = write(tmp_path / 'b.jsonl', rows_of(160))
  one, = warnings(own)
  assert '100 of 160 test rows have the prompt of a train row' in one
  own.method = 'private'  # its train rows are not described
  assert not [text for text in warnings(own) if 'train row' in text]


def test_splits_of_several_tasks(own, tmp_path):
  path = write(tmp_path / 'few.jsonl', rows_of(20))
  own.also = (config_lib.Also('few', TASK, Data(
      train=path, num_train=8, num_dev=4, num_test=100)),)
  with pytest.raises(InputError, match='num_test to 8'):
    train.run(own, tmp_path / 'w')
  runs.changed(own.also[0], data__num_test=-1, data__batch_size=8)
