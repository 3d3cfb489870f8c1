"""Describes the configs and checkpoints of Gemma 1, 2 and 3 (text only)."""

from typing import Any

from mezo_jax.models.families import llama
from mezo_jax.models.families import table as t
from mezo_jax.models.families.config_json import (
  Fields,
  read_local_layers,
  read_rope,
  read_ropes,
)
from mezo_jax.models.layers import Config

# Files of a model with vision have other names for the text part.
RENAMES = (
    (r'^language_model\.lm_head\.', 'lm_head.'),
    (r'^(model\.)?language_model\.(model\.)?', 'model.'))
IGNORED = (r'rotary_emb\.inv_freq$|^lm_head\.weight$|'
           r'vision_tower\.|multi_modal_projector\.')


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a ``config.json`` of this family, in its old and new spellings.

  Raises:
    ValueError: If the value of a field is not supported.
  """
  f = Fields(hf)
  first, third = f.family == 'gemma', f.family == 'gemma3_text'
  f.only(is_causal=True, use_bidirectional_attention=(None, False))
  width = f.size('hidden_size', 3072 if first else 2304)
  layers = f.size('num_hidden_layers', 28 if first else 26)
  heads = f.size('num_attention_heads', 16 if first else 8)
  length = f.size('max_position_embeddings', 131_072 if third else 8192)
  kv_heads = f.maybe_size('num_key_value_heads', 16 if first else 4)
  bias = f.flag('attention_bias', False)
  window, local = _window(f, layers)
  rope, local_rope = (read_ropes(f, length, 1e6, 1e4) if third else
                      (read_rope(f, length), None))
  config = Config(
      family=f.family,
      vocab_size=f.size('vocab_size', 262_208 if third else 256_000),
      width=width,
      ff_width=f.size('intermediate_size', 24_576 if first else 9216),
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=heads if kv_heads is None else kv_heads,
      head_width=f.size('head_dim', 256),
      max_length=length,
      norm_eps=f.number('rms_norm_eps', 1e-6),
      norm='rms+1',
      norm_place='pre' if first else 'both',
      activation=_activation(f),
      rope=rope,
      local_rope=local_rope,
      window=window,
      local_layers=local,
      qkv_bias=bias,
      out_bias=bias,
      qk_norm=third,
      query_scale=None if first else f.number(
          'query_pre_attn_scalar', 256) ** -0.5,
      attention_softcap=_attention_softcap(f),
      logit_softcap=None if first else f.maybe_number(
          'final_logit_softcapping', None if third else 30.0),
      embed_scale=width ** 0.5,
      tied_head=f.flag('tie_word_embeddings', True))
  f.check_rest()
  return config


def _activation(f: Fields) -> str:
  """Returns the name of the activation.

  Gemma 1 reads ``hidden_act``. Later ones read ``hidden_activation``, although
  their files have both fields.
  """
  if f.family != 'gemma':
    f.ignore('hidden_act')
    return f.activation('hidden_activation', 'gelu_pytorch_tanh')
  used = f.activation('hidden_act', 'gelu_pytorch_tanh')
  # Early files have 'gelu', but mean its tanh approximation.
  if used == 'gelu':
    used = 'gelu_tanh'
  # Older versions of transformers read hidden_activation instead. A file in
  # which the two fields disagree is ambiguous.
  other = f.get('hidden_activation')
  if other is not None and f.activation('hidden_activation', '') not in (
      used, 'gelu' if used == 'gelu_tanh' else used):
    f.refuse('hidden_activation', other, 'the same as hidden_act')
  return used


def _attention_softcap(f: Fields) -> float | None:
  """Returns the soft cap of the attention scores, or None for no cap."""
  if f.family == 'gemma2':
    return f.maybe_number('attn_logit_softcapping', 50.0)
  # Gemma 3 normalises queries and keys instead, and this field has no effect.
  f.ignore('attn_logit_softcapping')
  return None


def _window(f: Fields, layers: int) -> tuple[int | None, tuple[bool, ...]]:
  """Returns the window, and for each layer whether the window applies to it.

  The flags are () if no layer has a window.
  """
  if f.family == 'gemma':
    f.only(sliding_window=None,
           layer_types=(None, ['full_attention'] * layers))
    return None, ()
  # Older files have these fields, which repeat sliding_window and layer_types.
  f.ignore('sliding_window_size', '_sliding_window_pattern')
  every = 2
  if f.family == 'gemma3_text':
    every = f.size('sliding_window_pattern', 6)
  else:
    f.only(sliding_window_pattern=(2, None))
  local = read_local_layers(f, layers, tuple(
      (i + 1) % every != 0 for i in range(layers)))
  window = f.maybe_size('sliding_window', 4096)
  if window is None and any(local):
    f.refuse('sliding_window', None, 'a whole number, where layer_types has '
             "'sliding_attention',")
  return window, local


def text_of_gemma3(hf: dict[str, Any]) -> dict[str, Any]:
  """Returns the config of the text part of a Gemma 3 with vision.

  The language model's head is outside of the text part, so
  ``tie_word_embeddings`` is taken from the whole model's config.

  Args:
    hf: Contents of the ``config.json`` of the whole model.

  Raises:
    InputError: If the value of a field is not supported.
  """
  f = Fields(hf)
  text = f.get('text_config') or {}
  if not isinstance(text, dict):
    f.refuse('text_config', text, 'a dictionary')
  tied = f.flag('tie_word_embeddings', True)
  f.ignore('vision_config', 'mm_tokens_per_image')
  f.check_rest()
  ids = {k: v for k, v in hf.items() if k.endswith('_token_id')}
  return ids | text | {'model_type': 'gemma3_text', 'architectures': None,
                       'tie_word_embeddings': tied}


def table(c: Config) -> list[t.Row]:
  """Returns a row for every parameter of the model.

  Gemma 1 has the tensors of Llama. Gemma 2 and 3 have norms after attention and
  feed-forward, too: their 'post_attention_layernorm' is the one after
  attention, whereas Llama's precedes feed-forward.
  """
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
