"""The directory of a run: for one run alone, and only what can be written."""

import os
import signal
import subprocess
import sys

import pytest
import runs

from mezo_jax.core.errors import InputError
from mezo_jax.runs import workdir as workdir_lib
import train


@pytest.mark.slow
def test_a_directory_is_of_one_run(tiny_dir, reviews_file, tmp_path):
  config = runs.small_config(tiny_dir, reviews_file, steps=1, eval_every=1)
  with workdir_lib.alone(tmp_path):
    with pytest.raises(InputError, match='another run'):
      train.run(config, tmp_path)
  train.run(config, tmp_path)


@pytest.mark.processes
def test_a_dead_run_holds_no_directory(tmp_path):
  program = ('import pathlib, sys, time\n'
             'from mezo_jax.runs import workdir\n'
             f'with workdir.alone(pathlib.Path({str(tmp_path)!r})):\n'
             '  print("held", flush=True)\n'
             '  time.sleep(600)\n')
  process = subprocess.Popen(
      [sys.executable, '-c', program], stdout=subprocess.PIPE, text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  assert process.stdout.readline() == 'held\n'
  with pytest.raises(InputError, match='another run'), (
      workdir_lib.alone(tmp_path)):
    pass
  process.send_signal(signal.SIGKILL)
  process.wait()
  with workdir_lib.alone(tmp_path):
    pass


def test_a_directory_that_stays_empty_is_not_left(tmp_path):
  where = tmp_path / 'a' / 'b'
  with pytest.raises(InputError, match='bad'), workdir_lib.alone(where):
    raise InputError('bad')
  assert not where.exists()
  with workdir_lib.alone(where):
    (where / 'x').touch()
  assert (where / 'x').exists()


def test_what_is_no_directory_is_said_at_once(tmp_path, monkeypatch):
  file = tmp_path / 'file'
  file.touch()
  with pytest.raises(FileExistsError):  # in_one_sentence has one for it
    with workdir_lib.alone(file):
      pass
  monkeypatch.setattr(os, 'access', lambda *args: False)  # root may write all
  with pytest.raises(InputError, match=str(tmp_path)):
    with workdir_lib.alone(tmp_path):
      pass
