"""Formats tables for reports."""

from collections.abc import Sequence
import html
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
  first, *others = ['| ' + ' | '.join(cells) + ' |'
                    for cells in _cells(rows, columns)]
  width = len(rows[0] if columns is None else columns)
  return '\n'.join([first, '|' + '---|' * width, *others])


def html_table(rows: Sequence[dict[str, Any]],
               columns: Sequence[str] | None = None) -> str:
  """Returns rows as an HTML table.

  Args:
    rows: As for `markdown_table`.
    columns: As for `markdown_table`.
  """
  lines = []
  for cells in _cells(rows, columns):
    tag = 'td' if lines else 'th'
    lines.append('<tr>' + ''.join(f'<{tag}>{html.escape(cell)}</{tag}>'
                                  for cell in cells) + '</tr>')
  return '\n'.join(['<table>', *lines, '</table>'])


def cell(text: str) -> str:
  """Returns text for a cell in Markdown, with line breaks and bars escaped."""
  return repr(text)[1:-1].replace('|', r'\|')


def _cells(rows: Sequence[dict[str, Any]], columns: Sequence[str] | None
           ) -> list[list[str]]:
  """Returns the text of each cell, with the names of the columns first."""
  names = [*rows[0]] if columns is None else [*columns]
  lines = [names]
  for row in rows:
    lines.append([f'{x:.4g}' if isinstance(x, float) else str(x)
                  for x in (row.get(name, '') for name in names)])
  return lines
