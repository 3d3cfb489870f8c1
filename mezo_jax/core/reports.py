"""Tables for reports."""

from collections.abc import Sequence
from typing import Any


def markdown_table(rows: Sequence[dict[str, Any]],
                   columns: Sequence[str] | None = None) -> str:
  """Rows as a Markdown table, without a line break at its end.

  Args:
    rows: dicts; floats are written with four digits, what a row lacks is empty.
    columns: in order; those of the first row if None.
  """
  columns = [*rows[0]] if columns is None else columns
  cell = lambda x: f'{x:.4g}' if isinstance(x, float) else str(x)
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  return '\n'.join([
      line(columns), '|' + '---|' * len(columns),
      *(line(cell(row.get(c, '')) for c in columns) for row in rows)])
