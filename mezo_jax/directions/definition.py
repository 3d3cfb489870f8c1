r"""The definition of z, for directions with independent elements.

.. math::
  z[i] = f(\text{bits}(k, i)), \qquad
  k = \text{fold\_in}(key, \text{crc32}(path))

For a layer l of a stack, k is :math:`\text{fold\_in}(k, l)`. Here i is the
row-major index of the element within its leaf, or within its layer. The rest of
the library computes the same numbers without building them: of some rows, of a
transpose, on the shards of a mesh, in the middle of a matrix product.
"""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import paths
from mezo_jax.directions import noise
from mezo_jax.directions.base import Directions, Normal


def z_of_leaf(key: jax.Array, path: str, shape: tuple[int, ...],
              directions: Directions = Normal(), *,
              stacked: bool = False) -> jax.Array:
  """Returns z of one leaf, float32 of its shape.

  On one kind of hardware, every other way to compute z is bitwise equal.

  Args:
    key: The key of a direction, for example ``fold_in(fold_in(key, step), j)``.
    path: The path of the leaf, such as ``'layers/attn/q/kernel'``. A number of
      a layer in it (``'layers/3/attn/q/kernel'``) selects that layer.
    shape: The shape of the leaf.
    directions: `Normal` or `Rademacher`, of either generator.
    stacked: Whether the first axis is that of layers. It must be False for a
      path that has the number of a layer.
  """
  name, layer, _ = paths.locate(path, stacked)
  key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
  if stacked:
    layers = [_draw(jax.random.fold_in(key, l), shape[1:], directions)
              for l in range(shape[0])]
    return jnp.stack(layers)
  if layer is not None:
    key = jax.random.fold_in(key, layer)
  return _draw(key, shape, directions)


def _draw(key, shape, directions):
  index = jnp.arange(math.prod(shape), dtype=jnp.uint32)
  bits = noise.bits(key, index, directions.generator)
  return directions.draw(bits).reshape(shape)
