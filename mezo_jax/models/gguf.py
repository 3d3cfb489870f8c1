"""GGUF files: config and tensors of a Llama, Mistral or Qwen; tokenizers of
SmolLM's kind.

llama.cpp stores a Llama's rotary pairs interleaved, so the rows of q and k come
permuted; names differ; and weights may be quantised, which the `gguf` package
undoes.
"""

import functools
from pathlib import Path
import re

import gguf
import numpy as np

from mezo_jax.errors import InputError
from mezo_jax.models import gguf_header

_NAMES = {
    'token_embd': 'model.embed_tokens',
    'output_norm': 'model.norm',
    'output': 'lm_head',
    'attn_norm': 'input_layernorm',
    'ffn_norm': 'post_attention_layernorm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'attn_q_norm': 'self_attn.q_norm',
    'attn_k_norm': 'self_attn.k_norm',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
}
_ARCHITECTURES = ('llama', 'qwen2', 'qwen3')
# The metadata of an architecture: what is read here, what leaves logits as they
# are, and what llama.cpp may multiply, cut or cap with, with the values for
# which it does not. Anything else is refused.
_READ = frozenset({
    'attention.head_count', 'attention.head_count_kv', 'attention.key_length',
    'attention.value_length', 'attention.layer_norm_rms_epsilon',
    'attention.sliding_window', 'block_count', 'context_length',
    'embedding_length', 'feed_forward_length', 'rope.dimension_count',
    'rope.freq_base', 'rope.scale_linear', 'rope.scaling.factor',
    'rope.scaling.type'})
_HARMLESS = frozenset({
    'attention.layer_norm_epsilon', 'pooling_type', 'rope.finetuned',
    'rope.scaling.finetuned', 'rope.scaling.original_context_length',
    'rope.scaling.yarn_beta_fast', 'rope.scaling.yarn_beta_slow',
    'rope.scaling.yarn_log_multiplier', 'tensor_data_layout', 'vocab_size'})
_WITHOUT_EFFECT = {
    'attention.causal': (True,), 'attention.clamp_kqv': (0,),
    'attention.max_alibi_bias': (0,), 'attention.output_scale': (0, 1),
    'attention.scale': (0,), 'attn_logit_softcapping': (0,),
    'embedding_scale': (0, 1), 'expert_count': (0,), 'expert_used_count': (0,),
    'final_logit_softcapping': (0,), 'leading_dense_block_count': (0,),
    'logit_scale': (0, 1), 'residual_scale': (0, 1),
    'rope.scaling.attn_factor': (1,), 'rope.scaling.yarn_attn_factor': (1,),
    'rope.scaling.yarn_ext_factor': (0, -1)}
CODES = {'Q8_0': (8, False), 'Q4_0': (4, False), 'Q4_1': (4, True)}
_PRE_TOKENIZERS = ('smollm',)  # digits one by one, then GPT-2's


class Tensor:
  """A tensor of a GGUF file; the rows of a slice are dequantised alone."""

  def __init__(self, raw, heads: int | None):
    self.raw, self.heads = raw, heads

  def get_shape(self) -> list[int]:
    return [int(n) for n in reversed(self.raw.shape)]

  @property
  def kind(self) -> str:
    return self.raw.tensor_type.name

  def __getitem__(self, index) -> np.ndarray:
    first, *rest = index
    w = gguf.quants.dequantize(
        self.raw.data[self._rows()[first]], self.raw.tensor_type)
    return w[(slice(None), *rest)]

  def _rows(self) -> np.ndarray:
    rows = np.arange(self.get_shape()[0])
    if self.heads:  # theirs are (head, pair, half), ours (head, half, pair)
      rows = rows.reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return rows

  def codes(self) -> list[tuple[np.ndarray | None, int]]:
    """int8 codes, float16 scales and offsets, each with how many weights of
    the last axis share an entry; of a ``kind`` that is among `CODES`."""
    bits, offsets = CODES[self.kind]
    rows, n = self.get_shape()
    half = 4 if offsets else 2  # bytes of scale and offset
    blocks = self.raw.data[self._rows()].reshape(
        rows, n // 32, half + 4 * bits)
    floats = np.ascontiguousarray(blocks[..., :half]).view(np.float16)
    q = blocks[..., half:]
    if bits == 4:  # the first 16 of 32 are the low halves
      q = np.concatenate([q & 15, q >> 4], -1).astype(np.int8)
      q = q if offsets else q - np.int8(8)
    return [(q.view(np.int8).reshape(rows, n), 1), (floats[..., 0], 32),
            (floats[..., 1] if offsets else None, 32)]


def open_file(path: Path) -> tuple[dict, dict[str, Tensor]]:
  """(config in Hugging Face's words, {Hugging Face's name: tensor}).

  Raises:
    ValueError: for a file that is no GGUF file or of another architecture.
  """
  reader, field = _reader(path)
  try:
    return _read(path, reader, field)
  except InputError:
    raise
  except (ArithmeticError, AttributeError, KeyError, TypeError,
          ValueError) as e:
    raise InputError(f'{path} lacks what its model needs, or has it in another '
                     f'form ({type(e).__name__}: {e}); fetch it again.') from e


def _read(path: Path, reader, field) -> tuple[dict, dict[str, Tensor]]:
  family = field('general.architecture')
  if family not in _ARCHITECTURES:
    raise InputError(
        f'{path}: GGUF architecture {family!r} is not supported; '
        f'{", ".join(_ARCHITECTURES)} are.')
  of = lambda name, default=None: field(f'{family}.{name}', default)
  _check(path, reader, family, of)
  heads = of('attention.head_count')
  kv_heads = of('attention.head_count_kv', heads)
  tensors = {}
  for raw in reader.tensors:
    layer = re.fullmatch(r'blk\.(\d+)\.(\w+)\.(\w+)', raw.name)
    if raw.name == 'rope_freqs.weight':
      raise InputError(
          f'{path}: scaled rotary frequencies in GGUF are not supported; use '
          "the model's Hugging Face directory.")
    if layer:
      number, kind, leaf = layer.groups()
      prefix = f'model.layers.{number}.'
    else:
      prefix, (kind, leaf) = '', raw.name.rsplit('.', 1)
    name = f'{prefix}{_NAMES.get(kind, kind)}.{leaf}'
    permuted = {'attn_q': heads, 'attn_k': kv_heads}.get(kind)
    tensors[name] = Tensor(raw, permuted if family == 'llama' else None)
  width = of('embedding_length')
  config = {
      'model_type': family,
      'vocab_size': tensors['model.embed_tokens.weight'].get_shape()[0],
      'hidden_size': width,
      'intermediate_size': of('feed_forward_length'),
      'num_hidden_layers': of('block_count'),
      'num_attention_heads': heads,
      'num_key_value_heads': kv_heads,
      'head_dim': of('attention.key_length', width // heads),
      'max_position_embeddings': of('context_length'),
      'rms_norm_eps': _float(of('attention.layer_norm_rms_epsilon')),
      'rope_theta': float(of('rope.freq_base', 10000.0)),
      'rope_scaling': _rope_scaling(of),
      'tie_word_embeddings': 'lm_head.weight' not in tensors,
      'bos_token_id': field('tokenizer.ggml.bos_token_id'),
      'eos_token_id': field('tokenizer.ggml.eos_token_id'),
  }
  return config, tensors


def _float(x: float) -> float:
  """Returns the decimal number that was stored as a float32."""
  return float(f'{x:.6g}')


def _rope_scaling(of) -> dict | None:
  """Returns the linear scaling, which is the type where none is named."""
  factor = of('rope.scaling.factor', of('rope.scale_linear', 0))
  if of('rope.scaling.type', 'linear') == 'none' or not factor:
    return None
  return {'rope_type': 'linear', 'factor': _float(factor)}


def _check(path: Path, reader, family: str, of) -> None:
  """Refuses metadata that changes what llama.cpp computes, and not us."""

  def refuse(name, supported):
    raise InputError(
        f'{path}: {family}.{name}={of(name)!r} in GGUF is not supported'
        f"{supported and f', only {supported} is'}; use the model's Hugging "
        'Face directory.')

  for full in reader.fields:
    name = full.removeprefix(f'{family}.')
    if name == full or name in _READ or name in _HARMLESS:
      continue
    values = _WITHOUT_EFFECT.get(name, ())
    if of(name) not in values:
      refuse(name, ' or '.join(map(repr, values)))
  for name in ('attention.head_count', 'attention.layer_norm_rms_epsilon',
               'block_count', 'context_length', 'embedding_length',
               'feed_forward_length'):
    if of(name) is None:
      raise InputError(f'{path} lacks {family}.{name}; fetch it again.')
  if of('rope.scaling.type', 'linear') not in ('none', 'linear'):
    refuse('rope.scaling.type', "'none' or 'linear'")
  head = of('attention.key_length',
            of('embedding_length') // of('attention.head_count'))
  for name in ('attention.value_length', 'rope.dimension_count'):
    if of(name, head) != head:
      refuse(name, f'{head}, the width of a head,')
  # No window, or one that no text reaches.
  if 0 < of('attention.sliding_window', 0) < of('context_length'):
    refuse('attention.sliding_window', '0')


def tokenizer(path: Path):
  """The byte-level BPE tokenizer of a GGUF file.

  Raises:
    ValueError: for another kind of tokenizer.
  """
  _, field = _reader(path)
  kind, pre = field('tokenizer.ggml.model'), field('tokenizer.ggml.pre')
  if kind != 'gpt2' or pre not in _PRE_TOKENIZERS:
    raise InputError(
        f'{path}: GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not '
        "supported; use the model's Hugging Face directory.")
  try:
    return _tokenizer(field)
  except Exception as e:  # of the tokenizers package too
    raise InputError(f'the tokenizer of {path} cannot be read '
                     f'({type(e).__name__}: {e}); fetch it again.') from e


def _tokenizer(field):
  from tokenizers import decoders, models, pre_tokenizers, Tokenizer
  from transformers import PreTrainedTokenizerFast  # slow to import

  tokens = field('tokenizer.ggml.tokens')
  merges = [tuple(m.split(' ')) for m in field('tokenizer.ggml.merges')]
  raw = Tokenizer(models.BPE(
      vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
  raw.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False)])
  raw.decoder = decoders.ByteLevel()
  control = gguf.TokenType.CONTROL
  raw.add_special_tokens([
      t for t, k in zip(tokens, field('tokenizer.ggml.token_type'))
      if k == control])
  name = lambda key: tokens[field(f'tokenizer.ggml.{key}_token_id')]
  eos = name('eos')
  return PreTrainedTokenizerFast(
      tokenizer_object=raw, bos_token=name('bos'), eos_token=eos, pad_token=eos,
      clean_up_tokenization_spaces=False)


def _reader(path: Path):
  """(reader, function that gives a field's value or a default)."""
  about = path.stat() if path.is_file() else None
  return _opened(path, about and (about.st_mtime_ns, about.st_size))


@functools.lru_cache(maxsize=1)
def _opened(path: Path, version):
  del version  # a file that was written anew is opened again
  try:
    gguf_header.check(path)
    reader = gguf.GGUFReader(path)
  except Exception as e:
    raise InputError(
        f'{path} is not a readable GGUF file ({e}); fetch it again.') from e

  def field(name, default=None):
    found = reader.get_field(name)
    return default if found is None else found.contents()

  return reader, field
