"""Memory and time of a MeZO step in pure optax, against forward passes.

  python benchmarks/step.py

The SmolLM2-135M shape with random float32 weights, classification loss at the
last of 32 tokens, 16 rows. Extra memory is XLA's temporaries over the bytes of
the weights; time is the ratio to two forward passes, alternating in one run.
Writes benchmarks/results/step.md and step.json.
"""

import functools
import json
from pathlib import Path
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mezo_jax
from mezo_jax import models

ROWS, TOKENS, ROUNDS = 16, 32, 5
CASES = [(g, d) for g in ('threefry2x32', 'hash32')
         for d in ('normal', 'rademacher')]

config = models.Config(
    family='llama', vocab_size=49152, width=576, ff_width=1536, num_layers=30,
    num_heads=9, num_kv_heads=3, head_width=64, max_length=64, norm_eps=1e-5,
    rope_theta=1e5, tied_head=True)
model = models.Transformer(config)
ids = jax.random.randint(jax.random.key(0), (ROWS, TOKENS), 0, 49152)


def loss_fn(params, ids):
  logits = model.apply({'params': params}, ids,
                       answer_at=jnp.full((ROWS, 1), TOKENS - 1),
                       token_ids=jnp.array([13321, 1109]))[:, 0]
  return optax.softmax_cross_entropy_with_integer_labels(
      logits, ids[:, 0] % 2).mean()


def compile_step(params, generator, distribution):
  tx = mezo_jax.mezo(1e-6, key=0, generator=generator,
                     distribution=distribution)
  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, ids):
    updates, state = tx.update(None, state, params, value_fn=loss_fn, ids=ids)
    return optax.apply_updates(params, updates), state
  state = tx.init(params)
  return step.lower(params, state, ids).compile(), state


def timed(fn, *args):
  began = time.perf_counter()
  out = jax.block_until_ready(fn(*args))
  return time.perf_counter() - began, out


def main():
  params = jax.jit(model.init)(jax.random.key(1), ids)['params']
  weights = sum(x.nbytes for x in jax.tree.leaves(params))
  temp = lambda c: c.memory_analysis().temp_size_in_bytes / weights
  forward = jax.jit(loss_fn).lower(params, ids).compile()
  timed(forward, params, ids)
  rows = [dict(what='forward (inference)', extra_memory=temp(forward),
               time_over_two_forwards=0.5)]
  for generator, distribution in CASES:
    step, state = compile_step(params, generator, distribution)
    _, (params, state) = timed(step, params, state, ids)
    ratios = []
    for _ in range(ROUNDS):
      two = timed(forward, params, ids)[0] + timed(forward, params, ids)[0]
      seconds, (params, state) = timed(step, params, state, ids)
      ratios.append(seconds / two)
    rows.append(dict(what=f'MeZO step, {distribution}, {generator}',
                     extra_memory=temp(step),
                     time_over_two_forwards=float(np.median(ratios)),
                     low=min(ratios), high=max(ratios)))
  write(rows)


def write(rows):
  device = jax.devices()[0]
  header = (f'{device.device_kind} ({platform.processor() or "unknown"}, '
            f'{len(jax.devices())} device), jax {jax.__version__}, optax '
            f'{optax.__version__}, Python {platform.python_version()}, float32')
  lines = [header, '', '| | extra memory, of the weights | time / two forwards '
           '(median, range) |', '|---|---|---|']
  for r in rows:
    spread = f' ({r["low"]:.2f} to {r["high"]:.2f})' if 'low' in r else ''
    lines.append(f'| {r["what"]} | {r["extra_memory"]:.3f} | '
                 f'{r["time_over_two_forwards"]:.2f}{spread} |')
  folder = Path(__file__).parent / 'results'
  folder.mkdir(exist_ok=True)
  (folder / 'step.md').write_text('\n'.join(lines) + '\n')
  (folder / 'step.json').write_text(
      json.dumps(dict(header=header, rows=rows), indent=1) + '\n')
  print('\n'.join(lines))


if __name__ == '__main__':
  main()
