"""A small problem and its NumPy twin, for variants of MeZO to agree on."""

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
  logits = batch['x'] @ params['w'] + params['b']
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['y'])


def rows(index):
  return dict(x=ROWS[index], y=LABELS[index])


def batch_of(t):
  return rows(np.random.RandomState(100 + t).choice(32, 8, False))


# --- in NumPy: the weights are one vector, b before w -----------------------


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(
      np.float64)


def loss_of(theta, batch):
  logits = batch['x'] @ theta[2:].reshape(5, 2) + theta[:2]
  top = logits.max(-1, keepdims=True)
  log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
  return -log_p[np.arange(len(log_p)), batch['y']].mean()


def gradient_of(theta, batch):
  logits = batch['x'] @ theta[2:].reshape(5, 2) + theta[:2]
  p = np.exp(logits - logits.max(-1, keepdims=True))
  d = p / p.sum(-1, keepdims=True) - np.eye(2)[batch['y']]
  d /= len(d)
  return np.concatenate([d.sum(0), (batch['x'].T @ d).ravel()])


def two_sided(theta, z, batch):
  return (loss_of(theta + EPS * z, batch)
          - loss_of(theta - EPS * z, batch)) / (2 * EPS)


@functools.lru_cache
def z_of(t, j=0):
  like = jax.tree.map(lambda x: jnp.zeros(x.shape), START)
  return flat(mezo_jax.direction(like, Displacement(
      noise.direction_key(KEY, t, j), 1.0)))


def agrees(reference, made, rate=RATE, rtol=2e-4):
  """20 steps in float64, from losses to weights, of ``reference.step(theta, t,
  batch)`` and of ``made(rate, eps, key=)``."""
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
