"""Compares variants of MeZO with MeZO after the same number of forward passes.

  python benchmarks/variants.py [last_layer] [minilm] [whole]

There are three problems: all variants on the last layer of the quickstart's
model; SVRG with anchors of two sizes on all of MiniLM, with a new head and
without a prompt, as in its paper; and a few variants on most of the
quickstart's parameters.

Directions are Rademacher, and everything else is as in `convergence.py`:
learning rates come from one grid of factors of two by the loss on dev data;
losses and accuracies are those of test data, over 5 seeds (3 for the last
problem); differences to MeZO have standard errors. Methods are compared after
the same number of forward passes, and in the time that MeZO takes for half of
its steps. Forward passes are counted in batches; one with a tangent counts as
two. The seconds per step are measured first, alternating between the methods.
The memory is that of the largest program of a step, by the compiler. Writes
benchmarks/results/variants_PROBLEM.md and .json after every method.
"""

import dataclasses
import functools
import sys
import time

import convergence
from convergence import Kind, Runs
import harness
import numpy as np

import mezo_jax
from mezo_jax import variants

TIMES = 8
LOZO = mezo_jax.LazyLowRank(rank=2, every=50)


def _of(estimator, **own):
  """Returns `harness.mezo` with an estimator and options of its own."""
  return functools.partial(harness.mezo, estimator=estimator, **own)


def _forward_grad(rate, eps, **more):
  """Returns the forward gradient, which has no eps."""
  del eps
  return mezo_jax.mezo(rate, estimator=variants.forward_grad(**more))


def _conservative(rate, eps, **more):
  """Returns conservative MeZO, whose estimator needs the learning rate."""
  return mezo_jax.mezo(rate, estimator=variants.conservative(
      eps, learning_rate=rate, **more))


def _svrg(every: int, anchor: int) -> Kind:
  """Returns SVRG with an anchor of ``anchor`` batches every ``every`` steps."""
  def make(rate, eps, **more):
    return variants.svrg(rate, eps, every=every, anchor_learning_rate=rate,
                         rows=convergence.ROWS, **more)
  return Kind(make, forwards=(2 * anchor + 4 * (every - 1)) / every,
              every=every, many=anchor)


KINDS = {
    'mezo': Kind(mezo_jax.mezo),
    'mezo, 4 directions': Kind(functools.partial(
        mezo_jax.mezo, num_samples=4), forwards=8, scale=4),
    'fzoo, 8 directions': Kind(functools.partial(
        harness.mezo, num_samples=8, combine=mezo_jax.fzoo),
                               forwards=9, scale=32),
    'momentum of 8': Kind(_of(variants.momentum_by_history), scale=1 / 4),
    'adam of 8': Kind(_of(variants.adam_by_history), scale=2),
    'scalar adam': Kind(_of(variants.scalar_adam), scale=4),
    'sign': Kind(_of(variants.sign), scale=4),
    'conservative': Kind(_conservative, forwards=5),
    'one point': Kind(_of(variants.one_point), forwards=1, scale=1 / 64),
    'forward gradient': Kind(_forward_grad),
    'svrg, every 4, 8 batches': _svrg(4, 8),
    'hizoo': Kind(_of(variants.hizoo, alpha=1e-6), forwards=3),
    'sparse, a quarter': Kind(
        _of(variants.sparse_mezo), scale=2,
        looks=lambda params: dict(limits=variants.smallest(params))),
    'lozo, rank 2': Kind(mezo_jax.mezo, LOZO),
    'lozo-m, rank 2': Kind(_of(variants.lozo_m), LOZO),
    'subzero, rank 8': Kind(mezo_jax.mezo, mezo_jax.SubZero()),
}
SVRG = {
    'mezo': Kind(mezo_jax.mezo),
    'svrg, every 2, 16 batches': _svrg(2, 16),
    'svrg, every 16, 8 batches': _svrg(16, 8)}
WHOLE = {name: KINDS[name] for name in (
    'mezo', 'fzoo, 8 directions', 'lozo, rank 2')}
PROBLEMS = {'last_layer': (KINDS, 1000, 5), 'minilm': (SVRG, 500, 5),
            'whole': (WHOLE, 40, 3)}  # {name: (kinds, steps of MeZO, seeds)}


def compare(name: str) -> None:
  """Compares the methods on one problem, and writes the table."""
  began, (kinds, steps, seeds) = time.time(), PROBLEMS[name]
  problem = dataclasses.replace(convergence.problems()[name], steps=steps)
  runs, table, first, then = Runs(problem, kinds), [], None, None
  seconds = runs.seconds()
  budget = seconds[next(iter(kinds))] * problem.steps / 2
  print(name, {k: f'{1000 * s:.1f} ms' for k, s in seconds.items()}, flush=True)
  for kind in kinds:
    rate, found = convergence.search(runs, kind)
    print(name, kind, {f'{r:g}': f'{x:.3f}' for r, x in sorted(found.items())},
          flush=True)
    c = np.array([runs.run(kind, rate, seed, TIMES) for seed in range(seeds)])
    done = runs.in_time(kind, c, budget / seconds[kind])
    first, then = (c, done) if first is None else (first, then)
    row = {'method': kind, 'steps': runs.steps(kind),
           'learning rate': f'{rate:g}'}
    for i in range(2, TIMES + 1, 2):
      at = 2 * problem.steps * i // TIMES
      row[f'loss, {at} forwards'] = harness.mean_error(c[:, i, 1])
    row['difference'] = '' if c is first else harness.mean_error(
        c[:, -1, 1] - first[:, -1, 1])
    row['accuracy, %'] = harness.mean_error(100 * c[:, -1, 2], 1)
    row["a step / MeZO's"] = f'{seconds[kind] / seconds[next(iter(kinds))]:.2f}'
    row["loss in half of MeZO's time"] = harness.mean_error(done)
    row['difference then'] = '' if c is first else harness.mean_error(
        done - then)
    row['memory, MiB'] = round(runs.memory(kind) / 2**20)
    table.append(row)
    before = first[0, 0]
    harness.write(f'variants_{name}', harness.header(  # The rows so far.
        f'{time.time() - began:.0f} s in all'), [(
            f'{name}: {convergence.ROWS} rows, {seeds} seeds; test loss before '
            f'{before[1]:.3f}, accuracy {100 * before[2]:.1f} %', table)])


def main():
  for name in sys.argv[1:] or PROBLEMS:
    compare(name)


if __name__ == '__main__':
  main()
