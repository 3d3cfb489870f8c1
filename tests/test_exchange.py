"""Replicas that exchange numbers: the same weights, whatever the network does.
"""

import contextlib
import hashlib
import random
import socket
import threading
import time

import helpers
import jax.numpy as jnp
import numpy as np
import pytest

import mezo_jax
from mezo_jax.core import fingerprint
from mezo_jax.core.errors import Again, InputError
from mezo_jax.distributed import exchange, mirror
from mezo_jax.runs import replay

STEPS = 200
X = np.random.RandomState(0).randn(64, 8).astype(np.float32)


def loss_fn(params, batch):
  return jnp.mean((batch @ params['w'] - 1.0) ** 2, -1)


def tx(num_samples=2):
  return mezo_jax.mezo(1e-2, 1e-3, key=0, num_samples=num_samples)


def batch_of(step):
  return X[8 * step % 56:][:8]


def start():
  return {'w': jnp.linspace(-1, 1, 32, dtype=jnp.float32).reshape(8, 4)}


def train(place, opened, until=STEPS, begin=None, fail_at=None):
  """A replica's steps; the sha256 of its weights. A catch-up is from what all
  have told; ``fail_at`` is the step before which it dies."""
  step = mezo_jax.make_step(tx(), loss_fn, part=place)
  params = start()
  state = tx().init(params)
  for t in range(1, until + 1):
    if t == fail_at:
      return None
    if t <= opened.known():
      g, value = opened.told(t)
    elif opened.has(t):
      g, value = opened.swap(t)
    else:
      g, value = opened.swap(t, *step.losses(params, state, batch_of(t)))
    params, state, _ = step.update(params, state, g, value)
  opened.mark(until, fingerprint.checksum(params))
  return hashlib.sha256(np.asarray(params['w']).tobytes()).hexdigest()


def together(*replicas):
  """What functions return that run at the same time."""
  out = [None] * len(replicas)
  def call(i, fn):
    try:
      out[i] = fn()
    except Exception as e:  # is raised where it is seen
      out[i] = e
  threads = [threading.Thread(target=call, args=x)
             for x in enumerate(replicas)]
  for t in threads:
    t.start()
  for t in threads:
    t.join(120)
    assert not t.is_alive(), 'a replica hangs'
  failed = [x for x in out if isinstance(x, Exception)]
  if len(failed) > 1:
    raise ExceptionGroup('replicas', failed)
  if failed:
    raise failed[0]
  return out


@pytest.fixture(scope='module')
def want():
  """The weights of one machine that evaluates all directions."""
  step, params = mezo_jax.make_step(tx(), loss_fn), start()
  state = tx().init(params)
  for t in range(1, STEPS + 1):
    params, state, _ = step(params, state, batch_of(t))
  return np.asarray(params['w'])


# --- files ------------------------------------------------------------------


@pytest.mark.slow
def test_over_files_with_one_that_dies_and_one_that_joins_late(tmp_path, want):
  """Both end with the same weights, those of one machine to rounding."""
  shas = []
  def first():
    found = exchange.over_files(tmp_path, 'a run', 0, 2, 2)
    shas.append(train((0, 2), found))
    assert found.known() == STEPS
    grads = np.array([found.told(t)[0] for t in range(1, STEPS + 1)])
    assert grads.shape == (STEPS, 2) and np.isfinite(grads).all()
    step, params = mezo_jax.make_step(tx(), None), start()
    state = tx().init(params)
    for t in range(1, STEPS + 1):  # by the numbers alone
      params, state, _ = step.update(params, state, *found.told(t))
    np.testing.assert_allclose(params['w'], want, rtol=1e-4, atol=1e-5)
  def second():
    time.sleep(0.5)  # the other waits for it
    found = exchange.over_files(tmp_path, 'a run', 1, 2, 2)
    assert train((1, 2), found, fail_at=80) is None
    found.close()
    found = exchange.over_files(tmp_path, 'a run', 1, 2, 2)  # a new machine
    assert found.known() >= 79
    shas.append(train((1, 2), found))
  together(first, second)
  assert shas[0] == shas[1]


def entries(path, replica=0, run='a run', numbers=2):
  return exchange.Entries(path, run, replica, 2, numbers)


def test_what_is_not_whole_waits_and_what_is_damaged_is_not_taken(tmp_path):
  path = tmp_path / 'replica-0.pairs'
  mine = entries(path)
  mine.write()
  for step in range(1, 6):
    mine.put(step, step, [step, -step])
  mine.mark(5, 2**32 - 7)
  data, n = path.read_bytes(), mine.kind.itemsize
  assert n == 20  # 8 and the two numbers of a step, 4 its loss
  for cut in (n, n + 1, 2 * n - 1):
    path.write_bytes(data[:-cut])
    theirs = entries(path)
    theirs.read()
    assert len(theirs.data) == 6 - -(-cut // n)
    path.write_bytes(data)
    theirs.read()
    assert theirs.data == mine.data and theirs.marks == {5: 2**32 - 7}
  first = len(data) - 6 * n
  swapped = data[:first] + data[first + n:first + 2 * n] + (
      data[first:first + n]) + data[first + 2 * n:]
  doubled = data[:first + n] + data[first:]
  lost = data[:first] + data[first + n:]
  flipped = bytearray(data)
  flipped[first + 10] ^= 4
  for bad, whole in ((swapped, 0), (doubled, 1), (lost, 0), (flipped, 0)):
    path.write_bytes(bad)
    theirs = entries(path)
    theirs.read()
    assert len(theirs.data) == whole
  path.write_bytes(data)
  with pytest.raises(InputError, match='of another run'):
    entries(path, run='another').read()
  again = entries(path)  # goes on where it was
  again.write()
  again.put(6, 0.0, [1, 2])
  theirs = entries(path)
  theirs.read()
  assert theirs.last == 6


def test_a_log_begins_a_new_exchange(tmp_path):
  """Where the old one was lost: from the steps that the logs have."""
  def log_of(name, steps):
    log, _ = replay.open_log(tmp_path / name, {}, 2)
    for t in range(1, steps + 1):
      log.append(t, [t, -t], t / 2)
    log.close()
    return replay.open_log(tmp_path / name, {}, 2)[0]
  found = []
  for i, steps in enumerate((5, 4)):  # one was a step ahead
    found.append(exchange.over_files(tmp_path / 'new', 'a run', i, 2, 2))
    found[i].catch_up(log_of(f'{i}.log', steps))
  assert found[0].known() == 4 and found[0].has(5)
  def ahead():
    return found[0].swap(5)
  def behind():
    return found[1].swap(5, [np.nan, -5.0], 2.5)
  for g, value in together(ahead, behind):
    assert g.tolist() == [5.0, -5.0] and value == 2.5
  late, _ = replay.open_log(tmp_path / 'late.log', {}, 2, start=3)
  late.append(4, [4, -4], 2.0)
  late.close()
  late, _ = replay.open_log(tmp_path / 'late.log', {}, 2, start=3)
  with pytest.raises(InputError, match='the log begins with step 4'):
    exchange.over_files(tmp_path / 'newer', 'a run', 0, 2, 2).catch_up(late)


def test_a_late_one_is_waited_for_and_then_named(tmp_path):
  found = exchange.over_files(tmp_path, 'a run', 0, 2, 2, timeout=0.3)
  with pytest.raises(Again, match='replica 1 has not told step 1 within 0.3 s'):
    found.swap(1, np.array([1.0, np.nan]), 0.5)
  assert found.has(1)


def test_entries_are_known_by_their_numbers(tmp_path):
  mine, theirs = (entries(tmp_path / name) for name in 'ab')
  mine.put(1, 0.5, [1, 2])
  mine.put(2, 0.5, [3, 4])
  assert theirs.take(1, mine.data[1]) == 'early'
  assert [theirs.take(0, mine.data[0]) for _ in range(2)] == ['new', 'doubled']
  assert theirs.take(1, mine.data[1]) == 'new'
  assert theirs.steps[2][0].tolist() == [3, 4]
  with pytest.raises(InputError, match='two different things'):
    theirs.take(0, mine.data[1])
  with pytest.raises(InputError, match='two different things'):
    theirs.take(2, mine.data[1])


def test_weights_that_differ_are_noticed(tmp_path):
  one, two = (exchange.over_files(tmp_path, 'a run', i, 2, 2, timeout=3.0)
              for i in (0, 1))
  def run(found, checksum):
    found.swap(1, np.ones(2), 0.0)
    found.mark(1, checksum)
    found.swap(2, np.ones(2), 0.0)
    found.swap(3, np.ones(2), 0.0)
  with pytest.raises((InputError, ExceptionGroup)) as raised:
    together(lambda: run(one, 5), lambda: run(two, 6))
  found = getattr(raised.value, 'exceptions', [raised.value])
  assert any('after step 1 the weights of replica' in str(e) for e in found)


# --- sockets ----------------------------------------------------------------


class Relay:
  """Between replicas and replica 0: drops, doubles and reorders frames."""

  def __init__(self, port, seed=0):
    self.counts = dict(dropped=0, doubled=0, reordered=0, damaged=0)
    self._random, self._port = random.Random(seed), port
    self._server = socket.create_server(('127.0.0.1', 0))
    self.port = self._server.getsockname()[1]
    threading.Thread(target=self._accept, daemon=True).start()

  def _accept(self):
    while True:
      one, _ = self._server.accept()
      while True:
        try:
          two = socket.create_connection(('127.0.0.1', self._port))
          break
        except OSError:
          time.sleep(0.02)
      for pair in ((one, two), (two, one)):
        threading.Thread(target=self._pass, args=pair, daemon=True).start()

  def _pass(self, source, sink):
    held = b''
    with contextlib.suppress(OSError, mirror._Broken):
      sink.sendall(mirror.read_frame(source))  # a greeting, each time
      while True:
        frame = mirror.read_frame(source)
        luck = self._random.random()
        if luck < 0.10:
          self.counts['dropped'] += 1
        elif luck < 0.20:
          self.counts['doubled'] += 1
          sink.sendall(frame + frame)
        elif luck < 0.30 and not held:
          held = frame
          continue
        elif luck < 0.302:
          self.counts['damaged'] += 1
          sink.sendall(frame[:-1] + bytes([frame[-1] ^ 1]))
        else:
          sink.sendall(frame)
        if held:
          self.counts['reordered'] += 1
          sink.sendall(held)
          held = b''
    for sock in (source, sink):
      sock.close()


@pytest.mark.slow
def test_over_sockets_that_lose_double_and_reorder(tmp_path, want):
  """200 steps; replica 1 dies on the way and joins with an empty disk."""
  port = helpers.free_port()
  relay = Relay(port)
  def open_(replica, name):
    at = port if replica == 0 else relay.port
    return mirror.over_sockets(f'127.0.0.1:{at}', tmp_path / name, 'a run',
                               replica, 2, 2, timeout=20, retry=0.02)
  def first():
    found = open_(0, 'a')
    sha = train((0, 2), found)
    found.close()
    return sha
  def second():
    found = open_(1, 'b')
    assert train((1, 2), found, fail_at=70) is None
    found._mirror._ends.set()  # as if it were killed
    for link in found._mirror._links.values():
      link.close()
    found = open_(1, 'another disk')
    assert found.known() > 50  # what the other had got of its own
    sha = train((1, 2), found)
    found.close()
    return sha
  one, two = together(first, second)
  assert one == two
  assert min(relay.counts[k] for k in ('dropped', 'doubled', 'reordered')) > 10
  files = [(tmp_path / d / f'replica-{i}.pairs').read_bytes()
           for d in ('a', 'another disk') for i in (0, 1)]
  assert files[0] == files[2] and files[1] == files[3]


def test_a_replica_of_something_else_is_told(tmp_path):
  port = helpers.free_port()
  def open_(replica, run):
    return mirror.over_sockets(f'127.0.0.1:{port}', tmp_path / f'{replica}',
                               run, replica, 2, 2, timeout=1.0, retry=0.05)
  out = []
  def first():
    with pytest.raises(InputError, match='did not answer within 1 s'):
      open_(0, 'a run')
    out.append(0)
  def second():
    with pytest.raises(InputError, match='runs something else'):
      open_(1, 'another')
    out.append(1)
  together(first, second)
  assert sorted(out) == [0, 1]


# --- a part of the directions -----------------------------------------------


def test_parts_make_the_whole():
  params = start()
  state = tx(4).init(params)
  whole = mezo_jax.make_step(tx(4), loss_fn).losses(params, state, batch_of(1))
  for i in range(2):
    g, value = mezo_jax.make_step(tx(4), loss_fn, part=(i, 2)).losses(
        params, state, batch_of(1))
    mine = slice(2 * i, 2 * i + 2)
    np.testing.assert_allclose(g[mine], whole[0][mine], rtol=1e-5)
    assert np.isnan(np.delete(g, mine)).all()
    assert np.isfinite(value)
  with pytest.raises(ValueError, match='makes no step'):
    mezo_jax.make_step(tx(4), loss_fn, part=(0, 2))(
        params, state, batch_of(1))
  for part in ((2, 2), (0, 3)):
    with pytest.raises(ValueError, match='part'):
      mezo_jax.make_step(tx(4), loss_fn, part=part).losses(
          params, state, batch_of(1))
