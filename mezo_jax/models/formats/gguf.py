"""Reads GGUF files of Llama, Mistral and Qwen models, and SmolLM's tokenizer.

The files differ from those of Hugging Face in three ways. Tensors and metadata
have other names. llama.cpp interleaves the rotary pairs of Llama models, so the
rows of q and k are permuted. Weights may be quantised; the `gguf` package
dequantises them. A model that llama-gguf-split has split into several files can
be named by any of them.
"""

import functools
from pathlib import Path
import re
from typing import Any

import gguf
import numpy as np

from mezo_jax.core.errors import InputError, MissingError
from mezo_jax.models.formats import gguf_header

_NAMES = {  # {name of a GGUF tensor: its name in Hugging Face files}
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
# The metadata of an architecture falls into three groups: fields that are read
# here, fields that do not change logits, and fields by which llama.cpp scales,
# clips or caps values. The last are accepted only with the values listed below,
# for which they have no effect. All other fields are refused.
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
# {kind of quantised tensor: (bits, whether it has offsets)}
CODES = {'Q8_0': (8, False), 'Q4_0': (4, False), 'Q4_1': (4, True)}
# Pre-tokenizers that split off each digit, and split the rest as GPT-2 does.
_PRE_TOKENIZERS = ('smollm',)
_PART = re.compile(r'(.*-)(\d{5})-of-(\d{5})\.gguf')
_OTHER_FILES = {  # {general.type: description for the error}
    'adapter': 'a LoRA adapter', 'imatrix': 'an importance matrix',
    'mmproj': 'the vision part of a model'}


class Tensor:
  """Holds a tensor of a GGUF file. Slicing dequantises only the sliced rows.

  Attributes:
    raw: The tensor as the `gguf` package reads it.
    heads: Number of heads whose rows are permuted; None if no rows are.
  """

  def __init__(self, raw: Any, heads: int | None) -> None:
    self.raw: Any = raw
    self.heads = heads

  def get_shape(self) -> list[int]:
    """Returns the shape in the order of Hugging Face, outputs first."""
    return [int(n) for n in reversed(self.raw.shape)]

  @property
  def kind(self) -> str:
    """Returns the name of the tensor's type, such as 'F16' or 'Q4_0'."""
    return self.raw.tensor_type.name

  def __getitem__(self, index: Any) -> np.ndarray:
    first, *rest = index
    w = gguf.quants.dequantize(
        self.raw.data[self._rows()[first]], self.raw.tensor_type)
    return w[(slice(None), *rest)]

  def _rows(self) -> np.ndarray:
    """Returns the index in the file of each row."""
    rows = np.arange(self.get_shape()[0])
    # llama.cpp orders the rows of q and k as (head, pair, half), Hugging Face
    # as (head, half, pair).
    if self.heads:
      rows = rows.reshape(self.heads, -1, 2).swapaxes(1, 2).reshape(-1)
    return rows

  def codes(self) -> list[tuple[np.ndarray | None, int]]:
    """Returns the quantised weights without dequantising them.

    The ``kind`` must be one of `CODES`.

    Returns:
      Three pairs ``(array, run)``, for int8 weights, float16 scales and float16
      offsets. Each entry of an array belongs to ``run`` consecutive weights
      along the last axis. The array of offsets is None if the kind has none.
    """
    bits, offsets = CODES[self.kind]
    rows, n = self.get_shape()
    half = 4 if offsets else 2  # Bytes of a scale and an offset in float16.
    blocks = self.raw.data[self._rows()].reshape(
        rows, n // 32, half + 4 * bits)
    floats = np.ascontiguousarray(blocks[..., :half]).view(np.float16)
    q = blocks[..., half:]
    # With 4 bits, the low halves of a block's 16 bytes are its first 16
    # weights, and the high halves are the other 16.
    if bits == 4:
      q = np.concatenate([q & 15, q >> 4], -1).astype(np.int8)
      q = q if offsets else q - np.int8(8)
    return [(q.view(np.int8).reshape(rows, n), 1), (floats[..., 0], 32),
            (floats[..., 1] if offsets else None, 32)]


def open_file(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
  """Opens a model.

  Args:
    path: Path of a GGUF file, or of any part of a split model.

  Returns:
    ``config, tensors``: the metadata as the fields of a ``config.json``, and
    the tensors by the names that Hugging Face gives them.

  Raises:
    FileNotFoundError: If a part is missing.
    ValueError: If it is not a GGUF file with a complete model, or the
      architecture is not supported.
  """
  reader, field = _reader(path)
  try:
    return _read(path, reader, field)
  except InputError:
    raise
  except (ArithmeticError, AttributeError, KeyError, TypeError,
          ValueError) as e:
    raise InputError(f'{path} has missing or malformed metadata '
                     f'({type(e).__name__}: {e}); fetch it again.') from e


def _read(path: Path, reader, field) -> tuple[dict, dict[str, Tensor]]:
  """Returns the config and the tensors of an opened file."""
  kind = field('general.type', 'model')
  if kind != 'model':
    what = _OTHER_FILES.get(kind, f'a file of type {kind!r}')
    raise InputError(f'{path} is {what}, not a language model; give the file '
                     'of the model.')
  family = field('general.architecture')
  if family not in _ARCHITECTURES:
    raise InputError(
        f'{path}: GGUF architecture {family!r} is not supported; the supported '
        f'ones are {", ".join(_ARCHITECTURES)}.')
  if not reader.tensors:
    raise InputError(f'{path} has a vocabulary but no weights; give the file '
                     'of a complete model.')
  if all(raw.name != 'token_embd.weight' for raw in reader.tensors):
    raise InputError(f'{path} has no token_embd.weight; give the file of a '
                     'complete model.')
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
  special = lambda name: field(f'tokenizer.ggml.{name}_token_id')
  # Generation stops at the end of a text, of a turn or of a message.
  ends = [*dict.fromkeys(i for i in map(special, ('eos', 'eot', 'eom'))
                         if i is not None)]
  padding = special('padding')
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
      'bos_token_id': special('bos'),
      'eos_token_id': (ends or [None])[0] if len(ends) < 2 else ends,
      **({} if padding is None else {'pad_token_id': padding}),
  }
  return config, tensors


def _float(x: float) -> float:
  """Returns the decimal number that was rounded to a float32, such as 1e-5."""
  return float(f'{x:.6g}')


def _rope_scaling(of) -> dict | None:
  """Returns ``rope_scaling`` of a config.json, or None without scaling.

  A scaling whose type is not given is linear.
  """
  factor = of('rope.scaling.factor', of('rope.scale_linear', 0))
  if of('rope.scaling.type', 'linear') == 'none' or not factor:
    return None
  return {'rope_type': 'linear', 'factor': _float(factor)}


def _check(path: Path, reader, family: str, of) -> None:
  """Refuses metadata that this library would ignore and llama.cpp would not.

  Raises:
    InputError: If a field is missing, or its value is not supported.
  """

  def refuse(name, supported):
    """Raises an error; ``supported`` may be ''."""
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
  # A window of 0 means no window, and a window as long as the context has no
  # effect.
  if 0 < of('attention.sliding_window', 0) < of('context_length'):
    refuse('attention.sliding_window', '0')


def tokenizer(path: Path) -> Any:
  """Returns the byte-level BPE tokenizer of a GGUF file.

  It has the file's special tokens and chat templates. It puts a token at the
  start or the end of each text if the file requests it.

  Args:
    path: Path of a GGUF file, or of any part of a split model.

  Returns:
    A `PreTrainedTokenizerFast` of transformers.

  Raises:
    ValueError: If the file has another kind of tokenizer, or a damaged one.
  """
  _, field = _reader(path)
  kind, pre = field('tokenizer.ggml.model'), field('tokenizer.ggml.pre')
  if kind != 'gpt2' or pre not in _PRE_TOKENIZERS:
    raise InputError(
        f'{path}: GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not '
        "supported; use the model's Hugging Face directory.")
  for name in ('add_space_prefix', 'add_sep_token'):
    if field(f'tokenizer.ggml.{name}', False):
      raise InputError(
          f'{path}: a GGUF tokenizer with {name} is not supported; use the '
          "model's Hugging Face directory.")
  try:
    return _tokenizer(field)
  except Exception as e:  # The tokenizers package raises plain Exceptions.
    raise InputError(f'the tokenizer of {path} cannot be read '
                     f'({type(e).__name__}: {e}); fetch it again.') from e


def _tokenizer(field):
  """Builds the tokenizer that the fields of a file describe."""
  from tokenizers import (
    AddedToken,
    decoders,
    models,
    pre_tokenizers,
    processors,
    Tokenizer,
  )
  from transformers import PreTrainedTokenizerFast  # Slow to import.

  tokens = field('tokenizer.ggml.tokens')
  merges = [tuple(m.split(' ')) for m in field('tokenizer.ggml.merges')]
  raw = Tokenizer(models.BPE(
      vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
  raw.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False)])
  raw.decoder = decoders.ByteLevel()
  types = field('tokenizer.ggml.token_type') or [gguf.TokenType.NORMAL] * len(
      tokens)
  of_type = lambda *kinds: [t for t, k in zip(tokens, types) if k in kinds]
  raw.add_special_tokens(of_type(
      gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN))
  raw.add_tokens([AddedToken(t, normalized=False) for t in of_type(
      gguf.TokenType.USER_DEFINED)])
  special = {}
  for name, key in (
      ('bos', 'bos'), ('eos', 'eos'), ('unk', 'unknown'), ('pad', 'padding'),
      ('sep', 'seperator'), ('mask', 'mask')):  # llama.cpp spells it this way.
    i = field(f'tokenizer.ggml.{key}_token_id')
    if i is not None:
      special[f'{name}_token'] = tokens[i]
  if 'eos_token' in special:
    special.setdefault('pad_token', special['eos_token'])
  around = [field('tokenizer.ggml.add_bos_token', False) and 'bos_token',
            field('tokenizer.ggml.add_eos_token', False) and 'eos_token']
  if any(around):
    first, last = ([special[name]] if name else [] for name in around)
    raw.post_processor = processors.TemplateProcessing(
        single=[*first, '$A', *last],
        pair=[*first, '$A', *last, *first, '$B:1', *last],
        special_tokens=[(t, tokens.index(t)) for t in {*first, *last}])
  return PreTrainedTokenizerFast(
      tokenizer_object=raw, **special, chat_template=_chat_template(field),
      clean_up_tokenization_spaces=False)


def _chat_template(field) -> str | dict[str, str] | None:
  """Returns the chat template, or {name: template} if there are several."""
  default = field('tokenizer.chat_template')
  named = {name: field(f'tokenizer.chat_template.{name}')
           for name in field('tokenizer.chat_templates', [])}
  named = {name: text for name, text in named.items() if text is not None}
  if not named:
    return default
  return named if default is None else {'default': default} | named


def _reader(path: Path):
  """Opens a model, with all of its parts if it is split.

  Returns:
    ``reader, field``: a reader whose ``tensors`` are those of all parts, and a
    function ``field(name, default)`` that returns the value of a metadata
    field.
  """
  split = _PART.fullmatch(path.name)
  paths = [path]
  # The parts are opened in order, since the first has the metadata of all.
  if split:
    count = int(split[3])
    paths = [path.with_name(f'{split[1]}{i:05d}-of-{count:05d}.gguf')
             for i in range(1, count + 1)] or paths
  about = [p.stat() if p.is_file() else None for p in paths]
  return _opened(path, tuple(paths), tuple(
      x and (x.st_mtime_ns, x.st_size) for x in about))


@functools.lru_cache(maxsize=1)
def _opened(path: Path, paths: tuple[Path, ...], versions: tuple):
  """Opens the parts of a model. The last opened model is cached.

  ``versions`` has the modification time and size of each file, or None for a
  missing file. It is a part of the cache's key, so that a changed file is
  opened again.
  """
  # If the first part is missing, the given part is opened instead. It records
  # the number of parts, which the error below reports.
  first = paths[0] if versions[0] else path
  reader, field = _open(first)
  count = field('split.count', 0)
  if count < 2:
    if first != path:  # A complete file that is named like a part.
      reader, field = _open(path)
    return reader, field
  join = ('put all parts in one directory under their original names, or join '
          'them with llama-gguf-split --merge.')
  if len(paths) != count:
    raise InputError(f'{path} is one of the {count} parts of a split model, '
                     f'but its name does not have the form of a part; {join}')
  missing = [p.name for p, version in zip(paths, versions) if not version]
  if missing:
    raise MissingError(f'{path} is one of the {count} parts of a split model, '
                       f'but {", ".join(missing)} is missing; {join}')
  for i, part in enumerate(paths[1:], 1):
    more, of_part = _open(part)
    if of_part('split.count') != count or of_part('split.no') != i:
      raise InputError(f'{part} is not part {i + 1} of {count} of a split '
                       f'model; {join}')
    reader.tensors += more.tensors
  tensors = reader.tensors
  total = field('split.tensors.count', len(tensors))
  if len(tensors) != total or len({x.name for x in tensors}) != total:
    raise InputError(f'the {count} parts of {path} have {len(tensors)} '
                     f'tensors, but the first part declares {total}; they '
                     'are not parts of one model. Fetch them again.')
  return reader, field


def _open(path: Path):
  """Opens one file; returns its reader and a function to look up fields."""
  try:
    gguf_header.check_header(path)
    reader = gguf.GGUFReader(path)
  except Exception as e:
    raise InputError(
        f'{path} is not a readable GGUF file ({e}); fetch it again.') from e

  def field(name, default=None):
    found = reader.get_field(name)
    return default if found is None else found.contents()

  return reader, field
