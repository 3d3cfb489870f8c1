"""Rows in, batches out: files and hub data sets, splits, buckets, order."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mezo_jax import config as config_lib
from mezo_jax import quickstart
from mezo_jax.tasks import classification

_FORMATS = {'.jsonl': 'json', '.json': 'json', '.csv': 'csv', '.tsv': 'csv',
            '.parquet': 'parquet'}


def load_rows(
    source: str, subset: str = '', split: str = 'train') -> list[dict]:
  """Rows of a local file or of a data set on the Hugging Face hub.

  Args:
    source: a jsonl, csv, tsv or parquet file, or a hub id.
    subset: configuration of the hub data set (``'sst2'`` of ``nyu-mll/glue``).
    split: split of the hub data set.

  Raises:
    FileNotFoundError: if there is neither such a file nor such a data set.
    ValueError: if the file cannot be read or is empty.
  """
  import datasets  # slow to import, not needed by the quickstart
  path = Path(source).expanduser()
  if path.suffix in _FORMATS:
    if not path.is_file():
      raise FileNotFoundError(f'no data file {path}.')
    kind = _FORMATS[path.suffix]
    options = {'delimiter': '\t'} if path.suffix == '.tsv' else {}
    try:
      data = datasets.load_dataset(
          kind, data_files=str(path), split='train', **options)
    except Exception as e:
      cause = e.__cause__ or e
      raise ValueError(
          f'{path} is not a readable {kind} file: {_first_line(cause)}') from e
  else:
    try:
      data = datasets.load_dataset(source, subset or None, split=split)
    except Exception as e:
      raise FileNotFoundError(
          f'{source!r} is no local .jsonl, .csv, .tsv or .parquet file, and '
          f'the hub gave no such data set: {_first_line(e)}') from e
  if not len(data):
    raise ValueError(f'{source} has no rows.')
  return [dict(row) for row in data]


def _first_line(e: BaseException) -> str:
  return (str(e).strip().splitlines() or [type(e).__name__])[0]


def split_rows(labels: np.ndarray, num_train: int, num_dev: int, num_test: int,
               seed: int, k_shot: int = 0) -> tuple[np.ndarray, ...]:
  """Indices (train, dev, test) of rows; test rows do not depend on the seed.

  Test rows are the first ``num_test`` of a fixed permutation. Of the rest, as
  the paper does it, ``permutation(seed)[:num_train + num_dev]`` is the sample
  and its tail the dev rows; or, with ``k_shot``, the first k of every label
  are train and the next k dev.

  Raises:
    ValueError: if there are too few rows.
  """
  test, rest = np.split(
      np.random.RandomState(0).permutation(len(labels)), [num_test])
  order = np.sort(rest)[np.random.RandomState(seed).permutation(len(rest))]
  if k_shot:
    of = [order[labels[order] == c] for c in np.unique(labels)]
    need, have = 2 * k_shot, min(map(len, of))
    train = np.concatenate([i[:k_shot] for i in of])
    dev = np.concatenate([i[k_shot:2 * k_shot] for i in of])
  else:
    need, have = num_train + num_dev, len(order)
    train, dev = order[:num_train], order[num_train:num_train + num_dev]
  if have < need:
    what = 'rows of the rarest label' if k_shot else 'rows'
    raise ValueError(
        f'the data have {have} {what} beside the {len(test)} for testing, and '
        f'{need} are wanted; lower --config.data.num_train, num_dev or k_shot.')
  return train, dev, test


def read_splits(
    config: config_lib.Data, task_config: config_lib.Task, tokenizer,
    positions: int, say: Callable[[str], None],
) -> tuple[dict[str, classification.Encoded], tuple[int, ...]]:
  """The encoded rows of a run, and the lengths that they are padded to.

  Args:
    config: where the rows are and how many are wanted.
    task_config: how they read.
    tokenizer: the model's.
    positions: tokens that the model can take.
    say: reports what was found.

  Returns:
    ``{'train': ..., 'dev': ..., 'test': ...}`` and the buckets that they need.
  """
  options = vars(task_config)
  task = classification.Classification(**options | {
      name: tuple(options[name]) for name in ('label_words', 'label_names')})
  if config.train == 'quickstart':
    rows = quickstart.reviews()
  else:
    rows = load_rows(config.train, config.subset, config.train_split)
  labels = np.array([task.label(row) for row in rows])
  indices = split_rows(
      labels, config.num_train, config.num_dev,
      0 if config.test else config.num_test, config.seed, config.k_shot)
  parts = {name: [rows[i] for i in index] for name, index in
           zip(('train', 'dev', 'test'), indices)}
  if config.test:
    test = load_rows(config.test, config.subset, config.test_split)
    most = config.num_test or len(test)
    order = np.random.RandomState(0).permutation(len(test))[:most]
    parts['test'] = [test[i] for i in order]

  def encode(**kwargs):
    return {name: classification.encode(
        task, part, tokenizer, min(config.max_length, positions), **kwargs)
            for name, part in parts.items()}

  splits = encode()
  if len({split.token_ids is None for split in splits.values()}) > 1:
    splits = encode(pad_to_candidates=True)  # one form for all
  for name, split in splits.items():
    cut = (f'; {split.truncated} rows lost tokens at their beginning'
           if split.truncated else '')
    say(f'data: {len(split.labels)} {name} rows, {split.lengths.mean():.0f} '
        f'tokens on average, {split.lengths.max()} at most{cut}')
  longest = int(max(split.lengths.max() for split in splits.values()))
  shorter = [b for b in config.buckets if b < longest]
  enough = [b for b in config.buckets if b >= longest]
  return splits, (*shorter, min(enough, default=longest))


def bucket_of(length: int, buckets: tuple[int, ...]) -> int:
  """The smallest bucket that holds ``length`` tokens."""
  for bucket in buckets:
    if length <= bucket:
      return bucket
  raise ValueError(f'{length} tokens exceed the largest bucket, {buckets[-1]}.')


def used_buckets(lengths, buckets: tuple[int, ...], batch_size: int):
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
    raise ValueError(
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


def in_order(lengths: np.ndarray, buckets: tuple[int, ...], batch_size: int):
  """Evaluation batches: every row once, (bucket, indices), by bucket."""
  bucket = np.array([bucket_of(n, buckets) for n in lengths])
  for b in np.unique(bucket):
    rows = np.flatnonzero(bucket == b)
    for i in range(0, len(rows), batch_size):
      yield int(b), rows[i:i + batch_size]
