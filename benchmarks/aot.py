"""What the TPU and CUDA compilers say of real shapes, with no accelerator.

  pip install -e '.[aot]' && python benchmarks/aot.py [--cuda] [--short]

Compiles inference, MeZO steps (`make_step`) and backprop (each layer
rematerialised) for described devices that are not there, from abstract bfloat16
weights, 16 rows of 256 or 32 tokens, and reads memory and cycles from the
compilers. Nothing is run. Of updates that are pending (over 8 steps, where no
other number is said) that part of the cycles is counted.
Memory is all of one device: weights, inputs, outputs and temporaries. Cycles
are the TPU compiler's own estimates times the trip counts of loops; they know
nothing of collectives between chips. `--cuda` adds one A100 by the CUDA
compiler (`pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12`
of jax's version). Writes benchmarks/results/aot.md and aot.json; with `--short`
aot_short.md and .json, of the cases of 32 tokens a row.
"""

import os
import sys

os.environ.update(
    JAX_PLATFORMS='cpu', TPU_SKIP_MDS_QUERY='1', TPU_LIBRARY_LOG_LEVEL='3',
    TPU_ACCELERATOR_TYPE='v5litepod-4', TPU_WORKER_HOSTNAMES='localhost',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1', TF_CPP_MIN_LOG_LEVEL='3')

import functools
import glob
import json
from pathlib import Path
import re
import subprocess
import tempfile
import time

import harness
import jax
from jax.experimental import topologies
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

import mezo_jax
from mezo_jax import _streams, backprop, models, sharding
from mezo_jax._displacement import Draws
from mezo_jax._spsa import KINDS

ROWS = 16
MEZO = harness.MEZO | {
    'MeZO rank 4, both signs in one pass, pending over 16 steps': dict(
        directions=mezo_jax.LowRank(rank=4), over='batch', fold_every=16),
    'MeZO rank 4, pending over 16 steps': dict(
        directions=mezo_jax.LowRank(rank=4), fold_every=16)}
FEW = tuple(MEZO)[:3]
PENDING = 'MeZO low rank, pending'
# Topology, (data, fsdp, tensor), shape, tokens of a row, programs.
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
    ('a100', (1, 1, 1), 'OPT-30B', 256, ('inference', *FEW)),
]
HBM = {'v5p': 95.74, 'v5e': 15.75, 'v6e': 31.25, 'a100': 79.25}  # GiB, a device
A100 = '''gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32
shared_memory_per_block: 49152 shared_memory_per_core: 167936
threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: 2039040000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41
device_memory_size: 85100068864 shared_memory_per_block_optin: 166912
cuda_compute_capability { major: 8 } registers_per_core_limit: 65536
registers_per_block_limit: 65536 thread_dim_limit_x: 1024
thread_dim_limit_y: 1024 thread_dim_limit_z: 64 }
runtime_version { major: 12 minor: 8 } platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA A100-SXM4-80GB"'''


# --- programs ---------------------------------------------------------------


def mesh_of(topology, sizes):
  if topology == 'a100':
    devices = topologies.get_topology_desc(
        platform='cuda', target_config=A100, topology='1x1x1').devices
  else:
    one = dict(chips_per_host_bounds=(1, 1, 1)) if '1x1' in topology else {}
    devices = topologies.get_topology_desc(
        platform='tpu', topology_name=topology, **one).devices
  return Mesh(np.array(devices).reshape(sizes), sharding.AXES)


def lower(program, shape, tokens, mesh):
  """The programs of `inference`, of one of `MEZO`, of `SGD` or `Adam`, lowered,
  and in how many steps each is run once."""
  model = models.Transformer(
      harness.SHAPES[shape], remat=program in ('SGD', 'Adam'))
  loss_fn = harness.classification_loss(model)
  params = models.param_shapes(model.config, mesh, jnp.bfloat16)
  everywhere = NamedSharding(mesh, P())
  rows = max(ROWS, mesh.shape['data'] * mesh.shape['fsdp'])
  ids = jax.ShapeDtypeStruct((rows, tokens), jnp.int32,
                             sharding=NamedSharding(mesh, P(sharding.ROWS)))
  if program == 'inference':
    return [jax.jit(loss_fn, out_shardings=everywhere).lower(params, ids)], [1]

  if program in MEZO:
    tx = mezo_jax.mezo(1e-6, key=0, **MEZO[program])
  else:
    tx = optax.chain(backprop.backprop(),
                     {'SGD': optax.sgd, 'Adam': optax.adam}[program](1e-6))

  # An optimiser's copies of the parameters lie as these do.
  state = jax.eval_shape(tx.init, params)
  like = {x.shape: x.sharding for x in jax.tree.leaves(params)}
  state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=like.get(x.shape, everywhere)), state)
  step = mezo_jax.make_step(tx, loss_fn, mesh=mesh)
  return step.lower(params, state, ids), [
      1, 1, MEZO.get(program, {}).get('fold_every')]


# --- what the compilers say -------------------------------------------------


def report(topology, sizes, shape, tokens, program) -> dict:
  """Of a step of several programs: the most memory, and all cycles."""
  mesh = mesh_of(topology, sizes)
  with jax.set_mesh(mesh):
    programs, every = lower(program, shape, tokens, mesh)
  found = [one(topology, mesh, lowered) for lowered in programs]
  if not all('cycles' in r for r in found):
    return dict(fits=False, memory=max(
        (r['memory'] for r in found if r['memory']), default=None))
  most = max(found, key=lambda r: r['memory'])
  return most | dict(
      fits=all(r['fits'] for r in found), kept=found[-1]['kept'],
      collectives=sum(r['collectives'] for r in found[:2]),
      seconds=sum(r['seconds'] for r in found), cycles=sum(
          r['cycles'] / k for r, k in zip(found, every)))


def one(topology, mesh, lowered) -> dict:
  began = time.time()
  with tempfile.TemporaryDirectory() as dump:
    try:
      compiled = lowered.compile({'xla_dump_to': dump})
    except jax.errors.JaxRuntimeError as e:
      if 'RESOURCE_EXHAUSTED' not in str(e):
        raise
      found = re.search(r'Used ([\d.]+)G of|([\d.]+)G\) exceeds', str(e))
      needs = float(next(x for x in found.groups() if x)) if found else None
      return dict(fits=False, memory=needs)
    reports = glob.glob(dump + '/*memory-usage-report.txt')
    total = re.search(r'Total bytes: (\d+)', Path(reports[0]).read_text()) if (
        reports and topology != 'a100') else None
  m, text = compiled.memory_analysis(), compiled.as_text()
  memory = int(total[1]) if total else harness.held(m)
  kinds = dict(re.findall(
      r'channel_id=(\d+).*?metadata=\{op_name="([^"]*)"', text))
  return dict(
      fits=memory < HBM[topology.split(':')[0]] * 2**30, memory=memory / 2**30,
      kept=m.alias_size_in_bytes / m.argument_size_in_bytes,
      cycles=cycles(text), collectives=len(kinds),
      seconds=round(time.time() - began, 1))


def cycles(text: str) -> float:
  """Estimated cycles of a TPU program, loop bodies times their trip counts."""
  bodies, name = {}, None
  for line in text.splitlines():
    start = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    if start:
      name = 'ENTRY' if start[1] else start[2]
      bodies[name] = []
    elif name:
      bodies[name].append(line)

  @functools.cache
  def of(name):
    total = 0
    for line in bodies.get(name, ()):
      cost = re.search(r'"estimated_cycles":"(\d+)"', line)
      total += int(cost[1]) if cost else 0
      loop = re.search(r' while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)',
                       line)
      if loop:
        total += trips(loop[1]) * of(loop[2])
    return total

  def trips(condition):
    bounds = re.findall(r's32\[\][^ ]* constant\((\d+)\)',
                        '\n'.join(bodies[condition]))
    return max(map(int, bounds), default=1)
  return float(of('ENTRY'))


# --- one matrix, in the forms that a step could take ------------------------


def forms() -> list[dict]:
  """Mega-cycles of x @ (W + c*z) and W += c*z, OPT-30B's largest matrix."""
  mesh = mesh_of('v5p:1x1x1', (1, 1, 1))
  at = NamedSharding(mesh, P())
  like = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=at)
  w = like((7168, 28672), jnp.bfloat16)
  x = like((4096, 7168), jnp.bfloat16)
  seed, c = like((), jnp.uint32), like((), jnp.float32)

  def cost(fn, *args, donate=()):
    return cycles(jax.jit(fn, donate_argnums=donate, out_shardings=at).lower(
        *args).compile().as_text()) / 1e6

  rows, plain = [], cost(lambda w, x: x @ w, w, x)
  for generator in ('hash32', 'threefry2x32'):
    for kind in ('normal', 'rademacher'):
      def moved(w, seed, c, z=KINDS[kind](generator)):
        keys = jax.random.key(seed, impl='threefry2x32')[None]
        stream = _streams.of_leaf(keys, 'w', w.shape)
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
          'W += cz': cost(moved, w, seed, c, donate=0)})
      print(rows[-1], flush=True)
  return rows


def main():
  if sys.argv[1:2] == ['--one']:  # a process of its own: compilers keep memory
    topology, sizes, shape, *rest = json.loads(sys.argv[2])
    print(json.dumps(report(topology, tuple(sizes), shape, *rest)))
    return
  rows, short = [], '--short' in sys.argv
  for topology, sizes, shape, tokens, programs in CASES:
    if short != (tokens < 256):
      continue
    if topology == 'a100' and '--cuda' not in sys.argv:
      continue
    base = None
    for program in programs:
      done = subprocess.run(
          [sys.executable, __file__, '--one',
           json.dumps([topology, sizes, shape, tokens, program])],
          capture_output=True, text=True)
      if done.returncode:
        sys.exit(f'{topology} {shape} {program} failed:\n{done.stderr[-2000:]}')
      r = json.loads(done.stdout.splitlines()[-1])
      base = base or r
      cost, memory = r.get('cycles'), r['memory']
      row = {
          'device': topology, 'mesh': 'x'.join(map(str, sizes)),
          'shape': shape, 'tokens': f'{ROWS} x {tokens}', 'program': program,
          'GiB a device': round(memory, 2) if memory else '',
          '/ inference': round(memory / base['memory'], 3) if memory else '',
          'fits': 'yes' if r['fits'] else 'no',
          'cycles / two forwards': round(cost / base['cycles'] / 2, 3)
                                   if cost else '',
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
