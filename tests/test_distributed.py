"""train.py on two processes: the run of one process with as many devices."""

import json
import os
import shutil
import socket
import subprocess

import conftest
import helpers
import numpy as np
import pytest
from runs import command, records

from mezo_jax import models
from mezo_jax.export import export

SETTINGS = ['--config.steps=6', '--config.eval_every=3',
            '--config.optimizer.learning_rate=1e-4', '--config.select=loss',
            '--config.optimizer.schedule=constant', '--config.zero_shot=False',
            '--config.data.max_length=8']


def run(processes, cache, *args):
  """Runs train.py on so many processes, with two devices in all; the output of
  each, which ended well."""
  env = os.environ | {
      'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(2 // processes),
      'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'XLA_FLAGS': conftest.QUICK_FLAGS,
      'JAX_COMPILATION_CACHE_DIR': str(cache),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  started = []
  for i in range(processes):
    slurm = {} if processes == 1 else {
        'SLURM_JOB_ID': '1', 'SLURM_STEP_NODELIST': '127.0.0.1',
        'SLURM_NTASKS': str(processes), 'SLURM_PROCID': str(i),
        'SLURM_LOCALID': str(i), 'JAX_COORDINATOR_PORT': str(port),
        'JAX_COORDINATOR_BIND_ADDRESS': f'127.0.0.1:{port}'}
    more = ['--distributed'] if slurm else []
    started.append(subprocess.Popen(
        [*command(*args), *more], env=env | slurm, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
  try:
    outputs = [p.communicate(timeout=400)[0] for p in started]
  finally:
    for p in started:
      p.kill()
  for p, output in zip(started, outputs):
    assert p.returncode == 0, output
  return outputs


@pytest.fixture(scope='module')
def workdirs(reviews_file, tmp_path_factory):
  """Runs of one process, and of two that stopped half way; the outputs."""
  where = tmp_path_factory.mktemp('distributed')
  model = conftest.write_tiny_model(
      where / 'm', hidden_size=256, intermediate_size=512)  # is split
  cache, one, two = (where / name for name in ('cache', 'one', 'two'))
  run(1, cache, model, reviews_file, one, *SETTINGS)
  run(2, cache, model, reviews_file, two, *SETTINGS, '--config.steps=3')
  shutil.rmtree(two / 'checkpoints')  # the log is enough
  outputs = run(2, cache, model, reviews_file, two, *SETTINGS)
  return one, two, outputs


def test_two_processes_train_as_one_does(workdirs):
  one, two, outputs = workdirs
  assert 'resumed from step 3' in outputs[0] and '2 cpu device' in outputs[0]
  mine, theirs = records(two), records(one)
  assert [(r['kind'], r['step']) for r in mine] == [
      ('train', 1), ('train', 2), ('train', 3), ('dev', 3), ('train', 4),
      ('train', 5), ('train', 6), ('dev', 6)]
  np.testing.assert_allclose(
      [r['loss'] for r in mine], [r['loss'] for r in theirs], rtol=1e-5)
  results = [json.loads((w / 'result.json').read_text())['final']
             for w in (one, two)]
  np.testing.assert_allclose(
      [*results[0].values()], [*results[1].values()], rtol=1e-5)


def test_one_process_says_what_there_is_to_say(workdirs):
  first, second = workdirs[2]
  assert 'final (step' in first
  for text in ('step 6: dev', 'final (step', 'model: '):
    assert text not in second


def test_one_process_reads_what_two_have_saved(workdirs, tmp_path):
  params = [models.load(export(w, tmp_path / w.name, step=6), progress=False)[1]
            for w in workdirs[:2]]
  helpers.assert_close(*params, rtol=0, atol=1e-6)
