"""A nested dict of parameters in two: what is trained, and what is not.

So that optimizer state, noise and checkpoints hold only what is trained.
"""

from collections.abc import Mapping

from flax.traverse_util import flatten_dict, unflatten_dict

from mezo_jax._paths import selected


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
  chosen, leaves = (flatten_dict(x) for x in (selected(params, mask), params))
  for path, x in leaves.items():
    if not isinstance(chosen[path], bool):
      raise ValueError(f'split takes nested dicts of arrays; {path[-1]!r} is a '
                       f'{type(x).__name__}.')
  part = lambda wanted: unflatten_dict(
      {path: x for path, x in leaves.items() if chosen[path] == wanted})
  return part(True), part(False)


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
