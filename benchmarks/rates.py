"""Shows what a learning rate that is far too low or too high looks like.

  python benchmarks/rates.py [--runs DIR]

The quickstart's last layer with a constant learning rate of 5e-6, 5e-4 (the
quickstart's) and 5e-2, 1,500 steps, one seed. The loss of steps, at the
perturbed weights, and |g| are means of 100 steps; dev rows are evaluated every
500 steps. Runs are kept in DIR, and finished ones are not
repeated. Writes benchmarks/results/rates.md and rates.json; 15 minutes on 2 CPU
cores with other work.
"""

import argparse
from pathlib import Path
import sys
import tempfile

import harness
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs import quickstart  # noqa: E402
from mezo_jax.runs import loggers
from mezo_jax.runs.workdir import read_result
import train  # noqa: E402

RATES, STEPS, EVERY = (5e-6, 5e-4, 5e-2), 1500, 100


def config_of(rate: float):
  """Returns the config of the run with a learning rate."""
  config = quickstart.get_config()
  config.optimizer.learning_rate = rate
  config.optimizer.schedule = 'constant'
  config.steps, config.eval_every = STEPS, 500
  return config


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--runs', default='')
  args = parser.parse_args()
  dev, steps = [], []
  with tempfile.TemporaryDirectory() as folder:
    for rate in RATES:
      where = Path(args.runs or folder) / f'lr{rate:g}'
      result = read_result(where) or train.run(config_of(rate), where)
      records = loggers.read(where / 'metrics.jsonl')
      row = {'learning rate': f'{rate:g}'}
      row.update({f'dev loss, step {r["step"]}': f'{r["loss"]:.3f}'
                  for r in records if r['kind'] == 'dev'})
      row['best step'] = result['final']['step']
      row['test accuracy there, %'] = f'{100 * result["final"]["accuracy"]:.1f}'
      dev.append(row)
      made = [r for r in records if r['kind'] == 'train']
      for first in range(0, STEPS, EVERY):
        part = made[first:first + EVERY]
        steps.append({
            'learning rate': f'{rate:g}', 'last step': first + EVERY,
            'mean loss': f'{np.mean([r["loss"] for r in part]):.3f}',
            'mean |g|': '%.2f' % np.mean(
                [np.abs(r['projected_grad']) for r in part])})
  harness.write('rates', harness.header('other work at the same time'), [
      ('On dev rows:', dev), (f'Of steps, by {EVERY}:', steps)])


if __name__ == '__main__':
  main()
