"""What steps cost on one accelerator, in ten minutes on a card of 80 GB.

  pip install -r requirements.txt 'jax[cuda12]' -e .
  python benchmarks/gpu.py

Needs this repository alone: weights of OPT's shapes are made on the device,
bfloat16, 16 rows of 32 and 256 tokens. Of each shape that fits: time and peak
memory of a step of MeZO over those of two forward passes and of one, of plain
and low-rank directions, one or many, added at once or every 8 steps; and of
backprop (rematerialised). With torch and transformers there, the original's
step too (in place, benchmarks/step_time.py), of the last position's logits.
Some hundred steps of the quickstart, if its model and data can be fetched.
Writes benchmarks/results/gpu.md and gpu.json
after each shape, and stops when --minutes are over. `--tiny` is the same with
shapes for a CPU.

Memory is that of the programs (weights, inputs and temporaries), by the
compiler: the allocator's peak never falls again within a process.
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
  """(the compiled programs of `inference` or a step, a function that runs one
  on (params, state, ids), the state)."""
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
  return compiled.held(program.memory_analysis())


def made(config):
  """Weights of this shape, made where they are to be."""
  shapes = models.param_shapes(config, None, jnp.bfloat16)
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  shapes = jax.tree.map(like, shapes)
  def make(key):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return mezo_jax.displace(zeros, mezo_jax.Displacement(key, 0.02))
  return jax.jit(make)(jax.random.key(0))


def at_least(name, params) -> int:
  """Bytes without which no step of backprop begins."""
  trees = {'SGD': 2, 'Adam': 4}.get(name, 1)  # with gradients and moments
  return trees * harness.nbytes(params)


def table_of(shape, config, tokens, until, say) -> list[dict]:
  """A row a program, in turn: its median over steps against two forwards."""
  model, rows, base = models.Transformer(config), [], None
  limit = (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit')
  ids = jnp.asarray(np.random.RandomState(0).randint(
      0, config.vocab_size, (ROWS, tokens)), jnp.int32)
  params = made(config)
  for name in ('inference', *PROGRAMS):
    if time.time() > until:
      say(f'{shape} {tokens}: the time is over at {name}')
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
      for _ in range(2 + 8):  # all of an update that is added every 8
        began = time.time()
        params, state = run(params, state, ids)
        took.append(time.time() - began)
      del state
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      rows.append(row | {'s a step': 'does not fit'})
      params = made(config)  # they may have been donated
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
  """Prints rows of the original's step, in a process of its own: its memory is
  free again after it."""
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
  """`by_torch` of this shape; what it said, if it failed."""
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
  """The quickstart and its `whole`, as a user runs them."""
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
  theirs = [r for shape in shapes if shape != 'OPT-30B'  # needs offloading
            for r in torch_rows(shape)]  # before JAX takes the memory
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
  # JAX would leave a quarter free, which weights of 30B do not.
  os.environ.setdefault('XLA_PYTHON_CLIENT_MEM_FRACTION', '0.95')
  main()
