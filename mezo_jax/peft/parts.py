"""Splits a nested dict of parameters into a trainable and a frozen part.

Optimizer state, noise and checkpoints then cover the trainable part only.
"""

from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
import jax.numpy as jnp

from mezo_jax.core.paths import selected
from mezo_jax.core.quantized import FACTORS, is_codes


def split(params: dict[str, Any], mask: Any
          ) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits parameters into a trainable and a frozen tree.

  `mezo_jax.peft.join` puts the two together again.

  Args:
    params: Nested dict of arrays, such as the parameters of a Flax Linen model.
    mask: Selects the trainable leaves. It may be a regular expression that is
      searched for in the paths of leaves, a tree of bools, or a function from
      the parameters to such a tree. None selects every leaf that can be
      trained.

  Returns:
    A pair ``(trainable, frozen)`` of nested dicts. Each leaf is in one of them.

  Raises:
    ValueError: If the tree has containers other than dicts, if the mask selects
      single elements of a leaf, or if it selects nothing.

  Example:
    >>> split({'a': {'w': 1., 'b': 2.}, 'c': 3.}, '^a/w|c')
    ({'a': {'w': 1.0}, 'c': 3.0}, {'a': {'b': 2.0}})
  """
  chosen, leaves = (flatten_dict(x) for x in (selected(params, mask), params))
  for path, x in leaves.items():
    if not isinstance(chosen[path], bool):
      raise ValueError('split needs nested dicts of arrays and one bool per '
                       f'leaf; {path[-1]!r} is a {type(x).__name__}.')
  part = lambda wanted: unflatten_dict(
      {path: x for path, x in leaves.items() if chosen[path] == wanted})
  return part(True), part(False)


def factors(params: dict[str, Any]) -> dict[str, Any]:
  """Creates a trainable factor of 1 for every scale of the quantised weights.

  Training the factors fine-tunes a quantised model without changing its
  integers. `mezo_jax.peft.join` multiplies the scales by their factors.

  Args:
    params: Nested dict of parameters, some of which are
      `mezo_jax.QuantizedArray`.

  Returns:
    A nested dict with a float32 leaf ``.../factors`` of ones for each of the
    `mezo_jax.QuantizedArray`. It has the shape of the scales. Abstract
    parameters (`jax.ShapeDtypeStruct`) give abstract factors.

  Raises:
    ValueError: If no parameter is quantised.
  """
  flat: dict[tuple, Any] = flatten_dict(params)
  codes = {path: x for path, x in flat.items() if is_codes(x)}
  if not codes:
    raise ValueError('no parameter is quantised (mezo_jax.QuantizedArray), so '
                     'there are no scales to train; see models.load(..., '
                     "dtype='int8').")
  return unflatten_dict({(*path, FACTORS): _ones(x.scales)
                         for path, x in codes.items()})


def _ones(x):
  """Returns float32 ones of the shape of ``x``, abstract if ``x`` is."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
  return jnp.ones_like(x, jnp.float32)
