"""Signals: what is saved, how soon a run ends, and with which status."""

import contextlib
import os
import signal
import subprocess
import sys

import conftest
import helpers
import pytest
import runs

from mezo_jax.core.errors import AGAIN, Again
from mezo_jax.runs import preemption
import train

_RUN = '''
import hashlib, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from mezo_jax.runs import preemption, replay
preemption.GRACE = 0.3
log, _ = replay.open_log(pathlib.Path(sys.argv[1]), {{}}, 1)
log.append(1, 0.5, 0.7)
with preemption.watched(log) as wanted:
  print('there', flush=True)
  {}
'''


def told_to_stop(tmp_path, body: str, number) -> tuple[str, int]:
  """What a run says, and its status, that is sent a signal while in ``body``.
  """
  process = subprocess.Popen(
      [sys.executable, '-c', _RUN.format(body), str(tmp_path / 'steps.log')],
      env=os.environ | {'JAX_PLATFORMS': 'cpu'}, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  assert process.stdout.readline() == 'there\n'
  process.send_signal(number)
  return process.communicate(timeout=60)[0], process.returncode


@pytest.mark.processes
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_compiles_ends_at_once(tmp_path, number):
  """In a call that no handler of Python's interrupts, for minutes."""
  said, status = told_to_stop(
      tmp_path, "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)", number)
  assert status == AGAIN
  assert 'mezo-jax: ' in said and 'step 1 is saved' in said
  assert 'Traceback' not in said


@pytest.mark.processes
def test_a_run_that_saves_has_the_time_to(tmp_path):
  said, status = told_to_stop(
      tmp_path, "while not wanted(1): time.sleep(0.01)\n"
      "  time.sleep(1)\n  print('saved')", signal.SIGTERM)
  assert (said, status) == ('saved\n', 0)


@pytest.mark.processes
def test_a_second_signal_ends_it(tmp_path):
  said, status = told_to_stop(
      tmp_path, "while not wanted(1): time.sleep(0.01)\n"
      "  os = __import__('os'); os.kill(os.getpid(), 15); time.sleep(60)",
      signal.SIGTERM)
  assert status == -signal.SIGTERM


@pytest.mark.processes
@pytest.mark.parametrize('args,after', [
    (['train.py', '--workdir=run'], ' numpy'),
    (['-m', 'mezo_jax', 'train', '--workdir=run'], ' mezo_jax')])
def test_ctrl_c_while_importing_has_no_traceback(args, after, tmp_path):
  args = [str(conftest.ROOT / x) if x == 'train.py' else x for x in args]
  process = subprocess.Popen(
      [sys.executable, '-X', 'importtime', *args], cwd=tmp_path, text=True,
      env=os.environ | {'PYTHONPATH': str(conftest.ROOT)},
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
  for line in process.stderr:
    if line.rstrip().endswith(after):
      break
  process.stderr.readline()  # of what is imported next
  process.send_signal(signal.SIGINT)
  said = process.communicate(timeout=60)[1]
  assert process.returncode == -signal.SIGINT
  assert 'Traceback' not in said and not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_where_a_step_is_evaluated_it_stops_before(
    tiny_dir, reviews_file, tmp_path, monkeypatch):
  """An evaluation may be long; the run that goes on makes it."""
  config = runs.small_config(
      tiny_dir, reviews_file, zero_shot=False, checkpoint_every=2)
  train.run(config, tmp_path / 'a')
  for step in (3, 6):
    with monkeypatch.context() as m, pytest.raises(Again, match=f'step {step}'):
      m.setattr(preemption, 'watched', lambda log, step=step: (
          contextlib.nullcontext(lambda at: at == step)))
      train.run(config, tmp_path / 'b')
    assert not [r for r in runs.records(tmp_path / 'b')
                if r['kind'] == 'dev' and r['step'] == step]
  train.run(config, tmp_path / 'b')
  assert runs.records(tmp_path / 'b') == runs.records(tmp_path / 'a')
  helpers.assert_bitwise(runs.saved(tmp_path / 'a')[1],
                         runs.saved(tmp_path / 'b')[1])
