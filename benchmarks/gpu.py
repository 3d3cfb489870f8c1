"""Measures steps on one accelerator, in ten minutes on a card of 80 GB.

  pip install -r requirements.txt 'jax[cuda12]' -e .
  python benchmarks/gpu.py

No files but those of this repository are needed: weights of OPT's shapes are
created on the device, in bfloat16, with 16 rows of 32 and 256 tokens. For each
shape that fits, it measures the time of a step relative to two forward passes,
and its memory relative to one. The steps are those of MeZO with plain and
low-rank directions, one or several per step, with updates applied at once or
every 8 steps; and of backprop with rematerialisation. If torch and transformers
are installed, it also measures the step of the original implementation (in
place, see benchmarks/step_time.py) with the logits of the last position. If the
quickstart's model and data can be fetched, it takes some hundred steps of it.

Writes benchmarks/results/gpu.md and .json after each shape, and stops after
--minutes. `--tiny` does the same with shapes for a CPU.

The memory is what the compiler reports for a program: weights, inputs and
temporaries. The allocator's peak cannot be used, as it never decreases within a
process.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import step_time

import mezo_jax
from mezo_jax import models
from mezo_jax.planning import compiled
from mezo_jax.runs.workdir import read_result
from mezo_jax.transforms import backprop

PROGRAMS = harness.MEZO | {'SGD': None, 'Adam': None}
SHAPES = ('OPT-13B', 'OPT-30B', 'OPT-1.3B')
ROWS, TOKENS = 16, (32, 256)


def programs(name, model, params, ids):
  """Compiles a program or a step.

  Returns:
    The compiled programs; a function of (params, state, ids) that runs them and
    returns the new params and state; and the optimizer, or None for inference.
  """
  if name in ('SGD', 'Adam'):
    model = model.clone(remat=True)
  loss_fn = harness.classification_loss(model)
  if name == 'inference':
    program = jax.jit(lambda p, ids: jnp.mean(loss_fn(p, ids))).lower(
        params, ids).compile()
    def forward(params, state, ids):
      program(params, ids).block_until_ready()
      return params, state
    return [program], forward, None
  if PROGRAMS[name] is None:
    tx = optax.chain(backprop.backprop(), {
        'SGD': optax.sgd, 'Adam': optax.adam}[name](1e-6))
  else:
    tx = harness.mezo(1e-6, key=0, **PROGRAMS[name])
  step = mezo_jax.make_step(tx, loss_fn)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
                          (params, ids))
  step.compile(abstract[0], jax.eval_shape(tx.init, abstract[0]), abstract[1])
  def run(params, state, ids):
    params, state, metrics = step(params, state, ids)
    metrics['loss'].block_until_ready()
    return params, state
  return [*step.compiled.values()], run, tx


def memory(program) -> int:
  """Returns the bytes that a compiled program needs."""
  return compiled.held(program.memory_analysis())


def made(config):
  """Returns random weights of a shape, created on the device."""
  shapes = models.param_shapes(config, None, jnp.bfloat16)
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  shapes = jax.tree.map(like, shapes)
  def make(key):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return mezo_jax.displace(zeros, mezo_jax.Displacement(key, 0.02))
  return jax.jit(make)(jax.random.key(0))


def at_least(name, params) -> int:
  """Returns a lower bound of the bytes that a program needs."""
  # Backprop needs gradients, and Adam two moments.
  trees = {'SGD': 2, 'Adam': 4}.get(name, 1)
  return trees * harness.nbytes(params)


def table_of(shape, config, tokens, until, say) -> list[dict]:
  """Returns a row for each program: its memory, and its median step time.

  Stops at the time ``until``.
  """
  model, rows, base = models.Transformer(config), [], None
  limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  ids = jnp.asarray(np.random.RandomState(0).randint(
      0, config.vocab_size, (ROWS, tokens)), jnp.int32)
  params = made(config)
  for name in ('inference', *PROGRAMS):
    if time.time() > until:
      say(f'{shape} {tokens}: out of time before {name}')
      break
    row = {'shape': shape, 'tokens': f'{ROWS} x {tokens}', 'program': name}
    if limit and at_least(name, params) > limit:
      rows.append(row | {'s a step': 'does not fit'})
      continue
    try:
      parts, run, tx = programs(name, model, params, ids)
      needs = max(map(memory, parts))
      row['GiB'] = round(needs / 2**30, 2)
      row['/ inference'] = round(needs / (base or {}).get('memory', needs), 3)
      if limit and needs > limit:
        rows.append(row | {'s a step': 'does not fit'})
        continue
      state, took = tx and tx.init(params), []
      # The first two steps warm up. Eight more include one in which accumulated
      # updates are applied.
      for _ in range(2 + 8):
        began = time.time()
        params, state = run(params, state, ids)
        took.append(time.time() - began)
      del state
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      rows.append(row | {'s a step': 'does not fit'})
      params = made(config)  # The old ones may have been donated.
      continue
    pends = 'apply_every' in (PROGRAMS.get(name) or {})
    spent = (np.mean if pends else np.median)(took[2:])
    base = base or dict(memory=needs, seconds=spent)
    rows.append(row | {
        's a step': f'{spent:.4f}',
        '/ two forwards': f'{spent / base["seconds"] / 2:.2f}' if (
            name != 'inference') else ''})
    say(str(rows[-1]))
  return rows


def by_torch(shape, config) -> None:
  """Prints rows for the original's step in PyTorch.

  It runs in a process of its own, so that its memory is free afterwards.
  """
  import torch
  torch.set_default_dtype(torch.bfloat16)
  where = 'cuda' if torch.cuda.is_available() else 'cpu'
  with torch.device(where):
    model = step_time.torch_shaped(config).eval()
  for tokens in TOKENS:
    ids = np.random.RandomState(0).randint(0, config.vocab_size, (ROWS, tokens))
    spent = {}
    fns = step_time.torch_step(model, ids, 'label', keep=1)
    for name, fn in zip(('step', 'forwards'), fns):
      took = []
      for seed in range(2 + 8):
        began = time.time()
        fn(seed)
        if where == 'cuda':
          torch.cuda.synchronize()
        took.append(time.time() - began)
      spent[name] = np.median(took[2:])
    row = {'shape': shape, 'tokens': f'{ROWS} x {tokens}',
           'program': 'PyTorch, MeZO normal',
           's a step': f'{spent["step"]:.4f}',
           '/ two forwards': f'{spent["step"] / spent["forwards"]:.2f}'}
    if where == 'cuda':
      row['GiB'] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(row), flush=True)


def torch_rows(shape) -> list[dict]:
  """Returns the rows of `by_torch`, and a row with the error if it failed."""
  if not importlib.util.find_spec('torch'):
    return []
  done = subprocess.run([sys.executable, __file__, f'--torch={shape}'],
                        text=True, capture_output=True)
  rows = [json.loads(x) for x in done.stdout.splitlines() if x[:1] == '{']
  if done.returncode:
    said = done.stderr.strip().splitlines()[-1:]
    rows.append({'shape': shape, 'program': 'PyTorch', 's a step': said})
  return rows


def quickstart(steps: int) -> list[dict]:
  """Runs the quickstart and its variant `whole` as a user would."""
  rows = []
  for variant in ('', ':whole'):
    with tempfile.TemporaryDirectory() as where:
      done = subprocess.run(
          [sys.executable, 'train.py',
           f'--config=configs/quickstart.py{variant}', f'--workdir={where}',
           f'--config.steps={steps}', f'--config.eval_every={steps}'],
          text=True, capture_output=True)
      if done.returncode:
        return [{'run': f'quickstart{variant}', 'failed': (
            done.stdout + done.stderr).strip().splitlines()[-1]}]
      found = read_result(where)
    rows.append({'run': f'quickstart{variant}', 'steps': steps,
                 'test accuracy, %': f'{100 * found["final"]["accuracy"]:.1f}',
                 'seconds in all': round(found['seconds'])})
  return rows


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--tiny', action='store_true')
  parser.add_argument('--minutes', type=float, default=9.0)
  parser.add_argument('--shapes', default=','.join(SHAPES))
  parser.add_argument('--no-quickstart', action='store_true')
  parser.add_argument('--torch', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.torch:
    return by_torch(args.torch, (harness.SHAPES | {'tiny': harness.TINY})[
        args.torch])
  until, say = time.time() + 60 * args.minutes, lambda t: print(t, flush=True)
  name, shapes = 'gpu', {s: harness.SHAPES[s] for s in args.shapes.split(',')}
  if args.tiny:
    name, shapes = 'gpu_tiny', {'tiny': harness.TINY}
  # PyTorch runs before JAX preallocates the memory. It cannot run OPT-30B
  # without offloading.
  theirs = [r for shape in shapes if shape != 'OPT-30B'
            for r in torch_rows(shape)]
  head, tables = harness.header('bfloat16'), []
  if theirs:
    tables.append(('PyTorch:', theirs))
  if not args.no_quickstart:
    tables.append(('The quickstart:', quickstart(10 if args.tiny else 300)))
  for shape, config in shapes.items():
    for tokens in TOKENS:
      rows = table_of(shape, config, tokens, until, say)
      tables.append((f'{shape}, {ROWS} x {tokens}:', rows))
      harness.write(name, head, [t for t in tables if t[1]])


if __name__ == '__main__':
  # By default JAX uses three quarters of the memory, but the weights of a model
  # of 30B parameters need more.
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.95')
  main()
