"""Measures what evolution strategies teach a chat model about brevity.

  python benchmarks/conciseness.py [--runs DIR] [--seeds N] [--steps N] [--grid]

The runs of examples/conciseness: SmolLM2-135M-Instruct, 30 members of rank 1,
two training prompts, eight others that are held out, with and without decay
towards the start, three seeds. The rewards and divergences are those of the
last step, not of the best. Writes benchmarks/results/conciseness.md and .json,
and the picture docs/rewards_conciseness.png.

With --grid, it instead runs one seed without decay for half of the steps with
each of four pairs of a learning rate and a perturbation scale, and writes
benchmarks/results/conciseness_grid.md and .json. Runs are kept in DIR, and
finished ones are not repeated.
"""

import argparse
from pathlib import Path
import sys
import tempfile

import harness
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from examples.conciseness import config as example  # noqa: E402
from mezo_jax.runs import loggers  # noqa: E402
from mezo_jax.runs.workdir import read_result  # noqa: E402
from mezo_jax.training import run  # noqa: E402

GRID = [(rate, eps) for rate in (5e-4, 1.5e-3) for eps in (1e-3, 3e-3)]


def records_of(runs: Path, variant: str, seed: int, steps: int, rate=None,
               eps=None) -> list[dict]:
  """Returns the records of a run, after making the run."""
  config = example.get_config(variant)
  config.seed, config.steps, config.eval_every = seed, steps, max(steps // 4, 1)
  if rate is not None:
    config.optimizer.learning_rate, config.spsa.eps = rate, eps
  rate, eps = config.optimizer.learning_rate, config.spsa.eps
  where = runs / f'{variant or "plain"}-{seed}-{steps}-{rate:g}-{eps:g}'
  if not read_result(where):
    run(config, where)
  return loggers.read(where / 'metrics.jsonl')


def of_kind(records: list[dict], kind: str) -> list[dict]:
  """Returns the records of steps, 'train', or of evaluations, 'dev'."""
  return [r for r in records if r['kind'] == kind]


def draw(path: Path, runs: dict[str, list[list[dict]]]) -> None:
  """Draws reward and divergence of the held-out prompts against steps."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout='constrained')
  for name, seeds in runs.items():
    steps = [r['step'] for r in seeds[0]]
    for axis, field in zip(axes, ('reward', 'kl')):
      # Before training there is no divergence.
      values = np.array([[r.get(field, 0.0) for r in each] for each in seeds])
      axis.plot(steps, values.mean(0), label=name)
      axis.fill_between(steps, values.min(0), values.max(0), alpha=0.2)
      axis.set_xlabel('step')
  axes[0].set_ylabel('reward of held-out prompts')
  axes[1].set_ylabel('divergence, nats a token')
  axes[0].legend()
  figure.savefig(path, dpi=150)


def grid(runs: Path, steps: int) -> None:
  """Writes the table of rates and perturbation scales."""
  rows = []
  for rate, eps in GRID:
    records = records_of(runs, '', 0, steps, rate, eps)
    first, *_, last = of_kind(records, 'dev')
    same = [100 * r['identical'] for r in of_kind(records, 'train')]
    rows.append({'learning rate': f'{rate:g}', 'eps': f'{eps:g}',
                 'identical answers, %': f'{min(same):.0f} to {max(same):.0f}',
                 'reward before': f'{first["reward"]:.3f}',
                 'reward after': f'{last["reward"]:.3f}',
                 'divergence': f'{last["kl"]:.4f}'})
  harness.write('conciseness_grid', harness.header(f'{steps} steps, one seed'),
                [('Held-out prompts, each rate and scale', rows)])


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--runs', default='')
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=40)
  parser.add_argument('--grid', action='store_true')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    runs = Path(args.runs or folder)
    if args.grid:
      return grid(runs, args.steps // 2)
    names = {'plain': '', 'decay towards the start': 'anchored'}
    found = {name: [of_kind(records_of(runs, variant, seed, args.steps), 'dev')
                    for seed in range(args.seeds)]
             for name, variant in names.items()}
    tables = [('Held-out prompts, mean and standard error over seeds', [{
        'run': name,
        'reward before': harness.mean_error([r[0]['reward'] for r in seeds]),
        'reward after': harness.mean_error([r[-1]['reward'] for r in seeds]),
        'divergence': harness.mean_error([r[-1]['kl'] for r in seeds])}
        for name, seeds in found.items()])]
  draw(Path(__file__).parents[1] / 'docs' / 'rewards_conciseness.png', found)
  harness.write('conciseness', harness.header(
      f'{args.steps} steps, {args.seeds} seeds'), tables)


if __name__ == '__main__':
  main()
