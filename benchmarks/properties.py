"""What holds of any log, checkpoint and way to train: many cases at random.

  python benchmarks/properties.py [--times 40]

The properties of tests/test_properties.py, of so many times as many cases as
the tests take: logs and checkpoints with one to three changes are what was
written, its beginning, or refused; what is restored, on whichever mesh, is what
was saved; steps made again from a log, on whichever mesh, give bitwise the
weights of training. Stops where one does not hold. Writes
benchmarks/results/properties.md and .json; 10 minutes on 2 CPU cores.
"""

import argparse
import logging
import os
from pathlib import Path
import sys
import time

import harness

sys.path.insert(0, str(Path(__file__).parents[1] / 'tests'))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--times', type=float, default=40)
  os.environ['EXAMPLES'] = str(parser.parse_args().times)
  import conftest  # noqa: F401  eight devices, and quick compilation
  import test_properties
  logging.disable()  # orbax tells of every damaged file
  began, table = time.time(), []
  for name, holds in [*vars(test_properties).items()]:
    if not name.startswith('test_'):
      continue
    before, since = test_properties.SEEN.copy(), time.time()
    holds()
    seen = test_properties.SEEN - before
    table.append({
        'property': name.removeprefix('test_').replace('_', ' '),
        'cases': seen.total(),
        'of these': ', '.join(f'{what} {n}' for (_, what), n in
                              seen.most_common()),
        'seconds': round(time.time() - since)})
    print(table[-1], flush=True)
    total = sum(row['cases'] for row in table)
    harness.write('properties', harness.header(
        f'{time.time() - began:.0f} s in all'), [(
            f'{total:,} cases, of which each held:', table)])


if __name__ == '__main__':
  main()
