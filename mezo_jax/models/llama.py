"""Llama (1, 2, 3, SmolLM2, TinyLlama, Yi): config reader and one table."""

from mezo_jax.models.table import Row
from mezo_jax.models.transformer import Config, RopeScaling


def config_from_hf(hf: dict) -> Config:
  """Reads a ``config.json`` of Hugging Face, old and new spellings.

  Raises:
    ValueError: for a choice that this family's code does not cover.
  """
  if hf.get('hidden_act', 'silu') != 'silu':
    raise ValueError(
        f"llama with hidden_act={hf['hidden_act']!r} is not supported; "
        "only 'silu' is.")
  heads = hf['num_attention_heads']
  rope = hf.get('rope_parameters') or {}
  scaling = rope or hf.get('rope_scaling') or {}
  return Config(
      family='llama',
      vocab_size=hf['vocab_size'],
      width=hf['hidden_size'],
      ff_width=hf['intermediate_size'],
      num_layers=hf['num_hidden_layers'],
      num_heads=heads,
      num_kv_heads=hf.get('num_key_value_heads') or heads,
      head_width=hf.get('head_dim') or hf['hidden_size'] // heads,
      max_length=hf.get('max_position_embeddings', 2048),
      norm_eps=hf.get('rms_norm_eps', 1e-6),
      rope_theta=rope.get('rope_theta') or hf.get('rope_theta') or 10000.0,
      rope_scaling=_rope_scaling(scaling),
      attention_bias=hf.get('attention_bias', False),
      mlp_bias=hf.get('mlp_bias', False),
      tied_head=hf.get('tie_word_embeddings', False))


def _rope_scaling(scaling: dict) -> RopeScaling | None:
  kind = scaling.get('rope_type', scaling.get('type', 'default'))
  if kind == 'default':
    return None
  if kind == 'linear':
    return RopeScaling(kind, scaling['factor'])
  if kind == 'llama3':
    return RopeScaling(
        kind, scaling['factor'], scaling['low_freq_factor'],
        scaling['high_freq_factor'],
        scaling['original_max_position_embeddings'])
  raise ValueError(
      f"rope scaling {kind!r} is not supported; 'linear' and 'llama3' are.")


def table(c: Config) -> list[Row]:
  """Every parameter: our path and shape, the checkpoint's name and layout."""
  d, f, v = c.width, c.ff_width, c.vocab_size
  n, k = c.num_heads * c.head_width, c.num_kv_heads * c.head_width
  layer = 'model.layers.{l}.'
  attn, mlp = layer + 'self_attn.', layer + 'mlp.'
  rows = [
      Row('embed/embedding', (v, d), 'model.embed_tokens.weight', 'v d -> v d'),
      Row('layers/attn_norm/scale', (d,), layer + 'input_layernorm.weight',
          'd -> d'),
      Row('layers/attn/q/kernel', (d, n), attn + 'q_proj.weight',
          'n d -> d n'),
      Row('layers/attn/k/kernel', (d, k), attn + 'k_proj.weight',
          'n d -> d n'),
      Row('layers/attn/v/kernel', (d, k), attn + 'v_proj.weight',
          'n d -> d n'),
      Row('layers/attn/o/kernel', (n, d), attn + 'o_proj.weight',
          'd n -> n d'),
      Row('layers/mlp_norm/scale', (d,),
          layer + 'post_attention_layernorm.weight', 'd -> d'),
      Row('layers/mlp/gate/kernel', (d, f), mlp + 'gate_proj.weight',
          'f d -> d f'),
      Row('layers/mlp/up/kernel', (d, f), mlp + 'up_proj.weight', 'f d -> d f'),
      Row('layers/mlp/down/kernel', (f, d), mlp + 'down_proj.weight',
          'd f -> f d'),
      Row('norm/scale', (d,), 'model.norm.weight', 'd -> d'),
  ]
  if not c.tied_head:
    rows.append(
        Row('lm_head/embedding', (v, d), 'lm_head.weight', 'v d -> v d'))
  if c.attention_bias:
    rows += [
        Row('layers/attn/q/bias', (n,), attn + 'q_proj.bias', 'n -> n'),
        Row('layers/attn/k/bias', (k,), attn + 'k_proj.bias', 'n -> n'),
        Row('layers/attn/v/bias', (k,), attn + 'v_proj.bias', 'n -> n'),
        Row('layers/attn/o/bias', (d,), attn + 'o_proj.bias', 'd -> d')]
  if c.mlp_bias:
    rows += [
        Row('layers/mlp/gate/bias', (f,), mlp + 'gate_proj.bias', 'f -> f'),
        Row('layers/mlp/up/bias', (f,), mlp + 'up_proj.bias', 'f -> f'),
        Row('layers/mlp/down/bias', (d,), mlp + 'down_proj.bias', 'd -> d')]
  return rows
