"""Nested dicts of parameters."""

from collections.abc import Mapping
from typing import Any

from mezo_jax.core.quantized import FACTORS, is_codes


def join(*trees: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict with the leaves of all of ``trees``, which are not copied;
  `factors` and the `Codes` that they are of become one leaf.

  Raises:
    ValueError: if two of them have a leaf of the same path.
  """
  out: dict[str, Any] = {}
  for tree in trees:
    for name, x in tree.items():
      if name not in out:
        out[name] = x
      elif isinstance(x, Mapping) and isinstance(out[name], Mapping):
        out[name] = join(out[name], x)
      elif is_codes(out[name]) and isinstance(x, Mapping) and FACTORS in x:
        out[name] = out[name].rescaled(x[FACTORS])
      elif is_codes(x) and isinstance(out[name], Mapping) and (
          FACTORS in out[name]):
        out[name] = x.rescaled(out[name][FACTORS])
      else:
        raise ValueError(f'two trees have the parameter {name!r}.')
  return out
