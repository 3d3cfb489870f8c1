"""The fields of PEFT's adapter_config.json: which are read, which have no
effect on a trained adapter, and which are refused because they change what it
computes.

A field that is in neither table is refused by name unless it is empty, so a
field of a later version of PEFT is never ignored in silence.
"""

import math
import re
from typing import Any

from mezo_jax.core.errors import InputError

POSITIONS = 'prefix_positions'  # A field of our own; PEFT does not know it.
PLACES = ('zero', 'after')  # Its values; see `mezo_jax.models.Transformer`.

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
# Where the adapter came from and how it was trained or started; a trained
# adapter computes the same whatever these say.
_ALWAYS_UNUSED = {
    'base_model_name_or_path', 'revision', 'inference_mode', 'auto_mapping',
    'peft_version'}
_UNUSED = {
    # fan_in_fan_out: PEFT corrects it to what the layer is. loftq_config,
    # eva_config, corda_config and lora_ga_config: used by the initialisation
    # of the same name alone. qalora_group_size and megatron_core: used with
    # use_qalora and megatron_config alone. ensure_weight_tying: of adapters of
    # embeddings, whose tensors are refused.
    'LORA': {
        'lora_dropout', 'fan_in_fan_out', 'loftq_config', 'eva_config',
        'corda_config', 'lora_ga_config', 'qalora_group_size', 'megatron_core',
        'ensure_weight_tying', 'runtime_config'},
    # encoder_hidden_size: used with prefix_projection alone.
    'PREFIX_TUNING': {'init_weights', 'encoder_hidden_size'},
    'PROMPT_TUNING': {
        'prompt_tuning_init', 'prompt_tuning_init_text',
        'tokenizer_name_or_path', 'tokenizer_kwargs', 'num_layers',
        'num_attention_heads'},
}
# Initialisations that leave the base model as it is. The others of PEFT
# ('pissa', 'olora', 'corda', 'loftq', 'lora_ga') subtract the new adapter from
# its weights, and the adapter is trained on what is left.
_PLAIN_STARTS = ('gaussian', 'eva', 'orthogonal', 'mica')


def check(about: dict[str, Any], file: Any) -> None:
  """Checks that an adapter computes what its config says.

  Args:
    about: The contents of adapter_config.json, with a peft_type that is
      supported.
    file: The file's name, for the message.

  Raises:
    InputError: if a field that changes what the adapter computes is not
      supported, or has a value that PEFT does not write.
  """
  kind = about['peft_type']
  values = _LORA if kind == 'LORA' else _VIRTUAL
  for name, fits in values.items():
    if name in about and not fits(about[name]):
      raise InputError(f'{file}: {name} is {about[name]!r}, which PEFT does '
                       'not write, or which is not supported.')
  known = _READ[kind] | _UNUSED[kind] | _ALWAYS_UNUSED
  for name, value in about.items():
    if name in known or not value:
      continue
    if name in _REFUSED:
      raise InputError(f'{file}: {name} is {value!r}, which changes what the '
                       'adapter computes and is not supported.')
    raise InputError(
        f'{file}: the field {name!r} is {value!r} and not known to this '
        'version. If it does not change what the adapter computes, delete it '
        'from the file.')
  if kind == 'LORA':
    _check_start(about.get('init_lora_weights', True), file)


def _check_start(start, file) -> None:
  plain = isinstance(start, bool) or (
      isinstance(start, str) and start.lower() in _PLAIN_STARTS)
  if not plain:
    raise InputError(
        f'{file}: init_lora_weights is {start!r}: the adapter was trained on '
        'weights that differ from those of the base model. Save it with '
        "PEFT's path_initial_model_for_weight_conversion, which makes it a "
        'plain LoRA, or merge it into its model with PEFT.')


def rank(about: dict[str, Any], module: str) -> int:
  """Returns the rank that PEFT gives to the adapter of a module."""
  return _by_pattern(about.get('rank_pattern'), module, about.get('r', 8))


def alpha(about: dict[str, Any], module: str) -> float:
  """Returns the alpha that PEFT gives to the adapter of a module."""
  return _by_pattern(
      about.get('alpha_pattern'), module, about.get('lora_alpha', 8))


def _by_pattern(patterns: dict | None, module: str, otherwise):
  for pattern, value in (patterns or {}).items():
    if re.match(rf'(.*\.)?({pattern})$', module):
      return value
  return otherwise


def targets(about: dict[str, Any], module: str) -> bool:
  """Returns whether PEFT puts an adapter on a module, of this full name.

  PEFT ignores tensors of modules for which this is false.
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
  # As in PEFT, a layer's number is the first one in the name, and without a
  # pattern something must come before the list of layers.
  before = r'.*?\.' if not about.get('layers_pattern') else r'(?:^|.*?\.)'
  for pattern in patterns:
    match = re.match(rf'{before}{pattern}\.(?P<index>\d+)\.', module)
    if match:
      return int(match['index']) in layers
  return False


def _named(names: str | list, module: str) -> bool:
  if isinstance(names, str):
    return re.fullmatch(names, module) is not None
  return any(f'.{module}'.endswith(f'.{name}') for name in names)


# --- values -----------------------------------------------------------------


def _is_number(x) -> bool:
  return type(x) in (int, float) and math.isfinite(x)


def _is_count(x) -> bool:
  return type(x) is int and x >= 1


def _is_expression(x) -> bool:
  if not isinstance(x, str):
    return False
  try:
    re.compile(x)
    return True
  except re.error:
    return False


def _is_names(x) -> bool:
  """Returns whether x is what PEFT has for names of modules: one expression, a
  list of ends of names, or None."""
  return x is None or _is_expression(x) or (
      isinstance(x, list) and all(isinstance(name, str) for name in x))


def _are_expressions(x) -> bool:
  several = x if isinstance(x, list) else [x]
  return x is None or all(map(_is_expression, several))


def _is_pattern_of(fits):
  return lambda x: x is None or isinstance(x, dict) and all(
      _is_expression(k) and fits(v) for k, v in x.items())


def _are_layers(x) -> bool:
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
    # 2 are the encoder and the decoder of a model that has both.
    'num_transformer_submodules': lambda x: x in (None, 1),
    POSITIONS: lambda x: x in PLACES,
}
# Fields of PEFT that are known to change the result and are not supported.
_REFUSED = {
    'use_dora', 'modules_to_save', 'trainable_token_indices', 'lora_bias',
    'megatron_config', 'velora_config', 'alora_invocation_tokens', 'use_qalora',
    'monteclora_config', 'layer_replication', 'target_parameters',
    'use_bdlora', 'arrow_config', 'kasa_config', 'prefix_projection'}
