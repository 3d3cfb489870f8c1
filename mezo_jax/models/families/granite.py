"""Describes the configs and checkpoints of Granite 3 (dense models).

They are those of Llama with four factors: of the embedding, the attention
scores, what a layer's parts add, and the logits.
"""

from typing import Any

from mezo_jax.models.families import llama
from mezo_jax.models.families.config_json import Fields, read_decoder
from mezo_jax.models.layers import Config

RENAMES = llama.RENAMES
IGNORED = llama.IGNORED
table = llama.table


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a ``config.json`` of this family, in its old and new spellings.

  Raises:
    ValueError: If the value of a field is not supported.
  """
  f = Fields(hf)
  shared = read_decoder(
      f, vocab=32_000, width=4096, ff_width=11_008, layers=32, heads=32,
      kv_heads=None, length=2048, eps=1e-6)
  bias = f.flag('attention_bias', False)
  embed, residual, divisor = (f.number(name, 1.0) for name in (
      'embedding_multiplier', 'residual_multiplier', 'logits_scaling'))
  config = Config(
      **shared,
      qkv_bias=bias,
      out_bias=bias,
      mlp_bias=f.flag('mlp_bias', False),
      embed_scale=None if embed == 1 else embed,
      query_scale=f.number('attention_multiplier', 1.0),
      residual_scale=None if residual == 1 else residual,
      logit_scale=None if divisor == 1 else 1 / divisor)
  f.check_rest()
  return config
