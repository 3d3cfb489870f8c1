"""Parameters to Hugging Face files: the inverse of `load`, from one table."""

from collections.abc import Sequence
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

_PART = '.part'  # what is not yet whole
_LAST = ('config.json', 'adapter_config.json')


def save(directory: str | os.PathLike[str], model: Transformer, params: Any, *,
         tokenizer: Any = None, card: str | None = None,
         labels: Sequence[str] = (), max_shard_bytes: int = 2 * 2**30,
         progress: bool = True) -> Path:
  """Writes a model as Hugging Face has it; any tool that reads those reads it.

  `mezo_jax.QuantizedArray` are written as the weights that they stand for.
  ``config.json`` is the one that the model was loaded with, with the dtype of
  ``params`` and, where it was missing or no longer fits, transformers' name of
  the class. A model without its head is written as its base class has it; with
  a classification head, ``params['classifier']``, as its class for sequence
  classification, without the vocabulary's head.
  Tensors are gathered one at a time, those of a file are held by the host until
  it is written; the directory appears when all is written. On several hosts
  every process must call this, and the first one writes.

  Args:
    directory: to make, or one that is empty.
    model: from `load` (its config remembers where it came from).
    params: its parameters, in `load`'s layout, on any devices.
    tokenizer: to write beside it.
    card: the text of README.md.
    labels: Names of the classes of a classification head. Defaults to LABEL_0,
      LABEL_1, ..., as in transformers.
    max_shard_bytes: size of a file at most, but for a tensor larger than it.
    progress: whether to show a progress bar.

  Returns:
    The directory.

  Raises:
    FileExistsError: if the directory is there and not empty.
    ValueError: if ``params`` do not fit the config, or that was not read from
      a file.
  """
  config = model.config
  if not config.source:
    raise ValueError('this config was not read from a config.json, which '
                     'belongs to the files; make it with models.read_config.')
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
  return Path(directory).expanduser()


def num_classes(params: dict[str, Any]) -> int:
  """Returns the number of classes of the classification head, 0 for none."""
  if 'classifier' not in params:
    return 0
  return params['classifier']['out']['kernel'].shape[-1]


def save_tokenizer(part: Path, tokenizer: Any) -> None:
  """Writes a tokenizer without the local paths that it was loaded from."""
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
  """The class that has these tensors; of several, what ``hf`` says."""
  whole, base = huggingface.ARCHITECTURES[config.family]
  if not config.head:
    return [base]
  named = hf.get('architectures') or [whole]
  if (named == [base] and huggingface.head_of(config)
      or huggingface.names_classifier(named)):
    return [whole]
  return named


def check_new(directory: str | os.PathLike[str]) -> Path:
  """Returns the absolute path of a directory to write.

  '~' is the home directory, and links are followed: '.' and '..' have no name
  of their own, and a link cannot be replaced by a directory.

  Raises:
    FileExistsError: if there is a file, or a directory that is not empty.
  """
  path = Path(directory).expanduser().resolve()
  if path.exists() and not path.is_dir():
    raise ExistsError(f'{directory} is a file; give another directory.')
  if path.is_dir() and any(x.name != _PART for x in path.iterdir()):
    raise ExistsError(
        f'{directory} is there already and not empty; give another directory.')
  return path


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike):
  """Gives a place to write to that becomes ``directory`` when all is written.

  ``with new_directory(d) as (part, first)``: every process enters, and the
  first one writes into ``part``. An empty directory that is there already is
  kept, as it may be the working directory, a link or a mount; its files appear
  in it at the end, the config.json that makes it a model last.

  Raises:
    FileExistsError: as `check_new`.
  """
  first, problem, path = jax.process_index() == 0, None, None
  if first:
    try:
      path = check_new(directory)
    except ExistsError as e:
      problem = e
  failed = problem is not None
  if jax.process_count() > 1:  # all raise, or none
    failed = multihost_utils.broadcast_one_to_all(np.array(failed))
  if failed:
    raise problem or ExistsError(
        f'{directory} is a file, or a directory that is not empty.')
  part = None
  kept = path is not None and path.is_dir()
  if path is not None:
    part = path / _PART if kept else path.with_name(path.name + _PART)
    shutil.rmtree(part, ignore_errors=True)  # from a run that was stopped
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
  """The safetensors files, of ``most`` bytes; none where ``part`` is None."""
  files, batch, held, total = [], {}, 0, 0

  def flush():
    nonlocal batch, held
    files.append(list(batch))
    if part:
      save_file(batch, part / f'{len(files)}.safetensors', {'format': 'pt'})
    batch, held = {}, 0

  names = {row.name.format(l=l) for row in rows
           for l in range(config.num_layers if row.stacked else 1)}
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
  """Raises one error for all leaves that are missing, unexpected or misshapen.
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
  """Yields (name, whole tensor on the host), layer by layer."""
  flat: dict[str, Any] = flatten_dict(params, sep='/')
  for group in _grouped(rows):
    leaves = [flat[row.path] for row in group]
    for layer in range(len(leaves[0]) if group[0].stacked else 1):
      parts = [row.write(on_host(_floats(leaf, layer if row.stacked else None)))
               for row, leaf in zip(group, leaves)]
      tensor = np.ascontiguousarray(
          np.concatenate(parts, -1) if len(parts) > 1 else parts[0])
      yield group[0].name.format(l=layer), tensor
      if group[0].copy:
        yield group[0].copy, tensor.copy()


def _floats(leaf, layer: int | None):
  """A leaf, or a layer of one, as a weight."""
  if layer is not None:
    leaf = jax.tree.map(lambda x: x[layer], leaf)
  return leaf.astype(leaf.dtype) if is_codes(leaf) else leaf


def _grouped(rows: list[Row]) -> list[list[Row]]:
  """Rows that are parts of one tensor together, in the order of the parts."""
  groups = {}
  for row in rows:
    groups.setdefault(row.name, []).append(row)
  return [sorted(group, key=lambda row: row.part) for group in groups.values()]


def on_host(x: Any) -> np.ndarray:
  """A whole array, of all processes' devices."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
  return np.asarray(x)


def _name_files(part: Path, files: list[list[str]], total: int):
  """Names one file or many as Hugging Face does, with an index for many."""
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
