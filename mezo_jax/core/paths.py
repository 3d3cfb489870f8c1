"""Paths of leaves, layers in them, and masks and groups that refer to them.

A *mask* chooses leaves of a parameter tree; *groups* ``{regular expression:
value}`` give each leaf the value of the first expression that is found in its
path.
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

_LAYERS = re.compile(r'(?i)(.*(?:layers?|blocks?)|h)(?:_(\d+))?')
_PLURAL = re.compile(r'(?i).*(layers|blocks)')
_MATRIX = re.compile(r'(?i)(.*/)?(kernel|embedding|weight)')
_BIAS = re.compile(r'(?i)(.*/)?(bias|b)')
_NOT_DECAYED = re.compile(
    r'(?i)(^|/)(bias|b|scale|beta|gamma|\w*norm\w*|ln(_?\w+)?)(/|$)')


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """Returns leaves with their paths, such as ``'layers/attn/q/kernel'``.

  Paths of Linen and NNX are alike: an NNX Variable is one leaf with its own
  name. `Codes` are one leaf, too.

  Raises:
    ValueError: If two leaves have the same path.
  """
  out = {}
  for path, node in jax.tree_util.tree_flatten_with_path(
      tree, is_leaf=lambda x: _is_variable(x) or is_codes(x))[0]:
    within = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_codes)[0]
    if _is_variable(node) and len(within) == 1:
      within = [((), within[0][1])]
    for more, leaf in within:
      name = '/'.join(
          str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
          for k in (*path, *more))
      if name in out:
        raise ValueError(
            f'two parameters have the path {name!r}, and would draw the same '
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
  """Maps ``fn(path, leaf, *others)`` over trees of one structure."""
  flat = [structure(tree).flatten_up_to(t) for t in rest]
  return jax.tree.unflatten(structure(tree), [
      fn(path, leaf, *others)
      for (path, leaf), *others in zip(named_leaves(tree), *flat)])


def locate(path: str, stacked: bool | None = None
           ) -> tuple[str, int | None, bool]:
  """Splits a path into (path without layer number, layer, stacked?).

  The first component named ``[...]layer[s]``, ``[...]block[s]`` or ``h`` marks
  layers. A number in it or after it (``layers_3``, ``layers/3``) is that of the
  layer. Without a number, the first axis may be that of layers; see `stacked`.
  So ``layers/3/q/kernel`` of shape [a, b] is row 3 of ``layers/q/kernel`` of
  shape [L, a, b]. A leaf with any other path is one block.

  Args:
    path: Path of a leaf.
    stacked: Whether the leaf is known to be a stack of layers. Components
      without a number decide nothing if it is known not to be. Defaults to
      None, which believes the name.
  """
  parts = path.split('/')
  for i, part in enumerate(parts[:-1]):
    match = _LAYERS.fullmatch(part)
    if not match:
      continue
    name, number = match.groups()
    if number is not None:
      return '/'.join([*parts[:i], name, *parts[i + 1:]]), int(number), False
    if parts[i + 1].isdigit():
      return '/'.join(parts[:i + 1] + parts[i + 2:]), int(parts[i + 1]), False
    if stacked is not False:
      return path, None, True
  return path, None, False


def layer_of(path: str) -> tuple[str, int | None]:
  """Returns the path of the layers that a leaf belongs to, and its layer. For a
  leaf outside of layers, returns the first component of its path and None."""
  name, layer, is_stack = locate(path)
  parts = name.split('/')
  if layer is None and not is_stack:
    return parts[0], None
  at = next(i for i, part in enumerate(parts) if _LAYERS.fullmatch(part))
  return '/'.join(parts[:at + 1]), layer


def check_paths(leaves: Iterable[tuple[str, int | None]]) -> None:
  """Checks that no two leaves have the same key.

  Args:
    leaves: (path, number of layers) of each leaf; None if it is not a stack.

  Raises:
    ValueError: If two leaves have the same key: the hashes of their names are
      equal, or one is a layer that the other, a stack, has too.
  """
  seen = {}
  for path, depth in leaves:
    name, layer, _ = locate(path, depth is not None)
    name = zlib.crc32(name.encode())
    for number in (layer,) if depth is None else range(depth):
      other = seen.setdefault((name, number), path)
      if other != path:
        raise ValueError(
            f'Parameters {other!r} and {path!r} would draw the same noise '
            '(their names hash alike, or both have the same layer); rename '
            'one of them.')


def stacked(params: Any, how: Any = None) -> list[bool]:
  """Returns which leaves are stacks of layers along their first axis.

  Each layer of a stack has a key of its own.

  Args:
    params: The parameters.
    how: A mask that says which leaves are stacks. Defaults to None, which
      guesses: the names of layers are a first sign (see `locate`), and the
      shapes under that name must be a second one (see `_is_stack`). What was
      guessed is logged once, for each tree.
  """
  found = named_leaves(params)
  if how is None:
    chosen = _guessed(found)
  else:
    chosen = resolved(params, how, 'stacked')
  return [bool(c) and len(shape_of(x)) > 0
          for c, (_, x) in zip(chosen, found)]


def _guessed(found: list[tuple[str, Any]]) -> list[bool]:
  """Returns which leaves are stacks, by names and shapes."""
  parts = {}  # the leaves below each component that is called layers
  for path, x in found:
    for part in _named_layers(path):
      parts.setdefault(part, []).append((path.removeprefix(part + '/'), x))
  is_stack = {part: _is_stack(part, leaves) for part, leaves in parts.items()}
  if is_stack:
    _log_guess(*(tuple(part for part, stack in is_stack.items() if stack == s)
                 for s in (True, False)))
  out = []
  for path, _ in found:
    # A number further up decides first: see `locate`.
    stack = any(is_stack[part] for part in _named_layers(path))
    out.append(stack)
  return out


def _named_layers(path: str) -> list[str]:
  """Returns the beginnings of a path, up to the first layer with a number,
  that end in a name of layers without one."""
  parts, found = path.split('/'), []
  for i, part in enumerate(parts[:-1]):
    match = _LAYERS.fullmatch(part)
    if match and (match.group(2) or parts[i + 1].isdigit()):
      break
    if match:
      found.append('/'.join(parts[:i + 1]))
  return found


def _is_stack(part: str, leaves: list[tuple[str, Any]]) -> bool:
  """Returns whether shapes agree that a part of the tree is stacked layers.

  All must have the same first length, and one of them must have more axes than
  in a single layer: three or more, or two if it has a name of biases and norms.
  If all have one axis, or all two, with names that do not tell how many axes a
  layer has, a plural (``layers``) decides. A kernel with two axes, or a bias
  with one, belongs to one layer.

  Args:
    part: The path of the part of the tree.
    leaves: The leaves below it, with their paths within it.
  """
  # Scalars and leaves that cannot be trained (counters, keys) do not count.
  shapes = [(path, shape_of(x)) for path, x in leaves
            if len(shape_of(x)) and (is_codes(x) or is_floating(x))]
  if not shapes or len({shape[0] for _, shape in shapes}) > 1:
    return False
  if any(_is_of_one_layer(path, shape, shapes) for path, shape in shapes):
    return False
  is_vector = lambda path: bool(_NOT_DECAYED.search(path))
  if any(len(shape) >= 3 or len(shape) == 2 and is_vector(path)
         for path, shape in shapes):
    return True
  return (
      bool(_PLURAL.fullmatch(part)) and len({len(s) for _, s in shapes}) == 1
      and not any(_MATRIX.fullmatch(path) or is_vector(path)
                  for path, _ in shapes))


def _is_of_one_layer(path: str, shape: tuple[int, ...], others) -> bool:
  """Returns whether a leaf of this name has too few axes to be a stack."""
  if path.split('/')[-1] == 'kernel':
    return len(shape) < 3
  if not _BIAS.fullmatch(path):
    return False
  # The bias of a convolution may be [out, 1, 1]: not a number for each layer,
  # unless the layer has an output of length 1.
  above = path.rpartition('/')[0]
  one_output = any(1 in other[1:] for name, other in others
                   if name != path and name.rpartition('/')[0] == above)
  return len(shape) == 1 or (
      math.prod(shape[1:]) == 1 and len(others) > 1 and not one_output)


@functools.lru_cache(maxsize=64)
def _log_guess(stacks: tuple[str, ...], others: tuple[str, ...]) -> None:
  logging.getLogger(__name__).info(
      'guessed from names and shapes: stacked layers are below %s; not stacked '
      'in spite of their names are %s. Pass stacked= to directions to say '
      'otherwise.', list(stacks), list(others))


def shape_of(x: Any) -> tuple[int, ...]:
  return x.shape if is_codes(x) else jnp.shape(x)


def decayed(params: Any, how: Any = None) -> Any:
  """Returns which leaves weight decay is for, as a tree of bools.

  These are matrices (of each layer), not biases and norms. A leaf is taken for
  a stack as `stacked` does, or if its shapes alone say so: a part of the tree
  is stacked if all of its leaves begin with the same length, and one of them
  has three axes or more.

  Args:
    params: The parameters.
    how: A mask that says which are stacked. Defaults to None, which guesses.
  """
  found = named_leaves(params)
  if how is None:
    is_stack = [a or b for a, b in zip(
        stacked(params), _seem_stacked(found))]
  else:
    is_stack = [*map(bool, resolved(params, how, 'stacked'))]
  return jax.tree.unflatten(structure(params), [
      len(shape_of(x)) - (s and len(shape_of(x)) > 0) >= 2
      and not _NOT_DECAYED.search(path)
      for (path, x), s in zip(found, is_stack)])


def _seem_stacked(found: list[tuple[str, Any]]) -> list[bool]:
  """Returns which leaves are in parts of the tree whose shapes look stacked."""
  parts = {}  # the leaves of each part of the tree, by its path
  above = lambda path: [
      '', *(path[:i + 1] for i, c in enumerate(path) if c == '/')]
  for path, x in found:
    for part in above(path):
      parts.setdefault(part, []).append((path, shape_of(x)))

  def looks_stacked(leaves):
    shapes = [shape for _, shape in leaves]
    return (all(shapes) and len({shape[0] for shape in shapes}) == 1
            and max(map(len, shapes)) >= 3
            and not any(_is_of_one_layer(path, shape, leaves)
                        for path, shape in leaves))
  whole = {part for part, leaves in parts.items() if looks_stacked(leaves)}
  return [any(part in whole for part in above(path)) for path, _ in found]


# --- masks and groups -------------------------------------------------------


def selected(params: Any, mask: Any, takes: Callable[..., Any] | None = None,
             stacks: Any = None) -> Any:
  """Returns which leaves are perturbed and updated, as a tree of bools.

  An array of bools in place of a bool selects elements of its leaf.

  Args:
    params: The parameters.
    mask: None (every leaf that can be trained), a tree or prefix tree of bools
      (or, for elements, bool arrays of the leaves' shapes), a function from
      params to one, or a regular expression that is searched for in the paths
      (``'attn/(q|v)/'``). True means trained.
    takes: Returns whether a leaf can be trained. Defaults to None, for leaves
      of floating point.
    stacks: A mask of the leaves that are stacks of layers, as for `stacked`.

  Raises:
    ValueError: If a mask selects nothing or does not fit the tree.
  """
  chosen, takes = resolved(params, mask), takes or is_floating
  found = named_leaves(params)
  for path, x in found:
    if not is_codes(x) and not _is_array(x):
      raise ValueError(f'parameter {path!r} is {x!r}, which is not an array.')
  for (path, x), c in zip(found, chosen):
    if c is not False and not is_codes(x) and jnp.issubdtype(
        jnp.result_type(x), jnp.complexfloating):
      raise ValueError(
          f'parameter {path!r} is {jnp.result_type(x)}, and directions are '
          'real: leave it out with mask=..., or train its real and imaginary '
          'parts.')
  chosen = [takes(x) and c for (_, x), c in zip(found, chosen)]
  if found and not any(c is not False for c in chosen):
    shown = ', '.join(path for path, _ in found[:5])
    raise ValueError(
        f'mask {mask!r} selects no floating-point parameter; the paths are '
        f'{shown}{", ..." if len(found) > 5 else ""}.')
  for (path, x), c in zip(found, chosen):
    if c is not False and not is_codes(x) and is_floating(x) and (
        jnp.result_type(x).itemsize < 2):
      raise ValueError(
          f'parameter {path!r} is {x.dtype}, too coarse to be perturbed: leave '
          'it out with mask=... .')
  check_paths([
      (path, shape_of(x)[0] if is_stack else None)
      for (path, x), c, is_stack in zip(
          found, chosen, stacked(params, stacks)) if c is not False])
  return jax.tree.unflatten(structure(params), chosen)


def _is_array(x) -> bool:
  """Returns whether a leaf is an array, its shape, or a number."""
  try:
    return hasattr(x, 'dtype') or bool(jnp.result_type(x))
  except (TypeError, ValueError):
    return False


def is_floating(x: Any) -> bool:
  dtype = x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)
  return jnp.issubdtype(dtype, jnp.floating)


def resolved(params: Any, mask: Any, name: str = 'mask') -> list[Any]:
  """Returns the mask of each leaf: True, False or an array of bools.

  Args:
    params: The parameters.
    mask: As for `selected`.
    name: The argument's name, for the error.

  Raises:
    ValueError: if it does not fit the tree, or is not a mask.
  """
  if mask is None or isinstance(mask, bool):
    return [mask is not False] * len(named_leaves(params))
  if isinstance(mask, str):
    found = arguments.expression(name, mask)
    return [bool(found.search(path)) for path, _ in named_leaves(params)]
  mask = mask(params) if callable(mask) else mask
  out = []

  def of_leaf(m, x):
    if not isinstance(m, (bool, int, np.generic, np.ndarray, jax.Array)):
      raise ValueError(f'{m!r} is not a bool or an array of bools')
    if jnp.ndim(m) and jnp.shape(m) != shape_of(x):
      raise ValueError(f'a mask of elements has the shape {jnp.shape(m)} and '
                       f'its parameter {shape_of(x)}')
    out.append(jnp.asarray(m, bool) if jnp.ndim(m) else bool(m))

  try:
    jax.tree.map(lambda m, part: jax.tree.map(
        lambda x: of_leaf(m, x), part, is_leaf=is_codes), mask, params)
  except ValueError as e:
    raise ValueError(
        f'{name} is not a prefix of the parameter tree: {e}') from e
  return out


def matches(params: Any, pattern: str) -> Any:
  """Returns a tree of bools: whether an expression is found in each path."""
  return map_named(
      lambda path, _: bool(re.search(pattern, path)), params)


def group_of(path: str, groups: Mapping[str, Any]) -> str:
  """Returns the first regular expression of ``groups`` found in a path.

  Raises:
    ValueError: If none is found.
  """
  for pattern in groups:
    if re.search(pattern, path):
      return pattern
  raise ValueError(
      f'parameter {path} is in none of the groups {", ".join(groups)}; end '
      "them with '' for all others.")


def groups_of(params: Any, groups: Mapping[str, Any]) -> Any:
  """Returns a tree with the group of each leaf of ``params``."""
  return map_named(lambda path, _: group_of(path, groups), params)
