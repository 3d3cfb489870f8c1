"""Parameters laid out otherwise, so that a part of them can be trained alone:
the last k layers, or a head that was the embedding."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax.core.errors import InputError
from mezo_jax.models.layers import Config
from mezo_jax.models.transformer import Transformer


def split_layers(params: dict[str, Any], k: int, take: bool = False
                 ) -> dict[str, Any]:
  """The same parameters with the last k layers under ``last_layers``.

  `mezo_jax.models.Transformer` runs either layout.

  Args:
    params: with ``layers/...`` [L, ...].
    k: layers at the end, 1 to L; with L none is left under ``layers``.
    take: take the layers out of ``params`` leaf by leaf, so that no more than
      one stacked leaf is ever held twice.

  Raises:
    ValueError: for k out of range.
  """
  total = len(jax.tree.leaves(params['layers'])[0])
  if not 1 <= k <= total:
    raise InputError(f'{k} last layers cannot be taken of {total}.')
  rest = {name: x for name, x in params.items() if name != 'layers'}
  run = lambda x, *at: jax.tree.map(lambda a: a[slice(*at)], x)  # of Codes too
  first, last = _unzip(
      lambda x: (run(x, total - k), run(x, total - k, None)),
      params['layers'], take)
  return rest | ({'layers': first} if k < total else {}) | {
      'last_layers': last}


def _unzip(fn, tree: dict, take: bool) -> tuple[dict, dict]:
  """Two trees, of the two results of ``fn`` for each leaf."""
  one, two = {}, {}
  for name in list(tree):
    x = tree[name]
    one[name], two[name] = (
        _unzip(fn, x, take) if isinstance(x, dict) else fn(x))
    if take:
      del tree[name], x
  return one, two


def join_layers(params: dict[str, Any], take: bool = False) -> dict[str, Any]:
  """The inverse of `split_layers`; as they are without ``last_layers``."""
  if 'last_layers' not in params:
    return params
  out = {k: v for k, v in params.items() if k != 'last_layers'}
  last = params['last_layers']
  if 'layers' in out:
    last = _zip(out['layers'], last, take)
  return out | {'layers': last}


def _zip(first: dict, last: dict, take: bool) -> dict:
  out = {}
  for name in list(first):
    x, y = first[name], last[name]
    out[name] = _zip(x, y, take) if isinstance(x, dict) else (
        jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x, y))
    if take:
      del first[name], last[name], x, y
  return out


def untied(config: Config) -> Config:
  """The config of a model whose head is no longer its embedding."""
  source = json.loads(config.source) if config.source else None
  return dataclasses.replace(
      config, tied_head=False, source=source and json.dumps(
          source | {'tie_word_embeddings': False}))


def untie(model: Transformer, params: dict[str, Any]
          ) -> tuple[Transformer, dict[str, Any]]:
  """``model, params`` with a copy of the embedding as a head of its own.

  The head can then be trained, or written to, without the embedding (the
  original's linear probe overwrites input embeddings of OPT's label words).

  Raises:
    ValueError: for a model that was loaded without its head.
  """
  if not model.config.head:
    raise InputError(f'this {model.config.family} has no head to be trained: '
                     'load a model that was saved with its head.')
  if not model.config.tied_head:
    return model, params
  config = untied(model.config)
  head = {'embedding': jax.tree.map(jnp.copy, params['embed']['embedding'])}
  return model.clone(config=config), params | {'lm_head': head}
