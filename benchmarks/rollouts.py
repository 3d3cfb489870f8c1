"""Compares ways to generate the answers of a population.

  python benchmarks/rollouts.py

The model has the shape of SmolLM2-135M in float32, with 30 members that answer
16 prompts of 32 tokens. The first table has the compiler's count of operations
and memory, relative to one model that answers as many prompts. The second has
the time of 8 members with 4 prompts and 24 new tokens: all in one pass, one
after the other by factors, and one after the other with weights that are built
once or for each token.

Writes benchmarks/results/rollouts.md and rollouts.json. Takes 10 minutes on 2
CPU cores.
"""

import harness
import jax
import jax.numpy as jnp
import numpy as np

import mezo_jax
from mezo_jax import LowRank, models

MEMBERS, ROWS, TOKENS, NEW, ROUNDS = 30, 16, 32, 24, 3


def rollout_of(model, new=NEW):
  """Returns a function that generates answers without an end."""
  return lambda params, ids: models.generate(
      model, params, ids, max_new_tokens=new)


def step_of(model, members, directions, over, build=True):
  """Returns (optimizer, step) of evolution strategies."""
  tx = mezo_jax.mezo(5e-4, estimator=mezo_jax.spsa(
      1e-3, key=0, directions=directions, over=over, combine='z_score',
      num_samples=members))
  return tx, mezo_jax.make_step(
      tx, rollout_of(model), build=build,
      reward=lambda tokens, batch: np.zeros(tokens.shape[:-1]))


def counted(model, shapes):
  """Returns the table of operations and memory of 30 members."""
  def cost(lowered):
    compiled = lowered.compile()
    return (compiled.cost_analysis()['flops'],
            compiled.memory_analysis().temp_size_in_bytes)
  ids = lambda rows: jax.ShapeDtypeStruct((rows, TOKENS), jnp.int32)
  flops, memory = cost(jax.jit(rollout_of(model)).lower(
      shapes, ids(MEMBERS * ROWS)))
  cache = jax.eval_shape(lambda: models.transformer.make_cache(
      model.config, MEMBERS * ROWS, TOKENS + NEW, jnp.float32))
  rows = []
  for rank in (1, 4):
    tx, step = step_of(model, MEMBERS, LowRank(rank=rank), 'batch')
    found = cost(step.lower(
        shapes, jax.eval_shape(tx.init, shapes), ids(ROWS))[0])
    rows.append({
        'directions': f'LowRank(rank={rank})',
        'operations / those of one model': f'{found[0] / flops:.3f}',
        'further temporaries, MiB': round((found[1] - memory) / 2**20),
        'of keys and values, MiB': round(harness.nbytes(cache) / 2**20)})
  return rows


def timed(model, params):
  """Returns the table of times of 8 members with 4 prompts."""
  members, ids = 8, np.random.RandomState(0).randint(
      0, model.config.vocab_size, (4, TOKENS))
  ways = {
      'rank 1, all members in one pass': (LowRank(rank=1), 'batch', True),
      'rank 4, all members in one pass': (LowRank(rank=4), 'batch', True),
      'rank 1, one after the other': (LowRank(rank=1), 'scan', True),
      'normal, built once for each member': ('normal', 'scan', True),
      'normal, drawn for each token': ('normal', 'scan', False)}
  steps = {}
  for name, way in ways.items():
    tx, step = step_of(model, members, *way)
    state = tx.init(params)
    steps[name] = lambda step=step, state=state: step.losses(
        params, state, ids)
    steps[name]()  # compile
  times = {name: [] for name in ways}
  for _ in range(ROUNDS):
    for name, run in steps.items():
      times[name].append(harness.timed(run)[0])
  first = np.median(times[next(iter(ways))])
  return [{'members': name, 'seconds': harness.median_range(found),
           'relative': f'{np.median(found) / first:.1f}'}
          for name, found in times.items()]


def main():
  model = models.Transformer(harness.SHAPES['SmolLM2-135M'])
  params = harness.random_params(model)
  tables = [
      ('30 members, 16 prompts: the compiler\'s count', counted(
          model, jax.eval_shape(lambda: params))),
      ('8 members, 4 prompts: time', timed(model, params))]
  harness.write('rollouts', harness.header(
      f'{TOKENS} + {NEW} tokens, float32'), tables)


if __name__ == '__main__':
  main()
