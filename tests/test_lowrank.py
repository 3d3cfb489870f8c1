"""Directions of low rank: what they are, and that they build no weights."""

import dataclasses
import warnings

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mezo_jax
from mezo_jax import Displacement, LazyLowRank, LowRank
from mezo_jax.directions import streams

KEY = jax.random.key(5)


def draws(shape, rank, path='w', n=1):
  keys = jax.random.split(KEY, n)
  return LowRank(rank=rank).of_leaf(
      streams.of_leaf(keys, path, shape), jnp.arange(1.0, n + 1), shape)


def test_draws_are_what_they_were():
  z = mezo_jax.direction({'w': jnp.zeros((40, 36))}, Displacement(KEY, 1.0),
                         LowRank(rank=9))['w']
  np.testing.assert_allclose(
      3 * z[7, :8], [5, -1, 3, -1, -3, -1, -1, 1], rtol=1e-6)


@pytest.mark.parametrize('rank', [1, 2, 5])
def test_the_covariance_is_the_identity(rank):
  """Of all elements of a matrix, over 20,000 keys, within 5 standard errors."""
  shape, n = (10, 11), 20_000
  z = jax.jit(jax.vmap(lambda key: mezo_jax.direction(
      {'w': jnp.zeros(shape)}, Displacement(key, 1.0), LowRank(rank=rank))[
          'w'].ravel()))(jax.random.split(KEY, n))
  z = np.asarray(z, np.float64)
  some = z[:50].reshape(50, *shape)
  assert np.max(np.linalg.matrix_rank(some, tol=1e-4)) == rank
  assert np.max(np.abs(z.mean(0))) < 5 / np.sqrt(n)
  second = z.T @ z / n
  fourth = (z**2).T @ z**2 / n
  error = np.sqrt(np.maximum(fourth - second**2, 1e-12) / n)
  off = np.abs(second - np.eye(z.shape[1])) / np.maximum(error, 1e-9)
  assert np.max(off) < 5


@pytest.mark.slow_except(rank=[7])
@pytest.mark.parametrize('rank', [1, 7, 32, 70])
@pytest.mark.parametrize('path,shape', [
    ('w', (160, 150)), ('layers/w', (3, 160, 140)), ('w', (150, 10, 16)),
    ('w', (10, 16, 150)), ('layers/w', (2, 3, 3, 20, 170))])
def test_it_is_the_product_of_its_factors(path, shape, rank):
  """Elementwise from the bits, and as U V^T; for several directions."""
  @helpers.quick_jit
  def run():
    d = draws(shape, rank, path, n=2)
    return d.built(jnp.zeros(shape)), [
        d.directions.factor(s, shape, jnp.float32) for s in d.streams]
  got, (u, v) = jax.tree.map(lambda x: np.asarray(x, np.float64), run())
  assert set(np.unique(u)) == set(np.unique(v)) == {-1, 1}
  layers = 1 if path.startswith('layers') else 0
  flat = lambda x: x.reshape(*shape[:layers], -1, 2, rank)
  want = np.einsum('...inr,...jnr,n->...ij', flat(u), flat(v),
                   [1.0, 2.0]) / np.sqrt(rank)
  np.testing.assert_allclose(got, want.reshape(shape), rtol=1e-5, atol=1e-5)


@pytest.mark.slow_except(rank=[4])
@pytest.mark.exhaustive_except(rank=[4])
@pytest.mark.parametrize('rank', [4, 40])
@pytest.mark.parametrize('path,shape', [
    ('w', (160, 150)), ('layers/w', (3, 150, 10, 16)), ('w', (150, 1, 160))])
def test_a_tpu_adds_the_same(path, shape, rank):
  """By a product with coefficients of 16 bits, which keep them to 1e-5."""
  d = draws(shape, rank, path, n=5)
  coefs = jnp.array([1e-6, -3.1415926e-6, 1.5e-6, 0.0, 7.7e-7])
  for start in (None, jax.random.normal(KEY, shape) * 1e-5):
    got, want = helpers.quick_jit(lambda coefs, start: (
        d.directions.at_once(coefs)(d.streams, coefs, start, jnp.zeros(shape)),
        dataclasses.replace(d, coefs=coefs)._by_terms(
            start, jnp.zeros(shape))))(coefs, start)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-9)


def test_what_is_small_is_drawn_whole():
  """Vectors, and matrices narrower than twice the rank, have signs."""
  tree = {'bias': jnp.zeros(64), 'lora_a': jnp.zeros((64, 8)),
          'kernel': jnp.zeros((64, 32))}
  z = mezo_jax.direction(tree, Displacement(KEY, 1.0), LowRank(rank=16))
  signs = mezo_jax.direction(tree, Displacement(KEY, 1.0),
                             mezo_jax.Rademacher())
  helpers.assert_bitwise(z['bias'], signs['bias'])
  helpers.assert_bitwise(z['lora_a'], signs['lora_a'])
  assert np.linalg.matrix_rank(z['kernel']) == 16


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('kind', [
    LowRank(rank=4), mezo_jax.Normal(), mezo_jax.SubZero(rank=2)])
def test_many_terms_of_small_leaves(kind):
  """Their sum is that of each; and no key is looked up, which a TPU's compiler
  makes 2 % of a step with pending updates of."""
  params = {'b': jnp.ones(12), 'w': jnp.ones((6, 8)), 'h': {
      'w': jnp.ones((2, 8, 6))}}
  coefs, keys = jnp.arange(1.0, 14), jax.random.split(KEY, 13)
  total = lambda keys, coefs: mezo_jax.direction(
      params, Displacement(keys, coefs), kind)
  helpers.assert_close(total(keys, coefs), jax.tree.map(
      lambda *x: sum(x), *[total(keys[j], coefs[j]) for j in range(13)]))
  assert ' gather[' not in str(jax.make_jaxpr(total)(keys, coefs))


@pytest.mark.slow
def test_layouts_of_one_matrix_have_the_same_z():
  """Heads apart or not; layers stacked or each for itself."""
  of = lambda tree: mezo_jax.direction(
      tree, Displacement(KEY, 1.0), LowRank(rank=4))
  flat = of({'q': {'kernel': jnp.zeros((48, 64))}})['q']['kernel']
  heads = of({'q': {'kernel': jnp.zeros((48, 4, 16))}})['q']['kernel']
  helpers.assert_bitwise(heads.reshape(48, 64), flat)
  stacked = of({'layers': {'w': jnp.zeros((3, 48, 20))}})['layers']['w']
  apart = of({'layers': {str(l): {'w': jnp.zeros((48, 20))}
                         for l in range(3)}})['layers']
  for l in range(3):
    helpers.assert_bitwise(stacked[l], apart[str(l)]['w'])


SHAPES = {'mlp': (100, 72), 'heads': (64, 4, 16), 'emb': (500, 64),
          'bias': (72,), 'layers': {'w': (3, 64, 80)}, 'conv': (3, 20, 24)}


def program(p, x, ids):
  """Every way in which a model consumes its matrices."""
  q = jnp.einsum('bsd,dnh->bsnh', x[..., :64], p['heads'])
  o = jnp.einsum('bsnh,dnh->bsd', q, p['heads'])
  c, _ = jax.lax.scan(
      lambda c, w: (jnp.tanh(c @ w) @ w.T / 8, None), o, p['layers']['w'])
  e = p['emb'][ids]
  windows = jax.lax.conv_general_dilated(
      c[..., :20], p['conv'], (1,), 'SAME', dimension_numbers=(
          'NWC', 'WIO', 'NWC'))
  return {
      'dense': x @ p['mlp'] + p['bias'], 'head': (c + e) @ p['emb'].T,
      'picked': jnp.einsum('bsd,bsd->bs', c, p['emb'][ids]), 'conv': windows,
      'two weights': p['layers']['w'][1].T @ p['mlp'][:64],
      'a batch': jnp.einsum('ldk,bse->lbk', p['layers']['w'], x),
      'rows': p['emb'][5:60] @ c[0, 0], 'turned': p['mlp'].T @ x[0].T}


@pytest.mark.slow_except(rank=[16], n=[3])
@pytest.mark.exhaustive_except(rank=[1, 16], n=[3])
@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize('rank', [1, 16, 40])
def test_the_value_is_that_of_built_weights(rank, n):
  is_shape = lambda x: isinstance(x, tuple)
  params = jax.tree.map(lambda s: jax.random.normal(
      jax.random.key(sum(s)), s) / 8, SHAPES, is_leaf=is_shape)
  x = jax.random.normal(KEY, (2, 3, 100))
  ids = jnp.array([[1, 2, 499], [7, 7, 0]])
  d = Displacement(jax.random.split(KEY, n), jnp.linspace(0.1, 0.3, n))
  z = LowRank(rank=rank)
  got, want = helpers.quick_jit(lambda p, d: (
      mezo_jax.perturbed(program, z)(p, d, x, ids),
      program(mezo_jax.displace(p, d, z), x, ids)))(params, d)
  clean = program(params, x, ids)
  for name, y in want.items():
    scale = np.max(np.abs(y))
    assert np.max(np.abs(y - clean[name])) > 0.02 * scale
    np.testing.assert_allclose(got[name], y, rtol=0, atol=2e-5 * scale)


def test_bfloat16_products_are_as_accurate_as_bfloat16_is():
  """Of the displaced product in float64; and the displacement is all there."""
  w = jax.random.normal(jax.random.key(0), (256, 192)).astype(jnp.bfloat16)
  x = jax.random.normal(jax.random.key(1), (64, 256)).astype(jnp.bfloat16)
  z, d = LowRank(rank=8), Displacement(KEY, 1e-2)
  f = lambda p, x: x @ p['w']
  wide = np.asarray(x, np.float64)
  got = np.asarray(
      jax.jit(mezo_jax.perturbed(f, z))({'w': w}, d, x), np.float64)
  exact = wide @ np.asarray(w, np.float64)
  moved = wide @ np.asarray(mezo_jax.direction({'w': w}, d, z, dtype='float32')[
      'w'], np.float64)
  assert np.max(np.abs(got - exact - moved) / (np.abs(exact) + 1)) < 2**-7
  along = np.vdot(got - exact, moved) / np.vdot(moved, moved)
  assert abs(along - 1) < 0.05


@pytest.mark.as_shipped
@pytest.mark.parametrize('kind', ['scanned', 'unrolled'])
def test_no_weights_are_built(kind):
  """Not one layer's: a program of products needs what the forward needs."""
  layers, width = 6, 256
  stacked = {'layers': {'w': jax.ShapeDtypeStruct(
      (layers, width, width), jnp.float32)}}
  apart = {f'layer_{l}': {'w': jax.ShapeDtypeStruct(
      (width, width), jnp.float32)} for l in range(layers)}
  def scanned(p, x):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x,
                        p['layers']['w'])[0]
  def unrolled(p, x):
    for l in range(layers):
      x = jnp.tanh(x @ p[f'layer_{l}']['w'])
    return x
  fn, params = (scanned, stacked) if kind == 'scanned' else (unrolled, apart)
  x = jax.ShapeDtypeStruct((4, width), jnp.float32)
  d = jax.eval_shape(lambda: Displacement(KEY[None], jnp.ones(1)))
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)
    memory = jax.jit(mezo_jax.perturbed(fn, LowRank(rank=4))).lower(
        params, d, x).compile().memory_analysis()
  forward = jax.jit(fn).lower(params, x).compile().memory_analysis()
  more = memory.temp_size_in_bytes - forward.temp_size_in_bytes
  assert more < 0.4 * 4 * width**2


@pytest.mark.parametrize('types', ['Explicit', 'shard_map'])
def test_axes_that_are_in_types(types):
  """There weights are built: the same z, and the same products."""
  params = {'w': jax.random.normal(KEY, (64, 48))}
  x, z, d = jnp.ones((8, 64)), LowRank(rank=4), Displacement(KEY, 0.1)
  f = lambda p, x: jnp.sum(jnp.tanh(x @ p['w']), -1)
  want = jax.jit(mezo_jax.perturbed(f, z))(params, d, x)
  built = jax.jit(lambda p: mezo_jax.displace(p, d, z))(params)
  if types == 'Explicit':
    mesh = helpers.mesh_of(2, 4, jax.sharding.AxisType.Explicit)
    put = lambda tree, spec: jax.device_put(
        jax.device_get(tree), jax.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
      rows = put(x, jax.P('data', None))
      whole = put(params, jax.P(None, None))
      got = jax.jit(mezo_jax.perturbed(f, z))(whole, d, rows)
      halves = put(params, jax.P(None, 'fsdp'))
      helpers.assert_close(jax.jit(
          lambda p: mezo_jax.displace(p, d, z))(halves), built)
  else:
    mesh = helpers.mesh_of(2, 4)
    g = lambda p, x: jax.shard_map(
        f, mesh=mesh, in_specs=(jax.P(), jax.P('data')),
        out_specs=jax.P('data'))(p, x)
    got = jax.jit(mezo_jax.perturbed(g, z))(params, d, x)
  np.testing.assert_allclose(jax.device_get(got), want, rtol=1e-4)


def test_options_are_checked():
  with pytest.raises(ValueError, match='rank .* 0'):
    LowRank(rank=0)
  assert LowRank() == LowRank(rank=16) != LowRank(rank=8)


# --- lazy columns -----------------------------------------------------------


def test_steps_of_a_window_share_their_columns_alone():
  """Of matrices, stacked ones too; a bias is drawn anew each step."""
  lazy = LazyLowRank(rank=2, every=3)
  params = {'layers': {'w': jnp.zeros((2, 20, 12))}, 'bias': jnp.zeros(64)}
  @jax.jit
  def z(t):
    return mezo_jax.direction(params, Displacement(
        lazy.keys(KEY, t, 2), jnp.array([1.0, 0.5])), lazy)
  steps = [jax.tree.map(np.asarray, z(t)) for t in range(6)]
  matrices = [s['layers']['w'].astype(np.float64) for s in steps]
  rank = lambda *some: [
      np.linalg.matrix_rank(np.concatenate([m[l] for m in some]), tol=1e-4)
      for l in range(2)]
  assert rank(*matrices[:3]) == rank(*matrices[3:]) == [4, 4]  # two directions
  assert rank(*matrices) == [8, 8]
  assert rank(*(m.swapaxes(1, 2) for m in matrices[:2])) == [8, 8]
  for a in range(6):
    for b in range(a):
      assert np.mean(steps[a]['bias'] == steps[b]['bias']) < 0.8


def test_lazy_directions_are_unbiased_within_their_window():
  r"""Given V, over 20,000 U: :math:`E[zz^\top] = I \otimes VV^\top / r`."""
  shape, n = (4, 5), 20_000
  lazy = LazyLowRank(rank=2, every=n)
  keys = jax.vmap(lambda t: lazy.keys(KEY, t, 1)[0])(jnp.arange(n))
  one = lambda key: mezo_jax.direction(
      {'w': jnp.zeros(shape)}, Displacement(key, 1.0), lazy)['w'].ravel()
  z = np.asarray(jax.jit(jax.vmap(one))(keys), np.float64)
  second = z.T @ z / n
  blocks = second.reshape(4, 5, 4, 5)
  of_row = blocks[0, :, 0]
  assert np.linalg.matrix_rank(of_row, tol=0.1) <= 2
  assert np.trace(of_row) == pytest.approx(5, abs=0.1)
  for i in range(4):
    for j in range(4):
      np.testing.assert_allclose(
          blocks[i, :, j], of_row * (i == j), atol=5 * 2 / np.sqrt(n))
