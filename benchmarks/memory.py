"""Memory beyond the weights: inference, MeZO, MeZO on few parameters, backprop.

  python benchmarks/memory.py

Two views. By the compiler (`memory_analysis`): temporaries, and whatever
outputs do not lie in donated inputs, over the bytes of the weights. By the
operating system (Linux), in a process of its own per program: how much the
greatest resident size grows from weights loaded and program compiled to three
steps made. Float32, classification loss at the last of 64 tokens, 8 rows.
Writes benchmarks/results/memory.md and memory.json.
"""

import ctypes
import functools
import json
from pathlib import Path
import re
import subprocess
import sys

import harness
import jax
import jax.numpy as jnp
import optax

import mezo_jax
from mezo_jax import models

ROWS, TOKENS = 8, 64
SHAPES = ('OPT-125M', 'SmolLM2-135M')
# Every program: transform (None: inference), and whether gradients are taken.
PROGRAMS = {
    'inference': (None, False),
    'MeZO, normal': (dict(), False),
    'MeZO, rademacher': (dict(distribution='rademacher'), False),
    'MeZO, 4 directions': (dict(num_samples=4), False),
    'MeZO, queries and values only': (dict(mask='attn/(q|v)/'), False),
    'backprop SGD': (optax.sgd, True),
    'backprop Adam': (optax.adam, True),
    'backprop Adam, remat': (optax.adam, True),
}


def build(shape: str, name: str):
  """(jitted program, model, initial state or None)."""
  model = models.Transformer(harness.SHAPES[shape], remat='remat' in name)
  loss_fn = harness.classification_loss(model)
  what, gradient = PROGRAMS[name]
  if what is None:
    return jax.jit(lambda params, state, ids: loss_fn(params, ids)), model, None
  tx = what(1e-6) if gradient else mezo_jax.mezo(1e-6, key=0, **what)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, ids):
    if gradient:
      updates, state = tx.update(jax.grad(loss_fn)(params, ids), state, params)
    else:
      updates, state = tx.update(
          None, state, params, value_fn=loss_fn, ids=ids)
    return optax.apply_updates(params, updates), state
  return step, model, tx.init


def by_compiler(shape: str, name: str) -> float:
  fn, model, init = build(shape, name)
  params = models.param_shapes(model.config)
  state = jax.eval_shape(init, params) if init else None
  ids = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
  m = fn.lower(params, state, ids).compile().memory_analysis()
  weights = harness.nbytes(params)
  total = (m.argument_size_in_bytes + m.output_size_in_bytes
           - m.alias_size_in_bytes + m.temp_size_in_bytes)
  return total / weights - 1


def by_system(shape: str, name: str) -> float:
  """In this process, which does nothing else; bytes."""
  fn, model, init = build(shape, name)
  shapes = models.param_shapes(model.config)
  state = jax.eval_shape(init, shapes) if init else None
  ids = jnp.ones((ROWS, TOKENS), jnp.int32)
  fn = fn.lower(shapes, state, ids).compile()
  params = jax.block_until_ready(
      jax.tree.map(lambda x: jnp.full(x.shape, 0.01), shapes))
  ctypes.CDLL('libc.so.6').malloc_trim(0)
  Path('/proc/self/clear_refs').write_text('5')  # the peak starts here
  before = peak()
  state = init(params) if init else None
  for _ in range(3):
    out = jax.block_until_ready(fn(params, state, ids))
    if init:
      params, state = out
  return peak() - before


def peak() -> int:
  """The greatest resident size since it was last reset, bytes (Linux)."""
  status = Path('/proc/self/status').read_text()
  return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) * 1024


def main():
  if sys.argv[1:2] == ['--one']:
    print(by_system(*json.loads(sys.argv[2])))
    return
  tables = []
  for shape in SHAPES:
    weights = harness.nbytes(
        models.param_shapes(harness.SHAPES[shape]))
    rows = []
    for name in PROGRAMS:
      done = subprocess.run(
          [sys.executable, __file__, '--one', json.dumps([shape, name])],
          capture_output=True, text=True, check=True)
      rows.append({
          'program': name,
          'compiler: extra / weights': round(by_compiler(shape, name), 3),
          'system: extra / weights': round(
              float(done.stdout.split()[-1]) / weights, 2)})
      print(rows[-1], flush=True)
    tables.append((f'{shape}, weights of {weights / 1e6:.0f} MB:', rows))
  harness.write('memory', harness.header(
      f'float32, {ROWS} x {TOKENS} tokens'), tables)


if __name__ == '__main__':
  main()
