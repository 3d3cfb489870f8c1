"""Formats tables for reports."""

from collections.abc import Sequence
from typing import Any


def markdown_table(rows: Sequence[dict[str, Any]],
                   columns: Sequence[str] | None = None) -> str:
  """Returns rows as a Markdown table, without a final line break.

  Args:
    rows: Dicts from column name to value. Floats are written with four
      significant digits. The cell of a missing value is empty.
    columns: Names of the columns, in order. Defaults to None, for the keys of
      the first row.
  """
  if columns is None:
    columns = [*rows[0]]
  lines = [columns]
  for row in rows:
    cells = [row.get(c, '') for c in columns]
    lines.append([f'{x:.4g}' if isinstance(x, float) else str(x)
                  for x in cells])
  first, *others = ['| ' + ' | '.join(cells) + ' |' for cells in lines]
  return '\n'.join([first, '|' + '---|' * len(columns), *others])
