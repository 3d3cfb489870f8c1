"""Which directions learn most, from as many forwards and in as much time?

  python benchmarks/convergence.py [last_layer] [whole] [minilm] [quadratic]

Four problems, for every kind of direction the same seeds and batches: the
quickstart's last layer; most of its parameters (its `whole`); all of MiniLM
with a new head on the quickstart's rows, without a prompt; and a quadratic with
a known optimum (1,000 dimensions, eigenvalues 1 to 100). The learning rate,
constant, is chosen for each kind from one grid, of factors of two, by the loss
of dev rows, with seeds of its own; losses and accuracies are of test rows.
Forwards are counted in batches. A difference is the mean over seeds of (kind -
first kind) with its standard error; within two of them kinds are equal. Seconds
a step are measured before, in turn. Writes one
benchmarks/results/convergence_PROBLEM.md and .json of each; 2 hours on 2 CPU
cores.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
import sys
import tempfile
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import quickstart as quickstart_config
import mezo_jax
from mezo_jax import LowRank
from mezo_jax.planning import compiled
from mezo_jax.tasks import encode, score, Task
from mezo_jax.training import build, frozen_features
from mezo_jax.training.config import Data, Model, Optimizer, Train

ROWS, SEEDS, SEARCH_SEEDS, CURVE = 16, 8, 2, 4


@dataclasses.dataclass(frozen=True)
class Kind:
  """A way to train: ``make(learning_rate, eps, key=, directions=)``."""

  make: Callable
  directions: mezo_jax.Directions = mezo_jax.Rademacher()
  forwards: float = 2.0  # of a batch, a step
  every: int = 0  # steps from one with many rows to the next; 0 for none
  many: int = 0  # batches that those rows make; 0 for all rows
  scale: float = 1.0  # of the rates to search from
  looks: Callable | None = None  # more to make it with, of params


def _mezo(directions, **more) -> Kind:
  return Kind(functools.partial(harness.mezo, **more), directions)


KINDS = {
    'normal': _mezo(mezo_jax.Normal()),
    'signs': _mezo(mezo_jax.Rademacher()),
    **{f'rank {r}': _mezo(LowRank(rank=r)) for r in (1, 2, 4, 16)},
    **{f'rank {r}, a direction a row': _mezo(
        LowRank(rank=r), num_samples=ROWS, over='rows') for r in (1, 4)}}


@dataclasses.dataclass(frozen=True)
class Problem:
  """A run's config, and how it is repeated."""

  config: Train
  steps: int  # of two forwards
  tokens: int  # of rows; longer ones are left out
  rate: float  # to search from


def problems() -> dict[str, Problem]:
  last, whole = map(quickstart_config.get_config, ('', 'whole'))
  minilm = Train(
      model=Model(str(harness.minilm())),
      task=Task(template='{text}', label_names=('negative', 'positive'),
                kind='head'),
      data=Data(train='quickstart', num_train=512, num_dev=300, num_test=400,
                max_length=64, batch_size=ROWS),
      optimizer=Optimizer(learning_rate=1e-3))
  return {
      'last_layer': Problem(last, 2000, 24, 4e-4),
      'whole': Problem(whole, 40, 16, 2e-4),
      'minilm': Problem(minilm, 400, 16, 4e-4),
  }


class Runs:
  """Runs of one problem: programs are compiled once for each kind."""

  def __init__(self, problem: Problem, kinds: dict[str, Kind] = KINDS):
    config = problem.config
    built = build.build(config, say=lambda text: None)
    with tempfile.TemporaryDirectory() as folder:
      built = frozen_features.keep(config, built, folder)
    self.problem, self.frozen, self.start = problem, built.frozen, built.params
    splits, model = built.splits, built.model
    self.train, tokens = splits.train, problem.tokens
    self.short = np.flatnonzero(self.train.lengths <= tokens)
    held = {}
    for name in ('dev', 'test'):
      rows = getattr(splits, name)
      index = np.flatnonzero(rows.lengths <= tokens)
      held[name] = encode.batch_of(rows, index, tokens, len(index))

    def losses(params, frozen, batch, rows):
      s = score.scores(*score.log_likelihoods(
          model, mezo_jax.peft.join(params, frozen), batch, rows.form))
      nll = optax.softmax_cross_entropy_with_integer_labels(s, batch['label'])
      return nll.mean(), (s.argmax(-1) == batch['label']).mean()
    self._losses = {name: jax.jit(
        lambda p, f, b, rows=getattr(splits, name): losses(p, f, b, rows))
                    for name in held}
    self._held = held
    self.kinds = kinds

    looked = {name: kind.looks(self.start) if kind.looks else {}
              for name, kind in kinds.items()}

    def tx(kind, rate, seed):
      directions = dataclasses.replace(
          kinds[kind].directions, mask=config.peft.mask or None)
      # Rate and key are part of the state, so that one program serves all.
      return optax.inject_hyperparams(lambda learning_rate: kinds[kind].make(
          learning_rate, config.spsa.eps, key=seed, directions=directions,
          **looked[kind]))(learning_rate=rate)
    self._tx = tx
    self._step = {kind: mezo_jax.make_step(
        tx(kind, 1.0, 0), built.loss_fn) for kind in kinds}

  def evaluate(self, params) -> list[float]:
    """Dev loss, test loss, test accuracy."""
    found = {name: self._losses[name](params, self.frozen, batch)
             for name, batch in self._held.items()}
    return [float(found['dev'][0]), *map(float, found['test'])]

  def batches(self, seed: int, every: int = 0, many: int = 0):
    order = np.random.RandomState(seed)
    whole = (many or len(self.short) // ROWS) * ROWS
    for t in itertools.count():
      if every and t % every == 0:
        yield encode.batch_of(
            self.train, order.choice(self.short, whole, False),
            self.problem.tokens, whole)
        continue
      yield encode.batch_of(self.train, order.choice(self.short, ROWS, False),
                            self.problem.tokens, ROWS)

  def steps(self, kind: str) -> int:
    return round(2 * self.problem.steps / self.kinds[kind].forwards)

  def run(self, kind: str, rate: float, seed: int, times: int) -> np.ndarray:
    """[1 + times, 3], the first before training, others after equal parts."""
    steps = self.steps(kind)
    due = {round((i + 1) * steps / times) for i in range(times)}
    step, k = self._step[kind], self.kinds[kind]
    params = jax.tree.map(jnp.copy, self.start)
    state = self._tx(kind, rate, seed).init(params)
    curve = [self.evaluate(params)]
    for t, batch in zip(range(1, steps + 1),
                        self.batches(seed, k.every, k.many)):
      params, state, _ = step(params, state, batch, self.frozen)
      if t in due:
        if not k.every or t % k.every == 0 or t == steps:
          params, state = step.apply_accumulated(params, state)
        curve.append(self.evaluate(params))
    return np.array(curve)

  def seconds(self, rounds: int = 7) -> dict[str, float]:
    """Of a step of each kind, the median of rounds in turn."""
    out, runs = {kind: [] for kind in self.kinds}, {}
    batches = {}
    for kind, k in self.kinds.items():
      params = jax.tree.map(jnp.copy, self.start)
      runs[kind] = params, self._tx(kind, 0.0, 0).init(params)
      batches[kind] = [*itertools.islice(
          self.batches(0, k.every, k.many), max(4, k.every))]
    def some(kind, params, state):
      for batch in batches[kind]:
        params, state, metrics = self._step[kind](
            params, state, batch, self.frozen)
      return params, state, metrics
    for _ in range(rounds + 1):
      for kind in self.kinds:
        took, (params, state, _) = harness.timed(some, kind, *runs[kind])
        runs[kind] = params, state
        out[kind].append(took / len(batches[kind]))
    return {kind: float(np.median(x[1:])) for kind, x in out.items()}

  def memory(self, kind: str) -> int:
    """Bytes that the larger of a step's programs holds."""
    return max(compiled.held(program.memory_analysis())
               for program in self._step[kind].compiled.values())

  def in_time(self, kind: str, curves: np.ndarray, steps: float) -> np.ndarray:
    """Test losses after so many steps of runs of ``kind``."""
    at = np.linspace(0, self.steps(kind), curves.shape[1])
    return np.array([np.interp(steps, at, c[:, 1]) for c in curves])


def search(runs: Runs, kind: str) -> tuple[float, dict[float, float]]:
  """The rate of the lowest dev loss, on a grid of factors of two that goes on
  until the best has a worse one on both sides; and what was found."""
  found, best = {}, 0
  middle = runs.problem.rate * runs.kinds[kind].scale
  while True:
    for i in (best, best - 1, best + 1):
      if i not in found:
        ends = [runs.run(kind, middle * 2.0**i, 1000 + seed, 1)[-1, 0]
                for seed in range(SEARCH_SEEDS)]
        found[i] = np.mean(np.nan_to_num(ends, nan=np.inf))
    last, best = best, min(found, key=found.get)
    if np.isinf(found[best]):
      best = min(found) - 1
    elif best == last:
      return middle * 2.0**best, {middle * 2.0**i: x for i, x in found.items()}


def compare(name: str, problem: Problem) -> None:
  began, runs, first = time.time(), Runs(problem), next(iter(KINDS))
  seconds = runs.seconds()
  print(name, {k: f'{1000 * s:.1f} ms' for k, s in seconds.items()}, flush=True)
  rates, curves = {}, {}
  for kind in KINDS:
    rates[kind], found = search(runs, kind)
    print(name, kind, 'dev loss by rate', {
        f'{r:g}': f'{x:.3f}' for r, x in sorted(found.items())}, flush=True)
  for seed in range(SEEDS):
    for kind in KINDS:
      curves.setdefault(kind, []).append(runs.run(
          kind, rates[kind], seed, 2 * CURVE))
    print(name, 'seed', seed, {
        k: f'{c[-1][-1, 1]:.3f}' for k, c in curves.items()}, flush=True)
  curves = {kind: np.array(c) for kind, c in curves.items()}

  # As much time: what the slowest takes for half of its steps.
  budget = max(seconds.values()) * problem.steps / 2
  in_time = lambda kind: runs.in_time(
      kind, curves[kind], budget / seconds[kind])
  at = np.linspace(0, problem.steps, 2 * CURVE + 1)
  table, base = [], in_time(first)
  for kind, c in curves.items():
    row = {'directions': kind, 'learning rate': f'{rates[kind]:g}'}
    for i in range(2, 2 * CURVE + 1, 2):
      row[f'loss, {int(2 * at[i])} forwards'] = harness.mean_error(c[:, i, 1])
    row['difference'] = '' if kind == first else harness.mean_error(
        c[:, -1, 1] - curves[first][:, -1, 1])
    row['accuracy, %'] = harness.mean_error(100 * c[:, -1, 2], 1)
    row['ms a step'] = round(1000 * seconds[kind], 1)
    row[f'loss after {budget:.0f} s'] = harness.mean_error(in_time(kind))
    row['difference then'] = '' if kind == first else harness.mean_error(
        in_time(kind) - base)
    table.append(row)
  before = curves[first][0, 0]
  harness.write(f'convergence_{name}', harness.header(
      f'{time.time() - began:.0f} s in all'), [(
          f'{name}: {ROWS} rows of at most {problem.tokens} tokens, {SEEDS} '
          f'seeds; test loss before {before[1]:.3f}, accuracy '
          f'{100 * before[2]:.1f} %', table)])


def quadratic(dims=1000, steps=4000, seeds=20) -> None:
  began, scale = time.time(), jnp.linspace(1.0, 100.0, dims)
  loss_fn = lambda x, batch: 0.5 * jnp.sum(scale * x**2)
  kinds = {'normal, threefry': mezo_jax.Normal('threefry2x32'),
           'normal': mezo_jax.Normal(), 'signs': mezo_jax.Rademacher()}
  known, table, first = {}, [], next(iter(kinds))
  for name, directions in kinds.items():
    def run(seed, directions=directions):
      tx = mezo_jax.mezo(0.5 / jnp.sum(scale), 1e-3, key=seed,
                         directions=directions)
      def one(carry, _):
        x, state = carry
        updates, state = tx.update(None, state, x, value_fn=loss_fn, batch=0)
        return (optax.apply_updates(x, updates), state), loss_fn(x, 0)
      x = jnp.ones(dims)
      _, losses = jax.lax.scan(one, (x, tx.init(x)), None, steps)
      return losses[jnp.arange(1, 5) * steps // 4 - 1] / losses[0]
    run = jax.jit(run)
    known[name] = np.log10(np.array([
        run(jax.random.key(seed)) for seed in range(seeds)]))
  for name, logs in known.items():
    table.append({
        'directions': name,
        **{f'{n} forwards': harness.mean_error(logs[:, i])
           for i, n in enumerate((2000, 4000, 6000, 8000))},
        'difference': harness.mean_error(
            logs[:, -1] - known[first][:, -1]) if name != first else ''})
  harness.write('convergence_quadratic', harness.header(
      f'{time.time() - began:.0f} s in all'), [(
          f'Quadratic: {seeds} seeds, log10 of loss / initial loss', table)])


def main():
  wanted = sys.argv[1:]
  for name, problem in problems().items():
    if not wanted or name in wanted:
      compare(name, problem)
  if not wanted or 'quadratic' in wanted:
    quadratic()


if __name__ == '__main__':
  main()
