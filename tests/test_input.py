"""Files and fields from elsewhere: the right answer, or one sentence."""

import json
import shutil

import conftest
import pytest
import runs

from mezo_jax import models
from mezo_jax.core.errors import InputError
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import Task
from mezo_jax.training import build, checks

TASK = Task(template='{text} It was', label_words=(' terrible', ' great'))


@pytest.mark.parametrize('value,kind', [
    (None, 'nothing'), (['a', 'b'], 'a list'), ({'a': 1}, 'a dict'),
    (b'a', 'a bytes')])
def test_what_is_no_text(value, kind):
  with pytest.raises(InputError, match=f"column 'text' .* {kind}"):
    TASK.prompt({'text': value, 'label': 1})
  assert TASK.prompt({'text': 5, 'other': None}) == '5 It was'
  assert TASK.prompt({'text': ''}) == ' It was'


def test_a_text_that_takes_minutes():
  with pytest.raises(InputError, match="column 'text' .*1,000,001") as e:
    TASK.prompt({'text': 'a' * 1_000_001})
  assert len(str(e.value)) < 500
  assert len(TASK.prompt({'text': 'a' * 1_000_000})) == 1_000_007


@pytest.mark.parametrize('ending,line', [
    ('csv', '{},1'), ('tsv', '{}\t1')])
def test_words_that_look_like_no_value(tmp_path, ending, line):
  words = ['NA', 'null', 'nan', 'None', '', 'n/a']
  path = tmp_path / f'x.{ending}'
  header = 'text,label' if ending == 'csv' else 'text\tlabel'
  path.write_text('\n'.join([header, *map(line.format, words)]) + '\n')
  rows = data_lib.load_rows(str(path))
  assert [row['text'] for row in rows] == words
  assert all(TASK.golds(row) == (1,) for row in rows)


@pytest.mark.parametrize('template,message', [
    ('It was', "task.template 'It was'"), ('{{text}} was', 'task.template'),
    ('{mask} it was', 'task.template'),
    ('{text:>3000000000}', '{text:>3000000000}.*task.template'),
    ('{text!r}', '{text!r}.*task.template'),
    ('{text.__class__}', '{text.__class__}.*task.template'),
    ('{0}', r'\{0\}.*task.template'), ('{text', '{text.*task.template')])
def test_templates(tiny_dir, reviews_file, template, message):
  config = runs.small_config(tiny_dir, reviews_file)
  config.task = Task(template=template, label_words=(' a', ' b'))
  with pytest.raises(InputError, match=message):
    checks.check_config(config)


def test_a_column_may_have_any_name():
  row = {'a title': 'x', 'no-1': 'y', '2nd': 'z'}
  assert Task(template='{a title} {no-1} {2nd}').prompt(row) == 'x y z'


@pytest.mark.parametrize('changes', [
    dict(optimizer__warmup_steps=-1), dict(optimizer__weight_decay=-0.1),
    dict(optimizer__weight_decay=float('nan')), dict(spsa__eps=float('inf')),
    dict(optimizer__learning_rate=float('inf')),
    dict(optimizer__groups=(('a', float('inf'), 1e-3),))])
def test_numbers_of_a_config(tiny_dir, reviews_file, changes):
  with pytest.raises(InputError, match='^config: '):
    checks.check_config(runs.small_config(tiny_dir, reviews_file, **changes))


@pytest.mark.parametrize('changes', [
    dict(num_hidden_layers=10**18), dict(num_hidden_layers='3'),
    dict(num_hidden_layers=0), dict(vocab_size=-1), dict(hidden_size=2.5),
    dict(num_attention_heads=0, head_dim=None), dict(hidden_size=[32]),
    dict(rms_norm_eps=float('nan')), dict(rms_norm_eps='x'),
    dict(rope_theta=-1.0), dict(rope_scaling=5),
    dict(rope_scaling={'type': 'linear', 'factor': 0}),
    dict(rope_scaling={'type': 'linear'}), dict(model_type=['llama'])])
def test_fields_of_a_model(tmp_path, tiny_dir, changes):
  path = tmp_path / 'm'
  shutil.copytree(tiny_dir, path)
  (path / 'config.json').write_text(json.dumps(conftest.TINY | changes))
  with pytest.raises(InputError, match='config.json|/m: '):
    models.load(path, progress=False)


def test_a_config_that_is_no_object(tmp_path, tiny_dir):
  path = tmp_path / 'm'
  shutil.copytree(tiny_dir, path)
  for text in ('[]', '5', 'null', '{', ''):
    (path / 'config.json').write_text(text)
    with pytest.raises(InputError, match='/m'):
      models.load_config(path)


@pytest.mark.parametrize('name', [
    '../m/model.safetensors', '/etc/passwd', '..', ''])
def test_an_index_stays_in_its_directory(tmp_path, tiny_dir, name):
  path = tmp_path / 'm'
  shutil.copytree(tiny_dir, path)
  (path / 'model.safetensors').rename(path / 'away')
  (path / 'model.safetensors.index.json').write_text(
      json.dumps({'weight_map': {'a': name}}))
  with pytest.raises(InputError, match='index.json'):
    models.load(path, progress=False)


def test_a_tokenizer_of_a_larger_vocabulary(tmp_path, reviews_file):
  path = conftest.write_tiny_model(tmp_path / 'm', vocab_size=10)
  with pytest.raises(InputError, match='tokenizer .* 1[0-9] .* 10'):
    build.build(runs.small_config(path, reviews_file), say=lambda text: None)
