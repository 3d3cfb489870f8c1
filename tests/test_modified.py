"""Scales of z, and what is made of them: variance- and expectation-modified
SPSA, HiZOO."""

import dataclasses
import functools

from estimators import whole
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp
import pytest
import runs
from variants_reference import (
  agrees,
  batch_of,
  EPS,
  KEY,
  loss_of,
  RATE,
  START,
  two_sided,
  value_fn,
  z_of,
)

import mezo_jax
from mezo_jax import Displacement, make_step, variants
import train

KINDS = [mezo_jax.Normal(), mezo_jax.Rademacher(), mezo_jax.LowRank(rank=2),
         mezo_jax.SubZero(rank=1)]
NORMS = {'b': 0.5, 'w': 2.0}
SCALE = np.concatenate([np.full(2, 0.5), np.full(10, 2.0)])


# --- scales -----------------------------------------------------------------


def stack_of(seed=0):
  return jax.tree.map(
      lambda s: jax.random.normal(jax.random.key(seed), s), {
          'layers': {'w': (3, 16, 16)}, 'embed': (40, 16), 'b': (16,)},
      is_leaf=lambda x: isinstance(x, tuple))


def scaled_by(kind, params):
  rng = np.random.RandomState(1)
  of = lambda *shape: jnp.asarray(rng.uniform(0.5, 2.0, shape), jnp.float32)
  return {
      'numbers': {'layers': {'w': 0.5}, 'embed': 3.0, 'b': 1.0},
      'layers': {'layers': {'w': of(3)}, 'embed': of(), 'b': 2.0},
      'elements': jax.tree.map(lambda x: of(*x.shape), params)}[kind]


def value(p, batch):
  """Of a scan over layers, some rows, the head by its transpose."""
  x, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None),
                      p['embed'][batch] + p['b'], p['layers']['w'])
  return x @ p['embed'].T, p['layers']['w'][1].reshape(4, 4, 16)


@pytest.mark.slow
@pytest.mark.exhaustive_except(
    kind=[KINDS[0], KINDS[2]], what=['layers', 'elements'])
@pytest.mark.parametrize('what', ['numbers', 'layers', 'elements'])
@pytest.mark.parametrize('kind', KINDS, ids=lambda k: type(k).__name__)
def test_scales_multiply_the_direction(kind, what):
  params, d = stack_of(), Displacement(
      jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(3)),
      jnp.array([0.1, -0.2, 0.3]))
  scales = scaled_by(what, params)
  scaled = dataclasses.replace(
      kind, multiplier=mezo_jax.Multiplier(scales))
  z = jax.tree.map(
      lambda z, s: z * jnp.reshape(s, jnp.shape(s) + (1,) * (
          z.ndim - jnp.ndim(s))), mezo_jax.direction(params, d, kind), scales)
  helpers.assert_close(mezo_jax.direction(params, d, scaled), z, atol=1e-5)
  got = jax.jit(mezo_jax.perturbed(value, scaled))(params, d, jnp.arange(5))
  want = value(jax.tree.map(jnp.add, params, z), jnp.arange(5))
  helpers.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_scales_must_fit():
  with pytest.raises(ValueError, match='multiplier'):
    mezo_jax.direction(START, Displacement(KEY, 1.0),
                       mezo_jax.Normal(
                           multiplier=mezo_jax.Multiplier({'b': 2.0})))


# --- each against NumPy -----------------------------------------------------


class Variance:
  made = functools.partial(whole.variance_modified, norms=NORMS)

  def step(self, theta, t, batch):
    z = z_of(t)
    return theta - RATE * two_sided(theta, z / SCALE, batch) * SCALE * z


class Expectation:
  made = functools.partial(whole.expectation_modified, norms=NORMS)

  def step(self, theta, t, batch):
    z = z_of(t)
    return theta - RATE * two_sided(theta, z / SCALE, batch) * z


class Hizoo:
  """Two directions; a large alpha, so that H is seen to move."""

  made = functools.partial(whole.hizoo, alpha=0.1, num_samples=2)

  def __init__(self):
    self.h = np.ones(12)

  def step(self, theta, t, batch):
    step, moved = 0.0, 0.0
    for j in (0, 1):
      z = z_of(t, j)
      s = EPS * z / np.sqrt(self.h)
      plus, minus, clean = (loss_of(theta + c * s, batch) for c in (1, -1, 0))
      step = step + (plus - minus) / (2 * EPS) * z / np.sqrt(self.h) / 2
      moved = moved + abs(plus - 2 * clean + minus) / (
          2 * EPS**2) * self.h * z**2 / 2
    self.h = 0.9 * self.h + 0.1 * moved
    return theta - RATE * step


@pytest.mark.parametrize('relative', [Variance, Expectation, Hizoo],
                         ids=lambda r: r.__name__)
@pytest.mark.slow_except(relative=[Variance])
def test_it_is_its_papers_equations(relative):
  agrees(relative(), relative.made)


@pytest.mark.slow
def test_norms_are_those_of_the_gradients_of_layers():
  """Of 2,000 directions, scanned layers and others; and z/d as long as z."""
  params = {'layers': {'w': jnp.ones((3, 8, 8))}, 'head': jnp.ones((8, 2)),
            'dead': jnp.ones(4)}
  pulls = jax.tree.map(
      lambda x: jnp.asarray(np.random.RandomState(3).normal(size=x.shape)),
      params) | {'dead': jnp.zeros(4)}
  pulls['layers']['w'] *= jnp.array([1.0, 2.0, 5.0])[:, None, None]
  loss = lambda p: sum(jax.tree.leaves(jax.tree.map(
      lambda x, c: jnp.sum(x * c), p, pulls)))
  d = variants.grad_norms(loss, params, KEY, num_samples=2000)
  norm = np.array([*(float(jnp.linalg.norm(w)) for w in pulls['layers']['w']),
                   float(jnp.linalg.norm(pulls['head']))])
  got = np.array([*d['layers']['w'], d['head']])
  np.testing.assert_allclose(got / got[0], norm / norm[0], rtol=0.15)
  least = 0.01 * np.sqrt(np.sum(got**2) / 5)
  np.testing.assert_allclose(d['dead'], least, rtol=1e-3)
  sizes = [64, 64, 64, 16, 4]
  every = np.array([*got, d['dead']])
  np.testing.assert_allclose(np.sum(sizes / every**2), sum(sizes), rtol=1e-4)


# --- what they claim --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.exhaustive
def test_variance_modified_is_unbiased_and_expectation_modified_is_over_d():
  """Of 4,000 estimates, within 5 standard errors."""
  slope = np.random.RandomState(0).normal(size=12)
  loss = lambda p: jnp.dot(
      jnp.concatenate([p['b'], p['w'].ravel()]), slope)
  params = jax.tree.map(lambda x: jnp.zeros(x.shape), START)
  for made, mean in ((whole.variance_modified, slope),
                     (whole.expectation_modified, slope / SCALE)):
    tx = made(-1.0, EPS, key=KEY, norms=NORMS)
    one = lambda key, tx=tx: tx.update(
        None, optax.tree.set(tx.init(params), key=key), params,
        value_fn=loss)[0]
    got = jax.vmap(one)(jax.random.split(KEY, 4000))
    got = np.concatenate([got['b'], got['w'].reshape(4000, -1)], 1)
    error = got.std(0) / np.sqrt(4000)
    assert np.all(np.abs(got.mean(0) - mean) < 5 * error)
    if mean is not slope:  # the other would be seen
      assert np.any(np.abs(got.mean(0) - slope) > 10 * error)


def test_hizoo_sees_where_a_valley_is_narrow():
  """Of curvatures of 100 and 1 its H is greater for the first."""
  curve = jnp.concatenate([jnp.full(5, 100.0), jnp.ones(5)])
  loss = lambda w, batch: 0.5 * jnp.sum(curve * w**2)
  tx = whole.hizoo(1e-3, 1e-3, key=1, alpha=1e-3)
  def one(carry, _):
    w, state = carry
    updates, state = tx.update(None, state, w, value_fn=loss, batch=0)
    return (optax.apply_updates(w, updates), state), None
  (w, state), _ = jax.lax.scan(
      one, (jnp.ones(10), tx.init(jnp.ones(10))), None, 600)
  hessian = optax.tree.get(state, 'memory')**-2.0
  assert float(hessian[:5].mean() / hessian[5:].mean()) > 1.5
  assert float(loss(w, 0)) < 0.1 * float(loss(jnp.ones(10), 0))


def test_hizoo_is_told_both_scalars():
  """By the door, from the start: bitwise the weights and H of training."""
  tx = whole.hizoo(RATE, EPS, key=KEY, alpha=1e-2)
  step = make_step(tx, value_fn)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
  ends = []
  for told in (None, []):
    p, state, seen = jax.tree.map(jnp.copy, params), tx.init(params), []
    for t in range(5):
      if told is None:
        p, state, metrics = step(p, state, batch_of(t))
        seen.append(metrics['projected_grad'])
      else:
        p, state, _ = step.update(p, state, ends[0][2][t])
    ends.append((p, optax.tree.get(state, 'memory'), seen))
  helpers.assert_bitwise(ends[0][:2], ends[1][:2])
  with pytest.raises(ValueError, match=r'projected_grad .*\[2\].*\[1\]'):
    tx.update(None, tx.init(params), params, projected_grad=jnp.zeros(1))


def test_a_step_leaves_the_norms_that_were_passed():
  """A step donates its state, which must not share arrays with the caller."""
  norms = jax.tree.map(jnp.float32, NORMS)
  tx = whole.variance_modified(RATE, EPS, key=KEY, norms=norms)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
  make_step(tx, value_fn)(params, tx.init(params), batch_of(0))
  assert jax.tree.map(float, norms) == NORMS


@pytest.mark.parametrize('make,message', [
    (lambda: whole.hizoo(1e-3, key=0, alpha=1.0), 'alpha .*1.0'),
    (lambda: whole.variance_modified(
        1e-3, key=0, norms={'b': 1.0}).update(
            None, whole.variance_modified(
                1e-3, key=0, norms={'b': 1.0}).init(START), START,
            value_fn=value_fn, batch=batch_of(0)), 'multiplier')])
def test_bad_options(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_goes_on_with_the_norms_it_began_with(
    tiny_dir, reviews_file, tmp_path, capsys):
  """Which are in its checkpoint, so weights are not looked at again."""
  config = lambda steps: runs.small_config(
      tiny_dir, reviews_file, method='variance_modified', steps=steps,
      eval_every=2, checkpoint_every=2, zero_shot=False,
      optimizer__learning_rate=1e-4, variant__num_scores=2)
  train.run(config(2), tmp_path)
  assert 'gradient norm' in capsys.readouterr().out
  norms = optax.tree.get(state_of(tmp_path), 'memory')
  train.run(config(4), tmp_path)
  assert 'gradient norm' not in capsys.readouterr().out
  helpers.assert_bitwise(optax.tree.get(state_of(tmp_path), 'memory'), norms)
  assert len(np.unique(np.concatenate([
      np.ravel(x) for x in jax.tree.leaves(norms)]))) > 3


def state_of(workdir):
  """The optimizer's state of the last checkpoint, as saved."""
  step = runs.saved(workdir)[0]
  return ocp.load(workdir / 'checkpoints' / str(step),
                  checkpointable_name='state')[1]
