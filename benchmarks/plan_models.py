"""Lists which TPU slices and GPUs hold which models, by compiling for them.

  pip install -e '.[plan]'
  python benchmarks/plan_models.py [--cuda | --offload] [MODEL ...]

It uses `mezo_jax.planning.plan`: programs are compiled and not run. They are
MeZO of all parameters (normal directions), inference (a forward pass of the
same batch) and backprop (SGD, with each layer rematerialised), in bfloat16,
with 16 rows of 256 tokens and two label words, on the mesh that `plan` chooses.
If the weights alone do not fit, nothing is compiled. A second table has the
smallest slice of each kind for MeZO. `--cuda` adds an A100 and an H100 of 80
GB. Writes benchmarks/results/plan_models.md and .json after every model.

`--offload` instead compiles, for one v5e, models whose layers are in the memory
of the host, and writes plan_offload.md and .json.
"""

import json
import subprocess
import sys

import harness
import jax

from mezo_jax.planning import machines, plan
from mezo_jax.tasks import Task
from mezo_jax.training.config import Data, Model, Optimizer, Train
from mezo_jax.training.methods import METHODS

MODELS = ('facebook/opt-13b', 'facebook/opt-30b', 'facebook/opt-66b',
          'facebook/opt-175b', 'meta-llama/Meta-Llama-3-8B',
          'meta-llama/Meta-Llama-3-70B', 'Qwen/Qwen3-32B',
          'google/gemma-3-27b-pt')
SLICES = ('v5p:1x1x1', 'v5e:4x4', 'v5e:8x8', 'v5e:16x16', 'v6e:2x4', 'v6e:4x4')
CARDS = ('a100:1', 'h100:1')
OFFLOADED = ('facebook/opt-13b', 'facebook/opt-175b')
TOKENS = 256
STEP = ('losses', 'update')


def config_of(model: str, method: str = 'mezo') -> Train:
  """Returns the config of a run of a model; its data are never read."""
  return Train(
      method=method,
      model=Model(model, 'bfloat16', remat=METHODS[method].backprop),
      task=Task(template='{text} It was', label_words=(' terrible', ' great')),
      data=Data(train='not read', batch_size=16, num_train=100, num_dev=100),
      optimizer=Optimizer(name='sgd'))


def report(model: str, topology: str, method: str) -> dict:
  """Returns the memory of one device in GiB, and more, for one case.

  The memory is None if the compiler ran out of it.
  """
  backprop = METHODS[method].backprop
  found = plan.plan(
      config_of(model, method), topology, tokens=TOKENS,
      wanted=lambda name: name != 'evaluation' and (
          not backprop or name != 'inference'))
  gib = lambda size: None if size == float('inf') else size / plan.GIB
  kinds = lambda name: {
      kind: n for kind, (n, _) in found.programs[name].collectives.items()}
  out = dict(
      peak=gib(found.peak(*(('step',) if backprop else STEP))),
      limit=found.limit / plan.GIB, mesh=plan.spell_mesh(vars(
          found.config.mesh)), fits=all(
              p.fits for name, p in found.programs.items()
              if name != 'inference'),
      seconds=sum(p.seconds for p in found.programs.values()))
  out['fits'] &= out['peak'] is not None and out['peak'] < out['limit']
  if not backprop:
    base = found.programs['inference']
    out |= dict(inference=gib(found.peak('inference')),
                cycles=found.cycles / base.cycles / 2,
                collectives=[kinds('inference'), kinds('losses'),
                             kinds('update')])
  return out


def alone(*case: str) -> dict:
  """Calls `report` in a new process, since compilers do not free memory."""
  done = subprocess.run(
      [sys.executable, __file__, '--one', json.dumps(case)],
      capture_output=True, text=True, env=harness.on_cpu())
  if done.returncode:
    sys.exit(f'{case} failed:\n{done.stderr[-2000:]}')
  return json.loads(done.stdout.splitlines()[-1])


def weights(model: str) -> float:
  """Returns the size of a model's weights in bfloat16, in GiB."""
  shapes = jax.tree.leaves(harness.shapes_of(model))
  return sum(x.size for x in shapes) * 2 / plan.GIB


def row_of(model: str, topology: str) -> dict:
  """Returns a row of the first table."""
  kind, n = machines.split(topology)[0], machines.size(topology)
  row = {'model': model.split('/')[1], 'devices': topology}
  share = weights(model) / n
  if share > kind.memory:
    return row | {'MeZO, GiB a device': f'weights alone {share:.1f}',
                  'of': kind.memory, 'fits': 'no'}
  r = alone(model, topology, 'mezo')
  spell = lambda x: f'{x:.2f}' if x else 'far too many'
  row |= {'mesh': r['mesh'], 'MeZO, GiB a device': spell(r['peak']),
          'of': r['limit'], 'fits': 'yes' if r['fits'] else 'no',
          '/ inference': f'{r["peak"] / r["inference"]:.3f}' if (
              r['peak'] and r['inference']) else ''}
  b = alone(model, topology, 'finetune')
  row |= {'SGD, GiB': spell(b['peak']),
          'SGD fits': 'yes' if b['fits'] else 'no'}
  if r['cycles'] == r['cycles'] and r['fits']:
    row['cycles / two forwards'] = f'{r["cycles"]:.2f}'
  before, losses, update = r['collectives']
  row['collectives: inference; losses; update'] = '; '.join(
      ' '.join(f'{n} {kind}' for kind, n in some.items()) or '-'
      for some in (before, losses, update))
  return row | {'s to compile': round(r['seconds'] + b['seconds'])}


def smallest(model: str, kinds: list[str]) -> dict:
  """Returns the smallest slice of each kind into which MeZO fits."""
  row = {'model': model.split('/')[1], 'weights, GiB': round(weights(model), 1)}
  for kind in kinds:
    info, row[kind] = machines.KINDS[kind], 'none'
    for shape in info.slices:
      topology = f'{kind}:{shape}'
      if weights(model) / machines.size(topology) > info.memory:
        continue
      r = alone(model, topology, 'mezo')
      if r['fits']:
        row[kind] = f'{shape}: {r["peak"]:.1f} of {info.memory:g}'
        break
  return row


def offloaded(model: str) -> dict:
  """Returns a row for a model whose layers are in the host's memory."""
  config = config_of(model)
  config.model.offload = True
  found = plan.plan(config, 'v5e:1x1', tokens=TOKENS)
  gib = lambda size: round(size / plan.GIB, 2)
  layers = found.model.num_layers
  return {
      'model': model.split('/')[1], 'devices': found.topology,
      'on the host, GiB': gib(found.on_host),
      'a layer of them': gib(found.on_host / layers),
      'weights on the device': gib(found.resident['weights']),
      **{name: gib(found.peak(name)) for name in found.programs},
      'of': found.limit / plan.GIB, 'fits': 'yes' if found.fits else 'no',
      's to compile': round(sum(p.seconds for p in found.programs.values()))}


def main():
  if sys.argv[1:2] == ['--one']:
    print(json.dumps(report(*json.loads(sys.argv[2]))))
    return
  if '--offload' in sys.argv:
    jax.config.update('jax_platforms', 'cpu')
    rows = []
    for model in sys.argv[2:] or OFFLOADED:
      rows.append(offloaded(model))
      print(rows[-1], flush=True)
    harness.write(
        'plan_offload', f'Compilers only, nothing run: jax {jax.__version__}, '
        f'bfloat16, 16 rows of {TOKENS} tokens (evaluation: 32)', [(
            'Layers in the memory of the host, GiB on the device at the peak '
            'of each program:', rows)])
    return
  cuda = '--cuda' in sys.argv
  models = [m for m in sys.argv[1:] if not m.startswith('--')] or MODELS
  rows, least = [], []
  for model in models:
    for topology in SLICES + CARDS * cuda:
      rows.append(row_of(model, topology))
      print(rows[-1], flush=True)
    least.append(smallest(model, ['v5e', 'v6e', 'v5p'] + ['h100'] * cuda))
    print(least[-1], flush=True)
    columns = max(rows, key=len)
    table = [{name: row.get(name, '') for name in columns} for row in rows]
    harness.write(
        'plan_models', f'Compilers only, nothing run: jax {jax.__version__}, '
        f'bfloat16, 16 rows of {TOKENS} tokens', [
            ('Memory of one device:', table),
            ('The smallest slice for MeZO, and GiB a device:', least)])


if __name__ == '__main__':
  main()
