"""A new linear layer on the model's features: classes without a prompt.

As Hugging Face's classes for sequence classification have it: a masked model is
read at its first token, through a dense layer and tanh; a causal one at its
last, by one matrix without a bias. Parameters stand beside the model's, under
``classifier``, in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax.models import Config


def init(key: jax.Array, config: Config, num_classes: int) -> dict[str, Any]:
  """Normal kernels of standard deviation 0.02, biases 0."""
  d, c = config.width, num_classes
  normal = lambda i, shape: 0.02 * jax.random.normal(
      jax.random.fold_in(key, i), shape, jnp.float32)
  if config.causal:
    return {'out': {'kernel': normal(0, (d, c))}}
  return {'dense': {'kernel': normal(0, (d, d)), 'bias': jnp.zeros(d)},
          'out': {'kernel': normal(1, (d, c)), 'bias': jnp.zeros(c)}}


def apply(classifier: dict[str, Any], x: jax.Array) -> jax.Array:
  """float32 logits [B, C] of features x [B, D]."""
  def linear(p, x):
    return x @ p['kernel'] + p.get('bias', 0.0)
  x = x.astype(jnp.float32)
  if 'dense' in classifier:
    x = jnp.tanh(linear(classifier['dense'], x))
  return linear(classifier['out'], x)
