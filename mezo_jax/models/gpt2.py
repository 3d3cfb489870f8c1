"""GPT-2: config reader and one table."""

from mezo_jax.models import table as t
from mezo_jax.models.fields import activation, only
from mezo_jax.models.layers import Config

RENAMES = ()
IGNORED = r'\.attn\.(masked_)?bias$|^lm_head\.weight$'


def config_from_hf(hf: dict) -> Config:
  """Reads a ``config.json`` of Hugging Face.

  Raises:
    ValueError: for a choice that this family's code does not cover.
  """
  only(hf, 'gpt2', scale_attn_by_inverse_layer_idx=False,
       add_cross_attention=False)
  width, heads = hf.get('n_embd', 768), hf.get('n_head', 12)
  return Config(
      family='gpt2',
      vocab_size=hf['vocab_size'],
      width=width,
      ff_width=hf.get('n_inner') or 4 * width,
      num_layers=hf.get('n_layer', 12),
      num_heads=heads,
      num_kv_heads=heads,
      head_width=width // heads,
      max_length=hf.get('n_positions', 1024),
      norm_eps=hf.get('layer_norm_epsilon', 1e-5),
      norm='layer',
      activation=activation(hf, 'gpt2', 'activation_function', 'gelu_new'),
      gated=False,
      rope=None,
      qkv_bias=True,
      out_bias=True,
      mlp_bias=True,
      query_scale=None if hf.get('scale_attn_weights', True) else 1.0,
      tied_head=hf.get('tie_word_embeddings', True))


def table(c: Config) -> list[t.Row]:
  """Every parameter: our path and shape, the checkpoint's name and layout.

  Its matrices are [inputs, outputs], and q, k and v are parts of one.
  """
  layer = 'transformer.h.{l}.'

  def linear(path, name, inputs, outputs, part=(0, 1)):
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
