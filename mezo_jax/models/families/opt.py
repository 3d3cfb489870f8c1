"""Describes the configs and checkpoints of OPT (125M to 175B) and Galactica."""

from typing import Any

from mezo_jax.models.families import table as t
from mezo_jax.models.families.config_json import Fields
from mezo_jax.models.layers import Config

# The table of positions has two more rows, at its start: position i is in row
# i + 2.
_OFFSET = 2
RENAMES = ()
IGNORED = r'^lm_head\.weight$|decoder\.version$'


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a ``config.json`` of this family.

  Raises:
    ValueError: If the value of a field is not supported.
  """
  f = Fields(hf)
  f.only(is_causal=True, scale_embeddings=False,
         layer_norm_elementwise_affine=True, learned_embeddings=True)
  width, heads = f.size('hidden_size', 768), f.size('num_attention_heads', 12)
  before = f.flag('do_layer_norm_before', True)
  no_final_norm = f.flag('_remove_final_layer_norm', False)
  embed_width = f.maybe_size('word_embed_proj_dim') or width
  bias = f.flag('enable_bias', True)
  config = Config(
      family='opt',
      vocab_size=f.size('vocab_size', 50_272),
      width=width,
      ff_width=f.size('ffn_dim', 3072),
      num_layers=f.size('num_hidden_layers', 12),
      num_heads=heads,
      num_kv_heads=heads,
      head_width=f.head_size(width, 'num_attention_heads', 12),
      max_length=f.size('max_position_embeddings', 2048),
      norm_eps=1e-5,
      norm='layer',
      norm_place='pre' if before else 'post',
      final_norm=before and not no_final_norm,
      activation=f.activation('activation_function', 'relu'),
      gated=False,
      rope=None,
      position_offset=_OFFSET,
      qkv_bias=bias,
      out_bias=bias,
      mlp_bias=bias,
      embed_width=None if embed_width == width else embed_width,
      tied_head=f.flag('tie_word_embeddings', True))
  f.check_rest()
  return config


def table(c: Config) -> list[t.Row]:
  """Returns a row for every parameter of the model."""
  top, layer = 'model.decoder.', 'model.decoder.layers.{l}.'
  attn = layer + 'self_attn.'
  e, d = ('e', c.embed_width or c.width), ('d', c.width)
  norm = lambda path, name: t.norm(path, name, c.width, True)
  rows = [
      *t.embedding('embed', top + 'embed_tokens', c.vocab_size, e[1]),
      *t.embedding('positions', top + 'embed_positions',
                   c.max_length + c.position_offset, c.width, 's'),
      *norm('layers/attn_norm', layer + 'self_attn_layer_norm'),
      *t.attention(c, *(attn + x for x in (
          'q_proj', 'k_proj', 'v_proj', 'out_proj'))),
      *norm('layers/mlp_norm', layer + 'final_layer_norm'),
      *t.mlp(c, layer + 'fc1', layer + 'fc2')]
  if c.final_norm:
    rows += norm('norm', top + 'final_layer_norm')
  if c.embed_width:
    rows += [*t.linear('project_in', top + 'project_in', e, d, False),
             *t.linear('project_out', top + 'project_out', d, e, False)]
  if not c.tied_head:
    rows += t.embedding('lm_head', 'lm_head', c.vocab_size, e[1])
  return rows
