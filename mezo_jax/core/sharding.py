"""Meshes and one rule for where arrays live on them."""

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
  """A mesh with the axes `direction`, `data`, `fsdp` and `tensor`.

  Batches are split over `data` and `fsdp`; parameters over `fsdp` and `tensor`,
  which splits the arithmetic of a layer too. Axis types are Auto: the compiler
  propagates shardings through any Flax model.

  Args:
    data: groups that hold a full copy of the parameters each.
    fsdp: devices that share one copy and split the rows.
    tensor: devices that share one copy and split heads, feed-forward and
      vocabulary.
    direction: groups that hold a full copy each and evaluate, on the same rows,
      each its part of a step's points: directions and their signs. What they
      exchange is losses. One of the four may be -1: the rest.
    devices: in the order of the axes; None for all that there are.

  Raises:
    ValueError: if the product of the four is not the number of devices.
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
  """The same devices, those of `direction` as more of `data`: for what has
  rows alone to be split, as evaluation has. Parameters lie on it as they do.
  """
  if mesh.shape.get('direction', 1) == 1:
    return mesh
  direction, data, *rest = mesh.devices.shape
  return Mesh(mesh.devices.reshape(1, direction * data, *rest), AXES,
              axis_types=(AxisType.Auto,) * len(AXES))


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh,
               axes: str = '', stacked: bool | None = None) -> P:
  """Returns how a parameter is split; never along the layer axis.

  `tensor` splits the axis that ``axes`` calls vocabulary, heads or
  feed-forward; `fsdp` the one it calls width, else the largest of the others;
  either only an axis that it divides. Small leaves (below 2**16
  elements to a layer) are replicated: splitting them saves nothing and costs a
  collective each.

  Args:
    path: Path of the leaf, such as ``'layers/attn/q/kernel'``.
    shape: of the leaf, the layer axis included.
    mesh: split over its axes `fsdp` and, if ``axes`` is given, `tensor`.
    axes: a letter for each axis of one layer, as in `models.table.Row`.
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
  """Returns the tree of `NamedSharding`s of anyone's parameters.

  A leaf is split as the first rule says whose regular expression is found in
  its path, else as `param_spec` does: large ones are split over `fsdp`.

  Args:
    params: arrays or shapes, in any pytree.
    mesh: with the axes of the rules, and `fsdp` if a leaf has none.
    rules: (expression, spec). A spec that is shorter than a leaf has axes is
      of the last ones where the first is the layers' (a component of the path
      named ``layer[s]``, ``block[s]`` or ``h`` says so, and shapes that agree).
      An axis that a mesh axis does not divide stays whole.

  Raises:
    InputError: for a rule that no leaf has, that is longer than a leaf has
      axes, or that names no axis of the mesh.
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
  """The same places in the memory of the host, from which a program takes a
  layer at a time; for stacks of layers that are more than devices hold."""
  return jax.tree.map(lambda s: s.with_memory_kind('pinned_host'), shardings)


def is_on_host(x: Any) -> bool:
  """Of an array, a tracer or a shape."""
  if isinstance(x, jax.ShapeDtypeStruct):
    return getattr(x.sharding, 'memory_kind', None) == 'pinned_host'
  return isinstance(x, jax.Array) and (
      jax.typeof(x).memory_space == jax.memory.Space.Host)


def fetched(tree: Any) -> Any:
  """With copies on the device of what is in the host's memory: of a layer,
  where it is computed with."""
  return jax.tree.map(lambda x: jax.device_put(
      x, jax.memory.Space.Device) if is_on_host(x) else x, tree)


def to_host(x: Any) -> Any:
  return jax.device_put(x, jax.memory.Space.Host)


def row_groups(mesh: Mesh) -> int:
  """How many parts a batch's rows are split into."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def place(tree: Any, shardings: Any) -> Any:
  """A tree of arrays that each process has made for itself, laid out anew.

  Typed keys too: `jax.device_put` refuses those on other processes' devices.
  """
  return jax.jit(_same, out_shardings=shardings)(tree)


def _same(tree):  # one function, so that jax knows its programs again
  return tree


def beside(state: Any, params: Any) -> Any:
  """The state, where it is on no mesh, on the one that params are on: else a
  second step compiles again, for a state that the first one has put there."""
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

  Every process holds the whole (small) batch and hands over its own rows.
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
  """The mesh that `jax.set_mesh` set, if it is one of ours."""
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
  """The groups, under `jax.set_mesh`, that a step's points are split over."""
  mesh = _mesh_in_context()
  return 1 if mesh is None else mesh.shape.get('direction', 1)


@contextlib.contextmanager
def rows_have_directions():
  """Where directions, each with rows of its own, are what is split."""
  token = _apart.set(True)
  try:
    yield
  finally:
    _apart.reset(token)


def constrain_rows(x: jax.Array) -> jax.Array:
  """Splits axis 0 over `data` and `fsdp`, under `jax.set_mesh`.

  Inside a model it settles what the compiler should gather: weights that are
  split over `fsdp`, and never the rows.
  """
  if not _mesh_in_context():
    return x
  return jax.lax.with_sharding_constraint(x, P(None if _apart.get() else ROWS))


def splits_vocabulary() -> bool:
  """Whether, under `jax.set_mesh`, tables are split along the vocabulary."""
  mesh = _mesh_in_context()
  return mesh is not None and mesh.shape['tensor'] > 1
