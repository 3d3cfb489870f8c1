"""Describes the configs and checkpoints of Llama, Mistral and Qwen.

Llama includes Llama 1 to 3, SmolLM2, TinyLlama and Yi. Qwen includes Qwen 2,
2.5 and 3.
"""

from typing import Any

from mezo_jax.models.families import table as t
from mezo_jax.models.families.config_json import (
  Fields,
  read_local_layers,
  read_rope,
)
from mezo_jax.models.layers import Config

# transformers' classes for question answering call the body 'transformer'.
RENAMES = (
    (r'^transformer\.(?=(embed_tokens|layers|norm)\.)', 'model.'),)
IGNORED = r'rotary_emb\.(inv_freq|(cos|sin)_cached)$|^lm_head\.weight$'

_QWEN = dict(vocab=151_936, ff_width=22_016, length=32_768, kv_heads=32)
_DEFAULTS = {  # Defaults in transformers that differ between the families.
    'llama': dict(vocab=32_000, ff_width=11_008, length=2048, kv_heads=None),
    'mistral': dict(vocab=32_000, ff_width=14_336, length=131_072, kv_heads=8),
    'qwen2': _QWEN, 'qwen3': _QWEN}


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a ``config.json`` of this family, in its old and new spellings.

  Raises:
    ValueError: If the value of a field is not supported.
  """
  f = Fields(hf)
  family = f.family
  f.only(is_causal=True, use_mrope=(False, None),
         rope_interleaved=(False, None))
  width, heads = f.size('hidden_size', 4096), f.size('num_attention_heads', 32)
  layers, default = f.size('num_hidden_layers', 32), _DEFAULTS[family]
  length = f.size('max_position_embeddings', default['length'])
  kv_heads = f.maybe_size('num_key_value_heads', default['kv_heads'])
  # In the other families biases are fixed, and these fields have no effect.
  bias = family in ('llama', 'qwen3') and f.flag('attention_bias', False)
  mlp_bias = family == 'llama' and f.flag('mlp_bias', False)
  window, local = _window(f, layers, length)
  config = Config(
      family=family,
      vocab_size=f.size('vocab_size', default['vocab']),
      width=width,
      ff_width=f.size('intermediate_size', default['ff_width']),
      num_layers=layers,
      num_heads=heads,
      num_kv_heads=heads if kv_heads is None else kv_heads,
      head_width=f.maybe_size(
          'head_dim', 128 if family == 'qwen3' else None) or width // heads,
      max_length=length,
      norm_eps=f.number('rms_norm_eps', 1e-6),
      activation=f.activation('hidden_act', 'silu'),
      rope=read_rope(f, length),
      window=window,
      local_layers=local,
      qkv_bias=family == 'qwen2' or bias,
      out_bias=bias,
      mlp_bias=mlp_bias,
      qk_norm=family == 'qwen3',
      tied_head=f.flag('tie_word_embeddings', False))
  f.check_rest()
  return config


def _window(f: Fields, layers: int,
            length: int) -> tuple[int | None, tuple[bool, ...]]:
  """Returns the window, and for each layer whether the window applies to it.

  In a Mistral it applies to all layers. In a Qwen it applies only if
  ``use_sliding_window`` is true, to the layers that ``layer_types`` lists, or
  else to those from ``max_window_layers`` on. The flags are () if all layers
  are the same.
  """
  if f.family == 'llama':
    # The attention of a Llama in transformers ignores this field, but its cache
    # does not. So a window that could have an effect is refused.
    if (f.maybe_size('sliding_window') or length) < length:
      f.refuse('sliding_window', f.get('sliding_window'), 'null')
    f.only(use_sliding_window=(False, None),
           layer_types=(None, ['full_attention'] * layers))
    f.ignore('max_window_layers')
    return None, ()
  if f.family == 'mistral':
    window = f.maybe_size('sliding_window', 4096)
    kind = 'full_attention' if window is None else 'sliding_attention'
    f.only(layer_types=(None, [kind] * layers))
    return window, ()
  window = f.maybe_size('sliding_window', 4096)
  if not f.flag('use_sliding_window', False):
    window = None
  first = f.size('max_window_layers', 28, 0)
  local = read_local_layers(f, layers, tuple(
      window is not None and i >= first for i in range(layers)))
  if not any(local):
    return None, ()
  if window is None:
    f.refuse('layer_types', f.get('layer_types'), 'full_attention, where '
             'use_sliding_window is false or sliding_window is null,')
  return window, () if all(local) else local


def table(c: Config) -> list[t.Row]:
  """Returns a row for every parameter of the model."""
  layer = 'model.layers.{l}.'
  attn, mlp = layer + 'self_attn.', layer + 'mlp.'
  rows = [
      *t.embedding('embed', 'model.embed_tokens', c.vocab_size, c.width),
      *t.norm('layers/attn_norm', layer + 'input_layernorm', c.width, False),
      *t.attention(c, *(f'{attn}{x}_proj' for x in 'qkvo')),
      *t.norm('layers/mlp_norm', layer + 'post_attention_layernorm', c.width,
              False),
      *t.mlp(c, mlp + 'up_proj', mlp + 'down_proj', mlp + 'gate_proj'),
      *t.norm('norm', 'model.norm', c.width, False)]
  if c.qk_norm:
    of_all = (c.num_heads, c.num_kv_heads) if c.qk_norm_whole else (1, 1)
    rows += [row for name, heads in zip('qk', of_all) for row in t.norm(
        f'layers/attn/{name}_norm', f'{attn}{name}_norm', heads * c.head_width,
        False)]
  if not c.tied_head:
    rows += t.embedding('lm_head', 'lm_head', c.vocab_size, c.width)
  return rows
