"""Lists the configs of well-known models, for planning without a network.

Each entry has the fields of the model's ``config.json`` that determine the
shapes of its parameters and its forward pass.
"""

from typing import Any

from mezo_jax.models.formats.huggingface import read_config
from mezo_jax.models.layers import Config


def _opt(width: int, layers: int, heads: int, **more) -> dict:
  """Returns the config of an OPT."""
  return dict(
      model_type='opt', vocab_size=50272, hidden_size=width, ffn_dim=4 * width,
      num_hidden_layers=layers, num_attention_heads=heads,
      max_position_embeddings=2048, word_embed_proj_dim=width) | more


def _decoder(model_type: str, vocab: int, width: int, ff: int, layers: int,
             heads: int, kv_heads: int, length: int, theta: float = 1e4,
             tied: bool = False, **more) -> dict:
  """Returns the config of a decoder whose fields are named as Llama's."""
  return dict(
      model_type=model_type, vocab_size=vocab, hidden_size=width,
      intermediate_size=ff, num_hidden_layers=layers,
      num_attention_heads=heads, num_key_value_heads=kv_heads,
      max_position_embeddings=length, rope_theta=theta,
      tie_word_embeddings=tied) | more


def _llama31(factor: float, **more) -> dict:
  """Returns the rotary scaling of Llama 3.1 and 3.2."""
  return dict(rope_scaling=dict(
      rope_type='llama3', factor=factor, low_freq_factor=1.0,
      high_freq_factor=4.0, original_max_position_embeddings=8192)) | more


def _roberta(width: int, layers: int, heads: int) -> dict:
  """Returns the config of a RoBERTa."""
  return dict(
      model_type='roberta', vocab_size=50265, hidden_size=width,
      intermediate_size=4 * width, num_hidden_layers=layers,
      num_attention_heads=heads, max_position_embeddings=514,
      type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)


def _qwen25(width, ff, layers, heads, kv_heads, vocab=152_064, tied=False):
  """Returns the config of a Qwen2.5."""
  return _decoder('qwen2', vocab, width, ff, layers, heads, kv_heads, 32_768,
                  1e6, tied, rms_norm_eps=1e-6)


def _qwen3(width, ff, layers, heads, tied=False):
  """Returns the config of a Qwen3."""
  return _decoder('qwen3', 151_936, width, ff, layers, heads, 8, 40_960, 1e6,
                  tied, rms_norm_eps=1e-6, head_dim=128)


def _gemma2(width, ff, layers, heads, kv_heads, scale, **more):
  """Returns the config of a Gemma 2."""
  return _decoder(
      'gemma2', 256_000, width, ff, layers, heads, kv_heads, 8192, tied=True,
      rms_norm_eps=1e-6, head_dim=256, sliding_window=4096,
      query_pre_attn_scalar=scale, attn_logit_softcapping=50.0,
      final_logit_softcapping=30.0,
      hidden_activation='gelu_pytorch_tanh') | more


def _gemma3(width, ff, layers, heads, kv_heads, vocab=262_208, head=256,
            scale=256, window=1024, **more):
  """Returns the config of the text part of a Gemma 3."""
  return _decoder(
      'gemma3_text', vocab, width, ff, layers, heads, kv_heads, 131_072, 1e6,
      True, rms_norm_eps=1e-6, head_dim=head, sliding_window=window,
      query_pre_attn_scalar=scale, rope_local_base_freq=1e4,
      hidden_activation='gelu_pytorch_tanh') | more


def _moe(model_type, *sizes, experts, per_token, **more):
  """Returns the config of a mixture of experts."""
  name = 'num_local_experts' if model_type == 'mixtral' else 'num_experts'
  return _decoder(model_type, *sizes, num_experts_per_tok=per_token,
                  **{name: experts}) | more


# Rotary scaling of the Gemma 3 models with a context of 128K tokens.
_LONG: dict[str, Any] = dict(rope_scaling=dict(rope_type='linear', factor=8.0))
KNOWN: dict[str, dict[str, Any]] = {
    'facebook/opt-125m': _opt(768, 12, 12),
    'facebook/opt-350m': _opt(1024, 24, 16, word_embed_proj_dim=512,
                              do_layer_norm_before=False),
    'facebook/opt-1.3b': _opt(2048, 24, 32),
    'facebook/opt-2.7b': _opt(2560, 32, 32),
    'facebook/opt-6.7b': _opt(4096, 32, 32),
    'facebook/opt-13b': _opt(5120, 40, 40),
    'facebook/opt-30b': _opt(7168, 48, 56),
    'facebook/opt-66b': _opt(9216, 64, 72),
    'facebook/opt-175b': _opt(12288, 96, 96),
    'FacebookAI/roberta-base': _roberta(768, 12, 12),
    'FacebookAI/roberta-large': _roberta(1024, 24, 16),
    'meta-llama/Llama-2-7b-hf': _decoder(
        'llama', 32_000, 4096, 11008, 32, 32, 32, 4096),
    'meta-llama/Llama-2-13b-hf': _decoder(
        'llama', 32_000, 5120, 13824, 40, 40, 40, 4096),
    'meta-llama/Llama-2-70b-hf': _decoder(
        'llama', 32_000, 8192, 28672, 80, 64, 8, 4096),
    'meta-llama/Meta-Llama-3-8B': _decoder(
        'llama', 128_256, 4096, 14336, 32, 32, 8, 8192, 5e5),
    'meta-llama/Meta-Llama-3-70B': _decoder(
        'llama', 128_256, 8192, 28672, 80, 64, 8, 8192, 5e5),
    'meta-llama/Llama-3.1-8B': _decoder(
        'llama', 128_256, 4096, 14336, 32, 32, 8, 131_072, 5e5,
        **_llama31(8.0)),
    'meta-llama/Llama-3.1-70B': _decoder(
        'llama', 128_256, 8192, 28672, 80, 64, 8, 131_072, 5e5,
        **_llama31(8.0)),
    'meta-llama/Llama-3.2-1B': _decoder(
        'llama', 128_256, 2048, 8192, 16, 32, 8, 131_072, 5e5, True,
        **_llama31(32.0, head_dim=64)),
    'meta-llama/Llama-3.2-3B': _decoder(
        'llama', 128_256, 3072, 8192, 28, 24, 8, 131_072, 5e5, True,
        **_llama31(32.0, head_dim=128)),
    'mistralai/Mistral-7B-v0.3': _decoder(
        'mistral', 32_768, 4096, 14336, 32, 32, 8, 32_768, 1e6,
        sliding_window=None),
    'Qwen/Qwen2.5-0.5B': _qwen25(896, 4864, 24, 14, 2, 151_936, True),
    'Qwen/Qwen2.5-1.5B': _qwen25(1536, 8960, 28, 12, 2, 151_936, True),
    'Qwen/Qwen2.5-7B': _qwen25(3584, 18944, 28, 28, 4),
    'Qwen/Qwen2.5-14B': _qwen25(5120, 13824, 48, 40, 8),
    'Qwen/Qwen2.5-32B': _qwen25(5120, 27648, 64, 40, 8),
    'Qwen/Qwen2.5-72B': _qwen25(8192, 29568, 80, 64, 8),
    'Qwen/Qwen3-0.6B': _qwen3(1024, 3072, 28, 16, True),
    'Qwen/Qwen3-1.7B': _qwen3(2048, 6144, 28, 16, True),
    'Qwen/Qwen3-4B': _qwen3(2560, 9728, 36, 32, True),
    'Qwen/Qwen3-8B': _qwen3(4096, 12288, 36, 32),
    'Qwen/Qwen3-14B': _qwen3(5120, 17408, 40, 40),
    'Qwen/Qwen3-32B': _qwen3(5120, 25600, 64, 64),
    'mistralai/Mixtral-8x7B-v0.1': _moe(
        'mixtral', 32_000, 4096, 14_336, 32, 32, 8, 32_768, 1e6, experts=8,
        per_token=2, sliding_window=None),
    'Qwen/Qwen3-30B-A3B': _moe(
        'qwen3_moe', 151_936, 2048, 6144, 48, 32, 4, 40_960, 1e6, experts=128,
        per_token=8, moe_intermediate_size=768, norm_topk_prob=True,
        head_dim=128),
    'allenai/OLMoE-1B-7B-0924': _moe(
        'olmoe', 50_304, 2048, 1024, 16, 16, 16, 4096, experts=64, per_token=8),
    'google/gemma-2-2b': _gemma2(2304, 9216, 26, 8, 4, 256),
    'google/gemma-2-9b': _gemma2(3584, 14336, 42, 16, 8, 256),
    'google/gemma-2-27b': _gemma2(4608, 36864, 46, 32, 16, 144, head_dim=128),
    'google/gemma-3-1b-pt': _gemma3(
        1152, 6912, 26, 4, 1, vocab=262_144, window=512,
        max_position_embeddings=32_768),
    'google/gemma-3-4b-pt': _gemma3(2560, 10240, 34, 8, 4, **_LONG),
    'google/gemma-3-12b-pt': _gemma3(3840, 15360, 48, 16, 8, **_LONG),
    'google/gemma-3-27b-pt': _gemma3(
        5376, 21504, 62, 32, 16, head=128, scale=168, **_LONG),
}


def find(name: str) -> Config | None:
  """Returns the config of a well-known model, or None for another name.

  Args:
    name: A hub id in upper or lower case. The owner may be omitted: 'opt-30b'
      means 'facebook/opt-30b'.
  """
  for known, hf in KNOWN.items():
    if name.lower() in (known.lower(), known.split('/')[1].lower()):
      return read_config(hf, known)
  return None
