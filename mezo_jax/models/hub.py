"""Checkpoints: Hugging Face directories and GGUF files to sharded parameters.

Nothing here needs torch. Each device's slice of each parameter is read straight
from the files: host memory above the result is one shard of one parameter.
"""

import contextlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from mezo_jax import sharding
from mezo_jax.models import gguf, llama, opt, table, transformer

FAMILIES = {'llama': llama, 'opt': opt}


def load(name_or_dir: str | os.PathLike, mesh=None, dtype=None,
         progress: bool = True):
  """Loads a causal language model.

  Args:
    name_or_dir: a directory with ``config.json`` and safetensors files, a
      ``.gguf`` file, or the id of a Hugging Face repository.
    mesh: parameters are sharded over its `fsdp` and `tensor` axes as they are
      read (see `mezo_jax.sharding.param_spec`); None for the default device.
    dtype: of the parameters, such as 'float32' or jnp.bfloat16; None for the
      checkpoint's own.
    progress: whether to show a progress bar.

  Returns:
    ``model, params``: a `Transformer` and its plain nested dict, so that
    ``model.apply({'params': params}, input_ids, attention_mask)`` gives float32
    logits [batch, length, vocab]; ``model.config`` is the frozen config.

  Raises:
    FileNotFoundError: if there is no such model.
    ValueError: if its family is not supported, or its tensors do not fit the
      config (all misfits are named at once).
  """
  path = find(name_or_dir)
  with contextlib.ExitStack() as stack:
    if path.suffix == '.gguf':
      hf_config, tensors = gguf.open_file(path)
    else:
      hf_config = json.loads((path / 'config.json').read_text())
      tensors = _open_safetensors(path, stack)
    family = hf_config.get('model_type')
    if family not in FAMILIES:
      raise ValueError(
          f'{path}: model_type {family!r} is not supported; supported are '
          f'{sorted(FAMILIES)}.')
    config = FAMILIES[family].config_from_hf(hf_config)
    rows = FAMILIES[family].table(config)
    _check_fit(rows, config, tensors, path)
    params = {}
    for row in tqdm(rows, f'loading {path.name}', unit='param',
                    disable=not progress or jax.process_index() > 0):
      _put(params, row.path, _read(row, config, tensors, mesh, dtype))
  return transformer.Transformer(config), params


def param_shapes(config: transformer.Config, mesh=None,
                 dtype=jnp.float32) -> dict:
  """The parameters as `jax.ShapeDtypeStruct`s, to compile without weights."""
  params = {}
  for row in FAMILIES[config.family].table(config):
    shape = _shape(row, config)
    _put(params, row.path, jax.ShapeDtypeStruct(
        shape, dtype, sharding=_place(row, shape, mesh)))
  return params


def _shape(row: table.Row, config) -> tuple[int, ...]:
  return (config.num_layers, *row.shape) if row.stacked else row.shape


def _place(row: table.Row, shape, mesh):
  if mesh is None:
    return None
  return jax.NamedSharding(
      mesh, sharding.param_spec(row.path, shape, mesh, row.axes))


def _put(tree: dict, path: str, leaf):
  *parents, name = path.split('/')
  for parent in parents:
    tree = tree.setdefault(parent, {})
  tree[name] = leaf


def load_tokenizer(name_or_dir: str | os.PathLike):
  """The tokenizer beside a model: a transformers `PreTrainedTokenizerFast`.

  Raises:
    FileNotFoundError: if there is no such model.
  """
  path = find(name_or_dir)
  if path.suffix == '.gguf':
    return gguf.tokenizer(path)
  from transformers import AutoTokenizer  # slow to import, needed here only
  return AutoTokenizer.from_pretrained(path)


def find(name_or_dir: str | os.PathLike) -> Path:
  """A local directory or GGUF file, fetched from the hub if it is an id."""
  path = Path(name_or_dir).expanduser()
  if path.is_file() and path.suffix == '.gguf':
    return path
  if path.is_dir():
    if (path / 'config.json').is_file():
      return path
    raise FileNotFoundError(
        f'{path} has no config.json: it is not a Hugging Face model directory.')
  name = str(name_or_dir)
  if path.is_absolute() or name.count('/') != 1 or name.startswith('.'):
    raise FileNotFoundError(
        f'no model at {name}: give a directory with config.json, a .gguf file '
        'or a hub id such as "HuggingFaceTB/SmolLM2-135M".')
  from huggingface_hub import snapshot_download  # slow to import
  try:
    return Path(snapshot_download(
        name, allow_patterns=['*.json', '*.safetensors', '*.model', '*.txt']))
  except Exception as e:
    raise FileNotFoundError(
        f'no directory {name!r} here, and the hub did not give one: '
        f'{str(e).splitlines()[0]}') from e


def _open_safetensors(path: Path, stack: contextlib.ExitStack) -> dict:
  """{name: lazily read tensor} of one or many files."""
  index = path / 'model.safetensors.index.json'
  if index.is_file():
    names = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    files = [path / n for n in names]
  else:
    files = sorted(path.glob('*.safetensors'))
  if not files:
    raise FileNotFoundError(
        f'{path} has no .safetensors file; convert the checkpoint, for example '
        'with save_pretrained(..., safe_serialization=True).')
  missing = [f.name for f in files if not f.is_file()]
  if missing:
    raise FileNotFoundError(f'{path} lacks {", ".join(missing)}.')
  tensors = {}
  for file in files:
    try:
      opened = stack.enter_context(safe_open(file, framework='numpy'))
    except Exception as e:
      raise ValueError(
          f'{file} is not a readable safetensors file ({e}); fetch it again.'
      ) from e
    for name in opened.keys():
      if name in tensors:
        raise ValueError(f'{path} has the tensor {name} in two files.')
      tensors[name] = opened.get_slice(name)
  return tensors


def _check_fit(rows: list[table.Row], config, tensors: dict, path: Path):
  """Raises one error that names every missing, misshapen and extra tensor."""
  wanted = {}
  for row in rows:
    for layer in range(config.num_layers if row.stacked else 1):
      wanted[row.name.format(l=layer)] = row.source_shape()
  problems = [f'missing {n}' for n in wanted if n not in tensors]
  problems += [
      f'{n} has shape {tuple(tensors[n].get_shape())}, not {shape}'
      for n, shape in wanted.items()
      if n in tensors and tuple(tensors[n].get_shape()) != shape]
  known = ('rotary_emb.inv_freq',) + (
      ('lm_head.weight',) if config.tied_head else ())
  problems += [f'unexpected {n}' for n in tensors
               if n not in wanted and not n.endswith(known)]
  if problems:
    shown = '; '.join(problems[:20])
    more = f'; and {len(problems) - 20} more' if len(problems) > 20 else ''
    raise ValueError(f'{path} does not fit its config: {shown}{more}.')


def _read(row: table.Row, config, tensors: dict, mesh, dtype) -> jax.Array:
  """One parameter, assembled per device from the slices that it needs."""
  shape = _shape(row, config)
  place = _place(row, shape, mesh) or jax.sharding.SingleDeviceSharding(
      jax.config.jax_default_device or jax.local_devices()[0])

  def read(index):
    index = [slice(*i.indices(n)) for i, n in zip(index, shape)]
    if not row.stacked:
      block = row.read(tensors[row.name], tuple(index))
    else:
      layers, *rest = index
      block = np.stack([
          row.read(tensors[row.name.format(l=l)], tuple(rest))
          for l in range(layers.start, layers.stop)])
    return block.astype(jnp.dtype(dtype)) if dtype else block

  return jax.make_array_from_callback(shape, place, read)
