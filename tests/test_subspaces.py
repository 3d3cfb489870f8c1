"""Directions in subspaces that stay for a while: SubZero's bases, LOZO-M's
momentum."""

import functools

from estimators import whole
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from variants_reference import (
  agrees,
  EPS,
  flat,
  KEY,
  RATE,
  START,
  two_sided,
)

import mezo_jax
from mezo_jax import (
  Displacement,
  LazyLowRank,
  make_step,
  models,
  SubZero,
)
from mezo_jax.directions import displacement

SUB = SubZero(rank=2, every=4)


def z_at(t, like, directions=SUB, n=1):
  return mezo_jax.direction(like, Displacement(
      directions.keys(KEY, t, n), jnp.ones(n) / n), directions)


def projector(z):
  """On the space of a matrix's columns."""
  u, s, _ = np.linalg.svd(np.asarray(z, np.float64), full_matrices=False)
  u = u[:, s > 1e-3 * s[0]]
  return u @ u.T


# --- SubZero ----------------------------------------------------------------


@pytest.mark.slow
def test_bases_stay_for_a_window_and_factors_between_them_do_not():
  like = {'layers': {'w': jnp.zeros((3, 24, 32))}, 'b': jnp.zeros(5)}
  z = [np.asarray(z_at(t, like)['layers']['w']) for t in range(8)]
  for layer in range(3):
    assert np.linalg.matrix_rank(z[0][layer], tol=1e-3) == 2
    left = [projector(x[layer]) for x in z]
    right = [projector(x[layer].T) for x in z]
    for side in (left, right):
      np.testing.assert_allclose(side[0], side[3], atol=1e-4)
      np.testing.assert_allclose(side[4], side[7], atol=1e-4)
      assert np.max(np.abs(side[3] - side[4])) > 0.05
    assert np.max(np.abs(z[0][layer] - z[1][layer])) > 0.1
  assert np.max(np.abs(projector(z[0][0]) - projector(z[0][1]))) > 0.05
  b = [np.asarray(z_at(t, like)['b']) for t in range(8)]
  assert np.all(np.abs(b) == 1) and len(np.unique(b, axis=0)) > 1


@pytest.mark.slow
def test_it_is_a_normal_matrix_between_orthonormal_bases():
  """Its length is that of Z: E = sqrt(m k) / r times r, of 2,000 steps; and
  within a window it lies in r * r dimensions, where it is isotropic."""
  like = jnp.zeros((24, 32))
  sub = SubZero(rank=2, every=10_000)
  z = jax.vmap(lambda t: mezo_jax.direction(like, Displacement(
      sub.keys(KEY, t, 1), jnp.ones(1)), sub))(jnp.arange(2000))
  z = np.asarray(z, np.float64).reshape(2000, -1)
  _, s, v = np.linalg.svd(z, full_matrices=False)
  assert np.sum(s > 1e-3 * s[0]) == 4
  coords = z @ v[:4].T / (np.sqrt(24 * 32) / 2)
  cov = coords.T @ coords / 2000
  np.testing.assert_allclose(cov, np.eye(4), atol=5 * np.sqrt(2 / 2000))


@pytest.mark.slow
def test_directions_are_isotropic_over_bases():
  """E[zz^T] = I, of 20,000 windows, within 5 standard errors."""
  like, n = jnp.zeros((16, 16)), 20_000
  sub = SubZero(rank=1, every=1)
  z = jax.jit(jax.vmap(lambda t: mezo_jax.direction(like, Displacement(
      sub.keys(KEY, t, 1), jnp.ones(1)), sub)))(jnp.arange(n))
  z = np.asarray(z, np.float64).reshape(n, -1)[:, :40]
  products = z[:, :, None] * z[:, None, :]
  error = products.std(0) / np.sqrt(n)
  assert np.all(np.abs(products.mean(0) - np.eye(40)) < 5 * error)


@pytest.mark.slow
@pytest.mark.exhaustive_except(n=[3])
@pytest.mark.parametrize('n', [1, 3])
def test_evaluated_by_factors_as_built(n):
  """Scanned, unrolled, by rows and transposed, of several directions."""
  params = jax.tree.map(lambda s: jax.random.normal(KEY, s), {
      'layers': {'w': (3, 16, 16)}, 'embed': (40, 16), 'q': (16, 4, 4)},
                        is_leaf=lambda x: isinstance(x, tuple))
  def value(p, batch):
    x, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None),
                        p['embed'][batch], p['layers']['w'])
    x = jnp.einsum('bi,ihd->bhd', x, p['q']).reshape(5, 16)
    return x @ p['embed'].T, p['embed'].T[2:4], p['layers']['w'][1, 3:5]
  d = Displacement(SUB.keys(KEY, 3, n), jnp.linspace(0.1, 0.2, n))
  got = jax.jit(mezo_jax.perturbed(value, SUB))(params, d, jnp.arange(5))
  want = value(mezo_jax.displace(params, d, SUB), jnp.arange(5))
  helpers.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.as_shipped
def test_what_is_built_of_subspaces_needs_no_dense_tree():
  """An update of 8 matrices: temporaries are their bases."""
  shapes = {f'w{i}': jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
            for i in range(8)}
  sub = SubZero(rank=8)
  add = jax.jit(lambda p, keys: mezo_jax.displace(
      p, Displacement(keys, jnp.ones(1)), sub), donate_argnums=0)
  memory = add.lower(shapes, jax.eval_shape(
      lambda: sub.keys(KEY, 0, 1))).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.15 * 8 * 4 * 1024**2


# --- LOZO-M -----------------------------------------------------------------


class LozoM:
  """Three windows; U and V are taken from z, which is of rank 1."""

  lazy = LazyLowRank(rank=1, every=7)
  made = functools.partial(whole.lozo_m, directions=lazy, beta=0.8)

  def __init__(self):
    self.n, self.v = np.zeros(5), None

  def step(self, theta, t, batch):
    like = jax.tree.map(lambda x: jnp.zeros(x.shape), START)
    both = mezo_jax.direction(
        like, Displacement(self.lazy.keys(KEY, t, 1), 1.0), self.lazy)
    z = flat(both)
    w = np.asarray(both['w'], np.float64)
    v = self.v if t % 7 and self.v is not None else w[0] / w[0, 0]
    u = w @ v / 2
    g = two_sided(theta, z, batch)
    if t and t % 7 == 0:
      self.n = self.n * (self.v @ v) / 2
    self.n, self.v = 0.8 * self.n + 0.2 * g * u, v
    return theta - RATE * np.concatenate(
        [g * z[:2], np.outer(self.n, v).ravel()])


def test_it_is_its_papers_equations():
  agrees(LozoM(), LozoM.made)


@pytest.mark.slow
def test_momentum_is_projected_on_the_next_columns():
  """Of a stack of layers and of rank 3: what a window's N V^T is, as the new V
  has it, is what is left of it if no step is made."""
  like = {'layers': {'w': jnp.ones((2, 12, 16))}}
  lazy = LazyLowRank(rank=3, every=3)
  pull = jax.random.normal(KEY, (2, 12, 16))
  loss = lambda p, batch: batch * jnp.sum(p['layers']['w'] * pull)
  tx = whole.lozo_m(1.0, EPS, key=KEY, directions=lazy, beta=0.5)
  params, state = like, tx.init(like)
  update = jax.jit(lambda state, batch: tx.update(
      None, state, params, value_fn=loss, batch=batch))
  moves = []
  for t in range(4):  # the fourth has no gradient, and another V
    out, state = update(state, jnp.float32(t < 3))
    moves.append(-np.asarray(out['layers']['w'], np.float64))
  (_, x, draws), = displacement.of_leaves(
      like, Displacement(lazy.keys(KEY, 3, 1), jnp.ones(1)), lazy)
  v = np.asarray(lazy.factor(draws.streams[1], x.shape, jnp.float32), float)
  for old, new, v in zip(moves[2], moves[3], v.reshape(2, 16, 3)):
    np.testing.assert_allclose(new, 0.5 * old @ (v @ v.T) / 16, atol=1e-4)
    assert np.max(np.abs(new)) > 1e-2


@pytest.mark.slow
def test_a_steady_slope_makes_longer_steps_than_a_changing_one():
  """The mean of g U of a window, with beta near 1, is of the slope on V."""
  pull = jax.random.normal(KEY, (32, 32))
  lazy = LazyLowRank(rank=2, every=400)
  def spread(tx):
    def one(state, _):
      out, state = tx.update(None, state, jnp.zeros((32, 32)),
                             value_fn=lambda p: jnp.sum(p * pull))
      return state, out
    _, out = jax.lax.scan(one, tx.init(jnp.zeros((32, 32))), None, 400)
    v = out[200:]
    return float(jnp.mean(jnp.std(v, 0)) / jnp.mean(jnp.abs(jnp.mean(v, 0))))
  momentum = spread(whole.lozo_m(1.0, EPS, key=KEY, directions=lazy,
                                    beta=0.97))
  plain = spread(mezo_jax.mezo(1.0, EPS, key=KEY, directions=lazy))
  assert momentum < 0.3 * plain


@pytest.mark.slow
def test_a_skipped_step_changes_no_momentum():
  tx = whole.lozo_m(RATE, EPS, key=KEY, directions=LozoM.lazy)
  step = make_step(tx, lambda params, batch: jnp.where(
      batch, jnp.nan, jnp.sum((params['w'] - 1) ** 2)))
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
  state, seen = tx.init(params), []
  for t in range(3):
    params, state, _ = step(params, state, np.bool_(t == 1))
    seen.append(jax.tree.map(np.array, (  # copies: both are donated
        params, optax.tree.get(state, 'memory'))))
  helpers.assert_bitwise(seen[0], seen[1])
  assert np.any(seen[1][0]['w'] != seen[2][0]['w'])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.as_shipped
def test_memory_is_that_of_inference():
  """And of U and its momentum, at a model's size."""
  config = helpers.tiny_config(
      vocab_size=8192, width=512, ff_width=1024, num_layers=12, num_heads=8,
      num_kv_heads=8, head_width=64)
  model, params = models.Transformer(config), models.param_shapes(config)
  tx = whole.lozo_m(1e-4, key=0, directions=LazyLowRank(rank=2))
  state = jax.eval_shape(tx.init, params)
  size = lambda tree: sum(4 * x.size for x in jax.tree.leaves(tree))
  assert size(optax.tree.get(state, 'memory')) < 0.02 * size(params)
  ids = jax.ShapeDtypeStruct((4, 16), jnp.int32)
  loss = helpers.lm_loss(model)
  step = jax.jit(lambda p, s, ids: (lambda out: (
      optax.apply_updates(p, out[0]), out[1]))(tx.update(
          None, s, p, value_fn=lambda p: loss(p, ids))), donate_argnums=(0, 1))
  temp = lambda f, *args: f.lower(*args).compile(
  ).memory_analysis().temp_size_in_bytes
  plain = temp(jax.jit(loss), params, ids)
  assert temp(step, params, state, ids) < plain + 0.05 * size(params)


@pytest.mark.parametrize('make,message', [
    (lambda: whole.lozo_m(1e-3, key=0, directions=mezo_jax.LowRank()),
     'lozo_m'),
    (lambda: whole.lozo_m(1e-3, key=0, directions=SubZero()),
     'lozo_m'),
    (lambda: SubZero(every=0), 'every')])
def test_bad_options(make, message):
  with pytest.raises(ValueError, match=message):
    make()
