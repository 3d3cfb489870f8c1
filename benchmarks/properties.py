"""Checks properties of logs, checkpoints and training on many random cases.

  python benchmarks/properties.py [--times 40]

The properties are those of tests/test_properties.py, with --times as many cases
as in the tests. A log or checkpoint with one to three changes is refused, or
read as what was written or the beginning of it. A checkpoint is restored as it
was saved, on any mesh. Replaying a log gives bitwise the weights of training,
on any mesh. The command stops at the first failure. Writes
benchmarks/results/properties.md and .json. Takes 10 minutes on 2 CPU cores.
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
  # conftest configures eight devices and quick compilation.
  import conftest  # noqa: F401
  import test_properties
  logging.disable()  # orbax logs a message for every damaged file.
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
