"""MeZO's relatives beside MeZO, from as many forwards.

  python benchmarks/variants.py

The quickstart's last layer, signs, all else as in `convergence.py`: learning
rates from one grid of factors of two by the loss of dev rows, losses and
accuracies of test rows, 5 seeds, differences to MeZO with their standard
errors. A forward is one of a batch; one with its tangent counts as two. SVRG's
anchors are all training rows, every 4 steps. Writes benchmarks/results/
variants.md and variants.json; 30 minutes on 2 CPU cores.
"""

import functools
import time

import convergence
from convergence import Kind, mean_error, Runs
import harness
import numpy as np

import mezo_jax
from mezo_jax import variants

SEEDS, TIMES, EVERY, ANCHOR = 5, 4, 4, 36  # batches that all rows make


def _forward_grad(rate, eps, **more):
  del eps
  return variants.forward_grad(rate, **more)


def _svrg(rate, eps, **more):
  return variants.svrg(rate, eps, every=EVERY, anchor_learning_rate=rate,
                       rows=convergence.ROWS, **more)


KINDS = {
    'mezo': Kind(mezo_jax.mezo),
    'mezo, 4 directions': Kind(functools.partial(
        mezo_jax.mezo, num_samples=4), forwards=8),
    'fzoo, 8 directions': Kind(functools.partial(
        mezo_jax.mezo, num_samples=8, combine=mezo_jax.fzoo),
                               forwards=9, scale=4),
    'momentum of 8': Kind(variants.momentum_by_history, scale=1 / 4),
    'adam of 8': Kind(variants.adam_by_history, scale=2),
    'scalar adam': Kind(variants.scalar_adam, scale=4),
    'sign': Kind(variants.sign, scale=4),
    'conservative': Kind(variants.conservative, forwards=5),
    'one point': Kind(variants.one_point, forwards=1, scale=1 / 64),
    'forward gradient': Kind(_forward_grad),
    'svrg': Kind(_svrg, forwards=(2 * ANCHOR + 4 * (EVERY - 1)) / EVERY,
                 every=EVERY),
}


def main():
  began, problem = time.time(), convergence.problems()['last_layer']
  runs, first = Runs(problem, KINDS), next(iter(KINDS))
  assert len(runs.short) // convergence.ROWS == ANCHOR
  curves, rates, table = {}, {}, []
  for kind in KINDS:
    rates[kind], found = convergence.search(runs, kind)
    print(kind, {f'{r:g}': f'{x:.3f}' for r, x in sorted(found.items())},
          flush=True)
    curves[kind] = np.array([runs.run(kind, rates[kind], seed, TIMES)
                             for seed in range(SEEDS)])
  for kind, c in curves.items():
    row = {'method': kind, 'steps': runs.steps(kind),
           'learning rate': f'{rates[kind]:g}'}
    for i in range(1, TIMES + 1):
      row[f'loss, {2 * problem.steps * i // TIMES} forwards'] = mean_error(
          c[:, i, 1])
    row['difference'] = '' if kind == first else mean_error(
        c[:, -1, 1] - curves[first][:, -1, 1])
    row['accuracy, %'] = mean_error(100 * c[:, -1, 2], 1)
    table.append(row)
  before = curves[first][0, 0]
  harness.write('variants', harness.header(
      f'{time.time() - began:.0f} s in all'), [(
          f"The quickstart's last layer, {convergence.ROWS} rows, {SEEDS} "
          f'seeds; test loss before {before[1]:.3f}, accuracy '
          f'{100 * before[2]:.1f} %', table)])


if __name__ == '__main__':
  main()
