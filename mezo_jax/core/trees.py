"""Joins nested dicts of parameters."""

from collections.abc import Mapping
from typing import Any

from mezo_jax.core.quantized import FACTORS, is_codes


def join(*trees: Mapping[str, Any]) -> dict[str, Any]:
  """Joins nested dicts into one that has the leaves of all. Leaves are shared.

  There is one exception. A subtree ``{'factors': array}`` at the path of a
  `QuantizedArray` holds trained factors of the scales of this weight. The two
  are joined into one `QuantizedArray` with rescaled scales.

  Args:
    *trees: Nested dicts of arrays and `QuantizedArray`.

  Raises:
    ValueError: If two trees have a leaf of the same path.
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
        raise ValueError(f'parameter {name!r} is in two of the trees to join.')
  return out
