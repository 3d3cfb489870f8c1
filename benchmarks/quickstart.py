"""Measures the accuracy of the quickstart over three seeds, with baselines.

  python benchmarks/quickstart.py

Writes benchmarks/results/quickstart.md and .json. Takes 20 minutes on 2 CPU
cores. Runs are kept in runs/quickstart_suite, and the command resumes them.
"""

from pathlib import Path

import harness
import numpy as np

from mezo_jax.cli import suite
from mezo_jax.runs.workdir import read_result

WORKDIR = Path('runs/quickstart_suite')
NAMES = {'mezo': 'MeZO, the last layer', 'whole': 'MeZO, all layers',
         'adam': 'Adam, the last layer'}


def error(*shares, count: int) -> float:
  """Returns the standard error of a difference of accuracies, in points.

  It assumes that the accuracies are of independent rows. They are of the same
  rows, so the true error is smaller.
  """
  return 100 * np.sqrt(sum(p * (1 - p) / count for p in shares))


def main():
  _, failed = suite.run('configs/quickstart_suite.py', WORKDIR)
  if failed:
    raise SystemExit(f'failed: {", ".join(failed)}')
  rows, base = [], None
  for method, name in NAMES.items():
    results = [read_result(p) for p in sorted(WORKDIR.glob(f'*/{method}'))]
    zero, count = results[0]['zero_shot'], results[0]['final']['count']
    if base is None:
      base = zero['calibrated_accuracy']
      rows += [{'': label, 'test accuracy, %': f'{100 * zero[key]:.1f}'}
               for label, key in (('zero-shot', 'accuracy'), (
                   'zero-shot, calibrated', 'calibrated_accuracy'))]
    found = [r['final']['accuracy'] for r in results]
    mean = float(np.mean(found))
    rows.append({
        '': name, 'test accuracy, %': f'{100 * mean:.1f}',
        'seeds': ', '.join(f'{100 * x:.1f}' for x in found),
        'above calibrated': f'{100 * (mean - base):.1f} ± '
                            f'{error(mean, base, count=count):.1f}',
        'steps': results[0]['steps'], 'forwards': results[0]['forwards'],
        'trained': f'{results[0]["trained"]:,}',
        'minutes': f'{np.mean([r["seconds"] for r in results]) / 60:.1f}',
        'GiB of the process': f'{results[0]["peak_memory"] / 2**30:.1f}'})
  harness.write('quickstart', harness.header(
      f'SmolLM2-135M, {count} test rows; ± is the standard error that so many '
      'rows have'), [('', [{k: row.get(k, '') for k in rows[-1]}
                          for row in rows])])


if __name__ == '__main__':
  main()
