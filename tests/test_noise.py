"""z(key): its definition, its invariances and its statistics."""

import functools
import hashlib

import helpers
import jax
from jax.extend import random as extend_random
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import mezo_jax
from mezo_jax import Displacement, Normal, Rademacher
from mezo_jax.core import paths, views
from mezo_jax.directions import definition, noise, streams
from mezo_jax.directions.displacement import Draws
from mezo_jax.transforms import stochastic_rounding

pytestmark = pytest.mark.as_shipped

KEY = jax.random.key(11)
BOTH = [kind(g) for g in noise.GENERATORS for kind in (Normal, Rademacher)]
THREEFRY = Normal('threefry2x32')
HASH32 = [Normal('hash32'), Rademacher('hash32')]


def z(tree, key=KEY, directions=Normal(), **kwargs):
  return mezo_jax.direction(
      tree, Displacement(key, 1.0), directions, **kwargs)


@pytest.mark.slow
def test_it_is_what_jax_random_draws():
  leaf = jnp.zeros((5, 7, 3))
  key = noise.leaf_key(KEY, 'embed/table')
  tree = {'embed': {'table': leaf}}
  helpers.assert_bitwise(
      z(tree, directions=THREEFRY)['embed']['table'],
      jax.random.normal(key, leaf.shape))
  helpers.assert_bitwise(
      z(tree, directions=Rademacher('threefry2x32'))['embed']['table'],
      jax.random.rademacher(key, leaf.shape, jnp.float32))


@pytest.mark.parametrize('directions, want', [
    (Normal('hash32'), 'ec0e805882af'),
    (Normal('threefry2x32'), 'c5263c879432'),
    (Rademacher('hash32'), '9f28c4d0cfc7'),
    (Rademacher('threefry2x32'), '4cb52c832b5f'),
    (mezo_jax.LowRank(rank=2), 'a2b2e02daecb')], ids=str)
@pytest.mark.slow_except(directions=[Normal('hash32')])
def test_z_is_the_same_on_every_version_of_jax(directions, want):
  """The bits were recorded with JAX 0.10, 0.11 and 0.12 on CPUs."""
  tree = {
      'embed': {'table': jnp.zeros((37, 19))}, 'h': jnp.zeros(5, jnp.bfloat16),
      'layers': {'w': jnp.zeros((3, 16, 9)), 'b': jnp.zeros((3, 7))}}
  found = z(tree, directions=directions, dtype=jnp.float32)
  bits = b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(found))
  assert hashlib.sha256(bits).hexdigest()[:12] == want


@pytest.mark.parametrize('directions', BOTH, ids=str)
@pytest.mark.slow_except(directions=HASH32)
def test_it_is_its_definition(directions):
  tree = {'embed': jnp.zeros((9, 5)), 'scale': jnp.zeros(()),
          'layers': {'w': jnp.zeros((3, 4, 6)), 'b': jnp.zeros((3, 4))},
          'head': {'layers_2': {'b': jnp.zeros(7)}}}
  found = jax.jit(lambda tree: z(tree, directions=directions))(tree)
  for (path, leaf), is_stack, got in zip(
      paths.named_leaves(tree), paths.stacked(tree), jax.tree.leaves(found)):
    helpers.assert_bitwise(got, jax.jit(functools.partial(
        definition.z_of_leaf, path=path, shape=leaf.shape,
        directions=directions, stacked=is_stack))(KEY))


def test_a_layer_has_the_key_of_that_layer():
  tree = {'layers': {'w': jnp.zeros((4, 6, 5))}}
  key = noise.leaf_key(KEY, 'layers/w')
  for l in range(4):
    helpers.assert_bitwise(
        z(tree, directions=THREEFRY)['layers']['w'][l],
        jax.random.normal(jax.random.fold_in(key, l), (6, 5)))


@pytest.mark.parametrize('directions', BOTH, ids=str)
@pytest.mark.parametrize('shape', [(6, 5), (7,), ()])
@pytest.mark.slow_except(directions=HASH32)
@pytest.mark.exhaustive_except(directions=HASH32)
def test_stacked_and_separate_layers_agree(directions, shape):
  how = dict(directions=directions)
  stacked = z({'layers': {'q': {'w': jnp.zeros((3, *shape))}}}, **how)
  leaf = {'q': {'w': jnp.zeros(shape)}}
  for separate in (
      {f'layers_{l}': leaf for l in range(3)},  # Linen's names
      {'layers': {str(l): leaf for l in range(3)}},
      {'layers': [leaf] * 3}):  # NNX's lists
    for l, got in enumerate(jax.tree.leaves(z(separate, **how))):
      helpers.assert_bitwise(got, stacked['layers']['q']['w'][l])


def test_where_layers_are():
  for path, want in {
      'layers/attn/q': ('layers/attn/q', None, True),
      'layers_12/attn/q': ('layers/attn/q', 12, False),
      'model/layers/3/q': ('model/layers/q', 3, False),
      'h_0/ln_1/scale': ('h/ln_1/scale', 0, False),
      'enc/encoderblock/MlpBlock_0/w': ('enc/encoderblock/MlpBlock_0/w', None,
                                        True),
      'enc/encoderblock_2/MlpBlock_0/w': ('enc/encoderblock/MlpBlock_0/w', 2,
                                          False),
      'Dense_0/kernel': ('Dense_0/kernel', None, False),
      'head/h': ('head/h', None, False),
  }.items():
    assert paths.locate(path) == want


def test_linen_and_nnx_paths_agree():
  from flax import nnx
  model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  state = nnx.split(model)[1]
  linen = {'kernel': jnp.zeros((4, 3)), 'bias': jnp.zeros(3)}
  got = nnx.to_pure_dict(z(state))
  helpers.assert_bitwise(got, z(linen))


def test_nothing_else_enters():
  """Not dtype, siblings, masks nor order: law 1."""
  tree = {'a': {'w': jnp.zeros((8, 8))}, 'b': {'w': jnp.zeros((8, 8))}}
  full = z(tree)
  half = z(jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree),
           dtype=jnp.float32)
  helpers.assert_bitwise(full, half)
  helpers.assert_bitwise(full['b'], z({'b': tree['b']})['b'])
  helpers.assert_bitwise(full['b'], z(tree, directions=Normal(mask='^b/'))['b'])
  assert not np.any(z(tree, directions=Normal(mask='^b/'))['a']['w'])
  assert np.abs(np.corrcoef(
      full['a']['w'].ravel(), full['b']['w'].ravel())[0, 1]) < 0.5


def test_rows_are_random_access():
  shape = (9, 4, 5)
  like = jnp.zeros(shape)
  def draw(stream, like):
    return Draws((stream,), jnp.ones(1), THREEFRY).built(like)
  whole_stream = streams.of_leaf(KEY[None], 'embed', shape)
  whole = draw(whole_stream, like)
  index = jnp.array([[7, 0], [3, 3]])
  rows = streams.viewed(whole_stream, views.Take(0, index), shape)
  got = draw(rows, like[index])
  helpers.assert_bitwise(got, whole[index])
  inner = streams.viewed(streams.spread(rows, 2, 4),
                         views.Take(1, jnp.array(0)), (2, 2, 4, 5))
  helpers.assert_bitwise(
      draw(inner, like[:2]), whole[index[:, 0]])


def test_counters_beyond_32_bits():
  """Row 65,000 of a leaf of 4.9e9 elements, against jax's own threefry."""
  n, row = 70_000, 65_000
  s = jax.eval_shape(lambda: streams.of_leaf(KEY[None], 'w', (n, n)))
  assert s.lo.shape == (n, 1) and s.hi is not None
  one = jax.jit(lambda: streams.viewed(
      streams.of_leaf(KEY[None], 'w', (n, n)), views.Take(0, jnp.array(row)),
      (n, n)))()
  bits = noise.words(one, 0, jnp.zeros(4), 'threefry2x32')
  counter = row * n + np.arange(4)
  key = jax.random.key_data(noise.leaf_key(KEY, 'w'))
  count = np.concatenate([counter >> 32, counter & 0xFFFFFFFF])
  hi, lo = np.split(
      np.asarray(extend_random.threefry_2x32(key, jnp.uint32(count))), 2)
  np.testing.assert_array_equal(bits, hi ^ lo)


def test_names_that_hash_alike_are_refused():
  tree = {'plumless': jnp.zeros(2), 'buckeroo': jnp.zeros(2)}
  with pytest.raises(ValueError, match="'buckeroo' and 'plumless'"):
    z(tree)


@pytest.mark.parametrize('directions', BOTH, ids=str)
@pytest.mark.slow_except(directions=HASH32)
@pytest.mark.exhaustive_except(directions=HASH32)
def test_jit_and_eager_agree(directions):
  tree = {'layers': {'w': jnp.ones((3, 40, 50))}}
  draw = functools.partial(z, directions=directions)
  if directions == Normal('hash32'):
    # jit contracts a*b + c; eagerly each is an operation, and rounds.
    helpers.assert_close(draw(tree), jax.jit(draw)(tree))
  else:
    helpers.assert_bitwise(draw(tree), jax.jit(draw)(tree))


@pytest.mark.parametrize('directions', BOTH, ids=str)
@pytest.mark.slow_except(directions=[Normal('hash32')])
@pytest.mark.exhaustive_except(directions=HASH32)
def test_no_temporary_of_a_leafs_size(directions):
  tree = {'layers': {'w': jax.ShapeDtypeStruct((8, 256, 512), jnp.float32)},
          'embed': jax.ShapeDtypeStruct((5000, 256), jnp.float32)}
  size = sum(4 * x.size for x in jax.tree.leaves(tree))
  move = jax.jit(
      lambda t: mezo_jax.displace(t, Displacement(KEY, 0.1), directions),
      donate_argnums=0)
  memory = move.lower(tree).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.01 * size
  assert memory.alias_size_in_bytes == size


@pytest.mark.parametrize('directions', BOTH, ids=str)
@pytest.mark.slow_except(directions=HASH32)
@pytest.mark.exhaustive_except(directions=HASH32)
def test_statistics(directions):
  """Moments, and correlations between keys, layers and neighbours, each
  within 5 standard errors; 1.6e7 draws."""
  tree = {'layers': {'w': jnp.zeros((4, 1000, 1000))}}
  draw = jax.jit(lambda k: z(tree, k, directions)['layers']['w'])
  a, b = (np.asarray(draw(jax.random.key(k)), np.float64) for k in (0, 1))
  n = a.size
  normal = isinstance(directions, Normal)
  assert abs(a.mean()) < 5 / np.sqrt(n)
  assert abs((a**2).mean() - 1) < (5 * np.sqrt(2 / n) if normal else 1e-12)
  assert abs((a**3).mean()) < 5 * np.sqrt((15 if normal else 1) / n)
  if normal:
    assert abs((a**4).mean() - 3) < 5 * np.sqrt(96 / n)
    for t in (1, 2, 3, 4):
      p = {1: .3173105, 2: .0455003, 3: .0026998, 4: 6.334e-5}[t]
      assert abs(np.mean(np.abs(a) > t) - p) < 5 * np.sqrt(p / n)
  flat = a.ravel()
  pairs = {'keys': (a, b), 'layers': (a[0], a[1]), 'rows': (a[:, 0], a[:, 1]),
           'columns': (a[..., :-1], a[..., 1:])}
  pairs |= {f'lag {2**i}': (flat[:-2**i], flat[2**i:]) for i in range(20)}
  for name, (x, y) in pairs.items():
    c = np.mean(x * y)
    assert abs(c) < 5 / np.sqrt(x.size), name
    c2 = np.mean((x**2 - 1) * (y**2 - 1)) if normal else 0
    assert abs(c2) < 10 / np.sqrt(x.size), name


def test_hash32_streams_of_related_keys_are_independent():
  """fold_in's keys are far apart; raw keys that differ in one bit are not."""
  like, ones = jnp.zeros(200_000), jnp.ones(1)
  def draw(words):
    key = jax.random.wrap_key_data(jnp.uint32(words), impl='threefry2x32')
    s = noise.Stream(
        jax.random.key_data(key)[None, None], jnp.zeros(1, jnp.uint32), (1,))
    return np.asarray(Draws((s,), ones, Rademacher()).built(like))
  base = draw([1234567, 7654321])
  for bit in range(32):
    for words in ([1234567 ^ (1 << bit), 7654321],
                  [1234567, 7654321 ^ (1 << bit)]):
      assert abs(np.mean(base * draw(words))) < 5 / np.sqrt(base.size)


def test_hash32_counters_beyond_32_bits():
  """Draws 2**32 apart, of a leaf of 4.9e9 elements, are different ones."""
  n = 70_000
  row = jax.jit(lambda i: noise.words(streams.viewed(
      streams.of_leaf(KEY[None], 'w', (n, n)), views.Take(0, i), (n, n)), 0,
      jnp.zeros(n), 'hash32'))
  later, at = divmod(2**32, n)
  first, wrapped = np.asarray(row(0))[:n - at], np.asarray(row(later))[at:]
  assert np.mean(first == wrapped) < 1e-3
  assert abs(np.corrcoef(first, wrapped)[0, 1]) < 5 / np.sqrt(first.size)


def test_quantile_of_hash32():
  """Against scipy, over all exponents of the tail, within 5e-6."""
  words = np.concatenate([
      np.arange(2**16), 2**32 - 1 - np.arange(2**16),
      np.random.RandomState(0).randint(0, 2**32, 10**6),
      2 ** np.arange(32)]).astype(np.uint32)
  got = np.asarray(Normal().draw(jnp.asarray(words)))
  tail = ((words >> 1) + 0.5) / 2**31
  want = np.sqrt(2) * scipy.special.erfcinv(tail)
  np.testing.assert_allclose(np.abs(got), want, atol=5e-6)
  assert np.array_equal(np.signbit(got), words % 2 == 1)


def test_rounding_words_are_independent_of_z():
  like = jnp.zeros(2**20)
  s = streams.of_leaf(KEY[None], 'w', like.shape)
  z_words, words = (np.asarray(noise.words(s, 0, like, g), np.float64) / 2**32
                    for g in ('hash32', 'rounding'))
  for u in (words, z_words):
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / u.size)
  for f in (lambda x: x, lambda x: (x - 0.5) ** 2, lambda x: x > 0.5):
    c = np.corrcoef(f(z_words), f(words))[0, 1]
    assert abs(c) < 5 / np.sqrt(words.size)


def test_draws_are_never_made_in_half_precision():
  leaf = jnp.zeros((500, 1000), jnp.bfloat16)
  draws = np.asarray(z({'w': leaf})['w'].astype(jnp.float32))
  assert len(np.unique(draws)) > 2000  # jax.random.normal(dtype=bf16): 128
  assert np.abs(draws).max() > 4
  assert abs(draws.mean()) < 5 / np.sqrt(draws.size)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('at', [0.0213, -1.7, 3e-5])
def test_stochastic_rounding_is_unbiased(dtype, at):
  n = 200_000
  bits = jax.random.bits(jax.random.key(0), (n,), jnp.uint32)
  near = jnp.float32(at).astype(dtype)
  ulp = abs(float(jax.lax.nextafter(near, jnp.array(9, dtype))) - float(near))
  for share in (0.0, 0.1, 0.5, 0.93):
    x = jnp.float32(float(near) + share * ulp)
    got = np.asarray(stochastic_rounding.stochastic_round(
        jnp.full(n, x), dtype, bits).astype(jnp.float32), np.float64)
    assert len(np.unique(got)) <= 2
    tolerance = 5 * ulp * np.sqrt(share * (1 - share) / n) + 1e-3 * ulp
    assert abs(got.mean() - float(x)) <= tolerance


def test_keys():
  assert noise.as_key(3) == noise.as_key(jax.random.key(3))
  assert noise.as_key(jax.random.PRNGKey(3)) == noise.as_key(3)
  assert jax.random.key_impl(noise.as_key(
      jax.random.key(0, impl='rbg'))) == 'threefry2x32'
  for bad in (1.5, jnp.zeros(3), jax.random.split(KEY, 2)):
    with pytest.raises(ValueError, match='key'):
      noise.as_key(bad)
