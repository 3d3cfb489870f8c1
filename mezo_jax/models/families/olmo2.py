"""Describes the configs and checkpoints of OLMo 2.

They are those of Llama, but norms follow attention and feed-forward instead of
preceding them, and queries and keys are normalised.
"""

from typing import Any

from mezo_jax.models.families import llama
from mezo_jax.models.families import table as t
from mezo_jax.models.families.config_json import Fields, read_decoder
from mezo_jax.models.layers import Config

RENAMES = llama.RENAMES
IGNORED = llama.IGNORED


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a ``config.json`` of this family, in its old and new spellings.

  Raises:
    ValueError: If the value of a field is not supported.
  """
  f = Fields(hf)
  shared = read_decoder(
      f, vocab=50_304, width=4096, ff_width=11_008, layers=32, heads=32,
      kv_heads=None, length=2048, eps=1e-5)
  bias = f.flag('attention_bias', False)
  config = Config(
      **shared,
      norm_place='after',
      qkv_bias=bias,
      out_bias=bias,
      qk_norm=True,
      qk_norm_whole=True)
  f.check_rest()
  return config


def table(c: Config) -> list[t.Row]:
  """Returns a row for every parameter of the model."""
  layer = 'model.layers.{l}.'
  rows = [row for row in llama.table(c) if row.path not in (
      'layers/attn_norm/scale', 'layers/mlp_norm/scale')]
  return [
      *rows,
      *t.norm('layers/attn_post_norm', f'{layer}post_attention_layernorm',
              c.width, False),
      *t.norm('layers/mlp_post_norm', f'{layer}post_feedforward_layernorm',
              c.width, False)]
