"""LoRA, prefixes and soft prompts give the numbers that PEFT and torch give."""

import sys

import families
from families import CAUSAL, FAMILIES, IDS, MASKS
import helpers
import jax
import numpy as np
import pytest

from mezo_jax import models, peft

torch = pytest.importorskip('torch')
reference = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.torch

M = 3
WIDE = {  # a prefix within the window, as a long text would have it
    'mistral': 'no window', 'gemma2': 'no caps', 'gemma3_text': 'as released'}
TARGETS = {'gpt2': ['c_attn', 'c_proj'], 'bert': ['query', 'output.dense'],
           'roberta': ['value', 'intermediate.dense'],
           'opt': ['q_proj', 'v_proj', 'fc1']}


@pytest.fixture(scope='module', params=FAMILIES)
def loaded(request, tmp_path_factory):
  """(family, a function that makes the torch model, model, params)."""
  family = request.param
  switch = WIDE.get(family, next(iter(FAMILIES[family][2])))
  def make():
    model = families.torch_model(family, switch)
    for name in ('sliding_window',):
      if getattr(model.config, name, None):
        setattr(model.config, name, 64)
        for layer in model.base_model.layers:
          if getattr(layer.self_attn, name, None):
            setattr(layer.self_attn, name, 64)
    return model
  path = tmp_path_factory.mktemp(family)
  make().save_pretrained(path)
  return family, make, *models.load(path, progress=False)


def logits(model, params, ids=IDS, mask=MASKS['right']):
  return np.asarray(
      helpers.quick_jit(model.apply)({'params': params}, ids, mask))


def close(a, b, side='right'):
  at = MASKS[side] == 1
  np.testing.assert_allclose(a[:, -20:][at], b[:, -20:][at], atol=3e-5)


@pytest.mark.exhaustive_except(loaded=['llama', 'gpt2'])
def test_lora_of_peft_is_read_and_written(loaded, tmp_path):
  family, make, model, params = loaded
  targets = TARGETS.get(family, ['q_proj', 'v_proj', 'down_proj'])
  torch.manual_seed(1)
  theirs = reference.get_peft_model(make(), reference.LoraConfig(
      r=3, lora_alpha=7, target_modules=targets, use_rslora=family == 'llama',
      rank_pattern={targets[0]: 5}, alpha_pattern={targets[1]: 2},
      task_type='CAUSAL_LM' if family in CAUSAL else None)).eval()
  with torch.no_grad():
    for name, x in theirs.named_parameters():
      if 'lora_' in name:
        x.copy_(0.2 * torch.randn_like(x))
  want = families.torch_logits(theirs, IDS, MASKS['right'])
  theirs.save_pretrained(tmp_path / 'theirs')
  assert np.abs(want - logits(model, params)).max() > 0.1

  model, adapters, kind = peft.load(tmp_path / 'theirs', model)
  whole = peft.join(params, adapters)
  assert kind == 'lora'
  close(logits(model, whole), want)
  close(logits(model, peft.lora.merge(whole)), want)

  peft.save(tmp_path / 'ours', model, whole)
  again = reference.PeftModel.from_pretrained(make(), tmp_path / 'ours').eval()
  close(families.torch_logits(again, IDS, MASKS['right']), want)


@pytest.mark.exhaustive_except(loaded=['llama', 'gpt2'])
def test_lora_of_queries_and_values_alone(loaded, tmp_path):
  """The paper's; in GPT-2's fused matrix the keys' part stays as it was."""
  family, make, model, params = loaded
  adapters = peft.lora.init(params, jax.random.key(0), rank=2)
  adapters = jax.tree.map(
      lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape),
      adapters)
  whole = peft.join(params, adapters)
  peft.save(tmp_path / 'a', model, whole)
  theirs = reference.PeftModel.from_pretrained(make(), tmp_path / 'a').eval()
  close(families.torch_logits(theirs, IDS, MASKS['right']),
        logits(model, whole))


@pytest.mark.exhaustive_except(loaded=['llama', 'gpt2'])
@pytest.mark.parametrize('kind', ['prefix', 'zero prefix', 'prompt'])
def test_prefix_and_prompt_of_peft(loaded, tmp_path, kind):
  family, make, model, params = loaded
  ids, mask, key = IDS, MASKS['right'], jax.random.key(0)
  if kind == 'prompt':
    adapters = peft.prefix.init_prompt(model, params, key, num_tokens=M)
    ids, mask = peft.prefix.prepend(
        peft.prefix.soft_ids(320, adapters), ids, mask)
  else:
    adapters = peft.prefix.init(model, params, key, num_tokens=M)
    if kind == 'prefix':
      model = model.clone(prefix_positions='after')
  whole = peft.join(params, adapters)
  peft.save(tmp_path / 'a', model, whole)
  if not model.config.causal or (
      kind == 'zero prefix' and model.config.rope is None):
    with pytest.raises(ValueError, match='MEZO_JAX'):  # no equal in PEFT
      reference.PeftModel.from_pretrained(make(), tmp_path / 'a')
    again, adapters, _ = peft.load(tmp_path / 'a', model)
    close(logits(again, peft.join(params, adapters), ids, mask),
          logits(model, whole, ids, mask))
    return
  theirs = reference.PeftModel.from_pretrained(make(), tmp_path / 'a').eval()
  tokens = np.where(MASKS['right'] == 1, IDS, theirs.config.pad_token_id or 0)
  with torch.no_grad():
    want = theirs(torch.tensor(tokens),
                  attention_mask=torch.tensor(MASKS['right'])).logits.numpy()
  got = logits(model, whole, ids, mask)
  assert np.abs(got[:, -20:] - logits(model, params)).max() > 0.1
  close(got, want)
  again, adapters, _ = peft.load(tmp_path / 'a', model)
  close(logits(again, peft.join(params, adapters), ids, mask), want)


@pytest.mark.exhaustive_except(loaded=['llama', 'gpt2'])
@pytest.mark.parametrize('side', ['left', 'right'])
def test_a_prefix_from_position_zero(loaded, side):
  """The paper's: keys and values before those of every layer of torch's."""
  family, make, model, params = loaded
  adapters = peft.prefix.init(
      model, params, jax.random.key(0), num_tokens=M, init='normal')
  k, v = (torch.tensor(np.asarray(adapters['layers']['attn'][f'prefix_{x}'])
                       ).permute(0, 2, 1, 3) for x in 'kv')

  def attend(module, query, key, value, mask, **kwargs):
    before = lambda x: x[module.layer_idx].expand(len(query), -1, -1, -1)
    key = torch.cat([before(k), key], 2)
    value = torch.cat([before(v), value], 2)
    if mask is not None:
      mask = torch.nn.functional.pad(mask, (M, 0))
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, mask, **kwargs)

  transformers.AttentionInterface.register('prefixed', attend)
  transformers.AttentionMaskInterface.register(
      'prefixed', transformers.masking_utils.eager_mask)
  theirs = make()
  theirs.set_attn_implementation('prefixed')
  at = np.maximum(np.cumsum(MASKS[side], 1) - 1, 0)
  want = families.torch_logits(
      theirs, IDS, MASKS[side], **{} if family in ('opt', 'roberta') else {
          'position_ids': torch.tensor(at)})
  got = logits(model, peft.join(params, adapters), mask=MASKS[side])
  assert np.abs(got - logits(model, params, mask=MASKS[side])).max() > 0.1
  close(got, want, side)
