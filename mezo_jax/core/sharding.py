"""Device meshes, and how arrays are split over them."""

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

AXES = ('direction', 'data', 'fsdp', 'tensor')
ROWS = ('data', 'fsdp')  # the axes that a batch's rows are split over
_TENSOR = 'vnf'  # vocabulary, heads, feed-forward


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1,
              direction: int = 1, devices: Sequence[Any] | None = None
              ) -> Mesh:
  """Returns a mesh with the axes `direction`, `data`, `fsdp` and `tensor`.

  Batches are split over `data` and `fsdp`; parameters over `fsdp` and `tensor`,
  which splits the arithmetic of a layer too. Axis types are Auto: the compiler
  propagates shardings through any Flax model.

  Args:
    data: Number of groups that each hold a full copy of the parameters.
    fsdp: Number of devices that share one copy and split the rows. Defaults to
      -1, for all remaining devices; one of the four sizes may be -1.
    tensor: Number of devices that share one copy and split heads, feed-forward
      and vocabulary.
    direction: Number of groups that each hold a full copy and evaluate, on the
      same rows, their part of the points of a step (directions and signs). They
      exchange losses.
    devices: The devices in the order of the axes. Defaults to None, for all.

  Raises:
    InputError: If the product of the four is not the number of devices.
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
        f'{n} device(s); their product must be that number, and one of them '
        'may be -1 (the rest).')
  return jax.make_mesh(tuple(sizes), AXES, devices=devices,
                       axis_types=(AxisType.Auto,) * len(AXES))


def without_directions(mesh: Mesh) -> Mesh:
  """Returns the mesh with its axis `direction` merged into `data`, for programs
  that split only rows, such as evaluation. Parameters keep their placement.
  """
  if mesh.shape.get('direction', 1) == 1:
    return mesh
  direction, data, *rest = mesh.devices.shape
  return Mesh(mesh.devices.reshape(1, direction * data, *rest), AXES,
              axis_types=(AxisType.Auto,) * len(AXES))


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh,
               axes: str = '', stacked: bool | None = None) -> P:
  """Returns how a parameter is split; never along the layer axis.

  `tensor` splits the axis that is vocabulary, heads or feed-forward in
  ``axes``. `fsdp` splits the axis that is width, or else the largest other
  axis. Each splits only an axis that it divides. Small leaves (below 2**16
  elements per layer) are replicated, since splitting them saves nothing and
  costs a collective each.

  Args:
    path: Path of the leaf, such as ``'layers/attn/q/kernel'``.
    shape: Shape of the leaf, with the layer axis.
    mesh: A mesh with the axes `fsdp` and, if ``axes`` is given, `tensor`.
    axes: A letter for each axis of one layer, as in `models.table.Row`.
    stacked: Whether the first axis is that of layers. Defaults to None, which
      believes the path: a component named ``layer[s]``, ``block[s]`` or ``h``
      without a number means a stack.
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
  """Returns a tree of `NamedSharding`s for parameters of any model.

  The first rule whose regular expression is found in a leaf's path decides how
  it is split. Without one, `param_spec` does: large leaves are split over
  `fsdp`.

  Args:
    params: Arrays or shapes, in any pytree.
    mesh: A mesh with the axes of the rules, and `fsdp` for leaves without one.
    rules: Pairs (expression, spec). For a stack of layers, a spec with fewer
      entries than the leaf has axes begins at the second axis. An axis that a
      mesh axis does not divide is not split.

  Raises:
    InputError: For a rule that fits no path, has more entries than a leaf has
      axes, or names an axis that the mesh does not have.
  """
  unused = {pattern for pattern, _ in rules}

  def place(path, x, is_stack):
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
        f'rules {sorted(unused)} are found in no path; paths are such as '
        f'{", ".join(p for p, _ in paths.named_leaves(params)[:4])}.')
  return out


def _fitted(spec: P, path: str, shape: tuple[int, ...], mesh: Mesh,
            is_stack: bool) -> P:
  """Returns a rule's spec for one leaf."""
  parts = [*spec]
  if is_stack and len(parts) < len(shape):
    parts = [None, *parts]  # layers are never split
  names = [p if isinstance(p, tuple) else (p,) * (p is not None) for p in parts]
  strange = {a for axes in names for a in axes} - {*mesh.axis_names}
  if strange or len(parts) > len(shape):
    raise InputError(
        f'the rule for {path!r}, {spec}, does not fit its shape {shape} or the '
        f"mesh's axes {mesh.axis_names}.")
  return P(*(
      p if n % math.prod(mesh.shape[a] for a in axes) == 0 else None
      for p, axes, n in zip(parts, names, shape)))


def on_host(shardings: Any) -> Any:
  """Returns shardings in the host's memory, for stacks of layers too large for
  devices; a program fetches one layer at a time."""
  return jax.tree.map(lambda s: s.with_memory_kind('pinned_host'), shardings)


def is_on_host(x: Any) -> bool:
  """Returns whether an array, a tracer or a shape is in the host's memory."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return getattr(x.sharding, 'memory_kind', None) == 'pinned_host'
  return isinstance(x, jax.Array) and (
      jax.typeof(x).memory_space == jax.memory.Space.Host)


def fetched(tree: Any) -> Any:
  """Returns a tree with arrays of the host's memory copied to the device."""
  return jax.tree.map(lambda x: jax.device_put(
      x, jax.memory.Space.Device) if is_on_host(x) else x, tree)


def to_host(x: Any) -> Any:
  return jax.device_put(x, jax.memory.Space.Host)


def row_groups(mesh: Mesh) -> int:
  """Returns how many parts the rows of a batch are split into."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def place(tree: Any, shardings: Any) -> Any:
  """Places a tree of arrays that each process has computed for itself.

  It may have typed keys, which `jax.device_put` refuses on devices of other
  processes.
  """
  return jax.jit(_same, out_shardings=shardings)(tree)


def _same(tree):  # one function, so that jax finds its programs again
  return tree


def beside(state: Any, params: Any) -> Any:
  """Returns a state with its arrays on the mesh of the params, replicated.

  Otherwise the second step would be compiled again, since the first one places
  the state there.
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
  """Puts a batch of host arrays on the mesh, rows split over `data` and `fsdp`.

  Every process holds the whole (small) batch and passes on its own rows.
  Numbers and arrays without axes are returned as they are.

  Raises:
    ValueError: for an array whose first axis cannot be split equally.
  """
  sharding = NamedSharding(mesh, P(ROWS))
  groups = row_groups(mesh)

  def put(path, x):
    if not getattr(x, 'ndim', 0):
      return x
    if x.shape[0] % groups:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise ValueError(
          f'{name or "the batch"} of shape {[*x.shape]} cannot be split over '
          f'{groups} groups of devices along its first axis: close over arrays '
          'that do not have one entry for each row.')
    return jax.make_array_from_callback(
        x.shape, sharding, lambda index, x=x: x[index])
  return jax.tree_util.tree_map_with_path(put, batch)


def is_explicit(x: Any) -> bool:
  """Returns whether an array's sharding is part of its type here."""
  return AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types


def split_as(x: jax.Array, block: jax.Array) -> jax.Array:
  """Returns an array with the type of sharding that a block has.

  Args:
    x: An array whose first axes are those of the block, of the same length or
      of length 1; more may follow.
    block: Where no mesh axis is Explicit, ``x`` is returned as it is.
  """
  if not is_explicit(block):
    return x
  here = jax.typeof(block).sharding
  names = [name if n == m > 1 else None
           for name, n, m in zip(here.spec, block.shape, x.shape)]
  names += (None,) * (x.ndim - len(names))
  return jax.sharding.reshard(x, here.update(spec=P(*names)))


def split_rows(x: Any, parts: int) -> Any:
  """Returns an array [B, ...] as [parts, B / parts, ...].

  On Explicit mesh axes the rows of each part are split over the axes that all
  rows were split over, as far as these divide them. (On Auto axes the compiler
  decides.)
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
  """Returns the mesh that `jax.set_mesh` set, if it has the axes of ours."""
  mesh = jax.sharding.get_abstract_mesh()
  ours = {*ROWS, 'tensor'} <= set(mesh.axis_names) and all(
      t == AxisType.Auto for t in mesh.axis_types)
  return mesh if ours else None


_apart = contextvars.ContextVar('_apart', default=False)


def rows_axes() -> tuple[str, ...] | None:
  """Returns the mesh axes that `jax.vmap` splits rows over, or None."""
  has_axes = jax_versions.ROWS_HAVE_AXES and _mesh_in_context()
  return ROWS if has_axes else None


def direction_groups() -> int:
  """Returns the number of groups over which the points of a step are split,
  under `jax.set_mesh`."""
  mesh = _mesh_in_context()
  return 1 if mesh is None else mesh.shape.get('direction', 1)


@contextlib.contextmanager
def rows_have_directions():
  """Declares that directions with rows of their own are split instead of rows,
  so `constrain_rows` leaves axis 0 whole."""
  token = _apart.set(True)
  try:
    yield
  finally:
    _apart.reset(token)


def constrain_rows(x: jax.Array) -> jax.Array:
  """Splits axis 0 over `data` and `fsdp`, under `jax.set_mesh`.

  Inside a model it makes the compiler gather the weights that are split over
  `fsdp` instead of the rows.
  """
  if not _mesh_in_context():
    return x
  return jax.lax.with_sharding_constraint(x, P(None if _apart.get() else ROWS))


def splits_vocabulary() -> bool:
  """Returns whether tables are split along the vocabulary, under
  `jax.set_mesh`."""
  mesh = _mesh_in_context()
  return mesh is not None and mesh.shape['tensor'] > 1
