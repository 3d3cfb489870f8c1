"""What the TPU compiler says of real shapes; skipped without libtpu.

  pip install -e '.[plan]' && python -m pytest -m tpu tests/test_aot.py
"""

import ast
import json
from pathlib import Path
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.tpu, pytest.mark.as_shipped]

SCRIPT = Path(__file__).parents[1] / 'benchmarks' / 'aot.py'
UNROLLED = SCRIPT.with_name('aot_unrolled.py')


def report(*case):
  done = subprocess.run([sys.executable, SCRIPT, '--one', json.dumps(case)],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('topology,mesh,shape,cycles', [
    ('v5p:1x1x1', (1, 1, 1), 'OPT-30B', 1.25),
    ('v5e:8x8', (1, 8, 8), 'OPT-30B', 1.20),
    ('v6e:4x4', (1, 4, 4), 'OPT-66B', 1.35)])
def test_a_step_is_inference_twice(topology, mesh, shape, cycles):
  """Memory within 2 % of inference, parameters updated in place, the cycles
  asked for."""
  pytest.importorskip('libtpu')
  case = topology, mesh, shape, 256
  forward = report(*case, 'inference')
  step = report(*case, 'MeZO rademacher')
  assert step['memory'] <= 1.02 * forward['memory']
  assert step['kept'] > 0.999
  assert step['cycles'] <= cycles * 2 * forward['cycles']


def test_offloaded_layers_are_on_the_chip_a_few_at_a_time():
  """Of 24: at the peak the embeddings and less than three."""
  pytest.importorskip('libtpu')
  code = '''
import dataclasses, json, sys
import jax
jax.config.update('jax_platforms', 'cpu')
from mezo_jax.planning import plan
from plan_models import config_of
config = config_of('facebook/opt-1.3b')
config.model.offload = True
found = plan.plan(config, 'v5e:1x1', tokens=32,
                  wanted=lambda name: name in ('losses', 'update'))
print(json.dumps([found.peak(), found.resident['weights'], found.on_host]))
'''
  done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                        text=True, cwd=SCRIPT.parent)
  assert done.returncode == 0, done.stderr[-2000:]
  peak, resident, away = json.loads(done.stdout.splitlines()[-1])
  assert resident < away / 8
  assert peak < resident + 3 * away / 24


@pytest.mark.parametrize('topology,package', [
    ('v5p:1x1x1', 'libtpu'), ('a100:1', 'jax_cuda12_plugin')])
def test_layers_that_are_not_scanned_are_built_one_at_a_time(topology, package):
  """Twelve of them: the forward and one; one is 0.07 of the weights."""
  pytest.importorskip(package)
  done = subprocess.run([sys.executable, UNROLLED, topology],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  row = ast.literal_eval(done.stdout.splitlines()[-1])
  for z in ('normal', 'rademacher'):
    assert row[f'step, {z} z'] < row['forward'] + 0.1
