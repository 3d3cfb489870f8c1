"""Public names that changed keep working for one release, with a warning."""

import jax.numpy as jnp
import pytest

import mezo_jax
from mezo_jax.core.errors import InputError
from mezo_jax.training import config as config_lib


def loss(params, batch):
  return jnp.sum(params['w'] ** 2) + batch


def one_step(tx):
  step, params = mezo_jax.make_step(tx, loss), {'w': jnp.ones(3)}
  params, state, _ = step(params, tx.init(params), jnp.zeros([]))
  return step, params, state


def test_old_names_of_arguments_and_methods():
  with pytest.warns(DeprecationWarning, match='apply_every'):
    step, params, state = one_step(mezo_jax.mezo(1e-3, key=0, fold_every=2))
  with pytest.warns(DeprecationWarning, match='apply_accumulated'):
    params, _ = step.flush(params, state)
  step, want, state = one_step(mezo_jax.mezo(1e-3, key=0, apply_every=2))
  want, _ = step.apply_accumulated(want, state)
  assert jnp.array_equal(params['w'], want['w'])
  assert not jnp.array_equal(want['w'], jnp.ones(3))


def test_old_names_of_arguments_of_update():
  tx, params = mezo_jax.mezo(1e-3, key=0, apply_every=2), {'w': jnp.ones(3)}
  state = tx.init(params)
  kwargs = dict(value_fn=loss, batch=jnp.zeros([]))
  with pytest.warns(DeprecationWarning, match='apply'):
    old, state_ = tx.update(None, state, params, fold=True, **kwargs)
  want, _ = tx.update(None, state, params, apply=True, **kwargs)
  assert jnp.array_equal(old['w'], want['w']) and jnp.any(want['w'] != 0)
  with pytest.warns(DeprecationWarning, match='apply_only'):
    tx.update(None, state_, params, flush=True)
  with pytest.raises(TypeError, match='apply'):
    tx.update(None, state, params, fold=True, apply=True, **kwargs)


def test_old_names_of_classes():
  with pytest.warns(DeprecationWarning, match='QuantizedArray'):
    assert mezo_jax.Codes is mezo_jax.QuantizedArray


def test_a_saved_config_with_an_old_name_is_read():
  config = config_lib.Train()
  config.spsa.apply_every = 3
  saved = config_lib.to_json(config)
  saved['spsa']['fold_every'] = saved['spsa'].pop('apply_every')
  saved['keep_trunk'] = saved.pop('cache_frozen')
  assert config_lib.from_json(saved).spsa.apply_every == 3
  config_lib.check_same_run(config, saved)
  config.spsa.apply_every = 4
  with pytest.raises(InputError, match='spsa.apply_every'):
    config_lib.check_same_run(config, saved)
