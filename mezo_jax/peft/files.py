"""Adapters as directories of Hugging Face's PEFT: one that it loads, and back.

``adapter_config.json`` says what they are, ``adapter_model.safetensors`` has
LoRA's matrices under the names of the base model's modules, or the keys and
values of a prefix, or a soft prompt.
"""

import collections
from collections.abc import Sequence
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
# Modules of transformers' classes that the classification head is; 'score' of
# causal models.
_HEADS = {'bert': ['classifier', 'pooler'], 'roberta': ['classifier']}
_KINDS = {'LORA': 'lora', 'PREFIX_TUNING': 'prefix', 'PROMPT_TUNING': 'prompt'}


def save(directory: str | os.PathLike[str], model: Transformer,
         params: dict[str, Any], *, base: str = '', tokenizer: Any = None,
         card: str | None = None) -> Path:
  """Writes the adapters in ``params`` so that PEFT loads them.

  LoRA of q, k and v of a GPT-2, which PEFT has as one matrix, is written as one
  adapter of their ranks together; the product is the same.

  Args:
    directory: to make.
    model: that they are of.
    params: with LoRA, a prefix or a soft prompt; other leaves are not written.
    base: name of the base model, for PEFT to find it.
    tokenizer: to write beside them.
    card: the text of README.md.

  Returns:
    The directory. What PEFT has no equal of, it refuses to load (a task type
    that it does not know), and only `load` reads: prefixes and prompts of
    masked models, which it would ignore, and prefixes after which learned
    positions start at 0. On several hosts every process must call this.

  Raises:
    FileExistsError: if the directory is there and not empty.
    ValueError: for no adapters.
  """
  c, classes = model.config, num_classes(params)
  if classes:
    classifier.check_head(c)
    if 'prompt' in params or prefix_length(params):
      raise InputError('a prefix or a prompt with a classification head has no '
                       'equal in PEFT: only LoRA can be saved with one.')
    c = dataclasses.replace(c, head=True)  # PEFT sees the class with a head
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
  return Path(directory).expanduser()


def _task_type(about: dict, c: Config, classes: int) -> str | None:
  """Returns the task for which PEFT applies an adapter as we do; one that PEFT
  does not know, and refuses, where there is none."""
  lora = about['peft_type'] == 'LORA'
  if adapter_config.POSITIONS in about or not (lora or c.causal):
    return 'MEZO_JAX'
  if classes:
    return 'SEQ_CLS'
  if c.causal and c.head:
    return 'CAUSAL_LM'
  # Without a task PEFT loads a prefix or a prompt and then ignores it.
  return None if lora else 'FEATURE_EXTRACTION'


def _head_tensors(c: Config, params: dict, classes: int) -> dict:
  """Returns PEFT's tensors of a classification head."""
  flat = flatten_dict(params, sep='/')
  return {_TOP + row.name: np.ascontiguousarray(row.write(
      _host(flat[row.path]))) for row in classifier.head(c, classes)}


def _host(x) -> np.ndarray:
  return np.asarray(on_host(x), np.float32)


def load(directory: str | os.PathLike[str], model: Transformer
         ) -> tuple[Transformer, dict[str, Any], str]:
  """Reads a directory that `save` or PEFT wrote.

  Args:
    directory: with ``adapter_config.json`` and ``adapter_model.safetensors``.
    model: that they are of.

  Returns:
    ``model, adapters, kind``: the model (with a prefix, counting positions as
    it was trained with), the leaves to `mezo_jax.peft.join` to its parameters,
    and 'lora', 'prefix' or 'prompt'.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: for another kind of adapter, an option that is not supported,
      or tensors that do not fit the model.
  """
  directory, c = Path(directory), model.config
  kind, about = describe(directory)
  try:
    with safe_open(directory / _FILE, 'numpy') as f:
      tensors = {name: f.get_tensor(name) for name in f.keys()}
  except (SafetensorError, TypeError) as e:
    raise InputError(f'{directory / _FILE} cannot be read ({e}).') from e
  if kind == 'lora':
    return model, _lora_leaves(c, about, tensors, directory), kind
  found = tensors.get('prompt_embeddings', np.zeros((0, 0)))
  m, width = found.shape if found.ndim == 2 else (0, 0)
  of = {'prefix': 2 * c.num_layers * c.num_kv_heads * c.head_width,
        'prompt': c.embed_width or c.width}[kind]
  if not m or width != of:
    raise InputError(
        f'{directory} does not fit the model: prompt_embeddings are '
        f'{found.shape}, not (tokens, {of}).')
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
  """Returns the two files of an adapter.

  Raises:
    FileNotFoundError: if one is missing.
  """
  found = Path(directory) / 'adapter_config.json', Path(directory) / _FILE
  for file in found:
    if not file.is_file():
      raise MissingError(
          f'{directory} has no {file.name}: it is not a directory that PEFT '
          'wrote with safetensors.')
  return found


def describe(directory: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
  """``kind, about``: 'lora', 'prefix' or 'prompt', and the adapter's config.

  Raises:
    FileNotFoundError: if a file is missing.
    ValueError: for another kind of adapter, or a config that is not JSON.
  """
  directory = Path(directory)
  config_file, _ = files_of(directory)
  try:
    about = json.loads(config_file.read_text())
  except ValueError as e:
    raise InputError(f'{directory}/adapter_config.json cannot be read '
                     f'({e}).') from e
  about = about if isinstance(about, dict) else {}
  name = about.get('peft_type')
  if not isinstance(name, str) or name not in _KINDS:
    raise InputError(f'{directory} has an adapter of type {name!r}; '
                     f'{", ".join(_KINDS)} are supported.')
  adapter_config.check(about, directory / 'adapter_config.json')
  return _KINDS[name], about


# --- prefixes ---------------------------------------------------------------


def _virtual(peft_type: str, c: Config, m: int) -> dict:
  return {'peft_type': peft_type, 'num_virtual_tokens': m,
          'num_layers': c.num_layers, 'num_transformer_submodules': 1}


def _prefix_tensors(model: Transformer, attn: dict):
  """PEFT's tensor and config. It counts positions from after the prefix."""
  c, (k, v) = model.config, (_host(attn[f'prefix_{x}']) for x in 'kv')
  m, positions = k.shape[1], model.prefix_positions
  if positions == 'zero' and c.rope:
    k, positions = _turned(c, k, m), 'after'  # M further on, as the tokens are
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
  """Rotary keys as they would be ``by`` positions further on."""
  local = c.local_layers or (False,) * c.num_layers
  at = jnp.full((1, k_LxMxKxH.shape[1]), by)
  turned = []
  for k, is_local in zip(k_LxMxKxH, local):
    rope = (is_local and c.local_rope) or c.rope
    assert rope is not None  # asked for with rotary positions alone
    turned.append(apply_rope(k[None], *rope_tables(rope, c.head_width, at))[0])
  return np.stack(turned)


def _check_virtual(kind: str, about: dict, c: Config, m: int,
                   directory) -> None:
  """Raises InputError where PEFT would read a prefix or prompt otherwise."""
  sizes = {'num_virtual_tokens': m}
  if kind == 'prompt':
    sizes['token_dim'] = c.embed_width or c.width
  else:
    sizes |= {'token_dim': c.num_kv_heads * c.head_width,
              'num_attention_heads': c.num_kv_heads,
              'num_layers': c.num_layers}
  # PEFT reads the adapter for no other tasks; without one it ignores it.
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
  """The rows of each matrix of the checkpoint, by its module's name."""
  out = collections.defaultdict(list)
  for row in huggingface.table_of(c):
    if row.path.endswith('/kernel'):
      out[row.name.removesuffix('.weight')].append(row)
  return {name: sorted(rows, key=lambda r: r.part)
          for name, rows in out.items()}


def _leaves(params: dict, row: Row, layers: int) -> list[dict]:
  """LoRA's leaves of a module in each of its layers, float32 on the host; {}
  where there are none."""
  def of(*path):
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
  return stack + [{}] * (layers - len(stack) - len(last)) + last


def _lora_tensors(c: Config, params: dict):
  """PEFT's tensors and config: one rank and scale for all, others by name."""
  tensors, ranks, modules = {}, {}, _modules(c)
  have = {name: [*zip(*(_leaves(params, row, c.num_layers) for row in rows))]
          for name, rows in modules.items()}
  found = {float(x['lora_scale']) for layers in have.values()
           for parts in layers for x in parts if x}
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
    raise InputError('these parameters have no LoRA, prefix or prompt to save.')
  rank, names = max(ranks.values()), sorted(short.values())
  # PEFT takes the ends of names, or one regular expression of whole names.
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
  """PEFT's A [R, I] and B [O, R] of the parts of a matrix, to be scaled."""
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
  """No more of a module's name than tells it from others; where that takes the
  number of the layer, a regular expression."""
  parts = name.split('.')
  for i in range(len(parts) - 1, -1, -1):
    end = '.'.join(parts[i:])
    if sum(f'.{other}'.endswith(f'.{end}') for other in modules) == 1:
      return end.replace('{l}', r'\d+')
  return name


def _lora_leaves(c: Config, about: dict, tensors: dict, directory) -> dict:
  """Our leaves of PEFT's tensors; layers without an adapter get zeros."""
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
              f'{a.shape} and B {b.shape} for {inputs} inputs and '
              f'{sum(r.shape[1] for r in rows)} outputs.')
        leaves['lora_a'][l, :, :len(a)] = a.T
        leaves['lora_b'][l, :len(a)] = part.T
        leaves['lora_scale'][l] = scale
      out |= {row.path.removesuffix('kernel') + k: jnp.asarray(
          v.reshape(*shape, *v.shape[1:])) for k, v in leaves.items()}
      o += outputs
  if left or not out:
    shown = ', '.join(sorted(left)[:5]) or 'none'
    raise InputError(f'{directory} has tensors that no matrix of a {c.family} '
                     f'takes: {shown}.')
  return unflatten_dict(out, sep='/')


def _pair(about: dict, left: dict, module: str, directory):
  """Takes a module's matrices out of the tensors that are left.

  Returns:
    ``(A, B, scale)``, or None where the module has no adapter.
  """
  a, b = (left.pop(f'{_TOP}{module}.lora_{x}.weight', None) for x in 'AB')
  wanted = adapter_config.targets(about, module)
  if a is None and b is None:
    if wanted and about.get('init_lora_weights') is False:
      raise InputError(
          f'{directory} has no tensors for {module}, which target_modules '
          'names, and with init_lora_weights false PEFT would draw them at '
          'random: name the modules that have an adapter.')
    return None
  if not wanted:
    raise InputError(
        f'{directory} has tensors for {module}, to which its fields '
        'target_modules, exclude_modules, layers_to_transform and '
        'layers_pattern give no adapter: PEFT would ignore them.')
  if a is None or b is None:
    raise InputError(f'{directory} has only one of the two matrices of '
                     f'{module}.')
  if not (a.ndim == b.ndim == 2 and a.size):
    raise InputError(f'{directory} does not fit the model: {module} has A '
                     f'{a.shape} and B {b.shape}.')
  rank = adapter_config.rank(about, module)
  if len(a) != rank:
    raise InputError(
        f'{directory} does not fit its adapter_config.json: by r and '
        f'rank_pattern {module} has rank {rank}, and its matrices have '
        f'{len(a)}.')
  return a, b, _scale(about, module, len(a))


def _scale(about: dict, module: str, rank: int) -> float:
  """Returns what PEFT multiplies the product of a module's matrices by."""
  root = rank ** 0.5 if about.get('use_rslora') else rank
  return adapter_config.alpha(about, module) / root
