"""Compares learning rates from range tests with the best ones of grids.

  python benchmarks/learning_rates.py --trec FILE [--problems P,Q]
      [--kinds REGEX] [--schedules S,T] [--part grid|tests] [--table]

There are four problems: the last layer of the quickstart (20,000 steps), all of
MiniLM with a new head (2,000), a LoRA of SmolLM2-135M (400), and the last layer
of SmolLM2-135M on TREC (5,000; its file is given by --trec), each with three
distributions of directions and with 1 and 4 directions a step. With 4, there
are a quarter of the steps. All decay linearly; TREC is also run with a constant
rate.

For each of them, a grid of factors of two is searched with seed 0 until the
best rate has a worse one on both sides, by the loss on dev rows after the last
step. The best rate is then run with three seeds. The rate that a range test
suggests is found and run with three seeds, each of which has its own test.
Results are those of the dev rows, since a rate is chosen for them.

Each finished run is a line of results/learning_rates.jsonl and is not repeated.
Writes results/learning_rates.md and .json. All of it
takes about 30 hours of a CPU core, by the seconds of the first runs. --table
only writes the tables of the runs so far.
"""

import argparse
from collections.abc import Callable
import dataclasses
import json
from pathlib import Path
import re
import time

from convergence import mezo_kind, Problem, ROWS, Runs
import harness
import jax
import jax.numpy as jnp
import numpy as np

from configs import cpu_suite
from configs import quickstart as quickstart_config
import mezo_jax
from mezo_jax import LowRank
from mezo_jax.tasks import Task
from mezo_jax.training import learning_rates
from mezo_jax.training.config import Data, Model, Peft, Train

SEEDS = 3
RESULTS = Path(__file__).parent / 'results' / 'learning_rates.jsonl'
DIRECTIONS = {'Rademacher': mezo_jax.Rademacher(), 'normal': mezo_jax.Normal(),
              'rank 16': LowRank(rank=16)}
KINDS = {f'{name}, n = {n}': mezo_kind(directions, num_samples=n)
         for n in (1, 4) for name, directions in DIRECTIONS.items()}


def problems(trec_file: str) -> dict[str, Problem]:
  """Returns the problems by name. Their rates are those of the grids' middle.
  """
  last, lora, trec = (quickstart_config.get_config('') for _ in range(3))
  minilm = Train(
      model=Model(str(harness.minilm())),
      task=Task(template='{text}', label_names=('negative', 'positive'),
                kind='head'),
      data=dataclasses.replace(last.data))
  lora.peft, lora.spsa.eps = Peft(method='lora'), 1e-2
  trec.task = cpu_suite.TREC
  trec.data = Data(train=trec_file, num_train=1000, num_dev=400, num_test=400,
                   max_length=64, batch_size=ROWS)
  return {'last_layer': Problem(last, 20_000, 24, 5e-4),
          'minilm': Problem(minilm, 2_000, 16, 5e-4),
          'lora': Problem(lora, 400, 16, 1e-3),
          'trec': Problem(trec, 5_000, 32, 5e-4)}


class Rated(Runs):
  """Trains on one problem with learning rates that are set for each step."""

  def steps(self, kind: str) -> int:
    """Returns the steps with which all kinds take the same forward passes."""
    return self.problem.steps // int(kind[-1])

  def final(self, kind: str, rate: float, seed: int, schedule: str) -> float:
    """Trains, and returns the loss on dev rows after the last step."""
    steps = self.steps(kind)
    params = jax.tree.map(jnp.copy, self.start)
    state = self._tx(kind, rate, seed).init(params)
    for t, batch in zip(range(steps), self.batches(seed)):
      left = 1 - t / steps if schedule == 'linear' else 1.0
      state.hyperparams['learning_rate'] = jnp.float32(rate * left)
      params, state, _ = self._step[kind](params, state, batch, self.frozen)
    return self.evaluate(params)[0]

  def range_test(self, kind: str, seed: int):
    """Makes the range test of a run."""
    make, config = self.kinds[kind].make, self.problem.config
    directions = dataclasses.replace(
        self.kinds[kind].directions, mask=config.peft.mask or None)
    return learning_rates.range_test(
        lambda rate: make(rate, config.spsa.eps, key=seed,
                          directions=directions),
        self.loss_fn, jax.tree.map(jnp.copy, self.start),
        lambda: self.batches(10**6 + seed), self.steps(kind),
        frozen_of=lambda batch: self.frozen)


class Records:
  """Holds the results of all runs, in a file to which new ones are added."""

  def __init__(self, path: Path):
    self._path, self._found = path, {}
    for line in path.read_text().splitlines() if path.exists() else ():
      record = json.loads(line)
      self._found[tuple(record['run'])] = record['result']

  def get(self, run: tuple, compute: Callable | None = None, *args):
    """Returns the result of a run, ``compute(*args)`` if it is not there."""
    if run not in self._found and compute:
      began = time.time()
      result = compute(*args)
      with self._path.open('a') as f:
        f.write(json.dumps({'run': run, 'result': result}) + '\n')
      self._found[run] = result
      print(*run, result, f'{time.time() - began:.0f} s', flush=True)
    return self._found.get(run)


def search(grid: Callable, middle: float) -> float:
  """Returns the best rate of a grid, which is extended until it is not an end.

  Args:
    grid: A function from a rate to the loss of seed 0.
    middle: Rate at which the search begins.
  """
  at, losses = 0, {}
  while True:
    for i in (at, at - 1, at + 1):
      if i not in losses:
        losses[i] = grid(float(f'{middle * 2.0**i:.6g}'))
    best = min(losses, key=losses.get)
    if best == at:
      return float(f'{middle * 2.0**best:.6g}')
    at = best


def measure(records: Records, runs: Rated, case: tuple, part: str | None
            ) -> None:
  """Makes the runs of a case that are missing, or only a part of them."""
  problem, kind, schedule = case
  def final(rate, seed):
    loss = runs.final(kind, rate, seed, schedule)
    return loss if np.isfinite(loss) else 1e9  # it diverged
  def loss(rate, seed=0):
    return records.get((*case, rate, seed), final, rate, seed)
  for seed in range(SEEDS if part != 'grid' else 0):
    edge = records.get((problem, kind, 'edge', seed),
                       lambda seed: runs.range_test(kind, seed).edge, seed)
    loss(learning_rates.suggested(
        edge, runs.steps(kind), schedule, int(kind[-1])), seed)
  if part != 'tests':
    best = search(loss, runs.problem.rate)
    for seed in range(SEEDS):
      loss(best, seed)


def row_of(records: Records, case: tuple, problem: Problem) -> dict | None:
  """Returns the row of a case in the table; None if runs are missing."""
  grid = {}
  for i in range(-8, 9):
    rate = float(f'{problem.rate * 2.0**i:.6g}')
    loss = records.get((*case, rate, 0))
    if loss is not None:
      grid[rate] = loss
  edges = [records.get((*case[:2], 'edge', s)) for s in range(SEEDS)]
  if None in edges or not grid:
    return None
  best = min(grid, key=grid.get)
  n = int(case[1][-1])
  rates = [learning_rates.suggested(edge, problem.steps // n, case[2], n)
           for edge in edges]
  of_best = [records.get((*case, best, s)) for s in range(SEEDS)]
  of_test = [records.get((*case, r, s)) for s, r in enumerate(rates)]
  if None in (*of_best, *of_test) or best in (min(grid), max(grid)):
    return None
  difference = np.array(of_test) - np.array(of_best)
  error = np.std(difference, ddof=1) / np.sqrt(SEEDS)
  share = np.mean(difference) / np.mean(of_best)
  good = share <= 0.05 or np.mean(difference) <= 2 * error
  return {
      'problem': case[0], 'directions': case[1], 'schedule': case[2],
      'grid, seed 0': ', '.join(
          f'{rate:.2g}: {x:.3f}' for rate, x in sorted(grid.items())),
      'best rate': f'{best:.2g}', 'its loss': harness.mean_error(of_best),
      'edges': ', '.join(f'{edge:.2g}' for edge in edges),
      'suggested': ', '.join(f'{rate:.2g}' for rate in rates),
      'loss': harness.mean_error(of_test), 'worse by': f'{share:+.1%}',
      'within 5 % or two errors': 'yes' if good else 'no'}


def write(records: Records, cases: list[tuple], known: dict) -> None:
  """Writes the table of all cases that are finished."""
  rows = [row for case in cases
          if (row := row_of(records, case, known[case[0]]))]
  good = sum(row['within 5 % or two errors'] == 'yes' for row in rows)
  harness.write('learning_rates', harness.header(f'{SEEDS} seeds'), [(
      f'Dev loss after the last step; {good} of {len(rows)} suggested rates '
      'are good', rows)])


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--problems', default='last_layer,minilm,lora,trec')
  parser.add_argument('--kinds', default='')
  parser.add_argument('--schedules', default='linear,constant')
  parser.add_argument('--trec', default='')
  parser.add_argument('--runs', default=str(RESULTS))
  parser.add_argument('--part', choices=('grid', 'tests'))
  parser.add_argument('--table', action='store_true')
  args = parser.parse_args()
  records = Records(Path(args.runs))
  known = problems(args.trec)
  cases = [(name, kind, 'linear') for kind in KINDS for name in known]
  cases += [('trec', kind, 'constant') for kind in KINDS]
  if args.table:
    return write(records, cases, known)
  for name in args.problems.split(','):
    wanted = [case for case in cases if case[0] == name
              and re.search(args.kinds, case[1])
              and case[2] in args.schedules.split(',')]
    runs = Rated(known[name], {kind: KINDS[kind] for _, kind, _ in wanted})
    for case in wanted:
      measure(records, runs, case, args.part)
  write(records, cases, known)


if __name__ == '__main__':
  main()
