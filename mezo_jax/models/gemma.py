"""Gemma 1, 2 and the text part of 3: config reader and one table."""

from mezo_jax.errors import InputError
from mezo_jax.models import llama
from mezo_jax.models import table as t
from mezo_jax.models.fields import only, read_rope
from mezo_jax.models.layers import Config, Rope

RENAMES = (  # the text part of a model with vision
    (r'^language_model\.lm_head\.', 'lm_head.'),
    (r'^(model\.)?language_model\.(model\.)?', 'model.'))
IGNORED = (r'rotary_emb\.inv_freq$|^lm_head\.weight$|'
           r'vision_tower\.|multi_modal_projector\.')


def config_from_hf(hf: dict) -> Config:
  """Reads a ``config.json`` of Hugging Face, old and new spellings.

  Raises:
    ValueError: for a choice that this family's code does not cover.
  """
  first, third = hf['model_type'] == 'gemma', hf['model_type'] == 'gemma3_text'
  only(hf, hf['model_type'], use_bidirectional_attention=(None, False))
  act = hf.get('hidden_activation') or hf.get('hidden_act')
  if act not in (None, 'gelu_pytorch_tanh', 'gelu'):  # 'gelu' is an old error
    raise InputError(f'gemma with hidden_act={act!r} is not supported; only '
                     "'gelu_pytorch_tanh' is.")
  layers = hf['num_hidden_layers']
  every = hf.get('sliding_window_pattern') or (6 if third else 2)
  local = tuple(kind == 'sliding_attention' for kind in hf['layer_types']) if (
      hf.get('layer_types')) else tuple(
          (i + 1) % every != 0 for i in range(layers))
  bias = hf.get('attention_bias', False)
  return Config(
      family=hf['model_type'],
      vocab_size=hf.get('vocab_size', 262_208),
      width=hf['hidden_size'],
      ff_width=hf['intermediate_size'],
      num_layers=layers,
      num_heads=hf.get('num_attention_heads', 8),
      num_kv_heads=hf.get('num_key_value_heads', 4),
      head_width=hf.get('head_dim', 256),
      max_length=hf.get('max_position_embeddings', 131_072 if third else 8192),
      norm_eps=hf.get('rms_norm_eps', 1e-6),
      norm='rms+1',
      norm_place='pre' if first else 'both',
      activation='gelu_tanh',
      rope=read_rope(hf, 'gemma', 1e6 if third else 1e4, 'full_attention'),
      local_rope=_local_rope(hf) if third else None,
      window=None if first else hf.get('sliding_window', 4096),
      local_layers=() if first else local,
      qkv_bias=bias,
      out_bias=bias,
      qk_norm=third,
      query_scale=None if first else hf.get(
          'query_pre_attn_scalar', 256) ** -0.5,
      # Gemma 3 has normed queries and keys instead, whatever its file says.
      attention_softcap=None if first or third else hf.get(
          'attn_logit_softcapping', 50.0),
      logit_softcap=None if first else hf.get(
          'final_logit_softcapping', None if third else 30.0),
      embed_scale=hf['hidden_size'] ** 0.5,
      tied_head=hf.get('tie_word_embeddings', True))


def text_of_gemma3(hf: dict) -> dict:
  """The config of the text part, where ``hf`` has a vision part too."""
  ids = {k: v for k, v in hf.items() if k.endswith('_token_id')}
  return ids | hf['text_config'] | {
      'model_type': 'gemma3_text', 'architectures': None}


def _local_rope(hf: dict) -> Rope:
  new = hf.get('rope_parameters') or {}
  if 'sliding_attention' in new:
    return read_rope(hf, 'gemma', 1e4, 'sliding_attention')
  return Rope(hf.get('rope_local_base_freq', 1e4))


def table(c: Config) -> list[t.Row]:
  """Every parameter: Llama's, and where 2 and 3 have them two norms more."""
  if c.norm_place == 'pre':
    return llama.table(c)
  layer = 'model.layers.{l}.'
  norm = lambda path, name: t.norm(
      f'layers/{path}', layer + name, c.width, False)
  return [
      *(row for row in llama.table(c) if row.path != 'layers/mlp_norm/scale'),
      *norm('attn_post_norm', 'post_attention_layernorm'),
      *norm('mlp_norm', 'pre_feedforward_layernorm'),
      *norm('mlp_post_norm', 'post_feedforward_layernorm')]
