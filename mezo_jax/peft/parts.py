"""A nested dict of parameters in two: what is trained, and what is not.

So that optimizer state, noise and checkpoints hold only what is trained.
"""

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp

from mezo_jax.core.paths import selected
from mezo_jax.core.quantized import FACTORS, is_codes


def split(params: dict[str, Any], mask: Any
          ) -> tuple[dict[str, Any], dict[str, Any]]:
  """``trainable, frozen``: two nested dicts that share no leaf.

  Args:
    params: a nested dict, such as Flax Linen's.
    mask: see `selected`.

  Raises:
    ValueError: if the tree has other containers than dicts.

  Example:
    >>> split({'a': {'w': 1., 'b': 2.}, 'c': 3.}, '^a/w|c')
    ({'a': {'w': 1.0}, 'c': 3.0}, {'a': {'b': 2.0}})
  """
  chosen, leaves = (flatten_dict(x) for x in (selected(params, mask), params))
  for path, x in leaves.items():
    if not isinstance(chosen[path], bool):
      raise ValueError(f'split takes nested dicts of arrays; {path[-1]!r} is a '
                       f'{type(x).__name__}.')
  part = lambda wanted: unflatten_dict(
      {path: x for path, x in leaves.items() if chosen[path] == wanted})
  return part(True), part(False)


def factors(params: dict[str, Any]) -> dict[str, Any]:
  """A factor of 1 for each scale of the `Codes` of a nested dict, float32: all
  that a model has to train whose integers stay. `join` multiplies them.

  Raises:
    ValueError: if there are no `Codes`.
  """
  flat: dict[tuple, Any] = flatten_dict(params)
  codes = {path: x for path, x in flat.items() if is_codes(x)}
  if not codes:
    raise ValueError('the parameters have no mezo_jax.Codes, of which scales '
                     "could be trained: see models.load(..., dtype='int8').")
  return unflatten_dict({(*path, FACTORS): _ones(x.scales)
                         for path, x in codes.items()})


def _ones(x):
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
  return jnp.ones_like(x, jnp.float32)
