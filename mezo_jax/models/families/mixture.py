"""Describes the configs and checkpoints of mixtures of experts.

These are Mixtral, Qwen 3 MoE and OLMoE. Except for the experts, their layers
are those of Llama.
"""

from typing import Any

from mezo_jax.models.families import llama
from mezo_jax.models.families import table as t
from mezo_jax.models.families.config_json import Fields, read_decoder
from mezo_jax.models.layers import Config

RENAMES = llama.RENAMES
IGNORED = llama.IGNORED

# {family: (name of the field with the number of experts, its other name)}
_EXPERTS = {'mixtral': ('num_local_experts', 'num_experts'),
            'qwen3_moe': ('num_experts', 'num_local_experts'),
            'olmoe': ('num_experts', 'num_local_experts')}
_DEFAULTS = {  # Defaults in transformers that differ between the families.
    'mixtral': dict(
        vocab=32_000, width=4096, ff_width=14_336, layers=32, heads=32,
        kv_heads=8, length=131_072, eps=1e-5, theta=1e6),
    'qwen3_moe': dict(
        vocab=151_936, width=2048, ff_width=768, layers=24, heads=32,
        kv_heads=4, length=32_768, eps=1e-6, ff_name='moe_intermediate_size'),
    'olmoe': dict(
        vocab=50_304, width=2048, ff_width=2048, layers=16, heads=16,
        kv_heads=None, length=4096, eps=1e-5)}
# {family: default numbers of experts, and of experts of each token}
_COUNTS = {'mixtral': (8, 2), 'qwen3_moe': (128, 8), 'olmoe': (64, 8)}


def config_from_hf(hf: dict[str, Any]) -> Config:
  """Reads a ``config.json`` of this family, in its old and new spellings.

  Raises:
    ValueError: If the value of a field is not supported.
  """
  family = hf['model_type']
  (experts, other), (count, per_token) = _EXPERTS[family], _COUNTS[family]
  f = Fields(hf, {other: experts})
  # These fields have an effect in training with derivatives only.
  f.ignore('output_router_logits', 'router_aux_loss_coef',
           'router_jitter_noise')
  shared = read_decoder(f, **_DEFAULTS[family])
  normalize, bias, window = True, False, None
  if family == 'mixtral':
    window = f.maybe_size('sliding_window')
  else:
    normalize = f.flag('norm_topk_prob', False)
    bias = f.flag('attention_bias', False)
  if family == 'qwen3_moe':
    # The layers are a stack, so all of them must have experts.
    f.only(decoder_sparse_step=1, mlp_only_layers=([], None))
    window = f.maybe_size('sliding_window', 4096)
    if not f.flag('use_sliding_window', False):
      window = None
    f.ignore('intermediate_size', 'max_window_layers')
  if family == 'olmoe':
    f.only(clip_qkv=None, head_dim=(
        None, shared['width'] // shared['num_heads']))
  config = Config(
      **shared,
      window=window,
      qkv_bias=bias,
      out_bias=bias,
      qk_norm=family != 'mixtral',
      qk_norm_whole=family == 'olmoe',
      num_experts=f.size(experts, count),
      experts_per_token=f.size('num_experts_per_tok', per_token),
      normalize_experts=normalize)
  if config.experts_per_token > config.num_experts:
    f.refuse('num_experts_per_tok', config.experts_per_token,
             f'at most {experts} ({config.num_experts})')
  f.check_rest()
  return config


def table(c: Config) -> list[t.Row]:
  """Returns a row for every parameter of the model.

  Files have other names for the experts of a Mixtral than transformers.
  """
  layer = 'model.layers.{l}.'
  mlp, names = f'{layer}mlp.', ('gate_proj', 'up_proj', 'down_proj')
  if c.family == 'mixtral':
    mlp, names = f'{layer}block_sparse_moe.', ('w1', 'w3', 'w2')
  return [row for row in llama.table(c)
          if not row.path.startswith('layers/mlp/')] + t.experts(
      c, f'{layer}mlp.', f'{mlp}gate', *(
          f'{mlp}experts.{{{{e}}}}.{name}' for name in names))
