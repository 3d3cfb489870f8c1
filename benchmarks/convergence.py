"""Does cheap noise cost steps? Loss against forwards and time, by seed.

  python benchmarks/convergence.py

Two problems, the same seeds, batches, learning rate and steps for every choice
of noise. (1) The quickstart's model, data, prompt, and what its `whole` trains:
cross-entropy and accuracy of 128 held-out rows along 30 steps of 8 rows of at
most 16 tokens. (2) A quadratic with a known optimum: 1,000 dimensions, eigen-
values 1 to 100. A difference is the mean over seeds of (choice - first choice)
with its standard error; within two of them the choices are equal. Writes
benchmarks/results/convergence.md and convergence.json.
"""

import dataclasses
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import quickstart as quickstart_config
import mezo_jax
from mezo_jax import data, models, quickstart
from mezo_jax.tasks import encode, score

SEEDS, STEPS, EVERY, ROWS, TOKENS, HELD_OUT = 15, 30, 10, 8, 16, 128
NOISE = {
    'normal, threefry': mezo_jax.Normal('threefry2x32'),
    'normal, hash32': mezo_jax.Normal(),
    'rademacher, hash32': mezo_jax.Rademacher(),
}


def reviews():
  """{noise: (losses [seeds, evaluations], accuracies, seconds a step)}."""
  config = quickstart_config.get_config('whole')
  task = config.task
  path = quickstart.model_path()
  model, start = models.load(path, dtype='float32')
  splits = data.read_splits(
      config, models.load_tokenizer(path), model.config, print)
  train, dev = splits.train, splits.dev
  short = np.flatnonzero(train.lengths <= TOKENS)
  loss_fn = score.make_loss_fn(model, train, task, 'cross_entropy')
  held = encode.batch_of(
      dev, np.flatnonzero(dev.lengths <= TOKENS)[:HELD_OUT], TOKENS, HELD_OUT)
  scores = jax.jit(lambda p: score.scores(
      *score.log_likelihoods(model, p, held, dev)))

  def evaluate(params):
    s = np.asarray(scores(params))
    log_p = np.asarray(jax.nn.log_softmax(s))
    rows = np.arange(HELD_OUT)
    return (-log_p[rows, held['label']].mean(),
            (s.argmax(-1) == held['label']).mean())

  o, results = config.optimizer, {name: [] for name in NOISE}
  tx_of = lambda key, noise: mezo_jax.mezo(
      o.learning_rate, config.spsa.eps, key=key,
      directions=dataclasses.replace(noise, mask=config.peft.mask))
  # One program for all seeds: the key is part of the state.
  step_of = {name: mezo_jax.make_step(tx_of(0, noise), loss_fn)
             for name, noise in NOISE.items()}
  for seed in range(SEEDS):
    order = np.random.RandomState(seed)
    batches = [encode.batch_of(
        train, order.choice(short, ROWS, False), TOKENS, ROWS)
               for _ in range(STEPS)]
    for name, noise in NOISE.items():
      params = jax.tree.map(jnp.copy, start)
      state = tx_of(seed, noise).init(params)
      curve, took = [evaluate(start)], []
      for t, batch in enumerate(batches, 1):
        seconds, (params, state, _) = harness.timed(
            step_of[name], params, state, batch)
        took.append(seconds)
        if t % EVERY == 0:
          curve.append(evaluate(params))
      results[name].append((*np.array(curve).T, np.median(took)))
      print(f'seed {seed}, {name}: loss',
            ' '.join(f'{x[0]:.3f}' for x in curve), flush=True)
  return {name: [np.array(x) for x in zip(*runs)]
          for name, runs in results.items()}


def quadratic(dims=1000, steps=4000, seeds=20):
  """{noise: log10 of loss / initial loss [seeds, 4]}."""
  scale = jnp.linspace(1.0, 100.0, dims)
  loss_fn = lambda x, batch: 0.5 * jnp.sum(scale * x**2)
  out = {}
  for name, noise in (NOISE | {'sphere, hash32': mezo_jax.Sphere()}).items():
    def run(seed, noise=noise):
      tx = mezo_jax.mezo(0.5 / jnp.sum(scale), 1e-3, key=seed, directions=noise)
      def one(carry, _):
        x, state = carry
        updates, state = tx.update(None, state, x, value_fn=loss_fn, batch=0)
        return (optax.apply_updates(x, updates), state), loss_fn(x, 0)
      x = jnp.ones(dims)
      _, losses = jax.lax.scan(one, (x, tx.init(x)), None, steps)
      return losses[jnp.arange(1, 5) * steps // 4 - 1] / losses[0]
    run = jax.jit(run)
    out[name] = np.log10(np.array([
        run(jax.random.key(seed)) for seed in range(seeds)]))
  return out


def mean_error(values) -> str:
  """Mean and standard error over seeds."""
  error = np.std(values, ddof=1) / np.sqrt(len(values))
  return f'{np.mean(values):.3f} ± {error:.3f}'


def main():
  began, first = time.time(), next(iter(NOISE))
  runs, table = reviews(), []
  for name, (losses, hits, seconds) in runs.items():
    row = {'noise': name}
    for i in range(1, losses.shape[1]):
      row[f'loss at {2 * EVERY * i} forwards'] = mean_error(losses[:, i])
    row['difference at the end'] = mean_error(
        losses[:, -1] - runs[first][0][:, -1]) if name != first else ''
    row['accuracy'] = mean_error(hits[:, -1])
    row['seconds a step'] = float(np.median(seconds))
    row['its time for the first\'s steps'] = float(
        np.median(seconds) / np.median(runs[first][2]))
    table.append(row)
  start = next(iter(runs.values()))[0][0, 0]
  known, second = quadratic(), []
  for name, logs in known.items():
    second.append({
        'noise': name,
        **{f'{n} forwards': mean_error(logs[:, i])
           for i, n in enumerate((2000, 4000, 6000, 8000))},
        'difference at the end': mean_error(
            logs[:, -1] - known[first][:, -1]) if name != first else ''})
  harness.write('convergence', harness.header(
      f'{time.time() - began:.0f} s in all'), [
          (f'Reviews: {SEEDS} seeds, held-out loss (before: {start:.3f}), mean '
           '± standard error:', table),
          (f'Quadratic: {len(known[first])} seeds, log10 of loss / initial '
           'loss:', second)])


if __name__ == '__main__':
  main()
