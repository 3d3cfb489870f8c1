"""Replicas that exchange numbers: the same weights, whatever happens to one."""

import hashlib
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

import mezo_jax
from mezo_jax.core import fingerprint
from mezo_jax.core.errors import Again, InputError
from mezo_jax.distributed.exchange import Exchange
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
      g, value = opened.at(t)
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


@pytest.mark.slow
def test_one_that_dies_and_one_that_joins_late(tmp_path, want):
  """Both end with the same weights, those of one machine to rounding."""
  shas = []
  def first():
    found = Exchange(tmp_path, 'a run', 0, 2, 2)
    shas.append(train((0, 2), found))
    assert found.known() == STEPS
    grads = np.array([found.at(t)[0] for t in range(1, STEPS + 1)])
    assert grads.shape == (STEPS, 2) and np.isfinite(grads).all()
    step, params = mezo_jax.make_step(tx(), None), start()
    state = tx().init(params)
    for t in range(1, STEPS + 1):  # by the numbers alone
      params, state, _ = step.update(params, state, *found.at(t))
    np.testing.assert_allclose(params['w'], want, rtol=1e-4, atol=1e-5)
  def second():
    time.sleep(0.5)  # the other waits for it
    found = Exchange(tmp_path, 'a run', 1, 2, 2)
    assert train((1, 2), found, fail_at=80) is None
    found.close()
    found = Exchange(tmp_path, 'a run', 1, 2, 2)  # a new machine
    assert found.known() >= 79
    shas.append(train((1, 2), found))
  together(first, second)
  assert shas[0] == shas[1]


def test_what_is_not_whole_waits_and_what_is_damaged_is_not_taken(tmp_path):
  mine = Exchange(tmp_path, 'a run', 0, 2, 4, timeout=0.01)
  for step in range(1, 6):
    with pytest.raises(Again):
      mine.swap(step, [step, -step, np.nan, np.nan], step)
  path = tmp_path / 'replica-0.log'
  data, n = path.read_bytes(), 20  # 8 and the two numbers of a step, 4 its loss
  first = len(data) - 5 * n
  assert data[:first].endswith(b'\n')

  def seen():
    theirs = Exchange(tmp_path, 'a run', 1, 2, 4)
    return theirs._peers[0]

  for cut in (n, n + 1, 2 * n - 1):
    path.write_bytes(data[:-cut])
    theirs = seen()
    assert theirs.last == 5 - -(-cut // n)
    path.write_bytes(data)
    theirs.read()
    assert theirs.last == 5 and theirs.steps[5][0].tolist() == [5, -5]
  swapped = data[:first] + data[first + n:first + 2 * n] + (
      data[first:first + n]) + data[first + 2 * n:]
  doubled = data[:first + n] + data[first:]
  lost = data[:first] + data[first + n:]
  flipped = bytearray(data)
  flipped[first + 10] ^= 4
  for bad, whole in ((swapped, 0), (doubled, 1), (lost, 0), (flipped, 0)):
    path.write_bytes(bad)
    assert seen().last == whole
  path.write_bytes(data)
  again = Exchange(tmp_path, 'a run', 0, 2, 4, timeout=0.01)  # where it was
  assert again.has(5) and not again.has(6)


@pytest.mark.parametrize('change', [
    dict(run='another'), dict(num_samples=4), dict(replicas=4, num_samples=4)])
def test_a_replica_of_something_else_is_named(change, tmp_path):
  same = dict(run='a run', replicas=2, num_samples=2)
  Exchange(tmp_path, replica=0, **same)
  with pytest.raises(InputError, match='replica 0 .*--exchange'):
    Exchange(tmp_path, replica=1, **same | change)
  with pytest.raises(InputError, match='replica 0 .*--exchange'):
    Exchange(tmp_path, replica=0, **same | change)


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
    found.append(Exchange(tmp_path / 'new', 'a run', i, 2, 2))
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
    Exchange(tmp_path / 'newer', 'a run', 0, 2, 2).catch_up(late)


def test_a_late_one_is_waited_for_and_then_named(tmp_path):
  found = Exchange(tmp_path, 'a run', 0, 2, 2, timeout=0.3)
  with pytest.raises(Again, match='replica 1 .* step 1 '):
    found.swap(1, np.array([1.0, np.nan]), 0.5)
  assert found.has(1)


def test_weights_that_differ_are_noticed(tmp_path):
  one, two = (Exchange(tmp_path, 'a run', i, 2, 2, timeout=3.0)
              for i in (0, 1))
  def run(found, checksum):
    found.swap(1, np.ones(2), 0.0)
    found.mark(1, checksum)
    found.close()
  with pytest.raises((InputError, ExceptionGroup)) as raised:
    together(lambda: run(one, 5), lambda: run(two, 6))
  found = getattr(raised.value, 'exceptions', [raised.value])
  assert any('after step 1 the weights of replica' in str(e) for e in found)


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
  with pytest.raises(ValueError, match='part'):
    mezo_jax.make_step(tx(4), loss_fn, part=(0, 2))(
        params, state, batch_of(1))
  for part in ((2, 2), (0, 3)):
    with pytest.raises(ValueError, match='part'):
      mezo_jax.make_step(tx(4), loss_fn, part=part).losses(
          params, state, batch_of(1))
