"""Names of leaves, the layers in them, and what is chosen by them.

A *mask* chooses leaves of a parameter tree; *groups* ``{regular expression:
value}`` give each leaf the value of the first expression that is found in its
path.
"""

from collections.abc import Callable, Mapping
import re
from typing import Any
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax import _arguments
from mezo_jax._codes import is_codes

_LAYERS = re.compile(r'(?i)(.*(?:layers?|blocks?)|h)(?:_(\d+))?')
_SEVERAL = re.compile(r'(?i)(^|/)\w*(layers|blocks)/')
_NOT_DECAYED = re.compile(
    r'(?i)(^|/)(bias|b|scale|beta|gamma|\w*norm\w*|ln(_?\w+)?)(/|$)')


def named_leaves(tree) -> list[tuple[str, Any]]:
  """The leaves with their paths, such as ``'layers/attn/q/kernel'``.

  Linen's and NNX's are alike: an NNX Variable is one leaf, of its own name. So
  are `Codes`.

  Raises:
    ValueError: if two leaves have the same path.
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


def size_of(tree) -> int:
  """How many numbers its leaves have; a code is one."""
  return sum(x.size for _, x in named_leaves(tree))


def _is_variable(node) -> bool:
  """Whether a node is flax.nnx's box of an array (flax is not imported)."""
  return any(c.__name__ == 'Variable' and c.__module__.startswith('flax.nnx')
             for c in type(node).__mro__)


def structure(tree):
  """Of the leaves that `named_leaves` names."""
  return jax.tree.structure(tree, is_leaf=is_codes)


def map_named(fn: Callable, tree, *rest):
  """Maps ``fn(path, leaf, *others)`` over trees of one structure."""
  flat = [structure(tree).flatten_up_to(t) for t in rest]
  return jax.tree.unflatten(structure(tree), [
      fn(path, leaf, *others)
      for (path, leaf), *others in zip(named_leaves(tree), *flat)])


def locate(path: str) -> tuple[str, int | None, bool]:
  """Splits a path into (path without layer number, layer, stacked?).

  The first component named ``[...]layer[s]``, ``[...]block[s]`` or ``h``
  decides: followed by a number (``layers_3``, ``layers/3``) the leaf is that
  layer; without one its leading axis is the layer axis. ``layers/3/q/kernel``
  of shape [a, b] is thus row 3 of ``layers/q/kernel`` of shape [L, a, b]. Any
  other path has neither; its leaf is one block, however it is scanned.
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
    return path, None, True
  return path, None, False


def layer_of(path: str) -> tuple[str, int | None]:
  """The path of the layers that a leaf is one of, and which; of any other leaf
  the first component of its path, and None. See `locate`."""
  name, layer, is_stack = locate(path)
  parts = name.split('/')
  if layer is None and not is_stack:
    return parts[0], None
  at = next(i for i, part in enumerate(parts) if _LAYERS.fullmatch(part))
  return '/'.join(parts[:at + 1]), layer


def check_paths(paths) -> None:
  """Raises if two leaves would draw the same noise (a collision of crc32)."""
  seen = {}
  for path in paths:
    name, layer, _ = locate(path)
    other = seen.setdefault((zlib.crc32(name.encode()), layer), path)
    if other != path:
      raise ValueError(
          f'Parameters {other!r} and {path!r} would draw the same noise '
          '(their names hash alike); rename one of them.')


def stacked(params, how=None) -> list[bool]:
  """Which leaves are stacks of layers along their first axis, each layer with
  a key of its own: by their names (see `locate`), or as a mask says."""
  found = named_leaves(params)
  chosen = ([locate(path)[2] for path, _ in found] if how is None
            else resolved(params, how, 'stacked'))
  return [bool(c) and len(shape_of(x)) > 0
          for c, (_, x) in zip(chosen, found)]


def shape_of(x) -> tuple[int, ...]:
  return x.shape if is_codes(x) else jnp.shape(x)


def decayed(params, how=None) -> Any:
  """Which leaves weight decay is for: matrices (of each layer), no biases and
  norms. A tree of bools.

  Where it is not said what is stacked, shapes say it: a part of the tree all of
  whose leaves begin with the same length is, if one of them has three axes or
  more, or its name is that of several layers.

  Args:
    params: the parameters.
    how: which are stacked; None to guess.
  """
  found = named_leaves(params)
  is_stack = ([*map(bool, resolved(params, how, 'stacked'))] if how is not None
              else _seem_stacked(found))
  return jax.tree.unflatten(structure(params), [
      len(shape_of(x)) - (s and len(shape_of(x)) > 0) >= 2
      and not _NOT_DECAYED.search(path)
      for (path, x), s in zip(found, is_stack)])


def _seem_stacked(found: list[tuple[str, Any]]) -> list[bool]:
  parts = {}  # of the tree, by path: [(first length, axes)] of their leaves
  above = lambda path: [path[:i + 1] for i, c in enumerate(path) if c == '/']
  for path, x in found:
    for part in ['', *above(path)]:
      shape = shape_of(x)
      parts.setdefault(part, []).append((*shape[:1], len(shape)))
  alike = {part for part, of in parts.items()
           if all(n for *_, n in of) and len({x[0] for x in of}) == 1}
  whole = {part for part in alike if max(n for _, n in parts[part]) >= 3}
  named = lambda path: locate(path)[2] and _SEVERAL.search(path)
  return [any(part in whole or part in alike and named(path)
              for part in ['', *above(path)]) for path, _ in found]


# --- masks and groups -------------------------------------------------------


def selected(params, mask, takes: Callable | None = None) -> Any:
  """Which leaves are perturbed and updated: a tree of bools.

  An array of bools in place of one says which elements of its leaf are.

  Args:
    params: the parameters.
    mask: None (every leaf that can be), a tree or prefix tree of bools (or, for
      elements, bool arrays of the leaves' shapes), a function from params to
      one, or a regular expression that is searched for in the paths
      (``'attn/(q|v)/'``). True means trained.
    takes: which leaves can be; None for those of floating point.

  Raises:
    ValueError: if a mask selects nothing or does not fit the tree.
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
  check_paths([path for (path, _), c in zip(found, chosen) if c is not False])
  return jax.tree.unflatten(structure(params), chosen)


def _is_array(x) -> bool:
  """Returns whether a leaf is an array, its shape, or a number."""
  try:
    return hasattr(x, 'dtype') or bool(jnp.result_type(x))
  except (TypeError, ValueError):
    return False


def is_floating(x) -> bool:
  dtype = x.dtype if hasattr(x, 'dtype') else jnp.result_type(x)
  return jnp.issubdtype(dtype, jnp.floating)


def resolved(params, mask, name: str = 'mask') -> list:
  """Returns for each leaf what a mask says: True, False or an array of bools.

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
    found = _arguments.expression(name, mask)
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


def matches(params, pattern: str) -> Any:
  """A tree of bools: in which paths a regular expression is found."""
  return map_named(
      lambda path, _: bool(re.search(pattern, path)), params)


def group_of(path: str, groups: Mapping[str, Any]) -> str:
  """The first regular expression of ``groups`` that is found in a path.

  Raises:
    ValueError: if none is.
  """
  for pattern in groups:
    if re.search(pattern, path):
      return pattern
  raise ValueError(
      f'parameter {path} is in none of the groups {", ".join(groups)}; end '
      "them with '' for all others.")


def groups_of(params, groups: Mapping[str, Any]) -> Any:
  """A tree of the groups' expressions, one for each leaf of ``params``."""
  return map_named(lambda path, _: group_of(path, groups), params)
