"""OPT, 125M to 175B, and Galactica: config reader and one table."""

from mezo_jax.models import table as t
from mezo_jax.models.fields import activation, only
from mezo_jax.models.layers import Config

_OFFSET = 2  # rows 0 and 1 of the positions are for padding
RENAMES = ()
IGNORED = r'^lm_head\.weight$'


def config_from_hf(hf: dict) -> Config:
  """Reads a ``config.json`` of Hugging Face.

  Raises:
    ValueError: for a choice that this family's code does not cover.
  """
  width, heads = hf['hidden_size'], hf['num_attention_heads']
  only(hf, 'opt', layer_norm_elementwise_affine=True)
  before = hf.get('do_layer_norm_before', True)
  embed_width = hf.get('word_embed_proj_dim') or width
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
      norm_place='pre' if before else 'post',
      final_norm=before and not hf.get('_remove_final_layer_norm', False),
      activation=activation(hf, 'opt', 'activation_function', 'relu'),
      gated=False,
      rope=None,
      position_offset=_OFFSET,
      qkv_bias=bias,
      out_bias=bias,
      mlp_bias=bias,
      embed_width=None if embed_width == width else embed_width,
      tied_head=hf.get('tie_word_embeddings', True))


def table(c: Config) -> list[t.Row]:
  """Every parameter: our path and shape, the checkpoint's name and layout."""
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
