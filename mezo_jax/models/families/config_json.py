"""Reads the fields of a ``config.json`` as transformers reads them.

Each field of a file is treated in one of four ways:

* It is read.
* It must have a value that this library supports. Any other value is an error.
* It is ignored, because it does not change logits.
* It is unknown to this library. If transformers knows the field, any value but
  its default is an error. Otherwise a warning names the field.
"""

from collections.abc import Iterable
import dataclasses
import math
import re
from typing import Any, NoReturn
import warnings

from mezo_jax.core.errors import InputError
from mezo_jax.models.layers import Config, Rope

# {name in Hugging Face files: name in `layers`}. Several names are synonyms.
ACTIVATIONS = {
    'relu': 'relu', 'silu': 'silu', 'swish': 'silu', 'gelu': 'gelu',
    'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
    'gelu_accurate': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh',
    'gelu_python_tanh': 'gelu_tanh'}

# Fields that do not change the logits of any family in evaluation.
_HARMLESS = frozenset('''
    _attn_implementation _attn_implementation_autoset
    _attn_implementation_internal _auto_class _commit_hash
    _flash_attn_2_enabled _name_or_path _num_labels architectures
    attn_implementation auto_map custom_pipelines dtype finetuning_task
    gradient_checkpointing id2label is_llama_config keys_to_ignore_at_inference
    label2id max_sequence_length model_max_length model_type n_ctx n_special
    name_or_path num_labels output_attentions output_hidden_states output_past
    output_projection predict_special_tokens pretraining_tp problem_type
    return_dict task_specific_params tf_legacy_loss tie_encoder_decoder
    tie_last_hidden_states tokenizer_class torch_dtype torchscript
    transformers.js_config transformers_version transformers_weights
    unsloth_fixed unsloth_version use_bfloat16 use_cache use_return_dict

    activation_dropout attention_dropout attention_probs_dropout_prob
    attn_pdrop classifier_dropout dropout embd_pdrop hidden_dropout
    hidden_dropout_prob init_std initializer_factor initializer_range layerdrop
    resid_pdrop

    chunk_size_feed_forward cross_attention_hidden_size directionality
    is_decoder pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type reorder_and_upcast_attn summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj

    assistant_confidence_threshold assistant_lookbehind bad_words_ids
    begin_suppress_tokens cache_implementation diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty
    epsilon_cutoff eta_cutoff exponential_decay_length_penalty length_penalty
    max_length max_new_tokens min_length no_repeat_ngram_size
    num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores penalty_alpha prefix
    remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens target_lookbehind temperature top_k top_p typical_p
    '''.split())
_MOST_LAYERS = 10_000
_IDS = re.compile(r'.*_token_(id|ids|index)')  # Fields of special tokens.
# Fields that transformers reads in every family, with the supported values. The
# first of a tuple is the default.
_COMMON = {
    'attention_chunk_size': None,
    'compression_config': (None, {}),
    'configuration_files': (None, []),
    'fusion_config': (None, {}),
    'is_encoder_decoder': False,
    'per_layer_config': (None, {}),
    'pruned_heads': ({}, None),
    'quantization': (None, {}),
    'quantization_config': (None, {}),
}


class Fields:
  """Reads the fields of a ``config.json``, and records which of them were read.

  The methods return a default for a missing field. Callers pass the default
  that transformers has for this field in this family. A field whose value is
  null is not missing. The methods raise InputError for a value that is not
  supported.

  Attributes:
    family: The ``model_type`` of the file.
  """

  def __init__(self, hf: dict[str, Any], aliases: dict[str, str] | None = None
               ) -> None:
    """Reads the fields that all families share.

    Args:
      hf: Contents of ``config.json``.
      aliases: {alternative name of a field: its name}. Defaults to None, for no
        alternative names.

    Raises:
      InputError: If a field has a value that no family supports.
    """
    aliases = aliases or {}
    self.family: str = hf['model_type']
    named = {k: v for k, v in hf.items() if k not in aliases}
    # transformers sets alternative names last, so they take precedence.
    self._values = named | {aliases[k]: v for k, v in hf.items()
                            if k in aliases}
    self._read = set()
    self.only(**_COMMON)

  def get(self, name: str, default: Any = None) -> Any:
    """Returns the value of a field, or ``default`` if the file lacks it."""
    self._read.add(name)
    return self._values.get(name, default)

  def ignore(self, *names: str) -> None:
    """Marks fields that do not change the logits of this family."""
    self._read.update(names)

  def size(self, name: str, default: int, least: int = 1) -> int:
    """Returns a field that must be a whole number.

    Args:
      name: Name of the field.
      default: Value of a missing field.
      least: Inclusive lower bound. Defaults to 1.
    """
    value = self.get(name, default)
    # The number of layers is checked here, and not only in check_sizes, because
    # readers build lists of that length.
    most = _MOST_LAYERS if name in ('num_hidden_layers', 'n_layer') else 2**31
    if type(value) is not int or not least <= value < most:
      self.refuse(name, value, f'a whole number from {least} to {most - 1}')
    return value

  def maybe_size(self, name: str, default: int | None = None) -> int | None:
    """Returns a field that must be a positive whole number or null (None)."""
    value = self.get(name, default)
    return None if value is None else self.size(name, value)

  def head_size(self, width: int, name: str, default: int) -> int:
    """Returns the width of a head, which is the model's width divided by heads.

    If the number of heads does not divide the width, it raises InputError.

    Args:
      width: Width of the model.
      name: Name of the field with the number of heads.
      default: Number of heads if the field is missing.
    """
    heads = self.size(name, default)
    if width % heads:
      self.refuse(name, heads, f'a divisor of {width}, the width,')
    return width // heads

  def number(self, name: str, default: float) -> float:
    """Returns a field that must be a positive number."""
    value = self.get(name, default)
    if not _is_positive(value):
      self.refuse(name, value, 'a positive number')
    return value

  def maybe_number(self, name: str, default: float | None) -> float | None:
    """Returns a field that must be a positive number or null (None)."""
    value = self.get(name, default)
    return None if value is None else self.number(name, value)

  def flag(self, name: str, default: bool) -> bool:
    """Returns a field that must be true or false."""
    value = self.get(name, default)
    if type(value) is not bool:
      self.refuse(name, value, 'true or false')
    return value

  def activation(self, name: str, default: str) -> str:
    """Reads the name of an activation, and returns the one `layers` uses."""
    value = self.get(name, default)
    if not isinstance(value, str) or value not in ACTIVATIONS:
      self.refuse(name, value, ', '.join(ACTIVATIONS))
    return ACTIVATIONS[value]

  def only(self, **supported: Any) -> None:
    """Checks that fields have supported values.

    Args:
      **supported: The supported value of each field, or a tuple of values. The
        first one is the default of a missing field.
    """
    for name, values in supported.items():
      values = values if isinstance(values, tuple) else (values,)
      value = self.get(name, values[0])
      if value not in values:
        self.refuse(name, value, ' or '.join(map(repr, values)))

  def refuse(self, name: str, value: Any, supported: str) -> NoReturn:
    """Raises InputError for the value of a field.

    Args:
      name: Name of the field.
      value: The value that is not supported.
      supported: Description of the supported values.
    """
    raise InputError(f'{self.family} with {name}={_short(value)} is not '
                     f'supported; only {supported} is.')

  def check_rest(self) -> None:
    """Checks the fields that have not been read.

    If transformers' config class of this family declares such a field, it is
    newer than this reader and may change the model, so any value but its
    default is refused. If the class does not declare it, transformers ignores
    it, too; a warning names it, unless it is null or false.
    """
    rest = [name for name in self._values
            if name not in self._read | _HARMLESS and not _IDS.fullmatch(name)]
    if not rest:
      return
    declared = _declared(self.family)
    for name in rest:
      if name in declared and self._values[name] != declared[name]:
        self.refuse(name, self._values[name], repr(declared[name]))
    off = lambda value: value is None or value is False
    self.warn(name for name in rest if name not in declared
              and not off(self._values[name]))

  def warn(self, names: Iterable[str]) -> None:
    """Warns of fields that neither this library nor transformers reads."""
    names = ', '.join(sorted(names))
    if names:
      warnings.warn(
          f'the config.json of this {self.family} has fields that are ignored, '
          f'because transformers does not read them either: {names}',
          stacklevel=4)


def read_decoder(f: Fields, *, vocab: int, width: int, ff_width: int,
                 layers: int, heads: int, kv_heads: int | None, length: int,
                 eps: float, theta: float = 1e4,
                 ff_name: str = 'intermediate_size') -> dict[str, Any]:
  """Reads the fields that decoders like Llama share.

  Args:
    f: The fields of the file.
    vocab: Default size of the vocabulary.
    width: Default width.
    ff_width: Default width of the feed-forward part.
    layers: Default number of layers.
    heads: Default number of heads.
    kv_heads: Default number of key and value heads. None means that of heads.
    length: Default number of positions.
    eps: Default epsilon of norms.
    theta: Default base of rotary frequencies. Defaults to 10,000.
    ff_name: Name of the field with the width of the feed-forward part. Defaults
      to 'intermediate_size'.

  Returns:
    Arguments of `Config` by name.
  """
  f.only(is_causal=True)
  width = f.size('hidden_size', width)
  heads = f.size('num_attention_heads', heads)
  kv_heads = f.maybe_size('num_key_value_heads', kv_heads)
  length = f.size('max_position_embeddings', length)
  return dict(
      family=f.family, vocab_size=f.size('vocab_size', vocab), width=width,
      ff_width=f.size(ff_name, ff_width),
      num_layers=f.size('num_hidden_layers', layers), num_heads=heads,
      num_kv_heads=heads if kv_heads is None else kv_heads,
      head_width=f.maybe_size('head_dim') or width // heads, max_length=length,
      norm_eps=f.number('rms_norm_eps', eps),
      activation=f.activation('hidden_act', 'silu'),
      rope=read_rope(f, length, theta),
      tied_head=f.flag('tie_word_embeddings', False))


def _is_positive(value) -> bool:
  """Returns whether a value is a positive, finite number, and not a bool."""
  return (isinstance(value, int | float) and not isinstance(value, bool)
          and 0 < value < math.inf)


def _short(value) -> str:
  """Returns the repr of a value, cut to 80 characters."""
  text = repr(value)
  return text if len(text) < 80 else f'{text[:76]} ...'


def _declared(family: str) -> dict:
  """Returns {field: default} of transformers' config class for a family.

  It returns {} if transformers is not installed or has no such class.
  """
  try:
    # Imported here because it is slow, and only unusual files need it.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    fields = dataclasses.fields(CONFIG_MAPPING[family])
  except (ImportError, KeyError, TypeError):
    return {}
  return {f.name: None if f.default is dataclasses.MISSING else f.default
          for f in fields}


# --- layers with a window ---------------------------------------------------

_IS_LOCAL = {'full_attention': False, 'attention': False,
             'sliding_attention': True}


def read_local_layers(f: Fields, layers: int, default: tuple[bool, ...]
                      ) -> tuple[bool, ...]:
  """Reads which layers have a window from ``layer_types``, one flag per layer.

  Args:
    f: The fields of the file.
    layers: Number of layers.
    default: The flags if the field is missing or null.
  """
  kinds = f.get('layer_types')
  if kinds is None:
    return default
  if not isinstance(kinds, list) or len(kinds) != layers or not all(
      isinstance(kind, str) and kind in _IS_LOCAL for kind in kinds):
    f.refuse('layer_types', kinds, f'a list of {layers} (num_hidden_layers) '
             "of 'full_attention' and 'sliding_attention'")
  return tuple(_IS_LOCAL[kind] for kind in kinds)


# --- rotary positions -------------------------------------------------------

# {kind: the keys that it reads}. original_max_position_embeddings defaults to
# the model's number of positions.
_ROPE_KEYS = {
    'default': (), 'linear': ('factor',),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor',
               'original_max_position_embeddings')}


def read_rope(f: Fields, max_length: int, theta: float = 1e4) -> Rope:
  """Reads the rotary positions of a model in which all layers share them.

  ``rope_scaling`` and ``rope_parameters`` are two names of one dictionary. As
  in transformers, the first takes precedence, and ``rope_theta`` within the
  dictionary takes precedence over the field of that name.

  Args:
    f: The fields of the file.
    max_length: Number of positions of the model.
    theta: Base of the frequencies if the file has none. Defaults to 10,000.
  """
  scaling, parameters = f.get('rope_scaling'), f.get('rope_parameters')
  where = 'rope_scaling' if scaling else 'rope_parameters'
  # transformers has this field for Phi 3, but reads it in every family. It
  # takes precedence over the key in the dictionary.
  original = f.maybe_size('original_max_position_embeddings')
  inside = scaling or parameters or {}
  _check_dict(f, where, inside)
  if any(isinstance(value, dict) for value in inside.values()):
    f.refuse(where, inside, 'one dictionary for all layers')
  if original is not None and inside.get('rope_type', inside.get(
      'type')) == 'llama3':
    inside = inside | {'original_max_position_embeddings': original}
  return _rope(f, where, inside, f.get('rope_theta', theta), max_length)


def read_ropes(f: Fields, max_length: int, theta: float, local_theta: float
               ) -> tuple[Rope, Rope]:
  """Reads the rotary positions of a model with two kinds of layers.

  ``rope_parameters`` has a dictionary for each kind. The older fields
  ``rope_scaling``, ``rope_theta`` and ``rope_local_base_freq`` complete them.

  Args:
    f: The fields of the file.
    max_length: Number of positions of the model.
    theta: Base of the frequencies in full layers if the file has none.
    local_theta: Base of the frequencies in layers with a window if the file has
      none.

  Returns:
    ``rope, local_rope``: the first for layers with full attention, the second
    for layers with a window.
  """
  parameters, scaling = f.get('rope_parameters'), f.get('rope_scaling')
  kinds = ('full_attention', 'sliding_attention')
  if parameters is None:
    parameters = {kind: {'rope_type': 'default'} for kind in kinds}
  if not isinstance(parameters, dict) or not {*parameters} <= {*kinds}:
    f.refuse('rope_parameters', parameters,
             f'a dictionary for each of {" and ".join(kinds)}')
  full, local = (parameters.get(kind) or {} for kind in kinds)
  if scaling:
    _check_dict(f, 'rope_scaling', scaling)
    full = full | scaling
  return (_rope(f, 'rope_parameters', full, f.get('rope_theta', theta),
                max_length),
          _rope(f, 'rope_parameters', local,
                f.get('rope_local_base_freq', local_theta), max_length))


def _check_dict(f: Fields, name: str, value) -> None:
  """Raises InputError if the value of a field is not a dictionary."""
  if not isinstance(value, dict):
    f.refuse(name, value, 'null or a dictionary')


def _rope(f: Fields, where: str, given: dict, theta: float,
          max_length: int) -> Rope:
  """Reads one dictionary of rotary positions.

  Args:
    f: The fields of the file.
    where: Name of the field that has the dictionary, for errors.
    given: The dictionary.
    theta: Base of the frequencies if the dictionary has none.
    max_length: Number of positions of the model.
  """
  _check_dict(f, where, given)
  kind = given.get('rope_type', given.get('type', 'default'))
  if not isinstance(kind, str) or kind not in _ROPE_KEYS:
    raise InputError(
        f'{f.family} with rope scaling {kind!r} in {where} is not supported; '
        f'the supported ones are {", ".join(map(repr, _ROPE_KEYS))}.')
  # Rotating only a part of each head is not supported in any family.
  f.only(partial_rotary_factor=(None, 1))
  if given.get('partial_rotary_factor', 1) != 1:
    f.refuse(f'{where}.partial_rotary_factor', given['partial_rotary_factor'],
             '1')
  values = {'original_max_position_embeddings': max_length} | given
  theta = given.get('rope_theta', theta)
  if not _is_positive(theta):
    f.refuse('rope_theta', theta, 'a positive number')
  for name in _ROPE_KEYS[kind]:
    if not _is_positive(values.get(name)):
      f.refuse(f'{where}.{name}', values.get(name), 'a positive number')
  f.warn(f'{where}.{name}' for name in given if name not in (
      'type', 'rope_type', 'rope_theta', 'partial_rotary_factor',
      *_ROPE_KEYS[kind]))
  if kind == 'default':
    return Rope(theta)
  if kind == 'linear':
    return Rope(theta, kind, values['factor'])
  factor, low, high, original = (values[k] for k in _ROPE_KEYS['llama3'])
  if not low < high:
    f.refuse(f'{where}.high_freq_factor', high, 'more than low_freq_factor')
  return Rope(theta, kind, factor, low, high, original)


# --- sizes ------------------------------------------------------------------

# Exclusive upper bounds of sizes; 2**31 for those that are not listed.
_MOST: dict[str, int] = {'num_layers': _MOST_LAYERS}


def check_sizes(config: Config, path: Any) -> None:
  """Checks the sizes of a config before memory is allocated for them.

  Args:
    config: The config.
    path: Path of its file, for errors.

  Raises:
    InputError: If a size is out of range, or sizes contradict each other.
  """
  for field in ('vocab_size', 'width', 'ff_width', 'num_layers', 'num_heads',
                'num_kv_heads', 'head_width', 'max_length'):
    value: Any = getattr(config, field)
    most = _MOST[field] if field in _MOST else 2**31
    if type(value) is not int or not 0 < value < most:
      raise InputError(f'{path}: {field} would be {value!r}, but must be a '
                       f'whole number from 1 to {most - 1}.')
  if config.num_heads % config.num_kv_heads:
    raise InputError(
        f'{path}: num_attention_heads ({config.num_heads}) must be a multiple '
        f'of num_key_value_heads ({config.num_kv_heads}).')
  if config.rope and config.head_width % 2:
    raise InputError(f'{path}: the width of a head (head_dim) is '
                     f'{config.head_width}, but must be even for rotary '
                     'positions.')
  ropes = [r for r in (config.rope, config.local_rope) if r]
  for what, value in (('the epsilon of norms', config.norm_eps), *(
      (f'{f.name} of rotary positions', getattr(r, f.name))
      for r in ropes for f in dataclasses.fields(r) if f.name != 'kind')):
    if not _is_positive(value):
      raise InputError(f'{path}: {what} would be {value!r}, but must be a '
                       'positive number.')
