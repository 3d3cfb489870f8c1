"""What an objective that Python computes costs, in a step and in two halves.

  python benchmarks/objectives.py

SmolLM2-135M shape, random float32 weights, 16 rows of 32 tokens, Rademacher
directions. The step with the metric computed on the device; with the same
metric as a Python function (`jax.pure_callback` inside the step); and in two
phases: predictions at both signs jitted, Python, the update jitted. Rounds in
turn; medians and ranges, and ratios to the first. Writes
benchmarks/results/objectives.md.
"""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mezo_jax
from mezo_jax import _noise, models
from mezo_jax.tasks import encode, score, Task

ROWS, TOKENS, ROUNDS = 16, 32, 9
LEARNING_RATE, EPS = 1e-6, 1e-2
OPTIONS = dict(distribution='rademacher', generator='hash32')


def accuracy(predictions, examples):
  return np.mean([p == e['label'] for p, e in zip(predictions, examples)])


def one_phase(loss_fn):
  tx = mezo_jax.mezo(LEARNING_RATE, EPS, key=0, **OPTIONS)
  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, batch):
    updates, state = tx.update(
        None, state, params, value_fn=loss_fn, batch=batch)
    return optax.apply_updates(params, updates), state
  return tx.init, step


def two_phases(model, data):
  """Predictions, Python, update: the same arithmetic in two programs."""
  @jax.jit
  def predict(params, key, batch):
    answer = lambda params: jnp.argmax(score.scores(
        *score.log_likelihoods(model, params, batch, data)), -1)
    at = mezo_jax.perturbed(answer, **OPTIONS)
    return jax.lax.map(lambda sign: at(params, [(key, sign * EPS)]),
                       jnp.array([1.0, -1.0]))

  @functools.partial(jax.jit, donate_argnums=0)
  def update(params, key, g):
    return mezo_jax.displace(params, [(key, -LEARNING_RATE * g)], **OPTIONS)

  def step(params, count, batch):
    key = _noise.direction_key(jax.random.key(0), count, 0)
    plus, minus = np.asarray(predict(params, key, batch)).tolist()
    rows = [data.rows[r] for r in batch['row']]
    g = -(accuracy(plus, rows) - accuracy(minus, rows)) / (2 * EPS)
    return update(params, key, np.float32(g)), count + 1

  return lambda params: 0, step


def main():
  model = models.Transformer(harness.SHAPES['SmolLM2-135M'])
  rng = np.random.RandomState(0)
  none, rows = [[]] * ROWS, [{'label': i % 2} for i in range(ROWS)]
  data = encode.Encoded(
      rows, rng.randint(5, 40_000, (ROWS, TOKENS)).tolist(), none, none,
      [(i % 2,) for i in range(ROWS)], 0, np.full(ROWS, TOKENS - 1),
      np.array(harness.LABEL_WORDS))
  batch = encode.batch_of(data, np.arange(ROWS), TOKENS, ROWS)
  task = Task(template='{text}', label_words=(' no', ' yes'))
  make = functools.partial(score.make_loss_fn, model, data, task)
  steps = {
      'on the device': one_phase(make('accuracy')),
      'Python, inside the step': one_phase(make(accuracy)),
      'Python, between two programs': two_phases(model, data)}
  runs, seconds = {}, {name: [] for name in steps}
  for name, (init, step) in steps.items():
    params = harness.random_params(model)
    runs[name] = step(params, init(params), batch)
  for _ in range(ROUNDS):
    for name, (_, step) in steps.items():
      took, runs[name] = harness.timed(step, *runs[name], batch)
      seconds[name].append(took)
  first = np.array(next(iter(seconds.values())))
  table = [{'metric computed': name,
            'seconds a step': harness.median_range(s),
            '/ on the device': harness.median_range(np.array(s) / first)}
           for name, s in seconds.items()]
  harness.write('objectives', harness.header('float32'), [
      (f'Median and range of {ROUNDS} rounds:', table)])


if __name__ == '__main__':
  main()
