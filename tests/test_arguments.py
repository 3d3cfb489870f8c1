"""Arguments of the public functions: what JAX takes is taken, and what cannot
be used is refused by name."""

import collections
import dataclasses
import functools
import warnings

from estimators import EVERY_OTHER, ROWS, whole
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mezo_jax
from mezo_jax import Displacement, variants
from mezo_jax.directions import noise
from mezo_jax.runs import replay
from mezo_jax.transforms import backprop

KEY = jax.random.key(0)
PARAMS = {'w': jnp.arange(12.0).reshape(4, 3) / 10, 'b': jnp.ones(3)}
X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
STEP = Displacement(KEY, 0.1)


def loss(params, x=X):
  return jnp.mean((x @ params['w'] + params['b']) ** 2)


def rows(params, batch):
  return jnp.mean((batch['x'] @ params['w'] + params['b']) ** 2, -1)


def one_step(tx, params=PARAMS, value_fn=loss, **kwargs):
  updates, state = tx.update(
      None, tx.init(params), params, value_fn=value_fn, **kwargs)
  return optax.apply_updates(params, updates), state


# --- what jax takes ---------------------------------------------------------


@pytest.mark.parametrize('seed', [
    0, 2**31 - 1, 2**31, 2**32 - 1, 2**40 + 5, -3, True, np.int32(7),
    np.uint32(2**31 + 4), np.int64(2**40), np.asarray(5), jnp.int32(6)])
def test_seeds_are_those_of_jax(seed):
  want = jax.random.key_data(jax.random.key(seed))
  for tx in (mezo_jax.mezo(1e-2, key=seed), variants.svrg(1e-2, key=seed)):
    state = tx.init(PARAMS)
    assert np.array_equal(jax.random.key_data(state[0].key), want)
  z = mezo_jax.direction(PARAMS, Displacement(seed, 1.0))
  helpers.assert_bitwise(z, mezo_jax.direction(
      PARAMS, Displacement(jax.random.key(seed), 1.0)))


def test_keys_of_all_kinds():
  words = np.array([3, 4], np.uint32)
  typed = jax.random.wrap_key_data(words)
  assert noise.as_key(words) == noise.as_key(jnp.asarray(words)) == typed
  assert noise.as_key(np.zeros(4, np.uint32)).shape == ()
  many = jax.random.split(KEY, 3)
  for keys in (many, jax.random.key_data(many),
               np.asarray(jax.random.key_data(many))):
    assert np.all(noise.as_keys(keys) == many)
  with jax.enable_x64(True):
    others = jax.random.split(jax.random.key(0, impl='rbg'), 3)
    assert noise.as_keys(others).shape == (3,)


@pytest.mark.slow
def test_directions_and_combines_have_names():
  want = mezo_jax.displace(PARAMS, STEP, mezo_jax.Rademacher())
  helpers.assert_bitwise(mezo_jax.displace(PARAMS, STEP, 'rademacher'), want)
  z = mezo_jax.direction(PARAMS, STEP, 'rademacher')
  helpers.assert_close(jax.tree.map(jnp.add, PARAMS, z), want)
  near = mezo_jax.perturbed(loss, 'rademacher')(PARAMS, STEP)
  np.testing.assert_allclose(near, loss(want), rtol=1e-5)
  losses = mezo_jax.estimate(loss, PARAMS, Displacement(KEY[None], jnp.ones(1)),
                             0.1, 'rademacher', signs=(1.0,))
  np.testing.assert_allclose(losses, [[near]], rtol=1e-6)
  by_name, by_object = (one_step(whole.spsa(
      1e-2, key=0, combine=c))[0] for c in ('one_sided', mezo_jax.one_sided))
  helpers.assert_bitwise(by_name, by_object)


@pytest.mark.slow
@pytest.mark.exhaustive_except(name=['mezo'])
@pytest.mark.parametrize('name', ['mezo', 'hizoo', 'spsa and adam'])
def test_numbers_in_a_batch(name):
  """Python's and NumPy's, and nothing, as jax.jit takes them; in parts, too."""
  value = lambda p, batch: batch['scale'] * rows(p, batch) + batch['shift']
  for scale in (0.5, 1, True, np.float32(0.5), np.int64(2), jnp.float32(3.0)):
    batch = {'x': X, 'scale': scale, 'shift': np.float64(0.25), 'none': None}
    tx = ROWS[name](1e-3, key=0)
    step = mezo_jax.make_step(tx, lambda p, b: jnp.mean(value(p, b)))
    params = jax.tree.map(jnp.copy, PARAMS)
    params, state, metrics = step(params, tx.init(params), batch)
    np.testing.assert_allclose(
        metrics['loss'], jnp.mean(value(PARAMS, batch)), rtol=1e-2)
    step(params, state, batch)
    assert len(step.compiled) == 2
    tx = mezo_jax.spsa(1e-3, key=0, micro_batches=2)
    _, state = one_step(tx, value_fn=value, batch=batch)
    np.testing.assert_allclose(state.value, metrics['loss'], rtol=1e-2)


@pytest.mark.slow
def test_a_step_is_compiled_for_other_numbers_of_arguments():
  tx = mezo_jax.mezo(1e-3, key=0)
  step = mezo_jax.make_step(tx, lambda p, b: loss(p) * b)
  params = jax.tree.map(jnp.copy, PARAMS)
  params, state, _ = step(params, tx.init(params), 1.0)
  for batch, more in ((2, {}), (2.0, {}), (jnp.float32(2), {}),
                      (2.0, {'unused': 1.0})):
    params, state, _ = step(params, state, batch, **more)
  assert len(step.compiled) == 5  # float, int, an array, one argument more


@pytest.mark.slow
@pytest.mark.exhaustive_except(name=['mezo'])
@pytest.mark.parametrize('name', [
    'mezo', 'mezo, low rank in one pass', 'hizoo', 'lozo-m', 'svrg'])
def test_jit_can_be_disabled(name):
  """And then the loss sees arrays."""
  tx, seen = ROWS[name](1e-3, key=0), []
  params = {'layers': {'w': jnp.ones((2, 8, 8))}, 'b': jnp.ones((40, 12))}
  def value_fn(params):
    out, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), jnp.ones(
        (4, 8)) / 8, params['layers']['w'])
    seen.append(not isinstance(params['b'], jax.core.Tracer))
    return jnp.mean(out @ params['b'][:8]) ** 2
  want, _ = one_step(tx, params, value_fn)
  with jax.disable_jit():
    got, _ = one_step(tx, params, value_fn)
  helpers.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.exhaustive_except(name=['mezo, low rank', 'private'])
@pytest.mark.parametrize('name', [
    'mezo', 'mezo, low rank', 'mezo, pending', 'spsa and sgd', 'private',
    'adam by history', 'svrg', 'hizoo'])
def test_strict_modes(name):
  """Warnings as errors, no implicit promotion of dtypes or ranks, no leaks."""
  params = {'w': jnp.sin(jnp.arange(96.0)).reshape(12, 8),
            'half': jnp.ones((8, 8), jnp.bfloat16)}
  def value_fn(p):
    x = X @ p['w'][4:8]
    y = jnp.dot(x.astype(jnp.bfloat16), p['half']).astype(jnp.float32)
    return jnp.mean(jnp.square(x)) + jnp.mean(jnp.square(y))
  tx = ROWS[name](1e-3, key=0)
  state = tx.init(params)
  more = dict(noise_key=KEY) if name == 'private' else {}
  with (warnings.catch_warnings(), jax.numpy_dtype_promotion('strict'),
        jax.numpy_rank_promotion('raise'), jax.checking_leaks()):
    warnings.simplefilter('error')
    updates, _ = jax.jit(lambda s, p: tx.update(
        None, s, p, value_fn=value_fn, **more))(state, params)
  pends = name in EVERY_OTHER and 'stored' not in name
  assert pends != np.any(updates['w'])


class Pair(collections.namedtuple('Pair', 'w b')):
  pass


@functools.partial(jax.tree_util.register_dataclass, data_fields=['w', 'b'],
                   meta_fields=[])
@dataclasses.dataclass
class Record:
  w: jax.Array
  b: jax.Array


@pytest.mark.slow
@pytest.mark.parametrize('make', [
    lambda: Record(**PARAMS),
    lambda: PARAMS | {'steps': jnp.arange(3), 'none': None, 'seen': True},
    *(pytest.param(make, marks=pytest.mark.exhaustive) for make in (
        lambda: Pair(**PARAMS), lambda: [PARAMS['w'], (PARAMS['b'], None)],
        lambda: PARAMS | {
            'empty': jnp.zeros((0, 4)), 'scalar': jnp.float32(2.0)})),
    lambda: PARAMS | {'rngs': {'key': KEY, 'keys': jax.random.split(KEY, 2),
                               'count': jnp.uint32(3)}}])
def test_params_of_all_kinds(make):
  params = make()
  value_fn = lambda p: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p)
                           if jnp.issubdtype(jnp.result_type(x), jnp.floating))
  for tx in (mezo_jax.mezo(1e-2, key=0), mezo_jax.spsa(1e-2, key=0),
             mezo_jax.mezo(1e-2, key=0, weight_decay=0.1, decay='w'),
             mezo_jax.mezo({'w': 1e-2, '': 1e-3}, key=0)):
    eager, _ = one_step(tx, params, value_fn)
    traced, _ = jax.jit(lambda p, tx=tx: one_step(tx, p, value_fn))(params)
    for x, y, z in zip(*map(jax.tree.leaves, (params, eager, traced)),
                       strict=True):
      dtype = jnp.result_type(x)
      assert dtype == y.dtype == z.dtype
      if not jnp.issubdtype(dtype, jnp.floating):
        assert np.all(x == y) and np.all(x == z)
      elif jnp.size(x):
        assert np.any(x != y)


def test_an_nnx_model_with_random_streams():
  """Split by nnx.Param, as it should be, and whole."""
  from flax import nnx
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.a = nnx.Linear(4, 4, rngs=rngs)
      self.drop = nnx.Dropout(0.1, rngs=rngs)
    def __call__(self, x):
      return self.drop(self.a(x))
  tx = mezo_jax.mezo(1e-3, key=0)
  graphdef, *states = nnx.split(Model(nnx.Rngs(1)), nnx.Param, ...)
  value_fn = lambda p, *rest: jnp.mean(
      nnx.merge(graphdef, p, *rest, copy=True)(X) ** 2)
  moved, _ = one_step(tx, states[0], lambda p: value_fn(p, states[1]))
  assert np.any(moved['a']['kernel'][...] != states[0]['a']['kernel'][...])
  graphdef, whole = nnx.split(Model(nnx.Rngs(1)))
  again, _ = one_step(tx, whole, value_fn)
  helpers.assert_close(again['a'], moved['a'], rtol=1e-4)
  assert again['drop']['rngs']['key'][...] == whole['drop']['rngs']['key'][...]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_flax_saves_the_state():
  from flax import serialization
  for name in ('mezo', 'hizoo', 'mezo, pending', 'svrg', 'lozo-m',
               'adam by history', 'spsa and adam'):
    kinds = dict(directions=LOZO) if name == 'lozo-m' else {}
    tx = ROWS[name](1e-2, key=5, **kinds)
    _, state = one_step(tx)
    saved = serialization.to_bytes(state)
    for like in (tx.init(PARAMS), jax.jit(tx.init)(PARAMS)):
      got = serialization.from_bytes(like, saved)
      words = lambda tree: jax.tree.map(
          lambda x: jax.random.key_data(x) if noise.is_typed(x) else x, tree)
      helpers.assert_bitwise(words(got), words(state))
      tx.update(None, got, PARAMS, value_fn=loss)


# --- parts of a batch, and of the directions --------------------------------


def weighted(params, batch):
  return rows(params, batch) * batch['weights'][batch['label']]


BATCH = {'x': jnp.linspace(-1, 1, 32).reshape(8, 4),
         'label': jnp.array([0, 1, 2, 3, 3, 2, 1, 0])}
WEIGHTS = jnp.array([1.0, 2.0, 3.0, 4.0])


@pytest.mark.slow
@pytest.mark.parametrize('make', [
    lambda **more: mezo_jax.spsa(1e-2, key=0, micro_batches=2),
    lambda **more: mezo_jax.spsa(1e-2, key=0, num_samples=2, over='rows'),
    lambda **more: backprop.backprop(micro_batches=2),
    *(pytest.param(make, marks=pytest.mark.exhaustive) for make in (
        lambda **more: whole.conservative(1e-2, key=0, micro_batches=2),
        lambda **more: whole.forward_grad(1e-2, key=0, micro_batches=2),
        lambda **more: whole.hizoo(1e-2, key=0, micro_batches=2),
        lambda **more: whole.private(
            1e-2, key=0, micro_batches=2, clip=1.0, noise_multiplier=1.0,
            batch_size=8),
        lambda **more: variants.svrg(1e-2, key=0, rows=4)))])
def test_arrays_that_are_not_batch_are_not_cut(make):
  tx = make()
  private = dict(noise_key=KEY)
  with pytest.raises(ValueError) as e:
    one_step(tx, value_fn=weighted, batch=BATCH | {'weights': WEIGHTS},
             **private)
  assert '8' in str(e.value) and '4' in str(e.value)
  scaled = lambda p, batch: batch['scale'] * weighted(
      p, batch | {'weights': WEIGHTS})
  one_step(tx, value_fn=scaled, batch=BATCH | {'scale': 1.0}, **private)
  one_step(tx, value_fn=scaled, batch=BATCH | {'scale': jnp.float32(1)},
           **private)


def z_score(losses, eps):
  del eps
  value = losses[:, 0]
  return jnp.mean(value), (value - jnp.mean(value)) / jnp.std(value)


@pytest.mark.parametrize('combine', [
    mezo_jax.Combine((1.0,), z_score), mezo_jax.fzoo, 'fzoo'])
def test_a_combine_of_all_losses_has_no_part_of_them(combine):
  tx = mezo_jax.spsa(1e-3, key=0, combine=combine, num_samples=4)
  with pytest.raises(ValueError, match='part'):
    one_step(tx, part=(0, 2))
  _, want = one_step(tx)
  _, all_of_it = one_step(tx, part=(0, 1))
  np.testing.assert_array_equal(want.projected_grad, all_of_it.projected_grad)


@pytest.mark.slow
def test_parts_of_directions_have_the_numbers_of_the_whole():
  own = mezo_jax.Combine((1.0, -1.0), lambda losses, eps: (
      jnp.mean(losses), jnp.tanh(losses[:, 0] - losses[:, 1])),
                         needs_all=False)
  for make in (functools.partial(mezo_jax.spsa, 1e-3, combine=own),
               functools.partial(whole.sign, 1e-2)):
    tx = make(key=0, num_samples=4)
    get = lambda tx=tx, **more: optax.tree.get(
        one_step(tx, **more)[1], 'projected_grad')
    parts = [get(part=(i, 2)) for i in range(2)]
    np.testing.assert_allclose(np.concatenate(
        [parts[0][:2], parts[1][2:]]), get(), rtol=1e-6)
    assert np.all(np.isnan(parts[0][2:]))
  with pytest.raises(ValueError, match='part'):  # it needs the step of all
    one_step(whole.conservative(1e-2, key=0, num_samples=4), part=(0, 2))


# --- chains -----------------------------------------------------------------


CLIP = optax.clip_by_global_norm(1.0)
BEFORE = {
    'chain': lambda tx: optax.chain(CLIP, tx),
    'decay': lambda tx: optax.chain(
        optax.add_decayed_weights(10.0), tx, optax.sgd(1.0)),
    'named': lambda tx: optax.named_chain(('clip', CLIP), ('mezo', tx)),
    'nested': lambda tx: optax.chain(
        CLIP, optax.chain(tx, optax.scale(1.0)), optax.scale(1.0)),
    'adam': lambda tx: optax.chain(optax.identity(), tx),
    'injected': lambda tx: optax.inject_hyperparams(
        lambda c: optax.chain(optax.clip_by_global_norm(c), tx))(1.0),
    'around injected': lambda tx: optax.chain(
        CLIP, optax.inject_hyperparams(
            lambda rate: optax.chain(tx, optax.scale(rate)))(1.0)),
    'skipped': lambda tx: mezo_jax.skip_not_finite(optax.chain(CLIP, tx)),
    'in skipped': lambda tx: optax.chain(CLIP, mezo_jax.skip_not_finite(tx)),
    'schedule free': lambda tx: optax.chain(
        CLIP, optax.contrib.schedule_free(tx, learning_rate=1.0)),
}


@pytest.mark.parametrize('how', ['update', 'jit', 'make_step'])
@pytest.mark.parametrize('name', BEFORE)
def test_links_before_the_estimate_are_refused(name, how):
  tx = BEFORE[name](mezo_jax.spsa(1e-3, key=0))
  with pytest.raises(ValueError, match='link'):
    if how == 'make_step':
      mezo_jax.make_step(tx, lambda p, b: loss(p))(PARAMS, tx.init(PARAMS), ())
    else:
      wrap = jax.jit if how == 'jit' else lambda fn: fn
      wrap(lambda p: one_step(tx, p))(PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    'mezo', 'mezo, pending', 'backprop and adam', 'private', 'svrg',
    'lozo-m', 'one point', 'conservative', 'mazo', 'forward gradient'])
def test_no_variant_has_links_before_it(name):
  kinds = dict(directions=mezo_jax.LazyLowRank(
      rank=1, every=2)) if name == 'lozo-m' else {}
  tx = optax.chain(CLIP, ROWS[name](1e-2, key=0, **kinds))
  with pytest.raises(ValueError, match='link'):
    one_step(tx)


def test_links_that_have_updates_are_let_be():
  """A link that asks an estimate for its own purposes is not one before it."""
  estimate = mezo_jax.spsa(1e-3, key=0)
  def update_fn(updates, state, params=None, **extra_args):
    more, state = estimate.update(None, state, params, **extra_args)
    return jax.tree.map(jnp.add, updates, more), state
  own = optax.GradientTransformationExtraArgs(estimate.init, update_fn)
  tx = optax.chain(optax.scale(0.5), own)
  updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=loss)
  z, _ = estimate.update(None, estimate.init(PARAMS), PARAMS, value_fn=loss)
  helpers.assert_close(updates, jax.tree.map(
      lambda p, z: 0.5 * p + z, PARAMS, z))


def test_wrappers_that_count_what_is_not_finite_are_no_estimators():
  """`optax.apply_if_finite` has fields of the same names."""
  tx = optax.chain(mezo_jax.spsa(1e-3, key=0),
                   optax.apply_if_finite(optax.trace(0.9), 5), optax.sgd(1e-2))
  step = mezo_jax.make_step(tx, lambda p, b: loss(p) * b)
  params, state = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
  params, state, metrics = step(params, state, jnp.float32(1.0))
  assert metrics['skipped'] == 0 and np.isfinite(metrics['loss'])
  # Its inner state stays as it was in a step that is skipped.
  tx = mezo_jax.skip_not_finite(tx)
  bad = lambda p, factor: loss(p) * factor
  state = tx.init(PARAMS)
  _, first = tx.update(None, state, PARAMS, value_fn=bad, factor=1.0)
  _, second = tx.update(None, first, PARAMS, value_fn=bad, factor=jnp.nan)
  assert second[0].total_notfinite == 1
  for a, b in zip(jax.tree.leaves(first[1:]), jax.tree.leaves(second[1:])):
    np.testing.assert_array_equal(a, b)
  with pytest.raises(ValueError, match='estimator'):
    mezo_jax.skip_not_finite(
        optax.apply_if_finite(optax.sgd(1.0), 5)).init(PARAMS)


def test_a_step_has_one_estimator():
  tx = optax.chain(mezo_jax.spsa(1e-3, key=0), mezo_jax.mezo(1e-2, key=0))
  with pytest.raises(ValueError, match='estimators'):
    mezo_jax.make_step(tx, lambda p, b: loss(p))(PARAMS, tx.init(PARAMS), ())


@pytest.mark.slow
def test_what_is_promised_of_chains():
  """A skipped step changes nothing inside skip_not_finite alone."""
  bad = lambda p, bad: jnp.where(bad, jnp.nan, loss(p))
  chain = optax.chain(mezo_jax.spsa(1e-3, key=0), optax.adamw(1e-2))
  for tx, moves in ((chain, True), (mezo_jax.skip_not_finite(chain), False)):
    params, state = PARAMS, tx.init(PARAMS)
    for is_bad in (False, True):
      before = params
      updates, state = tx.update(None, state, params, value_fn=bad, bad=is_bad)
      params = optax.apply_updates(params, updates)
    assert np.any(params['w'] != before['w']) == moves
    assert optax.tree.get(state, 'total_notfinite') == 1
  only_b = mezo_jax.Normal(mask='b')
  moved, _ = one_step(optax.chain(
      mezo_jax.spsa(1e-3, key=0, directions=only_b),
      optax.adamw(1e-2, weight_decay=0.1)))
  assert np.any(moved['w'] != PARAMS['w'])  # decayed
  for tx in (mezo_jax.mezo(1e-2, key=0, directions=only_b, weight_decay=0.1,
                           decay=lambda p: True),
             optax.chain(mezo_jax.spsa(1e-3, key=0, directions=only_b),
                         optax.adamw(1e-2, weight_decay=0.1,
                                     mask={'w': False, 'b': True}))):
    moved, _ = one_step(tx)
    helpers.assert_bitwise(moved['w'], PARAMS['w'])
    assert np.all(moved['b'] != PARAMS['b'])


# --- bad arguments ----------------------------------------------------------


def trained(make, **fixed):
  """A function of one argument: a step of what is made with it."""
  def call(**kwargs):
    of_loss = {k: kwargs.pop(k) for k in ('value_fn',) if k in kwargs}
    return one_step(make(**({'key': 0} | fixed | kwargs)), **of_loss)
  return call


def updated(**kwargs):
  tx = mezo_jax.spsa(1e-3, key=0)
  given = dict(updates=None, state=tx.init(PARAMS), params=PARAMS)
  given |= {k: kwargs.pop(k) for k in [*kwargs] if k in given}
  if 'projected_grad' not in kwargs:
    kwargs = dict(value_fn=loss) | kwargs
  return tx.update(**given, **kwargs)


def displaced(fn=mezo_jax.displace, **kwargs):
  return fn(**(dict(params=PARAMS, displacement=STEP) | kwargs))


def step(**kwargs):
  kwargs = dict(tx=mezo_jax.mezo(1e-3, key=0), value_fn=rows) | kwargs
  return mezo_jax.make_step(**kwargs)


def stepped(**kwargs):
  made = step(value_fn=lambda p, b: loss(p))
  params = jax.tree.map(jnp.copy, PARAMS)
  return made.update(params, mezo_jax.mezo(1e-3, key=0).init(params), **(
      dict(projected_grad=[1.0]) | kwargs))


def logged(tmp_path, **kwargs):
  log, _ = replay.open_log(**(dict(
      path=tmp_path / 'a.log', header={}, n=1) | kwargs))
  log.close()


SPSA = dict(
    eps=[None, 'x', 0.0, -1.0, np.nan, np.inf, {}, {'(': 1.0}, {'': 'x'},
         {1: 1.0}, [1e-3], jnp.ones(2), 1j, lambda t: None, lambda t: -1.0],
    key=[None, 'x', 1.5, [0, 1], jnp.zeros(3), jax.random.split(KEY, 2), {}],
    directions=[None, 'cauchy', 3, mezo_jax.Normal, ['normal'], {}],
    combine=[None, 'mean', lambda losses, eps: losses, 1],
    num_samples=[0, -1, 1.5, 'x', True, [2]],
    over=['cols', None, 1, ['scan']], micro_batches=[0, 1.5, 'x', False])
RATE = dict(learning_rate=[
    None, 'x', np.nan, [1e-3], {}, {'(': 1.0}, {'': None}, jnp.ones(2),
    lambda t: None, float])
MEZO = RATE | dict(
    weight_decay=[None, 'x', -1.0, np.nan], decay=['(', 3.5, '['],
    stochastic_rounding=[None, 'yes', 1])
without = lambda table, *names: {
    k: v for k, v in table.items() if k not in names}
ONE_EPS = without(SPSA, 'eps') | dict(eps=[*SPSA['eps'][:7], {'': 1e-3}])
OPTIONS = SPSA | MEZO
LOZO = mezo_jax.LazyLowRank(rank=1, every=2)

TABLE = {
    'spsa': (trained(mezo_jax.spsa), SPSA | dict(
        dtype=['x', int, 'int32', 3], value_fn=[3, 'x'])),
    'mezo': (trained(mezo_jax.mezo, learning_rate=1e-3), without(
        OPTIONS, 'combine', 'over') | dict(
            eps=SPSA['eps'][1:], directions=SPSA['directions'][1:],
            apply_every=[0, 1.5, 'x', True])),
    'mezo, another estimator': (trained(
        lambda key, **kwargs: mezo_jax.mezo(1e-3, **(
            dict(estimator=mezo_jax.spsa(key=0)) | kwargs))), dict(
                estimator=[3, optax.sgd(1e-3)], eps=[1e-3], num_samples=[2],
                directions=['normal'], micro_batches=[2])),
    'update': (updated, dict(
        params=[None], state=[None, (), 3], value_fn=[3],
        projected_grad=['x', [1.0, 2.0], [None]],
        part=[1, (1,), (2, 2), (0, 0), 'x', (0.5, 1), (0, 3)],
        around=[1.0, 'x', (KEY, 1.0)])),
    'displace': (displaced, dict(
        displacement=[None, 1.0, (KEY, 1.0), Displacement('x', 1.0),
                      Displacement(KEY, 'x'), Displacement(1.5, 1.0),
                      Displacement(KEY, jnp.ones(2))],
        directions=SPSA['directions'])),
    'direction': (functools.partial(displaced, mezo_jax.direction), dict(
        displacement=[None, 1.0], directions=SPSA['directions'],
        dtype=['x', int, 3])),
    'perturbed': (lambda **kwargs: mezo_jax.perturbed(
        **(dict(value_fn=loss) | kwargs))(PARAMS, STEP), dict(
            value_fn=[None, 3], directions=SPSA['directions'])),
    'dequantized': (mezo_jax.dequantized, dict(fn=[None, 3])),
    'estimate': (lambda **kwargs: mezo_jax.estimate(**(dict(
        value_fn=loss, params=PARAMS, z=Displacement(KEY[None], jnp.ones(1)),
        eps=1e-3, directions=mezo_jax.Normal()) | kwargs)), dict(
            value_fn=[None, 3], z=[None, 1.0], around=[1.0],
            directions=SPSA['directions'], over=SPSA['over'])),
    'Combine': (lambda **kwargs: mezo_jax.Combine(
        **(dict(signs=(1.0,), fn=z_score) | kwargs)), dict(
            signs=[None, (), 1.0, 'x', ('x',), (None,)], fn=[None, 3],
            needs_all=[None, 1], of_rows=[None, 1])),
    'anchored': (mezo_jax.anchored, dict(
        weight_decay=[-1.0, None, 'x', float('nan')])),
    'Normal': (mezo_jax.Normal, dict(
        generator=['x', None, 3, []], mask=['(', 3, 0.5], stacked=['(', 3],
        multiplier=['x', 2.0], on_grid=[None, 1])),
    'LowRank': (mezo_jax.LowRank, dict(rank=[0, 1.5, 'x', None, True])),
    'LazyLowRank': (mezo_jax.LazyLowRank, dict(every=[0, 1.5, None, True])),
    'SubZero': (mezo_jax.SubZero, dict(rank=[0], every=[0, 'x'])),
    'round_stochastically': (lambda **kwargs: (
        lambda tx: tx.update(PARAMS, tx.init(PARAMS), PARAMS))(
            mezo_jax.round_stochastically(**(dict(key=0) | kwargs))), dict(
                key=SPSA['key'], mask=['(', {'w': 'x', 'b': True}])),
    'skip_not_finite': (mezo_jax.skip_not_finite, dict(inner=[None, 3])),
    'make_step': (step, dict(
        tx=[None, 3], value_fn=[3, 'x'], mesh=[3, 'x'], on_compile=[3],
        part=[1, (1,), (2, 2), 'x'])),
    'Step.update': (stepped, dict(
        projected_grad=['x', [1.0, 2.0], None], value=['x', [1.0, 2.0]])),
    'dequantize': (lambda **kwargs: mezo_jax.dequantize(
        **(dict(params=PARAMS) | kwargs)), dict(
            params=[None], dtype=['x', int, 3])),
    'quantize': (lambda **kwargs: mezo_jax.quantize(
        **(dict(w=jnp.ones((4, 32)), bits=8) | kwargs)), dict(
            w=[None, 'x', jnp.float32(1.0), jnp.arange(4)], bits=[3, 'x', None],
            axis=[5, None, 'x'])),
    # --- variants ---
    'adam_by_history': (trained(
        whole.adam_by_history, learning_rate=1e-3), MEZO | ONE_EPS | dict(
            b1=[None, 'x', 1.0, -0.1], b2=[None, 1.5], adam_eps=[None, -1.0],
            window=[0, 1.5, 'x', True])),
    'momentum_by_history': (trained(
        whole.momentum_by_history, learning_rate=1e-3), dict(
            learning_rate=[None], beta=[None, 'x', 1.0], window=[0, None])),
    'conservative': (trained(
        whole.conservative, learning_rate=1e-3), without(
            OPTIONS, 'learning_rate') | dict(
                learning_rate=[*RATE['learning_rate'], {'': 1e-3}])),
    'expectation_modified': (trained(
        whole.expectation_modified, learning_rate=1e-3,
        norms={'w': 1.0, 'b': 1.0}), OPTIONS | dict(norms=[None, 'x'])),
    'variance_modified': (trained(
        whole.variance_modified, learning_rate=1e-3,
        norms={'w': 1.0, 'b': 1.0}), dict(norms=[None, 'x'], key=['x'])),
    'forward_grad': (trained(
        whole.forward_grad, learning_rate=1e-3), MEZO | without(
            SPSA, 'eps', 'combine', 'over')),
    'hizoo': (trained(whole.hizoo, learning_rate=1e-3), MEZO | without(
        ONE_EPS, 'combine') | dict(alpha=[None, 'x', 1.0, -0.1])),
    'lozo_m': (trained(
        whole.lozo_m, learning_rate=1e-3, directions=LOZO), MEZO | without(
            ONE_EPS, 'num_samples', 'directions') | dict(
                beta=[None, 1.0], directions=['normal', None, 'cauchy'])),
    'mazo': (trained(whole.mazo, learning_rate=1e-3, mask={
        'w': True, 'b': True}), RATE | SPSA | dict(
            mask=[None, 'w', {'w': True}], stochastic_rounding=[None])),
    'one_point': (trained(
        whole.one_point, learning_rate=1e-3), MEZO | without(
            SPSA, 'combine', 'num_samples')),
    'private': (trained(
        lambda key, **kwargs: ROWS['private'](key=key, **kwargs),
        learning_rate=1e-3), MEZO | without(
            ONE_EPS, 'combine', 'over')),
    'private, alone': (lambda **kwargs: whole.private(**(dict(
        learning_rate=1e-3, key=0, clip=1.0, noise_multiplier=1.0,
        batch_size=8) | kwargs)), dict(
            clip=[None, 'x', 0.0], noise_multiplier=[None, -1.0],
            batch_size=[None, 0, 'x'], mechanism=[None, 'x', []])),
    'qzo': (trained(whole.qzo, learning_rate=1e-3), OPTIONS | dict(
        clip=[None, 0.0, 'x'])),
    'quzo': (lambda **kwargs: whole.quzo(
        **(dict(learning_rate=1e-3, key=0) | kwargs)), dict(
            learning_rate=[None], directions=['low_rank', None], key=['x'])),
    'nonnegative': (variants.nonnegative, dict(tx=[None, 3])),
    'scalar_adam': (trained(
        whole.scalar_adam, learning_rate=1e-3), OPTIONS | dict(
            b2=[None, 1.0], adam_eps=[None, -1.0])),
    'sign': (trained(whole.sign, learning_rate=1e-3), without(
        OPTIONS, 'combine')),
    'sparse_mezo': (trained(
        whole.sparse_mezo, learning_rate=1e-3, limits=5.0), OPTIONS | dict(
            limits=[None, 'x', {'w': 'x', 'b': 1.0}])),
    'svrg': (trained(variants.svrg, learning_rate=1e-3), without(
        RATE | ONE_EPS, 'combine', 'over', 'micro_batches') | dict(
            every=[1, 2.5, None], anchor_learning_rate=[None, 'x'],
            rows=[0, 'x'], stochastic_rounding=[None])),
    'saliency': (lambda **kwargs: variants.saliency(**(dict(
        value_fns=[loss], params=PARAMS, key=0, num_samples=1) | kwargs)), dict(
            value_fns=[None, loss, [], [3]], params=[None], key=SPSA['key'],
            share=[0.0, 2.0, None, 'x'], num_samples=[0, 1.5, None],
            eps=[0.0, None], alpha=[None], beta=['x'],
            directions=['rademacher', None])),
    'grad_norms': (lambda **kwargs: variants.grad_norms(**(dict(
        value_fn=loss, params=PARAMS, key=0) | kwargs)), dict(
            value_fn=[None, 3], params=[None], key=SPSA['key'],
            num_samples=[0, None], eps=[0.0, None], directions=[None])),
    'no_norms': (lambda **kwargs: variants.no_norms(
        **(dict(params=PARAMS) | kwargs)), dict(
            params=[None], directions=[None, 'cauchy'])),
    'no_scores': (lambda **kwargs: variants.no_scores(
        **(dict(params=PARAMS) | kwargs)), dict(
            params=[None], directions=[None, 'cauchy'])),
    'smallest': (lambda **kwargs: variants.smallest(
        **(dict(params=PARAMS) | kwargs)), dict(
            params=[None], share=[0.0, 2.0, None, 'x'], stacked=['('])),
}
# What every variant refuses, for those that have no row of their own.
for _name in variants.__all__:
  TABLE.setdefault(_name, (
      trained(getattr(whole, _name), learning_rate=1e-3), OPTIONS))
LOG = dict(path=[None, 3], header=[None, 3, {'x': {1, 2}}, {'shared': True}],
           n=[0, 1.5, None, True], start=[-1, 1.5, None])
TYPES = {'QuantizedArray', 'Directions', 'Displacement', 'Estimator',
         'Multiplier', 'Numbers', 'SpsaState', 'ZerothOrderTransformation'}
CONSTANTS = {'Rademacher', *mezo_jax.transforms.combine.COMBINES}


def test_the_table_has_every_public_function():
  public = {*mezo_jax.__all__, *variants.__all__} - TYPES - CONSTANTS
  assert public <= {name.partition(',')[0] for name in TABLE}


def refused(call, name, value):
  with pytest.raises((ValueError, TypeError)) as e:
    call(**{name: value})
  said = str(e.value)
  assert name in said, (name, value, said)


@pytest.mark.parametrize('row', TABLE)
def test_bad_arguments_are_refused_by_name(row):
  call, bad = TABLE[row]
  for name, values in bad.items():
    for value in values:
      refused(call, name, value)


def test_bad_arguments_of_a_log_are_refused_by_name(tmp_path):
  for name, values in LOG.items():
    for value in values:
      refused(functools.partial(logged, tmp_path), name, value)
  logged(tmp_path, path=str(tmp_path / 'b.log'))


@pytest.mark.parametrize('name', ['part', 'around'])
def test_names_that_update_keeps_to_itself(name):
  value_fn = eval(f'lambda p, {name}: loss(p, {name})', dict(loss=loss))
  with pytest.raises(ValueError, match=f"'{name}'"):
    one_step(mezo_jax.mezo(1e-2, key=0), value_fn=value_fn, **{name: X})
  one_step(mezo_jax.mezo(1e-2, key=0),
           value_fn=lambda p, part=None: loss(p))  # a default is not given
  for row in ('qzo', 'one point', 'conservative', 'mezo'):
    tx = whole.qzo(1e-2, key=0) if row == 'qzo' else ROWS[row](1e-2, key=0)
    one_step(tx, value_fn=lambda p, value: loss(p, value), value=X)


def test_what_a_combine_returns_is_checked():
  for fn in (lambda losses, eps: losses, lambda losses, eps: None,
             lambda losses, eps: (losses[0, 0], losses),
             lambda losses, eps: (losses, losses[:, 0])):
    tx = mezo_jax.spsa(1e-3, key=0, combine=mezo_jax.Combine((1.0,), fn))
    with pytest.raises(ValueError, match='Combine'):
      one_step(tx)


def test_a_step_needs_an_estimator():
  tx = optax.adam(1e-3)
  with pytest.raises(ValueError, match='tx'):
    mezo_jax.make_step(tx, lambda p, b: loss(p))(PARAMS, tx.init(PARAMS), ())
  tx = mezo_jax.mezo(1e-3, key=0)
  with pytest.raises(ValueError, match='value_fn'):
    mezo_jax.make_step(tx, None)(PARAMS, tx.init(PARAMS), ())


def test_leaves_that_cannot_be_trained_are_named():
  """Text, functions, and complex numbers, which would be left alone."""
  for bad in ('text', jnp.tanh, jnp.ones(3, jnp.complex64)):
    with pytest.raises(ValueError, match='act'):
      mezo_jax.mezo(1e-3, key=0).init(PARAMS | {'act': bad})
  tx = mezo_jax.mezo(1e-3, key=0, directions=mezo_jax.Normal(mask='^[wb]$'))
  tx.init(PARAMS | {'act': jnp.ones(3, jnp.complex64)})


def test_the_definition_is_that_of_some_directions_only():
  with pytest.raises(ValueError, match='LowRank'):
    mezo_jax.directions.z_of_leaf(
        jax.random.key(0), 'w', (2, 3), mezo_jax.LowRank(rank=2))
