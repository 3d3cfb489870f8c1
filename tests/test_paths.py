"""Leaves of all sorts, their names, and where they are."""

import warnings

import helpers
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import mezo_jax
from mezo_jax.core import fingerprint, paths, sharding
from mezo_jax.directions import noise
from mezo_jax.directions.displacement import Draws

PAIR = {'a': jnp.array([[0.5, -1.0], [2.0, 0.1]]), 'b': jnp.array([1.0, 3.0])}
STEP = mezo_jax.Displacement(jax.random.key(4), 0.05)
OTHERS = {
    'int4': lambda: jnp.arange(4).astype(jnp.int4),
    'int32': lambda: jnp.array([2**24 + 1, 3]),
    'bool': lambda: jnp.array([True, False]),
    'float8': lambda: jnp.ones(4, jnp.float8_e4m3fn),
    'Python float': lambda: 1.5,
    'Python int': lambda: 2**24 + 1,
    'numpy': lambda: np.ones(3),
    'complex': lambda: jnp.ones(3, jnp.complex64),
    'key': lambda: jax.random.key(3),
    'keys': lambda: jax.random.split(jax.random.key(3)),
}


def same(a, b):
  words = lambda x: jax.random.key_data(x) if jnp.issubdtype(
      jnp.result_type(x), jax.dtypes.prng_key) else x
  assert jnp.result_type(a) == jnp.result_type(b)
  np.testing.assert_array_equal(words(a), words(b))


@pytest.mark.slow_except(name=['int32', 'key'])
@pytest.mark.exhaustive_except(name=['int32', 'key', 'int4'])
@pytest.mark.parametrize('make', [
    lambda z: mezo_jax.mezo(
        1e-2, key=0, directions=z, weight_decay=0.1, decay='^w'),
    lambda z: mezo_jax.spsa(1e-2, key=0, directions=z)])
@pytest.mark.parametrize('name', OTHERS)
def test_leaves_that_are_not_selected_are_not_touched(name, make):
  other = OTHERS[name]()
  params = {'w': jnp.ones((3, 3)), 'other': other}
  loss = lambda p: jnp.sum(p['w'] ** 2)
  for mask in ('^w$', {'w': True, 'other': False}):
    z = mezo_jax.Normal(mask=mask)
    moved = mezo_jax.displace(params, STEP, z)
    assert moved['other'] is other
    near = mezo_jax.perturbed(loss, z)(params, STEP)
    np.testing.assert_allclose(near, loss(moved), rtol=1e-5)
    tx = make(z)
    updates, state = jax.jit(lambda s, p, tx=tx: tx.update(
        None, s, p, value_fn=loss))(tx.init(params), params) if (
            'key' not in name) else tx.update(
                None, tx.init(params), params, value_fn=loss)
    assert np.any(updates['w'])
    if 'key' in name:  # to which nothing can be added
      for apply in (optax.apply_updates, jax.jit(optax.apply_updates)):
        same(apply(params, updates)['other'], other)
    else:
      got = optax.apply_updates(params, updates)['other']
      if name != 'Python float' and name != 'Python int':
        same(got, other)
      assert np.all(np.asarray(got, np.float64 if name not in (
          'complex', 'float8') else None) == np.asarray(other))


def test_weights_of_eight_bits_are_refused_where_they_are_selected():
  params = {'w': jnp.ones((3, 3)), 'q': jnp.ones(4, jnp.float8_e4m3fn)}
  for mask in (None, 'q'):
    with pytest.raises(ValueError, match="'q' is float8_e4m3fn.*mask"):
      mezo_jax.displace(params, STEP, mezo_jax.Normal(mask=mask))


# --- names -------------------------------------------------------------------


def test_a_parameter_may_be_called_value():
  params = {'attn': {n: jnp.ones((2, 2)) for n in ('query', 'key', 'value')}}
  assert [p for p, _ in paths.named_leaves(params)] == [
      'attn/key', 'attn/query', 'attn/value']
  chosen = paths.selected(params, 'attn/value$')
  assert chosen == {'attn': {'query': False, 'key': False, 'value': True}}
  z = mezo_jax.direction({'a': {
      'value': jnp.ones(9), 'raw_value': jnp.ones(9)}}, STEP)['a']
  assert not np.any(np.isclose(z['value'], z['raw_value']))


def test_variables_of_nnx_have_their_own_names():
  from flax import nnx
  class Attention(nnx.Module):
    def __init__(self, rngs):
      self.query, self.value = (nnx.Linear(2, 2, rngs=rngs) for _ in range(2))
  state = nnx.split(Attention(nnx.Rngs(0)))[1]
  assert [p for p, _ in paths.named_leaves(state)] == [
      'query/bias', 'query/kernel', 'value/bias', 'value/kernel']


def test_equal_paths_are_refused():
  params = {'a/b': jnp.ones(2), 'a': {'b': jnp.ones(2)}}
  for fn in (lambda: mezo_jax.direction(params, STEP),
             lambda: mezo_jax.mezo(1e-2, key=0).init(params)):
    with pytest.raises(ValueError, match="path 'a/b'"):
      fn()


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="generator .*'mt19937'"):
    mezo_jax.Normal('mt19937')
  with pytest.raises(ValueError, match="directions .*'cauchy'"):
    mezo_jax.mezo(1e-2, key=0, directions='cauchy')


# --- what is decayed, and what is stacked ------------------------------------


def test_weight_decay_skips_biases_and_norms_of_every_family():
  decayed = ['model/layers/3/self_attn/q_proj/weight', 'layers/attn/q/kernel',
             'embed/embedding', 'transformer/h/0/attn/c_attn/weight',
             'params/Dense_0/kernel', 'lm_head/kernel', 'decoder/project_in/w']
  kept = ['layers/attn_norm/scale', 'model/norm/weight', 'h/0/ln_1/weight',
          'transformer/ln_f/scale', 'self_attn_layer_norm/weight',
          'final_layernorm/weight', 'layers/attn/q/bias', 'post_ffw_norm/scale',
          'q_norm/scale', 'attention/output/LayerNorm/gamma', 'LayerNorm_0/w',
          'decoder/final_layer_norm/beta', 'RMSNorm_0/scale']
  def is_decayed(path, shape):
    *above, last = path.split('/')
    tree = {last: jnp.zeros(shape)}
    for name in reversed(above):
      tree = {name: tree}
    return jax.tree.leaves(paths.decayed(tree))[0]
  assert all(is_decayed(p, (2, 4, 4)) for p in decayed)
  assert not any(is_decayed(p, (4, 4)) for p in kept)
  assert not is_decayed('layers/anything/w', (4, 4))  # [L, d]
  assert not is_decayed('anything', (4,))


def test_what_is_stacked_is_told_by_shapes_or_said():
  """Names alone took the first six for stacks of vectors."""
  one = jnp.zeros((4, 5))
  for name in ('block', 'layer', 'h', 'Dense_layer', 'ResBlock'):
    tree = {name: {'kernel': one, 'bias': jnp.zeros(5)}}
    assert paths.decayed(tree) == {name: {'kernel': True, 'bias': False}}
  assert paths.decayed({'block': {'w': one}}) == {'block': {'w': True}}
  tree = {'encoder': {'mlp': {'kernel': jnp.zeros((3, 4, 5)),
                              'offset': jnp.zeros((3, 5))}}, 'out': one}
  assert paths.decayed(tree) == {'encoder': {'mlp': {
      'kernel': True, 'offset': False}}, 'out': True}
  layers = {'layers': [{'q': jnp.zeros((4, 4))}, {'q': jnp.zeros((4, 4))}]}
  assert all(jax.tree.leaves(paths.decayed(layers)))
  assert not any(jax.tree.leaves(paths.decayed({'w': one}, how='w')))
  with pytest.warns(UserWarning, match=r'weight_decay.*\(a\).*\(b\).*decay='):
    mezo_jax.mezo(1e-2, key=0, weight_decay=0.1).init(PAIR)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    mezo_jax.mezo(1e-2, key=0).init(PAIR)
    tx = mezo_jax.mezo(1.0, key=0, weight_decay=0.5, decay='b')
    updates, _ = tx.update(None, tx.init(PAIR), PAIR,
                           value_fn=lambda p: jnp.float32(1.0))
  helpers.assert_close(updates['b'], -0.5 * PAIR['b'])
  assert not np.any(updates['a'])


def test_what_is_said_to_be_stacked_has_a_key_for_each_layer():
  tree = {'deep': {'w': jnp.zeros((3, 4, 5))}}
  one = mezo_jax.Displacement(jax.random.key(2), 1.0)
  said = mezo_jax.direction(tree, one, mezo_jax.Normal(stacked='deep'))
  named = {'deep_layers': {'w': tree['deep']['w']}}
  key = noise.leaf_key(one.keys, 'deep/w')
  for l in range(3):
    words = jax.random.key_data(jax.random.fold_in(key, l))
    s = noise.Stream(
        words[None, None, None], jnp.zeros((1, 1), jnp.uint32), (5, 1))
    want = Draws((s,), jnp.ones(1), mezo_jax.Normal()).built(jnp.zeros((4, 5)))
    helpers.assert_close(said['deep']['w'][l], want)
  plain = mezo_jax.direction(named, one, mezo_jax.Normal(stacked=False))
  apart = mezo_jax.direction(named, one)
  assert not np.any(plain['deep_layers']['w'] == apart['deep_layers']['w'])


ONE_LAYER = {
    'Dense': {'kernel': (32, 48), 'bias': (48,)},
    'square Dense': {'kernel': (48, 48), 'bias': (48,)},
    'Dense without bias': {'kernel': (32, 48)},
    'torch': {'weight': (48, 32), 'bias': (48,)},
    'torch without bias': {'weight': (48, 32)},
    'torch convolution': {'weight': (48, 16, 3), 'bias': (48,)},
    'Equinox convolution': {'weight': (48, 16, 3, 3), 'bias': (48, 1, 1)},
    'Haiku': {'w': (48, 48), 'b': (48,)},
    'LayerNorm': {'scale': (48,), 'bias': (48,)},
    'embedding': {'embedding': (48, 32)},
    'block': {'up': {'kernel': (48, 48)}, 'norm': {'scale': (48,)}},
    'heads': {'q': {'kernel': (48, 4, 12)}, 'up': {'kernel': (48, 48)}},
}
STACKS = {
    'Dense': {'kernel': (12, 48, 48), 'bias': (12, 48)},
    'as wide as deep': {'kernel': (12, 12, 12), 'bias': (12, 12)},
    'lone': {'w': (12, 32, 48)},
    'norms': {'scale': (12, 48), 'bias': (12, 48)},
    'biases': {'q': {'bias': (12, 48)}},
    'a number a layer': {'lora_a': (12, 48, 4), 'lora_scale': (12,)},
    'one output': {'kernel': (12, 48, 1), 'bias': (12, 1)},
}
is_shape = lambda x: isinstance(x, tuple)


@pytest.mark.parametrize('name', ['h', 'block', 'Block', 'layers', 'my_layers'])
def test_a_name_alone_makes_no_stack(name):
  """Shapes must agree that a module called so is layers on a first axis."""
  for kind, tree in ONE_LAYER.items():
    tree = {name: jax.tree.map(jnp.zeros, tree, is_leaf=is_shape)}
    assert not any(paths.stacked(tree)), kind
    assert {p for (p, _), d in zip(paths.named_leaves(tree), jax.tree.leaves(
        paths.decayed(tree))) if d} == {p for p, x in paths.named_leaves(
            tree) if x.ndim > 1 and 'bias' not in p}, kind
  for kind, tree in STACKS.items():
    tree = {name: jax.tree.map(jnp.zeros, tree, is_leaf=is_shape)}
    assert all(paths.stacked(tree)), kind
    assert not any(paths.stacked(tree, how=False)), kind


def test_low_rank_in_a_module_named_h():
  tree = {'h': {'kernel': jnp.zeros((32, 48)), 'bias': jnp.zeros(48)},
          'rest': {'blocks': {'w': jnp.zeros((3, 32, 48))},
                   'rate': 1.0}}
  z = mezo_jax.direction(tree, mezo_jax.Displacement(jax.random.key(0), 1.0),
                         mezo_jax.LowRank(rank=2))
  assert np.linalg.matrix_rank(z['h']['kernel']) == 2
  assert [*np.linalg.matrix_rank(z['rest']['blocks']['w'])] == [2, 2, 2]


def test_layers_below_a_module_with_such_a_name():
  """Stacked and apart they draw the same; the outer name decides nothing."""
  stack = {'my_block': {'layers': {'w': jnp.zeros((3, 4, 4))},
                        'norm': {'scale': jnp.zeros(5)}}}
  apart = {'my_block': {f'layers_{i}': {'w': jnp.zeros((4, 4))}
                        for i in range(3)} | {'norm': {'scale': jnp.zeros(5)}}}
  z = mezo_jax.direction(stack, STEP)['my_block']
  for i in range(3):
    one = mezo_jax.direction(apart, STEP)['my_block'][f'layers_{i}']
    np.testing.assert_array_equal(one['w'], z['layers']['w'][i])


def test_a_stack_and_a_layer_of_the_same_name_are_refused():
  tree = {'layers': {'w': jnp.zeros((3, 4, 4))}, 'layers_1': {
      'w': jnp.zeros((4, 4))}}
  with pytest.raises(ValueError, match="'layers/w' and 'layers_1/w'"):
    mezo_jax.direction(tree, STEP)
  tree['layers_3'] = tree.pop('layers_1')  # a layer that the stack has not
  mezo_jax.direction(tree, STEP)


def test_rules_of_a_module_with_such_a_name_are_of_all_its_axes():
  mesh = helpers.mesh_of(2, 4)
  tree = {'block': {'kernel': jnp.ones((512, 256)), 'bias': jnp.ones(256)}}
  got = sharding.param_shardings(tree, mesh)['block']['kernel']
  assert got.spec == P('fsdp')  # its largest axis, which is not layers
  got = sharding.param_shardings(tree, mesh, [('kernel', P('data'))])
  assert got['block']['kernel'].spec == P('data')


# --- places ------------------------------------------------------------------


@pytest.mark.parametrize('make', [
    lambda: mezo_jax.mezo(1e-2, key=0),
    lambda: optax.chain(mezo_jax.spsa(key=0), optax.sgd(1e-2))])
def test_params_on_a_mesh_compile_one_step(make):
  """The state starts where the step leaves it."""
  mesh = helpers.mesh_of(2, 4)
  params = {'w': jax.device_put(
      jnp.ones((8, 8)), jax.NamedSharding(mesh, P(None, 'fsdp')))}
  tx = make()
  @jax.jit
  def step(params, state):
    updates, state = tx.update(
        None, state, params, value_fn=lambda p: jnp.sum(p['w'] ** 2))
    return optax.apply_updates(params, updates), state
  params, state = step(params, tx.init(params))
  with helpers.compilations() as seen:
    params, state = step(params, state)
  assert not seen


def test_collisions_are_those_of_the_stacks_that_were_declared():
  tree = {'block': {'w': jnp.zeros((2, 3))}, 'block_0': {'w': jnp.zeros(3)}}
  both = mezo_jax.Normal(stacked={'block': True, 'block_0': False})
  with pytest.raises(ValueError, match='same noise'):
    mezo_jax.direction(tree, STEP, both)
  one = mezo_jax.direction(tree, STEP, mezo_jax.Normal(stacked=False))
  assert not np.any(np.asarray(one['block']['w'][0]) == one['block_0']['w'])


def test_fingerprints_of_64_bits():
  with jax.enable_x64(True):
    x = jnp.arange(6.0).reshape(2, 3)
    assert x.dtype == jnp.float64
    found = {fingerprint.of_weights({'w': y}) for y in (
        x, x.at[1, 2].add(1e-15), x[::-1], x.astype(jnp.float32))}
  assert len(found) == 4


def test_a_mask_that_is_mapped_from_quantised_params():
  """A quantised weight is one leaf, however many arrays it has."""
  params = {'a': mezo_jax.quantize(jnp.ones((32, 2))), 'b': jnp.ones(3)}
  mask = lambda params: jax.tree.map(lambda x: x is params['b'], params)
  assert paths.resolved(params, mask) == [False, True]
