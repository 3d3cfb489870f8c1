"""Times steps that train the last layers on cached activations.

  python benchmarks/frozen.py

The model has the shape of SmolLM2-135M in float32, with 16 rows of 24 tokens
and Rademacher directions. Steps of the last k of 30 layers, with the cached
activations of the frozen layers below, alternate with steps of all layers.
Writes benchmarks/results/frozen.md and .json. Takes 2 minutes on 2 CPU cores.
"""

import functools

import harness
import jax
import jax.numpy as jnp
import numpy as np

import mezo_jax
from mezo_jax import models, peft

ROWS, TOKENS, ROUNDS, STEPS = 16, 24, 7, 4


def loss_fn(model, params, batch):
  """Returns per-example losses, from cached activations if there are any."""
  logits = model.apply(
      {'params': params}, batch['ids'],
      hidden_states=batch.get('hidden_states'),
      answer_at=jnp.full((ROWS, 1), TOKENS - 1),
      token_ids=jnp.array(harness.LABEL_WORDS))[:, 0]
  return -jax.nn.log_softmax(logits)[:, 0]


def steps_of(run):
  """Takes `STEPS` steps, and stores the new weights and state in the run."""
  step, params, state, batch, frozen, _ = run
  for _ in range(STEPS):
    params, state, metrics = step(params, state, batch, frozen)
  run[1:3] = params, state
  return metrics


def main():
  model = models.Transformer(harness.SHAPES['SmolLM2-135M'])
  start = harness.random_params(model)
  ids = jnp.asarray(np.random.RandomState(0).randint(
      0, model.config.vocab_size, (ROWS, TOKENS)), jnp.int32)
  runs = {}
  for k in (30, 10, 3, 1):
    params, batch = jax.tree.map(jnp.copy, start), {'ids': ids}
    trained, frozen = params, {}
    if k < 30:
      params = peft.split_layers(params, k)
      batch['hidden_states'] = jax.jit(functools.partial(
          model.apply, features='hidden_states'))({'params': params}, ids)
      trained, frozen = peft.split(params, '^last_layers/')
      del frozen['layers']
    tx = mezo_jax.mezo(1e-6, key=0, directions='rademacher')
    step = mezo_jax.make_step(tx, functools.partial(loss_fn, model))
    runs[k] = [step, trained, tx.init(trained), batch, frozen, []]
  for _ in range(ROUNDS + 1):
    for run in runs.values():
      run[-1].append(harness.timed(steps_of, run)[0] / STEPS)
  whole = runs[30][-1][1:]
  rows = [{
      'layers trained': k,
      'parameters': f'{sum(x.size for x in jax.tree.leaves(run[1])):,}',
      'milliseconds a step': round(1000 * float(np.median(run[-1][1:])), 1),
      'over a step of all': '' if k == 30 else harness.median_range(
          [a / b for a, b in zip(run[-1][1:], whole)])}
          for k, run in runs.items()]
  harness.write('frozen', harness.header(
      f'SmolLM2-135M shape, float32, {ROWS} x {TOKENS} tokens, median (range) '
      f'of {ROUNDS} rounds'), [('', rows)])


if __name__ == '__main__':
  main()
