"""The examples run, learn, and differ from the usual loop by ten lines."""

import difflib
import os
import subprocess
import sys

import conftest
import pytest

pytestmark = pytest.mark.processes

FOLDER = conftest.ROOT / 'examples'


@pytest.mark.exhaustive_except(name=['linen'])
@pytest.mark.parametrize('name', ['linen', 'nnx'])
def test_examples(name):
  done = subprocess.run(
      [sys.executable, str(FOLDER / f'{name}.py')], capture_output=True,
      text=True, env=os.environ | {'PYTHONPATH': str(conftest.ROOT)},
      timeout=400)
  assert done.returncode == 0, done.stderr
  losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
  assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize('name', ['linen', 'nnx'])
def test_ten_lines_turn_backprop_into_mezo(name):
  before, after = ((FOLDER / f'{name}{s}.py').read_text().splitlines()
                   for s in ('_backprop', ''))
  assert len(after) < 60
  changed = [line for line in difflib.ndiff(before, after)
             if line.startswith('+ ') and line[2:].strip()]
  assert 0 < len(changed) <= 10
