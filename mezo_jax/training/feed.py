"""Yields the batches of training steps."""

from collections.abc import Iterator
import itertools
from typing import Any, NamedTuple

import jax

from mezo_jax.core import sharding
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import encode
from mezo_jax.training import privacy


class Drawn(NamedTuple):
  """Describes how batches are drawn from the training rows.

  Attributes:
    batch_size: Number of rows in a batch.
    seed: Seed of the order of the rows.
    anchor_every: Number of batches from one anchor to the next. An anchor is a
      step at which SVRG estimates the gradient on a larger batch. Defaults to
      0, for no anchors.
    anchor_batches: Number of rows of an anchor's batch divided by
      ``batch_size``. Defaults to 0.
  """

  batch_size: int
  seed: int
  anchor_every: int = 0
  anchor_batches: int = 0


def lengths(splits: data_lib.Splits, batch_size: int,
            plan: privacy.Plan | None = None) -> list[int]:
  """Returns the sequence lengths that batches are padded to.

  Args:
    splits: The encoded rows.
    batch_size: Number of rows in a batch.
    plan: Plan of a private run, whose batches all have the same length.
      Defaults to None, for another run.
  """
  buckets = splits.buckets['train']
  if plan:
    return list(buckets)
  return data_lib.used_buckets(splits.train.lengths, buckets, batch_size)


def private(plan: privacy.Plan, secret: bytes, splits: data_lib.Splits,
            mesh: jax.sharding.Mesh, start: int
            ) -> Iterator[tuple[int, Any, dict[str, Any]]]:
  """Yields the batches of a private run, in the same form as `batches`.

  All batches are padded to the same number of rows and tokens, and ``tokens``
  includes the padding. So their shapes and ``tokens`` reveal nothing about the
  sampled rows.

  Args:
    plan: Plan of the run.
    secret: Secret of the run, which determines the samples and the noise.
    splits: The encoded rows.
    mesh: Mesh that the batches are put on.
    start: Number of the first batch, from 0.
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
  """Yields ``(tokens, batch, more)`` for one batch after the other.

  ``tokens`` is the number of tokens without padding, ``batch`` is on the mesh,
  and ``more`` is a dict of further keyword arguments of the step.

  Args:
    drawn: How the batches are drawn.
    splits: The encoded rows.
    mesh: Mesh that the batches are put on.
    start: Number of the first batch, from 0.
  """
  train, every = splits.train, drawn.anchor_every

  def put(length, index):
    """Returns the number of tokens of a batch, and the batch on the mesh."""
    batch = encode.batch_of(train, index, length, len(index))
    return int(batch['attention_mask'].sum()), sharding.put_batch(batch, mesh)
  # All anchors have the same batch. It takes the place of a drawn batch, so the
  # number of drawn batches before `start` is smaller than `start`.
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
