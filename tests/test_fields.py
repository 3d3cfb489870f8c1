"""Every field of a config.json, changed: logits as torch has them, or a refusal
that names the field."""

import dataclasses
import functools
import json
import warnings

import helpers
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip('torch')

import transformers  # noqa: E402
from transformers.activations import ACT2FN  # noqa: E402
from transformers.models.auto.configuration_auto import (  # noqa: E402
  CONFIG_MAPPING,
)

from mezo_jax import models  # noqa: E402

pytestmark = pytest.mark.torch

_IDS = np.random.RandomState(0).randint(5, 40, (2, 12)).astype(np.int32)
_SIZES = dict(vocab_size=40, hidden_size=16, intermediate_size=24,
              num_hidden_layers=2, num_attention_heads=4,
              max_position_embeddings=32, pad_token_id=1)
_GROUPED = _SIZES | dict(num_key_value_heads=2, head_dim=4)
_LOCAL = ['sliding_attention', 'full_attention']
_WINDOW = dict(sliding_window=3, layer_types=_LOCAL)
# {family: a tiny config, in which as many fields as possible show}
_TINY = {
    'llama': _GROUPED,
    'mistral': _GROUPED | dict(sliding_window=3),
    'qwen2': _GROUPED | _WINDOW | dict(use_sliding_window=True),
    'qwen3': _GROUPED | _WINDOW | dict(use_sliding_window=True),
    'gemma': _GROUPED,
    'gemma2': _GROUPED | _WINDOW | dict(
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    'gemma3_text': _GROUPED | _WINDOW,
    'granite': _GROUPED | dict(
        embedding_multiplier=2.0, logits_scaling=3.0, residual_multiplier=0.7,
        attention_multiplier=0.3),
    'olmo2': {k: v for k, v in _GROUPED.items() if k != 'head_dim'},
    'mixtral': _GROUPED | dict(sliding_window=3, num_local_experts=4),
    'qwen3_moe': _GROUPED | dict(
        num_experts=6, num_experts_per_tok=2, moe_intermediate_size=20,
        use_sliding_window=True, sliding_window=3),
    'olmoe': {k: v for k, v in _GROUPED.items() if k != 'head_dim'} | dict(
        num_experts=6, num_experts_per_tok=2),
    'opt': dict(vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=32),
    'gpt2': dict(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32),
    'bert': _SIZES,
    'roberta': _SIZES,
}
_FLAT_ROPES = [
    dict(rope_type='default', rope_theta=50.0),
    dict(rope_theta=50.0),
    dict(rope_type='linear', factor=3.0, rope_theta=50.0),
    dict(type='linear', factor=3.0, rope_theta=50.0),
    dict(type='linear', rope_type='default', factor=3.0, rope_theta=50.0),
    dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0,
         high_freq_factor=4.0, original_max_position_embeddings=16,
         rope_theta=50.0),
    dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0,
         high_freq_factor=4.0, rope_theta=50.0),
    dict(rope_type='default', rope_theta=50.0, attention_factor=3.0),
    dict(rope_type='linear', factor=3.0, rope_theta=50.0, beta_fast=3.0),
    dict(rope_type='yarn', factor=4.0, rope_theta=50.0,
         original_max_position_embeddings=8),
    dict(rope_type='dynamic', factor=4.0, rope_theta=50.0),
    dict(rope_type='longrope', factor=4.0, short_factor=[1.5, 2.0],
         long_factor=[2.0, 3.0], original_max_position_embeddings=8,
         rope_theta=50.0),
    dict(rope_type='proportional', factor=2.0, rope_theta=50.0),
    dict(rope_type='default', rope_theta=50.0, partial_rotary_factor=0.5),
    dict(full_attention=dict(rope_type='linear', factor=3.0, rope_theta=50.0)),
]
# Values to try, where not one more, the other, or a half of it.
_VALUES = {
    'vocab_size': [48],
    'hidden_size': [24],
    'n_embd': [24],
    'num_attention_heads': [8],
    'n_head': [2],
    'num_key_value_heads': [1, 4, None],
    'head_dim': [8],
    'max_position_embeddings': [24],
    'n_positions': [24],
    'hidden_act': ['swish', 'gelu', 'gelu_new', 'quick_gelu'],
    'hidden_activation': ['gelu', 'gelu_fast', 'sigmoid'],
    'activation_function': sorted({*ACT2FN} - {'prelu', 'xielu'}),
    'rms_norm_eps': [0.5],
    'layer_norm_eps': [0.5],
    'layer_norm_epsilon': [0.5],
    'num_hidden_layers': [1],
    'n_layer': [1],
    'n_inner': [20],
    'word_embed_proj_dim': [8, 16],
    'rope_parameters': _FLAT_ROPES,
    'sliding_window': [2, 100],
    'layer_types': [_LOCAL[::-1], _LOCAL[:1] * 2, _LOCAL[1:] * 2,
                    ['attention'] * 2],
    'max_window_layers': [0, 1],
    'query_pre_attn_scalar': [7],
    'attn_logit_softcapping': [0.7, None],
    'final_logit_softcapping': [0.7, None],
    # Products of experts in torch need multiples of 4.
    'intermediate_size': [28],
    'moe_intermediate_size': [24],
    'num_experts': [8],
    'mlp_only_layers': [[0], None],
    'decoder_sparse_step': [2],
    'clip_qkv': [0.1],
    'pretraining_tp': [2],
    'pad_token_id': [3],
    'transformers_version': ['4.30.0'],
    'architectures': [['SomethingElse']],
    'dtype': ['bfloat16'],
    'id2label': [{'0': 'a', '1': 'b', '2': 'c'}],
    'label2id': [{'a': 0, 'b': 1}],
    'problem_type': ['regression'],
    'summary_type': ['mean'],
    'summary_activation': ['tanh'],
    'classifier_dropout': [0.5],
    'type_vocab_size': [3],
    'use_bidirectional_attention': [True],
}
# Values of which torch makes an error, and we need not.
_TORCH_REFUSES = ('layer_types', 'num_key_value_heads', 'return_dict')
# Fields that no class declares, but that torch's code or older code reads.
_MORE = {
    'attention_chunk_size': 4, 'configuration_files': ['config.4.0.0.json'],
    'head_dim': 8, 'is_causal': False, 'layer_types': _LOCAL,
    'logit_scale': 3.0, 'original_max_position_embeddings': 8,
    'partial_rotary_factor': 0.5, 'per_layer_config': {
        '0': {'intermediate_size': 20}},
    'position_embedding_type': 'relative_key', 'pruned_heads': {'0': [1]},
    'quantization_config': {'quant_method': 'gptq', 'bits': 4},
    'rope_interleaved': True, 'rope_local_base_freq': 50.0,
    'rope_scaling': dict(type='linear', factor=3.0), 'rope_theta': 50.0,
    'scale_embeddings': True, 'sliding_window': 3, 'sliding_window_pattern': 2,
    'torch_dtype': 'bfloat16',
    'hidden_activation': 'relu', 'attention_bias': True, 'mlp_bias': True,
    'no_such_field': 3}


def tiny(family: str, **changes) -> dict:
  """A config.json with all of its fields."""
  return CONFIG_MAPPING[family](**(_TINY[family] | changes)).to_dict()


def auto_class(hf: dict):
  if hf['model_type'] in ('bert', 'roberta'):
    return transformers.AutoModelForMaskedLM
  return transformers.AutoModelForCausalLM


def write(directory, hf: dict, seed: int = 0):
  """Writes a random model of a config; returns it as torch has it."""
  warnings.simplefilter('ignore')
  torch.manual_seed(seed)
  config = CONFIG_MAPPING[hf['model_type']].from_dict(json.loads(
      json.dumps(hf)))
  model = auto_class(hf).from_config(
      config, attn_implementation='eager', dtype=torch.float32).eval()
  with torch.no_grad():
    for x in model.parameters():
      x.add_(0.3 * torch.randn_like(x))
  directory.mkdir(exist_ok=True)
  save_file({name: x.numpy() for name, x in model.state_dict().items()},
            directory / 'model.safetensors')
  write_config(directory, hf)
  return model


def write_config(directory, hf: dict) -> None:
  (directory / 'config.json').write_text(json.dumps(hf))


def torch_logits(model) -> np.ndarray:
  with torch.no_grad():
    out = model(torch.tensor(_IDS).long(), return_dict=True)
  return out.logits.numpy()


def from_file(directory):
  """The model that transformers loads from a directory."""
  hf = json.loads((directory / 'config.json').read_text())
  return auto_class(hf).from_pretrained(
      directory, attn_implementation='eager', dtype=torch.float32).eval()


@functools.lru_cache(maxsize=64)
def program(config):
  return helpers.quick_jit(models.Transformer(config).apply)


def logits(directory) -> np.ndarray:
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    model, params = models.load(directory, progress=False)
  return np.asarray(program(model.config)({'params': params}, _IDS))


def relative(got, want) -> float:
  return np.abs(got - want).max() / np.abs(want).max()


def torch_logits_or_none(directory, hf: dict) -> np.ndarray | None:
  try:
    return torch_logits(write(directory, hf))
  except Exception:  # of many kinds, where torch cannot build or run it
    return None


def values_of(field: dataclasses.Field, value) -> list:
  """Other values of a field; none where a person has to choose them."""
  if field.name in _VALUES:
    return _VALUES[field.name]
  if field.name.endswith('_token_id'):
    return [3]
  if isinstance(value, bool) or field.type in ('bool', 'bool | None'):
    return [not value]
  if isinstance(value, int):
    return [value + 1]
  if isinstance(value, float):
    return [value / 2 + 0.25]
  return []


def check(directory, hf: dict, field: str) -> str | None:
  """Returns what is wrong with the logits, or with the refusal."""
  what = f'{field}={hf.get(field)}'
  want = torch_logits_or_none(directory, hf)
  try:
    if want is None:  # We need not refuse what torch cannot even compute.
      models.read_config(hf)
      return None if field in _TORCH_REFUSES else f'{what}: no logits of torch'
    off = relative(logits(directory), want)
  except ValueError as e:
    return None if field in str(e) else f'{what} is refused without a name: {e}'
  return f'{what}: logits differ by {off:.1g}' if off > 1e-4 else None


@pytest.mark.exhaustive_except(family=['gpt2'])
@pytest.mark.parametrize('family', _TINY)
def test_every_field(family, tmp_path):
  """A new field of a class in transformers fails here until it is decided."""
  base, wrong = tiny(family), []
  for field in dataclasses.fields(CONFIG_MAPPING[family]):
    others = [v for v in values_of(field, base.get(field.name))
              if v != base.get(field.name)]
    if not others:
      wrong.append(f'{field.name}: choose a value to try')
    for value in others:
      hf = base | {field.name: value}
      if field.name == 'num_hidden_layers' and 'layer_types' in hf:
        hf['layer_types'] = hf['layer_types'][:value]
      wrong.append(check(tmp_path, hf, field.name))
  for name, value in _MORE.items():
    if name not in {f.name for f in dataclasses.fields(CONFIG_MAPPING[family])}:
      wrong.append(check(tmp_path, base | {name: value}, name))
  wrong = [x for x in wrong if x]
  assert not wrong, '\n'.join(wrong)


@pytest.mark.exhaustive_except(family=['llama', 'gemma3_text', 'gpt2', 'bert'])
@pytest.mark.parametrize('family', _TINY)
def test_missing_fields_have_the_defaults_of_transformers(family):
  """Each alone, and all of them."""
  make, base = CONFIG_MAPPING[family], tiny(family)
  read = lambda hf: dataclasses.replace(models.read_config(hf), source='')
  assert read({'model_type': family}) == read(make().to_dict())
  for name in base:
    if name in ('model_type', 'num_attention_heads', 'n_head',
                'num_key_value_heads', 'num_experts_per_tok'):
      continue  # 32 heads do not fit a width of 16, nor 8 experts 6
    hf = {k: v for k, v in base.items() if k not in (name, 'layer_types')}
    assert read(hf) == read(make.from_dict(dict(hf)).to_dict()), name


_OLD = [  # in the place of rope_parameters
    dict(),
    dict(rope_theta=50.0),
    dict(rope_theta=50.0, rope_scaling=None),
    dict(rope_theta=50.0, rope_scaling=dict(type='linear', factor=3.0)),
    dict(rope_theta=50.0, rope_scaling=dict(rope_type='linear', factor=3.0)),
    dict(rope_scaling=dict(rope_type='default', rope_theta=50.0)),
    dict(rope_theta=90.0, rope_scaling=dict(
        rope_type='linear', factor=3.0, rope_theta=50.0)),
    dict(rope_theta=90.0, rope_parameters=dict(rope_type='default')),
    dict(rope_theta=90.0, rope_parameters=dict(
        rope_type='default', rope_theta=50.0)),
    dict(rope_scaling=dict(type='linear', factor=3.0), rope_parameters=dict(
        rope_type='default', rope_theta=50.0)),
    dict(rope_scaling={}, rope_parameters=dict(
        rope_type='linear', factor=3.0, rope_theta=50.0)),
    dict(original_max_position_embeddings=8, rope_scaling=dict(
        rope_type='llama3', factor=8.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=16)),
    dict(partial_rotary_factor=1.0, rope_theta=50.0),
    dict(rope_local_base_freq=70.0, rope_theta=50.0),
    dict(rope_local_base_freq=70.0, rope_scaling=dict(
        rope_type='linear', factor=3.0)),
]
_TWO_ROPES = [  # of Gemma 3
    dict(rope_parameters=dict(
        full_attention=dict(rope_type='linear', factor=3.0, rope_theta=50.0),
        sliding_attention=dict(rope_type='default', rope_theta=70.0))),
    dict(rope_parameters=dict(full_attention=dict(rope_theta=50.0)),
         rope_local_base_freq=70.0),
    dict(rope_parameters=dict(sliding_attention=dict(
        rope_type='linear', factor=3.0)), rope_theta=50.0),
    dict(rope_parameters=dict(full_attention=dict(rope_type='default')),
         rope_scaling=dict(rope_type='linear', factor=3.0, rope_theta=50.0)),
    dict(sliding_window_pattern=2, layer_types=None),
    dict(layer_types=None),
]
_SPELLINGS = {
    'gpt2': [dict(n_embd=None, hidden_size=24), dict(n_head=2,
             num_attention_heads=8), dict(n_layer=None, num_hidden_layers=1),
             dict(n_positions=None, max_position_embeddings=24)],
    'gemma': [dict(hidden_act='gelu', hidden_activation='gelu_pytorch_tanh'),
              dict(hidden_act='gelu', hidden_activation=None)],
    'gemma2': [dict(hidden_act='relu'), dict(layer_types=None)],
    'opt': [dict(word_embed_proj_dim=None)],
    'qwen2': [dict(layer_types=None, max_window_layers=1), dict(
        layer_types=None, use_sliding_window=False)],
    'qwen3': [dict(layer_types=None, max_window_layers=0),
              dict(layer_types=_LOCAL, use_sliding_window=False)],
}


def spellings(family: str) -> list[dict]:
  cases = list(_SPELLINGS.get(family, []))
  if 'rope_parameters' in tiny(family):
    cases += [dict(rope_parameters=None) | old for old in _OLD]
  return cases + (_TWO_ROPES if family == 'gemma3_text' else [])


@pytest.mark.exhaustive_except(family=['llama', 'gpt2'])
@pytest.mark.parametrize('family', [f for f in _TINY if spellings(f)])
def test_other_spellings(family, tmp_path):
  """None is a field that is left out."""
  wrong, none = [], []
  for change in spellings(family):
    hf = {k: v for k, v in (tiny(family) | change).items()
          if v is not None or k not in change}
    want = torch_logits_or_none(tmp_path, hf)
    if want is None:
      none.append(change)
      continue
    try:
      off = relative(logits(tmp_path), want)
    except ValueError as e:
      off = not any(name in str(e) for name in change)
    if off > 1e-4:
      wrong.append((change, off))
  assert not wrong, wrong
  assert len(none) <= 2, none


def test_what_nobody_knows_is_reported():
  """And what a newer class of transformers declares is refused."""
  hf = tiny('llama') | {'bos_token_id': 1, '_name_or_path': 'x',
                        'unsloth_version': '1', 'torch_dtype': 'float16'}
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    models.read_config(hf)
    with pytest.raises(UserWarning, match='no_such_field, other'):
      models.read_config(hf | {'no_such_field': 2, 'other': 0})
    with pytest.raises(UserWarning, match='rope_scaling.beta_fast'):
      models.read_config(hf | {'rope_scaling': dict(
          type='linear', factor=2.0, beta_fast=32)})


def test_a_field_that_is_newer_than_the_reader(monkeypatch):
  hf = tiny('llama')
  newer = dataclasses.make_dataclass('Newer', [
      ('vocab_size', int, 1), ('residual_scale', float, 1.0)])
  monkeypatch.setitem(CONFIG_MAPPING._extra_content, 'llama', newer)
  models.read_config(hf | {'residual_scale': 1.0})
  with pytest.raises(ValueError, match='residual_scale=0.5'):
    models.read_config(hf | {'residual_scale': 0.5})


# --- the flag that ties the head --------------------------------------------

_HEAD = {'bert': 'cls.predictions.decoder.weight',
         'roberta': 'lm_head.decoder.weight'}


@pytest.mark.exhaustive_except(family=['llama', 'bert'])
@pytest.mark.parametrize('family', _TINY)
def test_a_flag_that_ties_another_head(family, tmp_path):
  """The file is right, as in transformers; and what is saved again says so."""
  hf = tiny(family, tie_word_embeddings=False)
  want = torch_logits(write(tmp_path / 'a', hf))
  for flag in (None, True):
    write_config(tmp_path / 'a', {k: v for k, v in (
        hf | {'tie_word_embeddings': flag}).items() if v is not None})
    assert relative(torch_logits(from_file(tmp_path / 'a')), want) < 1e-5
    assert relative(logits(tmp_path / 'a'), want) < 1e-5
    assert not models.load_config(tmp_path / 'a').tied_head
  model, params = models.load(tmp_path / 'a', progress=False)
  models.save(tmp_path / 'b', model, params, progress=False)
  assert json.loads((tmp_path / 'b' / 'config.json').read_text())[
      'tie_word_embeddings'] is False
  assert relative(torch_logits(from_file(tmp_path / 'b')), want) < 1e-5
  assert relative(logits(tmp_path / 'b'), want) < 1e-5


@pytest.mark.exhaustive_except(family=['llama', 'bert'])
@pytest.mark.parametrize('family', _TINY)
def test_a_head_that_is_the_embedding_again(family, tmp_path):
  """As .bin files have it: with the flag it is no parameter of its own; without
  flag or head the logits are not made up."""
  hf = tiny(family, tie_word_embeddings=True)
  want = torch_logits(write(tmp_path, hf))  # it has both tensors
  assert models.load_config(tmp_path).tied_head
  assert relative(logits(tmp_path), want) < 1e-5
  write_config(tmp_path, hf | {'tie_word_embeddings': False})
  assert not models.load_config(tmp_path).tied_head
  assert relative(logits(tmp_path), want) < 1e-5
  tensors = load_file(tmp_path / 'model.safetensors')
  del tensors[_HEAD.get(family, 'lm_head.weight')]
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match='head|decoder'):
    logits(tmp_path)


@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_a_tied_flag_and_another_bias(family, tmp_path):
  """The two biases of a masked head are tied as well."""
  head = _HEAD[family].removesuffix('weight')
  write(tmp_path, tiny(family))
  tensors = load_file(tmp_path / 'model.safetensors')
  tensors[head + 'bias'] = tensors[head + 'bias'] + 1
  save_file(tensors, tmp_path / 'model.safetensors')
  want = torch_logits(from_file(tmp_path))
  assert relative(logits(tmp_path), want) < 1e-5


@pytest.mark.parametrize('flags', [(True, False), (False, True), (None, False)])
def test_a_gemma_with_vision(flags, tmp_path):
  """Its head is tied as the whole config says, not as that of its text does."""
  whole, part = flags
  text = tiny('gemma3_text', tie_word_embeddings=part) | {
      'rope_parameters': dict(
          full_attention=dict(rope_type='linear', factor=3.0, rope_theta=50.0),
          sliding_attention=dict(rope_type='default', rope_theta=70.0))}
  vision = dict(model_type='siglip_vision_model', hidden_size=16,
                intermediate_size=16, num_hidden_layers=1,
                num_attention_heads=2, image_size=8, patch_size=4)
  hf = dict(model_type='gemma3', text_config=text, vision_config=vision,
            mm_tokens_per_image=4, image_token_index=39, boi_token_index=38,
            eoi_token_index=37)
  if whole is not None:
    hf['tie_word_embeddings'] = whole
  write(tmp_path / 'a', hf)
  want = torch_logits(from_file(tmp_path / 'a'))
  assert relative(logits(tmp_path / 'a'), want) < 1e-4
  model, params = models.load(tmp_path / 'a', progress=False)
  assert model.config.tied_head == (whole is not False)
  models.save(tmp_path / 'b', model, params, progress=False)
  assert relative(torch_logits(from_file(tmp_path / 'b')), want) < 1e-4
  for name in ('quantization_config', 'per_layer_config'):
    with pytest.raises(ValueError, match=name):
      models.read_config(hf | {name: {'0': {}}})


# --- GGUF -------------------------------------------------------------------

_METADATA = {
    'attention.head_count': 4, 'attention.head_count_kv': 2,
    'attention.layer_norm_rms_epsilon': 1e-5, 'block_count': 1,
    'context_length': 32, 'embedding_length': 16, 'feed_forward_length': 24}


def gguf_config(path, family: str = 'llama', **metadata):
  """The config of a file of one tensor; two underscores are a dot."""
  import gguf
  writer = gguf.GGUFWriter(path, family)
  for name, value in (_METADATA | metadata).items():
    add = {bool: writer.add_bool, int: writer.add_uint32,
           float: writer.add_float32, str: writer.add_string}.get(type(value))
    if value is not None:
      add(f"{family}.{name.replace('__', '.')}", value)
  writer.add_tensor('token_embd.weight', np.ones((40, 16), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return models.load_config(path)


@pytest.mark.parametrize('change,rope', [
    (dict(), models.Rope(1e4)),
    (dict(rope__freq_base=5e4), models.Rope(5e4)),
    (dict(rope__scaling__factor=4.0), models.Rope(1e4, 'linear', 4.0)),
    (dict(rope__scale_linear=4.0), models.Rope(1e4, 'linear', 4.0)),
    (dict(rope__scaling__type='linear', rope__scaling__factor=0.3),
     models.Rope(1e4, 'linear', 0.3)),
    (dict(rope__scaling__type='none', rope__scaling__factor=4.0),
     models.Rope(1e4)),
    (dict(rope__scaling__attn_factor=1.0, logit_scale=1.0, expert_count=0,
          attention__causal=True, attention__sliding_window=32, vocab_size=40,
          rope__dimension_count=4, attention__value_length=4),
     models.Rope(1e4))])
def test_metadata_of_gguf_that_is_read(change, rope, tmp_path):
  assert gguf_config(tmp_path / 'm.gguf', **change).rope == rope


@pytest.mark.parametrize('name,value', [
    ('attention.causal', False), ('attention.clamp_kqv', 8.0),
    ('attention.scale', 0.5), ('attention.sliding_window', 8),
    ('attention.value_length', 8), ('attn_logit_softcapping', 50.0),
    ('embedding_scale', 4.0), ('expert_count', 8),
    ('final_logit_softcapping', 30.0), ('logit_scale', 0.5),
    ('residual_scale', 0.5), ('rope.dimension_count', 2),
    ('rope.dimension_count_swa', 2), ('rope.scaling.attn_factor', 0.5),
    ('rope.scaling.type', 'yarn'), ('rope.scaling.yarn_ext_factor', 1.0),
    ('no_such_key', 1), ('context_length', None),
    ('attention.layer_norm_rms_epsilon', None)])
@pytest.mark.parametrize('family', ['llama', 'qwen2', 'qwen3'])
def test_metadata_of_gguf_that_is_refused(family, name, value, tmp_path):
  with pytest.raises(ValueError, match=f'{family}.{name}'):
    gguf_config(tmp_path / 'm.gguf', family, **{
        name if value is None or name in _METADATA
        else name.replace('.', '__'): value})


# --- what published files have in addition ----------------------------------


@pytest.mark.parametrize('family, fields', [
    ('opt', dict(output_projection=True)),
    ('gpt2', dict(n_special=0, predict_special_tokens=True)),
    ('mistral', dict(attention_bias=False)),
    ('llama', dict(keys_to_ignore_at_inference=['past_key_values']))])
def test_fields_of_published_files_give_no_warning(family, fields):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    models.read_config(tiny(family) | fields)


@pytest.mark.parametrize('family, name, shape', [
    ('bert', 'bert.embeddings.token_type_ids', (1, 32)),
    ('opt', 'model.decoder.version', (1,)),
    ('gpt2', 'v_head.summary.weight', (1, 16)),
    ('llama', 'model.layers.0.self_attn.rotary_emb.cos_cached', (32, 4))])
def test_tensors_that_no_model_of_transformers_reads(
    family, name, shape, tmp_path):
  want = torch_logits(write(tmp_path, tiny(family)))
  file = tmp_path / 'model.safetensors'
  save_file(load_file(file) | {name: np.ones(shape, np.float32)}, file)
  assert relative(logits(tmp_path), want) < 1e-5


def test_an_adapter_next_to_the_weights_is_not_left_out(tmp_path):
  """transformers adds it to the model that it names."""
  write(tmp_path, tiny('llama'))
  (tmp_path / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
  for read in (models.load, models.load_config):
    with pytest.raises(ValueError, match='adapter_config.json'):
      read(tmp_path)


def test_an_explicit_mesh_is_refused_by_name(tmp_path):
  if jax.device_count() < 2:
    pytest.skip('one device splits nothing')
  write(tmp_path, tiny('llama'))
  for axis, size in (('fsdp', 2), ('tensor', 2), ('fsdp', 1)):
    mesh = jax.make_mesh((size,), (axis,), devices=jax.devices()[:size],
                         axis_types=(jax.sharding.AxisType.Explicit,))
    if size == 1:
      models.load(tmp_path, mesh=mesh, progress=False)
      continue
    with pytest.raises(ValueError, match=f"'{axis}'.*Explicit"):
      models.load(tmp_path, mesh=mesh, progress=False)


@pytest.mark.exhaustive
def test_64_bit_mode_generates_the_same(tmp_path):
  write(tmp_path, tiny('llama'))
  model, params = models.load(tmp_path, progress=False)
  want = models.generate(model, params, _IDS, max_new_tokens=3)
  with jax.enable_x64(True):
    got = models.generate(model, params, _IDS.astype(np.int64),
                          max_new_tokens=3)
  np.testing.assert_array_equal(got, want)
