"""Reads rows, splits them, tokenises them and orders them in batches.

Rows come from local files or from data sets on the hub. Batches take rows of
similar length, which are padded to the smallest *bucket* (one of a few fixed
lengths) that holds them. One program is compiled per bucket.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import csv
import io
import json
import os
from pathlib import Path
import re
import tempfile
from typing import Any, NamedTuple

import numpy as np

from mezo_jax.core.errors import first_line, InputError, MissingError
from mezo_jax.tasks import chat, quickstart_data, Task
from mezo_jax.tasks.encode import (
  after_tokens,
  encode,
  Encoded,
  space_warnings,
)
from mezo_jax.tasks.task import ClassNumber

_NAMED = 5  # number of rows that a warning names
_SHOWN = 1000  # characters at each end of a row that is shown


def load_rows(
    source: str, subset: str = '', split: str = 'train'
) -> list[dict[str, Any]]:
  """Reads the rows of a local file or of a data set on the Hugging Face hub.

  A local file is read without a cache. All cells of csv and tsv files are
  texts: ``00501``, ``1e3``, ``True``, ``NA`` and dates are not converted. The
  values of jsonl and parquet files have the types that they have in the file.

  Args:
    source: One of the following. The path of a jsonl, json, csv, tsv or parquet
      file, in which glob characters have no special meaning. The path of a
      directory that contains one such file with the name of the split, or
      parquet files arranged as on the hub. Or the hub id of a data set.
    subset: Configuration of the hub data set, such as ``'sst2'`` of
      ``nyu-mll/glue``. Defaults to '', which is the data set's default.
    split: Split of the hub data set or directory. Defaults to 'train'.

  Returns:
    Rows as dicts from columns to values.

  Raises:
    FileNotFoundError: If there is neither such a file nor such a data set.
    InputError: If the file cannot be read or has no rows. The message names the
      line where that is possible.
  """
  source = os.fspath(source)
  path = Path(source)
  if '://' in source and not path.exists():
    raise MissingError(f'{source} is an address, from which rows cannot be '
                       'read; copy the file and give its local path.')
  if source.startswith('~') and not path.exists():
    path = Path(os.path.expanduser(source))
  read = _READERS.get(path.suffix.lower())
  if path.is_dir() and not subset:  # The directory may have train.csv, say.
    named = [path / f'{split}{suffix}' for suffix in _READERS]
    found = [file for file in named if file.is_file()]
    if len(found) > 1:
      raise InputError(
          f'the directory {path} has {" and ".join(f.name for f in found)}; '
          'give the path of the file to read.')
    if found:
      path, = found
      read = _READERS[path.suffix]
  if path.is_file():
    if not read:
      raise InputError(
          f'{path} is not a .jsonl, .json, .csv, .tsv or .parquet file; '
          'convert or rename it.')
    rows = _read_file(path, read)
  elif read and not path.is_dir():
    raise MissingError(f'the data file {path} does not exist.')
  else:
    rows = _load_data_set(source, path, subset, split)
  if not rows:
    raise InputError(f'{source} has no rows; use a file or split with data.')
  return rows


def _load_data_set(source: str, path: Path, subset: str,
                   split: str) -> list[dict]:
  """Reads a hub data set, or a directory that is arranged like one.

  Args:
    source: Hub id, or path of a directory.
    path: The source as a path.
    subset: Configuration of the data set, or ''.
    split: Split to read.

  Raises:
    MissingError: If there is no such data set.
    InputError: If the directory would be misread, or if a cache of data sets
      cannot be written.
  """
  import datasets  # slow to import, and not needed for local files
  if path.is_dir():
    source = str(path)
    # `datasets` guesses the types of text files, and it takes some characters
    # of a path for a pattern or a URL. Both would silently give other rows.
    guessed = [f for suffix in ('*.csv', '*.tsv', '*.jsonl')
               for f in path.rglob(suffix)]
    if guessed:
      raise InputError(
          f'the directory {path} has files such as {guessed[0].name}, in which '
          'texts could be mistaken for numbers and dates. Give the path of the '
          f'file itself, or name it {split}{guessed[0].suffix}.')
    if re.search(r'[*?\[\]]|::|://', str(path.resolve())):
      raise InputError(
          f'the path of the directory {path} has one of the characters *?[] or '
          '::, which would be taken for a pattern. Rename the directory, or '
          'give the path of the file itself.')
  try:
    data = datasets.load_dataset(source, subset or None, split=split)
    rows = [dict(row) for row in data]
  except Exception as e:
    _check_caches(source, e)
    raise MissingError(
        f'{source!r} is not a local .jsonl, .csv, .tsv or .parquet file, and '
        f'no data set could be loaded from the hub: {first_line(e)}') from e
  return _with_class_names(rows, {
      column: feature.names for column, feature in data.features.items()
      if isinstance(feature, datasets.ClassLabel) and feature.names})


def _check_caches(source: str, error: Exception) -> None:
  """Checks whether a cache that cannot be written explains an error.

  Args:
    source: Hub id, or path of a directory.
    error: Exception of `datasets`.

  Raises:
    InputError: If one of the caches of data sets cannot be written.
  """
  from datasets import config
  from huggingface_hub import constants
  for cache in (constants.HF_HUB_CACHE, config.HF_DATASETS_CACHE):
    try:
      os.makedirs(cache, exist_ok=True)
      with tempfile.TemporaryFile(dir=cache):
        pass
    except OSError as e:
      raise InputError(
          f'{source!r} could not be loaded ({first_line(error)}), and the '
          f'cache {cache} cannot be written ({e.strerror}). Set HF_HOME to a '
          'directory that can be written.') from error


def _with_class_names(rows: list[dict],
                      names: dict[str, list[str]]) -> list[dict]:
  """Replaces class numbers by `ClassNumber`, which also have the class's name.

  Args:
    rows: Rows, which are changed in place.
    names: Names of the classes, for each column that contains class numbers.

  Returns:
    The rows.
  """
  for column, of_column in names.items():
    for row in rows:
      number = row[column]
      if number is not None and 0 <= number < len(of_column):
        row[column] = ClassNumber(number, of_column[number])
  return rows


# --- local files ------------------------------------------------------------


def _read_file(path: Path, read: Callable) -> list[dict]:
  """Reads a file with one of `_READERS`; error messages name the file."""
  try:
    return read(path)
  except OSError as e:
    raise InputError(f'cannot read {path}: {e.strerror or e}.') from e
  except Exception as e:
    kind = path.suffix.lower()[1:].replace('jsonl', 'json')
    raise InputError(
        f'{path} is not a valid {kind} file: {first_line(e)}') from e


def _text_of(path: Path) -> str:
  """Returns the text of a file in UTF-8, with or without a byte order mark."""
  data = path.read_bytes()
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    line = data[:e.start].count(b'\n') + 1
    raise ValueError(
        f'line {line} is not UTF-8 (byte 0x{data[e.start]:02x}); save the file '
        'as uncompressed UTF-8 text.') from e
  if '\0' in text:
    line = text[:text.index('\0')].count('\n') + 1
    raise ValueError(f'line {line} has a NUL character; save the file as UTF-8 '
                     'text.')
  return text


def _csv(path: Path) -> list[dict]:
  """Reads a csv file.

  A text that contains a comma, a line break or a quotation mark is in quotation
  marks, and the quotation marks within it are doubled.
  """
  return _table(_cells(_text_of(path), ','), ',')


def _tsv(path: Path) -> list[dict]:
  """Reads a tsv file, in which quotation marks are ordinary characters.

  In two cases the file is read like a csv file instead, in which a cell may be
  enclosed in quotation marks:

  * Not all lines have the same number of tabs, but all rows have the same
    number of cells if it is read that way. A quoted cell may contain tabs and
    line breaks.
  * The file was evidently written with quoting: every cell that contains a
    quotation mark is enclosed in them, and either all cells of the header are,
    or some cell contains doubled quotation marks.
  """
  text = _text_of(path)
  ends = '\n' if '\n' in text else '\r'
  lines = [line.removesuffix('\r') for line in text.split(ends)]
  rows = [(number, line.split('\t'))
          for number, line in enumerate(lines, 1) if line]
  if any(len(row) != len(rows[0][1]) for _, row in rows):
    try:
      return _table(_cells(text, '\t'), '\t')
    except ValueError:
      # The file is not quoted either. Report its lines as they are.
      return _table(rows, '\t')
  marked = [cell for _, row in rows for cell in row if '"' in cell]
  if marked and all(re.fullmatch(r'"([^"]|"")*"', c) for c in marked) and (
      all(cell[:1] == '"' for cell in rows[0][1])
      or any('""' in cell[1:-1] for cell in marked)):
    rows = _cells(text, '\t')
  return _table(rows, '\t')


def _cells(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
  """Splits a table with quotation marks into cells.

  Args:
    text: Contents of the file.
    delimiter: Character between cells.

  Yields:
    A pair of the number of its first line and its cells, for each row.

  Raises:
    ValueError: If quotation marks do not match. The message names the line.
  """
  csv.field_size_limit(max(len(text), csv.field_size_limit()))
  reader = csv.reader(
      io.StringIO(text, newline=''), delimiter=delimiter, strict=True)
  while True:
    line = reader.line_num + 1
    try:
      row = next(reader)
    except StopIteration:
      return
    except csv.Error as e:
      raise ValueError(
          f'the row that begins in line {line} has quotation marks that do not '
          f'match ({e}); write a text that contains a quotation mark '
          '"like ""this"""') from e
    if row:
      yield line, row


def _table(rows: Iterable[tuple[int, list[str]]], delimiter: str) -> list[dict]:
  """Converts cells to rows. The first row of cells has the names of columns.

  Columns without a name are left out.

  Args:
    rows: Pairs of the number of a line and its cells.
    delimiter: Character between cells, for error messages.

  Raises:
    ValueError: If a row has another number of cells than the first, or if the
      delimiter seems to be wrong. The message names the line.
  """
  rows = iter(rows)
  _, names = next(rows, (1, []))
  if len(names) == 1:
    other = next((c for c in ',;\t|' if c != delimiter and c in names[0]), None)
    if other:
      raise ValueError(
          f'its first line, {names[0]!r}, has {other!r} between the columns '
          f'instead of {delimiter!r}; save it with the latter, or as .jsonl.')
  _check_names(names)
  out = []
  for line, cells in rows:
    if len(cells) != len(names):
      hint = '; a text with a comma in it needs quotation marks' if (
          delimiter == ',') else ''
      raise ValueError(
          f'the row in line {line} has {len(cells)} cells, but there are '
          f'{len(names)} columns{hint}.')
    out.append({name: cell for name, cell in zip(names, cells) if name})
  return out


def _check_names(names: Sequence[str]) -> None:
  """Raises ValueError if two columns have the same name."""
  twice = [name for name in names if name and names.count(name) > 1]
  if twice:
    raise ValueError(
        f'two columns have the name {twice[0]!r}; rename one of them.')


def _json(path: Path) -> list[dict]:
  """Reads a JSON file.

  The file has one object per line, a list of objects, or one object with a list
  for each column. Rows that lack a column get None.
  """
  text = _text_of(path)
  if text.lstrip()[:1] == '[':
    rows = _parse(text)
  else:
    try:
      rows = [_parse(line, number)
              for number, line in enumerate(text.split('\n'), 1)
              if line.strip()]
    except ValueError:
      rows = _rows_of_columns(text)
      if rows is None and re.match(r'\s*\{\s*\n', text):
        raise ValueError(
            'its first object extends over several lines; write one object '
            'per line, or all objects as a list, [...]') from None
      if rows is None:
        raise
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict):
      raise ValueError(
          f'row {number} must be an object, got {str(row)[:80]!r}.')
  names = dict.fromkeys(name for row in rows for name in row)
  return [{name: row.get(name) for name in names} for row in rows]


def _parse(text: str, line: int = 0):
  """Parses a JSON value.

  Args:
    text: Text of the value.
    line: Number of the line that the text was read from, for error messages.
      Defaults to 0, which means that the text has several lines.

  Raises:
    ValueError: If the text is not valid JSON, has a name twice in an object, or
      has half of a surrogate pair.
  """
  def object_of(pairs):
    """Builds a JSON object and checks that no name occurs twice."""
    _check_names([name for name, _ in pairs])
    return dict(pairs)
  try:
    found = json.loads(text, object_pairs_hook=object_of)
    if re.search(r'\\u[dD][89a-fA-F]', text):
      # JSON may contain half of a surrogate pair, which is not a character.
      # Encoding raises an error for it.
      json.dumps(found, ensure_ascii=False).encode()
    return found
  except json.JSONDecodeError as e:
    raise ValueError(
        f'line {line or e.lineno}, column {e.colno}: {e.msg}.') from e
  except (ValueError, RecursionError) as e:
    raise ValueError(f'line {line}: {first_line(e)}' if line else str(e)) from e


def _rows_of_columns(text: str) -> list[dict] | None:
  """Converts a JSON object of equally long lists, one per column, to rows.

  Returns None for any other text.
  """
  try:
    found = _parse(text)
  except ValueError:
    return None
  columns = [*found.values()] if isinstance(found, dict) else []
  if not columns or not all(isinstance(c, list) for c in columns) or (
      len({len(c) for c in columns}) > 1):
    return None
  return [dict(zip(found, cells)) for cells in zip(*columns)]


def _parquet(path: Path) -> list[dict]:
  """Reads a parquet file, with the names of classes that `datasets` stores."""
  import pyarrow.parquet  # slow to import
  # Given a path, pyarrow would turn a directory 'name=value' into a column.
  with path.open('rb') as f:
    table = pyarrow.parquet.read_table(f)
  _check_names(table.column_names)
  features = {}
  if table.schema.metadata and b'huggingface' in table.schema.metadata:
    about = json.loads(table.schema.metadata[b'huggingface'])
    features = about.get('info', {}).get('features', {})
  return _with_class_names(table.to_pylist(), {
      column: feature['names'] for column, feature in features.items()
      if isinstance(feature, dict) and feature.get('_type') == 'ClassLabel'
      and feature.get('names') and column in table.column_names})


_READERS = {'.jsonl': _json, '.json': _json, '.csv': _csv, '.tsv': _tsv,
            '.parquet': _parquet}


# --- splits -----------------------------------------------------------------


def split_rows(labels: np.ndarray, num_train: int, num_dev: int, num_test: int,
               seed: int, k_shot: int = 0) -> tuple[np.ndarray, ...]:
  """Splits rows into train, dev and test rows.

  Test rows are the first ``num_test`` of a fixed permutation and do not depend
  on the seed. The other rows are permuted by the seed, as in the code of
  Malladi et al. (2023). The first ``num_train`` of them are for training and
  the next ``num_dev`` are dev rows. With ``k_shot``, the first k rows of each
  label are for training and the next k are dev rows.

  Args:
    labels: Labels, integers [R]. Their values matter only with ``k_shot``.
    num_train: Number of train rows, if ``k_shot`` is 0.
    num_dev: Number of dev rows, if ``k_shot`` is 0.
    num_test: Number of test rows.
    seed: Seed of the permutation of train and dev rows.
    k_shot: Number of train rows, and of dev rows, of each label. Defaults to 0,
      which takes ``num_train`` and ``num_dev`` rows instead.

  Returns:
    A tuple (train, dev, test) of indices of rows.

  Raises:
    InputError: If there are too few rows. The message names the number to
      lower.
  """
  test, rest = np.split(
      np.random.RandomState(0).permutation(len(labels)), [num_test])
  order = np.sort(rest)[np.random.RandomState(seed).permutation(len(rest))]
  if not k_shot:
    _check_enough(len(labels), num_train, num_dev, num_test)
    train, dev = order[:num_train], order[num_train:num_train + num_dev]
    return train, dev, test
  of = {c: order[labels[order] == c] for c in np.unique(labels)}
  rarest = min(of, key=lambda c: len(of[c]))
  have = len(of[rarest])
  if have < 2 * k_shot:
    held = f' after the {len(test)} test rows' if num_test else ''
    lower = f'--config.data.k_shot to {have // 2}' if have > 1 else ''
    if num_test:
      lower += ' or --config.data.num_test' if lower else (
          '--config.data.num_test')
    raise InputError(
        f'label {rarest} has {have} rows{held}, but --config.data.k_shot='
        f'{k_shot} needs {2 * k_shot} of each label for train and dev; '
        + (f'lower {lower}.' if lower else 'give more rows.'))
  train = np.concatenate([i[:k_shot] for i in of.values()])
  dev = np.concatenate([i[k_shot:2 * k_shot] for i in of.values()])
  return train, dev, test


def _check_enough(rows: int, num_train: int, num_dev: int,
                  num_test: int) -> None:
  """Raises InputError if the splits need more rows than there are."""
  wanted = {'num_test': num_test, 'num_dev': num_dev, 'num_train': num_train}
  wanted = {name: n for name, n in wanted.items() if n}
  total = sum(wanted.values())
  if total <= rows:
    return
  # The most that each number could be if the others stay as they are. If that
  # is not positive, lowering this number alone is not enough.
  least = {name: rows - (total - n) for name, n in wanted.items()}
  alone = [f'--config.data.{name} to {n}' for name, n in least.items() if n > 0]
  numbers = ', '.join(f'{name} {n}' for name, n in reversed(wanted.items()))
  if alone:
    how = f'lower {" or ".join(alone)}'
  else:
    how = 'lower ' + ', '.join(f'--config.data.{name}' for name in wanted)
  raise InputError(
      f'the data have {rows} rows, but the splits need {total} (data.{numbers})'
      f'; {how}, or set one to -1 for a share of the rows.')


# Relative sizes of the splits whose number of rows is -1, and the most rows
# that such a split gets.
_SHARES = {'train': 3, 'dev': 1, 'test': 1}
_MOST = {'dev': 500, 'test': 1000}


def share_out(rows: int, num_train: int, num_dev: int,
              num_test: int) -> tuple[int, int, int]:
  """Replaces numbers of rows that are -1 by shares of the rows.

  The rows that remain after the given numbers are divided among the splits
  whose number is -1. Train, dev and test rows get shares of 3 : 1 : 1, but dev
  rows at most 500 and test rows at most 1,000. If ``num_train`` is -1, train
  rows get what the others leave.

  Args:
    rows: Number of rows.
    num_train: Number of train rows, or -1.
    num_dev: Number of dev rows, or -1.
    num_test: Number of test rows, -1, or 0 if they have a source of their own.

  Returns:
    A tuple of the numbers of train, dev and test rows.

  Raises:
    InputError: If no rows are left for a share.
  """
  numbers = {'train': num_train, 'dev': num_dev, 'test': num_test}
  shared = [name for name, n in numbers.items() if n < 0]
  if not shared:
    return num_train, num_dev, num_test
  given = {name: n for name, n in numbers.items() if n > 0}
  left = rows - sum(given.values())
  if left < len(shared):
    what = ' and '.join(f'data.num_{name}' for name in shared)
    if not given:
      raise InputError(
          f'the data have {rows} row{"s" if rows != 1 else ""}, but each of '
          f'{", ".join(shared)} needs at least one; give more rows.')
    raise InputError(
        f'the data have {rows} rows, which leaves none for {what} after '
        + ' and '.join(f'data.num_{name} {n}' for name, n in given.items())
        + '; lower ' + ' or '.join(f'--config.data.num_{name}'
                                   for name in given) + '.')
  parts = sum(_SHARES[name] for name in shared)
  for name in shared:
    share = max(left * _SHARES[name] // parts, 1)
    numbers[name] = min(share, _MOST.get(name, share))
  if 'train' in shared:
    numbers['train'] = left - sum(
        numbers[name] for name in shared if name != 'train')
  return numbers['train'], numbers['dev'], numbers['test']


class Rows(NamedTuple):
  """Holds the rows of a run, as `Task.prepare` returns them."""

  train: list[dict[str, Any]]
  dev: list[dict[str, Any]]
  test: list[dict[str, Any]]
  # All rows that are not test rows. Demonstrations are taken from them.
  pool: list[dict[str, Any]]
  # Index of each test row in the file or split that it was read from. Defaults
  # to (), which means 0, 1, 2, ...
  test_index: Sequence[int] = ()


class Splits(NamedTuple):
  """Holds the tokenised rows of a run.

  `prior` and `gold` have the keys 'dev' and 'test', or are empty. `buckets` has
  the keys 'train', 'dev' and 'test'. If `prior` or `gold` is not empty, it also
  has 'prior_dev' and 'prior_test', or 'gold_dev' and 'gold_test'.
  """

  train: Encoded  # train rows in the form that the objective needs
  dev: Encoded  # dev rows in the form that evaluation needs
  test: Encoded  # test rows in the form that evaluation needs
  # Candidates after a prompt without content, for surface-form calibration.
  prior: dict[str, Encoded]
  # Lengths that the rows of each split are padded to, in tokens.
  buckets: dict[str, tuple[int, ...]]
  # Rows with their right answers, if answers are generated and the
  # language-model loss is reported, too.
  gold: dict[str, Encoded]
  # Index of each test row in its file or split, as in `Rows`.
  test_index: Sequence[int] = ()


def read_rows(source: Any, task: Task) -> Rows:
  """Reads and splits the rows of a run.

  Args:
    source: Files or data sets and numbers of rows, a
      `mezo_jax.training.config.Data`.
    task: The task. Its data are used if ``source`` names none.

  Raises:
    MissingError: If the data do not exist.
    InputError: If no data are named, or if they do not fit the task.
  """
  d, name = source, source.train or task.hub
  if not name:
    raise InputError(
        'the config names no training data; set --config.data.train to a file '
        'or the id of a data set.')
  subset = d.subset or ('' if d.train else task.subset)
  if name == 'quickstart':
    rows = quickstart_data.reviews()
  else:
    rows = load_rows(name, subset, d.train_split or task.train_split)
  numbers, rows = numbered(task, rows)
  held_out = d.test or ('' if d.train else task.hub)
  indices = split_rows(_labels(d, task, rows),
                       *_numbers(d, len(rows), held_out), d.seed, d.k_shot)
  train, dev, test = ([rows[i] for i in index] for index in indices)
  test_index = [numbers[i] for i in indices[2]]
  if held_out:
    numbers, found = numbered(task, load_rows(
        held_out, subset, d.test_split or task.test_split))
    order = np.random.RandomState(d.test_seed).permutation(len(found))
    chosen = order[:d.num_test if d.num_test > 0 else None]
    test, test_index = [found[i] for i in chosen], [numbers[i] for i in chosen]
  if d.dev:
    found = task.prepare(load_rows(d.dev, subset, d.train_split or (
        task.train_split)))
    order = np.random.RandomState(d.seed).permutation(len(found))
    dev = [found[i] for i in order[:d.num_dev if d.num_dev > 0 else None]]
  for_test = set() if held_out else set(indices[2].tolist())
  return Rows(train, dev, test,
              [r for i, r in enumerate(rows) if i not in for_test], test_index)


def numbered(task: Task, rows: Sequence[dict]) -> tuple[list[int], list[dict]]:
  """Returns the indices of the rows that a task keeps, and these rows."""
  kept = task.numbered(rows)
  return [i for i, _ in kept], [row for _, row in kept]


def _labels(d, task: Task, rows: Sequence[dict]) -> np.ndarray:
  """Returns the labels that `split_rows` needs for ``k_shot``, or zeros.

  Args:
    d: The `mezo_jax.training.config.Data` of the run.
    task: The task.
    rows: Rows from `Task.prepare`.
  """
  if not d.k_shot or task.traits.generates:
    return np.zeros(len(rows), int)
  labels = np.array([task.golds(row)[0] for row in rows])
  missing = {*range(task.num_classes)} - {*labels.tolist()}
  if task.traits.classes and missing:
    raise InputError(
        f'no row has label {min(missing)}, but --config.data.k_shot={d.k_shot} '
        'needs rows of each; check the data and --config.task.label_words.')
  return labels


def _numbers(d, rows: int, held_out: str) -> tuple[int, int, int]:
  """Returns the numbers of train, dev and test rows for `split_rows`.

  Args:
    d: The `mezo_jax.training.config.Data` of the run.
    rows: Number of rows.
    held_out: Source of the test rows, or '' if they come from these rows.
  """
  num_test = 0 if held_out else d.num_test
  if not d.k_shot:
    return share_out(rows, d.num_train, 0 if d.dev else d.num_dev, num_test)
  if num_test < 0:
    num_test = min(max(rows // 5, 1), _MOST['test'])
  return 0, 0, num_test


def demonstrations(task: Task, pool: Sequence[dict[str, Any]], num: int,
                   count: int) -> list[str]:
  """Returns the demonstrations that precede prompts, for in-context learning.

  Each prompt gets its own random demonstrations, as in the code of Malladi et
  al. (2023). The seeds of the prompts are
  ``RandomState(0).randint(0, 10000, count)``. The demonstrations of a prompt
  are the first ``num`` rows after a permutation with its seed.

  Args:
    task: The task.
    pool: Rows to choose from.
    num: Number of demonstrations per prompt.
    count: Number of prompts.

  Returns:
    One text per prompt: ``num`` prompts with their answers.

  Raises:
    InputError: If the pool has fewer than ``num`` rows.
  """
  if len(pool) < num:
    raise InputError(f'there are only {len(pool)} rows for {num} '
                     'demonstrations; lower --config.num_demos.')
  out = []
  for seed in np.random.RandomState(0).randint(0, 10_000, count):
    rows = [pool[i] for i in
            np.random.RandomState(seed).permutation(len(pool))[:num]]
    out.append('\n\n'.join(
        (task.prompt(r) + task.gold_text(r)).strip() for r in rows) + '\n\n')
  return out


def encode_rows(
    rows: Rows, task: Task, tokenizer: Any, *, causal: bool, limit: int,
    buckets: Sequence[int], gold_only: Sequence[str] = (), num_demos: int = 0,
    prior: bool = False,
    soft_ids: Sequence[int] = (), untold: Sequence[str] = (),
    lm_loss: bool = False, gold_loss: bool = False, needs_gold: bool = True,
    say: Callable[[str], None] = print) -> Splits:
  """Tokenises the rows of a run and chooses the lengths they are padded to.

  Args:
    rows: Rows from `read_rows`.
    task: The task.
    tokenizer: Tokenizer of the model.
    causal: Whether the model is causal, not masked.
    limit: Largest number of tokens of a prompt with its answers.
    buckets: Lengths to pad to. Only the lengths that are needed are used.
    gold_only: Splits whose rows are encoded with their right answer only.
      Defaults to none.
    num_demos: Number of demonstrations before each test prompt. Defaults to 0.
    prior: Whether to encode dev and test candidates after a prompt without
      content, too. Defaults to False.
    soft_ids: Token ids of a soft prompt, which come first. Defaults to none.
    untold: Names of private splits. Their rows are all padded to the same
      length, and their labels and lengths are not logged. Defaults to none.
    lm_loss: Whether the language-model loss of dev and test rows is evaluated,
      too. Candidates are then encoded in full, and if answers are generated,
      the right answers are encoded in addition. Defaults to False.
    gold_loss: Whether right answers are encoded in addition, too, if answers
      are generated, all rows have a right one and it fits. Defaults to False.
    needs_gold: Whether each row must have a right answer. Defaults to True.
    say: Function that logs a line. Defaults to `print`.

  Raises:
    InputError: If rows, task and tokenizer do not fit each other.
  """
  # Read the labels of all splits, including private ones, because `reading`
  # raises an error if some labels are names and others numbers.
  labels = task.reading([*rows.train, *rows.dev, *rows.test])
  if untold:  # The log must not depend on private rows.
    labels = task.reading([*rows.dev, *rows.test])
  for text in (labels, *space_warnings(task, rows.dev, tokenizer)):
    if text:
      say(text)
  demos = {'test': demonstrations(
      task, rows.pool, num_demos, len(rows.test))} if num_demos else {}

  def read(name, of_prior=False, **kwargs):
    """Tokenises a split, after its demonstrations and the soft prompt.

    Args:
      name: Name of the split.
      of_prior: Whether to use prompts without content.
      **kwargs: Arguments of `encode` to change.
    """
    some, prompts = getattr(rows, name), None
    if of_prior:
      prompts = [task.prior(r) for r in some]
    elif name in demos:
      prompts = [d + task.prompt(r) for d, r in zip(demos[name], some)]
    return after_tokens(
        encode(task, some, tokenizer, limit, prompts=prompts, causal=causal,
               needs_gold=needs_gold,
               **dict(gold_only=name in gold_only) | kwargs), soft_ids)

  names = ('train', 'dev', 'test')
  splits = {name: read(name, write_out=lm_loss) for name in names}
  # If label words are single tokens in some splits only, write them out in all,
  # so that all splits are scored in the same form.
  if len({s.token_ids is None for s in splits.values() if s.width > 1}) > 1:
    splits = {name: read(name, write_out=True) for name in names}
  golds = {name: read(name, gold_only=True) for name in ('dev', 'test') if (
      lm_loss and splits[name].generates)}
  if gold_loss and not golds:
    held_out = [name for name in ('dev', 'test') if splits[name].generates
                and all(map(task.has_gold, splits[name].rows))]
    try:
      golds = {name: read(name, gold_only=True) for name in held_out}
    except InputError as e:  # generating needs no right answer that fits
      say(f'the cross-entropy of right answers is not reported: {e}')
  for name, split in splits.items() if task.traits.conversation else ():
    if name not in untold:
      for text in _about_conversations(
          name, split, len(getattr(rows, name)),
          tokenizer if name == 'train' else None):
        say(text)
  priors = {name: read(name, of_prior=True) for name in ('dev', 'test') if (
      prior and splits[name].width > 1)}
  whole = limit + len(soft_ids)
  most = lambda split: whole - (task.max_new_tokens if split.generates else 0)
  for name, split in splits.items():
    if name in untold:
      if split.lengths.max() > most(split):
        raise InputError(
            f'a {name} row has more than {most(split)} tokens with its '
            'candidates. In private training all rows are padded to '
            '--config.data.max_length; raise it.')
      say(f'data: {len(split.prompts)} {name} rows, padded to {most(split)} '
          'tokens')
      continue
    cut = f'; {split.truncated} rows were cut to fit' if split.truncated else ''
    say(f'data: {len(split.prompts)} {name} rows, {split.lengths.mean():.0f} '
        f'tokens on average, {split.lengths.max()} at most{cut}')
  needed = {
      name: (most(split),) if name in untold else buckets_for(
          split, buckets, most(split))
      for name, split in (*splits.items(), *(
          (f'prior_{name}', p) for name, p in priors.items()), *(
              (f'gold_{name}', g) for name, g in golds.items()))}
  return Splits(**splits, prior=priors, buckets=needed, gold=golds,
                test_index=rows.test_index)


def _about_conversations(name: str, data: Encoded, rows: int, tokenizer: Any
                         ) -> list[str]:
  """Returns log lines about which parts of conversations are trained.

  Args:
    name: Name of the split.
    data: The tokenised conversations.
    rows: Number of conversations, including those that were left out.
    tokenizer: Tokenizer, to show the first conversation, or None.
  """
  out = []
  if data.left_out:
    some = [f'row {row} {why}' for row, why in data.left_out[:_NAMED]]
    more = ', ...' if len(data.left_out) > _NAMED else ''
    out.append(f'warning: {len(data.left_out)} of {rows} {name} rows are left '
               f'out ({", ".join(some)}{more}; counted from 0 after the split)')
  if data.generates:
    return out
  scored = sum(len(scored[0]) for scored in data.scored)
  out.append(f'data: {scored / data.lengths.sum():.0%} of the {name} tokens '
             'are trained or scored')
  if tokenizer is not None:
    (answer,), (scored,), prompt = (
        data.candidates[0], data.scored[0], data.prompts[0])
    text = chat.shown([*prompt, *answer], [len(prompt) + i for i in scored],
                      tokenizer)
    if len(text) > 2 * _SHOWN:
      text = f'{text[:_SHOWN]} ... {text[-_SHOWN:]}'
    out.append(f'the first {name} row, in which [[...]] is trained:\n{text}')
    last = tokenizer.decode(answer[scored[-1]])
    if last not in chat.special_tokens(tokenizer):
      out.append('warning: no special token ends the trained part of this row, '
                 'so answers will not learn where to stop; check the chat '
                 'template.')
  return out


def buckets_for(data: Encoded, buckets: Sequence[int], limit: int
                ) -> tuple[int, ...]:
  """Returns the buckets that the given rows need.

  These are all buckets shorter than the longest row, and a last one for the
  longest row. The last one is the smallest bucket that holds the longest row,
  but at most ``limit``. If no bucket holds it, the last one is the length of
  the longest row.

  Args:
    data: The tokenised rows.
    buckets: Lengths to choose from, in tokens.
    limit: Largest number of tokens that the model takes.
  """
  longest = int(data.lengths.max())
  shorter = [b for b in buckets if b < longest]
  enough = min([b for b in buckets if b >= longest], default=longest)
  return (*shorter, max(longest, min(enough, limit)))


def bucket_of(length: int, buckets: tuple[int, ...]) -> int:
  """Returns the smallest bucket that holds a number of tokens.

  Args:
    length: Number of tokens.
    buckets: Lengths in ascending order.

  Raises:
    InputError: If no bucket is large enough.
  """
  for bucket in buckets:
    if length <= bucket:
      return bucket
  raise InputError(f'{length} tokens exceed the largest bucket, {buckets[-1]}; '
                   'add a larger one to data.buckets.')


def used_buckets(lengths: Any, buckets: tuple[int, ...], batch_size: int
                 ) -> list[int]:
  """Returns the buckets that `epoch` uses. Each needs a compiled step function.

  Args:
    lengths: Lengths of the rows, integers [R].
    buckets: Lengths to pad to, in ascending order.
    batch_size: Number of rows per batch.
  """
  return sorted({b for b, _ in epoch(lengths, buckets, batch_size, 0, 0)})


def epoch(lengths: np.ndarray, buckets: tuple[int, ...], batch_size: int,
          seed: int, number: int) -> list[tuple[int, np.ndarray]]:
  """Returns the batches of one epoch.

  Rows are permuted and sorted into buckets, so that a batch has rows of similar
  length. Rows that do not fill a batch of their bucket move up to the next
  bucket. Those left over in the largest bucket are not used in this epoch. The
  number of batches is the same in every epoch.

  Args:
    lengths: Lengths of the rows, integers [R].
    buckets: Lengths to pad to, in ascending order.
    batch_size: Number of rows per batch.
    seed: Seed of the run's permutations.
    number: Number of the epoch, from 0 on.

  Returns:
    A list of pairs (bucket, indices of ``batch_size`` rows), in random order.

  Raises:
    InputError: If there are fewer rows than ``batch_size``.
  """
  if len(lengths) < batch_size:
    raise InputError(
        f'{len(lengths)} training rows do not fill a batch of {batch_size}; '
        'lower --config.data.batch_size.')
  rng = np.random.RandomState([seed, number])
  order = rng.permutation(len(lengths))
  bucket = np.array([bucket_of(n, buckets) for n in lengths])[order]
  batches, left = [], order[:0]
  for b in np.unique(bucket):
    rows = np.concatenate([left, order[bucket == b]])
    whole = len(rows) // batch_size * batch_size
    batches += [(int(b), rows[i:i + batch_size])
                for i in range(0, whole, batch_size)]
    left = rows[whole:]
  return [batches[i] for i in rng.permutation(len(batches))]


def batches(lengths: np.ndarray, buckets: tuple[int, ...], batch_size: int,
            seed: int, start: int = 0) -> Iterator[tuple[int, np.ndarray]]:
  """Yields the training batches of successive epochs without end.

  Args:
    lengths: Lengths of the rows, integers [R].
    buckets: Lengths to pad to, in ascending order.
    batch_size: Number of rows per batch.
    seed: Seed of the run's permutations.
    start: Number of the first batch to yield, counted from the start of the
      run. Defaults to 0.

  Yields:
    Pairs (bucket, indices of ``batch_size`` rows).
  """
  number, at = divmod(start, len(epoch(lengths, buckets, batch_size, seed, 0)))
  while True:
    yield from epoch(lengths, buckets, batch_size, seed, number)[at:]
    number, at = number + 1, 0


def spread(lengths: np.ndarray, buckets: tuple[int, ...],
           rows: int) -> tuple[int, np.ndarray]:
  """Returns one batch whose rows are evenly spaced among all rows.

  Args:
    lengths: Lengths of the rows, integers [R].
    buckets: Lengths to pad to, in ascending order.
    rows: Number of rows of the batch.

  Returns:
    A pair (bucket, indices of the rows).
  """
  index = np.arange(rows) * len(lengths) // rows
  return bucket_of(int(np.max(lengths[index])), buckets), index


def used_lengths(lengths: np.ndarray, buckets: tuple[int, ...]) -> list[int]:
  """Returns the buckets that rows of some lengths fall into.

  Args:
    lengths: Lengths of the rows, integers [R].
    buckets: Lengths to pad to, in ascending order.
  """
  return sorted({bucket_of(n, buckets) for n in lengths})


def rows_of(lengths: np.ndarray, buckets: tuple[int, ...], bucket: int,
            batch_size: int) -> Iterator[np.ndarray]:
  """Yields the evaluation batches of a bucket, with each of its rows once.

  Args:
    lengths: Lengths of the rows, integers [R].
    buckets: Lengths to pad to, in ascending order.
    bucket: The bucket.
    batch_size: Number of rows per batch. The last batch may have fewer.

  Yields:
    Indices of the rows of a batch.
  """
  rows = np.flatnonzero([bucket_of(n, buckets) == bucket for n in lengths])
  for i in range(0, len(rows), batch_size):
    yield rows[i:i + batch_size]
