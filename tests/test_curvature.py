"""Tests measured curvature and noise against exact values."""

import jax
from jax.flatten_util import ravel_pytree
import jax.numpy as jnp
import numpy as np
import pytest

import mezo_jax
from mezo_jax.training import curvature

ROWS = 4


@pytest.fixture(scope='module')
def problem():
  """Returns a small regression: loss, params, all rows, and its batches."""
  rng = np.random.RandomState(0)
  x, noise = rng.randn(256, 5), 0.3 * rng.randn(256)
  y = np.sin(x.sum(-1)) + noise
  rows = {'x': jnp.array(x), 'y': jnp.array(y)}
  params = {'a': jnp.array(0.5 * rng.randn(5, 6)), 'b': jnp.array(rng.randn(6))}

  def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params['a']) @ params['b'] - y) ** 2)

  def batches(seed):
    rng = np.random.RandomState(seed)
    while True:
      index = rng.randint(0, 256, ROWS)
      yield {name: v[index] for name, v in rows.items()}
  return loss, params, rows, batches


@pytest.fixture(scope='module')
def exact(problem):
  """Returns the quantities from derivatives, and the parameter count.

  A batch of rows that are drawn independently has the gradient noise of a row
  divided by the number of rows.
  """
  loss, params, rows, _ = problem
  flat, back = ravel_pytree(params)
  of_row = lambda p, x, y: loss(back(p), x[None], y[None])
  mean = lambda p: loss(back(p), **rows)
  g, h = jax.grad(mean)(flat), jax.hessian(mean)(flat)
  each = jax.vmap(jax.grad(of_row), (None, 0, 0))(flat, *rows.values()) - g
  gradient = g @ g
  batch = gradient + jnp.sum(each**2) / len(each) / ROWS
  along = g @ h @ g + jnp.einsum('bi,ij,bj->', each, h, each) / len(each) / ROWS
  trace = jnp.trace(h)
  return curvature.Quantities(
      mean(flat), gradient, batch, gradient / batch, trace,
      batch * trace + 2 * along, along, trace * batch / along), flat, back, h


@pytest.fixture(scope='module')
def samples(problem):
  """Returns samples along 3,000 directions."""
  loss, params, _, batches = problem
  with jax.enable_x64(True):
    return curvature.sample(loss, jax.tree.map(jnp.float64, params), batches(0),
                            3000, eps=1e-3, key=jax.random.key(0))


@pytest.mark.parametrize('name', curvature.Quantities._fields)
def test_quantities_are_those_of_derivatives(name, samples, exact):
  """Checks each estimate against derivatives, within 3 standard errors."""
  value, error = curvature.spread(samples, lambda q: getattr(q, name))
  assert 0 < error
  assert abs(value - getattr(exact[0], name)) < 3 * error


@pytest.mark.parametrize('name', ['best_rate', 'largest_stable_rate',
                                  'slowdown'])
@pytest.mark.parametrize('n', [1, 4])
def test_rates_are_those_of_derivatives(name, n, samples, exact):
  """Checks the rates that follow, within 3 standard errors."""
  found, error = curvature.spread(samples, lambda q: getattr(q, name)(n))
  assert abs(found - getattr(exact[0], name)(n)) < 3 * error


def test_slowdown_compares_with_gradient_descent(exact):
  """Checks that the slow-down is the ratio of the two gains."""
  q = exact[0]
  for n in (1, 8):
    assert q.slowdown(n) == pytest.approx(q.per_step(n) / q.along)


@pytest.mark.parametrize('n', [1, 4])
def test_decreases_are_those_of_the_quadratic_model(n, problem, exact):
  """Checks measured decreases of small steps, within 3 standard errors."""
  loss, params, _, batches = problem
  q = exact[0]
  rates = [float(q.best_rate(n)) * x for x in (0.125, 0.25)]
  found = curvature.decreases(
      loss, params, batches(1), rates, n, 2000 // n, eps=1e-3,
      key=jax.random.key(1))
  mean, error = found.mean(0), found.std(0) / np.sqrt(len(found))
  expected = [r * q.gradient - r**2 / 2 * q.per_step(n) for r in rates]
  assert (np.abs(mean - expected) < 3 * error).all()


def test_eps_has_an_upper_and_a_lower_limit(problem):
  """Checks that both very small and very large eps are found to be wrong."""
  loss, params, _, batches = problem
  scales = np.geomspace(1e-7, 1.0, 15)
  errors = curvature.errors_of_eps(curvature.gradients_by_eps(
      loss, params, batches(2), scales, 30, key=jax.random.key(2)))
  assert errors[0] > 0.1 and errors[-1] > 0.1
  assert errors[np.argmin(abs(scales - 1e-3))] < 0.01


def test_rounding_moves_the_shares_that_numpy_counts():
  """Checks shares of moved weights against roundings that are carried out."""
  rng = np.random.RandomState(0)
  params = {'w': jnp.array(rng.randn(64, 64), jnp.bfloat16),
            'b': jnp.zeros(8), 'h': jnp.array(rng.randn(100), jnp.float16)}
  step = mezo_jax.Displacement(jax.random.key(0), 1e-4)
  near, expected = curvature.moved_shares(params, step)
  u = mezo_jax.direction(params, step, dtype=jnp.float32)
  moved = [np.asarray((params[k].astype(jnp.float32) + u[k]).astype(
      params[k].dtype) != params[k]) for k in 'wh']
  assert near == pytest.approx(np.mean(np.concatenate(
      [m.ravel() for m in moved])))
  tx = mezo_jax.round_stochastically(1)
  found, state = [], tx.init(params)
  for _ in range(20):
    updates, state = tx.update(u, state, params)
    found += [np.mean(np.concatenate([
        np.asarray(updates[k] != 0).ravel() for k in 'wh']))]
  error = np.std(found) / np.sqrt(len(found))
  assert near < expected
  assert abs(np.mean(found) - expected) < 4 * error
  assert curvature.moved_shares({'b': jnp.zeros(8)}, step) is None


def test_largest_eigenvalue_and_descent(problem, exact):
  """Checks the largest eigenvalue, and steps of gradient descent."""
  loss, params, rows, _ = problem
  q, flat, back, h = exact
  values = np.linalg.eigvalsh(h)
  mean = curvature.mean_loss(loss, [rows])
  value, rest = curvature.largest_eigenvalue(
      mean, params, key=jax.random.key(0), iterations=100)
  assert value == pytest.approx(values[np.argmax(abs(values))], rel=1e-3)
  assert rest < 0.01 * abs(value)
  g = jax.grad(lambda p: mean(back(p)))(flat)
  found = curvature.descents(mean, params, [0.1, 0.2])
  np.testing.assert_allclose(
      found, [mean(params) - mean(back(flat - r * g)) for r in (0.1, 0.2)],
      rtol=1e-4)
