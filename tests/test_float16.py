"""float16 weights, as many checkpoints have them, on CPUs."""

import families
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import mezo_jax
from mezo_jax import models, peft
import train

# With grouped queries, windows, caps on scores, projections, no causal mask.
CASES = {'llama': 'one key-value head', 'gemma2': 'as released',
         'gemma3_text': 'as released', 'opt': '350M', 'gpt2': 'as released',
         'bert': 'as released'}
MASK = families.MASKS['left']


def half_model(family):
  """(model, float16 params, the same in float32)."""
  make, settings, switches = families.FAMILIES[family]
  config = models.read_config(make(
      **(settings | switches[CASES[family]])).to_dict())
  model = models.Transformer(config)
  half = jax.tree.map(
      lambda x: x.astype(jnp.float16),
      helpers.quick_jit(model.init)(jax.random.key(0), families.IDS)['params'])
  return model, half, jax.tree.map(lambda x: x.astype(jnp.float32), half)


@pytest.mark.slow
@pytest.mark.exhaustive_except(family=['llama'])
@pytest.mark.parametrize('family', CASES)
def test_the_logits_are_those_of_float32(family):
  model, half, full = half_model(family)
  apply = helpers.quick_jit(model.apply)
  want, got = (np.asarray(apply({'params': p}, families.IDS, MASK))
               for p in (full, half))
  assert got.dtype == np.float32
  assert np.abs(got - want)[MASK == 1].max() < 0.01 * np.abs(want).max()


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('directions', [
    mezo_jax.Normal(), mezo_jax.LowRank(rank=2)], ids=['normal', 'low_rank'])
def test_a_step_with_lora(directions):
  """Perturbed losses are those of built weights, and a step moves weights."""
  model, half, _ = half_model('llama')
  lora = peft.lora.init(half, jax.random.key(1), rank=2)
  half = jax.tree.map(lambda x: x.astype(jnp.float16), peft.join(half, lora))
  loss = helpers.lm_loss(model)
  at = mezo_jax.Displacement(jax.random.key(3), 0.02)
  lazy = helpers.quick_jit(lambda p: mezo_jax.perturbed(
      loss, directions)(p, at, families.IDS))(half)
  built = helpers.quick_jit(lambda p: loss(mezo_jax.displace(
      p, at, directions), families.IDS))(half)
  np.testing.assert_allclose(lazy, built, rtol=2e-3)
  tx = mezo_jax.mezo(1e-3, directions=directions, key=0)
  step = mezo_jax.make_step(tx, loss)
  new, _, metrics = step(jax.tree.map(jnp.copy, half), tx.init(half),
                         jnp.asarray(families.IDS))
  assert np.isfinite(metrics['loss'])
  q = lambda p: np.asarray(p['layers']['attn']['q']['kernel'])
  assert q(new).dtype == np.float16 and (q(new) != q(half)).any()


@pytest.mark.slow
def test_gradients_and_generation():
  model, half, full = half_model('llama')
  gradient = helpers.quick_jit(jax.grad(helpers.lm_loss(model)))
  got, want = (gradient(p, families.IDS)['layers']['attn']['q']['kernel']
               for p in (half, full))
  assert got.dtype == jnp.float16
  assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
  tokens, finite = models.generate(
      model, half, families.IDS, MASK, max_new_tokens=3, check=True)
  assert tokens.shape == (3, 3) and finite.all()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_run_of_train(tiny_dir, reviews_file, tmp_path):
  config = runs.small_config(
      tiny_dir, reviews_file, model__dtype='float16', steps=2, eval_every=2,
      zero_shot=False)
  assert np.isfinite(train.run(config, tmp_path / 'run')['final']['loss'])
