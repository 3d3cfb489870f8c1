"""Compares MaZO and MeZO on a mixture of tasks with MeZO on each task alone.

  python benchmarks/multitask.py --data DIR [--runs DIR]

The tasks are SST-2, TREC and RTE. DIR has the files sst2_train2k.jsonl and
sst2_dev.jsonl (columns text, label), trec_train.jsonl (text, coarse) and
rte_train.jsonl (premise, hypothesis, label). The last layer of SmolLM2-135M is
trained with Rademacher directions and batches of 16 rows: for 3,000 steps on
the mixture, in which each task is equally likely, or for 1,000 steps on one
task, so that each task has the same number of forward passes. MaZO trains the
highest-scoring quarter of the weights in each row of a matrix; the scores come
from 16 directions per task.

The learning rate is 5e-4 or 1e-3, chosen by the mean accuracy on dev data with
seed 0. The best rate is run with three seeds. Finished runs in --runs are not
repeated. Writes benchmarks/results/multitask.md and .json.
"""

import argparse
import copy
import json
from pathlib import Path
import sys
import tempfile

import harness
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from configs import cpu_suite, quickstart  # noqa: E402
from mezo_jax import tasks
from mezo_jax.runs.workdir import read_result
from mezo_jax.training import frozen_features
from mezo_jax.training.config import Also, Data, Variant
import train  # noqa: E402

SEEDS, RATES, STEPS = (0, 1, 2), (5e-4, 1e-3), 3000
LENGTHS = tuple(range(16, 257, 16))


def parts(folder: Path) -> dict:
  """Returns {name: (task, data)}."""
  data = lambda train, test='': Data(
      train=str(folder / train), test=str(folder / test) if test else '',
      num_train=600, num_dev=100, num_test=300, max_length=256,
      buckets=LENGTHS, batch_size=16)
  return {
      'sst2': (tasks.get('sst2', row=cpu_suite._sst2),
               data('sst2_train2k.jsonl', 'sst2_dev.jsonl')),
      'trec': (cpu_suite.TREC, data('trec_train.jsonl')),
      'rte': (tasks.get('rte'), data('rte_train.jsonl'))}


def config_of(folder: Path, names, method: str, rate: float, seed: int):
  """Returns the config of a run on the tasks ``names``."""
  config, every = quickstart.get_config(), parts(folder)
  (config.task, config.data), *others = (
      copy.deepcopy(every[name]) for name in names)
  config.also = tuple(
      Also(name, *other) for name, other in zip(names[1:], others))
  config.method, config.seed = method, seed
  config.variant = Variant(share=0.25, num_scores=16)
  config.optimizer.learning_rate, config.zero_shot = rate, seed == 0
  config.steps = STEPS * len(names) // len(every)
  config.eval_every = config.checkpoint_every = config.steps // 2
  return config


def share_cached_activations() -> None:
  """Lets all runs share the activations of the frozen layers.

  The activations of a data set are the same in all runs, so they are computed
  only once in this process.
  """
  kept, compute = {}, frozen_features._computed

  def computed(model, params, data, *rest):
    rows = frozen_features._name('', data)
    if rows not in kept:
      kept[rows] = compute(model, params, data, *rest)
    return kept[rows]
  frozen_features._computed = computed


def main():
  share_cached_activations()
  parser = argparse.ArgumentParser()
  parser.add_argument('--data', type=Path, required=True)
  parser.add_argument('--runs', type=Path)
  args = parser.parse_args()
  names = [*parts(args.data)]
  with tempfile.TemporaryDirectory() as scratch:
    runs = args.runs or Path(scratch)

    def result(which, method, rate, seed):
      where = runs / f'{"_".join(which)}_{method}_{rate:g}_{seed}'
      return read_result(where) or train.run(
          config_of(args.data, which, method, rate, seed), where)

    table = []
    for method, groups in (('mezo', [names]), ('mazo', [names]),
                           ('mezo', [[name] for name in names])):
      row = {'method': method,
             'trained on': 'all' if len(groups) == 1 else 'each alone'}
      rates, every = [], {}
      for which in groups:
        dev = {rate: dev_accuracy(runs, which, method, rate, result)
               for rate in RATES}
        print(method, which, {f'{r:g}': f'{x:.3f}' for r, x in dev.items()},
              flush=True)
        best = max(dev, key=dev.get)
        rates.append(f'{best:g}')
        for seed in SEEDS:
          found = result(which, method, best, seed)['final']
          for name in which:
            every.setdefault(name, []).append(accuracy(found, which, name))
      row['learning rate'] = ', '.join(rates)
      for name in names:
        row[f'{name}, %'] = harness.mean_error(
            100 * np.array(every[name]), 1)
      row['mean, %'] = harness.mean_error(
          100 * np.mean([every[name] for name in names], 0), 1)
      table.append(row)
    found = result(names, 'mezo', RATES[0], 0)['zero_shot']
    before = [100 * accuracy(found, names, name) for name in names]
    table.insert(0, {
        'method': 'zero-shot', 'trained on': '', 'learning rate': ''} | {
            f'{name}, %': f'{x:.1f}' for name, x in zip(names, before)} | {
                'mean, %': f'{np.mean(before):.1f}'})
  harness.write('multitask', harness.header(), [(
      f'{STEPS} steps of 16 rows, tested on 300 of each task, {len(SEEDS)} '
      'seeds:', table)])


def accuracy(report: dict, which, name: str) -> float:
  """Returns the accuracy of one task from a run's results."""
  return report[f'{name}/accuracy' if len(which) > 1 else 'accuracy']


def dev_accuracy(runs, which, method, rate, result) -> float:
  """Returns the best mean accuracy on dev data during a run with seed 0."""
  result(which, method, rate, 0)
  where = runs / f'{"_".join(which)}_{method}_{rate:g}_0'
  key = 'mean' if len(which) > 1 else 'accuracy'
  lines = map(json.loads, (where / 'metrics.jsonl').read_text().splitlines())
  return max(x[key] for x in lines if x['kind'] == 'dev' and x['step'])


if __name__ == '__main__':
  main()
