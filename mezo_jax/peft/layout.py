"""Parameters laid out otherwise, so that a part of them can be trained alone:
the last k layers, or a head that was the embedding."""

import dataclasses
import json

import jax
import jax.numpy as jnp

from mezo_jax.models.layers import Config
from mezo_jax.models.transformer import Transformer


def split_layers(params: dict, k: int) -> dict:
  """The same parameters with the last k layers under ``last_layers``.

  `mezo_jax.Transformer` runs either layout. Leaf by leaf: the host or
  device holds one stacked leaf more at most, if ``params`` are let go.

  Args:
    params: with ``layers/...`` [L, ...].
    k: layers at the end, 1 to L; with L none is left under ``layers``.

  Raises:
    ValueError: for k out of range.
  """
  layers = dict(params['layers'])
  total = len(jax.tree.leaves(layers)[0])
  if not 1 <= k <= total:
    raise ValueError(f'{k} last layers cannot be taken of {total}.')
  first, last = (jax.tree.map(lambda x, part=part: jnp.copy(x[part]), layers)
                 for part in (slice(total - k), slice(total - k, None)))
  rest = {name: x for name, x in params.items() if name != 'layers'}
  return rest | ({'layers': first} if k < total else {}) | {
      'last_layers': last}


def join_layers(params: dict) -> dict:
  """The inverse of `split_layers`; as they are without ``last_layers``."""
  if 'last_layers' not in params:
    return params
  out = {k: v for k, v in params.items() if k != 'last_layers'}
  last = params['last_layers']
  if 'layers' in out:
    last = jax.tree.map(lambda *x: jnp.concatenate(x), out['layers'], last)
  return out | {'layers': last}


def untied(config: Config) -> Config:
  """The config of a model whose head is no longer its embedding."""
  source = json.loads(config.source) if config.source else None
  return dataclasses.replace(
      config, tied_head=False, source=source and json.dumps(
          source | {'tie_word_embeddings': False}))


def untie(model: Transformer, params: dict):
  """``model, params`` with a copy of the embedding as a head of its own.

  The head can then be trained, or written to, without the embedding (the
  original's linear probe overwrites input embeddings of OPT's label words).
  """
  if not model.config.tied_head:
    return model, params
  config = untied(model.config)
  head = {'embedding': jnp.copy(params['embed']['embedding'])}
  return model.clone(config=config), params | {'lm_head': head}
