"""Writes parameters to Hugging Face files.

It is the inverse of `mezo_jax.models.load` and uses the same table of each
family.
"""

from collections.abc import Mapping, Sequence
import contextlib
import json
import os
from pathlib import Path
import shutil
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
import jax
from jax.experimental import multihost_utils
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from mezo_jax.core.errors import ExistsError
from mezo_jax.core.quantized import is_codes
from mezo_jax.models.families.table import Row
from mezo_jax.models.formats import classifier, huggingface
from mezo_jax.models.formats.weights import EXPLICIT
from mezo_jax.models.transformer import Transformer

_PART = '.part'  # Suffix or name of a directory that is being written.
# A directory with one of these files is taken for a complete model or adapter,
# so these files are moved into it last.
_LAST = ('config.json', 'adapter_config.json')


def save(directory: str | os.PathLike[str], model: Transformer, params: Any, *,
         tokenizer: Any = None, card: str | None = None,
         labels: Sequence[str] = (), max_shard_bytes: int = 2 * 2**30,
         progress: bool = True, files: Mapping[str, bytes] = {}) -> Path:
  """Writes a model as a directory that transformers can load.

  ``config.json`` is the one that the model was loaded with, except for the
  dtype, which is that of ``params``, and the class name in ``architectures``,
  which is set if it is missing or no longer correct. A model without a head is
  written as transformers' base class. A model with a classification head,
  ``params['classifier']``, is written as the class for sequence classification,
  without the language model's head. Quantised weights
  (`mezo_jax.QuantizedArray`) are dequantised.

  Tensors are gathered one at a time, and the host holds those of one file at a
  time. The directory appears only when it is complete. With several processes,
  all of them must call this function, and process 0 writes.

  Args:
    directory: The directory to write. It must not exist, or be empty.
    model: A model from `load`, whose config holds its ``config.json``.
    params: Parameters of the model, on any devices.
    tokenizer: A tokenizer of transformers to write as well. Defaults to None,
      for none.
    card: Text of README.md. Defaults to None, for no such file.
    labels: Names of the classes of a classification head. Defaults to LABEL_0,
      LABEL_1, ..., as in transformers.
    max_shard_bytes: Maximal size of a file in bytes. A larger tensor gets a
      file of its own. Defaults to 2 GiB.
    progress: Whether to show a progress bar. Defaults to True.
    files: Contents of further files to write, by name. Defaults to none.

  Returns:
    The path of the directory.

  Raises:
    FileExistsError: If the directory exists and is not empty.
    ValueError: If the parameters do not fit the config, or the config was not
      read from a ``config.json``.
  """
  config = model.config
  if not config.source:
    raise ValueError('model.config was not read from a config.json, so there '
                     'is none to write; create it with models.read_config.')
  classes = num_classes(params)
  if classes:
    rows = classifier.table(config, classes)
    unused = {row.path for row in huggingface.head_of(config)}
    params = unflatten_dict({
        path: x for path, x in flatten_dict(params, sep='/').items()
        if path not in unused}, sep='/')
  else:
    rows = huggingface.table_of(config)
  _check(params, rows, config)
  with new_directory(directory) as (part, first):
    _write(part, rows, params, config, max_shard_bytes,
           progress, Path(directory).resolve().name)
    if part is not None:
      dtype = str(params['embed']['embedding'].dtype)
      hf = {k: v for k, v in json.loads(config.source).items()
            if k not in ('torch_dtype', '_name_or_path', EXPLICIT)}
      hf['dtype'] = dtype
      if classes:
        names = list(labels) or [f'LABEL_{i}' for i in range(classes)]
        hf, tokenizer = classifier.fields(hf, config, names, tokenizer)
      else:
        hf['architectures'] = _architectures(config, hf)
      (part / 'config.json').write_text(json.dumps(hf, indent=2) + '\n')
      if tokenizer is not None:
        save_tokenizer(part, tokenizer)
      if card is not None:
        (part / 'README.md').write_text(card)
      for name, content in files.items():
        (part / name).write_bytes(content)
  return Path(directory).expanduser()


def num_classes(params: dict[str, Any]) -> int:
  """Returns the number of classes of a classification head, 0 without one."""
  if 'classifier' not in params:
    return 0
  return params['classifier']['out']['kernel'].shape[-1]


def save_tokenizer(part: Path, tokenizer: Any) -> None:
  """Writes a tokenizer into the directory ``part``.

  Local paths that the tokenizer was loaded from are removed from its config.
  """
  tokenizer.save_pretrained(part)
  file = part / 'tokenizer_config.json'
  if not file.is_file():
    return
  about = json.loads(file.read_text())
  kept = {name: value for name, value in about.items() if not (
      name.endswith(('_file', 'name_or_path')) and isinstance(value, str))}
  if kept != about:
    file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + '\n')


def _architectures(config, hf: dict) -> list[str]:
  """Returns the field ``architectures``: the class that has these tensors.

  The value in ``hf`` is kept if that class of transformers fits.
  """
  whole, base = huggingface.ARCHITECTURES[config.family]
  if not config.head:
    return [base]
  named = hf.get('architectures') or [whole]
  if (named == [base] and huggingface.head_of(config)
      or huggingface.names_classifier(named)):
    return [whole]
  return named


def check_new(directory: str | os.PathLike[str]) -> Path:
  """Checks that a directory can be written, and returns its absolute path.

  '~' is the home directory. The path is resolved, because '.' and '..' cannot
  be renamed, and a link cannot be replaced by a directory.

  Raises:
    FileExistsError: If it is a file, or a directory that is not empty.
  """
  path = Path(directory).expanduser().resolve()
  if path.exists() and not path.is_dir():
    raise ExistsError(f'{directory} is a file; give another directory.')
  if path.is_dir() and any(x.name != _PART for x in path.iterdir()):
    raise ExistsError(
        f'{directory} exists and is not empty; give another directory.')
  return path


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike):
  """Creates a directory whose files appear only when all of them are written.

  ``with new_directory(d) as (part, first)`` yields a temporary directory
  ``part``, which becomes ``directory`` at the end, and whether this is process
  0. With several processes, all of them must enter this context. Only process 0
  writes; in all others ``part`` is None. If ``directory`` exists and is empty,
  it is kept, because it may be the current directory, a link or a mount point.
  The files are then moved into it, with config.json last.

  Raises:
    FileExistsError: If ``directory`` is a file, or is not empty.
  """
  first, problem, path = jax.process_index() == 0, None, None
  if first:
    try:
      path = check_new(directory)
    except ExistsError as e:
      problem = e
  failed = problem is not None
  if jax.process_count() > 1:
    # All processes raise, or none. Otherwise the others would wait forever for
    # process 0.
    failed = multihost_utils.broadcast_one_to_all(np.array(failed))
  if failed:
    raise problem or ExistsError(
        f'{directory} is a file, or a directory that is not empty; give '
        'another directory.')
  part = None
  kept = path is not None and path.is_dir()
  if path is not None:
    part = path / _PART if kept else path.with_name(path.name + _PART)
    shutil.rmtree(part, ignore_errors=True)  # Left over from a stopped run.
    part.mkdir(parents=True)
  yield part, first
  if path is not None and part is not None:
    if kept:
      files = sorted(part.iterdir(), key=lambda file: file.name in _LAST)
      for file in files:
        file.rename(path / file.name)
      part.rmdir()
    else:
      part.rename(path)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'saved {directory}')


def _write(part: Path | None, rows: list[Row], params, config, most: int,
           progress: bool, name: str) -> None:
  """Writes tensors to safetensors files of at most ``most`` bytes each.

  All processes take part in gathering the tensors. Only process 0, which has a
  ``part``, writes them.
  """
  files, batch, held, total = [], {}, 0, 0

  def flush():
    """Writes the tensors collected so far to the next file."""
    nonlocal batch, held
    files.append(list(batch))
    if part:
      save_file(batch, part / f'{len(files)}.safetensors', {'format': 'pt'})
    batch, held = {}, 0

  names = {name for row in rows for name in row.names(config)}
  for tensor_name, tensor in tqdm(
      _tensors(rows, params), f'writing {name}', len(names), unit='tensor',
      disable=not (progress and part)):
    if batch and held + tensor.nbytes > most:
      flush()
    batch[tensor_name], size = tensor, tensor.nbytes
    held, total = held + size, total + size
  flush()
  if part:
    _name_files(part, files, total)


def _check(params, rows: list[Row], config):
  """Checks that the parameters have the paths and shapes of the rows.

  Raises:
    ValueError: If leaves are missing, unexpected or of another shape. The error
      names up to 20 of them.
  """
  leaves: dict[str, Any] = flatten_dict(params, sep='/')
  have = {path: tuple(x.shape) for path, x in leaves.items()}
  layers = (config.num_layers,)
  want = {row.path: (layers if row.stacked else ()) + row.shape for row in rows}
  problems = [
      f'{path} is {have.get(path, "missing")}, not {want.get(path, "expected")}'
      for path in sorted(have | want) if have.get(path) != want.get(path)]
  if problems:
    raise ValueError(
        f'the parameters do not fit the config: {"; ".join(problems[:20])}.')


def _tensors(rows: list[Row], params):
  """Yields the name and the array of each tensor, layer by layer.

  Each array is gathered to the host as a whole.
  """
  flat: dict[str, Any] = flatten_dict(params, sep='/')
  for group in _grouped(rows):
    leaves = [flat[row.path] for row in group]
    for layer in range(len(leaves[0]) if group[0].stacked else 1):
      parts = [row.write(on_host(_floats(leaf, layer if row.stacked else None)))
               for row, leaf in zip(group, leaves)]
      tensor = np.ascontiguousarray(
          np.concatenate(parts, -1) if len(parts) > 1 else parts[0])
      name = group[0].name.format(l=layer)
      if group[0].of_experts:
        for e, one in enumerate(tensor):
          yield name.format(e=e), one
        continue
      yield name, tensor
      if group[0].copy:
        yield group[0].copy, tensor.copy()


def _floats(leaf, layer: int | None):
  """Returns a parameter, or one layer of it, dequantised if necessary."""
  if layer is not None:
    leaf = jax.tree.map(lambda x: x[layer], leaf)
  return leaf.astype(leaf.dtype) if is_codes(leaf) else leaf


def _grouped(rows: list[Row]) -> list[list[Row]]:
  """Groups rows that are parts of one tensor, in the order of the parts."""
  groups = {}
  for row in rows:
    groups.setdefault(row.name, []).append(row)
  return [sorted(group, key=lambda row: row.part) for group in groups.values()]


def on_host(x: Any) -> np.ndarray:
  """Returns an array gathered from the devices of all processes."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


def _name_files(part: Path, files: list[list[str]], total: int):
  """Renames the files as Hugging Face does, and writes an index for several.
  """
  n = len(files)
  if n == 1:
    (part / '1.safetensors').rename(part / 'model.safetensors')
    return
  index = {}
  for i, names in enumerate(files, 1):
    name = f'model-{i:05d}-of-{n:05d}.safetensors'
    (part / f'{i}.safetensors').rename(part / name)
    index |= dict.fromkeys(names, name)
  (part / 'model.safetensors.index.json').write_text(json.dumps(
      {'metadata': {'total_size': total}, 'weight_map': index}, indent=2))
