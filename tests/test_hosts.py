"""Several processes: how they join, agree, and notice that one is gone."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import helpers
import jax
import pytest

from mezo_jax.core.errors import AGAIN, InputError
from mezo_jax.distributed import hosts

_RUN = '''
import os, sys, time
import jax
from mezo_jax.distributed import agreement
from mezo_jax.distributed import hosts
from mezo_jax.core.errors import InputError, in_one_sentence
hosts.join()
i = jax.process_index()
with hosts.watch('prog'), in_one_sentence('prog'):
  print('there', flush=True)
  {}
'''


def environment(i: int, count: int, port: int) -> dict:
  return {'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
          'JAX_NUM_PROCESSES': str(count), 'JAX_PROCESS_ID': str(i)}


def started(body: str, count: int) -> list[subprocess.Popen]:
  """So many processes, each in ``body``."""
  port = helpers.free_port()
  processes = [subprocess.Popen(
      [sys.executable, '-c', _RUN.format(body)], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
      | environment(i, count, port)) for i in range(count)]
  for p in processes:
    while (line := p.stdout.readline()) != 'there\n':
      assert re.search(r'^\[Gloo\]|: joining the others at |'
                       'experimental recoverable task feature', line), (
                           line + p.stdout.read())
  return processes


def ended(processes) -> list[tuple[str, int]]:
  late = [threading.Timer(120, p.kill) for p in processes]
  for timer in late:
    timer.start()
  try:  # not communicate(), which does not see what was read ahead
    return [(re.sub(r'(?m)^\[Gloo\].*\n', '', p.stdout.read()), p.wait())
            for p in processes]
  finally:
    for timer in late:
      timer.cancel()


@pytest.mark.processes
@pytest.mark.parametrize('dead', [0, 2])
def test_a_process_that_dies_ends_the_others(dead):
  """In the midst of what no handler of Python's interrupts, within 30 seconds
  and with one sentence."""
  processes = started("__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', "
                      '10**9)', 3)
  began = time.time()
  processes[dead].send_signal(signal.SIGKILL)
  found = ended(processes)
  assert time.time() - began < 30
  text = (f'prog: process {dead} of 3 exited (see its output). Restart all '
          'processes to resume.\n')
  for i, (said, status) in enumerate(found):
    if i == dead:
      assert status == -signal.SIGKILL
      continue
    assert status == AGAIN
    if dead:
      assert said == text
    else:  # JAX's own service has gone too, and JAX logs that first.
      assert said.endswith(text)


@pytest.mark.exhaustive
@pytest.mark.processes
def test_an_abort_of_this_process_is_no_death_of_another():
  """A job must not requeue itself for a crash."""
  (_, one), (_, two) = ended(started(
      'os.abort() if i else time.sleep(600)', 2))
  assert (one, two) == (AGAIN, -signal.SIGABRT)


@pytest.mark.processes
def test_an_error_of_one_is_said_and_does_not_hang():
  (first, one), (second, two) = ended(started(
      "if i: raise InputError('no file x.')\n  time.sleep(600)", 2))
  assert (second, two) == ('prog: no file x.\n', 1)
  # A job must not requeue itself for what one of its processes cannot do.
  assert (first, one) == (
      'prog: process 1 of 2 failed (see its output).\n', 1)


@pytest.mark.processes
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_one_stops_all_after_the_same_step(number, tmp_path):
  if signal.getsignal(number) == signal.SIG_IGN:
    pytest.skip('the tests were started with nohup')
  processes = started('''
  signal = __import__('signal')
  signal.signal(signal.SIGINT, signal.default_int_handler)
  from mezo_jax.runs import preemption, replay
  with preemption.watched(replay.Log(None, {}, replay.no_steps(1))) as wanted:
    print('in the loop', flush=True)
    for step in range(10000):
      time.sleep(0.01 + i / 50)
      if wanted(step):
        print('saved', step)
        break
''', 2)
  for p in processes:
    while p.stdout.readline() != 'in the loop\n':
      pass
  processes[1].send_signal(number)
  # JAX has a line of its own for a signal.
  found = [(re.findall(r'(?m)^saved \d+$', said), status)
           for said, status in ended(processes)]
  assert found[0] == found[1] and len(found[0][0]) == 1, found
  assert found[0][1] == 0


@pytest.mark.processes
def test_what_they_do_not_agree_on():
  """All hear of it; and what ends well says nothing more."""
  body = '''
  import pathlib
  try:
    agreement.agree('the config', lambda: 'ab12', 'start the same')
    agreement.agree('the config', lambda: 'ab1%d' % i, 'start the same command')
  except InputError as e:
    print(e)
  try:
    agreement.agree_on('the config', {'seed': 0, 'spsa': {'eps': i, 'rank': 1}},
                   'start the same command')
  except InputError as e:
    print(e)
  agreement.check_shared(pathlib.Path('.'))
  try:
    agreement.check_shared(pathlib.Path('.' if i != 1 else '/'))
  except InputError as e:
    print(e)'''
  found = ended(started(body, 3))
  for i, (said, status) in enumerate(found):
    assert status == 0
    digests, values, shared = said.splitlines()
    for line in (digests, values):
      assert line.startswith('process 1, 2 and process 0 differ in the config')
      assert line.endswith(': start the same command.')
    assert f'spsa.eps (here {i})' in values and 'rank' not in values
    assert re.match('process 1 .*the working directory of process 0, '
                    + ('/' if i == 1 else r'\.'), shared)


@pytest.mark.parametrize('given,message', [
    (dict(coordinator='a:1'), '--num_processes and --process_id must be'),
    (dict(num_processes=2, process_id=0), '--coordinator must be given'),
    (dict(coordinator='a:1', num_processes=2, process_id=2), '_id is 2'),
    (dict(coordinator='a', num_processes=2, process_id=0), 'HOST:PORT'),
    (dict(coordinator='a:', num_processes=2, process_id=0), 'HOST:PORT'),
    (dict(coordinator=':1', num_processes=2, process_id=0), 'HOST:PORT'),
    (dict(coordinator='a:0', num_processes=2, process_id=0), '1 to 65535'),
    (dict(coordinator='a:70000', num_processes=2, process_id=0), '1 to 65535'),
    (dict(coordinator='a:-1', num_processes=2, process_id=0), '1 to 65535'),
    (dict(), '--distributed .*--coordinator=HOST:PORT')])
def test_what_cannot_be_joined(given, message, monkeypatch):
  for name in ('JAX_COORDINATOR_ADDRESS', 'MASTER_ADDR'):
    monkeypatch.delenv(name, raising=False)
  with pytest.raises(InputError, match=message):
    hosts.join(**given)


def test_a_port_that_somebody_else_has():
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(InputError, match=f'--coordinator.* port {port} '):
      hosts.join(f'127.0.0.1:{port}', 2, 0)


@pytest.mark.exhaustive_except(platforms=['cpu,foo'])
@pytest.mark.processes
@pytest.mark.parametrize('platforms', ['cuda', 'tpu', 'cdua', 'cpu,foo'])
def test_devices_that_are_not_there(platforms):
  """In one sentence; each of these is another error of JAX."""
  if platforms in ('cuda', 'tpu') and any(
      d.platform != 'cpu' for d in jax.devices()):
    pytest.skip('they are there')
  found = subprocess.run(
      [sys.executable, '-m', 'mezo_jax', 'export', 'nowhere', 'out'], text=True,
      env=os.environ | {'JAX_PLATFORMS': platforms}, capture_output=True)
  last = found.stderr.splitlines()[-1]
  assert found.returncode == 1 and 'Traceback' not in found.stderr
  assert last.startswith('mezo-jax export: JAX finds no device')
  assert platforms in last


@pytest.mark.exhaustive_except(i=[1], host=['127.0.0.1'])
@pytest.mark.processes
@pytest.mark.parametrize('i,host', [
    (0, '127.0.0.1'), (1, '127.0.0.1'), (1, 'no-such-host.invalid')])
def test_others_that_do_not_come(i, host):
  """It is said at once what is waited for, and the end is a sentence."""
  port = helpers.free_port()
  found = subprocess.run(
      [sys.executable, '-c', 'from mezo_jax.distributed import hosts\n'
       f'hosts.JOIN = 2\nhosts.join("{host}:{port}", 2, {i})'], text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True)
  assert found.returncode == 1
  first, *_, last = found.stderr.splitlines()
  assert first.startswith(f'process {i} of 2: joining the others at {host}')
  assert first.endswith(')') == (host != '127.0.0.1')  # says what is wrong
  assert f'{host}:{port}' in last and '--process_id' in last


@pytest.mark.processes
def test_processes_that_do_not_agree_on_their_number():
  port = helpers.free_port()
  processes = [subprocess.Popen(
      [sys.executable, '-c', _RUN.format('time.sleep(600)')], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ
      | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
      | environment(i, 2 + i, port)) for i in range(2)]
  (_, one), (said, two) = ended(processes)
  assert (one, two) == (AGAIN, 1)
  assert '--num_processes is 3 here and 2 on process 0' in said


@pytest.mark.parametrize('env', [
    {'JAX_COORDINATOR_ADDRESS': 'h:7', 'JAX_NUM_PROCESSES': '4',
     'JAX_PROCESS_ID': '3'},
    {'MASTER_ADDR': 'h', 'MASTER_PORT': '7', 'WORLD_SIZE': '4', 'RANK': '3'}])
def test_what_the_environment_tells(env, monkeypatch):
  for name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES',
               'JAX_PROCESS_ID'):
    monkeypatch.delenv(name, raising=False)
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  told = []
  monkeypatch.setattr(hosts.jax.distributed, 'initialize',
                      lambda *args, **kwargs: told.append(args))
  monkeypatch.setattr(hosts.jax, 'process_count', lambda: 4)
  hosts.join()
  hosts.join(process_id=1)
  assert told == [('h:7', 4, 3), ('h:7', 4, 1)]
  number, process = [*env][-2:]
  monkeypatch.setenv(number, 'many')
  with pytest.raises(InputError, match=f"{number} is 'many'"):
    hosts.join()
  if 'MASTER_ADDR' not in env:  # a cluster tells the rest
    monkeypatch.delenv(number)
    monkeypatch.delenv(process)
    hosts.join()
    assert told[-1] == (None, None, None)
