"""Mixtures of experts: which tokens go where, and what it costs.

Logits are compared with torch's in test_families.py.
"""

import dataclasses

import helpers
import jax
from jax import test_util
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mezo_jax
from mezo_jax import models, peft
from mezo_jax.core.errors import InputError
from mezo_jax.models import experts, known
from mezo_jax.models.formats import classifier

HF = dict(model_type='olmoe', vocab_size=64, hidden_size=64,
          intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
          num_key_value_heads=4, max_position_embeddings=64, num_experts=8,
          num_experts_per_tok=2)
CONFIG = models.read_config(HF)
IDS = np.random.RandomState(0).randint(64, size=(3, 20)).astype(np.int32)
RANDOM = np.random.RandomState(1)


def kernels(config):
  """Returns random matrices of the experts of a layer."""
  e, d, f = config.num_experts, config.width, config.ff_width
  make = lambda *shape: jnp.array(RANDOM.randn(*shape) / 8, jnp.float32)
  return {'gate': make(e, d, f), 'up': make(e, d, f), 'down': make(e, f, d)}


def one_by_one(x, chosen, ws):
  """Returns the output of each chosen expert for each token, in NumPy."""
  x, ws = np.asarray(x, np.float64), jax.tree.map(np.asarray, ws)
  out = np.zeros((*chosen.shape, x.shape[1]))
  for i, token in enumerate(x):
    for j, e in enumerate(np.asarray(chosen[i])):
      gate = token @ ws['gate'][e]
      h = gate / (1 + np.exp(-gate)) * (token @ ws['up'][e])
      out[i, j] = h @ ws['down'][e]
  return out


CHOICES = {
    'random': lambda n, k: np.argsort(RANDOM.rand(n, 8), 1)[:, :k],
    'all tokens to the last expert': lambda n, k: np.full((n, k), 7) - (
        np.arange(k)),
    'all tokens to the first expert': lambda n, k: np.tile(np.arange(k), (n, 1))
}


@pytest.mark.parametrize('choice', CHOICES)
@pytest.mark.parametrize('tokens,k', [(1, 1), (7, 2), (100, 3), (600, 2)])
def test_each_token_gets_the_outputs_of_its_experts(choice, tokens, k):
  """No token is dropped, however many choose an expert."""
  config = dataclasses.replace(CONFIG, experts_per_token=k)
  x = jnp.array(RANDOM.randn(tokens, config.width), jnp.float32)
  chosen, ws = CHOICES[choice](tokens, k), kernels(config)
  got = jax.jit(lambda *args: experts.mixed(config, *args))(
      x, jnp.array(chosen, jnp.int32), ws)
  np.testing.assert_allclose(
      got, one_by_one(x, chosen, ws), rtol=1e-4, atol=1e-4)


def test_derivatives():
  """In both modes, against differences."""
  x = jnp.array(RANDOM.randn(30, CONFIG.width), jnp.float32)
  chosen = jnp.array(CHOICES['random'](30, 2), jnp.int32)
  ws = kernels(CONFIG)
  f = lambda x, ws: jnp.sum(
      jnp.sin(experts.mixed(CONFIG, jnp.asarray(x), chosen, ws)))
  test_util.check_grads(f, (x, ws), order=1, modes=('fwd', 'rev'), rtol=1e-2,
                        atol=1e-2, eps=1e-3)


def test_weights_of_experts():
  logits = jnp.array(RANDOM.randn(50, 8), jnp.float32)
  p = np.asarray(jax.nn.softmax(logits))
  for normalised in (False, True):
    config = dataclasses.replace(CONFIG, normalize_experts=normalised)
    weights, chosen = experts.route(config, logits)
    want = -np.sort(-p, 1)[:, :2]
    np.testing.assert_allclose(weights, want / want.sum(1, keepdims=True) if (
        normalised) else want, rtol=1e-6)
    assert (np.take_along_axis(p, np.asarray(chosen), 1) == want).all()


@pytest.fixture(scope='module')
def model_and_params():
  shapes = models.param_shapes(CONFIG)
  params = jax.tree.map(lambda x: jnp.array(
      RANDOM.randn(*x.shape) / 5, jnp.float32), shapes)
  return models.Transformer(CONFIG), params


def test_routing_is_that_of_the_perturbed_weights(model_and_params):
  """Perturbed evaluation is evaluation at the perturbed weights, where other
  experts are chosen; also with factors."""
  model, params = model_and_params
  run = lambda params: models.apply(model, params, IDS)
  step = mezo_jax.Displacement(jax.random.key(0), 0.3)
  for directions in (mezo_jax.Normal(), mezo_jax.LowRank(rank=4)):
    built = mezo_jax.displace(params, step, directions)
    lazy = jax.jit(mezo_jax.perturbed(run, directions))(params, step)
    np.testing.assert_allclose(lazy, run(built), rtol=2e-4, atol=2e-4)
  assert np.abs(run(built) - run(params)).max() > 0.1


def test_a_cache_changes_nothing(model_and_params):
  model, params = model_and_params
  whole = models.apply(model, params, IDS)
  cache = models.make_cache(CONFIG, 3, 20, jnp.float32)
  first, cache = models.apply(model, params, IDS[:, :12], cache=cache)
  parts = [first]
  for i in range(12, 20):
    one, cache = models.apply(model, params, IDS[:, i:i + 1], cache=cache)
    parts.append(one)
  np.testing.assert_allclose(
      jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_with_64_bits(model_and_params):
  """Under jax_enable_x64 indices have several dtypes."""
  model, params = model_and_params
  want = models.apply(model, params, IDS)
  with jax.enable_x64(True):
    got = models.apply(model, params, IDS)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('prefix', ['model.', ''])
@pytest.mark.parametrize('head', [False, True])
def test_files_with_a_tensor_of_all_experts(
    prefix, head, model_and_params, tmp_path):
  """As transformers names them in memory, with or without the prefix."""
  model, params = model_and_params
  models.save(tmp_path / 'm', model, params, progress=False)
  tensors = load_file(tmp_path / 'm' / 'model.safetensors')
  for layer in range(2):
    at = f'model.layers.{layer}.mlp.experts.'
    take = lambda name, at=at: np.stack(
        [tensors.pop(f'{at}{e}.{name}.weight') for e in range(8)])
    tensors[f'{at}gate_up_proj'] = np.concatenate(
        [take('gate_proj'), take('up_proj')], 1)
    tensors[f'{at}down_proj'] = take('down_proj')
  save_file({name.replace('model.', prefix, 1): np.ascontiguousarray(x)
             for name, x in tensors.items() if head or name != 'lm_head.weight'
             }, tmp_path / 'm' / 'model.safetensors')
  loaded, found = models.load(tmp_path / 'm', progress=False)
  assert loaded.config.head == head
  helpers.assert_bitwise(found, params if head else {
      k: v for k, v in params.items() if k != 'lm_head'})


def test_a_classification_head_that_transformers_lacks_is_refused():
  with pytest.raises(InputError, match='olmoe'):
    classifier.check_head(CONFIG)


@pytest.mark.parametrize('mesh', [dict(fsdp=4, tensor=2), dict(data=2, fsdp=4)])
def test_on_a_mesh(mesh, model_and_params):
  model, params = model_and_params
  want = models.apply(model, params, IDS[:2].repeat(4, 0))
  made = mezo_jax.sharding.make_mesh(**mesh)
  with jax.set_mesh(made):
    spread = jax.device_put(
        params, mezo_jax.sharding.param_shardings(params, made))
    got = jax.jit(lambda p, ids: models.apply(model, p, ids))(
        spread, mezo_jax.sharding.put_batch(IDS[:2].repeat(4, 0), made))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype,most', [('int8', 0.02), ('int4', 0.3)])
def test_quantised_experts(dtype, most, model_and_params, tmp_path):
  model, params = model_and_params
  models.save(tmp_path / 'm', model, params, progress=False)
  quantised, codes = models.load(tmp_path / 'm', dtype=dtype, progress=False)
  kept = codes['layers']['experts']['up']['kernel']
  assert isinstance(kept, mezo_jax.QuantizedArray)
  assert kept.shape == params['layers']['experts']['up']['kernel'].shape
  want = models.apply(model, params, IDS)
  # Rounding sends a few tokens to other experts, so this is a median.
  off = jnp.linalg.norm(models.apply(quantised, codes, IDS) - want, axis=-1)
  assert np.median(off / jnp.linalg.norm(want, axis=-1)) < most


def test_lora_on_experts_is_refused_by_name(model_and_params):
  _, params = model_and_params
  with pytest.raises(InputError, match='layers/experts/'):
    peft.lora.init(params, jax.random.key(0), targets='.')
  added = peft.lora.init(params, jax.random.key(0), targets='attn/|router')
  assert 'router' in added['layers']['experts']


@pytest.mark.as_shipped
@pytest.mark.parametrize('directions', [
    mezo_jax.Rademacher(), mezo_jax.Normal(), mezo_jax.LowRank(rank=4)],
    ids=lambda d: type(d).__name__)
def test_memory_of_a_step(directions):
  """A model of 16 experts takes at most 1.05 times the memory of inference."""
  config = models.read_config(HF | dict(
      hidden_size=256, intermediate_size=512, num_experts=16,
      num_hidden_layers=8))
  model, shapes = models.Transformer(config), models.param_shapes(config)
  batch = jax.ShapeDtypeStruct((8, 32), jnp.int32)
  loss = lambda params, ids: -jnp.mean(
      models.apply(model, params, ids, targets=ids))
  tx = mezo_jax.mezo(1e-3, key=0, directions=directions)
  step = mezo_jax.make_step(tx, loss)
  def held(program):
    m = program.compile().memory_analysis()
    return (m.argument_size_in_bytes + m.output_size_in_bytes
            + m.temp_size_in_bytes - m.alias_size_in_bytes)
  inference = held(jax.jit(loss).lower(shapes, batch))
  programs = step.lower(shapes, jax.eval_shape(tx.init, shapes), batch)
  assert max(map(held, programs)) <= 1.05 * inference


def test_known_models():
  """Their numbers of parameters, in billions, as their authors give them."""
  sizes = {'mixtral-8x7b-v0.1': 46.7, 'qwen3-30b-a3b': 30.5,
           'olmoe-1b-7b-0924': 6.92}
  for name, billions in sizes.items():
    shapes = models.param_shapes(known.find(name))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count / 1e9 == pytest.approx(billions, rel=0.01)


def test_every_expert_has_directions_of_its_own(tmp_path):
  """Also after saving and loading."""
  model, params = models.Transformer(CONFIG), jax.tree.map(
      lambda x: jnp.zeros(x.shape), models.param_shapes(CONFIG))
  step = mezo_jax.Displacement(jax.random.key(0), 1.0)
  moved = mezo_jax.displace(params, step, mezo_jax.Normal())
  up = moved['layers']['experts']['up']['kernel']
  stds = jnp.std(up, (2, 3))
  assert stds.shape == (2, 8) and jnp.all(abs(stds - 1) < 0.1)
  flat = up.reshape(16, -1)
  alike = jnp.corrcoef(flat) - jnp.eye(16)
  assert abs(alike).max() < 0.1  # each expert has a z of its own
  models.save(tmp_path / 'out', model, moved, progress=False)
  helpers.assert_bitwise(
      moved, models.load(tmp_path / 'out', progress=False)[1])
