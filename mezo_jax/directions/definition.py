r"""Defines z for distributions with independent elements.

.. math::
  z[i] = f(\text{bits}(k, i)), \qquad
  k = \text{fold\_in}(key, \text{crc32}(path))

Here i is the row-major index of an element within its leaf. A layer l of a
stack has a key of its own, :math:`\text{fold\_in}(k, l)`, and i is then the
index within the layer. The function f is `Directions.draw`.

This module implements the definition in its simplest form, and builds the whole
array z. The rest of the library computes the same numbers without building the
array: for some rows of a leaf, for its transpose, on the shards of a mesh, or
as a part of a matrix product. Tests compare these numbers with `z_of_leaf`.
"""

import math

import jax
import jax.numpy as jnp

from mezo_jax.core import arguments
from mezo_jax.directions import noise
from mezo_jax.directions.base import Directions, Normal, Rademacher


def z_of_leaf(key: jax.Array, path: str, shape: tuple[int, ...],
              directions: Directions = Normal(), *,
              stacked: bool = False) -> jax.Array:
  """Returns z of one leaf, computed directly from its definition.

  All other code in this library that computes z returns bitwise the same
  numbers, on the same kind of hardware.

  Args:
    key: Typed key of one direction. For direction j of step t,
      `mezo_jax.spsa` uses ``fold_in(fold_in(key, t), j)``.
    path: Path of the leaf, such as ``'layers/attn/q/kernel'``. If the path
      contains the number of a layer, as ``'layers/3/attn/q/kernel'`` does, the
      leaf is that layer of a stack.
    shape: Shape of the leaf.
    directions: A `Normal` or a `Rademacher`. Its mask and its multiplier are
      ignored. Defaults to ``Normal()``.
    stacked: Whether the first axis of the leaf counts layers. Must be False for
      a path that contains the number of a layer. Defaults to False.

  Returns:
    A float32 array of shape ``shape``.

  Raises:
    ValueError: If the directions are of another kind.

  Example:
    >>> import jax
    >>> z_of_leaf(jax.random.key(0), 'layers/3/w', (2, 3)).shape
    (2, 3)
  """
  arguments.check(isinstance(directions, (Normal, Rademacher)), 'directions',
                  'a mezo_jax.Normal or mezo_jax.Rademacher', directions)
  key = noise.leaf_key(key, path, stacked)
  if not stacked:
    return _draw(key, shape, directions)
  return jnp.stack([
      _draw(jax.random.fold_in(key, layer), shape[1:], directions)
      for layer in range(shape[0])])


def _draw(key, shape, directions):
  """Returns z of a leaf, or of one layer, whose key is ``key``."""
  index = jnp.arange(math.prod(shape), dtype=jnp.uint32)
  bits = noise.bits(key, index, directions.generator)
  return directions.draw(bits).reshape(shape)
