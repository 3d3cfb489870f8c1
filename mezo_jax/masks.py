"""Which parameters are trained, and what each of them is given.

A *mask* chooses leaves of a parameter tree; *groups* ``{regular expression:
value}`` give each leaf the value of the first expression that is found in its
path. `split` takes a nested dict apart along a mask, so that optimizer state,
noise and checkpoints hold only what is trained; `join` puts it together.
"""

from collections.abc import Callable, Mapping
import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax import noise


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
  found, treedef = noise.named_leaves(params), jax.tree.structure(params)
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
  noise.check_paths([p for p, c in zip(paths, chosen) if c])
  return jax.tree.unflatten(treedef, chosen)


def matches(params, pattern: str) -> Any:
  """A tree of bools: in which paths a regular expression is found."""
  return noise.map_named(
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
  return noise.map_named(lambda path, _: group_of(path, groups), params)


def split(params: dict, mask) -> tuple[dict, dict]:
  """``trainable, frozen``: two nested dicts that share no leaf.

  Args:
    params: a nested dict, such as Flax Linen's.
    mask: see `selected`.

  Raises:
    ValueError: if the tree has other containers than dicts.

  Example:
    >>> split({'a': {'w': 1., 'b': 2.}, 'c': 3.}, '^a/w|c')
    ({'a': {'w': 1.0}, 'c': 3.0}, {'a': {'b': 2.0}})
  """
  def part(tree, chosen, wanted):
    out = {}
    for name, x in tree.items():
      if isinstance(x, Mapping):
        x = part(x, chosen[name], wanted)
        if x:
          out[name] = x
      elif not isinstance(chosen[name], bool):
        raise ValueError(f'split takes nested dicts of arrays; {name!r} is a '
                         f'{type(x).__name__}.')
      elif chosen[name] == wanted:
        out[name] = x
    return out
  chosen = selected(params, mask)
  return part(params, chosen, True), part(params, chosen, False)


def join(*trees: dict) -> dict:
  """The nested dict with the leaves of all of ``trees``, which are not copied.

  Raises:
    ValueError: if two of them have a leaf of the same path.
  """
  out = {}
  for tree in trees:
    for name, x in tree.items():
      if name not in out:
        out[name] = x
      elif isinstance(x, Mapping) and isinstance(out[name], Mapping):
        out[name] = join(out[name], x)
      else:
        raise ValueError(f'two trees have the parameter {name!r}.')
  return out


def on_trainable(value_fn: Callable) -> Callable:
  """``value_fn(params, ...)`` as a function ``(trainable, ..., frozen=...)``.

  So that ``tx.update(None, state, trainable, value_fn=on_trainable(loss_fn),
  frozen=frozen, batch=batch)`` perturbs and updates ``trainable`` alone.
  """
  def joined_fn(trainable, *args, frozen, **kwargs):
    return value_fn(join(trainable, frozen), *args,
                    **accepted(value_fn, kwargs))
  return joined_fn


def accepted(value_fn: Callable, extra_args: dict) -> dict:
  """Those of the extra arguments that ``value_fn`` takes by name."""
  try:
    taken = inspect.signature(value_fn).parameters.values()
  except (TypeError, ValueError):  # a builtin, or a compiled function
    return extra_args
  if any(p.kind is p.VAR_KEYWORD for p in taken):
    return extra_args
  named = [p.name for p in taken if p.kind is not p.POSITIONAL_ONLY]
  return {k: v for k, v in extra_args.items() if k in named}
