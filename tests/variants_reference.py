"""Provides a small problem in JAX and in NumPy, to compare variants of MeZO."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mezo_jax
from mezo_jax import Displacement, make_step
from mezo_jax.directions import noise

KEY, RATE, EPS, STEPS = jax.random.key(7), 2e-2, 1e-2, 20
ROWS = np.random.RandomState(0).normal(size=(32, 5))
LABELS = (ROWS @ np.random.RandomState(1).normal(size=5) > 0).astype(int)
START = {'w': np.random.RandomState(2).normal(size=(5, 2)), 'b': np.zeros(2)}


def value_fn(params, batch):
  """Returns the per-example losses of logistic regression."""
  logits = batch['x'] @ params['w'] + params['b']
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['y'])


def rows(index):
  """Returns the examples at some indices as a batch."""
  return dict(x=ROWS[index], y=LABELS[index])


def batch_of(t):
  """Returns the batch of step t."""
  return rows(np.random.RandomState(100 + t).choice(32, 8, False))


# --- in NumPy, where the weights are one vector, b before w -----------------


def flat(tree):
  """Returns the leaves of a tree as one float64 vector."""
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(
      np.float64)


def loss_of(theta, batch):
  """Returns the mean loss of a batch."""
  logits = batch['x'] @ theta[2:].reshape(5, 2) + theta[:2]
  top = logits.max(-1, keepdims=True)
  log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
  return -log_p[np.arange(len(log_p)), batch['y']].mean()


def gradient_of(theta, batch):
  """Returns the gradient of `loss_of`."""
  logits = batch['x'] @ theta[2:].reshape(5, 2) + theta[:2]
  p = np.exp(logits - logits.max(-1, keepdims=True))
  d = p / p.sum(-1, keepdims=True) - np.eye(2)[batch['y']]
  d /= len(d)
  return np.concatenate([d.sum(0), (batch['x'].T @ d).ravel()])


def two_sided(theta, z, batch):
  """Returns the projected gradient along z by central differences."""
  return (loss_of(theta + EPS * z, batch)
          - loss_of(theta - EPS * z, batch)) / (2 * EPS)


@functools.lru_cache
def z_of(t, j=0):
  """Returns direction j of step t, as the library draws it."""
  like = jax.tree.map(lambda x: jnp.zeros(x.shape), START)
  return flat(mezo_jax.direction(like, Displacement(
      noise.direction_key(KEY, t, j), 1.0)))


def agrees(reference, made, rate=RATE, rtol=2e-4):
  """Asserts that a variant and its reference take the same 20 steps.

  Both compute in float64, so their weights must agree up to rounding.

  Args:
    reference: An object with ``step(theta, t, batch)``, which returns the new
      weights, and optionally ``batch(t)``.
    made: The variant, ``made(rate, eps, key=)``.
    rate: Learning rate of the reference, which scales the least change that the
      weights must make. Defaults to `RATE`.
    rtol: Relative tolerance of the change of the weights.
  """
  batch_at = getattr(reference, 'batch', batch_of)
  with jax.enable_x64(True):
    params = jax.tree.map(jnp.asarray, START)
    tx = made(RATE, EPS, key=KEY)
    step, state = make_step(tx, value_fn), tx.init(params)
    theta = flat(params)
    for t in range(STEPS):
      theta = reference.step(theta, t, batch_at(t))
      params, state, metrics = step(params, state, jax.tree.map(
          jnp.asarray, batch_at(t)))
    got = flat(params)
  assert np.max(np.abs(theta - flat(START))) > 1e-3 * rate / RATE
  np.testing.assert_allclose(got - flat(START), theta - flat(START),
                             rtol=rtol, atol=2e-6)
  assert metrics['skipped'] == 0
