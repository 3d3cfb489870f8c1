"""Compares how fast training converges with different kinds of directions.

  python benchmarks/convergence.py [last_layer] [whole] [minilm] [quadratic]

There are four problems: the last layer of the quickstart's model; most of its
parameters (the config `quickstart:whole`); all of MiniLM with a new head on the
quickstart's data, without a prompt; and a quadratic with a known optimum (1,000
dimensions, eigenvalues 1 to 100). Kinds are compared after the same number of
forward passes and in the same time, with the same seeds and batches.

The learning rate is constant. For each kind it is chosen from one grid of
factors of two by the loss on dev data, with seeds that are used for nothing
else. Losses and accuracies are those of test data. Forward passes are counted
in batches. A difference is the mean over seeds of (kind - first kind) with its
standard error; kinds within two standard errors count as equal. The seconds per
step are measured first, alternating between the kinds. Writes
benchmarks/results/convergence_PROBLEM.md and .json for each problem. Takes 2
hours on 2 CPU cores.
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
  """Describes an optimizer that is compared.

  Attributes:
    make: The optimizer, ``make(learning_rate, eps, key=, directions=)``.
    directions: Its directions. Defaults to Rademacher.
    forwards: Number of forward passes of a batch per step.
    every: Number of steps from one with a large batch to the next. Defaults to
      0, for no large batches.
    many: Size of a large batch, in batches. Defaults to 0, for all of the data.
    scale: Factor of the problem's learning rate from which the search begins.
    looks: A function of the params that returns further arguments of ``make``.
  """

  make: Callable
  directions: mezo_jax.Directions = mezo_jax.Rademacher()
  forwards: float = 2.0
  every: int = 0
  many: int = 0
  scale: float = 1.0
  looks: Callable | None = None


def mezo_kind(directions, **more) -> Kind:
  """Returns MeZO with these directions and options of its estimator."""
  return Kind(functools.partial(harness.mezo, **more), directions)


KINDS = {
    'normal': mezo_kind(mezo_jax.Normal()),
    'signs': mezo_kind(mezo_jax.Rademacher()),
    **{f'rank {r}': mezo_kind(LowRank(rank=r)) for r in (1, 2, 4, 16)},
    **{f'rank {r}, a direction a row': mezo_kind(
        LowRank(rank=r), num_samples=ROWS, over='rows') for r in (1, 4)}}


@dataclasses.dataclass(frozen=True)
class Problem:
  """Describes a training run.

  Attributes:
    config: Config of the run.
    steps: Number of steps for a kind with two forward passes per step.
    tokens: Maximal length of an example; longer ones are left out.
    rate: Learning rate from which the search begins.
  """

  config: Train
  steps: int
  tokens: int
  rate: float


def problems() -> dict[str, Problem]:
  """Returns the problems by name, without the quadratic."""
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
  """Trains on one problem, and compiles the programs of each kind only once."""

  def __init__(self, problem: Problem, kinds: dict[str, Kind] = KINDS):
    config = problem.config
    built = build.build(config, say=lambda text: None)
    with tempfile.TemporaryDirectory() as folder:
      built = frozen_features.keep(config, built, folder)
    self.problem, self.loss_fn = problem, built.loss_fn
    self.frozen, self.start = built.frozen, built.params
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
      # The learning rate and the seed are part of the state, so that all runs
      # of a kind share one program.
      return optax.inject_hyperparams(lambda learning_rate: kinds[kind].make(
          learning_rate, config.spsa.eps, key=seed, directions=directions,
          **looked[kind]))(learning_rate=rate)
    self._tx = tx
    self._step = {kind: mezo_jax.make_step(
        tx(kind, 1.0, 0), built.loss_fn) for kind in kinds}

  def evaluate(self, params) -> list[float]:
    """Returns the dev loss, the test loss and the test accuracy."""
    found = {name: self._losses[name](params, self.frozen, batch)
             for name, batch in self._held.items()}
    return [float(found['dev'][0]), *map(float, found['test'])]

  def batches(self, seed: int, every: int = 0, many: int = 0):
    """Yields random batches; every ``every`` steps a large one (see `Kind`)."""
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
    """Returns the steps in which a kind takes the problem's forward passes."""
    return round(2 * self.problem.steps / self.kinds[kind].forwards)

  def run(self, kind: str, rate: float, seed: int, times: int) -> np.ndarray:
    """Trains with one seed, and evaluates ``1 + times`` times.

    Returns:
      An array [1 + times, 3] with the results of `evaluate` before training and
      after each of ``times`` equal parts of the steps.
    """
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
    """Returns the seconds per step of each kind: the median over rounds."""
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
    """Returns the bytes that the largest program of a step needs."""
    return max(compiled.held(program.memory_analysis())
               for program in self._step[kind].compiled.values())

  def in_time(self, kind: str, curves: np.ndarray, steps: float) -> np.ndarray:
    """Returns the test losses of runs of ``kind`` after a number of steps.

    They are interpolated linearly between evaluations.
    """
    at = np.linspace(0, self.steps(kind), curves.shape[1])
    return np.array([np.interp(steps, at, c[:, 1]) for c in curves])


def search(runs: Runs, kind: str) -> tuple[float, dict[float, float]]:
  """Searches for the learning rate with the lowest dev loss.

  The grid has factors of two. It is extended until the best rate has a worse
  one on both sides.

  Returns:
    The best rate, and {rate: dev loss} of all rates tried.
  """
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
  """Compares all kinds on one problem, and writes the table."""
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

  # Losses are also compared after the same time: that which the slowest kind
  # needs for half of its steps.
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
  """Compares distributions on a quadratic, and writes the table."""
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
