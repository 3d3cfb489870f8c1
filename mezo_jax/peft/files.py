"""Reads and writes adapters as directories of Hugging Face's PEFT.

``adapter_config.json`` describes the adapter. ``adapter_model.safetensors``
contains the matrices of LoRA under the names of the base model's modules, the
keys and values of a prefix, or the vectors of a soft prompt.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open, SafetensorError
from safetensors.numpy import save_file

from mezo_jax.core.errors import InputError, MissingError
from mezo_jax.models.families.table import Row
from mezo_jax.models.formats import classifier, huggingface
from mezo_jax.models.formats.save import (
  new_directory,
  num_classes,
  on_host,
  save_tokenizer,
)
from mezo_jax.models.layers import apply_rope, Config, rope_tables
from mezo_jax.models.transformer import prefix_length, Transformer
from mezo_jax.peft import adapter_config, lora

_FILE = 'adapter_model.safetensors'
_TOP = 'base_model.model.'
# Modules that are the classification head in transformers' classes. In causal
# models it is 'score'.
_HEADS = {'bert': ['classifier', 'pooler'], 'roberta': ['classifier']}
_KINDS = {'LORA': 'lora', 'PREFIX_TUNING': 'prefix', 'PROMPT_TUNING': 'prompt'}


def save(directory: str | os.PathLike[str], model: Transformer,
         params: dict[str, Any], *, base: str = '', tokenizer: Any = None,
         card: str | None = None, files: Mapping[str, bytes] = {}) -> Path:
  """Writes the adapters in some parameters so that PEFT can load them.

  On several hosts every process must call this function.

  The queries, keys and values of a GPT-2 are one matrix in PEFT. Their LoRA
  adapters are written as one adapter whose rank is the sum of theirs, which
  computes the same.

  PEFT cannot compute two kinds of adapters. One is a prefix or a prompt of a
  masked model, which PEFT would ignore. The other is a prefix of a model with
  learned positions, if the first token after the prefix has position 0. Both
  are written with a task type that PEFT does not know, so that PEFT refuses to
  load them. `load` reads them.

  Args:
    directory: Directory to create. It may exist if it is empty.
    model: Model of the adapters.
    params: Parameters with LoRA, a prefix or a soft prompt. Other leaves are
      not written, apart from a classification head.
    base: Name or path of the base model, by which PEFT finds it. Defaults to
      '', which leaves it out.
    tokenizer: Tokenizer to save with the adapter. Defaults to None.
    card: Text of README.md. Defaults to None, which writes no such file.
    files: Contents of further files to write, by name. Defaults to none.

  Returns:
    The directory.

  Raises:
    FileExistsError: If the directory exists and is not empty.
    InputError: If there is no adapter, or if PEFT cannot combine it with the
      classification head.
  """
  c, classes = model.config, num_classes(params)
  if classes:
    classifier.check_head(c)
    if 'prompt' in params or prefix_length(params):
      raise InputError('PEFT has no adapter of a prefix or a prompt with a '
                       'classification head; only LoRA can be saved with one.')
    # PEFT wraps transformers' class with a head. Its module names apply even if
    # the model was loaded from files without a head.
    c = dataclasses.replace(c, head=True)
  if 'prompt' in params:
    rows = _host(params['prompt']['embedding'])
    tensors, about = {'prompt_embeddings': rows}, _virtual(
        'PROMPT_TUNING', c, len(rows)) | {
            'token_dim': rows.shape[1], 'num_attention_heads': c.num_heads}
  elif prefix_length(params):
    tensors, about = _prefix_tensors(model, params['layers']['attn'])
  else:
    tensors, about = _lora_tensors(c, params)
  about |= {'base_model_name_or_path': str(base) or None,
            'inference_mode': True,
            'task_type': _task_type(about, c, classes)}
  if classes:
    tensors |= _head_tensors(c, params, classes)
    about['modules_to_save'] = _HEADS.get(c.family, ['score'])
  with new_directory(directory) as (part, _):
    if part is not None:
      save_file(tensors, part / _FILE, {'format': 'pt'})
      (part / 'adapter_config.json').write_text(
          json.dumps(about, indent=2, sort_keys=True) + '\n')
      if tokenizer is not None:
        save_tokenizer(part, tokenizer)
      if card is not None:
        (part / 'README.md').write_text(card)
      for name, content in files.items():
        (part / name).write_bytes(content)
  return Path(directory).expanduser()


def _task_type(about: dict, c: Config, classes: int) -> str | None:
  """Returns the task type with which PEFT computes what this library computes.

  If no type does, the result is one that PEFT does not know. PEFT then refuses
  to load the adapter instead of computing something else.
  """
  lora = about['peft_type'] == 'LORA'
  if adapter_config.POSITIONS in about or not (lora or c.causal):
    return 'MEZO_JAX'
  if classes:
    return 'SEQ_CLS'
  if c.causal and c.head:
    return 'CAUSAL_LM'
  # Without a task type PEFT applies LoRA, but loads a prefix or a prompt and
  # then ignores it.
  return None if lora else 'FEATURE_EXTRACTION'


def _head_tensors(c: Config, params: dict, classes: int) -> dict:
  """Returns the tensors of a classification head under PEFT's names."""
  flat = flatten_dict(params, sep='/')
  return {_TOP + row.name: np.ascontiguousarray(row.write(
      _host(flat[row.path]))) for row in classifier.head(c, classes)}


def _host(x) -> np.ndarray:
  """Returns an array in the memory of the host, in float32."""
  return np.asarray(on_host(x), np.float32)


def load(directory: str | os.PathLike[str], model: Transformer
         ) -> tuple[Transformer, dict[str, Any], str]:
  """Reads an adapter that `save` or PEFT wrote.

  Args:
    directory: Directory with ``adapter_config.json`` and
      ``adapter_model.safetensors``.
    model: Model of the adapter.

  Returns:
    A tuple ``(model, adapters, kind)``. For a prefix, the model counts
    positions as in the training of the prefix; otherwise it is unchanged.
    `mezo_jax.peft.join` adds the adapters, a nested dict of float32 arrays, to
    the parameters. The kind is 'lora', 'prefix' or 'prompt'.

  Raises:
    FileNotFoundError: If a file is missing.
    InputError: If a file cannot be read, the kind of adapter or an option is
      not supported, or the tensors do not fit the model.
  """
  directory, c = Path(directory), model.config
  kind, about = describe(directory)
  try:
    with safe_open(directory / _FILE, 'numpy') as f:
      tensors = {name: f.get_tensor(name) for name in f.keys()}
  except (SafetensorError, TypeError) as e:
    raise InputError(f'cannot read {directory / _FILE} ({e}).') from e
  if kind == 'lora':
    return model, _lora_leaves(c, about, tensors, directory), kind
  found = tensors.get('prompt_embeddings', np.zeros((0, 0)))
  m, width = found.shape if found.ndim == 2 else (0, 0)
  of = {'prefix': 2 * c.num_layers * c.num_kv_heads * c.head_width,
        'prompt': c.embed_width or c.width}[kind]
  if not m or width != of:
    raise InputError(
        f'{directory} does not fit the model: prompt_embeddings has shape '
        f'{found.shape} instead of (tokens, {of}).')
  _check_virtual(kind, about, c, m, directory)
  found = jnp.asarray(found, jnp.float32)
  if kind == 'prompt':
    return model, {'prompt': {'embedding': found}}, kind
  k, v = jnp.moveaxis(found.reshape(
      m, c.num_layers, 2, c.num_kv_heads, c.head_width), (1, 2), (1, 0))
  positions = about.get(adapter_config.POSITIONS, 'after')
  return model.clone(prefix_positions=positions), {
      'layers': {'attn': {'prefix_k': k, 'prefix_v': v}}}, kind


def files_of(directory: str | os.PathLike[str]) -> tuple[Path, Path]:
  """Returns the paths of adapter_config.json and adapter_model.safetensors.

  Args:
    directory: Directory of an adapter.

  Raises:
    FileNotFoundError: If one of the files is missing.
  """
  found = Path(directory) / 'adapter_config.json', Path(directory) / _FILE
  for file in found:
    if not file.is_file():
      raise MissingError(
          f'{directory} has no {file.name}; give the directory of an adapter '
          'that PEFT saved as safetensors.')
  return found


def describe(directory: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
  """Reads and checks the config of an adapter.

  Args:
    directory: Directory of the adapter.

  Returns:
    A pair ``(kind, about)``: 'lora', 'prefix' or 'prompt', and the contents of
    adapter_config.json.

  Raises:
    FileNotFoundError: If a file is missing.
    InputError: If the config is not JSON, or if the kind of adapter or one of
      its options is not supported.
  """
  directory = Path(directory)
  config_file, _ = files_of(directory)
  try:
    about = json.loads(config_file.read_text())
  except ValueError as e:
    raise InputError(f'{directory}/adapter_config.json is not valid JSON '
                     f'({e}).') from e
  about = about if isinstance(about, dict) else {}
  name = about.get('peft_type')
  if not isinstance(name, str) or name not in _KINDS:
    raise InputError(f'{directory}/adapter_config.json: unsupported peft_type '
                     f'{name!r}; use one of {", ".join(_KINDS)}.')
  adapter_config.check(about, directory / 'adapter_config.json')
  return _KINDS[name], about


# --- prefixes ---------------------------------------------------------------


def _virtual(peft_type: str, c: Config, m: int) -> dict:
  """Returns the fields that the configs of prefixes and prompts share.

  Args:
    peft_type: PEFT's name of the kind of adapter.
    c: Config of the model.
    m: Number of virtual tokens.
  """
  return {'peft_type': peft_type, 'num_virtual_tokens': m,
          'num_layers': c.num_layers, 'num_transformer_submodules': 1}


def _prefix_tensors(model: Transformer, attn: dict):
  """Returns PEFT's tensor and config of a prefix.

  PEFT gives the first token after a prefix of M tokens the position M. If it
  has position 0 in this model, M is added to the positions of the prefix's
  rotary keys. Rotary attention depends only on the distances between keys and
  tokens, which then stay the same. With learned positions no such correction is
  possible, and the config records the positions in a field of its own.

  Args:
    model: Model of the prefix.
    attn: Dict with ``prefix_k`` and ``prefix_v`` [L, M, K, H].
  """
  c, (k, v) = model.config, (_host(attn[f'prefix_{x}']) for x in 'kv')
  m, positions = k.shape[1], model.prefix_positions
  if positions == 'zero' and c.rope:
    k, positions = _turned(c, k, m), 'after'
  both = np.stack([k, v])  # [2, L, M, K, H]
  own = {} if positions == 'after' else {adapter_config.POSITIONS: positions}
  return {'prompt_embeddings': np.ascontiguousarray(
      np.moveaxis(both, 2, 0).swapaxes(1, 2).reshape(m, -1))}, _virtual(
          'PREFIX_TUNING', c, m) | {
              'token_dim': c.num_kv_heads * c.head_width,
              'num_attention_heads': c.num_kv_heads,
              'encoder_hidden_size': c.num_kv_heads * c.head_width,
              'prefix_projection': False} | own


def _turned(c: Config, k_LxMxKxH, by: int) -> np.ndarray:
  """Applies rotary embeddings to keys, as if their positions were larger.

  Args:
    c: Config of the model.
    k_LxMxKxH: Keys, float32 [L, M, K, H].
    by: Number of positions to add.
  """
  local = c.local_layers or (False,) * c.num_layers
  at = jnp.full((1, k_LxMxKxH.shape[1]), by)
  turned = []
  for k, is_local in zip(k_LxMxKxH, local):
    rope = (is_local and c.local_rope) or c.rope
    assert rope is not None  # The caller checks that the model has rotary keys.
    turned.append(apply_rope(k[None], *rope_tables(rope, c.head_width, at))[0])
  return np.stack(turned)


def _check_virtual(kind: str, about: dict, c: Config, m: int,
                   directory) -> None:
  """Checks that PEFT would use a prefix or a prompt as this library does.

  Args:
    kind: 'prefix' or 'prompt'.
    about: Contents of adapter_config.json.
    c: Config of the model.
    m: Number of virtual tokens.
    directory: Directory of the adapter, for the error message.

  Raises:
    InputError: If a field of the config does not fit the model.
  """
  sizes = {'num_virtual_tokens': m}
  if kind == 'prompt':
    sizes['token_dim'] = c.embed_width or c.width
  else:
    sizes |= {'token_dim': c.num_kv_heads * c.head_width,
              'num_attention_heads': c.num_kv_heads,
              'num_layers': c.num_layers}
  # With other task types PEFT does not use the adapter as this library does.
  # Without one it ignores the adapter.
  tasks = ['CAUSAL_LM', 'MEZO_JAX'] if c.head else [
      'FEATURE_EXTRACTION', 'MEZO_JAX', None]
  for name, fits in (*((name, [size]) for name, size in sizes.items()),
                     ('task_type', tasks)):
    if name in about and about[name] not in fits:
      raise InputError(
          f'{directory}/adapter_config.json: {name} is {about[name]!r} and '
          f'must be {" or ".join(map(repr, fits))} for this model.')


# --- LoRA -------------------------------------------------------------------


def _modules(c: Config) -> dict[str, list[Row]]:
  """Groups the matrices of a checkpoint by the module that has them.

  Returns:
    A dict from the names of modules, with {l} for the number of the layer, to
    a list of `mezo_jax.models.families.table.Row`, one for each matrix of the
    module. The fused q, k and v of a GPT-2 are one module with three rows, in
    the order of its outputs.
  """
  out = collections.defaultdict(list)
  for row in huggingface.table_of(c):
    if row.path.endswith('/kernel'):
      out[row.name.removesuffix('.weight')].append(row)
  return {name: sorted(rows, key=lambda r: r.part)
          for name, rows in out.items()}


def _leaves(params: dict, row: Row, layers: int) -> list[dict]:
  """Returns the LoRA leaves of one matrix for every layer of the model.

  Args:
    params: Parameters of the model, with or without ``last_layers``.
    row: The `Row` that describes the matrix.
    layers: Number of layers of the model.

  Returns:
    A list with one dict of float32 host arrays per layer, which is empty for a
    layer without an adapter. The list has one entry if the matrix is not in a
    layer.
  """
  def of(*path):
    """Returns the LoRA leaves below a path, or {}."""
    tree = params
    for name in path:
      tree = tree.get(name, {})
    return {k: _host(v) for k, v in tree.items() if lora.is_lora(k)}
  first, *rest, _ = row.path.split('/')
  if not row.stacked:
    return [of(first, *rest)]
  stack, last = of('layers', *rest), of('last_layers', *rest)
  each = lambda leaves: [{k: v[l] for k, v in leaves.items()} for l in range(
      len(leaves['lora_scale']) if leaves else 0)]
  stack, last = each(stack), each(last)
  # If only `layers` or only `last_layers` has adapters, the other layers get
  # empty dicts: `stack` is at the start of the model and `last` at its end.
  return stack + [{}] * (layers - len(stack) - len(last)) + last


def _lora_tensors(c: Config, params: dict):
  """Returns PEFT's tensors and config of the LoRA adapters in some parameters.

  PEFT's scale is ``lora_alpha / r``. ``r`` is the largest rank, and modules of
  another rank are named in ``rank_pattern``. ``alpha_pattern`` gives them the
  same scale.
  """
  tensors, ranks, modules = {}, {}, _modules(c)
  have = {name: [*zip(*(_leaves(params, row, c.num_layers) for row in rows))]
          for name, rows in modules.items()}
  found = {float(x['lora_scale']) for layers in have.values()
           for parts in layers for x in parts if x}
  # If the scales of modules differ, PEFT's scale is set to 1, and `_fused`
  # multiplies each B by its own scale.
  scale, short = found.pop() if len(found) == 1 else 1.0, {}
  for name, layers in have.items():
    those = [l for l, parts in enumerate(layers) if any(parts)]
    for l in those:
      a, b = _fused(layers[l], modules[name], scale)
      at = _TOP + name.format(l=l)
      tensors[f'{at}.lora_A.weight'], tensors[f'{at}.lora_B.weight'] = a, b
      ranks[name] = len(a)
    if those:
      short[name] = _short(name, modules) if len(those) == len(layers) else (
          name.format(l=f'({"|".join(map(str, those))})'))
  if not tensors:
    raise InputError('the parameters have no LoRA, prefix or prompt to save.')
  rank, names = max(ranks.values()), sorted(short.values())
  # PEFT takes either a list of ends of names or one regular expression that
  # matches whole names. If one name needs an expression, all names are joined
  # into a single expression.
  one = any(r'\d+' in name or '(' in name for name in names)
  return tensors, {
      'peft_type': 'LORA', 'r': rank, 'lora_alpha': scale * rank,
      'lora_dropout': 0.0, 'bias': 'none', 'use_rslora': False,
      'init_lora_weights': True,
      'fan_in_fan_out': c.family == 'gpt2',
      'target_modules': rf'(.*\.)?({"|".join(names)})' if one else names,
      'rank_pattern': {short[n]: r for n, r in ranks.items() if r != rank},
      'alpha_pattern': {
          short[n]: scale * r for n, r in ranks.items() if r != rank}}


def _fused(parts: Sequence[dict], rows: list[Row], scale: float):
  """Combines the adapters of the parts of a matrix into one A and one B.

  The ranks add up: each part has its own rows of A, and B is block diagonal.

  Args:
    parts: LoRA leaves of each part, {} for a part without an adapter.
    rows: The `Row` of each part.
    scale: Scale that PEFT multiplies the product by. B is divided by it.

  Returns:
    A pair of A [R, I] and B [O, R], float32.
  """
  ranks = [x['lora_a'].shape[-1] if x else 0 for x in parts]
  inputs = next(x['lora_a'].shape[0] for x in parts if x)
  a = np.zeros((sum(ranks), inputs), np.float32)
  b = np.zeros((sum(row.shape[-1] for row in rows), sum(ranks)), np.float32)
  r = o = 0
  for x, row, rank in zip(parts, rows, ranks):
    if x:
      a[r:r + rank] = x['lora_a'].T
      b[o:o + row.shape[-1], r:r + rank] = (
          x['lora_scale'] / scale * x['lora_b']).T
    r, o = r + rank, o + row.shape[-1]
  return a, b


def _short(name: str, modules: dict) -> str:
  """Returns the shortest end of a module's name that no other module has.

  If that end contains the number of the layer, the result is a regular
  expression.

  Args:
    name: Name of the module, with {l} for the number of the layer.
    modules: All modules by name.
  """
  parts = name.split('.')
  for i in range(len(parts) - 1, -1, -1):
    end = '.'.join(parts[i:])
    if sum(f'.{other}'.endswith(f'.{end}') for other in modules) == 1:
      return end.replace('{l}', r'\d+')
  return name


def _lora_leaves(c: Config, about: dict, tensors: dict, directory) -> dict:
  """Converts PEFT's tensors of a LoRA adapter to this library's leaves.

  The leaves of all layers are stacked. Layers without an adapter get zeros, and
  adapters of a smaller rank are padded with zeros.

  Args:
    c: Config of the model.
    about: Contents of adapter_config.json.
    tensors: Tensors by PEFT's names.
    directory: Directory of the adapter, for error messages.

  Raises:
    InputError: If the tensors do not fit the model or the config.
  """
  left, out = dict(tensors), {}
  for name, rows in _modules(c).items():
    layers = range(c.num_layers if rows[0].stacked else 1)
    found = []
    for l in layers:
      module = name.format(l=l)
      found.append(_pair(about, left, module, directory))
    if not any(found):
      continue
    rank = max(len(x[0]) for x in found if x)
    o = 0
    for row in rows:
      shape = rows[0].stacked and (c.num_layers,) or ()
      inputs, outputs = row.shape
      leaves = {'lora_a': np.zeros((len(layers), inputs, rank), np.float32),
                'lora_b': np.zeros((len(layers), rank, outputs), np.float32),
                'lora_scale': np.ones(len(layers), np.float32)}
      for l, x in enumerate(found):
        if x is None:
          continue
        a, b, scale = x
        part = b[o:o + outputs]
        if a.shape[1:] != (inputs,) or part.shape != (outputs, len(a)):
          raise InputError(
              f'{directory} does not fit the model: {name.format(l=l)} has A '
              f'of shape {a.shape} and B of shape {b.shape}, but {inputs} '
              f'inputs and {sum(r.shape[1] for r in rows)} outputs.')
        leaves['lora_a'][l, :, :len(a)] = a.T
        leaves['lora_b'][l, :len(a)] = part.T
        leaves['lora_scale'][l] = scale
      out |= {row.path.removesuffix('kernel') + k: jnp.asarray(
          v.reshape(*shape, *v.shape[1:])) for k, v in leaves.items()}
      o += outputs
  if left or not out:
    shown = ', '.join(sorted(left)[:5]) or 'none'
    raise InputError(f'{directory} does not fit the model: these tensors '
                     f'belong to no matrix of a {c.family}: {shown}.')
  return unflatten_dict(out, sep='/')


def _pair(about: dict, left: dict, module: str, directory):
  """Removes the matrices of a module from the tensors that are left.

  Args:
    about: Contents of adapter_config.json.
    left: Tensors by PEFT's names. The module's tensors are removed.
    module: Full name of the module in the base model.
    directory: Directory of the adapter, for error messages.

  Returns:
    A tuple ``(A, B, scale)``, or None if the module has no adapter.

  Raises:
    InputError: If the tensors do not fit the config.
  """
  a, b = (left.pop(f'{_TOP}{module}.lora_{x}.weight', None) for x in 'AB')
  wanted = adapter_config.targets(about, module)
  if a is None and b is None:
    if wanted and about.get('init_lora_weights') is False:
      raise InputError(
          f'{directory} has no tensors for {module}, which matches '
          'target_modules, and PEFT would draw them at random because '
          'init_lora_weights is false. Let target_modules match only modules '
          'that have an adapter.')
    return None
  if not wanted:
    raise InputError(
        f'{directory} has tensors for {module}, which PEFT would ignore '
        'because of target_modules, exclude_modules, layers_to_transform or '
        'layers_pattern. Correct these fields of adapter_config.json.')
  if a is None or b is None:
    raise InputError(f'{directory} has only one of the two LoRA matrices of '
                     f'{module}; the file is incomplete.')
  if not (a.ndim == b.ndim == 2 and a.size):
    raise InputError(f'{directory} does not fit the model: {module} has A of '
                     f'shape {a.shape} and B of shape {b.shape}, which are not '
                     'two matrices.')
  rank = adapter_config.rank(about, module)
  if len(a) != rank:
    raise InputError(
        f'{directory} does not fit its adapter_config.json: r and '
        f'rank_pattern give {module} the rank {rank}, but its matrices have '
        f'the rank {len(a)}.')
  return a, b, _scale(about, module, len(a))


def _scale(about: dict, module: str, rank: int) -> float:
  """Returns the factor by which PEFT multiplies B A of a module."""
  root = rank ** 0.5 if about.get('use_rslora') else rank
  return adapter_config.alpha(about, module) / root
