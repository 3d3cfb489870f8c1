"""OPT, 125M to 175B without 350M: config reader and one table."""

from mezo_jax.models.table import Row
from mezo_jax.models.transformer import Config, POSITION_OFFSET


def config_from_hf(hf: dict) -> Config:
  """Reads a ``config.json`` of Hugging Face.

  Raises:
    ValueError: for a choice that this family's code does not cover.
  """
  width, heads = hf['hidden_size'], hf['num_attention_heads']
  for field, value, only in (
      ('activation_function', hf.get('activation_function', 'relu'), 'relu'),
      ('do_layer_norm_before', hf.get('do_layer_norm_before', True), True),
      ('word_embed_proj_dim', hf.get('word_embed_proj_dim') or width, width),
      ('_remove_final_layer_norm',
       hf.get('_remove_final_layer_norm', False), False)):
    if value != only:
      raise ValueError(
          f'opt with {field}={value!r} is not supported; only {only!r} is.')
  bias = hf.get('enable_bias', True)
  return Config(
      family='opt',
      vocab_size=hf['vocab_size'],
      width=width,
      ff_width=hf['ffn_dim'],
      num_layers=hf['num_hidden_layers'],
      num_heads=heads,
      num_kv_heads=heads,
      head_width=width // heads,
      max_length=hf.get('max_position_embeddings', 2048),
      norm_eps=1e-5,
      norm='layer',
      activation='relu',
      gated=False,
      learned_positions=True,
      attention_bias=bias,
      mlp_bias=bias,
      tied_head=hf.get('tie_word_embeddings', True))


def table(c: Config) -> list[Row]:
  """Every parameter: our path and shape, the checkpoint's name and layout."""
  d, f, v = c.width, c.ff_width, c.vocab_size
  n = c.num_heads * c.head_width
  top, layer = 'model.decoder.', 'model.decoder.layers.{l}.'

  def norm(path, name):
    return [Row(f'{path}/{ours}', (d,), f'{name}.{theirs}', 'd -> d')
            for ours, theirs in (('scale', 'weight'), ('bias', 'bias'))]

  rows = [
      Row('embed/embedding', (v, d), top + 'embed_tokens.weight', 'v d -> v d'),
      Row('positions/embedding', (c.max_length + POSITION_OFFSET, d),
          top + 'embed_positions.weight', 's d -> s d'),
      *norm('layers/attn_norm', layer + 'self_attn_layer_norm'),
      *norm('layers/mlp_norm', layer + 'final_layer_norm'),
      Row('layers/attn/o/kernel', (n, d),
          layer + 'self_attn.out_proj.weight', 'd n -> n d'),
      Row('layers/mlp/up/kernel', (d, f), layer + 'fc1.weight', 'f d -> d f'),
      Row('layers/mlp/down/kernel', (f, d), layer + 'fc2.weight', 'd f -> f d'),
      *norm('norm', top + 'final_layer_norm'),
  ]
  for x in 'qkv':
    rows.append(Row(f'layers/attn/{x}/kernel', (d, n),
                    layer + f'self_attn.{x}_proj.weight', 'n d -> d n'))
    if c.attention_bias:
      rows.append(Row(f'layers/attn/{x}/bias', (n,),
                      layer + f'self_attn.{x}_proj.bias', 'n -> n'))
  if c.attention_bias:
    rows += [
        Row('layers/attn/o/bias', (d,), layer + 'self_attn.out_proj.bias',
            'd -> d'),
        Row('layers/mlp/up/bias', (f,), layer + 'fc1.bias', 'f -> f'),
        Row('layers/mlp/down/bias', (d,), layer + 'fc2.bias', 'd -> d')]
  if not c.tied_head:
    rows.append(
        Row('lm_head/embedding', (v, d), 'lm_head.weight', 'v d -> v d'))
  return rows
