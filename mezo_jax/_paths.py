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

_LAYERS = re.compile(r'(?i)(.*(?:layers?|blocks?)|h)(?:_(\d+))?')


def named_leaves(tree) -> list[tuple[str, Any]]:
  """The leaves with their paths, such as ``'layers/attn/q/kernel'``.

  Linen's and NNX's are alike: an NNX Variable is one leaf, of its own name.

  Raises:
    ValueError: if two leaves have the same path.
  """
  out = {}
  for path, node in jax.tree_util.tree_flatten_with_path(
      tree, is_leaf=_is_variable)[0]:
    within = jax.tree_util.tree_flatten_with_path(node)[0]
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


def _is_variable(node) -> bool:
  """Whether a node is flax.nnx's box of an array (flax is not imported)."""
  return any(c.__name__ == 'Variable' and c.__module__.startswith('flax.nnx')
             for c in type(node).__mro__)


def map_named(fn: Callable, tree, *rest):
  """Maps ``fn(path, leaf, *others)`` over trees of one structure."""
  flat = [jax.tree.structure(tree).flatten_up_to(t) for t in rest]
  return jax.tree.unflatten(jax.tree.structure(tree), [
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


# --- masks and groups -------------------------------------------------------


def selected(params, mask) -> Any:
  """A tree of bools: which leaves are perturbed and updated.

  Args:
    params: the parameters.
    mask: None (every floating-point leaf), a tree or prefix tree of bools, a
      function from params to one, or a regular expression that is searched for
      in the paths (``'attn/(q|v)/'``). True means trained.

  Raises:
    ValueError: if a mask selects nothing or does not fit the tree.
  """
  found, treedef = named_leaves(params), jax.tree.structure(params)
  paths, leaves = [p for p, _ in found], [x for _, x in found]
  if mask is None:
    chosen = [True] * len(leaves)
  elif isinstance(mask, str):
    chosen = jax.tree.leaves(matches(params, mask))
  else:
    mask = mask(params) if callable(mask) else mask
    try:
      chosen = jax.tree.leaves(jax.tree.map(
          lambda m, part: jax.tree.map(lambda _: bool(m), part), mask, params))
    except ValueError as e:
      raise ValueError(
          f'mask is not a prefix of the parameter tree: {e}') from e
  floating = [jnp.issubdtype(getattr(x, 'dtype', jnp.result_type(x)),
                             jnp.floating) for x in leaves]
  chosen = [c and f for c, f in zip(chosen, floating)]
  if leaves and not any(chosen):
    shown = ', '.join(paths[:5]) or 'none at all'
    raise ValueError(
        f'mask {mask!r} selects no floating-point parameter; the paths are '
        f'{shown}{", ..." if len(paths) > 5 else ""}.')
  for path, x, c in zip(paths, leaves, chosen):
    if c and jnp.result_type(x).itemsize < 2:
      raise ValueError(
          f'parameter {path!r} is {x.dtype}, too coarse to be perturbed: leave '
          'it out with mask=... .')
  check_paths([p for p, c in zip(paths, chosen) if c])
  return jax.tree.unflatten(treedef, chosen)


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
