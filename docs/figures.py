"""Draws the figures of the pages from the tables in benchmarks/results.

  python docs/figures.py

A figure is an SVG next to this file, which is committed. tests/test_docs.py
checks that it is what this script draws.
"""

import json
from pathlib import Path

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / 'benchmarks' / 'results'

# Colours of MeZO, of the others, and of the part of a bar that is the weights.
_MEZO, _OTHER, _WEIGHTS = '#1f77b4', '#c65f1a', '#8a939c'
_LEFT, _WIDTH, _ROW = 132, 300, 27  # of bars; a row with its space


def _text(x, y, text, *, anchor='start', **attributes) -> str:
  more = ''.join(f' {k.replace("_", "-")}="{v}"' for k, v in attributes.items())
  return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{more}>{text}</text>'


def _bar(x, y, width, colour) -> str:
  return (f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="18" '
          f'fill="{colour}"/>')


def _table(name: str, title: str) -> dict[str, dict]:
  """Returns the rows of a table by their program."""
  tables = json.loads((RESULTS / f'{name}.json').read_text())['tables']
  found, = [t for t in tables if t['title'].startswith(title)]
  return {row['program']: row for row in found['rows']}


def memory() -> str:
  """Returns the figure of the home page: memory of inference, MeZO, SGD and
  Adam, measured on a GPU and of a small model with every method."""
  gpu, small = _table('gpu', 'OPT-13B, 16 x 256'), _table('memory', 'OPT-125M')
  out, y = [], 22
  out.append(_text(8, y, 'OPT-13B in bfloat16, 16 x 256 tokens: GiB on one '
                   '80 GB GPU', font_weight='bold'))
  y += 12
  scale = _WIDTH / 80
  for label, program in (('Inference', 'inference'), ('MeZO', 'MeZO normal'),
                         ('Backprop, SGD', 'SGD'), ('Backprop, Adam', 'Adam')):
    out.append(_text(_LEFT - 8, y + 14, label, anchor='end'))
    gib = gpu[program].get('GiB')
    if isinstance(gib, int | float):
      colour = _MEZO if label == 'MeZO' else _OTHER
      out.append(_bar(_LEFT, y, gib * scale, colour))
      out.append(_text(round(_LEFT + gib * scale + 6, 1), y + 14, f'{gib:.1f}'))
    else:
      out.append(f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH}" height="18" '
                 f'fill="none" stroke="{_OTHER}" stroke-dasharray="4 3"/>')
      out.append(_text(_LEFT + 8, y + 14, gpu[program]['s a step']))
    y += _ROW
  y += 24
  out.append(_text(8, y, 'OPT-125M in float32, 8 x 64 tokens: multiples of its '
                   'weights', font_weight='bold'))
  y += 12
  scale = _WIDTH / 5.2
  for label, program in (
      ('Inference', 'inference'), ('MeZO', 'MeZO, normal'),
      ('Backprop, SGD', 'backprop SGD'), ('Backprop, Adam', 'backprop Adam')):
    extra = small[program]['compiler: extra / weights']
    colour = _MEZO if label == 'MeZO' else _OTHER
    out.append(_text(_LEFT - 8, y + 14, label, anchor='end'))
    out.append(_bar(_LEFT, y, scale, _WEIGHTS))
    out.append(_bar(_LEFT + scale, y, extra * scale, colour))
    out.append(_text(round(_LEFT + (1 + extra) * scale + 6, 1), y + 14,
                     f'{1 + extra:.2f}'))
    y += _ROW
  y += 4
  out += [_bar(_LEFT, y, 18, _WEIGHTS), _text(_LEFT + 24, y + 14, 'weights'),
          _bar(_LEFT + 96, y, 18, _OTHER),
          _text(_LEFT + 120, y + 14, 'everything else')]
  height, width = y + 28, _LEFT + _WIDTH + 48
  return '\n'.join([
      f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
      f'font-family="system-ui, sans-serif" font-size="13" fill="#22272e">',
      f'<rect width="{width}" height="{height}" fill="#fff"/>', *out,
      '</svg>']) + '\n'


FIGURES = {'memory.svg': memory}

if __name__ == '__main__':
  for name, draw in FIGURES.items():
    (DOCS / name).write_text(draw())
