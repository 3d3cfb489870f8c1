"""What a run is made of: in which order, and alike with and without weights."""

import conftest
import jax
import numpy as np
import pytest
from runs import small_config

import mezo_jax
from mezo_jax import models
from mezo_jax.core.errors import InputError
from mezo_jax.training import build, optimizer
from mezo_jax.training import config as config_lib


def test_a_group_for_all_others_comes_last():
  config = config_lib.Train()
  config.optimizer.groups = (('', 1e-2, 1e-1), ('b', 1e-3, 1e-2))
  params = {'a': np.ones(1, np.float32), 'b': np.ones(1, np.float32)}
  tx = optimizer.make_optimizer(config, params)
  updates, state = tx.update(None, tx.init(params), params,
                             value_fn=lambda p: (p['a'] + p['b']).sum())
  z = mezo_jax.direction(params, mezo_jax.Displacement(
      mezo_jax.directions.noise.direction_key(jax.random.key(0), 0), 1.0))
  # l+ - l- = 2 (eps_a z_a + eps_b z_b)
  difference = 2 * (1e-1 * z['a'] + 1e-2 * z['b'])
  np.testing.assert_allclose(
      updates['a'], -1e-2 * difference / 2e-1 * z['a'], rtol=1e-3)
  np.testing.assert_allclose(
      updates['b'], -1e-3 * difference / 2e-2 * z['b'], rtol=1e-3)


METHODS = {
    'mezo': {}, 'lora': dict(peft__method='lora'),
    'prefix': dict(peft__method='prefix'),
    'prompt': dict(peft__method='prompt', peft__init='text', peft__text='good'),
    'last_layers': dict(peft__method='last_layers'),
    'head': dict(peft__method='head'), 'mask': dict(peft__mask='attn/q'),
    'new head': dict(task__kind='head', task__template='{text}',
                     task__label_words=(), task__label_names=('a', 'b')),
    'Adam': dict(method='finetune'),
    'groups': dict(method='head_only', optimizer__groups=(('lm', 1., 1.),)),
    'lp_mezo': dict(method='lp_mezo'), 'zero_shot': dict(method='zero_shot')}


@pytest.fixture(scope='module')
def wide_dir(tmp_path_factory):
  """A model with leaves that are large enough to be split."""
  return conftest.write_tiny_model(
      tmp_path_factory.mktemp('wide'), hidden_size=256, intermediate_size=512)


@pytest.mark.parametrize('name', METHODS)
def test_shapes_are_those_of_what_is_built(name, wide_dir, reviews_file):
  """Shapes, dtypes and where they lie; no weights are read for them."""
  config = small_config(wide_dir, reviews_file, **METHODS[name])
  quiet = dict(say=lambda text: None)
  want = build.build(config, **quiet)
  (wide_dir / 'model.safetensors').rename(wide_dir / 'away')
  try:
    got = build.build(config, abstract=True, **quiet)
  finally:
    (wide_dir / 'away').rename(wide_dir / 'model.safetensors')
  assert got.model == want.model
  for part in ('params', 'frozen', 'opt_state'):
    one, two = getattr(got, part), getattr(want, part)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
      assert (x.shape, x.dtype) == (y.shape, y.dtype)
      assert x.sharding.is_equivalent_to(y.sharding, y.ndim), part


def test_a_wrong_column_costs_no_waiting_for_weights(
    tiny_dir, reviews_file, monkeypatch):
  def load(*args, **kwargs):
    raise AssertionError('weights were read')
  monkeypatch.setattr(models, 'load', load)
  config = small_config(tiny_dir, reviews_file, task__template='{no} It was')
  with pytest.raises(InputError, match='config.task.template'):
    build.build(config)


def test_schedules():
  config = config_lib.Train(steps=10)
  values = lambda: [
      float(optimizer.schedule(config, 2.0)(t)) for t in (0, 2, 6, 10)]
  assert values() == [2, 2, 2, 2]
  config.optimizer.schedule, config.optimizer.warmup_steps = 'linear', 2
  assert values() == [0, 2, 1, 0]
  config.optimizer.schedule = 'cosine'
  np.testing.assert_allclose(values(), [0, 2, 1, 0], atol=1e-6)
