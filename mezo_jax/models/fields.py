"""What the readers of several families ask of a ``config.json``."""

import dataclasses

from mezo_jax.errors import InputError
from mezo_jax.models.layers import Config, Rope

ACTIVATIONS = {  # Hugging Face's names
    'relu': 'relu', 'silu': 'silu', 'swish': 'silu', 'gelu': 'gelu',
    'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh'}


def only(hf: dict, family: str, **supported) -> None:
  """Refuses fields whose value is not the one (or of those) that we cover.

  Raises:
    ValueError: with the field, its value and the supported one.
  """
  for field, values in supported.items():
    values = values if isinstance(values, tuple) else (values,)
    if hf.get(field, values[0]) not in values:
      raise InputError(
          f'{family} with {field}={hf[field]!r} is not supported; only '
          f'{" or ".join(map(repr, values))} is.')


def activation(hf: dict, family: str, field: str, default: str) -> str:
  """Our name of the activation.

  Raises:
    ValueError: for one that we do not have.
  """
  name = hf.get(field, default)
  if name not in ACTIVATIONS:
    raise InputError(f'{family} with {field}={name!r} is not supported; '
                     f'{", ".join(ACTIVATIONS)} are.')
  return ACTIVATIONS[name]


def read_rope(hf: dict, family: str, theta: float = 1e4,
              kind_of_layer: str = '') -> Rope:
  """Rotary positions: ``rope_parameters``, or ``rope_theta`` and ``_scaling``.

  Args:
    hf: the config.
    family: for the error.
    theta: where the file does not say.
    kind_of_layer: the entry to read, where there is one for each kind of layer.

  Raises:
    ValueError: for a scaling that we do not have.
  """
  new = hf.get('rope_parameters') or {}
  new = new.get(kind_of_layer, new)
  s = new or hf.get('rope_scaling') or {}
  theta = new.get('rope_theta') or hf.get('rope_theta') or theta
  kind = s.get('rope_type', s.get('type', 'default'))
  if kind == 'default':
    return Rope(theta)
  if kind == 'linear':
    return Rope(theta, kind, s['factor'])
  if kind == 'llama3':
    return Rope(theta, kind, s['factor'], s['low_freq_factor'],
                s['high_freq_factor'], s['original_max_position_embeddings'])
  raise InputError(f"{family} with rope scaling {kind!r} is not supported; "
                   "'linear' and 'llama3' are.")


_MOST = {'num_layers': 10_000}  # of all other sizes 2**31


def check_sizes(config: Config, path) -> None:
  """Raises InputError for sizes that no model has, before they take memory."""
  for field in ('vocab_size', 'width', 'ff_width', 'num_layers', 'num_heads',
                'num_kv_heads', 'head_width', 'max_length'):
    value, most = getattr(config, field), _MOST.get(field, 2**31)
    if type(value) is not int or not 0 < value < most:
      raise InputError(f'{path}: {field} would be {value!r}, which is no whole '
                       f'number from 1 to {most}.')
  ropes = [r for r in (config.rope, config.local_rope) if r]
  for what, value in (('the epsilon of norms', config.norm_eps), *(
      (f'{f.name} of rotary positions', getattr(r, f.name))
      for r in ropes for f in dataclasses.fields(r) if f.name != 'kind')):
    if value is not None and not (
        isinstance(value, int | float) and 0 < value < float('inf')):
      raise InputError(f'{path}: {what} would be {value!r}, which is no '
                       'positive number.')
