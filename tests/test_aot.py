"""What the TPU compiler says of real shapes; skipped without libtpu.

  pip install -e '.[plan]' && python -m pytest tests/test_aot.py
"""

import ast
import json
from pathlib import Path
import subprocess
import sys

import pytest

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
