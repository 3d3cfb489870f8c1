"""Plots the dev scores of a sweep against the fields of its grid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mezo_jax.cli import grid as grids


def draw(path: Path, points: Sequence[dict[str, Any]]) -> None:
  """Plots the metric and the loss of each point, with standard errors.

  With one field, its values are on the x axis. With two, there is a line for
  each value of the field that has fewer. With more, points are listed one below
  the other, the best at the top.

  Args:
    path: The image file to write.
    points: What was measured, as in ``table.json``. Only points whose runs are
      all finished are drawn.
  """
  from matplotlib.figure import Figure  # slow to import
  complete = [point for point in points
              if all('score' in row for row in point['runs'])]
  names = [*dict.fromkeys(name for p in complete for name in p['dev'])]
  fields = [*points[0]['values']]
  lists = len(fields) > 2
  height = max(4.0, 1 + 0.25 * len(complete)) if lists else 4.0
  figure = Figure(figsize=(10, height), layout='constrained')
  axes = figure.subplots(1, max(len(names), 1), squeeze=False)[0]
  for axis, name in zip(axes, names):
    if lists:
      _draw_list(axis, complete, name)
    else:
      _draw_lines(axis, complete, points, name, fields)
  if lists:  # the same points are in each plot
    for axis in axes[1:]:
      axis.set_yticklabels([])
  figure.savefig(path, dpi=110)


def _draw_lines(axis, complete: Sequence[dict[str, Any]],
                points: Sequence[dict[str, Any]], name: str,
                fields: Sequence[str]) -> None:
  """Draws a number against one field, with a line for each value of another."""
  short = grids.short_names(fields)
  values = {field: [*dict.fromkeys(
      grids.spell(point['values'][field]) for point in points)]
            for field in fields}
  x_field, *others = sorted(fields, key=lambda f: -len(values[f]))
  numbers = [point['values'][x_field] for point in points]
  numeric = all(type(x) in (int, float) for x in numbers)

  def place(point):
    """Returns the x coordinate of a point."""
    x = point['values'][x_field]
    return x if numeric else values[x_field].index(grids.spell(x))

  for other in values[others[0]] if others else ['']:
    line = sorted(
        (point for point in complete if not others
         or grids.spell(point['values'][others[0]]) == other), key=place)
    axis.errorbar(
        [place(point) for point in line],
        [point['dev'][name]['mean'] for point in line],
        [point['dev'][name]['error'] or 0 for point in line],
        fmt='o-', capsize=3,
        label=f'{short[others[0]]} {other}' if others else None)
  lost = [place(point) for point in points
          if any('failed' in row for row in point['runs'])]
  if lost:
    axis.plot(lost, [0.02] * len(lost), 'x', color='tab:red', label='failed',
              transform=axis.get_xaxis_transform())
  if numeric and min(numbers) > 0 and max(numbers) >= 8 * min(numbers):
    axis.set_xscale('log')
  if not numeric:
    axis.set_xticks(range(len(values[x_field])), values[x_field])
  axis.set(xlabel=x_field, ylabel=f'dev {name.replace("_", " ")}')
  if others or lost:
    axis.legend()


def _draw_list(axis, complete: Sequence[dict[str, Any]], name: str) -> None:
  """Draws a number of each point, one below the other, from best to worst."""
  ranked = sorted(complete, key=lambda point: sum(
      row['score'] for row in point['runs']))
  at = range(len(ranked))
  axis.errorbar([point['dev'][name]['mean'] for point in ranked], at,
                xerr=[point['dev'][name]['error'] or 0 for point in ranked],
                fmt='o', capsize=3)
  short = grids.short_names([*ranked[0]['values']])
  axis.set_yticks(at, [', '.join(
      f'{short[field]} {grids.spell(value)}'
      for field, value in point['values'].items()) for point in ranked])
  axis.grid(axis='y', alpha=0.3)
  axis.set(xlabel=f'dev {name.replace("_", " ")}')
