"""Measures the memory that inference, MeZO and backprop need beyond weights.

  python benchmarks/memory.py

The memory is measured in two ways, both relative to the bytes of the weights.
The compiler (`memory_analysis`) reports temporaries, and outputs that do not
reuse donated inputs. The operating system (Linux) reports the peak resident
size; a new process per program measures how much it grows between the end of
compilation and the end of three steps. Float32, with a classification loss at
the last of 64 tokens, and 8 rows. Writes benchmarks/results/memory.md and
.json.
"""

import ctypes
import json
from pathlib import Path
import re
import subprocess
import sys

import harness
import jax
import jax.numpy as jnp
import optax
import zoo

import mezo_jax
from mezo_jax import make_step, models
from mezo_jax.planning import compiled
from mezo_jax.transforms import backprop

ROWS, TOKENS = 8, 64
SHAPES = ('OPT-125M', 'SmolLM2-135M')
# {program: options of MeZO, or an optimizer after backprop, or None for
# inference}
PROGRAMS = {
    'inference': None,
    'MeZO, normal': dict(),
    'MeZO, rademacher': dict(directions='rademacher'),
    'MeZO, 4 directions': dict(num_samples=4),
    'MeZO, queries and values only': dict(
        directions=mezo_jax.Normal(mask='attn/(q|v)/')),
    'MeZO, low rank, both signs in one pass': dict(
        directions=harness.LOW, over='batch'),
    'MeZO, low rank, pending over 8 steps': dict(
        directions=harness.LOW, apply_every=8),
    'MeZO, low rank, a direction a row': dict(
        directions=mezo_jax.LowRank(rank=4), num_samples=ROWS, over='rows'),
    'backprop SGD': optax.sgd,
    'backprop Adam': optax.adam,
    'backprop Adam, remat': optax.adam,
}
# Models of other libraries, by their names in zoo.py.
OTHERS = ('Linen scan', 'Linen unrolled', 'NNX list', 'equinox list')


def build(shape: str, name: str):
  """Returns (model, loss function, optimizer or None) of a program."""
  model = models.Transformer(harness.SHAPES[shape], remat='remat' in name)
  what = PROGRAMS[name]
  if what is None:
    tx = None
  elif isinstance(what, dict):
    tx = harness.mezo(1e-6, key=0, **what)
  else:
    tx = optax.chain(backprop.backprop(), what(1e-6))
  return model, harness.classification_loss(model), tx


def lower(loss_fn, tx, params, ids) -> list:
  """Lowers the forward pass, or all programs of a step."""
  if tx is None:
    return [jax.jit(loss_fn).lower(params, ids)]
  state = jax.eval_shape(tx.init, params)
  return make_step(tx, loss_fn).lower(params, state, ids)


def extra(lowered, weights: int) -> float:
  """Returns the memory of a program beyond the weights, relative to them."""
  return compiled.held(lowered.compile().memory_analysis()) / weights - 1


def by_compiler(shape: str, name: str) -> float:
  """Returns the relative extra memory that the compiler reports."""
  model, loss_fn, tx = build(shape, name)
  params = models.param_shapes(model.config)
  ids = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
  weights = harness.nbytes(params)
  return max(extra(x, weights) for x in lower(loss_fn, tx, params, ids))


def by_system(shape: str, name: str) -> float:
  """Returns the extra memory that the system reports, in bytes.

  It must run in a process that does nothing else.
  """
  model, loss_fn, tx = build(shape, name)
  shapes = models.param_shapes(model.config)
  ids = jnp.ones((ROWS, TOKENS), jnp.int32)
  params = jax.block_until_ready(
      jax.tree.map(lambda x: jnp.full(x.shape, 0.01), shapes))
  if tx is None:
    step = jax.jit(loss_fn).lower(params, ids).compile()
  else:
    step = make_step(tx, loss_fn)
    step.compile(shapes, jax.eval_shape(tx.init, params), ids)
  ctypes.CDLL('libc.so.6').malloc_trim(0)
  Path('/proc/self/clear_refs').write_text('5')  # Resets the peak.
  before = peak()
  state = tx and tx.init(params)
  for _ in range(3):
    if tx is None:
      jax.block_until_ready(step(params, ids))
    else:
      params, state, _ = jax.block_until_ready(step(params, state, ids))
  return peak() - before


def peak() -> int:
  """Returns the peak resident size since its last reset, in bytes (Linux)."""
  status = Path('/proc/self/status').read_text()
  return int(re.search(r'VmHWM:\s+(\d+) kB', status)[1]) * 1024


def others(name: str) -> dict:
  """Returns a row for a model of another library."""
  build, pip = zoo.MODELS[name]
  try:
    apply, params = build(jnp.float32)
  except ImportError:
    return {'model': name, 'inference': f'needs pip install {pip}'}
  def loss_fn(params, ids):
    return optax.softmax_cross_entropy_with_integer_labels(
        apply(params, ids), ids).mean()
  weights = harness.nbytes(params)
  ids = jnp.ones((zoo.ROWS, zoo.TOKENS), jnp.int32)
  most = lambda tx: round(max(extra(x, weights) for x in lower(
      loss_fn, tx, params, ids)), 3)
  return {'model': name, 'inference': most(None),
          'MeZO, normal': most(mezo_jax.mezo(1e-6, key=0))}


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
  tables.append(('Models as others write them, twelve layers, 2 x 8 tokens, by '
                 'the compiler:', [others(name) for name in OTHERS]))
  harness.write('memory', harness.header(
      f'float32, {ROWS} x {TOKENS} tokens'), tables)


if __name__ == '__main__':
  main()
