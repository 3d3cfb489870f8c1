"""Adds a new classification head to a model, for tasks without label words.

The head is that of transformers' classes for sequence classification. A masked
model is read at its first token, and the head is a dense layer, tanh and a
linear layer. A causal model is read at its last token, and the head is one
matrix without a bias. The parameters are float32 and are stored next to those
of the model, under ``classifier``.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax.models import Config


def init(key: jax.Array, config: Config, num_classes: int) -> dict[str, Any]:
  """Creates a classification head.

  Kernels are normal with a standard deviation of 0.02, and biases are 0.

  Args:
    key: PRNG key.
    config: Config of the model.
    num_classes: Number C of classes.

  Returns:
    A nested dict of float32 arrays: ``out/kernel`` [D, C] and, for a masked
    model, ``out/bias`` [C], ``dense/kernel`` [D, D] and ``dense/bias`` [D].
  """
  d, c = config.width, num_classes
  normal = lambda i, shape: 0.02 * jax.random.normal(
      jax.random.fold_in(key, i), shape, jnp.float32)
  if config.causal:
    return {'out': {'kernel': normal(0, (d, c))}}
  return {'dense': {'kernel': normal(0, (d, d)), 'bias': jnp.zeros(d)},
          'out': {'kernel': normal(1, (d, c)), 'bias': jnp.zeros(c)}}


def apply(classifier: dict[str, Any], x: jax.Array) -> jax.Array:
  """Applies a classification head.

  Args:
    classifier: Parameters from `init`.
    x: Features [B, D] of the model, of any floating-point dtype.

  Returns:
    Logits, float32 [B, C].
  """
  def linear(p, x):
    return x @ p['kernel'] + p.get('bias', 0.0)
  x = x.astype(jnp.float32)
  if 'dense' in classifier:
    x = jnp.tanh(linear(classifier['dense'], x))
  return linear(classifier['out'], x)
