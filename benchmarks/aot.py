"""Estimates forms of a step with TPU and CUDA compilers, without accelerators.

  pip install -e '.[plan]' && python benchmarks/aot.py
      [--cuda] [--short | --vmem]

It calls `mezo_jax.planning.plan` for inference, MeZO steps and backprop (with
each layer rematerialised). The programs are compiled for described devices,
with abstract bfloat16 weights, 16 rows of 256 or 32 tokens and two label words.
Nothing is run.

The memory is that of one device: weights, inputs, outputs and temporaries.
Cycles are the TPU compiler's estimates times the trip counts of loops; they do
not include collectives between chips. For updates that are accumulated over k
steps, 1/k of the cycles of applying them is counted per step (k is 8 unless the
name of the program has another number).

`--cuda` adds an A100 with the CUDA compiler (`pip install jax-cuda12-plugin
jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`, of the version of jax). Writes
benchmarks/results/aot.md and .json. `--short` runs the cases of 32 tokens per
row, and writes aot_short.md and .json. `--vmem` runs some cases with 16, 32 and
64 MiB of a TPU core's vector memory for a loop, set by a compiler flag, and
writes aot_vmem.md and .json.
"""

import dataclasses
import json
import subprocess
import sys

import harness
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from plan_models import config_of

import mezo_jax
from mezo_jax.directions import streams
from mezo_jax.directions.by_name import KINDS
from mezo_jax.directions.displacement import Draws
from mezo_jax.planning import compiled, machines, plan
from mezo_jax.training import build
from mezo_jax.training import config as config_lib

ROWS = 16
MEZO = harness.MEZO | {
    'MeZO rank 4, both signs in one pass, pending over 16 steps': dict(
        directions=mezo_jax.LowRank(rank=4), over='batch', apply_every=16),
    'MeZO rank 4, pending over 16 steps': dict(
        directions=mezo_jax.LowRank(rank=4), apply_every=16),
    'MeZO rank 4, both signs in one pass, pending over 32 steps': dict(
        directions=mezo_jax.LowRank(rank=4), over='batch', apply_every=32)}
FEW = tuple(MEZO)[:3]
PENDING = 'MeZO low rank, pending'
# (topology, (data, fsdp, tensor), shape, tokens per row, programs)
CASES = [
    ('v5p:1x1x1', (1, 1, 1), 'OPT-13B', 32, ('inference', *MEZO)),
    ('v5p:1x1x1', (1, 1, 1), 'OPT-13B', 256, (
        'inference', *MEZO, 'SGD', 'Adam')),
    ('v5p:1x1x1', (1, 1, 1), 'OPT-30B', 256, ('inference', *FEW, 'SGD')),
    ('v5e:4x4', (1, 4, 4), 'OPT-30B', 256, ('inference', *FEW, 'SGD')),
    ('v5e:4x4', (1, 4, 4), 'OPT-66B', 256, ('inference', *FEW, 'Adam')),
    ('v5e:8x8', (1, 8, 8), 'OPT-30B', 256, (
        'inference', *FEW, PENDING, 'Adam')),
    ('v5e:16x16', (2, 16, 8), 'OPT-66B', 256, ('inference', *FEW, 'Adam')),
    ('v6e:4x4', (1, 4, 4), 'OPT-66B', 256, (
        'inference', *FEW, PENDING, 'Adam')),
    ('a100:1', (1, 1, 1), 'OPT-30B', 256, ('inference', *FEW)),
]


FLAG = '--xla_tpu_scoped_vmem_limit_kib='
VMEM = [(('v5p:1x1x1', (1, 1, 1), 'OPT-13B', 32), (
            'inference', FEW[1], FEW[2], PENDING, tuple(MEZO)[-1])),
        (('v5p:1x1x1', (1, 1, 1), 'OPT-13B', 256), (
            'inference', *FEW, PENDING)),
        (('v5p:1x1x1', (1, 1, 1), 'OPT-30B', 256), ('inference', *FEW[1:])),
        (('v5e:4x4', (1, 4, 4), 'OPT-66B', 256), ('inference', *FEW[1:]))]


# --- compiled steps ---------------------------------------------------------


def spsa_of(how: dict) -> config_lib.Spsa:
  """Returns options of `harness.mezo` as the fields of a config."""
  how = dict(how)
  z = how.pop('directions', mezo_jax.Normal())
  if isinstance(z, mezo_jax.LowRank):
    how |= dict(distribution='low_rank', rank=z.rank)
  elif isinstance(z, str):
    how['distribution'] = z
  return config_lib.Spsa(**how)


def report(topology, sizes, shape, tokens, program) -> dict:
  """Compiles one program, or all programs of a step.

  Returns:
    A dict with the largest memory of the programs, in GiB, and the sum of their
    cycles. The memory is None if the compiler ran out of it.
  """
  config = config_of(f'facebook/{shape}'.lower())
  config.data.batch_size = max(ROWS, sizes[0] * sizes[1])
  if program in MEZO:
    config.spsa = spsa_of(MEZO[program])
  elif program != 'inference':
    config = dataclasses.replace(
        config, method='finetune',
        model=dataclasses.replace(config.model, remat=True))
    config.optimizer.name = program.lower()
  alone = program == 'inference'
  found = plan.plan(
      config, topology, tokens=tokens,
      sizes=dict(zip(('data', 'fsdp', 'tensor'), sizes)),
      wanted=lambda name: name != 'evaluation' and (
          name == 'inference') == alone)
  programs = [*found.programs.values()]
  peak = found.peak()
  out = dict(fits=found.fits, memory=None if peak == float('inf') else (
      peak / plan.GIB))
  if not all(p.fits for p in programs):
    return out
  moved = programs[min(1, len(programs) - 1)]
  return out | dict(
      kept=moved.kept / moved.weights,
      collectives=sum(n for p in programs[:2]
                      for n, _ in p.collectives.values()),
      seconds=round(sum(p.seconds for p in programs), 1),
      cycles=programs[0].cycles if alone else found.cycles)


# --- one matrix, in the forms that a step could take ------------------------


def forms() -> list[dict]:
  """Returns the megacycles of forms of x @ (W + c*z) and of W += c*z.

  W is the largest matrix of OPT-30B.
  """
  mesh = build.make_mesh(
      config_lib.Train(), machines.devices('v5p:1x1x1'))
  at = NamedSharding(mesh, P())
  like = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=at)
  w = like((7168, 28672), jnp.bfloat16)
  x = like((4096, 7168), jnp.bfloat16)
  seed, c = like((), jnp.uint32), like((), jnp.float32)

  def cost(fn, *args, donate=()):
    program = jax.jit(fn, donate_argnums=donate, out_shardings=at).lower(
        *args).compile()
    return compiled.cycles(program.as_text()) / 1e6

  rows, plain = [], cost(lambda w, x: x @ w, w, x)
  scaled = cost(lambda w, c: (w.astype(jnp.float32) * c).astype(w.dtype), w, c,
                donate=0)
  for generator in ('hash32', 'threefry2x32'):
    for kind in ('normal', 'rademacher'):
      def moved(w, seed, c, z=KINDS[kind](generator)):
        keys = jax.random.key(seed, impl='threefry2x32')[None]
        stream = streams.of_leaf(keys, 'w', w.shape)
        return Draws((stream,), c[None], z).add(w).astype(w.dtype)
      def first(w, seed, c, x, moved=moved):
        return x @ jax.lax.optimization_barrier(moved(w, seed, c))
      def both(w, seed, c, x, moved=moved):
        plus = jax.lax.optimization_barrier(moved(w, seed, c))
        return x @ plus, x @ (2 * w - plus)
      rows.append({
          'z': f'{kind}, {generator}', 'x @ W': plain,
          'z made inside the matmul': cost(
              lambda w, seed, c, x, f=moved: x @ f(w, seed, c), w, seed, c, x),
          'W + cz built first': cost(first, w, seed, c, x),
          'both signs from one z, a sign': cost(both, w, seed, c, x) / 2,
          'W += cz': cost(moved, w, seed, c, donate=0),
          'W *= c, which no update undercuts': scaled})
      print(rows[-1], flush=True)
  return rows


def one(*case, **environment) -> dict:
  """Calls `report` in a new process, since compilers do not free memory."""
  done = subprocess.run(
      [sys.executable, __file__, '--one', json.dumps(case)],
      capture_output=True, text=True, env=harness.on_cpu() | environment)
  if done.returncode:
    sys.exit(f'{case} failed:\n{done.stderr[-2000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def of_vmem() -> None:
  """Writes the table of cycles with several amounts of vector memory."""
  rows = []
  for case, programs in VMEM:
    base = None
    for program in programs:
      costs = {mib: one(*case, program, LIBTPU_INIT_ARGS=f'{FLAG}{1024 * mib}')[
          'cycles'] for mib in (16, 32, 64)}
      base = base or costs
      rows.append({
          'device': case[0], 'shape': case[2], 'tokens': f'{ROWS} x {case[3]}',
          'program': program} | {
              f'Mcycles, {mib} MiB': round(cost / 1e6, 1)
              for mib, cost in costs.items()} | {
              f'/ two forwards, {mib} MiB': round(cost / base[mib] / 2, 3)
              for mib, cost in costs.items()})
      print(rows[-1], flush=True)
  harness.write('aot_vmem', (
      f'Compilers only, nothing run: jax {jax.__version__}, bfloat16, {ROWS} '
      'rows; a whole step by its programs\' estimated cycles, under '
      f'LIBTPU_INIT_ARGS={FLAG}N, N in KiB'), [('Million cycles:', rows)])


def main():
  if '--vmem' in sys.argv:
    return of_vmem()
  if sys.argv[1:2] == ['--one']:
    topology, sizes, shape, *rest = json.loads(sys.argv[2])
    print(json.dumps(report(topology, tuple(sizes), shape, *rest)))
    return
  rows, short = [], '--short' in sys.argv
  for topology, sizes, shape, tokens, programs in CASES:
    if short != (tokens < 256):
      continue
    if machines.is_card(topology) and '--cuda' not in sys.argv:
      continue
    base = None
    for program in programs:
      r = one(topology, sizes, shape, tokens, program)
      base = base or r
      cost, memory = r.get('cycles'), r['memory']
      row = {
          'device': topology, 'mesh': 'x'.join(map(str, sizes)),
          'shape': shape, 'tokens': f'{ROWS} x {tokens}', 'program': program,
          'GiB a device': round(memory, 2) if memory else '',
          '/ inference': round(memory / base['memory'], 3) if memory else '',
          'fits': 'yes' if r['fits'] else 'no',
          'cycles / two forwards': round(cost / base['cycles'] / 2, 3)
                                   if cost and cost == cost else '',
          'collectives': r.get('collectives', ''),
          'seconds to compile': r.get('seconds', '')}
      print(row, flush=True)
      rows.append(row)
  of_one = [] if short else [
      ('Mega-cycles of one matrix of OPT-30B, 7168 x 28672, on one v5p, 4096 '
       'tokens:', forms())]
  harness.write('aot_short' if short else 'aot',
                f'Compilers only, nothing run: jax {jax.__version__}, '
                f'bfloat16, {ROWS} rows (one a row group where there are '
                'more); mesh is data x fsdp x tensor', [
                    ('Memory and estimated cycles:', rows), *of_one])


if __name__ == '__main__':
  main()
