"""Rows in, batches out: files and hub data sets, splits, buckets, order."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mezo_jax import quickstart
from mezo_jax.errors import first_line, InputError, MissingError
from mezo_jax.tasks import Task
from mezo_jax.tasks.encode import after_tokens, encode, Encoded

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
      raise MissingError(f'no data file {path}.')
    kind = _FORMATS[path.suffix]
    # What pandas would take for no value is a text like any other.
    options = dict(keep_default_na=False) if kind == 'csv' else {}
    options |= {'delimiter': '\t'} if path.suffix == '.tsv' else {}
    try:
      data = [*datasets.load_dataset(
          kind, data_files=str(path), split='train', **options)]
    except Exception as e:
      cause = e.__cause__ or e
      raise InputError(
          f'{path} is not a readable {kind} file: {first_line(cause)}') from e
  else:
    try:
      data = datasets.load_dataset(source, subset or None, split=split)
    except Exception as e:
      raise MissingError(
          f'{source!r} is no local .jsonl, .csv, .tsv or .parquet file, and '
          f'the hub gave no such data set: {first_line(e)}') from e
  if not len(data):
    raise InputError(f'{source} has no rows.')
  return [dict(row) for row in data]


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
  # What each could be if the others stay; only some can make up for it alone.
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
        f'the data have {rows} rows, which leaves none for {what} beside '
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

  train: list[dict]
  dev: list[dict]
  test: list[dict]
  pool: list[dict]  # all that are not for testing, to take demonstrations from


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


def read_rows(source, task: Task) -> Rows:
  """Reads, chooses and splits rows.

  Args:
    source: the files or data sets, and how many rows of them, as
      `mezo_jax.config.Data` has them.
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
    rows = quickstart.reviews()
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


def demonstrations(task: Task, pool: Sequence[dict], num: int,
                   count: int) -> list[str]:
  """What stands before each of ``count`` prompts: ``num`` rows with answers.

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
    rows: Rows, task: Task, tokenizer, *, causal: bool, limit: int,
    buckets: Sequence[int], gold_only: Sequence[str] = (), num_demos: int = 0,
    prior: bool = False, prior_after_demos: bool = False,
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
    prior_after_demos: whether demonstrations stand before that as well.
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
  demos = {'test': demonstrations(
      task, rows.pool, num_demos, len(rows.test))} if num_demos else {}

  def read(name, of_prior=False, **kwargs):
    some, prompts = getattr(rows, name), None
    if of_prior:
      prompts = [task.prior(r) for r in some]
    elif name in demos:
      prompts = [task.prompt(r) for r in some]
    if name in demos and (not of_prior or prior_after_demos):
      prompts = [d + p for d, p in zip(demos[name], prompts)]
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


def buckets_for(data: Encoded, buckets: Sequence[int],
                limit: int) -> tuple[int, ...]:
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
