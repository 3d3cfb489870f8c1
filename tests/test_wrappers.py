"""What optax's (and flax's) wrappers do to the estimator: each works, or says
in one sentence why not and what to do instead."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mezo_jax

PARAMS = {'a': jnp.array([[0.5, -1.0], [2.0, 0.1]]), 'b': jnp.array([1.0, 3.0])}


def loss_fn(params, x=1.0):
  return sum(jnp.sum((p - x) ** 2) for p in jax.tree.leaves(params))


def run(tx, updates=None, steps=2, **kwargs):
  params, state = PARAMS, tx.init(PARAMS)
  for _ in range(steps):
    u, state = tx.update(updates, state, params, value_fn=loss_fn, **kwargs)
    params = optax.apply_updates(params, u)
  return params, state


PLAIN = functools.cache(lambda: run(mezo_jax.mezo(1e-2, key=0))[0])


def test_chain_of_the_named_parts_is_mezo():
  tx = optax.chain(mezo_jax.spsa(1e-3, key=0), optax.add_decayed_weights(0.0),
                   optax.scale_by_learning_rate(1e-2))
  helpers.assert_close(run(tx)[0], PLAIN())


@pytest.mark.slow_except(name=['adam'])
@pytest.mark.parametrize('name,rest', [
    ('adam', optax.adam(1e-2)), ('momentum', optax.sgd(1e-2, momentum=0.9)),
    ('clipped',
     optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2))),
    ('lion', optax.lion(1e-3))])
def test_any_optimizer_may_follow(name, rest):
  moved, _ = run(optax.chain(mezo_jax.spsa(1e-3, key=0), rest))
  assert np.all(np.isfinite(moved['a'])) and np.any(moved['a'] != PARAMS['a'])


TREE_WRAPPERS = {
    'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 5),
    'conditionally_mask': lambda tx: optax.conditionally_mask(
        tx, lambda step: step < 1),
    'conditionally_transform': lambda tx: optax.conditionally_transform(
        tx, lambda step: step < 1),
    'mechanize': optax.contrib.mechanize,
    'flatten': optax.flatten,
    'MultiSteps': lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
}


@pytest.mark.slow_except(name=['MultiSteps'])
@pytest.mark.parametrize('name', TREE_WRAPPERS)
def test_wrappers_that_want_a_tree_go_around_what_follows(name):
  """Params in the place of updates would be added to the weights where
  conditionally_transform passes them on, and be mechanize's gradients."""
  wrap = TREE_WRAPPERS[name]
  tx = wrap(mezo_jax.mezo(1e-2, key=0))
  with pytest.raises(ValueError, match=r'chain\(spsa.*apply_if_finite\(rest'):
    run(tx, updates=PARAMS)
  estimate = mezo_jax.spsa(1e-3, key=0)
  tx = optax.chain(estimate, wrap(optax.sgd(1e-2)))
  got, _ = run(tx, steps=1)
  assert np.all(np.isfinite(got['a']))
  if name not in ('mechanize', 'MultiSteps'):
    want, _ = run(mezo_jax.mezo(1e-2, key=0), steps=1)
    helpers.assert_close(got, want)


@pytest.mark.slow
def test_schedule_free():
  tx = optax.contrib.schedule_free(
      mezo_jax.mezo(1e-2, key=0), learning_rate=1e-2)
  params, state = PARAMS, tx.init(PARAMS)
  before = loss_fn(params)
  step = jax.jit(lambda p, s: tx.update(None, s, p, value_fn=loss_fn))
  for _ in range(100):
    u, state = step(params, state)
    params = optax.apply_updates(params, u)
  assert loss_fn(params) < before


def test_inject_hyperparams():
  tx = optax.inject_hyperparams(mezo_jax.mezo, static_args=('key',))(
      learning_rate=1e-2, eps=lambda t: 1e-3, key=jax.random.key(0))
  got, state = run(tx)
  helpers.assert_close(got, PLAIN(), rtol=1e-4)
  assert float(state.hyperparams['learning_rate']) == pytest.approx(1e-2)
  seed = optax.inject_hyperparams(mezo_jax.mezo)(learning_rate=1e-2, key=0)
  helpers.assert_close(run(seed)[0], PLAIN())
  state = tx.init(PARAMS)
  state.hyperparams['learning_rate'] = jnp.float32(0.0)
  u, _ = tx.update(None, state, PARAMS, value_fn=loss_fn)
  assert not np.any(u['a'])


def test_inject_hyperparams_without_static_num_samples_is_refused():
  tx = optax.inject_hyperparams(mezo_jax.mezo)(1e-2, key=0, num_samples=2)
  with pytest.raises(ValueError, match='static_args'):
    tx.init(PARAMS)


def test_accumulation_after_the_estimate():
  rest = optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation()
  tx = optax.chain(mezo_jax.spsa(1e-3, key=0), rest)
  params, state = PARAMS, tx.init(PARAMS)
  u1, state = tx.update(None, state, params, value_fn=loss_fn)
  assert not np.any(u1['a'])
  u2, state = tx.update(None, state, params, value_fn=loss_fn)
  first, second = (mezo_jax.spsa(1e-3, key=0).update(
      None, mezo_jax.spsa(1e-3, key=0).init(PARAMS)._replace(
          count=jnp.int32(t)), PARAMS, value_fn=loss_fn)[0] for t in (0, 1))
  want = jax.tree.map(lambda a, b: -1e-2 * (a + b) / 2, first, second)
  helpers.assert_close(u2, want)


@pytest.mark.parametrize('wrap', [
    lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    lambda tx: optax.chain(optax.clip(1.0), tx)])
def test_updates_of_others_are_refused(wrap):
  """They would be ignored: only the last micro-batch would count."""
  tx = wrap(mezo_jax.mezo(1e-2, key=0))
  with pytest.raises(ValueError, match='micro_batches'):
    run(tx, updates=PARAMS)


@pytest.mark.parametrize('wrap', [
    lambda tx: optax.masked(tx, {'a': True, 'b': False}),
    lambda tx: optax.partition(
        {'t': tx, 'f': optax.set_to_zero()}, {'a': 't', 'b': 'f'})])
def test_params_with_holes_are_refused(wrap):
  """At once: with updates=None the wrapper's own error would come first."""
  with pytest.raises(ValueError, match='MaskedNode.*mask'):
    wrap(mezo_jax.mezo(1e-2, key=0)).init(PARAMS)


def test_masking_what_follows_works():
  tx = optax.chain(mezo_jax.spsa(
      1e-3, key=0, directions=mezo_jax.Normal(mask='a')),
                   optax.masked(optax.sgd(1e-2), {'a': True, 'b': False}))
  got, _ = run(tx)
  helpers.assert_bitwise(got['b'], PARAMS['b'])


def test_freeze_after_the_estimate_keeps_weights_but_perturbs_them():
  tx = optax.chain(mezo_jax.mezo(1e-2, key=0), optax.freeze(
      {'a': False, 'b': True}))
  got, _ = run(tx)
  helpers.assert_bitwise(got['b'], PARAMS['b'])
  assert np.any(got['a'] != PARAMS['a'])


def test_reduce_on_plateau_takes_the_value_of_the_last_step():
  tx = optax.chain(mezo_jax.mezo(1e-2, key=0),
                   optax.contrib.reduce_on_plateau(patience=1))
  state = tx.init(PARAMS)
  _, state = tx.update(None, state, PARAMS, value_fn=loss_fn,
                       value=optax.tree.get(state[0], 'value'))
  with pytest.raises(TypeError, match='value'):
    tx.update(None, state, PARAMS, value_fn=loss_fn)


def test_backtracking_linesearch_refuses_for_want_of_a_gradient():
  tx = optax.chain(mezo_jax.spsa(1e-3, key=0),
                   optax.scale_by_backtracking_linesearch(5))
  with pytest.raises(TypeError, match='value.*grad'):
    run(tx)


def test_lookahead_does_not_pass_extra_arguments():
  tx = optax.lookahead(mezo_jax.mezo(1e-2, key=0), 2, 0.5)
  params = optax.LookaheadParams.init_synced(PARAMS)
  with pytest.raises(TypeError, match='value_fn'):
    tx.update(PARAMS, tx.init(params), params, value_fn=loss_fn)


def test_train_state_is_told_why():
  from flax.training import train_state
  state = train_state.TrainState.create(
      apply_fn=None, params=PARAMS, tx=mezo_jax.mezo(1e-2, key=0))
  with pytest.raises(ValueError, match='apply_gradients'):
    state.apply_gradients(grads=PARAMS)


def test_nnx_optimizer():
  from flax import nnx
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  graphdef, before = nnx.split(model)
  before = jax.tree.map(jnp.copy, before)
  optimizer = nnx.Optimizer(model, mezo_jax.mezo(1e-2, key=0), wrt=nnx.Param)
  value_fn = lambda state: jnp.mean(nnx.merge(graphdef, state)(
      jnp.ones((4, 3))) ** 2)
  optimizer.update(model, None, value_fn=value_fn)
  after = nnx.split(model)[1]
  assert np.any(after['kernel'][...] != before['kernel'][...])
