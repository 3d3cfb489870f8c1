"""The batches that steps are made from."""

from collections.abc import Iterator
import itertools
from typing import Any, NamedTuple

import jax

from mezo_jax.core import sharding
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import encode
from mezo_jax.training import privacy


class Drawn(NamedTuple):
  """How batches are drawn from the training rows.

  Attributes:
    batch_size: Rows of a batch.
    seed: Seed of the order of the rows.
    anchor_every: Batches from one anchor to the next; 0 for no anchors.
    anchor_batches: Number of batches whose rows an anchor has.
  """

  batch_size: int
  seed: int
  anchor_every: int = 0
  anchor_batches: int = 0


def lengths(splits: data_lib.Splits, batch_size: int,
            plan: privacy.Plan | None = None) -> list[int]:
  """Returns the lengths in tokens that batches have.

  Batches of a private run, which has a plan, all have the same length.
  """
  buckets = splits.buckets['train']
  if plan:
    return list(buckets)
  return data_lib.used_buckets(splits.train.lengths, buckets, batch_size)


def private(plan: privacy.Plan, secret: bytes, splits: data_lib.Splits,
            mesh: jax.sharding.Mesh, start: int
            ) -> Iterator[tuple[int, Any, dict[str, Any]]]:
  """Yields the batches of a private run, as `batches` does.

  All have the same number of rows and tokens, which therefore say nothing about
  the rows that were sampled.
  """
  length, = splits.buckets['train']
  for number in itertools.count(start):
    rows = encode.batch_of(splits.train, privacy.sample(secret, number, plan),
                           length, plan.capacity)
    yield (plan.capacity * length, sharding.put_batch(rows, mesh),
           dict(noise_key=privacy.noise_key(secret, number)))


def batches(drawn: Drawn, splits: data_lib.Splits,
            mesh: jax.sharding.Mesh, start: int
            ) -> Iterator[tuple[int, Any, dict[str, Any]]]:
  """Yields ``tokens, batch, more`` from batch number ``start`` on.

  ``batch`` is on the mesh and ``more`` holds further arguments of the step.
  """
  train, every = splits.train, drawn.anchor_every

  def put(length, index):
    batch = encode.batch_of(train, index, length, len(index))
    return int(batch['attention_mask'].sum()), sharding.put_batch(batch, mesh)
  # Anchors are all the same batch, which is not drawn.
  anchors = -(-start // every) if every else 0
  ordinary = data_lib.batches(
      train.lengths, splits.buckets['train'], drawn.batch_size, drawn.seed,
      start - anchors)
  anchor = None
  if every:
    anchor = put(*data_lib.spread(
        train.lengths, splits.buckets['train'],
        drawn.anchor_batches * drawn.batch_size))
  for number in itertools.count(start):
    if anchor is not None and number % every == 0:
      yield *anchor, {}
    else:
      yield *put(*next(ordinary)), {}
