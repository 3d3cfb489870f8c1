"""What holds of any log, checkpoint and way to train, of cases drawn at random.

A few here; as many as one likes, counted, by benchmarks/properties.py.
"""

import collections
import os
from pathlib import Path
import tempfile

from estimators import whole
import helpers
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mezo_jax
from mezo_jax.core import sharding
from mezo_jax.core.errors import InputError
from mezo_jax.runs import checkpoint, replay

SEEN = collections.Counter()  # (what, what became of it)


def property_of(examples: int, **kwargs):
  """``given``, of so many examples times the environment's ``EXAMPLES``."""
  times = float(os.environ.get('EXAMPLES', 1))
  settings = hypothesis.settings(
      max_examples=max(round(times * examples), 1), deadline=None,
      database=None, derandomize=times == 1,
      suppress_health_check=[*hypothesis.HealthCheck])
  return lambda f: settings(hypothesis.given(**kwargs)(f))


# --- damage -----------------------------------------------------------------

CHANGES = st.lists(min_size=1, max_size=3, elements=st.tuples(
    st.sampled_from(('flip', 'cut', 'drop', 'repeat', 'insert')),
    st.floats(0, 1, exclude_max=True), st.integers(1, 40), st.integers(0, 7)))


def damaged(data: bytes, changes) -> bytes:
  """With changes at these places, as shares of the length."""
  out = bytearray(data)
  for kind, where, size, bit in changes:
    at = int(where * len(out))
    match kind:
      case 'flip' if out:
        out[at] ^= 1 << bit
      case 'cut':
        del out[at:]
      case 'drop':
        del out[at:at + size]
      case 'repeat':
        out[at:at] = out[max(at - size, 0):at]
      case 'insert':
        out[at:at] = bytes([bit]) * size
  return bytes(out)


@st.composite
def logs(draw) -> replay.Steps:
  n, t, first = (draw(st.integers(*x)) for x in ((1, 4), (0, 60), (1, 3)))
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  rows = np.frombuffer(rng.bytes(4 * t * (n + 1)), np.float32)  # of any bits
  added = first + np.flatnonzero(rng.random(t) < draw(st.floats(0, 1)))
  rows = rows.reshape(t, n + 1)
  return replay.Steps(first, rows[:, 0], rows[:, 1:],
                      frozenset(added.tolist()))


def write(path: Path, steps: replay.Steps) -> None:
  log, _ = replay.open_log(path, {'config': {'seed': 3}},
                           steps.projected_grads.shape[1], steps.first - 1)
  for step in range(steps.first, steps.last + 1):
    log.append(step, *steps.at(step))
    if step in steps.added:
      log.added(step)
  log.close()


def assert_begins(found: replay.Steps, steps: replay.Steps) -> None:
  part = steps.until(found.last)
  assert found.first == steps.first and found.last <= steps.last
  # What was added after the last may be what is lost.
  assert part.added - {found.last} <= found.added <= part.added
  helpers.assert_bitwise(found.values, part.values)
  helpers.assert_bitwise(found.projected_grads, part.projected_grads)


def read_damaged(what: str, path: Path, changes) -> replay.Steps | None:
  """What is read of a file after the changes; None where it is refused."""
  data = path.read_bytes()
  path.write_bytes(damaged(data, changes))
  try:
    found = replay.read(path).steps
  except InputError:
    SEEN[what, 'refused'] += 1
    return None
  SEEN[what, 'whole' if path.read_bytes() == data else 'its beginning'] += 1
  return found


@pytest.mark.slow
@property_of(150, steps=logs(), changes=CHANGES)
def test_a_damaged_log_is_its_beginning_or_refused(steps, changes):
  """And grows from there."""
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'steps.log'
    write(path, steps)
    assert_begins(replay.read(path).steps, steps)
    assert replay.read(path).steps.added == steps.added
    found = read_damaged('log', path, changes)
    if found is None:
      return
    assert_begins(found, steps)
    log, _ = replay.open_log(path, {}, steps.projected_grads.shape[1],
                             steps.first - 1)
    assert log.end == found.last
    log.append(log.end + 1, np.ones(steps.projected_grads.shape[1]), 0.5)
    log.close()
    again = replay.read(path)
    assert again.damaged == 0 and again.header['config'] == {'seed': 3}
    assert again.steps.last == found.last + 1
    assert_begins(again.steps.until(found.last), steps)


@property_of(100, steps=logs(), changes=CHANGES)
def test_a_damaged_shared_log_is_refused(steps, changes):
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'steps.log'
    replay.write_shared(path, {'config': {}}, steps)
    data = path.read_bytes()
    found = read_damaged('shared log', path, changes)
    if found is None:
      return
    assert path.read_bytes() == data and found.added == steps.added
    helpers.assert_bitwise(found.projected_grads, steps.projected_grads)


# --- checkpoints ------------------------------------------------------------

DTYPES = ('float32', 'bfloat16', 'float16', 'int8', 'int4', 'uint32', 'bool')
SIZES = (1, 3, 8, 16)
MESHES = (None, (1, 8, 1), (2, 2, 2), (8, 1, 1), (1, 4, 2))
LEAVES = st.tuples(st.sampled_from(DTYPES),
                   st.lists(st.sampled_from(SIZES), max_size=3))
TREES = st.recursive(LEAVES, lambda inner: st.one_of(
    st.lists(inner, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(('kernel', 'bias', 'a', 'layers')), inner,
                    min_size=1, max_size=3)), max_leaves=6)


def is_leaf(x) -> bool:
  return isinstance(x, tuple)


def made(tree, seed: int = 0):
  """Arrays of these dtypes and shapes, of any bits but NaN's, which a compiler
  may change."""
  rng = np.random.default_rng(seed)
  def leaf(x):
    dtype, shape = jnp.dtype(x[0]), tuple(x[1])
    if dtype.name in ('int4', 'bool'):
      return rng.integers(0, 2, shape).astype(dtype)
    data = rng.bytes(dtype.itemsize * int(np.prod(shape)))
    x = np.frombuffer(data, dtype).reshape(shape)
    return np.where(x == x, x, np.ones_like(x))
  return jax.tree.map(leaf, tree, is_leaf=is_leaf)


def mesh_of(sizes):
  return sizes and sharding.make_mesh(*sizes)


def on(mesh, tree):
  if mesh is None:
    return jax.tree.map(jnp.asarray, tree)
  return jax.device_put(tree, sharding.param_shardings(tree, mesh))


@pytest.mark.slow
@property_of(6, tree=TREES, one=st.sampled_from(MESHES),
             two=st.sampled_from(MESHES))
def test_what_is_restored_is_what_was_saved(tree, one, two):
  """On whichever mesh."""
  host = made(tree)
  tx = mezo_jax.mezo(1e-3, key=3)
  def state_on(sizes, host):
    params = on(mesh_of(sizes), host)
    return params, sharding.beside(tx.init({'w': jnp.ones(3)}), params)
  with tempfile.TemporaryDirectory() as folder:
    kept = checkpoint.Checkpoints(Path(folder) / 'checkpoints')
    kept.save(1, state_on(one, host))
    kept.wait()
    like = state_on(two, made(tree, 1))
    found, state = kept.load(1, like)
    kept.close()
  SEEN['checkpoint', 'restored'] += 1
  helpers.assert_bitwise(found, host)
  assert state[0].key == jax.random.key(3)
  assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
      lambda x: x.sharding, like[0])


@pytest.mark.slow
@property_of(25, which=st.floats(0, 1, exclude_max=True), changes=CHANGES)
def test_a_damaged_checkpoint_is_what_was_saved_or_refused(which, changes):
  host = {'w': np.linspace(-1, 1, 600, dtype=np.float32).reshape(30, 20),
          'codes': np.arange(8, dtype='int8')}
  state = jax.tree.map(jnp.asarray, host)
  with tempfile.TemporaryDirectory() as folder:
    directory = Path(folder) / 'checkpoints'
    kept = checkpoint.Checkpoints(directory)
    kept.save(3, state, {'score': 0.5, 'loss': 1.25})
    kept.close()
    files = sorted(p for p in directory.rglob('*') if p.is_file())
    file = files[int(which * len(files))]
    file.write_bytes(damaged(file.read_bytes(), changes))
    try:
      kept = checkpoint.Checkpoints(directory)
    except InputError:
      SEEN['checkpoint, damaged', 'not opened'] += 1
      return
    try:
      found, best = kept.load(3, state), kept.best_step()
    except InputError:
      SEEN['checkpoint, damaged', 'refused'] += 1
      return
    finally:
      kept.close()
    SEEN['checkpoint, damaged', 'as it was'] += 1
    helpers.assert_bitwise(found, host)
    assert best == 3


# --- training ---------------------------------------------------------------

KINDS = (mezo_jax.Normal, mezo_jax.Rademacher,
         lambda mask: mezo_jax.LowRank(rank=2, mask=mask),
         lambda mask: mezo_jax.LazyLowRank(rank=2, every=2, mask=mask))
RATES = (lambda: 1e-2, lambda: optax.linear_schedule(1e-1, 0.0, 5),
         lambda: {'kernel': 1e-2, '': 1e-1})
PLACES = st.fixed_dictionaries({
    'weights': st.dictionaries(
        st.sampled_from(('kernel', 'bias', 'scale', 'embedding')), st.tuples(
            st.sampled_from(('float32', 'bfloat16', 'float16')),
            st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)),
        min_size=1, max_size=3),
    'layers': st.dictionaries(
        st.sampled_from(('kernel', 'bias')), st.tuples(
            st.sampled_from(('float32', 'bfloat16')),
            st.lists(st.sampled_from(SIZES), min_size=1, max_size=2)),
        max_size=2)})


def value_fn(params, batch):
  """Of every weight, not linear, and not finite in some steps."""
  terms = [jnp.tanh(x.astype('float32') * batch[0]).mean()
           for x in jax.tree.leaves(params)]
  return sum(terms) / len(terms) + 0 * batch[1]


@pytest.mark.slow
@property_of(3, tree=PLACES, kind=st.sampled_from(KINDS),
             mask=st.sampled_from((None, '(kernel|bias)$')),
             rate=st.sampled_from(RATES), decay=st.sampled_from((0.0, 0.1)),
             num_samples=st.integers(1, 3), one_sided=st.booleans(),
             apply_every=st.sampled_from((None, 2)), lost=st.sets(
                 st.integers(0, 2)), mesh=st.sampled_from(MESHES),
             other=st.sampled_from(MESHES))
def test_steps_made_again_from_the_log_are_those_of_training(
    tree, kind, mask, rate, decay, num_samples, one_sided, apply_every, lost,
    mesh, other):
  """Bit for bit, on whichever mesh."""
  rate = rate()
  if apply_every and (decay or isinstance(rate, dict)):
    apply_every = None  # which mezo refuses
  if mask and not any(k in ('kernel', 'bias') for part in tree.values()
                      for k in part):
    mask = None  # nothing would be trained
  tx = whole.spsa(
      rate, 1e-2, key=3, directions=kind(mask=mask), num_samples=num_samples,
      combine=mezo_jax.one_sided if one_sided else mezo_jax.two_sided,
      weight_decay=decay, decay='kernel', apply_every=apply_every)
  host = jax.tree.map(
      lambda x: np.random.default_rng(0).normal(size=x[1]).astype(
          jnp.dtype(x[0])),
      tree, is_leaf=is_leaf)
  mesh, other = mesh_of(mesh), mesh_of(other)
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / 'steps.log'
    log, _ = replay.open_log(path, {}, num_samples)
    step, params = mezo_jax.make_step(tx, value_fn, mesh=mesh), on(mesh, host)
    state = tx.init(params)
    for t in range(3):
      batch = np.array([1 + t, np.nan if t in lost else 0], np.float32)
      params, state, metrics = step(params, state, batch)
      log.append(t + 1, metrics['projected_grad'], metrics['loss'])
    want, _ = step.apply_accumulated(params, state)
    log.added(3)
    log.close()
    found = replay.read(path).steps
  step, params = mezo_jax.make_step(tx, None, mesh=other), on(other, host)
  got, _ = replay.rebuild(step, params, tx.init(params), found)
  SEEN['training', 'made again'] += 1
  helpers.assert_bitwise(got, want)
  skipped = np.isnan(found.projected_grads).any(-1)
  assert np.flatnonzero(skipped).tolist() == sorted(lost)
