"""Describes the configs and checkpoints of GPT-2."""

from typing import Any

from mezo_jax.models.families import table as t
from mezo_jax.models.families.config_json import Fields
from mezo_jax.models.layers import Config

RENAMES = ()
IGNORED = r'\.attn\.(masked_)?bias$|^lm_head\.weight$'

_ALIASES = {  # The attribute_map of transformers' config class.
    'hidden_size': 'n_embd', 'max_position_embeddings': 'n_positions',
    'num_attention_heads': 'n_head', 'num_hidden_layers': 'n_layer'}


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a ``config.json`` of this family.

  Raises:
    ValueError: If the value of a field is not supported.
  """
  f = Fields(hf, _ALIASES)
  f.only(is_causal=True, add_cross_attention=False,
         scale_attn_by_inverse_layer_idx=False)
  width, heads = f.size('n_embd', 768), f.size('n_head', 12)
  scaled = f.flag('scale_attn_weights', True)
  config = Config(
      family='gpt2',
      vocab_size=f.size('vocab_size', 50_257),
      width=width,
      ff_width=f.maybe_size('n_inner') or 4 * width,
      num_layers=f.size('n_layer', 12),
      num_heads=heads,
      num_kv_heads=heads,
      head_width=f.head_size(width, 'n_head', 12),
      max_length=f.size('n_positions', 1024),
      norm_eps=f.number('layer_norm_epsilon', 1e-5),
      norm='layer',
      activation=f.activation('activation_function', 'gelu_new'),
      gated=False,
      rope=None,
      qkv_bias=True,
      out_bias=True,
      mlp_bias=True,
      query_scale=None if scaled else 1.0,
      tied_head=f.flag('tie_word_embeddings', True))
  f.check_rest()
  return config


def table(c: Config) -> list[t.Row]:
  """Returns a row for every parameter of the model.

  The matrices of GPT-2 are stored as [inputs, outputs], unlike those of
  `torch.nn.Linear`, and q, k and v are the three parts of one matrix.
  """
  layer = 'transformer.h.{l}.'

  def linear(path, name, inputs, outputs, part=(0, 1)):
    """Returns the rows of a matrix [inputs, outputs] and of its bias."""
    (i, n), (o, m) = inputs, outputs
    return [
        t.Row(f'layers/{path}/kernel', (n, m), f'{layer}{name}.weight',
              f'{i} {o} -> {i} {o}', part),
        t.Row(f'layers/{path}/bias', (m,), f'{layer}{name}.bias', f'{o} -> {o}',
              part)]

  d, n, f = ('d', c.width), ('n', c.width), ('f', c.ff_width)
  rows = [
      *t.embedding('embed', 'transformer.wte', c.vocab_size, c.width),
      *t.embedding('positions', 'transformer.wpe', c.max_length, c.width, 's'),
      *t.norm('layers/attn_norm', layer + 'ln_1', c.width, True),
      *(row for i, x in enumerate('qkv')
        for row in linear(f'attn/{x}', 'attn.c_attn', d, n, (i, 3))),
      *linear('attn/o', 'attn.c_proj', n, d),
      *t.norm('layers/mlp_norm', layer + 'ln_2', c.width, True),
      *linear('mlp/up', 'mlp.c_fc', d, f),
      *linear('mlp/down', 'mlp.c_proj', f, d),
      *t.norm('norm', 'transformer.ln_f', c.width, True)]
  if not c.tied_head:
    rows += t.embedding('lm_head', 'lm_head', c.vocab_size, c.width)
  return rows
