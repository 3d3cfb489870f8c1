"""Scores, accuracy, and accuracy with a calibrated threshold."""

from collections.abc import Callable

import jax
import numpy as np

from mezo_jax import data as data_lib
from mezo_jax import sharding
from mezo_jax.tasks import classification


def make_scorer(model, encoded: classification.Encoded, buckets, batch_size,
                mesh) -> Callable:
  """``score(params) -> float32 [R, C]`` over all rows, jitted per bucket.

  No row is dropped: the last batch of a bucket is padded.
  """
  groups = sharding.row_groups(mesh)
  batch_size = -(-min(batch_size, len(encoded.labels)) // groups) * groups
  score_batch = jax.jit(
      lambda params, batch: classification.scores(
          model, params, batch, encoded.token_ids),
      out_shardings=sharding.replicated(mesh))

  def score(params) -> np.ndarray:
    parts = []
    for length, index in data_lib.in_order(
        encoded.lengths, buckets, batch_size):
      batch = classification.batch_of(encoded, index, length, batch_size)
      batch = sharding.put_batch(batch, mesh)
      with jax.set_mesh(mesh):
        parts.append((index, score_batch(params, batch)))
    out = [None] * len(encoded.labels)
    for index, scores in parts:
      for row, value in zip(index, jax.device_get(scores)):
        out[row] = value
    return np.stack(out)

  return score


def report(scores: np.ndarray, labels: np.ndarray,
           offsets: np.ndarray | None = None) -> dict:
  """Loss and accuracy of scores [R, C] against labels [R].

  With ``offsets`` [C], also the accuracy of ``scores + offsets``.
  """
  shifted = scores - scores.max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  loss = -log_p[np.arange(len(labels)), labels].mean()
  accuracy = lambda s: float(np.mean(s.argmax(-1) == labels))
  out = {'accuracy': accuracy(scores), 'loss': float(loss),
         'count': len(labels)}
  if offsets is not None:
    out['calibrated_accuracy'] = accuracy(scores + offsets)
  return out


def calibrate(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """One offset a class that makes scores [R, C] most accurate on their rows.

  For two classes this is the best threshold. A model's prior for its label
  words is corrected so without any training, which is what a fine-tuned model
  has to beat. Coordinate ascent; of equally good offsets, the middle one.
  """
  offsets = np.zeros(scores.shape[1])
  for _ in range(3 if scores.shape[1] > 2 else 1):
    for c in range(1, scores.shape[1]):
      others = np.delete(scores + offsets, c, axis=1).max(-1)
      edges = np.sort(others - scores[:, c])  # row turns to c at its edge
      tries = np.concatenate(
          [[edges[0] - 1], (edges[1:] + edges[:-1]) / 2, [edges[-1] + 1]])
      hits = []
      for offset in tries:
        offsets[c] = offset
        hits.append(np.sum((scores + offsets).argmax(-1) == labels))
      best = np.flatnonzero(np.array(hits) == max(hits))
      offsets[c] = tries[best[len(best) // 2]]
  return offsets
