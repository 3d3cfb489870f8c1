"""Rows of local files: what is written there, or an error that says where."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mezo_jax.core.errors import InputError, MissingError
from mezo_jax.tasks import data as data_lib


def rows_of(path, text, **kwargs):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return data_lib.load_rows(str(path), **kwargs)


@pytest.mark.parametrize('name', [
    'rows[1]', 'rows*', 'rows?', '~rows', 'a b', '#1', 'a::b', 'é', 'a,b',
    'hf:', 'year=2020', '{a}', '%20', "it's", '**', '[!a]'])
@pytest.mark.parametrize('suffix', ['.csv', '.jsonl', '.parquet'])
def test_a_path_is_a_path(tmp_path, monkeypatch, name, suffix):
  def write(path, text):
    path.parent.mkdir(exist_ok=True)
    if suffix == '.parquet':
      pyarrow.parquet.write_table(pyarrow.table({'text': [text]}), path)
    else:
      line = f'{{"text": "{text}"}}' if suffix == '.jsonl' else f'text\n{text}'
      path.write_text(line + '\n')
  for decoy in ('rows1', 'rowsx', 'rows'):  # what such patterns would match
    write(tmp_path / f'{decoy}{suffix}', 'another')
  monkeypatch.chdir(tmp_path)
  write(tmp_path / f'{name}{suffix}', 'of today')
  write(tmp_path / f'{name} dir' / f'rows{suffix}', 'in it')
  for path, want in ((f'{name}{suffix}', 'of today'),
                     (f'{name} dir/rows{suffix}', 'in it')):
    for source in (path, str(tmp_path / path)):
      assert data_lib.load_rows(source) == [{'text': want}]
  (tmp_path / 'link.csv').symlink_to(tmp_path / f'rows{suffix}')
  if suffix == '.csv':
    assert data_lib.load_rows('link.csv') == [{'text': 'another'}]


def test_a_directory_whose_name_is_a_pattern(tmp_path):
  for name, text in (('run1', 'another'), ('run[1]', 'of today')):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'test.csv').write_text(f'text,label\n{text},001\n')
  source = str(tmp_path / 'run[1]')
  assert data_lib.load_rows(source, split='test') == [
      {'text': 'of today', 'label': '001'}]
  (tmp_path / 'run[1]' / 'test.csv').unlink()
  with pytest.raises(InputError, match=r'run\[1\]'):
    data_lib.load_rows(source, split='train')
  with pytest.raises(InputError, match='test.csv.*train.csv'):
    data_lib.load_rows(str(tmp_path / 'run1'), split='train')
  assert data_lib.load_rows(tmp_path / 'run1' / 'test.csv')
  (tmp_path / 'run1' / 'test.jsonl').write_text('{"text": "a"}\n')
  with pytest.raises(InputError, match='test.jsonl and test.csv'):
    data_lib.load_rows(tmp_path / 'run1', split='test')


def test_files_of_another_kind(tmp_path):
  for name in ('rows.csv.gz', 'rows.txt', 'rows'):
    (tmp_path / name).write_text('text\na\n')
    with pytest.raises(InputError, match=name):
      data_lib.load_rows(str(tmp_path / name))
  assert rows_of(tmp_path / 'ROWS.CSV', 'text\na\n') == [{'text': 'a'}]
  for source in ('http://x/rows.csv', 'hf://datasets/x/rows.jsonl', '~none.csv',
                 str(tmp_path / 'a.csv')):
    with pytest.raises(MissingError, match='rows|none|a.csv'):
      data_lib.load_rows(source)


WORDS = ['00501', '1e3', '1.0', '1.10', '+1', ' 1', 'NaN', 'null', 'NA', 'None',
         '', 'True', 'false', '2024-01-02', '12:30', '1,000', '9' * 5000, 'inf',
         '0x10', "it's", '½', '\u2028x', 'a\u0085b']


@pytest.mark.parametrize('suffix', ['.csv', '.tsv', '.jsonl', '.json'])
def test_text_is_read_as_text(tmp_path, suffix):
  import json
  rows = [{'text': word, 'n': str(i)} for i, word in enumerate(WORDS)]
  mark = '"' if suffix == '.csv' else ''
  text = {
      '.csv': 'text,n\n' + ''.join(
          f'{mark}{r["text"]}{mark},{r["n"]}\n' for r in rows),
      '.tsv': 'text\tn\n' + ''.join(f'{r["text"]}\t{r["n"]}\n' for r in rows),
      '.jsonl': '\n'.join(map(json.dumps, rows)),
      '.json': json.dumps(rows, indent=1)}[suffix]
  for some in (text, '\ufeff' + text, text.replace('\n', '\r\n')):
    assert rows_of(tmp_path / f'x{suffix}', some) == rows


def test_values_of_json_keep_their_types(tmp_path):
  rows = rows_of(tmp_path / 'x.jsonl', '{"a": 1, "b": true}\n\n{"a": 1.5, '
                 '"c": ["x"], "d": {"e": null}}\n')
  assert rows == [{'a': 1, 'b': True, 'c': None, 'd': None},
                  {'a': 1.5, 'b': None, 'c': ['x'], 'd': {'e': None}}]
  columns = '{\n"a": ["x", "y"],\n"b": [1, 2]\n}'
  assert rows_of(tmp_path / 'z.jsonl', r'{"a": "\ud83d\ude00"}') == [
      {'a': '\U0001f600'}]
  assert rows_of(tmp_path / 'y.json', columns) == [
      {'a': 'x', 'b': 1}, {'a': 'y', 'b': 2}]


GLUE = ['"Well made , she said', 'dull', 'not a "film', 'fine', 'the " end',
        '"Yes"', '"']


def test_quotation_marks_of_a_tsv_are_letters(tmp_path):
  file = tmp_path / 'x.tsv'
  for lines in (GLUE, ['"A', 'B"'], ['"well made , fine"'], ['""', 'a ""b""']):
    text = 'sentence\tlabel\n' + ''.join(f'{line}\t0\n' for line in lines)
    for some in (text, text.replace('\n', '\r\n'), text.replace('\n', '\r')):
      assert [row['sentence'] for row in rows_of(file, some)] == lines


def test_a_tsv_that_a_program_has_quoted(tmp_path):
  texts = ['a, "b"', 'two\nlines', 'a\ttab', 'plain']
  quote = lambda text: '"' + text.replace('"', '""') + '"'
  for chosen, header in ((texts, 'text\tn'), (texts[:1], 'text\tn'),
                         (texts[3:], '"text"\t"n"')):
    text = header + '\n' + ''.join(f'{quote(t)}\t"1"\n' for t in chosen)
    assert rows_of(tmp_path / 'x.tsv', text) == [
        {'text': t, 'n': '1'} for t in chosen]


@pytest.mark.parametrize('name,text,message', [
    ('x.csv', 'text,label\na,1\nb\n', 'line 3 '),
    ('x.csv', 'text,label\na, b,1\n', 'line 2 '),
    ('x.csv', 'text,label\n"a,1\nb,0\n', 'line 2 '),
    ('x.csv', 'text,label\na,1\n"a" b,1\n', 'line 3 '),
    ('x.csv', 'text,label\n"a,1\nb,"c",0\n', 'line 2 '),
    ('x.csv', 'text;label\na;1\n', "';'"),
    ('x.csv', 'text\tlabel\na\t1\n', r"'\\t'"),
    ('x.tsv', 'text,label\na,1\n', "','"),
    ('x.tsv', 'text\tlabel\na\t1\nb\n', 'line 3 '),
    ('x.tsv', 'text\tlabel\na\tb\t1\n', 'line 2 '),
    ('x.csv', 'text,text\na,1\n', "name 'text'"),
    ('x.tsv', 'text\ttext\na\t1\n', "name 'text'"),
    ('x.jsonl', '{"a": 1, "a": 2}', "line 1: .*name 'a'"),
    ('x.csv', b'text,label\na,1\ncaf\xe9,0\n', 'line 3 .*UTF-8 .*0xe9'),
    ('x.jsonl', b'{"a": "caf\xe9"}', 'line 1 .*UTF-8'),
    ('x.csv', b'text,label\na\0,1\n', 'line 2 .*NUL'),
    ('x.tsv', 'text\tn\na\t1\n'.encode('utf-16'), 'line 1 .*UTF-8'),
    ('x.csv', b'\x1f\x8b\x08\0', 'line 1 .*UTF-8'),
    ('x.jsonl', '{"a": 1}\n{"a": \n', 'line 2, column 7'),
    ('x.jsonl', '{\n  "a": 1\n}\n{\n  "a": 2\n}\n', 'line'),
    ('x.jsonl', '{"a": 1}\n[1]\n', 'row 2 '),
    ('x.json', '[{"a": 1},\n{"a" 1}]', 'line 2'),
    ('x.jsonl', '{"a": %s}' % ('9' * 5000), 'line 1'),
    ('x.jsonl', '[' * 100_000, 'json'),
    ('x.jsonl', '{"a": 1}\n{"a": "\\ud83d"}', 'line 2: .*surrogates'),
    ('x.parquet', 'PAR1', 'parquet'),
    ('x.csv', 'text,label\n', 'has no rows'), ('x.csv', '', 'has no rows'),
    ('x.tsv', '', 'has no rows'), ('x.jsonl', '\n', 'has no rows')])
def test_files_that_cannot_be_read(tmp_path, name, text, message):
  with pytest.raises(InputError, match=message) as e:
    rows_of(tmp_path / name, text)
  assert name in str(e.value)


def test_columns_without_a_name_are_left_out(tmp_path):
  assert rows_of(tmp_path / 'x.csv', ',text,,\n0,a,,\n') == [{'text': 'a'}]


def test_classes_of_parquet_know_their_names(tmp_path):
  features = datasets.Features(
      label=datasets.ClassLabel(names=['neg', 'pos']),
      text=datasets.Value('string'))
  datasets.Dataset.from_dict(
      {'label': [1, 0, -1], 'text': ['a', 'b', 'c']}, features).to_parquet(
          str(tmp_path / 'x.parquet'))
  rows = data_lib.load_rows(str(tmp_path / 'x.parquet'))
  assert [row['label'] for row in rows] == [1, 0, -1]
  assert [getattr(row['label'], 'name', '') for row in rows] == [
      'pos', 'neg', '']


@pytest.mark.parametrize('suffix', ['.jsonl', '.csv', '.parquet'])
def test_local_files_need_no_cache(tmp_path, monkeypatch, suffix):
  """A cache that cannot be written is not needed, and is not blamed on them."""
  for name in ('HF_HUB_CACHE', 'HF_DATASETS_CACHE'):
    for module in (datasets.config, __import__(
        'huggingface_hub').constants):
      if hasattr(module, name):
        monkeypatch.setattr(module, name, '/proc/none/cache')
  file = tmp_path / f'x{suffix}'
  if suffix == '.parquet':
    pyarrow.parquet.write_table(pyarrow.table({'a': ['x']}), file)
  else:
    file.write_text('a\nx\n' if suffix == '.csv' else '{"a": "x"}')
  assert data_lib.load_rows(str(file)) == [{'a': 'x'}]
  (tmp_path / 'data').mkdir()
  pyarrow.parquet.write_table(
      pyarrow.table({'a': ['x']}), tmp_path / 'data' / 'train-1.parquet')
  with pytest.raises(InputError, match='/proc/none/cache'):
    data_lib.load_rows(str(tmp_path / 'data'))


def test_an_address_is_not_read():
  with pytest.raises(InputError, match='gs://bucket/x.csv is an address'):
    data_lib.load_rows('gs://bucket/x.csv')
