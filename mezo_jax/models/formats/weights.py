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

EXPLICIT = 'transformers_weights'  # Field of config.json that names a file.
_INDEX = '.index.json'


def open_files(path: Path, stack: contextlib.ExitStack) -> list[Any]:
  """Opens the weight files of a directory.

  Args:
    path: The directory of a model.
    stack: An exit stack that closes the files when it is closed.

  Returns:
    Pairs of a name and a tensor, for all tensors of these files. A tensor has
    ``get_shape()`` and is read when it is sliced.

  Raises:
    FileNotFoundError: If there is no weight file, or one that an index lists is
      missing.
    ValueError: If a file or an index cannot be read.
  """
  open_, files, _ = _find(path)
  if not files:
    raise MissingError(
        f'{path} has no .safetensors file and no pytorch_model.bin; fetch the '
        'weights, or give another directory.')
  missing = [f.name for f in files if not f.is_file()]
  if missing:
    raise MissingError(f'{path} lacks {", ".join(missing)}; fetch the weights '
                       'again.')
  return [found for file in files for found in open_(file, stack)]


def names(path: Path) -> list[str]:
  """Returns the names of a directory's tensors, or [] if it has no weights.

  The names are read from the files, or from the index if some of the files it
  lists are missing.

  Raises:
    ValueError: If a file or an index cannot be read.
  """
  open_, files, indexed = _find(path)
  if not all(file.is_file() for file in files):
    return indexed
  with contextlib.ExitStack() as stack:
    return [name for file in files for name, _ in open_(file, stack)]


def _find(path: Path) -> tuple:
  """Chooses the weight files as transformers does.

  It prefers safetensors to PyTorch's files. Among files of one kind, it prefers
  a single file to an index, which may be left over from an earlier save. If the
  directory has none of the four names that transformers knows, it takes all
  files of one kind together.

  Returns:
    ``open_, files, indexed``: the function that opens a file, the files, and
    the names of the tensors if there is an index.
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
  """Returns the file that config.json names, or None if it names none.

  This file takes precedence over all others.

  Raises:
    ValueError: If it is not a safetensors file, or an index of such files,
      within the directory.
  """
  try:
    config = json.loads((path / 'config.json').read_text())
  except (OSError, ValueError):
    return None  # load_config reports this error.
  name = config.get(EXPLICIT) if isinstance(config, dict) else None
  if name is None:
    return None
  if not (isinstance(name, str) and _is_within(name) and name.endswith(
      ('.safetensors', '.safetensors' + _INDEX))):
    raise InputError(
        f'{path}/config.json: {EXPLICIT} is {name!r}; it must be the name of a '
        'safetensors file, or of an index of such files, in this directory.')
  return name


def _indexed(index: Path) -> tuple[list[Path], list[str]]:
  """Returns the files and the names of the tensors that an index lists.

  Raises:
    FileNotFoundError: If there is no index.
    ValueError: If it cannot be read, or lists a file outside of its directory.
  """
  try:
    named = dict(json.loads(index.read_text())['weight_map'])
  except FileNotFoundError:
    raise MissingError(f'{index}, which config.json names, does not exist; '
                       'fetch it.') from None
  except (KeyError, TypeError, ValueError) as e:
    raise InputError(
        f'{index} has no readable weight_map; fetch it again, or delete it if '
        'the model is a single file.') from e
  files = sorted({*map(str, named.values())})
  outside = [name for name in files if not _is_within(name)]
  if outside:
    raise InputError(f'{index} lists {outside[0]!r}, which is not a file of '
                     'its directory; fetch it again.')
  if not files:
    raise InputError(f'{index} lists no tensors; fetch it again.')
  return [index.parent / name for name in files], [*named]


def _is_within(name: str) -> bool:
  """Returns whether a name is that of a file, without any directory."""
  return bool(name) and Path(name).name == name and name != '..'


def _open_safetensors(file: Path, stack: contextlib.ExitStack) -> list:
  """Opens a safetensors file; returns pairs of a name and a lazy slice."""
  try:
    opened = stack.enter_context(safe_open(file, framework='numpy'))
  except Exception as e:
    raise InputError(
        f'{file} is not a readable safetensors file ({e}); fetch it again.'
    ) from e
  return [(name, opened.get_slice(name)) for name in opened.keys()]
