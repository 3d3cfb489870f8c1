"""Any layout of a model: the forward's memory and a layer, or a warning."""

import functools
import re
import warnings

from flax import linen as nn
import helpers
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import mezo_jax
from mezo_jax.core import views
from mezo_jax.directions import streams
from mezo_jax.directions.displacement import Draws

KEY = jax.random.key(4)
STEP = mezo_jax.Displacement(KEY, 0.05)
LAYERS, WIDTH = 12, 256
X = jax.random.normal(jax.random.key(2), (4, WIDTH))
WIDE = jnp.concatenate([X, X], 1)


# --- models as people write them ---------------------------------------------


class Unrolled(nn.Module):
  """Dense layers_0 ... layers_11, after an embedding that is the head too."""

  remat: bool = False
  tied: int = 0  # rows of the embedding
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    if self.tied:
      embed = nn.Embed(self.tied, WIDTH, param_dtype=self.dtype)
      x = embed(jnp.arange(4))
    dense = nn.remat(nn.Dense) if self.remat else nn.Dense
    for i in range(LAYERS):
      x = jnp.tanh(dense(WIDTH, dtype=self.dtype, param_dtype=self.dtype,
                         name=f'layers_{i}')(x))
    return embed.attend(x) if self.tied else x


def linen(**kwargs):
  model = Unrolled(**kwargs)
  shapes = jax.eval_shape(model.init, jax.random.key(0), X)['params']
  return lambda p: model.apply({'params': p}, X), shapes


def nnx_list():
  from flax import nnx

  class Model(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List(
          [nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(LAYERS)])

    def __call__(self, x):
      for layer in self.layers:
        x = jnp.tanh(layer(x))
      return x

  graphdef, state = nnx.split(nnx.eval_shape(lambda: Model(nnx.Rngs(0))))
  return lambda s: nnx.merge(graphdef, s)(X), state


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=('weight', 'bias'), meta_fields=())
class Linear:
  """As Equinox has it: a module is a pytree, its weight [out, in]."""

  def __init__(self, weight, bias):
    self.weight, self.bias = weight, bias

  def __call__(self, x):
    return self.weight @ x + self.bias


def module_list():
  shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
  layers = [Linear(shape(WIDTH, WIDTH), shape(WIDTH)) for _ in range(LAYERS)]
  def apply(p):
    x = X
    for layer in p['layers']:
      x = jnp.tanh(jax.vmap(layer)(x))
    return x
  return apply, {'layers': layers}


def by_hand(name):
  w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32)
  def run(stack):
    return lax.scan(lambda c, a: (jnp.tanh(c @ a), None), X, stack)[0]
  mesh = helpers.mesh_of(1, 1)
  sharded = jax.shard_map(
      run, mesh=mesh, in_specs=P(), out_specs=P())
  wide = jax.ShapeDtypeStruct((3000, WIDTH), jnp.float32)
  ids = jnp.arange(4)
  apply, shapes = {
      'barrier': (lambda p: run(lax.optimization_barrier(p)['layers']),
                  {'layers': w}),
      'shard_map': (lambda p: sharded(p['layers']), {'layers': w}),
      'second axis': (lambda p: run(jnp.swapaxes(p['stack'], 0, 1)), {
          'stack': jax.ShapeDtypeStruct((WIDTH, LAYERS, WIDTH), jnp.float32)}),
      'one-hot': (lambda p: run(p['layers']) + jax.nn.one_hot(
          ids, 3000) @ p['embed'], {'layers': w, 'embed': wide}),
  }[name]
  return apply, shapes


MODELS = {
    'Linen list': linen,
    'Linen list, remat': lambda: linen(remat=True),
    'Linen list, tied': lambda: linen(tied=3000),
    'Linen list, bfloat16': lambda: linen(dtype=jnp.bfloat16),
    'NNX list': nnx_list,
    'list of modules': module_list,
    'barrier before a scan': lambda: by_hand('barrier'),
    'shard_map around a scan': lambda: by_hand('shard_map'),
    'layers on the second axis': lambda: by_hand('second axis'),
    'one-hot embedding': lambda: by_hand('one-hot'),
}


# One of each kind: parameters of a list, tied rows, and a stack that is moved.
FEW = ['Linen list, tied', 'NNX list', 'layers on the second axis']


def loss_of(apply):
  return lambda p: jnp.mean(apply(p).astype(jnp.float32) ** 2)


def temporaries(fn, *args, **kwargs):
  memory = jax.jit(fn, **kwargs).lower(*args).compile().memory_analysis()
  return memory.temp_size_in_bytes, memory.alias_size_in_bytes


def make_step(tx, loss):
  def step(params, state):
    updates, state = tx.update(None, state, params, value_fn=loss)
    return optax.apply_updates(params, updates), state
  return step


@pytest.mark.slow
@pytest.mark.exhaustive_except(name=FEW)
@pytest.mark.as_shipped
@pytest.mark.parametrize('name', MODELS)
def test_the_forward_and_three_layers(name):
  """A donated step of two `perturbed` forwards: no copy of the weights is ever
  there."""
  apply, shapes = MODELS[name]()
  loss = loss_of(apply)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
  layer = WIDTH * WIDTH * 4
  forward, _ = temporaries(loss, shapes)
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)
    tx = mezo_jax.mezo(1e-3, key=0)
    step, aliased = temporaries(
        make_step(tx, loss), shapes, jax.eval_shape(tx.init, shapes),
        donate_argnums=(0, 1))
  assert aliased >= size
  assert step < forward + 3 * layer


@pytest.mark.slow
@pytest.mark.exhaustive_except(name=FEW)
@pytest.mark.parametrize('name', MODELS)
def test_the_value_is_that_of_built_weights(name):
  apply, shapes = MODELS[name]()
  leaves = jax.tree.leaves(shapes)
  params = jax.tree.unflatten(jax.tree.structure(shapes), [
      0.1 * jax.random.normal(jax.random.key(i), x.shape, x.dtype)
      for i, x in enumerate(leaves)])
  built = apply(mezo_jax.displace(params, STEP))
  near = helpers.quick_jit(
      lambda p: mezo_jax.perturbed(apply)(p, STEP))(params)
  low = built.dtype == jnp.bfloat16
  helpers.assert_close(built.astype(jnp.float32), near.astype(jnp.float32),
                       *((3e-2, 3e-2) if low else (1e-4, 1e-4)))
  assert np.any(np.asarray(apply(params)) != np.asarray(near))


@pytest.mark.slow
@pytest.mark.exhaustive_except(spec=[P(None, 'fsdp')])
@pytest.mark.parametrize('spec', [P(), P(None, 'fsdp')])
def test_an_unrolled_model_on_eight_devices(spec):
  mesh = helpers.mesh_of(2, 4)
  apply, shapes = linen()
  place = lambda s: jax.NamedSharding(mesh, s)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=place(spec if x.ndim > 1 else P())), shapes)
  parts = 4 if spec != P() else 1
  loss = loss_of(apply)
  forward, _ = temporaries(loss, shapes)
  tx = mezo_jax.mezo(1e-3, key=0)
  state = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(P())),
      jax.eval_shape(tx.init, shapes))
  step, _ = temporaries(
      make_step(tx, loss), shapes, state, donate_argnums=(0, 1),
      out_shardings=(jax.tree.map(lambda x: x.sharding, shapes), None))
  assert step < forward + 3 * WIDTH * WIDTH * 4 / parts


@pytest.mark.as_shipped
def test_the_program_of_an_unrolled_model_grows_slowly():
  """Small leaves are drawn together and equal layers share one function: the
  lines of a layer are not a program each."""
  apply, shapes = linen()
  lines = len(jax.jit(lambda p: mezo_jax.perturbed(apply)(p, STEP)).lower(
      shapes).as_text().splitlines())
  assert lines < 60 * LAYERS + 600


@pytest.mark.as_shipped
def test_equal_layers_share_the_kernels_of_their_noise():
  """XLA:CPU compiles each distinct kernel, so more layers add none."""
  def kernels(layers):
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    params = {f'layers_{i}': {'kernel': shape(32, 32), 'bias': shape(32)}
              for i in range(layers)} | {'embed': shape(400, 32)}
    tx = mezo_jax.mezo(1e-3, key=0)
    def update(params, state):
      updates, state = tx.update(
          None, state, params, projected_grad=jnp.ones(1))
      return optax.apply_updates(params, updates), state
    text = jax.jit(update, donate_argnums=(0, 1)).lower(
        params, jax.eval_shape(tx.init, params)).compile().as_text()
    bodies = [part.split('\n', 1)[1] for part in text.split('\n\n')
              if part.startswith('%fused')]
    assert len(bodies) > layers
    return len({re.sub(r', metadata=\{[^}]*\}|%[\w.\-]+', '', body)
                for body in bodies})
  assert kernels(12) <= kernels(6) + 3


# --- what cannot stay lazy ---------------------------------------------------


@pytest.mark.parametrize('f,message', [
    (lambda p: jnp.einsum('lij,bi->bj', p['layers']['w'], X[:, :WIDTH]),
     r' layers/w \(.*dot_general'),
    (lambda p: lax.scan(
        lambda c, _: (c @ p['w'], None), WIDE, None, length=3)[0],
     r' w \(.*scan'),
    (lambda p: lax.fori_loop(0, 3, lambda _, c: c @ p['w'], WIDE),
     r' w \(.*(scan|while_loop)'),
    (lambda p: lax.scan(lambda c, a: (c @ a, None), WIDE, jnp.stack(
        [p['w'], p['w']]))[0], r' w \(.*layers.*scan'),
    (lambda p: p['w'], r' w \(.*return'),
])
def test_large_weights_that_are_built_whole_are_named(f, message):
  params = {'layers': {'w': jnp.ones((4, WIDTH, 2 * WIDTH))},
            'w': jnp.ones((2 * WIDTH, 2 * WIDTH))}
  with pytest.warns(UserWarning, match=message):
    jax.eval_shape(lambda p: mezo_jax.perturbed(f)(p, STEP), params)


def test_small_ones_are_not_named():
  f = lambda p: (jnp.einsum('lij,bi->bj', p['layers'], X), p['v'])
  params = {'layers': jnp.ones((1, WIDTH, WIDTH)), 'v': jnp.ones(WIDTH)}
  with warnings.catch_warnings():
    warnings.simplefilter('error', UserWarning)
    jax.eval_shape(lambda p: mezo_jax.perturbed(lambda p: jnp.sum(
        f(p)[0]) + jnp.sum(f(p)[1]))(p, STEP), params | {
            'w': jnp.ones((100, WIDTH, WIDTH))})


# --- rules of a program's own ------------------------------------------------


@pytest.mark.parametrize('fill', [0.0, 7.0])
@pytest.mark.parametrize('take', [
    lambda e, i, fill: jnp.take(e, i, axis=0, mode='fill', fill_value=fill),
    lambda e, i, fill: e.at[i].get(mode='fill', fill_value=fill),
    lambda e, i, fill: jnp.take(e, i, axis=1, mode='fill', fill_value=fill)])
def test_rows_out_of_range_have_the_fill_and_no_noise(take, fill):
  e = jax.random.normal(KEY, (6, 6))
  ids = jnp.array([[5, 99], [-99, 0]])
  f = lambda p: take(p['e'], ids, fill)
  got = mezo_jax.perturbed(f)({'e': e}, STEP)
  helpers.assert_close(got, f(mezo_jax.displace({'e': e}, STEP)))
  assert np.sum(np.asarray(got) == fill) == 12


@jax.custom_vjp
def rounded(w):
  return jnp.round(w)


rounded.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (g,))


@jax.custom_jvp
def tripled(w):
  return w


tripled.defjvp(lambda p, t: (tripled(*p), 3 * t[0]))


@pytest.mark.parametrize('rule', [rounded, tripled])
def test_custom_derivatives_survive(rule):
  """Of a straight-through rounding the gradient is not 0."""
  f = lambda p, x: jnp.sum(rule(p['w']) * x)
  params, x = {'w': 3 * jax.random.normal(KEY, (5, 4))}, jnp.arange(4.0)
  want = jax.grad(f)(mezo_jax.displace(params, STEP), x)
  got = jax.grad(lambda p: mezo_jax.perturbed(f)(p, STEP, x))(params)
  helpers.assert_close(got, want)
  assert np.any(got['w'])


def test_an_argument_may_be_called_displacement():
  f = lambda p, displacement: jnp.sum(p) + displacement
  near = mezo_jax.perturbed(f)(jnp.ones(3), STEP, displacement=2.0)
  assert jnp.isclose(near, f(mezo_jax.displace(jnp.ones(3), STEP), 2.0))


# --- shard_map ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.exhaustive_except(stack=['stack'])
@pytest.mark.parametrize('stack', ['layers', 'stack'])
@pytest.mark.parametrize('check', [True, False])
def test_shard_map_inside_value_fn(stack, check):
  """Each device's part has its part of the leaf's noise, not the same one."""
  mesh = helpers.mesh_of(2, 4)
  params = {stack: jax.random.normal(KEY, (3, 8, 8)),
            'v': jax.random.normal(KEY, (8, 16))}
  x = X[:, :8]
  def local(w, v, x):
    if check:
      x = lax.pcast(x, ('fsdp',), to='varying')
    x = lax.scan(lambda c, w: (jnp.tanh(c @ lax.all_gather(
        w, 'fsdp', axis=1, tiled=True)), None), x, w)[0]
    return lax.psum(jnp.sum((x @ v) ** 2), ('data', 'fsdp'))
  f = lambda p: jax.shard_map(
      local, mesh=mesh, in_specs=(P(None, None, 'fsdp'), P(None, 'fsdp'),
                                  P('data')),
      out_specs=P(), check_vma=check)(p[stack], p['v'], x)
  near = jax.jit(lambda p: mezo_jax.perturbed(f)(p, STEP))(params)
  np.testing.assert_allclose(
      near, f(mezo_jax.displace(params, STEP)), rtol=1e-5)
  assert abs(near - f(params)) > 1e-3 * abs(near)


@pytest.mark.slow
@pytest.mark.parametrize('draw', [
    lambda p: mezo_jax.direction(p, STEP),
    lambda p: mezo_jax.displace(p, STEP),
    lambda p: mezo_jax.spsa(key=0).update(
        None, mezo_jax.spsa(key=0).init(p), p,
        value_fn=lambda p: lax.psum(jnp.sum(p['w']), 'fsdp'))[0]])
def test_sharded_weights_inside_shard_map_are_refused(draw):
  mesh = helpers.mesh_of(1, 8)
  def inside(spec, check=True):
    # Op by op, a shard_map is compiled for each operation.
    return helpers.quick_jit(jax.shard_map(
        draw, mesh=mesh, in_specs=({'w': spec},), out_specs={'w': spec},
        check_vma=check))({'w': jnp.ones((8, 8))})
  with pytest.raises(ValueError, match="'w' .*'fsdp'.* shard_map"):
    inside(P('fsdp'))
  helpers.assert_close(inside(P()), draw({'w': jnp.ones((8, 8))})) if (
      'spsa' not in draw.__code__.co_names) else inside(P())
  with pytest.warns(UserWarning, match='replicated'):
    inside(P('fsdp'), check=False)


# --- views of draws ----------------------------------------------------------


@pytest.mark.slow_except(seed=[0, 1])
@pytest.mark.exhaustive_except(seed=[0, 1])
@pytest.mark.as_shipped
@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('path', ['w', 'layers/w'])
def test_views_are_what_numpy_does(seed, path):
  """Random chains of rows, runs, transposes and reshapes."""
  rng = np.random.RandomState(seed)
  shape = tuple(rng.choice([1, 2, 3, 4, 6], 4))
  s = streams.of_leaf(KEY[None], path, shape)
  def draw(s, shape):
    return np.asarray(Draws((s,), jnp.ones(1), mezo_jax.Normal(
        'threefry2x32')).built(jnp.zeros(shape)))
  x = draw(s, shape)
  for _ in range(5):
    op = rng.choice(['take', 'window', 'transpose', 'reshape'])
    if op == 'take':
      axis = rng.randint(x.ndim)
      index = rng.randint(0, x.shape[axis], (2, 2)[:rng.randint(3)])
      view = views.Take(axis, jnp.asarray(index))
      s, x = streams.viewed(s, view, x.shape), np.take(x, index, axis)
    elif op == 'window':
      starts = [int(rng.randint(n)) for n in x.shape]
      steps = [int(rng.choice([1, 2])) for _ in x.shape]
      old = x.shape
      x = x[tuple(slice(a, None, b) for a, b in zip(starts, steps))]
      s = streams.viewed(s, views.Window(starts, x.shape, steps), old)
    elif op == 'transpose':
      order = [*rng.permutation(x.ndim)]
      s = streams.viewed(s, views.Transpose(order), x.shape)
      x = x.transpose(order)
    else:
      new = [n for n in x.shape if n > 1] + [1]
      at = rng.randint(max(len(new) - 2, 1))
      new[at:at + 2] = [new[at] * (new[at + 1] if len(new) > 1 else 1)]
      moved = streams.viewed(s, views.Reshape(tuple(new)), x.shape)
      if moved is not None:
        s, x = moved, x.reshape(new)
    if not x.ndim:
      break
  np.testing.assert_array_equal(draw(s, x.shape), x)


def test_explicit_meshes_and_unrolled_layers():
  mesh = helpers.mesh_of(1, 8, AxisType.Explicit)
  with jax.set_mesh(mesh):
    w = jax.device_put(jnp.ones((64, 64)), jax.NamedSharding(
        mesh, P(None, 'fsdp')))
    f = lambda p: jnp.sum(jnp.tanh(jnp.ones((2, 64)) @ p['w']) ** 2)
    near = jax.jit(lambda p: mezo_jax.perturbed(f)(p, STEP))({'w': w})
    helpers.assert_close(near, f(mezo_jax.displace({'w': w}, STEP)))
