"""perturbed(f)(θ, d) is f(displace(θ, d)) and builds no second θ."""

import helpers
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import mezo_jax
from mezo_jax import Displacement, Normal, Rademacher
from mezo_jax.core import paths
from mezo_jax.directions import noise
from mezo_jax.perturb.interpreter import RULES

KEY = jax.random.key(4)
STEP = Displacement(KEY, 0.05)
W = jax.random.normal(jax.random.key(1), (4, 6, 6)) / 3
X = jax.random.normal(jax.random.key(2), (3, 6))
E = jax.random.normal(jax.random.key(3), (9, 6))
IDS = jnp.array([[1, 7], [0, 8]])


def both(f, params, displacement=STEP, directions=Normal()):
  built = helpers.quick_jit(
      lambda p: f(mezo_jax.displace(p, displacement, directions)))(params)
  lazy = helpers.quick_jit(
      lambda p: mezo_jax.perturbed(f, directions)(p, displacement))(params)
  return built, lazy


def dense(c, w):
  return jnp.tanh(c @ w), jnp.sum(w)


def through_while(w):
  return lax.while_loop(
      lambda c: c[0] < 4,
      lambda c: (c[0] + 1, jnp.tanh(c[1] @ lax.dynamic_index_in_dim(
          w, c[0], keepdims=False))), (0, X))[1]


def micro_batched(p):
  """A loop over parts of the batch outside the loop over layers."""
  return lax.map(lambda x: lax.scan(dense, x[None], p['w'])[0], X)


@jax.custom_vjp
def custom(x, w):
  return x @ w


custom.defvjp(lambda x, w: (x @ w, None), lambda r, g: (g, g))

PROGRAMS = {
    'scan': lambda p: lax.scan(dense, X, p['w']),
    'scan, reversed': lambda p: lax.scan(dense, X, p['w'], reverse=True),
    'scan, unrolled': lambda p: lax.scan(dense, X, p['w'], unroll=2),
    'scan of remat of jit': lambda p: lax.scan(
        jax.checkpoint(jax.jit(dense)), X, p['w']),
    'scan of a cast': lambda p: lax.scan(
        dense, X.astype(jnp.bfloat16), p['w'].astype(jnp.bfloat16))[0],
    'scan of scans': lambda p: lax.scan(
        lambda c, w: lax.scan(dense, c, w), X, p['w'].reshape(2, 2, 6, 6)),
    'scan over part of the layers': lambda p: lax.scan(dense, X, p['w'][1:3]),
    'scan inside a loop over the batch': micro_batched,
    'shared weights in a scan': lambda p: lax.scan(
        lambda c, _: (jnp.tanh(c @ p['w'][0]), None), X, None, length=3)[0],
    'rows in a scan': lambda p: lax.scan(
        lambda c, i: (c + p['e'][i], None), X[0], IDS.ravel())[0],
    'unrolled layers': lambda p: X @ p['w'][0] @ p['w'][3],
    'while over layers': lambda p: through_while(p['w']),
    'cond': lambda p: lax.cond(
        p['b'][0] > -9, lambda w: X @ w[2], lambda w: X, p['w']),
    'cond that returns weights': lambda p: lax.cond(
        X[0, 0] > -9, lambda w: w, lambda w: 2 * w, p['w']),
    'rows by index': lambda p: p['e'][IDS],
    'rows by take': lambda p: jnp.take(p['e'], IDS, axis=0),
    'rows, clipped': lambda p: jnp.take(p['e'], IDS + 5, axis=0, mode='clip'),
    'rows, negative': lambda p: p['e'][-IDS],
    'rows of layers': lambda p: p['w'][jnp.array([2, 0])],
    'elements': lambda p: p['e'][IDS, IDS],
    'columns': lambda p: jnp.take(p['e'], IDS % 6, axis=1),
    'dynamic slice out of range': lambda p: lax.dynamic_slice(
        p['e'], (7, 0), (4, 6)),
    'strided slice': lambda p: p['e'][::2],
    'part of rows': lambda p: p['e'][2:5, 1:3],
    'row of a layer': lambda p: p['w'][1][2],
    'tied': lambda p: p['e'][IDS] @ p['e'].T,
    'transpose': lambda p: p['w'].T,
    'arithmetic': lambda p: (1 + p['b']) * 2,
    'custom_jvp': lambda p: jax.nn.relu(p['b']),
    'custom_vjp': lambda p: custom(X, p['w'][0]),
    'untouched': lambda p: (p['e'], p['b'].reshape(2, 3), 3.0),
    'integers': lambda p: p['e'].astype(jnp.int32),
    'vmap': lambda p: jax.vmap(lambda w: X @ w)(p['w']),
    'einsum': lambda p: jnp.einsum('lij,bi->lbj', p['w'], X),
    'sharding constraint': lambda p: lax.scan(
        dense, X, lax.with_sharding_constraint(
            p['w'], jax.NamedSharding(helpers.mesh_of(1, 1), jax.P()))),
    'grad inside': lambda p: jax.grad(
        lambda x: jnp.sum(lax.scan(dense, x, p['w'])[0]))(X),
}


def test_the_rules_are_registered():
  """Without one, its operation would build whole parameters."""
  assert {'dot_general', 'gather', 'scan', 'while', 'cond'} <= {*RULES}


@pytest.mark.slow_except(stack=['layers'], name=[
    'scan', 'scan of remat of jit', 'scan of scans', 'rows in a scan',
    'unrolled layers', 'cond', 'rows by index', 'tied', 'transpose',
    'custom_vjp', 'vmap', 'einsum', 'grad inside'])
@pytest.mark.exhaustive_except(stack=['layers'])
@pytest.mark.parametrize('stack', ['layers', 'stack'])
@pytest.mark.parametrize('name', PROGRAMS)
def test_equals_built_weights(name, stack):
  """For weights stacked by name (a key per layer) and for any other (one)."""
  params = {stack: W, 'e': E, 'b': X[0]}
  f = lambda p: PROGRAMS[name]({'w': p[stack], 'e': p['e'], 'b': p['b']})
  built, lazy = both(f, params)
  helpers.assert_close(
      built, lazy, *((2e-2, 2e-2) if 'cast' in name else (1e-5, 1e-5)))
  clean = f(params)
  assert not jax.tree.all(jax.tree.map(jnp.array_equal, clean, lazy))


def test_names_of_stacks_do_not_matter_to_the_test_above():
  assert paths.locate('layers/w')[2] and not paths.locate('stack/w')[2]


@pytest.mark.slow_except(directions=[Rademacher()])
@pytest.mark.parametrize('directions', [
    Rademacher(), Normal('threefry2x32'), Normal(mask='layers'),
    Normal(mask={'layers': False, 'e': True}),
    Normal(stacked='^e$'), Normal(mask={
        'layers': jax.random.bernoulli(KEY, 0.5, W.shape),
        'e': jax.random.bernoulli(KEY, 0.5, E.shape)})], ids=repr)
def test_directions(directions):
  f = lambda p: (lax.scan(dense, X, p['layers']), p['e'][IDS] @ p['e'].T)
  built, lazy = both(f, {'layers': W, 'e': E}, directions=directions)
  helpers.assert_close(built, lazy)


@pytest.mark.slow
@pytest.mark.exhaustive_except(n=[12])
@pytest.mark.parametrize('n', [5, 12])  # unrolled, and a loop
def test_many_keys(n):
  keys = jax.vmap(jax.random.key)(jnp.arange(n))
  pairs = Displacement(keys, 0.01 * jnp.arange(n) - 0.02)
  params = {'layers': W, 'e': E}
  f = lambda p: (lax.scan(dense, X, p['layers']), p['e'][IDS])
  built, lazy = both(f, params, pairs)
  helpers.assert_close(built, lazy)
  one_by_one = params
  for pair in zip(*pairs):
    one_by_one = mezo_jax.displace(one_by_one, Displacement(*pair))
  helpers.assert_close(mezo_jax.displace(params, pairs), one_by_one)


def test_displace_against_numpy():
  params = {'layers': W, 'e': E}
  as_jax = Normal('threefry2x32')  # draws what jax.random does
  got = mezo_jax.displace(params, STEP, as_jax)
  key = noise.leaf_key(KEY, 'e')
  want = np.asarray(E) + np.float32(0.05) * np.asarray(
      jax.random.normal(key, E.shape))
  np.testing.assert_allclose(got['e'], want, rtol=1e-6)
  helpers.assert_close(
      jax.tree.map(jnp.add, params, mezo_jax.direction(
          params, STEP, as_jax)), got)


@pytest.mark.slow
def test_scanned_linen_model_is_unchanged_and_equal():
  model = helpers.ScannedLinen()
  ids = jnp.arange(12).reshape(3, 4)
  params = helpers.quick_jit(model.init)(jax.random.key(0), ids)['params']
  built, lazy = both(lambda p: model.apply({'params': p}, ids), params)
  helpers.assert_close(built, lazy)


@pytest.mark.slow
def test_scanned_nnx_model():
  from flax import nnx

  class Stack(nnx.Module):
    def __init__(self, rngs):
      @nnx.split_rngs(splits=3)
      @nnx.vmap(in_axes=(0,), out_axes=0)
      def make(rngs):
        return nnx.Linear(6, 6, rngs=rngs)
      self.layers = make(rngs)

    def __call__(self, x):
      @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
      def forward(x, layer):
        return jnp.tanh(layer(x))
      return forward(x, self.layers)

  graphdef, state = nnx.split(Stack(nnx.Rngs(0)))
  built, lazy = both(lambda s: nnx.merge(graphdef, s)(X), state)
  helpers.assert_close(built, lazy)


@pytest.mark.slow_except(generator=['hash32'])
@pytest.mark.as_shipped
@pytest.mark.parametrize('generator', noise.GENERATORS)
@pytest.mark.parametrize('cast', [False, True])
def test_memory_stays_at_inference(generator, cast):
  """12 layers, the weights in a scan (cast as a whole first, or not): beside
  the forward's own memory at most one layer and a half is needed."""
  layers, d = 12, 512
  w = jax.ShapeDtypeStruct((layers, d, d), jnp.float32)
  x = jnp.ones((8, d))

  def f(p):
    p = jax.tree.map(lambda a: a.astype(jnp.float16) if cast else a, p)
    return jnp.sum(lax.scan(lambda c, a: (jnp.tanh(
        c @ a.astype(jnp.float32)), None), x, p['layers'])[0])

  plain = jax.jit(f).lower({'layers': w}).compile().memory_analysis()
  lazy = jax.jit(lambda p: mezo_jax.perturbed(f, Normal(generator))(
      p, STEP)).lower({'layers': w}).compile().memory_analysis()
  layer = 4 * d * d
  assert lazy.temp_size_in_bytes < plain.temp_size_in_bytes + 1.5 * layer


@pytest.mark.as_shipped
def test_embedding_rows_only():
  table = jax.ShapeDtypeStruct((50_000, 64), jnp.float32)
  f = lambda p: jnp.sum(p['e'][IDS])
  memory = jax.jit(lambda p: mezo_jax.perturbed(f)(p, STEP)).lower(
      {'e': table}).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.001 * 4 * table.size


def test_half_precision_is_displaced_in_float32():
  w = jnp.full((64, 64), 1.0, jnp.bfloat16)
  got = mezo_jax.displace(
      {'w': w}, Displacement(KEY, 1e-2), Normal('threefry2x32'))['w']
  z = jax.random.normal(noise.leaf_key(KEY, 'w'), w.shape)
  want = (w.astype(jnp.float32) + np.float32(1e-2) * z).astype(jnp.bfloat16)
  helpers.assert_bitwise(got, want)


def test_integer_leaves_are_left_alone():
  params = {'w': jnp.ones(3), 'steps': jnp.arange(3)}
  got = mezo_jax.displace(params, STEP)
  assert got['steps'].dtype == jnp.int32
  helpers.assert_bitwise(got['steps'], params['steps'])


@pytest.mark.parametrize('mask,message', [
    ('nowhere', "'nowhere' .*b/c, w"),
    ({'w': True}, 'mask .*tree'),
    (lambda p: False, 'mask .*b/c, w'),
])
def test_bad_masks(mask, message):
  with pytest.raises(ValueError, match=message):
    paths.selected({'w': W, 'b': {'c': E}}, mask)


def test_an_empty_displacement_is_refused():
  for keys, coefs in ((jax.random.split(KEY, 2)[:0], jnp.zeros(0)),
                      (KEY, jnp.zeros(2))):
    with pytest.raises(ValueError, match='key'):
      mezo_jax.displace({'w': W}, Displacement(keys, coefs))
  with pytest.raises(ValueError, match='Displacement.* list'):
    mezo_jax.displace({'w': W}, [(KEY, 1.0)])
