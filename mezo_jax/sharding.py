"""Meshes and one generic rule for where arrays live on them."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from mezo_jax import noise

AXES = ('data', 'fsdp')


def make_mesh(data: int = 1, fsdp: int = -1) -> Mesh:
  """A mesh with axes `data` and `fsdp` over all devices.

  Batches are split over both axes, parameters over `fsdp` alone. Axis types
  are Auto: the compiler propagates shardings through any Flax model.

  Args:
    data: groups that hold a full copy of the parameters each; -1 for the rest.
    fsdp: devices that share one copy; -1 for the rest.

  Raises:
    ValueError: if data * fsdp is not the number of devices.
  """
  n = jax.device_count()
  sizes = [data, fsdp]
  if sizes.count(-1) == 1:
    known = sizes[1 - sizes.index(-1)]
    sizes[sizes.index(-1)] = n // known if known > 0 else 0
  if min(sizes) < 1 or sizes[0] * sizes[1] != n:
    raise ValueError(
        f'mesh data={data} x fsdp={fsdp} does not fit {n} device(s); their '
        'product must be that number, and one of them may be -1 (the rest).')
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 2)


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  """Shards the largest axis that `fsdp` divides; never the layer axis.

  Small leaves (below 2**16 elements to a layer) are replicated: splitting them
  saves nothing and costs a collective each.
  """
  size = mesh.shape['fsdp']
  first = 1 if noise.locate(path)[2] else 0
  if size == 1 or int(np.prod(shape[first:])) < 2**16:
    return P()
  fits = [a for a in range(first, len(shape)) if shape[a] % size == 0]
  if not fits:
    return P()
  axis = max(fits, key=lambda a: shape[a])
  return P(*(['fsdp' if a == axis else None for a in range(axis + 1)]))


def param_shardings(params, mesh: Mesh):
  """The tree of `NamedSharding`s of a parameter tree (arrays or shapes)."""
  return jax.tree_util.tree_map_with_path(
      lambda path, x: NamedSharding(
          mesh, param_spec(noise.path_str(path), x.shape, mesh)), params)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def put_batch(batch, mesh: Mesh):
  """Puts a batch of host arrays on the mesh, rows split over all devices.

  Every process holds the whole (small) batch and hands over its own rows.
  """
  sharding = NamedSharding(mesh, P(AXES))
  return jax.tree.map(
      lambda x: jax.make_array_from_callback(
          x.shape, sharding, lambda index, x=x: x[index]), batch)
