"""Measures the cost of differential privacy in accuracy.

  python benchmarks/private.py [--train FILE --test FILE] [--runs DIR]

It trains the quickstart's last layer with a privacy budget and without one, for
1,500 steps of 32 rows, with two seeds. With a budget, rows are sampled by
chance (Poisson). Everything else is as in the quickstart's config. The clip is
20; with 5 the steps are shorter, and results were worse at one and at three
times the learning rate. The data are the quickstart's 600 rows, or 1,700 rows
of FILE (for example SST-2, with the columns text and label).

Runs are kept in DIR, and finished ones are not repeated. Writes
benchmarks/results/private.md and .json. Takes 25 minutes on 2 CPU cores.
"""

import argparse
from pathlib import Path
import sys
import tempfile

import harness

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs import quickstart  # noqa: E402
from mezo_jax.runs.workdir import read_result
import train  # noqa: E402

SEEDS, BUDGETS = (0, 1), (None, 6.0)


def config_of(epsilon, seed, args):
  """Returns the config of a run; ``epsilon`` is None without a budget."""
  config = quickstart.get_config()
  d = config.data
  if args.train:
    d.train, d.test = args.train, args.test
    d.num_train, d.num_dev, d.num_test = 1700, 300, 0
  d.batch_size, config.seed = 32, seed
  config.steps, config.eval_every = 1500, 500
  if epsilon:
    config.method, config.privacy.epsilon = 'private', epsilon
    config.privacy.clip = 20.0
  return config


def main():
  parser = argparse.ArgumentParser()
  for name in ('train', 'test', 'runs'):
    parser.add_argument(f'--{name}', default='')
  args, table = parser.parse_args(), []
  with tempfile.TemporaryDirectory() as folder:
    for epsilon in BUDGETS:
      name = f'private{epsilon:g}' if epsilon else 'plain'
      results = []
      for seed in SEEDS:
        where = Path(args.runs or folder) / f'{name}_{seed}'
        results.append(read_result(where) or train.run(
            config_of(epsilon, seed, args), where))
      percent = lambda key, of, results=results: ', '.join(
          f'{100 * r[of][key]:.1f}' for r in results)
      budget = results[0].get('privacy', {})
      table.append({
          'epsilon': f'{epsilon:g}' if epsilon else 'none',
          'delta': f'{budget["delta"]:g}' if budget else '',
          'noise / clip': f'{budget["noise_multiplier"]:.2f}' if budget else '',
          'spent': f'{budget["spent"]:.3f}' if budget else '',
          'zero-shot, %': percent('accuracy', 'zero_shot'),
          'calibrated, %': percent('calibrated_accuracy', 'zero_shot'),
          'accuracy, %': percent('accuracy', 'final')})
  first = results[0]
  of = Path(args.train).stem or 'quickstart'
  harness.write('private', harness.header(), [(
      f'{first["train_rows"]} rows of {of}, tested on '
      f'{first["final"]["count"]}, seeds {SEEDS}:', table)])


if __name__ == '__main__':
  main()
