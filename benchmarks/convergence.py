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

import dataclasses
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
from mezo_jax import build, LowRank, trunk
from mezo_jax.config import Data, Model, Optimizer, Train
from mezo_jax.tasks import encode, score, Task

ROWS, SEEDS, SEARCH_SEEDS, CURVE = 16, 8, 2, 4
KINDS = {  # arguments of mezo
    'normal': dict(directions=mezo_jax.Normal()),
    'signs': dict(directions=mezo_jax.Rademacher()),
    'rank 1': dict(directions=LowRank(rank=1)),
    'rank 2': dict(directions=LowRank(rank=2)),
    'rank 4': dict(directions=LowRank(rank=4)),
    'rank 16': dict(directions=LowRank(rank=16)),
    **{f'rank {r}, a direction a row': dict(
        directions=LowRank(rank=r), num_samples=ROWS, over='rows')
       for r in (1, 4)}}


@dataclasses.dataclass(frozen=True)
class Problem:
  """A run's config, and how it is repeated."""

  config: Train
  steps: int
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

  def __init__(self, problem: Problem):
    config = problem.config
    built = build.build(config, say=lambda text: None)
    with tempfile.TemporaryDirectory() as folder:
      built = trunk.keep(config, built, folder)
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
          model, mezo_jax.peft.join(params, frozen), batch, rows))
      nll = optax.softmax_cross_entropy_with_integer_labels(s, batch['label'])
      return nll.mean(), (s.argmax(-1) == batch['label']).mean()
    self._losses = {name: jax.jit(
        lambda p, f, b, rows=getattr(splits, name): losses(p, f, b, rows))
                    for name in held}
    self._held = held
    masked = lambda kind: kind | dict(directions=dataclasses.replace(
        kind['directions'], mask=config.peft.mask or None))
    # Rate and key are part of the state, so that one program serves all.
    self._tx = lambda kind, rate, seed: optax.chain(
        mezo_jax.mezo(1.0, config.spsa.eps, key=seed, **masked(KINDS[kind])),
        optax.inject_hyperparams(optax.scale)(step_size=rate))
    self._step = {kind: mezo_jax.make_step(
        self._tx(kind, 1.0, 0), built.loss_fn) for kind in KINDS}

  def evaluate(self, params) -> list[float]:
    """Dev loss, test loss, test accuracy."""
    found = {name: self._losses[name](params, self.frozen, batch)
             for name, batch in self._held.items()}
    return [float(found['dev'][0]), *map(float, found['test'])]

  def batches(self, seed: int):
    order = np.random.RandomState(seed)
    while True:
      yield encode.batch_of(self.train, order.choice(self.short, ROWS, False),
                            self.problem.tokens, ROWS)

  def run(self, kind: str, rate: float, seed: int, every: int) -> np.ndarray:
    """[evaluations, 3], the first before training."""
    params = jax.tree.map(jnp.copy, self.start)
    state = self._tx(kind, rate, seed).init(params)
    curve = [self.evaluate(params)]
    for t, batch in zip(range(1, self.problem.steps + 1), self.batches(seed)):
      params, state, _ = self._step[kind](params, state, batch, self.frozen)
      if t % every == 0:
        curve.append(self.evaluate(params))
    return np.array(curve)

  def seconds(self, rounds: int = 7) -> dict[str, float]:
    """Of a step of each kind, the median of rounds in turn."""
    out, runs = {kind: [] for kind in KINDS}, {}
    batch = next(self.batches(0))
    for kind in KINDS:
      params = jax.tree.map(jnp.copy, self.start)
      runs[kind] = params, self._tx(kind, 0.0, 0).init(params)
    def some(kind, params, state):
      for _ in range(4):
        params, state, metrics = self._step[kind](
            params, state, batch, self.frozen)
      return params, state, metrics
    for _ in range(rounds + 1):
      for kind in KINDS:
        took, (params, state, _) = harness.timed(some, kind, *runs[kind])
        runs[kind] = params, state
        out[kind].append(took / 4)
    return {kind: float(np.median(x[1:])) for kind, x in out.items()}


def search(runs: Runs, kind: str) -> tuple[float, dict[float, float]]:
  """The rate of the lowest dev loss, on a grid of factors of two that goes on
  until the best has a worse one on both sides; and what was found."""
  found, best, p = {}, 0, runs.problem
  while True:
    for i in (best, best - 1, best + 1):
      if i not in found:
        ends = [runs.run(kind, p.rate * 2.0**i, 1000 + seed, p.steps)[-1, 0]
                for seed in range(SEARCH_SEEDS)]
        found[i] = np.mean(np.nan_to_num(ends, nan=np.inf))
    if min(found, key=found.get) == best:
      return p.rate * 2.0**best, {p.rate * 2.0**i: x for i, x in found.items()}
    best = min(found, key=found.get)


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
          kind, rates[kind], seed, problem.steps // (2 * CURVE)))
    print(name, 'seed', seed, {
        k: f'{c[-1][-1, 1]:.3f}' for k, c in curves.items()}, flush=True)
  curves = {kind: np.array(c) for kind, c in curves.items()}

  # As much time: what the slowest takes for half of its steps.
  budget = max(seconds.values()) * problem.steps / 2
  at = np.arange(2 * CURVE + 1) / (2 * CURVE) * problem.steps
  def in_time(kind):
    done = min(budget / seconds[kind], problem.steps)
    return np.array([np.interp(done, at, c[:, 1]) for c in curves[kind]])
  table, base = [], in_time(first)
  for kind, c in curves.items():
    row = {'directions': kind, 'learning rate': f'{rates[kind]:g}'}
    for i in range(2, 2 * CURVE + 1, 2):
      row[f'loss, {int(2 * at[i])} forwards'] = mean_error(c[:, i, 1])
    row['difference'] = '' if kind == first else mean_error(
        c[:, -1, 1] - curves[first][:, -1, 1])
    row['accuracy, %'] = mean_error(100 * c[:, -1, 2], 1)
    row['ms a step'] = round(1000 * seconds[kind], 1)
    row[f'loss after {budget:.0f} s'] = mean_error(in_time(kind))
    row['difference then'] = '' if kind == first else mean_error(
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
           'normal': mezo_jax.Normal(), 'signs': mezo_jax.Rademacher(),
           'sphere': mezo_jax.Sphere()}
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
        **{f'{n} forwards': mean_error(logs[:, i])
           for i, n in enumerate((2000, 4000, 6000, 8000))},
        'difference': mean_error(
            logs[:, -1] - known[first][:, -1]) if name != first else ''})
  harness.write('convergence_quadratic', harness.header(
      f'{time.time() - began:.0f} s in all'), [(
          f'Quadratic: {seeds} seeds, log10 of loss / initial loss', table)])


def mean_error(values, digits: int = 3) -> str:
  """Mean and standard error over seeds."""
  error = np.std(values, ddof=1) / np.sqrt(len(values))
  return f'{np.mean(values):.{digits}f} ± {error:.{digits}f}'


def main():
  wanted = sys.argv[1:]
  for name, problem in problems().items():
    if not wanted or name in wanted:
      compare(name, problem)
  if not wanted or 'quadratic' in wanted:
    quadratic()


if __name__ == '__main__':
  main()
