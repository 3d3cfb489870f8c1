"""A tree in two, what is trained and what is not; groups of parameters."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mezo_jax
from mezo_jax import peft
from mezo_jax.core import paths
from mezo_jax.transforms import backprop


def test_split_and_join_are_inverse_and_copy_nothing():
  _, params, _ = helpers.tiny_model()
  trainable, frozen = peft.split(params, 'attn/(q|v)/')
  assert {p for p in helpers.paths(trainable)} == {
      'layers/attn/q/kernel', 'layers/attn/v/kernel'}
  assert not helpers.paths(trainable) & helpers.paths(frozen)
  again = peft.join(trainable, frozen)
  assert jax.tree.structure(again) == jax.tree.structure(params)
  assert all(a is b for a, b in zip(jax.tree.leaves(again),
                                    jax.tree.leaves(params)))
  tree = paths.selected(params, 'norm')
  assert helpers.paths(peft.split(params, tree)[0]) == helpers.paths(
      peft.split(params, 'norm')[0])
  with pytest.raises(ValueError, match="'kernel'"):
    peft.join(trainable, params)
  with pytest.raises(ValueError, match="'a' is a list"):
    peft.split({'a': [jnp.ones(1)], 'b': jnp.ones(1)}, 'b')


@pytest.mark.slow
def test_a_step_on_the_trainable_tree_is_the_masked_step():
  """Same directions, same loss, same updates; the rest never moves."""
  model, params, ids = helpers.tiny_model()
  loss_fn = helpers.lm_loss(model)
  decay = dict(weight_decay=0.1, decay='kernel')
  tx = mezo_jax.mezo(
      1e-2, key=0, directions=mezo_jax.Normal(mask='attn/q'), **decay)
  want, wanted = tx.update(
      None, tx.init(params), params, value_fn=loss_fn, ids=ids)
  trainable, frozen = peft.split(params, 'attn/q')
  tx = mezo_jax.mezo(1e-2, key=0, **decay)
  state = tx.init(trainable)
  got, state = tx.update(
      None, state, trainable, ids=ids,
      value_fn=lambda p, ids: loss_fn(peft.join(p, frozen), ids))
  assert helpers.paths(got) == {'layers/attn/q/kernel'}
  helpers.assert_close(got, peft.split(want, 'attn/q')[0])
  np.testing.assert_allclose(state[0].projected_grad,
                             wanted[0].projected_grad, rtol=1e-5)


@pytest.mark.parametrize('make', [
    lambda: mezo_jax.mezo(1e-2, key=0, micro_batches=2),
    lambda: backprop.backprop(micro_batches=2)])
def test_micro_batches_do_not_split_what_is_frozen(make):
  x = jnp.arange(8.0).reshape(4, 2)
  def loss_fn(params, x):
    return jnp.mean((x @ params['w'] - params['b']) ** 2, -1)
  params = {'w': jnp.ones((2, 3)), 'b': jnp.zeros(3)}
  trainable, frozen = peft.split(params, 'w')
  tx = make()
  def step(x):
    return tx.update(
        None, tx.init(trainable), trainable, x=x,
        value_fn=lambda p, x: loss_fn(peft.join(p, frozen), x))[0]
  got = step(x)
  assert got.keys() == {'w'} and np.isfinite(got['w']).all()
  # The loss is a mean over rows: two halves, each twice, give the same.
  helpers.assert_close(got, jax.tree.map(lambda a, b: (a + b) / 2, *(
      step(jnp.concatenate([half, half])) for half in (x[:2], x[2:]))),
                       rtol=1e-3)


def test_groups_have_their_own_eps_and_learning_rate():
  """Against numpy: theta_i +- eps_i z_i, and -lr_i (l+ - l-) / (2 eps_i) z."""
  params = {'a': jnp.array([1.0, 2.0]), 'b': {'c': jnp.array([3.0])}}
  loss_fn = lambda p: jnp.sum(p['a'] ** 2) + 2 * jnp.sum(p['b']['c'] ** 3)
  eps, rate = {'^b/': 1e-2, '': 1e-3}, {'^b/': 0.1, '': 0.5}
  tx = mezo_jax.mezo(rate, eps, key=7)
  updates, state = tx.update(None, tx.init(params), params, value_fn=loss_fn)
  key = mezo_jax.directions.noise.direction_key(jax.random.key(7), 0)
  z = mezo_jax.direction(params, mezo_jax.Displacement(key, 1.0))
  z = {'a': np.asarray(z['a'], np.float64),
       'c': np.asarray(z['b']['c'], np.float64)}
  at = lambda s: (np.sum((np.array([1, 2]) + s * 1e-3 * z['a']) ** 2)
                  + 2 * np.sum((3 + s * 1e-2 * z['c']) ** 3))
  difference = at(1) - at(-1)
  np.testing.assert_allclose(
      state[0].projected_grad, difference / (2 * 1e-2), rtol=1e-3)
  np.testing.assert_allclose(
      updates['a'], -0.5 * difference / (2 * 1e-3) * z['a'], rtol=1e-3)
  np.testing.assert_allclose(
      updates['b']['c'], -0.1 * difference / (2 * 1e-2) * z['c'], rtol=1e-3)


def test_groups_are_schedules_too_and_must_cover_what_is_trained():
  params = {'a': jnp.ones(2), 'b': jnp.ones(2)}
  loss_fn = lambda p: jnp.sum(p['a'] ** 2 + p['b'] ** 2)
  halves = lambda count: 1e-3 / (1 + count)
  tx = mezo_jax.mezo({'a': halves, '': 0.0}, {'a': halves, '': 1e-3}, key=7)
  updates, state = tx.update(None, tx.init(params), params, value_fn=loss_fn)
  assert updates['a'].all() and not updates['b'].any()
  for bad in (dict(eps={'a': 1e-3}), dict(learning_rate={'a': 1e-3})):
    tx = mezo_jax.mezo(**dict(learning_rate=1e-3, key=7) | bad)
    with pytest.raises(ValueError, match="b .*groups a"):
      tx.update(None, tx.init(params), params, value_fn=loss_fn)
  with pytest.raises(ValueError, match=r"eps\['a'\]"):
    mezo_jax.mezo(1e-3, {'a': 0.0}, key=0)
