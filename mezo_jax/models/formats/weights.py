"""Finds and opens the weight files of a model directory.

The files are chosen in the order in which transformers chooses them.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from mezo_jax.core.errors import InputError, MissingError
from mezo_jax.models.formats import torch_files

EXPLICIT = 'transformers_weights'  # the field of config.json that names a file
_INDEX = '.index.json'


def open_files(path: Path, stack: contextlib.ExitStack) -> list[Any]:
  """Opens the weight files of a directory.

  Args:
    path: the directory.
    stack: closes the files.

  Returns:
    [(name, lazily read tensor)] of all tensors in these files.

  Raises:
    FileNotFoundError: if there are none, or not all that an index names.
    ValueError: if a file or an index cannot be read.
  """
  open_, files, _ = _find(path)
  if not files:
    raise MissingError(
        f'{path} has no .safetensors file and no pytorch_model.bin.')
  missing = [f.name for f in files if not f.is_file()]
  if missing:
    raise MissingError(f'{path} lacks {", ".join(missing)}.')
  return [found for file in files for found in open_(file, stack)]


def names(path: Path) -> list[str]:
  """Returns the tensors' names, [] where no weights are there.

  They are read from the files; where files that an index names are not there
  yet, from the index.

  Raises:
    ValueError: if a file or an index cannot be read.
  """
  open_, files, indexed = _find(path)
  if not all(file.is_file() for file in files):
    return indexed
  with contextlib.ExitStack() as stack:
    return [name for file in files for name, _ in open_(file, stack)]


def _find(path: Path) -> tuple:
  """Chooses the weight files as transformers does.

  A whole file comes before an index, which an earlier save may have left, and
  safetensors come before PyTorch's files. Without any of the four names that
  transformers knows, all files of a kind are taken together.

  Returns:
    ``open_, files, indexed``: the function that opens a file, the files, and
    the tensors' names if an index lists them.
  """
  explicit = _explicit(path)
  if explicit:
    if explicit.endswith(_INDEX):
      return _open_safetensors, *_indexed(path / explicit)
    return _open_safetensors, [path / explicit], []
  kinds = (('model.safetensors', '*.safetensors', _open_safetensors),
           ('pytorch_model.bin', 'pytorch_model*.bin', torch_files.open_file))
  for whole, _, open_ in kinds:
    if (path / whole).is_file():
      return open_, [path / whole], []
    index = path / (whole + _INDEX)
    if index.is_file():
      return open_, *_indexed(index)
  for _, pattern, open_ in kinds:
    files = sorted(path.glob(pattern))
    if files:
      return open_, files, []
  return None, [], []


def _explicit(path: Path) -> str | None:
  """Returns the file that config.json names, which comes before all others.

  Raises:
    ValueError: if it is not a safetensors file, or index, of the directory.
  """
  try:
    config = json.loads((path / 'config.json').read_text())
  except (OSError, ValueError):
    return None  # load_config reports it
  name = config.get(EXPLICIT) if isinstance(config, dict) else None
  if name is None:
    return None
  if not (isinstance(name, str) and _is_within(name) and name.endswith(
      ('.safetensors', '.safetensors' + _INDEX))):
    raise InputError(
        f'{path}/config.json: {EXPLICIT} is {name!r}, which is not the name of '
        'a safetensors file, or of an index of such files, in the directory.')
  return name


def _indexed(index: Path) -> tuple[list[Path], list[str]]:
  """Returns the files and the tensors' names that an index lists."""
  try:
    named = dict(json.loads(index.read_text())['weight_map'])
  except FileNotFoundError:
    raise MissingError(f'{index} is not there.') from None
  except (KeyError, TypeError, ValueError) as e:
    raise InputError(
        f'{index} has no weight_map that can be read; fetch it again, or '
        'delete it if the model is one file.') from e
  files = sorted({*map(str, named.values())})
  outside = [name for name in files if not _is_within(name)]
  if outside:
    raise InputError(f'{index} names {outside[0]!r}, which is no file of '
                     'its directory; fetch it again.')
  if not files:
    raise InputError(f'{index} lists no tensors; fetch it again.')
  return [index.parent / name for name in files], [*named]


def _is_within(name: str) -> bool:
  """Returns whether this is the plain name of a file in a directory."""
  return bool(name) and Path(name).name == name and name != '..'


def _open_safetensors(file: Path, stack: contextlib.ExitStack) -> list:
  try:
    opened = stack.enter_context(safe_open(file, framework='numpy'))
  except Exception as e:
    raise InputError(
        f'{file} is not a readable safetensors file ({e}); fetch it again.'
    ) from e
  return [(name, opened.get_slice(name)) for name in opened.keys()]
