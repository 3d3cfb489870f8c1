"""Every family against torch, on random models that turn each switch."""

import copy
import dataclasses
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip('torch')

import families  # noqa: E402
import transformers  # noqa: E402

import mezo_jax  # noqa: E402
from mezo_jax import models  # noqa: E402
from mezo_jax.models.formats import huggingface  # noqa: E402

pytestmark = pytest.mark.torch


def relative(got, want):
  return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.fixture(scope='session')
def saved(tmp_path_factory):
  """``saved(family, switch) -> (torch model, its directory)``, each once."""
  made = {}
  def get(family, switch):
    if (family, switch) not in made:
      model = families.torch_model(family, switch)
      directory = tmp_path_factory.mktemp('m') / f'{family}'
      model.save_pretrained(directory)
      made[family, switch] = model, directory
    return made[family, switch]
  return get


def first_switch(family):
  return next(iter(families.FAMILIES[family][2]))


@pytest.mark.parametrize('family,switch', families.CASES)
def test_logits(family, switch, saved):
  reference, directory = saved(family, switch)
  model, params = models.load(directory, progress=False)
  apply = helpers.quick_jit(model.apply)
  for mask in families.MASKS.values():
    want = families.torch_logits(reference, families.IDS, mask)
    got = apply({'params': params}, families.IDS, mask)
    assert got.dtype == jnp.float32
    assert relative(np.asarray(got)[mask == 1], want[mask == 1]) < 1e-5


@pytest.mark.exhaustive_except(family=['llama', 'gpt2'])
@pytest.mark.parametrize('family', families.FAMILIES)
def test_every_choice_matters(family, saved):
  """Parity proves nothing of a choice that leaves these logits as they are."""
  plain = {f.name: f.default for f in dataclasses.fields(models.Config)}
  tried, run = set(), lambda config, params: np.asarray(helpers.quick_jit(
      models.Transformer(config).apply)({'params': params}, families.IDS[:1]))
  for switch in families.FAMILIES[family][2]:
    model, params = models.load(saved(family, switch)[1], progress=False)
    want = run(model.config, params)
    for name in ('activation', 'causal', 'rope', 'local_rope', 'window',
                 'local_layers', 'query_scale', 'attention_softcap',
                 'logit_softcap', 'embed_scale', 'residual_scale',
                 'logit_scale', 'normalize_experts'):
      value = getattr(model.config, name)
      if value in (plain[name], None) or (name, value) in tried:
        continue
      tried.add((name, value))
      other = dataclasses.replace(model.config, **{name: plain[name]})
      got = run(other, params)
      assert relative(got, want) > 1e-4, (switch, name)


@pytest.mark.exhaustive_except(family=['llama', 'gpt2'])
@pytest.mark.parametrize('family', families.FAMILIES)
def test_bfloat16_is_float32_within_its_rounding(family, saved):
  reference, directory = saved(family, first_switch(family))
  model, params = models.load(directory, dtype='bfloat16', progress=False)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('bfloat16')}
  mask = families.MASKS['left']
  logits = lambda m: families.torch_logits(m, families.IDS, mask)[mask == 1]
  want = logits(reference)
  half = logits(copy.deepcopy(reference).to(torch.bfloat16))
  got = helpers.quick_jit(model.apply)({'params': params}, families.IDS, mask)
  assert got.dtype == jnp.float32
  # As far from float32 as torch's own bfloat16 is, give or take. It is the
  # median over tokens, since rounding sends a few of them to other experts.
  off = lambda x: np.median(np.sqrt(np.mean((x - want) ** 2, -1)))
  assert 0 < off(np.asarray(got)[mask == 1]) < 1.3 * off(half)


def test_the_text_part_of_a_gemma_with_vision(saved, tmp_path):
  """Both layouts of its file: the old names and those of transformers 5."""
  _, directory = saved('gemma3_text', 'as released')
  want = models.load(directory, progress=False)[1]
  hf = json.loads((directory / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(dict(
      model_type='gemma3', text_config=hf, eos_token_id=[1, 106])))
  tensors = load_file(directory / 'model.safetensors')
  for old, new in (('model.', 'language_model.model.'),
                   ('model.', 'model.language_model.')):
    save_file({k.replace(old, new, 1): v for k, v in tensors.items()} | {
        'vision_tower.x.weight': np.ones(3, np.float32),
        'model.multi_modal_projector.w': np.ones(3, np.float32)},
              tmp_path / 'model.safetensors')
    model, params = models.load(tmp_path, progress=False)
    helpers.assert_bitwise(params, want)
  assert model.config.family == 'gemma3_text'


@pytest.mark.exhaustive_except(family=['llama', 'gpt2'])
@pytest.mark.parametrize('family', families.FAMILIES)
def test_texts_packed_into_a_row(family, saved):
  """Two texts in one row: each has the logits that it has alone."""
  _, directory = saved(family, first_switch(family))
  model, params = models.load(directory, progress=False)
  ids = families.IDS[:1]
  texts = np.where(np.arange(20) < 12, 1, 2)[None]
  apply = helpers.quick_jit(model.apply)
  got = apply({'params': params}, ids, texts)
  for at in (slice(0, 12), slice(12, 20)):
    alone = apply({'params': params}, ids[:, at])
    assert relative(got[:, at], np.asarray(alone)) < 1e-5


@pytest.mark.exhaustive_except(family=['llama', 'gpt2'])
@pytest.mark.parametrize('family', families.FAMILIES)
def test_perturbed_is_built_weights(family, saved):
  _, directory = saved(family, first_switch(family))
  model, params = models.load(directory, progress=False)
  mask = families.MASKS['left']
  def loss_fn(params):
    log_p = model.apply(
        {'params': params}, families.IDS, mask, targets=families.IDS)
    return jnp.sum(log_p * mask) / mask.sum()
  step = mezo_jax.Displacement(jax.vmap(jax.random.key)(
      jnp.array([3, 4])), jnp.array([0.02, -0.01]))
  lazy = helpers.quick_jit(
      lambda p: mezo_jax.perturbed(
          loss_fn, mezo_jax.Rademacher())(p, step))(params)
  plain = helpers.quick_jit(loss_fn)
  built = helpers.quick_jit(lambda p: mezo_jax.displace(
      p, step, mezo_jax.Rademacher()))(params)
  np.testing.assert_allclose(lazy, plain(built), rtol=1e-5)
  assert abs(lazy - plain(params)) > 1e-3


@pytest.mark.exhaustive_except(family=['llama', 'gpt2'])
@pytest.mark.parametrize('family', families.FAMILIES)
def test_noise_of_stacked_and_of_single_layers(family):
  """z of layers/x [L, ...] is z of layers_0/x, layers_1/x, ..., bitwise."""
  make, settings, switches = families.FAMILIES[family]
  layers = 'n_layer' if family == 'gpt2' else 'num_hidden_layers'
  config = huggingface.read_config(make(**(
      settings | switches[first_switch(family)] | {
          layers: 2, 'layer_types': None})).to_dict())
  shapes = models.param_shapes(config)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
  layer = lambda tree, i: jax.tree.map(lambda x: x[i], tree['layers'])
  apart = {k: v for k, v in zeros.items() if k != 'layers'} | {
      f'layers_{i}': layer(zeros, i) for i in range(config.num_layers)}
  step = mezo_jax.Displacement(jax.random.key(0), 1.0)
  one = helpers.quick_jit(lambda p: mezo_jax.displace(
      p, step, mezo_jax.Rademacher()))
  stacked, single = one(zeros), one(apart)
  for i in range(config.num_layers):
    helpers.assert_bitwise(layer(stacked, i), single[f'layers_{i}'])
  helpers.assert_bitwise(stacked['embed'], single['embed'])


# --- files ------------------------------------------------------------------


@pytest.mark.exhaustive_except(family=['llama', 'gpt2', 'bert'])
@pytest.mark.parametrize('family,switch', families.CASES)
def test_export_and_import_are_the_identity(family, switch, saved, tmp_path):
  """Bitwise, for us and for transformers, which misses nothing."""
  reference, directory = saved(family, switch)
  model, params = models.load(directory, progress=False)
  params = jax.tree.map(lambda x: x * 1.5, params)  # as if trained
  models.save(tmp_path / 'out', model, params, progress=False)
  again, back = models.load(tmp_path / 'out', progress=False)
  assert again.config == model.config
  assert jax.tree.structure(back) == jax.tree.structure(params)
  helpers.assert_bitwise(params, back)
  auto = 'CausalLM' if family in families.CAUSAL else 'MaskedLM'
  theirs, report = getattr(
      transformers, f'AutoModelFor{auto}').from_pretrained(
          tmp_path / 'out', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys']
  assert theirs.config.architectures == [type(reference).__name__]
  want = reference.state_dict()
  for name, x in theirs.state_dict().items():
    if switch != 'untied head' or name not in (
        'lm_head.bias', 'cls.predictions.bias'):  # there it is not used
      assert torch.equal(x, want[name] * 1.5), name


@pytest.mark.exhaustive_except(family=['llama', 'gpt2'])
@pytest.mark.parametrize('family', families.FAMILIES)
def test_pytorch_model_bin(family, saved, tmp_path):
  """The older format, without torch, is the same bits."""
  reference, directory = saved(family, first_switch(family))
  state = {k: v.to(torch.float16) for k, v in reference.state_dict().items()}
  torch.save(state, tmp_path / 'pytorch_model.bin')
  (tmp_path / 'config.json').write_bytes(
      (directory / 'config.json').read_bytes())
  _, params = models.load(tmp_path, progress=False)
  want = jax.tree.map(lambda x: np.asarray(x).astype(np.float16),
                      models.load(directory, progress=False)[1])
  helpers.assert_bitwise(params, want)


# --- generation -------------------------------------------------------------


@pytest.mark.exhaustive_except(family=['llama', 'gpt2'])
@pytest.mark.parametrize('family', families.CAUSAL)
def test_greedy_decoding_is_that_of_transformers(family, saved):
  """Token for token, left-padded batch; some rows stop before the others."""
  reference, directory = saved(family, first_switch(family))
  model, params = models.load(directory, progress=False)
  mask, pad = families.MASKS['left'], reference.config.pad_token_id
  ids = np.where(mask == 1, families.IDS, pad)
  run = lambda stops: reference.generate(
      torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False,
      max_new_tokens=24, pad_token_id=pad, eos_token_id=stops).numpy()[:, 20:]
  free = run(None)
  stops = [int(free[0, 5]), int(free[1, 9])]  # tokens that do come up
  for stop_ids, want in (((), free), (stops, run(stops))):
    got = np.asarray(models.generate(
        model, params, ids, mask, max_new_tokens=24, stop_ids=stop_ids,
        pad_id=pad))
    np.testing.assert_array_equal(got[:, :want.shape[1]], want)
    assert (got[:, want.shape[1]:] == pad).all()
