"""Runs of train.py that are replicas of one."""

import json
import shutil
import subprocess
import time

import numpy as np
import pytest
from runs import command, environment, small_config, use_devices

from mezo_jax.core.errors import InputError
from mezo_jax.distributed import replicas
from mezo_jax.runs import replay
from mezo_jax.training import config as config_lib
import train


@pytest.mark.parametrize('change,match', [
    (dict(method='finetune'), 'method'),
    (dict(spsa__num_samples=3), 'multiple'),
    (dict(spsa__combine='fzoo', spsa__num_samples=2), 'fzoo')])
def test_what_cannot_be_shared_out_is_refused(change, match, tiny_dir,
                                              reviews_file):
  config = small_config(tiny_dir, reviews_file, **change)
  with pytest.raises(InputError, match=match):
    replicas.check_replicas(
        replicas.Place(0, 2, 'x', 1.0), config.method, ('mezo',),
        config.spsa.combine, config.spsa.num_samples)


def test_flags():
  assert replicas.place(None, None, None, 1.0) is None
  with pytest.raises(InputError, match='--replicas'):
    replicas.place(2, None, 'x', 1.0)
  with pytest.raises(InputError, match='--replica'):
    replicas.place(2, 2, 'x', 1.0)
  with pytest.raises(InputError, match='--exchange.*a directory'):
    replicas.place(2, 0, 'host-a:9876', 1.0)


@pytest.mark.processes
def test_two_runs_of_train_py_are_one(
    tiny_dir, reviews_file, tmp_path, monkeypatch, capsys):
  """One is killed and its directory lost; both logs have the same numbers."""
  shared = tmp_path / 'shared'
  model = tmp_path / 'the same elsewhere'
  shutil.copytree(tiny_dir, model)
  def begin(i, name):
    return subprocess.Popen(
        [*command(model if i else tiny_dir, reviews_file, tmp_path / name,
                  '--config.steps=30', '--config.eval_every=10',
                  '--config.zero_shot=False', '--config.spsa.num_samples=2'),
         '--replicas=2', f'--replica={i}', f'--exchange={shared}',
         '--exchange_timeout=120'],
        env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  one, two = begin(0, 'a'), begin(1, 'b')
  try:
    log = shared / 'replica-1.log'
    while two.poll() is None and not (
        log.exists() and log.stat().st_size > 16 * 24):
      time.sleep(0.01)
    two.kill()
    three = begin(1, 'c')
    ends = [p.communicate(timeout=300)[0] for p in (one, three)]
  finally:
    for p in (one, two, three):
      p.kill()
  for text, p in zip(ends, (one, three)):
    assert p.returncode == 0, text
    assert 'final (step' in text
  assert 'from the other replicas' in ends[1]
  config = config_lib.from_json(
      json.loads((tmp_path / 'a' / 'config.json').read_text()))
  use_devices(monkeypatch, 1)
  train.run(config, tmp_path / 'a', replicas.Place(  # alone: it has all
      0, 2, shared, 120.0))
  assert capsys.readouterr().out.count('final (step') == 1
  one, two = (replay.read(tmp_path / name / 'steps.log').steps for name in 'ac')
  for a, b in zip(one, two):
    np.testing.assert_array_equal(a, b)
