"""Describes the configs and checkpoints of BERT and RoBERTa.

The models have the heads of masked language models.
"""

from typing import Any

from mezo_jax.models.families import table as t
from mezo_jax.models.families.config_json import Fields
from mezo_jax.models.layers import Config

RENAMES = (  # Early checkpoints use these names for LayerNorms.
    (r'\.gamma$', '.weight'),
    (r'\.beta$', '.bias'))
IGNORED = (r'embeddings\.(position|token_type)_ids$|(^|\.)pooler\.|'
           r'^cls\.seq_relationship\.|'
           # In files with a tied head these repeat other tensors.
           r'\.decoder\.(weight|bias)$')


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a ``config.json`` of this family.

  Raises:
    ValueError: If the value of a field is not supported.
  """
  f = Fields(hf)
  family = f.family
  f.only(position_embedding_type='absolute', is_decoder=False,
         add_cross_attention=False)
  f.ignore('is_causal')
  act = f.activation('hidden_act', 'gelu')
  # RoBERTa's head always uses gelu, and `Config` has one activation for both.
  if family == 'roberta' and act != 'gelu':
    f.refuse('hidden_act', f.get('hidden_act'), "'gelu'")
  width, heads = f.size('hidden_size', 768), f.size('num_attention_heads', 12)
  length = f.size('max_position_embeddings', 512)
  # In RoBERTa, position i is in row i + pad_token_id + 1 of the table.
  offset = 0 if family == 'bert' else f.size('pad_token_id', 1, 0) + 1
  if length <= offset:
    f.refuse('max_position_embeddings', length, 'more than pad_token_id + 1')
  config = Config(
      family=family,
      vocab_size=f.size('vocab_size', 30_522 if family == 'bert' else 50_265),
      width=width,
      ff_width=f.size('intermediate_size', 3072),
      num_layers=f.size('num_hidden_layers', 12),
      num_heads=heads,
      num_kv_heads=heads,
      head_width=f.head_size(width, 'num_attention_heads', 12),
      max_length=length - offset,
      norm_eps=f.number('layer_norm_eps', 1e-12),
      norm='layer',
      norm_place='post',
      final_norm=False,
      activation=act,
      gated=False,
      rope=None,
      position_offset=offset,
      causal=False,
      qkv_bias=True,
      out_bias=True,
      mlp_bias=True,
      embed_norm=True,
      token_types=f.size('type_vocab_size', 2),
      masked_head=True,
      tied_head=f.flag('tie_word_embeddings', True))
  f.check_rest()
  return config


def table(c: Config) -> list[t.Row]:
  """Returns a row for every parameter of the model."""
  d, v = ('d', c.width), c.vocab_size
  top, head = c.family + '.embeddings.', 'lm_head.'
  dense, norm, decoder = 'dense', 'layer_norm', 'decoder'
  if c.family == 'bert':
    head, dense, norm = 'cls.predictions.', 'transform.dense', (
        'transform.LayerNorm')
  layer = c.family + '.encoder.layer.{l}.'
  attn = layer + 'attention.'
  words = top + 'word_embeddings'
  rows = [
      *t.embedding('embed', words, v, c.width),
      *t.embedding('positions', top + 'position_embeddings',
                   c.max_length + c.position_offset, c.width, 's'),
      *t.embedding('types', top + 'token_type_embeddings', c.token_types,
                   c.width, 't'),
      *t.norm('embed_norm', top + 'LayerNorm', c.width, True),
      *t.attention(c, *(attn + x for x in (
          'self.query', 'self.key', 'self.value', 'output.dense'))),
      *t.norm('layers/attn_norm', attn + 'output.LayerNorm', c.width, True),
      *t.mlp(c, layer + 'intermediate.dense', layer + 'output.dense'),
      *t.norm('layers/mlp_norm', layer + 'output.LayerNorm', c.width, True),
      *t.linear('head/dense', head + dense, d, ('e', c.width), True),
      *t.norm('head/norm', head + norm, c.width, True)]
  bias, other = head + 'bias', head + decoder + '.bias'
  if c.tied_head:
    return [*rows, t.Row('head/bias', (v,), bias, 'v -> v', otherwise=other)]
  # Older versions of transformers always tied the two biases. A file may
  # therefore have the bias under either name, and `save` writes both names.
  return [
      *rows,
      *t.embedding('lm_head', head + decoder, v, c.width),
      t.Row('head/bias', (v,), other, 'v -> v', otherwise=bias, copy=bias)]
