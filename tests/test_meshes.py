"""Groups that share out directions, and meshes for anyone's model."""

import math

from estimators import whole
from flax import linen as nn
from flax import nnx
import helpers
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import mezo_jax
from mezo_jax import models
from mezo_jax.core import sharding
from mezo_jax.core.errors import InputError
from mezo_jax.planning import compiled
from mezo_jax.runs import checkpoint
from mezo_jax.tasks import evaluate

MESHES = [  # data, fsdp, tensor, direction
    (1, 1, 1, 1), (1, 1, 1, 2), (1, 1, 1, 8), (1, 2, 2, 2)]
KINDS = {
    'one normal': dict(),
    'three, one-sided': dict(num_samples=3, combine=mezo_jax.one_sided),
    'four normal in one pass': dict(num_samples=4, over='batch'),
    'four of low rank': dict(
        num_samples=4, directions=mezo_jax.LowRank(rank=4), over='batch')}


def mesh_of(*sizes, axis_type=AxisType.Auto):
  devices = jax.devices()[:math.prod(sizes)]
  if axis_type == AxisType.Auto:
    return sharding.make_mesh(*sizes, devices=devices)
  return jax.make_mesh(
      (sizes[3], *sizes[:3]), sharding.AXES, devices=devices,
      axis_types=(axis_type,) * 4)


@pytest.fixture(scope='module')
def model():
  model, params, _ = helpers.tiny_model(
      width=256, ff_width=512, vocab_size=512, num_kv_heads=4, head_width=64)
  ids = np.asarray(jax.random.randint(jax.random.key(2), (8, 12), 0, 512))
  def loss_fn(params, batch):
    return -model.apply({'params': params}, batch, targets=batch).mean(-1)
  return model, jax.device_get(params), ids, loss_fn


def on(mesh, model, host):
  wanted = jax.tree.map(lambda x: x.sharding,
                        models.param_shapes(model.config, mesh))
  return jax.device_put(host, wanted)


@pytest.mark.slow
@pytest.mark.exhaustive_except(kind=['four of low rank'])
@pytest.mark.parametrize('kind', KINDS)
def test_groups_share_out_the_points_of_a_step(kind, model, as_shipped):
  """Losses to rounding, and of equal numbers bitwise the same weights; what
  crosses between devices that hold all weights is losses; updates cross none.
  """
  model, host, ids, loss_fn = model
  tx = whole.spsa(1e-3, 1e-3, key=3, **KINDS[kind])
  numbers = want = None
  for shape in MESHES:
    mesh = mesh_of(*shape)
    params = on(mesh, model, host)
    state = tx.init(params)
    step = mezo_jax.make_step(tx, loss_fn, mesh=mesh)
    g, value = step.losses(params, state, sharding.put_batch(ids, mesh))
    numbers = numbers or (np.asarray(g), np.asarray(value))
    np.testing.assert_allclose(value, numbers[1], rtol=2e-6)
    np.testing.assert_allclose(g, numbers[0], atol=5e-3)  # of losses / 2e-3
    with as_shipped():
      end = jax.device_get(step.update(params, state, *numbers)[0])
    want = want or end
    helpers.assert_bitwise(end, want)
    losses, update = ([v for k, v in step.compiled.items() if (k is None) == u]
                      for u in (False, True))
    assert not compiled.collectives(update[0].as_text())
    if shape == (1, 1, 1, 8):
      sent = compiled.collectives(losses[0].as_text())
      assert sum(size for _, size in sent.values()) <= 64, sent
  assert not np.array_equal(
      want['embed']['embedding'], host['embed']['embedding'])


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_on_groups_is_the_run_of_one_device(model):
  model, host, ids, loss_fn = model
  runs = []
  for shape in ((1, 1, 1, 1), (1, 2, 2, 2)):
    mesh = mesh_of(*shape)
    params = on(mesh, model, host)
    tx = mezo_jax.mezo(1e-4, 1e-3, key=3, num_samples=2)
    state, step = tx.init(params), None
    step, losses = mezo_jax.make_step(tx, loss_fn, mesh=mesh), []
    batch = sharding.put_batch(ids, mesh)
    for _ in range(3):
      params, state, metrics = step(params, state, batch)
      losses.append(float(metrics['loss']))
    assert len(step.compiled) == 2
    runs.append((losses, jax.device_get(params)))
  np.testing.assert_allclose(runs[0][0], runs[1][0], rtol=2e-6)
  helpers.assert_close(runs[0][1], runs[1][1], rtol=0, atol=2e-5)


def test_rows_with_directions_of_their_own_are_refused(model):
  model, host, ids, loss_fn = model
  mesh = mesh_of(1, 1, 1, 2)
  tx = whole.spsa(
      1e-3, key=0, num_samples=8, over='rows',
      directions=mezo_jax.LowRank(rank=4))
  params = on(mesh, model, host)
  with pytest.raises(ValueError, match="over='rows'.*direction"):
    mezo_jax.make_step(tx, loss_fn, mesh=mesh).losses(
        params, tx.init(params), ids)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_rows_with_directions_of_their_own(model):
  """The losses of a mesh are those of one device; JAX 0.11 stopped here."""
  model, host, ids, loss_fn = model
  tx = whole.spsa(
      1e-3, key=0, num_samples=4, over='rows',
      directions=mezo_jax.LowRank(rank=2))
  values = []
  for shape in ((1, 1, 1, 1), (4, 2, 1, 1)):
    mesh = mesh_of(*shape)
    params = on(mesh, model, host)
    step = mezo_jax.make_step(tx, loss_fn, mesh=mesh)
    batch = sharding.put_batch(ids, mesh)
    values.append(float(step.losses(params, tx.init(params), batch)[1]))
  np.testing.assert_allclose(values[1], values[0], rtol=2e-6)


def test_a_device_holds_its_share(model):
  """What is split, over its shards, and what is small, whole."""
  model, host, ids, loss_fn = model
  mesh = mesh_of(1, 2, 2, 2)
  params = on(mesh, model, host)
  shards = lambda x: math.prod(
      mesh.shape[a] for a in x.sharding.spec if a)
  share = sum(x.nbytes // shards(x) for x in jax.tree.leaves(params))
  small = sum(x.nbytes for x in jax.tree.leaves(params) if shards(x) == 1)
  total = sum(x.nbytes for x in jax.tree.leaves(params))
  assert share <= total / 4 + small and small < total / 50
  tx = mezo_jax.mezo(1e-3, key=0)
  state = tx.init(params)
  step = mezo_jax.make_step(tx, loss_fn, mesh=mesh)
  step.update(params, state, np.ones(1, np.float32))
  held = step.compiled[None].memory_analysis()
  assert 0 <= held.argument_size_in_bytes - share < 256  # the state, and g


def test_evaluation_splits_rows_over_all_devices():
  mesh = mesh_of(2, 2, 1, 2)
  other = sharding.without_directions(mesh)
  assert dict(other.shape) == {'direction': 1, 'data': 4, 'fsdp': 2,
                               'tensor': 1}
  for spec in (P(), P('fsdp'), P(None, 'fsdp')):
    x = jax.device_put(jnp.ones((8, 8)), jax.NamedSharding(mesh, spec))
    assert x.sharding.is_equivalent_to(jax.NamedSharding(other, spec), 2)
  assert sharding.without_directions(other) is other
  assert evaluate.rows_of_batch(
      evaluate.Sizes((16,)), 16, 20, sharding.row_groups(other)) == 24


# --- anyone's model ---------------------------------------------------------


class Net(nn.Module):

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(512, 256, name='embed')(ids).mean(1)
    for i in range(2):
      h = nn.relu(nn.Dense(512, name=f'layers_{i}_up')(x))
      x = x + nn.Dense(256, name=f'layers_{i}_down')(h)
    return nn.Dense(2, name='head')(x)


class NnxNet(nnx.Module):

  def __init__(self, rngs):
    self.embed = nnx.Embed(512, 256, rngs=rngs)
    self.up = nnx.Linear(256, 512, rngs=rngs)
    self.down = nnx.Linear(512, 256, rngs=rngs)

  def __call__(self, ids):
    x = self.embed(ids).mean(1)
    return x + self.down(nnx.relu(self.up(x)))


RULES = [(r'embed', P('tensor', 'fsdp')), (r'up/kernel', P('fsdp', 'tensor')),
         (r'down/kernel', P('tensor', 'fsdp'))]
IDS = np.arange(8 * 6).reshape(8, 6) % 512


def linen():
  net = Net()
  params = net.init(jax.random.key(0), IDS)['params']
  return params, lambda params, batch: (net.apply(
      {'params': params}, batch) ** 2).mean(-1)


def of_nnx():
  graph, params = nnx.split(NnxNet(nnx.Rngs(0)))
  return params, lambda params, batch: (nnx.merge(graph, params)(
      batch) ** 2).mean(-1)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('make', [linen, of_nnx])
def test_rules_place_anyone_s_parameters(make, as_shipped):
  """And a step is the same there, bit for bit given its numbers."""
  params, loss_fn = make()
  host, ends = jax.device_get(params), []
  for shape in ((1, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2)):
    mesh = mesh_of(*shape)
    places = sharding.param_shardings(host, mesh, RULES)
    specs = {s.spec for s in jax.tree.leaves(places)}
    assert P('tensor', 'fsdp') in specs and P('fsdp', 'tensor') in specs
    params = jax.device_put(host, places)
    tx = mezo_jax.mezo(1e-3, key=1)
    step = mezo_jax.make_step(tx, loss_fn, mesh=mesh)
    state = tx.init(params)
    batch = sharding.put_batch(IDS, mesh)
    g, value = step.losses(params, state, batch)
    with as_shipped():
      params, *_ = step.update(params, state, np.ones(1, np.float32), 0.0)
    ends.append((float(value), jax.device_get(params)))
    assert jax.tree.map(lambda x: x.sharding, params) == places
  for value, end in ends[1:]:
    np.testing.assert_allclose(value, ends[0][0], rtol=2e-6)
    helpers.assert_bitwise(end, ends[0][1])


def test_rules_that_do_not_fit_are_told():
  params, _ = linen()
  mesh = mesh_of(2, 2, 2, 1)
  for rules, match in (
      ([('nowhere', P('fsdp'))], "'nowhere'.*embed/embedding"),
      ([('embed', P('model'))], r"'embed/embedding', P\('model'"),
      ([('bias', P('fsdp', 'tensor'))], "'head/bias', P")):
    with pytest.raises(InputError, match=match):
      sharding.param_shardings(params, mesh, rules)
  # Two classes do not divide over 4: that axis stays whole. A mesh of other
  # names is split by rules alone; a stack of layers never along them.
  other = jax.make_mesh((4,), ('model',), devices=jax.devices()[:4],
                        axis_types=(AxisType.Auto,))
  tree = {'head': jnp.ones((64, 2)), 'layers': {'w': jnp.ones((4, 8, 8))},
          'rest': jnp.ones((512, 512))}
  got = sharding.param_shardings(tree, other, [
      ('head', P(None, 'model')), ('layers', P('model'))])
  assert [s.spec for s in jax.tree.leaves(got)] == [
      P(None, None), P(None, 'model'), P()]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_another_mesh_is_a_restore(tmp_path):
  """Two steps on one mesh, two on another: the run of one mesh."""
  params, loss_fn = linen()
  host = jax.device_get(params)
  tx = mezo_jax.mezo(1e-3, key=1)
  def on_mesh(mesh):
    params = jax.device_put(host, sharding.param_shardings(host, mesh, RULES))
    return params, tx.init(params), mezo_jax.make_step(tx, loss_fn, mesh=mesh)
  def steps(params, state, step, mesh):
    for _ in range(2):
      params, state, _ = step(params, state, sharding.put_batch(IDS, mesh))
    return params, state
  first, second = mesh_of(2, 2, 2, 1), mesh_of(1, 4, 1, 2)
  params, state, step = on_mesh(first)
  half = steps(params, state, step, first)
  kept = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  kept.save(2, half)
  kept.wait()
  params, state, other = on_mesh(second)
  params, state = kept.load(2, (params, state))
  kept.close()
  assert params['embed']['embedding'].sharding.mesh == second
  got = steps(params, state, other, second)[0]
  want = steps(*half, step, first)[0]
  helpers.assert_close(jax.device_get(got), jax.device_get(want), rtol=0,
                       atol=1e-6)


@pytest.mark.slow
@pytest.mark.exhaustive_except(directions=[mezo_jax.LowRank(rank=4)])
@pytest.mark.parametrize('directions', [
    mezo_jax.Normal(), mezo_jax.Rademacher(), mezo_jax.LowRank(rank=4)])
def test_explicit_axes(directions, as_shipped):
  """Shardings that are part of types: kept, with the same z."""
  host = {'up': np.ones((64, 128), np.float32) / 64,
          'down': np.ones((128, 64), np.float32) / 128}
  def loss_fn(params, batch):
    h = jnp.tanh(batch @ params['up'])
    return jnp.mean(jnp.einsum(
        'bf,fd->bd', h, params['down'], out_sharding=P(None, None)) ** 2, -1)
  tx = mezo_jax.mezo(1e-2, key=0, directions=directions)
  x, ends = jnp.ones((8, 64)), []
  for mesh in (mesh_of(1, 1, 1, 1, axis_type=AxisType.Explicit),
               mesh_of(1, 2, 4, 1, axis_type=AxisType.Explicit)):
    with jax.set_mesh(mesh):
      params = jax.device_put(host, {
          'up': jax.NamedSharding(mesh, P(None, 'tensor')),
          'down': jax.NamedSharding(mesh, P('tensor', None))})
      state = tx.init(params)
      step = mezo_jax.make_step(tx, loss_fn, mesh=mesh)
      types = jax.tree.map(jax.typeof, params)
      g, value = step.losses(params, state, x)
      with as_shipped():
        params, state, _ = step.update(
            params, state, np.ones(1, np.float32), 0.0)
      assert jax.tree.map(jax.typeof, params) == types
      ends.append((float(value), jax.device_get(params)))
  np.testing.assert_allclose(ends[0][0], ends[1][0], rtol=2e-6)
  helpers.assert_bitwise(ends[0][1], ends[1][1])


# --- Explicit axes, and shard_map, for every kind of directions ---------------

ALL_KINDS = [
    mezo_jax.Normal(), mezo_jax.Rademacher(), mezo_jax.LowRank(rank=2),
    mezo_jax.LazyLowRank(rank=2, every=3), mezo_jax.SubZero(rank=2, every=3)]
E, A = AxisType.Explicit, AxisType.Auto
SMALL_IDS = np.arange(16 * 6).reshape(16, 6) % 64
ROWS = np.random.default_rng(1).normal(size=(16, 32)).astype(np.float32)


def axes_of(*types):
  return jax.make_mesh((2, 4), ('dp', 'tp'), axis_types=types)


def estimated(loss_fn, params, batch, mesh=None, specs=None, **options):
  """(value, projected_grad, updates, their specs) of one estimate."""
  tx = mezo_jax.spsa(1e-2, key=0, **options)
  estimate = jax.jit(lambda p, x: tx.update(
      None, tx.init(p), p, value_fn=loss_fn, x=x))
  if mesh is None:
    updates, state = estimate(params, batch)
    return state.value, state.projected_grad, updates, None
  with jax.set_mesh(mesh):
    params = jax.device_put(params, jax.tree.map(
        lambda s: jax.NamedSharding(mesh, s), specs,
        is_leaf=lambda s: isinstance(s, P)))
    batch = jax.device_put(batch, jax.NamedSharding(mesh, P('dp')))
    traced = estimate.trace(params, batch)
    updates, state = traced.lower().compile()(params, batch)
    kept = [x.sharding.spec for x in traced.jaxpr.out_avals[:len(
        jax.tree.leaves(params))]] == [
            jax.typeof(x).sharding.spec for x in jax.tree.leaves(params)]
  return jax.device_get((
      state.value, state.projected_grad, updates)) + (kept,)


def assert_same_estimate(got, want):
  np.testing.assert_allclose(got[0], want[0], rtol=2e-4, atol=1e-4)
  np.testing.assert_allclose(got[1], want[1], rtol=5e-3, atol=2e-2)
  assert got[3]  # updates are split as the parameters are


def explicitly(*spec):
  """The ``out_sharding`` of these axes, where they are Explicit."""
  mesh = jax.sharding.get_abstract_mesh()
  if E not in mesh.axis_types:
    return {}
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  return dict(out_sharding=P(*(
      a if kinds.get(a) == E else None for a in spec)))


def embedding_and_tied_head(params, x):
  h = params['embed'].at[x].get(**explicitly('dp'))
  for i in range(2):
    w = params['layers']['w'][i]
    h = jnp.tanh(jnp.einsum('btd,df->btf', h, w, **explicitly('dp')))
  return jnp.tanh(jnp.einsum(
      'btd,vd->btv', h, params['embed'], **explicitly('dp'))).sum((1, 2))


def scanned(params, x):
  def layer(h, w):
    return jnp.tanh(jnp.einsum('bd,df->bf', h, w, **explicitly('dp'))), None
  return lax.scan(layer, x, params['layers']['w'])[0].sum(-1)


def tree_of(seed=0):
  rng = np.random.default_rng(seed)
  return {'embed': rng.normal(size=(64, 32)).astype(np.float32),
          'layers': {'w': (rng.normal(size=(2, 32, 32)) / 6).astype(
              np.float32)}}


SPECS = [{'embed': P('tp'), 'layers': {'w': P(None, None, 'tp')}},
         {'embed': P('dp', 'tp'), 'layers': {'w': P(None, 'tp')}}]


@pytest.mark.slow
@pytest.mark.exhaustive_except(kind=ALL_KINDS[2:3])
@pytest.mark.parametrize('kind', ALL_KINDS, ids=lambda d: type(d).__name__)
def test_an_embedding_read_with_out_sharding(kind):
  """`.at[ids].get(out_sharding=...)` makes axes Auto for a while; so may
  `nnx.Embed` and `jax.sharding.auto_axes`."""
  params = tree_of()
  want = estimated(embedding_and_tied_head, params, SMALL_IDS, directions=kind)
  for types, specs in (((E, E), SPECS[0]), ((E, A), SPECS[1])):
    got = estimated(embedding_and_tied_head, params, SMALL_IDS,
                    axes_of(*types), specs, directions=kind)
    assert_same_estimate(got, want)


MODES = {
    'micro-batches': dict(micro_batches=2),
    'rows': dict(num_samples=2, over='rows'),
    'rows, micro-batches': dict(num_samples=4, over='rows', micro_batches=2),
    'batch, one-sided': dict(num_samples=2, over='batch',
                             combine=mezo_jax.one_sided),
    'parts smaller than the mesh': dict(micro_batches=16),
    'many of low rank': dict(
        num_samples=4, directions=mezo_jax.LowRank(rank=2))}


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('mode', MODES)
def test_explicit_axes_split_batches_as_auto_axes_do(mode):
  params = tree_of()
  loss = scanned if '16' not in str(MODES[mode]) else (
      lambda p, x: jnp.tanh(jnp.einsum('bd,vd->bv', x, p['embed'])).sum(-1))
  want = estimated(loss, params, ROWS, **MODES[mode])
  specs = {'embed': P(), 'layers': {'w': P(None, None, 'tp')}}
  got = estimated(loss, params, ROWS, axes_of(E, E), specs, **MODES[mode])
  assert_same_estimate(got, want)


@pytest.mark.slow
@pytest.mark.exhaustive_except(kind=ALL_KINDS[:1])
@pytest.mark.parametrize('kind', ALL_KINDS, ids=lambda d: type(d).__name__)
def test_a_loss_with_shard_map_inside(kind):
  """On all axes of a mesh, and with one of them left to the compiler."""
  params = tree_of()
  mesh = axes_of(A, A)

  def plain(p, x):
    w = p['layers']['w']
    return jnp.tanh(jnp.tanh(x @ w[0]) @ w[1].T).sum(-1).mean()

  def local(w, x):  # a part of the columns of both
    part = jnp.tanh(x @ w[0]) @ w[1].T
    return jnp.tanh(lax.psum(part, 'tp')).sum(-1)
  full = lambda p, x: jax.shard_map(
      local, mesh=mesh, in_specs=(P(None, None, 'tp'), P('dp')),
      out_specs=P('dp'))(p['layers']['w'], x).mean()
  partial = lambda p, x: jax.shard_map(
      local, mesh=mesh, in_specs=(P(None, None, 'tp'), P()), out_specs=P(),
      axis_names={'tp'})(p['layers']['w'], x).mean()
  unchecked = lambda p, x: jax.shard_map(
      lambda w, x: lax.psum(jnp.tanh(x @ w[0]).sum(-1), 'tp'), mesh=mesh,
      in_specs=(P(None, None, 'tp'), P('dp')), out_specs=P('dp'),
      check_vma=False)(p['layers']['w'], x).mean()
  specs = {'embed': P(), 'layers': {'w': P(None, None, 'tp')}}
  want = estimated(plain, params, ROWS, directions=kind)
  for loss in (full, partial):
    assert_same_estimate(
        estimated(loss, params, ROWS, mesh, specs, directions=kind), want)
  want = estimated(lambda p, x: jnp.tanh(x @ p['layers']['w'][0]).sum(
      -1).mean(), params, ROWS, directions=kind)
  assert_same_estimate(
      estimated(unchecked, params, ROWS, mesh, specs, directions=kind), want)
