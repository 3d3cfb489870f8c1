"""Rows in, batches out: files and hub data sets, splits, buckets, order."""

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
from mezo_jax.tasks import quickstart_data, Task
from mezo_jax.tasks.encode import (
  after_tokens,
  encode,
  Encoded,
  space_warnings,
)
from mezo_jax.tasks.task import ClassNumber


def load_rows(
    source: str, subset: str = '', split: str = 'train'
) -> list[dict[str, Any]]:
  """Reads the rows of a local file or of a data set on the Hugging Face hub.

  A local file is read as it is, without a cache. All columns of csv and tsv
  files are texts: ``00501``, ``1e3``, ``True``, ``NA`` and dates stay what is
  written there. Values of jsonl and parquet files have the types that the file
  gives them.

  Args:
    source: The path of a jsonl, json, csv, tsv or parquet file (never a
      pattern); a directory with one such file of the split's name, or with
      parquet files laid out as on the hub; or a hub id.
    subset: Configuration of the hub data set (``'sst2'`` of ``nyu-mll/glue``).
    split: Split of the hub data set or directory.

  Raises:
    FileNotFoundError: if there is neither such a file nor such a data set.
    ValueError: if the file cannot be read or is empty; it names the line.
  """
  source = os.fspath(source)
  path = Path(source)
  if source.startswith('~') and not path.exists():
    path = Path(os.path.expanduser(source))
  read = _READERS.get(path.suffix.lower())
  if path.is_dir() and not subset:  # it may have a file of the split's name
    named = [path / f'{split}{suffix}' for suffix in _READERS]
    found = [file for file in named if file.is_file()]
    if len(found) > 1:
      raise InputError(
          f'the directory {path} has {" and ".join(f.name for f in found)}: '
          'give the one to read.')
    if found:
      path, = found
      read = _READERS[path.suffix]
  if path.is_file():
    if not read:
      raise InputError(
          f'{path} is not a .jsonl, .json, .csv, .tsv or .parquet file: '
          'convert or rename it.')
    rows = _read_file(path, read)
  elif read and not path.is_dir():
    raise MissingError(f'no data file {path}.')
  else:
    rows = _load_data_set(source, path, subset, split)
  if not rows:
    raise InputError(f'{source} has no rows.')
  return rows


def _load_data_set(source: str, path: Path, subset: str,
                   split: str) -> list[dict]:
  """Reads a hub data set, or a directory that is laid out like one."""
  import datasets  # slow to import, not needed for local files
  if path.is_dir():
    source = str(path)
    guessed = [f for suffix in ('*.csv', '*.tsv', '*.jsonl')
               for f in path.rglob(suffix)]
    if guessed:
      raise InputError(
          f'the directory {path} has files such as {guessed[0].name}, whose '
          'texts its reader would take for numbers and dates: give the file '
          f'itself, or name it {split}{guessed[0].suffix}.')
    if re.search(r'[*?\[\]]|::|://', str(path.resolve())):
      raise InputError(
          f'the path of the directory {path} has one of the characters *?[] or '
          '::, which its reader takes for a pattern: rename it, or give the '
          'file itself.')
  try:
    data = datasets.load_dataset(source, subset or None, split=split)
    rows = [dict(row) for row in data]
  except Exception as e:
    _check_caches(source, e)
    raise MissingError(
        f'{source!r} is no local .jsonl, .csv, .tsv or .parquet file, and '
        f'the hub gave no such data set: {first_line(e)}') from e
  return _with_class_names(rows, {
      column: feature.names for column, feature in data.features.items()
      if isinstance(feature, datasets.ClassLabel) and feature.names})


def _check_caches(source: str, error: Exception) -> None:
  """Raises InputError if data could not be loaded and a cache that they go
  through cannot be written."""
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
          f'cache {cache} cannot be written ({e.strerror}): set HF_HOME to a '
          'directory that can.') from error


def _with_class_names(rows: list[dict],
                      names: dict[str, list[str]]) -> list[dict]:
  """Returns rows whose class numbers know the names of their classes.

  Args:
    rows: Changed in place.
    names: The names of the classes of each column that has numbers of classes.
  """
  for column, of_column in names.items():
    for row in rows:
      number = row[column]
      if number is not None and 0 <= number < len(of_column):
        row[column] = ClassNumber(number, of_column[number])
  return rows


# --- local files ------------------------------------------------------------


def _read_file(path: Path, read: Callable) -> list[dict]:
  """Reads a file; where that fails, the error says which one it is."""
  try:
    return read(path)
  except OSError as e:
    raise InputError(f'{path} cannot be read: {e.strerror or e}.') from e
  except Exception as e:
    kind = path.suffix.lower()[1:].replace('jsonl', 'json')
    raise InputError(
        f'{path} is not a readable {kind} file: {first_line(e)}') from e


def _text_of(path: Path) -> str:
  """Returns the text of a file in UTF-8, with or without a byte order mark."""
  data = path.read_bytes()
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as e:
    line = data[:e.start].count(b'\n') + 1
    raise ValueError(
        f'line {line} is not UTF-8 (byte 0x{data[e.start]:02x}); save the file '
        'as UTF-8, uncompressed.') from e
  if '\0' in text:
    line = text[:text.index('\0')].count('\n') + 1
    raise ValueError(f'line {line} has a NUL character; save the file as UTF-8 '
                     'text.')
  return text


def _csv(path: Path) -> list[dict]:
  """Reads a csv file: a text with a comma, line break or quotation mark in it
  is in quotation marks, which are doubled within."""
  return _table(_cells(_text_of(path), ','), ',')


def _tsv(path: Path) -> list[dict]:
  """Reads a tsv file, in which a quotation mark is a letter like any other.

  There are two exceptions. Lines that lack tabs may continue a text in
  quotation marks. And a program that quotes may have written the file: then
  each cell with a quotation mark is in quotation marks, and the marks within
  are doubled, or all of the header is in quotation marks.
  """
  text = _text_of(path)
  ends = '\n' if '\n' in text else '\r'
  lines = [line.removesuffix('\r') for line in text.split(ends)]
  rows = [(number, line.split('\t'))
          for number, line in enumerate(lines, 1) if line]
  if any(len(row) != len(rows[0][1]) for _, row in rows):
    try:
      return _table(_cells(text, '\t'), '\t')
    except ValueError:  # then it is not quoted
      return _table(rows, '\t')
  marked = [cell for _, row in rows for cell in row if '"' in cell]
  if marked and all(re.fullmatch(r'"([^"]|"")*"', c) for c in marked) and (
      all(cell[:1] == '"' for cell in rows[0][1])
      or any('""' in cell[1:-1] for cell in marked)):
    rows = _cells(text, '\t')
  return _table(rows, '\t')


def _cells(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
  """Yields (number of its first line, cells) of each row of a quoted table."""
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
          f'the quotation marks of the row that begins in line {line} do not '
          f'match ({e}); a text with a quotation mark in it is written '
          '"like ""this"""') from e
    if row:
      yield line, row


def _table(rows: Iterable[tuple[int, list[str]]], delimiter: str) -> list[dict]:
  """Makes rows of cells, of which the first are the names of the columns."""
  rows = iter(rows)
  _, names = next(rows, (1, []))
  if len(names) == 1:
    other = next((c for c in ',;\t|' if c != delimiter and c in names[0]), None)
    if other:
      raise ValueError(
          f'its first line, {names[0]!r}, has {other!r} between the columns '
          f'and not {delimiter!r}; save it with that, or as .jsonl.')
  _check_names(names)
  out = []
  for line, cells in rows:
    if len(cells) != len(names):
      hint = '; a text with a comma in it needs quotation marks' if (
          delimiter == ',') else ''
      raise ValueError(
          f'the row in line {line} has {len(cells)} cells for {len(names)} '
          f'columns{hint}.')
    out.append({name: cell for name, cell in zip(names, cells) if name})
  return out


def _check_names(names: Sequence[str]) -> None:
  twice = [name for name in names if name and names.count(name) > 1]
  if twice:
    raise ValueError(f'two columns have the name {twice[0]!r}.')


def _json(path: Path) -> list[dict]:
  """Reads one object a line, a list of objects, or an object of columns."""
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
            'its first object goes over several lines; write one object a '
            'line, or all of them as a list, [...]') from None
      if rows is None:
        raise
  for number, row in enumerate(rows, 1):
    if not isinstance(row, dict):
      raise ValueError(f'row {number} is not an object but {str(row)[:80]!r}.')
  names = dict.fromkeys(name for row in rows for name in row)
  return [{name: row.get(name) for name in names} for row in rows]


def _parse(text: str, line: int = 0):
  """Returns a JSON value; errors name its line in the file, if it is one."""
  def object_of(pairs):
    _check_names([name for name, _ in pairs])
    return dict(pairs)
  try:
    found = json.loads(text, object_pairs_hook=object_of)
    if re.search(r'\\u[dD][89a-fA-F]', text):  # halves of a character
      json.dumps(found, ensure_ascii=False).encode()
    return found
  except json.JSONDecodeError as e:
    raise ValueError(
        f'line {line or e.lineno}, column {e.colno}: {e.msg}.') from e
  except (ValueError, RecursionError) as e:
    raise ValueError(f'line {line}: {first_line(e)}' if line else str(e)) from e


def _rows_of_columns(text: str) -> list[dict] | None:
  """Returns the rows of an object of equally long lists; None for another."""
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
  import pyarrow.parquet  # slow to import
  with path.open('rb') as f:  # of a path, 'name=value' would become a column
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
  """Indices (train, dev, test) of rows; test rows do not depend on the seed.

  Test rows are the first ``num_test`` of a fixed permutation. Of the rest, as
  the paper does it, ``permutation(seed)[:num_train + num_dev]`` is the sample
  and its tail the dev rows; or, with ``k_shot``, the first k of every label
  are train and the next k dev.

  Raises:
    InputError: if there are too few rows; it names the number to lower.
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
        f'label {rarest} has {have} rows{held}, and --config.data.k_shot='
        f'{k_shot} takes {2 * k_shot} of each label for train and dev; '
        + (f'lower {lower}.' if lower else 'give more rows.'))
  train = np.concatenate([i[:k_shot] for i in of.values()])
  dev = np.concatenate([i[k_shot:2 * k_shot] for i in of.values()])
  return train, dev, test


def _check_enough(rows: int, num_train: int, num_dev: int,
                  num_test: int) -> None:
  """Raises InputError if the splits want more rows than there are."""
  wanted = {'num_test': num_test, 'num_dev': num_dev, 'num_train': num_train}
  wanted = {name: n for name, n in wanted.items() if n}
  total = sum(wanted.values())
  if total <= rows:
    return
  # The most that each could be if the others stay as they are. Some are not
  # large enough to make up for it alone.
  least = {name: rows - (total - n) for name, n in wanted.items()}
  alone = [f'--config.data.{name} to {n}' for name, n in least.items() if n > 0]
  numbers = ', '.join(f'{name} {n}' for name, n in reversed(wanted.items()))
  if alone:
    how = f'lower {" or ".join(alone)}'
  else:
    how = 'lower ' + ', '.join(f'--config.data.{name}' for name in wanted)
  raise InputError(
      f'the data have {rows} rows, and {total} are wanted: data.{numbers}; '
      f'{how}, or set one to -1 for a share of the rows.')


_SHARES = {'train': 3, 'dev': 1, 'test': 1}
_MOST = {'dev': 500, 'test': 1000}  # of a share


def share_out(rows: int, num_train: int, num_dev: int,
              num_test: int) -> tuple[int, int, int]:
  """Returns the numbers of train, dev and test rows, with a share of the rows
  for each that is -1.

  What the given numbers leave is divided by 3 to 1 to 1 among the others; dev
  rows are at most 500 and test rows at most 1,000, and train rows, if they are
  a share, take the rest.

  Args:
    rows: How many there are.
    num_train: Train rows, or -1.
    num_dev: Dev rows, or -1.
    num_test: Test rows, -1, or 0 where they come from elsewhere.

  Raises:
    InputError: If nothing is left for a share.
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
          f'the data have {rows} row{"s" if rows != 1 else ""}, which is too '
          f'few for one each of {", ".join(shared)}: give more rows.')
    raise InputError(
        f'the data have {rows} rows, which leaves none for {what} next to '
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
  """The rows of a run, as `Task.prepare` gives them."""

  train: list[dict[str, Any]]
  dev: list[dict[str, Any]]
  test: list[dict[str, Any]]
  # All that are not for testing, to take demonstrations from.
  pool: list[dict[str, Any]]


class Splits(NamedTuple):
  """The rows of a run as tokens."""

  train: Encoded  # as the objective needs them
  dev: Encoded  # as evaluation needs them; right answers alone for their loss
  test: Encoded
  prior: dict[str, Encoded]  # candidates after a prompt without content
  buckets: dict[str, tuple[int, ...]]  # lengths that each is padded to
  # Dev and test rows with their right answers, where answers are generated and
  # the language-model loss is trained.
  gold: dict[str, Encoded]


def read_rows(source: Any, task: Task) -> Rows:
  """Reads, chooses and splits rows.

  Args:
    source: the files or data sets, and how many rows of them, as
      `mezo_jax.training.config.Data` has them.
    task: whose data are taken where ``source`` names none.

  Raises:
    MissingError: if there are no such data.
    InputError: if no data are named, or they do not fit the task.
  """
  d, name = source, source.train or task.hub
  if not name:
    raise InputError(
        'there is nothing to train on: set --config.data.train to a file or '
        'the id of a data set.')
  subset = d.subset or ('' if d.train else task.subset)
  if name == 'quickstart':
    rows = quickstart_data.reviews()
  else:
    rows = load_rows(name, subset, d.train_split or task.train_split)
  rows = task.prepare(rows)
  held_out = d.test or ('' if d.train else task.hub)
  indices = split_rows(_labels(d, task, rows),
                       *_numbers(d, len(rows), held_out), d.seed, d.k_shot)
  train, dev, test = ([rows[i] for i in index] for index in indices)
  if held_out:
    found = task.prepare(load_rows(
        held_out, subset, d.test_split or task.test_split))
    order = np.random.RandomState(d.test_seed).permutation(len(found))
    test = [found[i] for i in order[:d.num_test if d.num_test > 0 else None]]
  for_test = set() if held_out else set(indices[2].tolist())
  return Rows(train, dev, test,
              [r for i, r in enumerate(rows) if i not in for_test])


def _labels(d, task: Task, rows: Sequence[dict]) -> np.ndarray:
  """Returns the labels by which `split_rows` takes ``k_shot`` rows of each."""
  if not d.k_shot or task.traits.generates:
    return np.zeros(len(rows), int)
  labels = np.array([task.golds(row)[0] for row in rows])
  missing = {*range(task.num_classes)} - {*labels.tolist()}
  if task.traits.classes and missing:
    raise InputError(
        f'no row has label {min(missing)}, and --config.data.k_shot={d.k_shot} '
        'takes as many of each; check the data and --config.task.label_words.')
  return labels


def _numbers(d, rows: int, held_out: str) -> tuple[int, int, int]:
  """Returns how many train, dev and test rows `split_rows` is to take."""
  num_test = 0 if held_out else d.num_test
  if not d.k_shot:
    return share_out(rows, d.num_train, d.num_dev, num_test)
  if num_test < 0:
    num_test = min(max(rows // 5, 1), _MOST['test'])
  return 0, 0, num_test


def demonstrations(task: Task, pool: Sequence[dict[str, Any]], num: int,
                   count: int) -> list[str]:
  """Returns the texts before ``count`` prompts: ``num`` rows with answers each.

  As in the paper's code each prompt has rows of its own: seeds
  ``RandomState(0).randint(0, 10000, count)``, and of each seed the first
  ``num`` rows of a permutation of the pool.

  Raises:
    InputError: if the pool is smaller than ``num``.
  """
  if len(pool) < num:
    raise InputError(f'there are {len(pool)} rows for {num} demonstrations; '
                     'lower --config.num_demos.')
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
    lm_loss: bool = False, needs_gold: bool = True,
    say: Callable[[str], None] = print) -> Splits:
  """The rows of a run as tokens, and the lengths that they are padded to.

  Args:
    rows: from `read_rows`.
    task: how a row reads.
    tokenizer: the model's.
    causal: whether the model reads from left to right.
    limit: tokens of a prompt with its answer at most.
    buckets: lengths to pad to, of which those are taken that are needed.
    gold_only: which splits are laid out with their right answers alone.
    num_demos: rows with their answers that stand before each test prompt.
    prior: whether dev and test candidates are wanted after a prompt without
      content, too.
    soft_ids: of the tokens that stand before everything.
    untold: splits that are padded to ``limit``, so that nothing tells how long
      their rows are.
    lm_loss: Whether the language-model loss of the right answers of dev and
      test rows is wanted, too: candidates are then laid out in full, and where
      answers are generated the right ones are encoded in addition.
    needs_gold: Whether each row must have a right answer.
    say: reports what was found.

  Raises:
    InputError: if rows, task and tokenizer do not fit each other.
  """
  labels = task.reading([*rows.train, *rows.dev, *rows.test])
  if untold:  # what is reported must not depend on such rows
    labels = task.reading([*rows.dev, *rows.test])
  for text in (labels, *space_warnings(task, rows.dev, tokenizer)):
    if text:
      say(text)
  demos = {'test': demonstrations(
      task, rows.pool, num_demos, len(rows.test))} if num_demos else {}

  def read(name, of_prior=False, **kwargs):
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
  if len({s.token_ids is None for s in splits.values() if s.width > 1}) > 1:
    splits = {name: read(name, write_out=True) for name in names}
  golds = {name: read(name, gold_only=True) for name in ('dev', 'test') if (
      lm_loss and splits[name].generates)}
  priors = {name: read(name, of_prior=True) for name in ('dev', 'test') if (
      prior and splits[name].width > 1)}
  whole = limit + len(soft_ids)
  most = lambda split: whole - (task.max_new_tokens if split.generates else 0)
  for name, split in splits.items():
    if name in untold:
      if split.lengths.max() > most(split):
        raise InputError(
            f'a {name} row has more than {most(split)} tokens, its candidates '
            'included; raise --config.data.max_length, to which all are padded '
            'here.')
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
  return Splits(**splits, prior=priors, buckets=needed, gold=golds)


def buckets_for(data: Encoded, buckets: Sequence[int], limit: int
                ) -> tuple[int, ...]:
  """Those of the buckets that the rows need, none above what a model takes."""
  longest = int(data.lengths.max())
  shorter = [b for b in buckets if b < longest]
  enough = min([b for b in buckets if b >= longest], default=longest)
  return (*shorter, max(longest, min(enough, limit)))


def bucket_of(length: int, buckets: tuple[int, ...]) -> int:
  """The smallest bucket that holds ``length`` tokens."""
  for bucket in buckets:
    if length <= bucket:
      return bucket
  raise InputError(f'{length} tokens exceed the largest bucket, {buckets[-1]}.')


def used_buckets(lengths: Any, buckets: tuple[int, ...], batch_size: int
                 ) -> list[int]:
  """The buckets that `epoch` will use: as many step functions are compiled."""
  return sorted({b for b, _ in epoch(lengths, buckets, batch_size, 0, 0)})


def epoch(lengths: np.ndarray, buckets: tuple[int, ...], batch_size: int,
          seed: int, number: int) -> list[tuple[int, np.ndarray]]:
  """The batches of one epoch: (bucket, indices of ``batch_size`` rows).

  A permutation by (seed, number), dealt out by bucket so that rows of like
  length share a batch; what a bucket has left over moves up to the next, and
  what the largest has left over sits this epoch out. The number of batches is
  the same in every epoch.

  Raises:
    ValueError: if there are fewer rows than a batch takes.
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
  """The endless sequence of training batches from number ``start`` on."""
  number, at = divmod(start, len(epoch(lengths, buckets, batch_size, seed, 0)))
  while True:
    yield from epoch(lengths, buckets, batch_size, seed, number)[at:]
    number, at = number + 1, 0


def spread(lengths: np.ndarray, buckets: tuple[int, ...],
           rows: int) -> tuple[int, np.ndarray]:
  """One batch of rows evenly from all: (its bucket, their indices)."""
  index = np.arange(rows) * len(lengths) // rows
  return bucket_of(int(np.max(lengths[index])), buckets), index


def used_lengths(lengths: np.ndarray, buckets: tuple[int, ...]) -> list[int]:
  """The buckets that rows of these lengths fall into."""
  return sorted({bucket_of(n, buckets) for n in lengths})


def rows_of(lengths: np.ndarray, buckets: tuple[int, ...], bucket: int,
            batch_size: int) -> Iterator[np.ndarray]:
  """Evaluation batches of a bucket: the indices of its rows, each once."""
  rows = np.flatnonzero([bucket_of(n, buckets) == bucket for n in lengths])
  for i in range(0, len(rows), batch_size):
    yield rows[i:i + batch_size]
