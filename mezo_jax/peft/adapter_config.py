"""Checks and interprets the fields of PEFT's adapter_config.json.

Each known field is in one of three groups. The fields in `_READ` are used. The
fields in `_UNUSED` and `_ALWAYS_UNUSED` have no effect on a trained adapter.
The fields in `_REFUSED` change what the adapter computes and are not supported.

A field outside of these groups raises an error unless its value is empty. A
field that a later version of PEFT adds is therefore never ignored in silence.
"""

import math
import re
from typing import Any

from mezo_jax.core.errors import InputError

# A field that only this library writes; PEFT does not know it. `PLACES` are its
# values; see `mezo_jax.models.Transformer`.
POSITIONS = 'prefix_positions'
PLACES = ('zero', 'after')

_READ = {
    'LORA': {
        'peft_type', 'task_type', 'r', 'lora_alpha', 'use_rslora',
        'rank_pattern', 'alpha_pattern', 'target_modules', 'exclude_modules',
        'layers_to_transform', 'layers_pattern', 'init_lora_weights', 'bias'},
    'PREFIX_TUNING': {
        'peft_type', 'task_type', 'num_virtual_tokens', 'token_dim',
        'num_attention_heads', 'num_layers', 'num_transformer_submodules',
        POSITIONS},
    'PROMPT_TUNING': {
        'peft_type', 'task_type', 'num_virtual_tokens', 'token_dim',
        'num_transformer_submodules'},
}
# These fields record where the adapter came from and how it was trained. They
# do not change what a trained adapter computes.
_ALWAYS_UNUSED = {
    'base_model_name_or_path', 'revision', 'inference_mode', 'auto_mapping',
    'peft_version'}
_UNUSED = {
    # PEFT corrects fan_in_fan_out to match the layer. It uses loftq_config,
    # eva_config, corda_config and lora_ga_config only in the initialisation of
    # the same name, qalora_group_size only with use_qalora, and megatron_core
    # only with megatron_config. ensure_weight_tying concerns adapters of
    # embeddings, whose tensors are refused when they are read.
    'LORA': {
        'lora_dropout', 'fan_in_fan_out', 'loftq_config', 'eva_config',
        'corda_config', 'lora_ga_config', 'qalora_group_size', 'megatron_core',
        'ensure_weight_tying', 'runtime_config'},
    # PEFT uses encoder_hidden_size only with prefix_projection.
    'PREFIX_TUNING': {'init_weights', 'encoder_hidden_size'},
    'PROMPT_TUNING': {
        'prompt_tuning_init', 'prompt_tuning_init_text',
        'tokenizer_name_or_path', 'tokenizer_kwargs', 'num_layers',
        'num_attention_heads'},
}
# Initialisations that leave the base model unchanged. PEFT's other ones
# ('pissa', 'olora', 'corda', 'loftq', 'lora_ga') subtract the new adapter from
# the base weights, so the trained adapter fits only the modified weights.
_PLAIN_STARTS = ('gaussian', 'eva', 'orthogonal', 'mica')


def check(about: dict[str, Any], file: Any) -> None:
  """Checks that this library computes with an adapter what PEFT computes.

  Args:
    about: Contents of adapter_config.json. Its peft_type must be supported.
    file: Name of the file, for error messages.

  Raises:
    InputError: If a field that changes what the adapter computes is not
      supported, or has a value that PEFT does not write.
  """
  kind = about['peft_type']
  values = _LORA if kind == 'LORA' else _VIRTUAL
  for name, fits in values.items():
    if name in about and not fits(about[name]):
      raise InputError(f'{file}: {name} is {about[name]!r}, which is not '
                       'supported, or not a value that PEFT writes.')
  known = _READ[kind] | _UNUSED[kind] | _ALWAYS_UNUSED
  for name, value in about.items():
    if name in known or not value:
      continue
    if name in _REFUSED:
      raise InputError(f'{file}: {name} is {value!r}, which is not supported '
                       'and changes what the adapter computes.')
    raise InputError(
        f'{file}: unknown field {name!r} with the value {value!r}. Delete the '
        'field if it does not change what the adapter computes.')
  if kind == 'LORA':
    _check_start(about.get('init_lora_weights', True), file)


def _check_start(start, file) -> None:
  """Checks that the initialisation left the base model unchanged.

  Args:
    start: Value of init_lora_weights.
    file: Name of the file, for the error message.

  Raises:
    InputError: If the initialisation modified the base model or is unknown.
  """
  plain = isinstance(start, bool) or (
      isinstance(start, str) and start.lower() in _PLAIN_STARTS)
  if not plain:
    raise InputError(
        f'{file}: init_lora_weights is {start!r}, so the adapter was trained '
        'on weights that differ from the base model. Save it with '
        "PEFT's path_initial_model_for_weight_conversion, which converts it to "
        'plain LoRA, or merge it into its model with PEFT.')


def rank(about: dict[str, Any], module: str) -> int:
  """Returns the rank of the adapter of a module, as PEFT determines it.

  Args:
    about: Contents of adapter_config.json.
    module: Full name of the module in the base model.
  """
  return _by_pattern(about.get('rank_pattern'), module, about.get('r', 8))


def alpha(about: dict[str, Any], module: str) -> float:
  """Returns the alpha of the adapter of a module, as PEFT determines it.

  Args:
    about: Contents of adapter_config.json.
    module: Full name of the module in the base model.
  """
  return _by_pattern(
      about.get('alpha_pattern'), module, about.get('lora_alpha', 8))


def _by_pattern(patterns: dict | None, module: str, otherwise):
  """Returns the value of the first pattern that matches the end of a name.

  Args:
    patterns: Values by regular expression, or None.
    module: Full name of a module.
    otherwise: Value if no pattern matches.
  """
  for pattern, value in (patterns or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', module):
      return value
  return otherwise


def targets(about: dict[str, Any], module: str) -> bool:
  """Returns whether PEFT puts a LoRA adapter on a module.

  PEFT ignores the tensors of other modules.

  Args:
    about: Contents of adapter_config.json.
    module: Full name of the module in the base model.
  """
  if _named(about.get('exclude_modules') or [], module):
    return False
  wanted = about.get('target_modules')
  if isinstance(wanted, str) and wanted.lower() == 'all-linear':
    return True
  if not _named(wanted or [], module):
    return False
  layers = about.get('layers_to_transform')
  if isinstance(wanted, str) or layers is None or layers == []:
    return True
  patterns = about.get('layers_pattern') or [r'[^.]*']
  if isinstance(patterns, str):
    patterns = [patterns]
  layers = [layers] if isinstance(layers, int) else layers
  # As in PEFT, the first number between dots is the layer. Without
  # layers_pattern, the list of layers must be inside another module, as in
  # 'model.layers.0'; with it, the name may begin with the list.
  before = r'.*?\.' if not about.get('layers_pattern') else r'(?:^|.*?\.)'
  for pattern in patterns:
    match = re.match(rf'{before}{pattern}\.(?P<index>\d+)\.', module)
    if match:
      return int(match['index']) in layers
  return False


def _named(names: str | list, module: str) -> bool:
  """Returns whether names refer to a module, as PEFT matches them.

  Args:
    names: Regular expression of the full name, or list of ends of names.
    module: Full name of a module.
  """
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(f'.{module}'.endswith(f'.{name}') for name in names)


# --- values -----------------------------------------------------------------
# The predicates below tell whether a value from JSON is valid for a field.


# `type` instead of `isinstance`, because a bool is an int in Python.
def _is_number(x) -> bool:
  """Returns whether x is a finite number."""
  return type(x) in (int, float) and math.isfinite(x)


def _is_count(x) -> bool:
  """Returns whether x is a positive integer."""
  return type(x) is int and x >= 1


def _is_expression(x) -> bool:
  """Returns whether x is a valid regular expression."""
  if not isinstance(x, str):
    return False
  try:
    re.compile(x)
    return True
  except re.error:
    return False


def _is_names(x) -> bool:
  """Returns whether x may name modules in a config of PEFT.

  PEFT takes a regular expression, a list of ends of names, or None.
  """
  return x is None or _is_expression(x) or (
      isinstance(x, list) and all(isinstance(name, str) for name in x))


def _are_expressions(x) -> bool:
  """Returns whether x is a regular expression, a list of them, or None."""
  several = x if isinstance(x, list) else [x]
  return x is None or all(map(_is_expression, several))


def _is_pattern_of(fits):
  """Returns a predicate of dicts from regular expressions to valid values."""
  return lambda x: x is None or isinstance(x, dict) and all(
      _is_expression(k) and fits(v) for k, v in x.items())


def _are_layers(x) -> bool:
  """Returns whether x is an integer, a list of integers, or None."""
  several = x if isinstance(x, list) else [x]
  return x is None or all(type(layer) is int for layer in several)


_LORA = {
    'r': _is_count,
    'lora_alpha': _is_number,
    'use_rslora': lambda x: x is None or isinstance(x, bool),
    'rank_pattern': _is_pattern_of(_is_count),
    'alpha_pattern': _is_pattern_of(_is_number),
    'target_modules': lambda x: x is not None and _is_names(x),
    'exclude_modules': _is_names,
    'layers_to_transform': _are_layers,
    'layers_pattern': _are_expressions,
    'bias': lambda x: x in (None, 'none'),
}
_VIRTUAL = {
    'num_virtual_tokens': _is_count,
    # PEFT writes 2 for models with an encoder and a decoder.
    'num_transformer_submodules': lambda x: x in (None, 1),
    POSITIONS: lambda x: x in PLACES,
}
# Fields that change what the adapter computes and that are not supported.
_REFUSED = {
    'use_dora', 'modules_to_save', 'trainable_token_indices', 'lora_bias',
    'megatron_config', 'velora_config', 'alora_invocation_tokens', 'use_qalora',
    'monteclora_config', 'layer_replication', 'target_parameters',
    'use_bdlora', 'arrow_config', 'kasa_config', 'prefix_projection'}
