"""Times steps whose objective is computed by a Python function.

  python benchmarks/objectives.py

The model has the shape of SmolLM2-135M and random float32 weights, with 16 rows
of 32 tokens and Rademacher directions. Three steps are compared: the metric is
computed on the device; the same metric is a Python function, called by
`jax.pure_callback` inside the step; or one program predicts at both signs,
Python computes the metric, and another program applies the update. The rounds
alternate between the steps. The table has medians and ranges, and ratios to the
first. Writes benchmarks/results/objectives.md and .json.
"""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np

import mezo_jax
from mezo_jax import models
from mezo_jax.directions import noise
from mezo_jax.tasks import encode, score, Task

ROWS, TOKENS, ROUNDS = 16, 32, 9
LEARNING_RATE, EPS = 1e-6, 1e-2
Z = mezo_jax.Rademacher()


def accuracy(predictions, examples):
  """Computes the metric in Python."""
  return np.mean([p == e['label'] for p, e in zip(predictions, examples)])


def one_phase(loss_fn):
  """Returns the init and the step of a single program."""
  tx = mezo_jax.mezo(LEARNING_RATE, EPS, key=0, directions=Z)
  step = mezo_jax.make_step(tx, loss_fn)
  return tx.init, lambda *args: step(*args)[:2]


def two_phases(model, data):
  """Returns the init and a step of two programs with Python between them."""
  @jax.jit
  def predict(params, key, batch):
    answer = lambda params: jnp.argmax(score.scores(
        *score.log_likelihoods(model, params, batch, data.form)), -1)
    at = mezo_jax.perturbed(answer, Z)
    return jax.lax.map(
        lambda sign: at(params, mezo_jax.Displacement(key, sign * EPS)),
        jnp.array([1.0, -1.0]))

  tx = mezo_jax.mezo(LEARNING_RATE, EPS, key=0, directions=Z)
  # This step applies projected gradients that are computed elsewhere.
  replayed = mezo_jax.make_step(tx, None)

  def step(params, state, batch):
    key = noise.direction_key(jax.random.key(0), int(state[0].count))
    plus, minus = np.asarray(predict(params, key, batch)).tolist()
    rows = [data.rows[r] for r in batch['row']]
    g = -(accuracy(plus, rows) - accuracy(minus, rows)) / (2 * EPS)
    return replayed.update(params, state, [g])[:2]

  return tx.init, step


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
