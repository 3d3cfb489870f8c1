"""Draws the figures of docs/results.md, variants.md and hyperparameters.md.

  python docs/figures_results.py

Reads the tables in benchmarks/results/*.json, and writes docs/results_*.svg.
It needs matplotlib.
"""

import json
from pathlib import Path
import re

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / 'benchmarks' / 'results'
# Colour-blind readers can tell these apart; after Okabe and Ito.
BLUE, ORANGE, GREEN, RED, GRAY, SKY = (
    '#0072b2', '#c77700', '#009e73', '#b3261e', '#6b7280', '#56b4e9')


def table(name: str, number: int = 0) -> tuple[str, list[dict]]:
  """Returns the title and the rows of a committed table."""
  found = json.loads((RESULTS / f'{name}.json').read_text())
  return found['tables'][number]['title'], found['tables'][number]['rows']


def curve(title: str, row: dict) -> tuple[list, list, list]:
  """Returns forward passes, mean losses and standard errors of a row."""
  before = re.search(r'test loss before ([\d.]+)', title)
  assert before is not None
  x, mean, error = [0], [float(before[1])], [0.0]
  for name, text in row.items():
    forwards = re.fullmatch(r'loss, (\d+) forwards', name)
    if forwards:
      value, deviation = text.split(' ± ')
      x.append(int(forwards[1]))
      mean.append(float(value))
      error.append(float(deviation))
  return x, mean, error


def draw_curves(axes, name: str, key: str, chosen: dict) -> None:
  """Draws a line with standard errors for each of the chosen rows.

  Args:
    axes: Matplotlib axes.
    name: Name of the table.
    key: Column that names a row.
    chosen: ``{name of a row: (label, colour, vertical shift of the label)}``;
      without a shift, the label is for a legend.
  """
  title, rows = table(name)
  by_name = {row[key]: row for row in rows}
  end = 0
  for row, (label, colour, shift) in chosen.items():
    x, mean, error = curve(title, by_name[row])
    axes.errorbar(x, mean, error, color=colour, marker='o', markersize=4,
                  capsize=3, linewidth=1.6, label=label)
    if shift is not None:
      axes.annotate(label, (x[-1], mean[-1]), xytext=(8, shift), va='center',
                    textcoords='offset points', color=colour, fontsize=9)
    end = max(end, x[-1])
  axes.set_xlim(-0.02 * end, 1.02 * end)
  axes.set_xlabel('forward passes of 16 rows')
  axes.grid(axis='y', color='#e5e7eb')
  axes.set_axisbelow(True)


def save(figure, name: str, *, title: str) -> None:
  """Writes a figure to docs/results_NAME.svg and closes it."""
  figure.savefig(DOCS / f'results_{name}.svg', metadata={
      'Date': None, 'Title': title})
  plt.close(figure)


def learning() -> None:
  """Draws the test loss of four distributions of z on two tasks."""
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
  chosen = {
      'normal': ('Normal()', BLUE, None),
      'signs': ('Rademacher()', ORANGE, None),
      'rank 16': ('LowRank(rank=16)', GREEN, None),
      'rank 2': ('LowRank(rank=2)', RED, None)}
  draw_curves(left, 'convergence_last_layer', 'directions', chosen)
  draw_curves(right, 'convergence_minilm', 'directions', chosen)
  left.set_ylim(0.48, 0.66)
  left.set_title("Last layer of SmolLM2-135M", fontsize=10)
  left.set_ylabel('test loss (1.061 before training)')
  right.set_title('All of MiniLM with a new head', fontsize=10)
  right.set_ylabel('test loss (0.694 before training)')
  figure.legend(*left.get_legend_handles_labels(), ncols=4, loc='lower center',
                frameon=False, fontsize=9)
  figure.tight_layout(rect=(0, 0.07, 1, 1), w_pad=3)
  save(figure, 'learning', title='Test loss for four distributions of z')


def rates() -> None:
  """Draws the loss and the projected gradients of three learning rates."""
  _, rows = table('rates', 1)
  before = float(table('rates')[1][0]['dev loss, step 0'])
  figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
  for rate, label, colour in (
      ('5e-06', '5e-6: far too low', SKY), ('0.0005', '5e-4', BLUE),
      ('0.05', '5e-2: far too high', RED)):
    mine = [row for row in rows if row['learning rate'] == rate]
    steps = [row['last step'] for row in mine]
    for axes, name in ((left, 'mean loss'), (right, 'mean |g|')):
      axes.plot(steps, [float(row[name]) for row in mine], color=colour,
                marker='o', markersize=4, linewidth=1.6, label=label)
  left.axhline(before, color=GRAY, linewidth=0.9, linestyle='--')
  left.annotate('dev loss before training', (1500, before), xytext=(0, 5),
                textcoords='offset points', ha='right', fontsize=9, color=GRAY)
  left.set_ylabel('loss, mean of 100 steps')
  right.set_ylabel('|g|, mean of 100 steps')
  for axes in (left, right):
    axes.set_ylim(0)
    axes.set_xlabel('step')
    axes.grid(axis='y', color='#e5e7eb')
    axes.set_axisbelow(True)
  figure.legend(*left.get_legend_handles_labels(), ncols=3, loc='lower center',
                frameon=False, fontsize=9)
  figure.tight_layout(rect=(0, 0.07, 1, 1), w_pad=3)
  save(figure, 'rates', title='Loss and |g| for three learning rates')


def variants() -> None:
  """Draws the test loss of six variants."""
  figure, axes = plt.subplots(figsize=(7, 4.2))
  draw_curves(axes, 'variants_last_layer', 'method', {
      'mezo': ('mezo', BLUE, 4),
      'fzoo, 8 directions': ('FZOO, 8 directions', GREEN, -4),
      'sign': ('sign', SKY, -5),
      'mezo, 4 directions': ('mezo, 4 directions', ORANGE, -4),
      'conservative': ('conservative', GRAY, 4),
      'svrg, every 4, 8 batches': ('svrg', RED, 0)})
  axes.set_ylim(0.44, 0.8)
  axes.set_ylabel('test loss (1.061 before training)')
  figure.tight_layout()
  figure.subplots_adjust(right=0.78)
  save(figure, 'variants', title='Test loss of six variants of MeZO')


def quickstart() -> None:
  """Draws the test accuracy of the quickstart."""
  _, rows = table('quickstart')
  names = {
      'zero-shot': ('zero-shot', GRAY),
      'zero-shot, calibrated': ('zero-shot, calibrated', GRAY),
      'MeZO, all layers': ('MeZO, most parameters,\n200 steps', SKY),
      'MeZO, the last layer': ('MeZO, last layer,\n20,000 steps', BLUE),
      'Adam, the last layer': ('Adam, last layer,\n2,000 steps', ORANGE)}
  by_name = {row['']: row for row in rows}
  figure, axes = plt.subplots(figsize=(7, 2.9))
  for y, (name, (label, colour)) in enumerate(names.items()):
    row = by_name[name]
    mean = float(row['test accuracy, %'])
    seeds = [float(x) for x in row['seeds'].split(',')] if row['seeds'] else []
    axes.barh(y, mean, height=0.62, color=colour, alpha=0.35)
    if len(seeds) > 1:
      axes.plot(seeds, [y] * len(seeds), 'o', color=colour, markersize=5)
    axes.annotate(f'{mean:.1f}', (max([mean, *seeds]), y), xytext=(7, 0),
                  textcoords='offset points', va='center', fontsize=9)
  axes.set_yticks(range(len(names)), [label for label, _ in names.values()],
                  fontsize=9)
  axes.invert_yaxis()
  axes.set_xlim(0, 100)
  axes.set_xlabel('test accuracy, % (400 rows; dots are seeds)')
  figure.tight_layout()
  save(figure, 'quickstart', title='Test accuracy of the quickstart')


def main() -> None:
  plt.rcParams.update({
      'font.size': 10, 'axes.spines.top': False, 'axes.spines.right': False,
      'svg.hashsalt': 'mezo_jax', 'svg.fonttype': 'none',
      'font.family': 'sans-serif', 'figure.facecolor': 'white'})
  for draw in (learning, rates, variants, quickstart):
    draw()


if __name__ == '__main__':
  main()
