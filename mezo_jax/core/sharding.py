"""Builds device meshes, and chooses how arrays are split over them."""

from collections.abc import Sequence
import contextlib
import contextvars
import math
import re
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from mezo_jax.core import jax_versions, paths
from mezo_jax.core.errors import InputError

AXES = ('direction', 'data', 'fsdp', 'tensor')  # mesh axes, in order
ROWS = ('data', 'fsdp')  # mesh axes over which the rows of a batch are split
# Letters of the parameter axes that the mesh axis `tensor` splits: v for the
# vocabulary, n for heads and f for the feed-forward layer.
_TENSOR = 'vnf'


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1,
              direction: int = 1, devices: Sequence[Any] | None = None
              ) -> Mesh:
  """Returns a mesh with the axes `direction`, `data`, `fsdp` and `tensor`.

  Batches are split over `data` and `fsdp`. Parameters are split over `fsdp` and
  `tensor`; `tensor` splits the arithmetic of a layer, too. Axis types are Auto:
  the compiler propagates shardings through any Flax model.

  Args:
    data: Number of groups that each hold a full copy of the parameters and
      process their part of the rows. Defaults to 1.
    fsdp: Number of devices that share one copy and split the rows. Defaults to
      -1, for all remaining devices. Any one of the four sizes may be -1.
    tensor: Number of devices that share one copy and split heads, feed-forward
      and vocabulary. Defaults to 1.
    direction: Number of groups that each hold a full copy and share the loss
      evaluations of a step: each group evaluates some of the points
      (directions and signs) on the same rows, and they exchange losses.
      Defaults to 1.
    devices: The devices in the order of the axes. Defaults to None, for all.

  Raises:
    InputError: If the product of the sizes is not the number of devices.
  """
  n = jax.device_count() if devices is None else len(devices)
  sizes = [direction, data, fsdp, tensor]
  if sizes.count(-1) == 1:
    at = sizes.index(-1)
    known = int(np.prod(sizes[:at] + sizes[at + 1:]))
    sizes[at] = n // known if known > 0 else 0
  if min(sizes) < 1 or int(np.prod(sizes)) != n:
    raise InputError(
        f'mesh data={data} x fsdp={fsdp} x tensor={tensor}'
        f'{"" if direction == 1 else f" x direction={direction}"} does not fit '
        f'{n} device(s): the product of the sizes must be that number. One of '
        'them may be -1 (all remaining devices).')
  return jax.make_mesh(tuple(sizes), AXES, devices=devices,
                       axis_types=(AxisType.Auto,) * len(AXES))


def without_directions(mesh: Mesh) -> Mesh:
  """Returns the mesh with its axis `direction` merged into `data`.

  Programs that split only rows, such as evaluation, use it. Parameters keep
  their placement.

  Args:
    mesh: A mesh of `make_mesh`.
  """
  if mesh.shape.get('direction', 1) == 1:
    return mesh
  direction, data, *rest = mesh.devices.shape
  return Mesh(mesh.devices.reshape(1, direction * data, *rest), AXES,
              axis_types=(AxisType.Auto,) * len(AXES))


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh,
               axes: str = '', stacked: bool | None = None) -> P:
  """Returns how a parameter is split. The layer axis is never split.

  `tensor` splits the first axis whose letter in ``axes`` stands for vocabulary,
  heads or feed-forward. `fsdp` splits the axis whose letter stands for the
  width of the model (d), or else the largest axis that is left. An axis is
  split only if the size of the mesh axis divides its length.
  Small leaves (below 2**16 elements per layer) are replicated, since splitting
  them saves little and costs a collective each.

  Args:
    path: Path of the leaf, such as ``'layers/attn/q/kernel'``.
    shape: Shape of the leaf, with the layer axis.
    mesh: A mesh with the axes `fsdp` and, if ``axes`` is given, `tensor`.
    axes: One letter for each axis of a single layer, as in
      `mezo_jax.models.families.table.Row`. Defaults to '', for unknown axes.
    stacked: Whether the first axis is the layer axis. Defaults to None, which
      decides by the path: a component named ``layer[s]``, ``block[s]`` or ``h``
      without a number means that the leaf is a stack.
  """
  first = int(paths.locate(path)[2] if stacked is None else stacked)
  if int(np.prod(shape[first:])) < 2**16:
    return P()
  fsdp, tensor = (mesh.shape.get(a, 1) for a in ('fsdp', 'tensor'))
  spec: list[str | None] = [None] * len(shape)
  letters = dict(enumerate(axes, first))
  for a, letter in letters.items():
    if letter in _TENSOR and tensor > 1 and shape[a] % tensor == 0:
      spec[a] = 'tensor'
      break
  fits = [a for a in range(first, len(shape))
          if fsdp > 1 and spec[a] is None and shape[a] % fsdp == 0]
  if fits:
    spec[max(fits, key=lambda a: (letters.get(a) == 'd', shape[a]))] = 'fsdp'
  while spec and spec[-1] is None:
    spec.pop()
  return P(*spec)


def param_shardings(params: Any, mesh: Mesh, rules: Sequence[tuple[str, P]] = ()
                    ) -> Any:
  """Returns a tree of `NamedSharding`s for the parameters of any model.

  The first rule whose regular expression is found in a leaf's path decides how
  the leaf is split. If no rule matches, `param_spec` decides: large leaves are
  split over `fsdp`.

  Args:
    params: Arrays or shapes, in any pytree.
    mesh: A mesh with the axes that the rules name, and `fsdp` if some leaves
      match no rule.
    rules: Pairs (regular expression, `PartitionSpec`). For a stack of layers, a
      spec with fewer entries than the leaf has axes begins at the second axis.
      An entry is ignored if the mesh axes do not divide the leaf's axis.
      Defaults to no rules.

  Raises:
    InputError: If a rule matches no path, has more entries than a leaf has
      axes, or names an axis that the mesh does not have.
  """
  unused = {pattern for pattern, _ in rules}

  def place(path, x, is_stack):
    """Returns the sharding of one leaf."""
    for pattern, spec in rules:
      if re.search(pattern, path):
        unused.discard(pattern)
        return NamedSharding(mesh, _fitted(spec, path, x.shape, mesh, is_stack))
    return NamedSharding(
        mesh, param_spec(path, x.shape, mesh, stacked=is_stack))
  stacks = jax.tree.unflatten(
      paths.structure(params), paths.stacked(params))
  out = paths.map_named(place, params, stacks)
  if unused:
    raise InputError(
        f'rules {sorted(unused)} match no path; examples of paths are '
        f'{", ".join(p for p, _ in paths.named_leaves(params)[:4])}.')
  return out


def _fitted(spec: P, path: str, shape: tuple[int, ...], mesh: Mesh,
            is_stack: bool) -> P:
  """Returns a rule's spec, adapted to one leaf."""
  parts = [*spec]
  if is_stack and len(parts) < len(shape):
    parts = [None, *parts]  # the layer axis is not split
  names = [p if isinstance(p, tuple) else (p,) * (p is not None) for p in parts]
  strange = {a for axes in names for a in axes} - {*mesh.axis_names}
  if strange or len(parts) > len(shape):
    raise InputError(
        f'the rule for {path!r}, {spec}, does not fit its shape {shape} or the '
        f'mesh axes {mesh.axis_names}.')
  return P(*(
      p if n % math.prod(mesh.shape[a] for a in axes) == 0 else None
      for p, axes, n in zip(parts, names, shape)))


def on_host(shardings: Any) -> Any:
  """Returns the same shardings in the host's pinned memory.

  Use them for stacks of layers that are too large for the devices. Programs
  then copy one layer at a time to the device.

  Args:
    shardings: A tree of shardings.
  """
  return jax.tree.map(lambda s: s.with_memory_kind('pinned_host'), shardings)


def is_on_host(x: Any) -> bool:
  """Returns whether an array, a tracer or a shape is in the host's memory."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return getattr(x.sharding, 'memory_kind', None) == 'pinned_host'
  return isinstance(x, jax.Array) and (
      jax.typeof(x).memory_space == jax.memory.Space.Host)


def fetched(tree: Any) -> Any:
  """Returns a tree with arrays in the host's memory copied to the device."""
  return jax.tree.map(lambda x: jax.device_put(
      x, jax.memory.Space.Device) if is_on_host(x) else x, tree)


def to_host(x: Any) -> Any:
  """Returns an array copied to the host's memory."""
  return jax.device_put(x, jax.memory.Space.Host)


def row_groups(mesh: Mesh) -> int:
  """Returns the number of parts into which the rows of a batch are split."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding of an array that each device holds in full."""
  return NamedSharding(mesh, P())


def place(tree: Any, shardings: Any) -> Any:
  """Places a tree of arrays that each process has computed for itself.

  It uses `jax.jit` instead of `jax.device_put`, because the tree may contain
  typed PRNG keys. `jax.device_put` refuses to put these on devices of other
  processes.

  Args:
    tree: Arrays that have the same values on each process.
    shardings: A sharding, or a tree prefix of shardings.
  """
  return jax.jit(_same, out_shardings=shardings)(tree)


def _same(tree):
  """Returns its argument; a named function lets `jax.jit` reuse programs."""
  return tree


def beside(state: Any, params: Any) -> Any:
  """Returns a state with its arrays replicated on the mesh of the parameters.

  Arrays that are already on a mesh are returned as they are. If the parameters
  are not on a mesh, the whole state is returned as it is. Without this
  function, the first step would move the state to the mesh, and the second step
  would be compiled again for the new placement.

  Args:
    state: State of the optimizer.
    params: The parameters.
  """
  on_mesh = lambda x: isinstance(x, jax.Array) and not isinstance(
      x, Tracer) and isinstance(x.sharding, NamedSharding)
  mesh = next((x.sharding.mesh for x in jax.tree.leaves(params)
               if on_mesh(x)), None)
  if mesh is None:
    return state
  return jax.tree.map(
      lambda x: x if on_mesh(x) else place(x, replicated(mesh)), state)


def put_batch(batch: Any, mesh: Mesh) -> Any:
  """Puts a batch on a mesh, with its rows split over `data` and `fsdp`.

  Every process has the whole batch, which is small, and copies its share of the
  rows to its devices. Numbers and arrays without axes are returned as they are.

  Args:
    batch: A tree of NumPy arrays [B, ...].
    mesh: A mesh of `make_mesh`.

  Raises:
    ValueError: If the first axis of an array cannot be split equally.
  """
  sharding = NamedSharding(mesh, P(ROWS))
  groups = row_groups(mesh)

  def put(path, x):
    """Puts one array on the mesh."""
    if not getattr(x, 'ndim', 0):
      return x
    if x.shape[0] % groups:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(
          f'{name or "the batch"} of shape {[*x.shape]} cannot be split over '
          f'{groups} groups of devices along its first axis. Close over arrays '
          'that do not have one entry per row instead of passing them in the '
          'batch.')
    return jax.make_array_from_callback(
        x.shape, sharding, lambda index, x=x: x[index])
  return jax.tree_util.tree_map_with_path(put, batch)


def is_explicit(x: Any) -> bool:
  """Returns whether an array is on a mesh with Explicit axes.

  The sharding of such an array is a part of its type.
  """
  return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def split_as(x: jax.Array, block: jax.Array) -> jax.Array:
  """Returns an array, resharded like a block if mesh axes are Explicit.

  Args:
    x: An array whose first axes correspond to those of the block. Each has the
      length of the block's axis, or length 1. Further axes are not split.
    block: The array whose sharding ``x`` gets. If it is not on a mesh with
      Explicit axes, ``x`` is returned as it is.
  """
  if not is_explicit(block):
    return x
  here = jax.typeof(block).sharding
  names = [name if n == m > 1 else None
           for name, n, m in zip(here.spec, block.shape, x.shape)]
  names += (None,) * (x.ndim - len(names))
  return jax.sharding.reshard(x, here.update(spec=P(*names)))


def split_rows(x: Any, parts: int) -> Any:
  """Reshapes an array [B, ...] to [parts, B / parts, ...].

  If mesh axes are Explicit, the rows of each part are split over the mesh axes
  over which ``x`` was split. Mesh axes are left out from the first one that
  does not divide the rows evenly. If mesh axes are Auto, the compiler chooses
  the sharding.

  Args:
    x: A NumPy or JAX array.
    parts: Number of parts, which divides B.
  """
  shape = (parts, x.shape[0] // parts, *x.shape[1:])
  if not isinstance(x, jax.Array):
    return x.reshape(shape)
  here = jax.typeof(x).sharding
  rows, *others = [*here.spec, *(None,) * (x.ndim - len(here.spec))]
  if rows is None and not any(others):
    return x.reshape(shape)
  kept, groups = [], 1
  for axis in rows if isinstance(rows, tuple) else (rows,) * (rows is not None):
    groups *= here.mesh.shape[axis]
    if shape[1] % groups:
      break
    kept.append(axis)
  if len(kept) < 2:
    kept = kept[0] if kept else None
  else:
    kept = tuple(kept)
  return jax.lax.reshape(x, shape, out_sharding=here.update(
      spec=P(None, kept, *others)))


def _mesh_in_context():
  """Returns the mesh that `jax.set_mesh` set, or None.

  Also returns None for a mesh without the axes of `make_mesh`, and for a mesh
  with axes that are not Auto.
  """
  mesh = jax.sharding.get_abstract_mesh()
  ours = {*ROWS, 'tensor'} <= set(mesh.axis_names) and all(
      t == AxisType.Auto for t in mesh.axis_types)
  return mesh if ours else None


# Whether `constrain_rows` leaves axis 0 unsplit; see `rows_have_directions`.
_apart = contextvars.ContextVar('_apart', default=False)


def rows_axes() -> tuple[str, ...] | None:
  """Returns the mesh axes over which `jax.vmap` splits rows, or None.

  Returns None if no mesh is set, or if this version of JAX must choose the axes
  itself; see `jax_versions.ROWS_HAVE_AXES`.
  """
  has_axes = jax_versions.ROWS_HAVE_AXES and _mesh_in_context()
  return ROWS if has_axes else None


def direction_groups() -> int:
  """Returns the number of groups that share the loss evaluations of a step.

  It is the size of the axis `direction` of the mesh that `jax.set_mesh` set, or
  1 without one.
  """
  mesh = _mesh_in_context()
  return 1 if mesh is None else mesh.shape.get('direction', 1)


@contextlib.contextmanager
def rows_have_directions():
  """Makes `constrain_rows` leave axis 0 unsplit inside of this context.

  It is used where each direction is evaluated on its own rows. The mesh axes
  `data` and `fsdp` then split the directions instead of the rows of one
  direction.
  """
  token = _apart.set(True)
  try:
    yield
  finally:
    _apart.reset(token)


def constrain_rows(x: jax.Array) -> jax.Array:
  """Splits axis 0 of an array over `data` and `fsdp`, under `jax.set_mesh`.

  If a model calls this on its activations, the compiler gathers the weights,
  which are split over `fsdp`. It might otherwise gather the rows.

  Args:
    x: An array [B, ...]. Without a mesh it is returned as it is.
  """
  if not _mesh_in_context():
    return x
  return jax.lax.with_sharding_constraint(x, P(None if _apart.get() else ROWS))


def splits_vocabulary() -> bool:
  """Returns whether embedding tables are split along the vocabulary.

  They are if `jax.set_mesh` set a mesh whose axis `tensor` is larger than 1.
  """
  mesh = _mesh_in_context()
  return mesh is not None and mesh.shape['tensor'] > 1
