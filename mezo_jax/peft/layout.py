"""Changes the layout of parameters so that a part of them can be trained alone.

The last k layers can become a stack of their own, and a tied head can become a
copy of the embedding.
"""

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
  """Moves the last k layers from ``layers`` to ``last_layers``.

  `mezo_jax.models.Transformer` runs either layout.

  Args:
    params: Parameters with leaves ``layers/...`` of shape [L, ...].
    k: Number of layers to move, from 1 to L. With L, the result has no
      ``layers``.
    take: Whether to remove the layers from ``params`` leaf by leaf, which keeps
      at most one stacked leaf in memory twice. ``params['layers']`` is empty
      afterwards. Defaults to False.

  Returns:
    The parameters with leaves ``layers/...`` of shape [L - k, ...] and
    ``last_layers/...`` of shape [k, ...].

  Raises:
    InputError: If k is out of range.
  """
  total = len(jax.tree.leaves(params['layers'])[0])
  if not 1 <= k <= total:
    raise InputError(f'{k} last layers cannot be split off a model with '
                     f'{total} layers; choose at least 1 and at most all of '
                     'them.')
  rest = {name: x for name, x in params.items() if name != 'layers'}
  # jax.tree.map also slices the arrays inside quantised weights
  # (QuantizedArray).
  run = lambda x, *at: jax.tree.map(lambda a: a[slice(*at)], x)
  first, last = _unzip(
      lambda x: (run(x, total - k), run(x, total - k, None)),
      params['layers'], take)
  return rest | ({'layers': first} if k < total else {}) | {
      'last_layers': last}


def _unzip(fn, tree: dict, take: bool) -> tuple[dict, dict]:
  """Maps a function that returns a pair over a tree; returns a pair of trees.

  Args:
    fn: Function of a leaf.
    tree: Nested dict.
    take: Whether to delete each leaf from ``tree`` once it is mapped.
  """
  one, two = {}, {}
  for name in list(tree):
    x = tree[name]
    one[name], two[name] = (
        _unzip(fn, x, take) if isinstance(x, dict) else fn(x))
    if take:
      del tree[name], x
  return one, two


def join_layers(params: dict[str, Any], take: bool = False) -> dict[str, Any]:
  """Moves ``last_layers`` back to the end of ``layers``.

  This is the inverse of `split_layers`.

  Args:
    params: Parameters in either layout. Without ``last_layers`` they are
      returned unchanged.
    take: Whether to remove the layers from ``params`` leaf by leaf to save
      memory, as in `split_layers`. Defaults to False.

  Returns:
    Parameters without ``last_layers``.
  """
  if 'last_layers' not in params:
    return params
  out = {k: v for k, v in params.items() if k != 'last_layers'}
  last = params['last_layers']
  if 'layers' in out:
    last = _zip(out['layers'], last, take)
  return out | {'layers': last}


def _zip(first: dict, last: dict, take: bool) -> dict:
  """Concatenates the leaves of two trees along their layer axis."""
  out = {}
  for name in list(first):
    x, y = first[name], last[name]
    out[name] = _zip(x, y, take) if isinstance(x, dict) else (
        jax.tree.map(lambda a, b: jnp.concatenate([a, b]), x, y))
    if take:
      del first[name], last[name], x, y
  return out


def untied(config: Config) -> Config:
  """Returns the config of the same model with an untied head.

  ``config.source``, the JSON text of the original config.json, is updated too.
  """
  source = json.loads(config.source) if config.source else None
  return dataclasses.replace(
      config, tied_head=False, source=source and json.dumps(
          source | {'tie_word_embeddings': False}))


def untie(model: Transformer, params: dict[str, Any]
          ) -> tuple[Transformer, dict[str, Any]]:
  """Gives a model with a tied head a copy of its embedding as the head.

  The head can then be trained or overwritten without changing the embedding.
  (The linear probe of the paper's own code overwrites the input embeddings of
  OPT's label words, too.)

  Args:
    model: Model of the parameters.
    params: Parameters with ``embed/embedding`` [V, D].

  Returns:
    A pair ``(model, params)``, in which the parameters have
    ``lm_head/embedding`` [V, D]. Both are unchanged if the head is not tied.

  Raises:
    InputError: If the model was loaded without its head.
  """
  if not model.config.head:
    raise InputError(f'this {model.config.family} has no head to train; load a '
                     'model that was saved with its language-model head.')
  if not model.config.tied_head:
    return model, params
  config = untied(model.config)
  head = {'embedding': jax.tree.map(jnp.copy, params['embed']['embedding'])}
  return model.clone(config=config), params | {'lm_head': head}
