"""BERT and RoBERTa with their masked-LM heads: config reader and one table."""

from mezo_jax.models import table as t
from mezo_jax.models.fields import activation, only
from mezo_jax.models.layers import Config

RENAMES = (
    (r'\.gamma$', '.weight'),  # as early checkpoints spell it
    (r'\.beta$', '.bias'))
IGNORED = (r'position_ids$|(^|\.)pooler\.|^cls\.seq_relationship\.|'
           r'\.decoder\.(weight|bias)$')  # of a tied head: other names' copies


def config_from_hf(hf: dict) -> Config:
  """Reads a ``config.json`` of Hugging Face.

  Raises:
    ValueError: for a choice that this family's code does not cover.
  """
  family, heads = hf['model_type'], hf['num_attention_heads']
  only(hf, family, position_embedding_type='absolute', is_decoder=False)
  if family == 'roberta':
    only(hf, family, hidden_act='gelu')
  width, length = hf['hidden_size'], hf.get('max_position_embeddings', 512)
  # RoBERTa's positions start after its padding token's id.
  offset = 0 if family == 'bert' else hf.get('pad_token_id', 1) + 1
  return Config(
      family=family,
      vocab_size=hf['vocab_size'],
      width=width,
      ff_width=hf['intermediate_size'],
      num_layers=hf['num_hidden_layers'],
      num_heads=heads,
      num_kv_heads=heads,
      head_width=width // heads,
      max_length=length - offset,
      norm_eps=hf.get('layer_norm_eps', 1e-12),
      norm='layer',
      norm_place='post',
      final_norm=False,
      activation=activation(hf, family, 'hidden_act', 'gelu'),
      gated=False,
      rope=None,
      position_offset=offset,
      causal=False,
      qkv_bias=True,
      out_bias=True,
      mlp_bias=True,
      embed_norm=True,
      token_types=hf.get('type_vocab_size', 2),
      masked_head=True,
      tied_head=hf.get('tie_word_embeddings', True))


def table(c: Config) -> list[t.Row]:
  """Every parameter: our path and shape, the checkpoint's name and layout."""
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
  # A file whose decoder was tied when it was saved does not repeat it.
  return [
      *rows,
      *t.embedding('lm_head', head + decoder, v, c.width,
                   otherwise=f'{words}.weight'),
      t.Row('head/bias', (v,), other, 'v -> v', otherwise=bias, copy=bias)]
