"""Writes the curves, the Markdown and the HTML of a report about runs."""

import base64
from collections.abc import Sequence
import html
from pathlib import Path
from typing import Any

import numpy as np

from mezo_jax.core import reports

# Each picture has one of these on its x axis.
_AXES = ('steps', 'training forwards', 'seconds')
# Values of training steps are averaged over this share of the run.
_SHARE = 1 / 50
# With more runs than this, the pictures have no legend.
_MOST = 20
_CSS = '''
:root { color-scheme: light dark; --text: #1f2328; --back: #fff;
  --line: #d0d7de; --head: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --back: #0d1117; --line: #3d444d; --head: #161b22; }
  img { filter: invert(0.93) hue-rotate(180deg); } }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; color: var(--text);
  background: var(--back); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem;
  font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: 0.3rem 0.6rem;
  text-align: left; vertical-align: top; }
th { background: var(--head); }
td:first-child { min-width: 8rem; max-width: 22rem; overflow-wrap: anywhere; }
.curves { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
img { width: 100%; height: auto; background: #fff; }
'''.strip()


def write(out: Path, runs: Sequence[Any], rows: Sequence[dict[str, Any]],
          differences: Sequence[dict[str, Any]], notes: Sequence[str]) -> Path:
  """Writes ``report.md``, ``report.html`` and a picture for each x axis.

  Args:
    out: Directory of the files, which is created if it does not exist.
    runs: The runs, each a `mezo_jax.cli.report.Run`.
    rows: Rows of the table of results.
    differences: Rows of the table of the fields in which configs differ.
    notes: Sentences that say how to read the report.

  Returns:
    The path of ``report.html``.
  """
  out.mkdir(parents=True, exist_ok=True)
  panels = _panels(runs)
  pictures = []
  for axis in _AXES if panels else ():
    pictures.append(out / f'curves_{axis.replace(" ", "_")}.png')
    _draw(pictures[-1], axis, panels, runs)
  if len(runs) > _MOST and panels:
    notes = [*notes, f'Curves of more than {_MOST} runs have no legend; make a '
             'report of some of them.']
  same = 'The configs do not differ.'
  _write_markdown(out, rows, differences, notes, pictures, same)
  _write_html(out, rows, differences, notes, pictures, same)
  return out / 'report.html'


def _write_markdown(out: Path, rows, differences, notes, pictures, same):
  """Writes ``report.md``; the arguments are those of `write`."""
  def table(rows):
    return reports.markdown_table(
        [{reports.cell(name): reports.cell(str(value))
          for name, value in row.items()} for row in rows])
  parts = ['# Comparison of runs', table(rows), *notes]
  if pictures:
    parts += ['## Curves', *(f'![{_about(picture)}]({picture.name})'
                             for picture in pictures)]
  parts += ['## Configs', table(differences) if differences else same]
  (out / 'report.md').write_text('\n\n'.join(parts) + '\n')


def _write_html(out: Path, rows, differences, notes, pictures, same):
  """Writes ``report.html``; the arguments are those of `write`."""
  def table(rows):
    return f'<div class="wide">{reports.html_table(rows)}</div>'
  parts = ['<h1>Comparison of runs</h1>', table(rows),
           *(f'<p>{html.escape(note)}</p>' for note in notes)]
  if pictures:
    parts += ['<h2>Curves</h2>', '<div class="curves">']
    for picture in pictures:
      data = base64.b64encode(picture.read_bytes()).decode()
      parts.append(f'<img alt="{_about(picture)}" '
                   f'src="data:image/png;base64,{data}">')
    parts.append('</div>')
  parts += ['<h2>Configs</h2>', table(differences) if differences else
            f'<p>{same}</p>']
  (out / 'report.html').write_text(
      '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
      '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
      f'<title>Comparison of runs</title>\n<style>\n{_CSS}\n</style>\n</head>\n'
      '<body>\n' + '\n'.join(parts) + '\n</body>\n</html>\n')


def _about(picture: Path) -> str:
  """Returns what a picture shows, for readers who do not see it."""
  axis = picture.stem.removeprefix('curves_').replace('_', ' ')
  return f'Curves of the runs against {axis}'


# --- curves -----------------------------------------------------------------


def _panels(runs: Sequence[Any]) -> dict[tuple[str, str], list[int]]:
  """Returns what is plotted: (kind of record, name) to the runs that have it.

  Runs that are trained on rewards have a reward where others have a loss.
  """
  panels: dict[tuple[str, str], list[int]] = {}
  for i, run in enumerate(runs):
    of_train = 'reward' if any('reward' in r for r in run.train) else 'loss'
    names = [('train', of_train), ('dev', of_train), ('dev', run.metric)]
    for kind, name in dict.fromkeys(names):
      if any(r.get(name) is not None for r in getattr(run, kind)):
        panels.setdefault((kind, name), []).append(i)
  # Training comes first, then losses, then the metrics.
  order = sorted(panels, key=lambda p: (p[0] != 'train', p[1] != 'loss'))
  return {panel: panels[panel] for panel in order}


def _draw(path: Path, axis: str, panels: dict[tuple[str, str], list[int]],
          runs: Sequence[Any]) -> None:
  """Plots all panels, one below the other, against one x axis."""
  import matplotlib
  from matplotlib.figure import Figure  # slow to import
  from matplotlib.ticker import MaxNLocator
  drawn = sorted({i for of_panel in panels.values() for i in of_panel})
  legend = len(drawn) <= _MOST
  figure = Figure(figsize=(5, 2.6 * len(panels) + 0.22 * len(drawn) * legend),
                  layout='constrained')
  plots = figure.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
  colours: dict[int, Any] = {i: f'C{k}' for k, i in enumerate(drawn)}
  if len(drawn) > 10:
    colours = dict(zip(drawn, matplotlib.colormaps['turbo'](
        np.linspace(0.05, 0.95, len(drawn)))))
  lines = {}
  for plot, ((kind, name), members) in zip(plots, panels.items()):
    for i in members:
      records = [r for r in getattr(runs[i], kind) if r.get(name) is not None]
      steps = np.array([r['step'] for r in records])
      values = np.array([r[name] for r in records], float)
      if kind == 'train':
        window = max(round(_SHARE * len(values)), 1)
        values = np.convolve(values, np.full(window, 1 / window), 'valid')
        steps = steps[window - 1:]
      lines[i], = plot.plot(runs[i].axis(axis, steps), values, '-' if (
          kind == 'train') else 'o-', ms=3, lw=1.2, color=colours[i])
    what = 'training' if kind == 'train' else 'dev'
    plot.set_ylabel(f'{what} {name.replace("_", " ")}')
    plot.grid(alpha=0.3)
  plots[-1].set_xlabel(axis)
  plots[-1].xaxis.set_major_locator(MaxNLocator(6, integer=axis != 'seconds'))
  if legend:
    figure.legend([lines[i] for i in sorted(lines)],
                  [runs[i].name for i in sorted(lines)],
                  loc='outside lower left', fontsize='small', frameon=False)
  figure.savefig(path, dpi=150)
