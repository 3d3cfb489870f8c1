"""Each field of PEFT's adapter_config.json is read as PEFT reads it, or refused
by name; a field that PEFT adds fails here until that is decided."""

import dataclasses
import json
import shutil

import families
from families import IDS, MASKS
import helpers
import numpy as np
import pytest

from mezo_jax import models, peft

torch = pytest.importorskip('torch')
reference = pytest.importorskip('peft')

pytestmark = pytest.mark.torch

NOT_SAVED = {'runtime_config'}
# Values of each field that differ from those of the adapter.
LORA = {
    'r': [5], 'lora_alpha': [3], 'lora_dropout': [0.5],
    'use_rslora': [True], 'fan_in_fan_out': [True],
    'target_modules': [
        ['q_proj'], r'.*\.(q|v)_proj', r'.*\.[12]\.self_attn\.q_proj',
        'all-linear', ['layers.1.self_attn.q_proj', 'v_proj'], None],
    'exclude_modules': [['v_proj'], r'.*layers\.0\..*', ['k_proj']],
    'layers_to_transform': [[0, 2], 1, [0, 1, 2, 3]],
    'layers_pattern': ['layers', 'h'],
    'rank_pattern': [{'q_proj': 5}, {'k_proj': 5}],
    'alpha_pattern': [{'q_proj': 5}, {r'layers\.1\..*v_proj': 3, 'q_proj': 1}],
    'bias': ['all', 'lora_only'],
    'init_lora_weights': [
        False, 'gaussian', 'eva', 'orthogonal', 'mica', 'pissa',
        'pissa_niter_4', 'olora', 'OLoRA', 'corda', 'loftq', 'lora_ga', 'new'],
    'loftq_config': [{'loftq_bits': 4, 'loftq_iter': 1}],
    'eva_config': [{'rho': 1.5}],
    'corda_config': [{'corda_method': 'ipm'}],
    'lora_ga_config': [{'scale': 'stable'}],
    'modules_to_save': [['lm_head'], ['norm']],
    'trainable_token_indices': [[1, 2]],
    'megatron_config': [{'x': 1}], 'megatron_core': ['megatron.other'],
    'use_dora': [True], 'velora_config': [{'num_groups': 4}],
    'alora_invocation_tokens': [[5, 6]], 'use_qalora': [True],
    'qalora_group_size': [8], 'monteclora_config': [{}, {'sample_scaler': 1.0}],
    'layer_replication': [[[0, 4], [2, 4]]], 'lora_bias': [True],
    'target_parameters': [['self_attn.q_proj.weight']],
    'use_bdlora': [{'nblocks': 2}], 'arrow_config': [{'top_k': 1}],
    'kasa_config': [{'beta': 1e-4}], 'ensure_weight_tying': [True],
}
COMMON = {
    'base_model_name_or_path': ['elsewhere', None], 'revision': ['main'],
    'inference_mode': [False], 'auto_mapping': [{'base_model_class': 'X'}],
    'peft_version': ['0.0.1'], 'peft_type': ['IA3', None],
    'task_type': [None, 'SEQ_2_SEQ_LM', 'FEATURE_EXTRACTION'],
}
VIRTUAL = {
    'num_virtual_tokens': [2, 6], 'token_dim': [8], 'num_layers': [2, 8],
    'num_attention_heads': [1], 'num_transformer_submodules': [2],
    'modules_to_save': [['lm_head']],
}
PREFIX = VIRTUAL | {
    'encoder_hidden_size': [8], 'prefix_projection': [True],
    'init_weights': ['zero']}
PROMPT = VIRTUAL | {
    'prompt_tuning_init': ['SAMPLE_VOCAB'], 'prompt_tuning_init_text': ['a b'],
    'tokenizer_name_or_path': ['elsewhere'], 'tokenizer_kwargs': [{'a': 1}]}
WITH = {  # what PEFT wants next to a field
    'layers_pattern': {'layers_to_transform': [0, 2]},
    'tokenizer_kwargs': {
        'prompt_tuning_init': 'TEXT', 'prompt_tuning_init_text': 'a',
        'tokenizer_name_or_path': 'elsewhere'}}
CASES = {
    'lora': (reference.LoraConfig, LORA, dict(
        r=4, lora_alpha=7, target_modules=['q_proj', 'v_proj'])),
    'prefix': (reference.PrefixTuningConfig, PREFIX, dict(
        num_virtual_tokens=3)),
    'prompt': (reference.PromptTuningConfig, PROMPT, dict(
        num_virtual_tokens=3))}


def make():
  return families.torch_model('llama', 'untied head')


@pytest.fixture(scope='module', params=CASES)
def adapter(request, tmp_path_factory):
  """(kind, directory of PEFT's, our model, its parameters)."""
  path = tmp_path_factory.mktemp(request.param)
  make().save_pretrained(path / 'base')
  cls, _, settings = CASES[request.param]
  torch.manual_seed(1)
  theirs = reference.get_peft_model(
      make(), cls(task_type='CAUSAL_LM', **settings))
  with torch.no_grad():
    for x in theirs.parameters():
      if x.requires_grad:
        x.copy_(0.2 * torch.randn_like(x))
  theirs.save_pretrained(path / 'adapter')
  return request.param, path / 'adapter', *models.load(
      path / 'base', progress=False)


def of_peft(directory):
  """Logits by PEFT; None where it does not load or run the adapter."""
  try:
    model = reference.PeftModel.from_pretrained(make(), directory).eval()
    with torch.no_grad():
      return model(torch.tensor(IDS)).logits.numpy()[:, -20:]
  except Exception:
    return None


def ours(directory, model, params):
  model, leaves, kind = peft.load(directory, model)
  ids, mask = IDS, MASKS['right'] * 0 + 1
  if kind == 'prompt':
    ids, mask = peft.prefix.prepend(
        peft.prefix.soft_ids(320, leaves), ids, mask)
  return np.asarray(helpers.quick_jit(model.apply)(
      {'params': peft.join(params, leaves)}, ids, mask))[:, -20:]


def test_every_field_of_peft_is_decided(adapter):
  kind = adapter[0]
  cls, changes, _ = CASES[kind]
  assert {f.name for f in dataclasses.fields(cls)} - NOT_SAVED == {
      *changes, *COMMON}


@pytest.mark.exhaustive_except(adapter=['prompt'])
@pytest.mark.filterwarnings('ignore')
def test_a_field_gives_the_same_logits_or_is_refused(adapter, tmp_path):
  kind, directory, model, params = adapter
  about = json.loads((directory / 'adapter_config.json').read_text())
  np.testing.assert_allclose(
      ours(directory, model, params), of_peft(directory), atol=3e-5)
  accepted = set()
  for field, values in (CASES[kind][1] | COMMON).items():
    for i, value in enumerate(values):
      changed = about | {field: value}
      changed |= WITH.get(field, {})
      at = tmp_path / f'{field}{i}'
      shutil.copytree(directory, at)
      (at / 'adapter_config.json').write_text(json.dumps(changed))
      try:
        got = ours(at, model, params)
      except ValueError as e:
        assert field in str(e) or 'layers_to_transform' in str(e), str(e)
        continue
      accepted.add(field)
      want = of_peft(at)
      assert want is not None, f'PEFT does not load {field} {value!r}'
      np.testing.assert_allclose(got, want, atol=3e-5, err_msg=field)
  assert {'inference_mode', 'base_model_name_or_path'} <= accepted
  if kind == 'lora':
    assert {'lora_alpha', 'use_rslora', 'alpha_pattern', 'target_modules',
            'exclude_modules', 'init_lora_weights', 'lora_dropout',
            'layers_to_transform'} <= accepted


def test_one_matrix_of_a_pair_is_refused(adapter):
  from safetensors.numpy import load_file, save_file
  kind, directory, model, _ = adapter
  if kind != 'lora':
    pytest.skip('of matrices')
  file = directory / 'adapter_model.safetensors'
  whole = load_file(file)
  try:
    save_file({k: v for k, v in whole.items() if k != [*whole][0]}, file)
    with pytest.raises(ValueError, match='layers.0.self_attn.q_proj'):
      peft.load(directory, model)
  finally:
    save_file(whole, file)
