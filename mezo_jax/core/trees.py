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
      out[name] = _joined(name, out[name], x) if name in out else x
  return out


def _joined(name: str, a: Any, b: Any) -> Any:
  """Joins two subtrees of the same path."""
  if is_codes(b):
    a, b = b, a
  if isinstance(b, Mapping):
    if isinstance(a, Mapping):
      return join(a, b)
    if is_codes(a) and FACTORS in b:
      return a.rescaled(b[FACTORS])
  raise ValueError(f'parameter {name!r} is in two of the trees to join.')
