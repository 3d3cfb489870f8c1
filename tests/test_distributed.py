"""train.py on two processes: the run of one process with as many devices."""

import json
import os
import shutil
import subprocess
import time

import conftest
import helpers
import numpy as np
import pytest
from runs import command, records, use_devices

from mezo_jax import models
from mezo_jax.core.errors import AGAIN
from mezo_jax.export.from_run import export
from mezo_jax.training import config as config_lib
import train

pytestmark = pytest.mark.processes

SETTINGS = ['--config.steps=40', '--config.eval_every=20',
            '--config.optimizer.learning_rate=1e-4', '--config.select=loss',
            '--config.optimizer.schedule=constant', '--config.zero_shot=False',
            '--config.data.max_length=8']


def run(cache, *args, kill_after=None):
  """Runs train.py on two processes with a device each, of which the second is
  killed after so many steps; outputs and statuses."""
  env = os.environ | conftest.QUICK_ENVIRONMENT | {
      'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1',
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  port, started = helpers.free_port(), []
  for i in range(2):
    slurm = {
        'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': '127.0.0.1',
        'SLURM_NTASKS': '2', 'SLURM_PROCID': str(i),
        'SLURM_LOCALID': str(i), 'JAX_COORDINATOR_PORT': str(port),
        'JAX_COORDINATOR_BIND_ADDRESS': f'127.0.0.1:{port}'}
    started.append(subprocess.Popen(
        [*command(*args), '--distributed'], env=env | slurm, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
  try:
    if kill_after:
      metrics = args[2] / 'metrics.jsonl'
      while started[0].poll() is None and not (
          metrics.exists() and metrics.read_text().count('"train"')
          >= kill_after):
        time.sleep(0.005)
      started[-1].kill()
    return [(p.communicate(timeout=400)[0], p.returncode) for p in started]
  finally:
    for p in started:
      p.kill()


@pytest.fixture(scope='module')
def workdirs(reviews_file, tmp_path_factory):
  """Runs of this process, and of two of which one was killed on the way; what
  the two said, then and of the end."""
  where = tmp_path_factory.mktemp('distributed')
  model = conftest.write_tiny_model(
      where / 'm', hidden_size=256, intermediate_size=512)  # is split
  cache, one, two = (where / name for name in ('cache', 'one', 'two'))
  broken = run(cache, model, reviews_file, two, *SETTINGS, kill_after=13)
  shutil.rmtree(two / 'checkpoints', ignore_errors=True)  # the log is enough
  # On another mesh, where each has a sign of the step's.
  ends = run(cache, model, reviews_file, two, *SETTINGS,
             '--config.mesh.fsdp=1', '--config.mesh.direction=2')
  for output, status in ends:
    assert status == 0, output
  config = config_lib.from_json(json.loads((two / 'config.json').read_text()))
  config.mesh = config_lib.Mesh()
  with pytest.MonkeyPatch.context() as m:
    use_devices(m, 2)
    train.run(config, one)
  return one, two, broken, [output for output, _ in ends]


def test_a_process_that_is_killed_ends_the_other(workdirs):
  """With one sentence, soon, and the status that says: start me again."""
  (said, status), _ = workdirs[2]
  assert status == AGAIN, said
  assert said.endswith(
      'train.py: process 1 of 2 exited (see its output). Restart all processes '
      'to resume.\n')
  assert 'Traceback' not in said


def test_two_processes_train_as_one_does(workdirs):
  one, two, _, outputs = workdirs
  assert 'resumed from step ' in outputs[0] and '2 cpu device' in outputs[0]
  mine, theirs = records(two), records(one)
  assert [(r['kind'], r['step']) for r in mine] == [
      (r['kind'], r['step']) for r in theirs]
  assert [r['step'] for r in mine if r['kind'] == 'dev'] == [20, 40]
  np.testing.assert_allclose(
      [r['loss'] for r in mine], [r['loss'] for r in theirs], rtol=1e-5)
  results = [json.loads((w / 'result.json').read_text())['final']
             for w in (one, two)]
  np.testing.assert_allclose(
      [*results[0].values()], [*results[1].values()], rtol=1e-5)
  rows = [[json.loads(line) for line in (
      w / 'predictions.jsonl').read_text().splitlines()] for w in (one, two)]
  for row, other in zip(*rows, strict=True):
    np.testing.assert_allclose(
        [*row.pop('probabilities').values()],
        [*other.pop('probabilities').values()], atol=1e-5)
    assert row == other


def test_one_process_says_what_there_is_to_say(workdirs):
  first, second = workdirs[3]
  assert 'final (step' in first
  for text in ('step 40: dev', 'final (step', 'model: '):
    assert text not in second


def test_one_process_reads_what_two_have_saved(workdirs, tmp_path):
  params = [models.load(
      export(w, tmp_path / w.name, step=40), progress=False)[1]
            for w in workdirs[:2]]
  helpers.assert_close(*params, rtol=0, atol=1e-6)
