"""Names the leaves of parameter trees, and resolves masks and groups.

A leaf is identified by its path, such as ``'layers/attn/q/kernel'``. A *mask*
selects leaves of a tree. *Groups* ``{regular expression: value}`` assign to
each leaf the value of the first expression that is found in its path.
"""

from collections.abc import Callable, Iterable, Mapping
import functools
import logging
import math
import re
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments
from mezo_jax.core.quantized import is_codes

# Name of a path component that holds layers, with an optional layer number.
_LAYERS = re.compile(r'(?i)(.*(?:layers?|blocks?)|h)(?:_(\d+))?')
# A plural name suggests that all layers are stored in one array.
_PLURAL = re.compile(r'(?i).*(layers|blocks)')
# Names of leaves for which the number of axes in a single layer is known: two
# or more for a matrix, one for a bias.
_MATRIX = re.compile(r'(?i)(.*/)?(kernel|embedding|weight)')
_BIAS = re.compile(r'(?i)(.*/)?(bias|b)')
# Biases and norms, to which weight decay is not applied.
_NOT_DECAYED = re.compile(
    r'(?i)(^|/)(bias|b|scale|beta|gamma|\w*norm\w*|ln(_?\w+)?)(/|$)')


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """Returns pairs (path, leaf), with paths such as ``'layers/attn/q/kernel'``.

  The paths are the same for Linen and NNX models: an NNX Variable is one leaf,
  and the path does not contain the name of its value. A `QuantizedArray` is one
  leaf, too.

  Args:
    tree: A tree of arrays, shapes, NNX Variables or `QuantizedArray`.

  Raises:
    ValueError: If two leaves have the same path.
  """
  out = {}
  nodes = jax.tree.leaves_with_path(
      tree, is_leaf=lambda x: _is_variable(x) or is_codes(x))
  for path, node in nodes:
    within = jax.tree.leaves_with_path(node, is_leaf=is_codes)
    for more, leaf in within:
      if _is_variable(node) and len(within) == 1:
        more = ()
      name = jax.tree_util.keystr((*path, *more), simple=True, separator='/')
      if name in out:
        raise ValueError(
            f'two parameters have the path {name!r} and would draw the same '
            'noise; rename one of them.')
      out[name] = leaf
  return [*out.items()]


def size_of(tree: Any) -> int:
  """Returns the number of elements of all leaves."""
  return sum(x.size for _, x in named_leaves(tree))


def _is_variable(node) -> bool:
  """Returns whether a node is a flax.nnx Variable, without importing flax."""
  return any(c.__name__ == 'Variable' and c.__module__.startswith('flax.nnx')
             for c in type(node).__mro__)


def structure(tree: Any) -> Any:
  """Returns the tree structure whose leaves are those of `named_leaves`."""
  return jax.tree.structure(tree, is_leaf=is_codes)


def map_named(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  """Maps ``fn(path, leaf, *others)`` over trees of the same structure.

  Args:
    fn: Function of a leaf's path, the leaf, and the leaves of ``rest``.
    tree: A tree of arrays and `QuantizedArray`.
    *rest: Trees that have the structure of ``tree`` as a prefix.
  """
  treedef = structure(tree)
  flat = [treedef.flatten_up_to(t) for t in rest]
  return treedef.unflatten(
      fn(*pair, *others) for pair, *others in zip(named_leaves(tree), *flat))


def locate(path: str, stacked: bool | None = None
           ) -> tuple[str, int | None, bool]:
  """Finds the layer that a leaf belongs to, from its path.

  The first component named ``[...]layer[s]``, ``[...]block[s]`` or ``h`` is
  taken as the one that holds layers. A number in it or after it (``layers_3``,
  ``layers/3``) is the number of the layer. Without a number, the leaf may be a
  stack whose first axis is the layer axis; see `stacked`. So
  ``layers/3/q/kernel`` of shape [a, b] corresponds to row 3 of
  ``layers/q/kernel`` of shape [L, a, b], and both draw the same noise.

  Args:
    path: Path of a leaf.
    stacked: Whether the leaf is a stack of layers. If False, components without
      a number are ignored. Defaults to None, which decides by the name.

  Returns:
    The path without the layer number, the layer (None if the path has no
    number), and whether the leaf is a stack of layers.
  """
  parts = path.split('/')
  for i, part in enumerate(parts[:-1]):
    match = _LAYERS.fullmatch(part)
    if not match:
      continue
    parts[i], number = match.groups()
    if number is None and parts[i + 1].isdigit():
      number = parts.pop(i + 1)
    if number is not None:
      return '/'.join(parts), int(number), False
    if stacked is not False:
      return path, None, True
  return path, None, False


def layer_of(path: str) -> tuple[str, int | None]:
  """Returns the path of the layers of a leaf, and the number of its layer.

  For ``'model/layers/3/q/kernel'`` the result is ``('model/layers', 3)``. If
  the leaf is a stack of layers, the number is None. For a leaf outside of
  layers, the result is the first component of its path, and None.

  Args:
    path: Path of a leaf.
  """
  name, layer, is_stack = locate(path)
  parts = name.split('/')
  if layer is None and not is_stack:
    return parts[0], None
  at = next(i for i, part in enumerate(parts) if _LAYERS.fullmatch(part))
  return '/'.join(parts[:at + 1]), layer


def check_paths(leaves: Iterable[tuple[str, int | None]]) -> None:
  """Checks that no two leaves draw their noise from the same key.

  A key is derived from the CRC-32 of the path without the layer number, and
  from the layer.

  Args:
    leaves: Pairs (path, number of layers), one for each leaf. The number is
      None for a leaf that is not a stack.

  Raises:
    ValueError: If two leaves have the same key, because the hashes of their
      paths are equal or because a stack contains the layer of the other leaf.
  """
  seen = {}
  for path, depth in leaves:
    name, layer, _ = locate(path, depth is not None)
    layers = [layer] if depth is None else range(depth)
    for layer in layers:
      other = seen.setdefault((zlib.crc32(name.encode()), layer), path)
      if other != path:
        raise ValueError(
            f'parameters {other!r} and {path!r} would draw the same noise '
            '(their paths have the same hash, or both contain the same layer); '
            'rename one of them.')


def stacked(params: Any, how: Any = None) -> list[bool]:
  """Returns which leaves are stacks of layers along their first axis.

  Each layer of a stack draws its noise from its own key.

  Args:
    params: The parameters, a tree of arrays or shapes.
    how: A mask of the leaves that are stacks, as for `selected`. Defaults to
      None, which guesses from names (see `locate`) and from the shapes below
      these names (see `_is_stack`). The guess is logged once per tree.

  Returns:
    A list of bools in the order of `named_leaves`.
  """
  found = named_leaves(params)
  if how is None:
    chosen = _guessed(found)
  else:
    chosen = resolved(params, how, 'stacked')
  return [bool(c and shape_of(x)) for c, (_, x) in zip(chosen, found)]


def _guessed(found: list[tuple[str, Any]]) -> list[bool]:
  """Guesses from names and shapes which leaves are stacks of layers."""
  # Leaves below each component that is named like layers. `_named_layers` stops
  # at a layer with a number. As in `locate`, such a layer takes precedence over
  # names of layers further down the path.
  parts = {}
  for path, x in found:
    for part in _named_layers(path):
      parts.setdefault(part, []).append((path.removeprefix(part + '/'), x))
  stacks = [part for part in parts if _is_stack(part, parts[part])]
  if parts:
    _log_guess(tuple(stacks), tuple(p for p in parts if p not in stacks))
  return [any(part in stacks for part in _named_layers(path))
          for path, _ in found]


def _named_layers(path: str) -> list[str]:
  """Returns the prefixes of a path that may be stacks of layers.

  The last component of each prefix is named like layers (``layers``, ``h``) and
  has no number. The search ends at the first component with a layer number.
  """
  parts, found = path.split('/'), []
  for i, part in enumerate(parts[:-1]):
    match = _LAYERS.fullmatch(part)
    if match and (match.group(2) or parts[i + 1].isdigit()):
      break
    if match:
      found.append('/'.join(parts[:i + 1]))
  return found


def _is_stack(part: str, leaves: list[tuple[str, Any]]) -> bool:
  """Returns whether the shapes below a path are those of stacked layers.

  All leaves must have the same length along the first axis. In addition, some
  leaf must have more axes than it would have in a single layer: three or more,
  or two if its name is that of a bias or norm. A kernel with two axes, or a
  bias with one, shows that the part is a single layer.

  The names and shapes may leave both possibilities open: all leaves have the
  same number of axes, and no leaf has the name of a matrix, a bias or a norm.
  Then the part is a stack if its name is a plural (``layers``).

  Args:
    part: The path of the part of the tree.
    leaves: The leaves below it, with their paths relative to it.
  """
  # Scalars and leaves that cannot be trained (counters, keys) are ignored.
  shapes = [(path, shape_of(x)) for path, x in leaves
            if len(shape_of(x)) and (is_codes(x) or is_floating(x))]
  if not _may_be_stack(shapes):
    return False
  known = False  # whether a name shows the axes that a single layer has
  for path, shape in shapes:
    is_vector = _NOT_DECAYED.search(path)
    if len(shape) > 2 or is_vector and len(shape) == 2:
      return True
    known = known or is_vector or _MATRIX.fullmatch(path)
  same_axes = len({len(shape) for _, shape in shapes}) == 1
  return bool(same_axes and not known and _PLURAL.fullmatch(part))


def _may_be_stack(shapes: list[tuple[str, tuple[int, ...]]]) -> bool:
  """Returns whether no shape below a path shows that it is a single layer.

  Args:
    shapes: Pairs (path, shape) of the leaves. No leaf is a scalar.
  """
  lengths = {shape[0] for _, shape in shapes}
  return len(lengths) == 1 and not any(
      _is_of_one_layer(path, shape, shapes) for path, shape in shapes)


def _is_of_one_layer(path: str, shape: tuple[int, ...], others) -> bool:
  """Returns whether a leaf of this name has too few axes to be a stack.

  Args:
    path: Path of the leaf.
    shape: Shape of the leaf.
    others: Pairs (path, shape) of all leaves in the same part of the tree.
  """
  if path.split('/')[-1] == 'kernel':
    return len(shape) < 3
  if not _BIAS.fullmatch(path):
    return False
  # A bias whose further axes all have length 1 is ambiguous. It may be the bias
  # of a single convolution, [out, 1, 1], or a stack [layers, 1] for layers with
  # one output. It is a stack only if another leaf of the same module has an
  # axis of length 1 too, which would be that output.
  if len(shape) == 1:
    return True
  module = path.rpartition('/')[0]
  one_output = any(1 in other[1:] for name, other in others
                   if name != path and name.rpartition('/')[0] == module)
  return math.prod(shape[1:]) == 1 and len(others) > 1 and not one_output


@functools.lru_cache(maxsize=64)
def _log_guess(stacks: tuple[str, ...], others: tuple[str, ...]) -> None:
  """Logs which parts of a tree are taken as stacks; cached to log it once."""
  logging.getLogger(__name__).info(
      'guessed from names and shapes which arrays are stacks of layers: those '
      'below %s. Arrays below %s have similar names but are not stacks. Pass '
      'stacked= to the directions to override this.', list(stacks),
      list(others))


def shape_of(x: Any) -> tuple[int, ...]:
  """Returns the shape of a leaf; for `QuantizedArray`, that of the weight."""
  return x.shape if is_codes(x) else jnp.shape(x)


def decayed(params: Any, how: Any = None) -> Any:
  """Returns a tree of bools: True for leaves that weight decay applies to.

  These are the leaves that have two axes or more in each layer and are not
  named like biases or norms.

  Args:
    params: The parameters, a tree of arrays or shapes.
    how: A mask of the leaves that are stacks of layers, as for `selected`.
      Defaults to None, which guesses. A leaf then counts as a stack if
      `stacked` guesses so, or if it is in a part of the tree where all leaves
      have the same length along the first axis and one of them has at least
      three axes.
  """
  found = named_leaves(params)
  stacks = stacked(params, how)
  if how is None:
    stacks = map(any, zip(stacks, _seem_stacked(found)))
  # The layer axis of a stack does not count.
  return structure(params).unflatten(
      len(shape_of(x)) >= (3 if is_stack else 2)
      and not _NOT_DECAYED.search(path)
      for (path, x), is_stack in zip(found, stacks))


def _seem_stacked(found: list[tuple[str, Any]]) -> list[bool]:
  """Returns which leaves are in a part of a tree that looks like a stack.

  Unlike `stacked`, this function considers shapes only. The names of the parts
  do not matter.
  """
  parts = {}  # leaves of each part of the tree, by the path of the part
  for path, x in found:
    for part in _above(path):
      parts.setdefault(part, []).append((path, shape_of(x)))
  stacks = set()
  for part, leaves in parts.items():
    shapes = [shape for _, shape in leaves]
    if all(shapes) and max(map(len, shapes)) >= 3 and _may_be_stack(leaves):
      stacks.add(part)
  return [not stacks.isdisjoint(_above(path)) for path, _ in found]


def _above(path: str) -> list[str]:
  """Returns the paths of all parts of a tree that contain a leaf."""
  parts = path.split('/')
  return ['/'.join(parts[:i]) for i in range(len(parts))]


# --- masks and groups -------------------------------------------------------


def selected(params: Any, mask: Any, takes: Callable[..., Any] | None = None,
             stacks: Any = None) -> Any:
  """Returns which leaves are perturbed and updated, as a tree of bools.

  An array of bools in place of a bool selects elements of its leaf.

  Args:
    params: The parameters, a tree of arrays and `QuantizedArray`.
    mask: The leaves to train: a tree or prefix tree of bools, in which a bool
      array of a leaf's shape selects elements; a function that maps ``params``
      to such a tree; or a regular expression that is searched for in the paths
      (``'attn/(q|v)/'``). None selects every leaf that can be trained.
    takes: Function that returns whether a leaf can be trained. Defaults to
      None, which accepts floating-point leaves.
    stacks: A mask of the leaves that are stacks of layers, as for `stacked`.
      Defaults to None, which guesses.

  Raises:
    ValueError: If the mask does not fit the tree or selects nothing, if a
      selected leaf is complex or has a floating-point dtype of less than 16
      bits, or if two selected leaves would draw the same noise.
  """
  takes = takes or is_floating
  found = named_leaves(params)
  chosen = []
  for (path, x), use in zip(found, resolved(params, mask)):
    dtype = _dtype_of(path, x)
    if use is not False and jnp.issubdtype(dtype, jnp.complexfloating):
      raise ValueError(
          f'parameter {path!r} is {dtype}, but directions are real; exclude it '
          'with mask=..., or train its real and imaginary parts as two '
          'parameters.')
    use = takes(x) and use
    if use is not False and is_floating(x) and dtype.itemsize < 2:
      raise ValueError(
          f'parameter {path!r} is {dtype}, which is too coarse to be '
          'perturbed; exclude it with mask=... .')
    chosen.append(use)
  used = [use is not False for use in chosen]
  if found and not any(used):
    shown = ', '.join(path for path, _ in found[:5])
    raise ValueError(
        f'mask {mask!r} selects no floating-point parameter; the paths are '
        f'{shown}{", ..." if len(found) > 5 else ""}.')
  depths = []
  for (path, x), use, is_stack in zip(found, used, stacked(params, stacks)):
    if use:
      depths.append((path, shape_of(x)[0] if is_stack else None))
  check_paths(depths)
  return structure(params).unflatten(chosen)


def _dtype_of(path: str, x: Any) -> Any:
  """Returns the dtype of an array, a shape with a dtype, or a number."""
  if is_codes(x):
    return jnp.dtype(x.dtype)
  try:
    return jnp.result_type(x)
  except (TypeError, ValueError):
    raise ValueError(
        f'parameter {path!r} is {x!r}, which is not an array.') from None


def is_floating(x: Any) -> bool:
  """Returns whether a leaf has a real floating-point dtype."""
  dtype = x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)
  return jnp.issubdtype(dtype, jnp.floating)


def resolved(params: Any, mask: Any, name: str = 'mask') -> list[Any]:
  """Converts a mask to a list with True, False or a bool array for each leaf.

  Args:
    params: The parameters, a tree of arrays or shapes and `QuantizedArray`.
    mask: A mask in any of the forms that `selected` accepts.
    name: Name of the argument, for the error. Defaults to 'mask'.

  Returns:
    A list in the order of `named_leaves`.

  Raises:
    ValueError: If the mask does not fit the tree, or is not a mask.
  """
  leaves = named_leaves(params)
  if mask is None:
    mask = True
  if isinstance(mask, str):
    found = arguments.expression(name, mask)
    return [bool(found.search(path)) for path, _ in leaves]
  if callable(mask):
    mask = mask(params)
  # A `QuantizedArray` is one leaf, so a number takes its place in the params.
  # In a mask that was mapped from them, its integers stand for all of it.
  numbers = structure(params).unflatten(range(len(leaves)))
  mask = jax.tree.map(
      lambda m: m.codes if is_codes(m) else m, mask, is_leaf=is_codes)
  try:
    full = jax.tree.leaves(jax.tree.broadcast(mask, numbers))
  except ValueError as e:
    raise ValueError(
        f'{name} is not a prefix of the parameter tree: {e}') from e
  out = []
  for m, (path, x) in zip(full, leaves):
    is_bool = isinstance(m, (bool, int, np.generic, np.ndarray, jax.Array))
    if not is_bool or jnp.ndim(m) and jnp.shape(m) != shape_of(x):
      found = f'an array of shape {jnp.shape(m)}' if is_bool else repr(m)
      raise ValueError(
          f'{name} has {found} for the parameter {path!r}, which is not a bool '
          f'or an array of bools of the shape {shape_of(x)}.')
    out.append(jnp.asarray(m, bool) if jnp.ndim(m) else bool(m))
  return out


def matches(params: Any, pattern: str) -> Any:
  """Returns a tree of bools: True for leaves whose path contains a match.

  Args:
    params: A tree of arrays and `QuantizedArray`.
    pattern: A regular expression that is searched for in the paths.
  """
  return map_named(
      lambda path, _: bool(re.search(pattern, path)), params)


def group_of(path: str, groups: Mapping[str, Any]) -> str:
  """Returns the first key of ``groups`` that matches some part of a path.

  Args:
    path: Path of a leaf.
    groups: A mapping whose keys are regular expressions.

  Raises:
    ValueError: If no expression is found.
  """
  for pattern in groups:
    if re.search(pattern, path):
      return pattern
  raise ValueError(
      f'parameter {path} matches none of the groups {", ".join(groups)}; add '
      "the group '' at the end for all other parameters.")


def groups_of(params: Any, groups: Mapping[str, Any]) -> Any:
  """Returns a tree with the key of each leaf's group; see `group_of`."""
  return map_named(lambda path, _: group_of(path, groups), params)
