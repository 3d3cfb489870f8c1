"""Llama (1 to 3, SmolLM2, TinyLlama, Yi), Mistral and Qwen (2, 2.5, 3)."""

from mezo_jax.models import table as t
from mezo_jax.models.fields import only, read_rope
from mezo_jax.models.layers import Config

RENAMES = (  # the body of transformers' classes for question answering
    (r'^transformer\.(?=(embed_tokens|layers|norm)\.)', 'model.'),)
IGNORED = r'rotary_emb\.inv_freq$|^lm_head\.weight$'


def config_from_hf(hf: dict) -> Config:
  """Reads a ``config.json`` of Hugging Face, old and new spellings.

  Raises:
    ValueError: for a choice that this family's code does not cover.
  """
  family, heads = hf['model_type'], hf['num_attention_heads']
  only(hf, family, hidden_act='silu')
  bias = hf.get('attention_bias', False)
  window, local = _window(hf, family)
  return Config(
      family=family,
      vocab_size=hf['vocab_size'],
      width=hf['hidden_size'],
      ff_width=hf['intermediate_size'],
      num_layers=hf['num_hidden_layers'],
      num_heads=heads,
      num_kv_heads=hf.get('num_key_value_heads') or heads,
      head_width=hf.get('head_dim') or (
          128 if family == 'qwen3' else hf['hidden_size'] // heads),
      max_length=hf.get('max_position_embeddings', 2048),
      norm_eps=hf.get('rms_norm_eps', 1e-6),
      rope=read_rope(hf, family),
      window=window,
      local_layers=local,
      qkv_bias=family == 'qwen2' or bias,
      out_bias=family != 'qwen2' and bias,
      mlp_bias=hf.get('mlp_bias', False),
      qk_norm=family == 'qwen3',
      tied_head=hf.get('tie_word_embeddings', False))


def _window(hf: dict, family: str) -> tuple[int | None, tuple[bool, ...]]:
  """The window, and which layers have it: of a Mistral all, of a Qwen those
  from ``max_window_layers`` on, if it is used at all."""
  window = hf.get('sliding_window', 4096)
  if family == 'mistral':
    return window, ()
  if family == 'llama' or not hf.get('use_sliding_window', False):
    return None, ()
  kinds, layers = hf.get('layer_types'), hf['num_hidden_layers']
  local = (tuple(kind == 'sliding_attention' for kind in kinds) if kinds else
           tuple(i >= hf.get('max_window_layers', 28) for i in range(layers)))
  if not any(local):
    return None, ()
  return window, () if all(local) else local


def table(c: Config) -> list[t.Row]:
  """Every parameter: our path and shape, the checkpoint's name and layout."""
  layer = 'model.layers.{l}.'
  attn, mlp = layer + 'self_attn.', layer + 'mlp.'
  rows = [
      *t.embedding('embed', 'model.embed_tokens', c.vocab_size, c.width),
      *t.norm('layers/attn_norm', layer + 'input_layernorm', c.width, False),
      *t.attention(c, *(f'{attn}{x}_proj' for x in 'qkvo')),
      *t.norm('layers/mlp_norm', layer + 'post_attention_layernorm', c.width,
              False),
      *t.mlp(c, mlp + 'up_proj', mlp + 'down_proj', mlp + 'gate_proj'),
      *t.norm('norm', 'model.norm', c.width, False)]
  if c.qk_norm:
    rows += [
        *t.norm('layers/attn/q_norm', attn + 'q_norm', c.head_width, False),
        *t.norm('layers/attn/k_norm', attn + 'k_norm', c.head_width, False)]
  if not c.tied_head:
    rows += t.embedding('lm_head', 'lm_head', c.vocab_size, c.width)
  return rows
