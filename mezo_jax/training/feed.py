"""What each step of a task is made from."""

from collections.abc import Iterator
import itertools

from mezo_jax.core import sharding
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import encode
from mezo_jax.training import methods, privacy


def lengths(config, splits, plan=None) -> list[int]:
  """Of the batches; of a private run (with its plan) there is one."""
  buckets = splits.buckets['train']
  return buckets if plan else data_lib.used_buckets(
      splits.train.lengths, buckets, config.data.batch_size)


def private(plan, secret, splits, mesh, start: int) -> Iterator:
  """As `batches`; how many rows a batch has, and how long, tells nothing."""
  length, = splits.buckets['train']
  for number in itertools.count(start):
    rows = encode.batch_of(splits.train, privacy.sample(secret, number, plan),
                           length, plan.capacity)
    yield (plan.capacity * length, sharding.put_batch(rows, mesh),
           dict(noise_key=privacy.noise_key(secret, number)))


def batches(config, splits, mesh, start: int) -> Iterator:
  """Yields (tokens, batch on the mesh, more for the step) from batch number
  ``start`` on."""
  train, rows = splits.train, config.data.batch_size
  def put(length, index):
    batch = encode.batch_of(train, index, length, len(index))
    return int(batch['attention_mask'].sum()), sharding.put_batch(batch, mesh)
  every = methods.anchor_every(config)
  some = data_lib.batches(
      train.lengths, splits.buckets['train'], rows, config.seed,
      start - -(-start // every) if every else start)
  anchor = every and put(*data_lib.spread(
      train.lengths, splits.buckets['train'],
      methods.anchor_batches(config, len(train.prompts)) * rows))
  for number in itertools.count(start):
    batch = anchor if every and number % every == 0 else put(*next(some))
    yield *batch, {}
