"""The weight files of a directory: their tensors, lazily, or names alone."""

import contextlib
import json
from pathlib import Path

from safetensors import safe_open

from mezo_jax.errors import InputError, MissingError
from mezo_jax.models import torch_files


def open_files(path: Path, stack: contextlib.ExitStack) -> list:
  """[(name, lazily read tensor)] of one or many files.

  Args:
    path: the directory.
    stack: closes the files.

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
  """The tensors' names: an index has them, before the files themselves are
  there; else their headers. [] where no weights are there.

  Raises:
    ValueError: if a file or an index cannot be read.
  """
  open_, files, indexed = _find(path)
  if indexed:
    return indexed
  with contextlib.ExitStack() as stack:
    return [name for file in files for name, _ in open_(file, stack)]


def _find(path: Path) -> tuple:
  """(function that opens a file, the files, the names that an index has)."""
  for whole, pattern, open_ in (
      ('model.safetensors', '*.safetensors', _open_safetensors),
      ('pytorch_model.bin', 'pytorch_model*.bin', torch_files.open_file)):
    index = path / f'{whole}.index.json'
    if index.is_file():
      try:
        named = dict(json.loads(index.read_text())['weight_map'])
      except (KeyError, TypeError, ValueError) as e:
        raise InputError(
            f'{index} has no weight_map that can be read; fetch it again, or '
            'delete it if the model is one file.') from e
      files = sorted({*map(str, named.values())})
      outside = [name for name in files
                 if Path(name).name != name or name == '..']
      if outside:
        raise InputError(f'{index} names {outside[0]!r}, which is no file of '
                         'its directory; fetch it again.')
      return open_, [path / name for name in files], [*named]
    files = ([path / whole] if (path / whole).is_file()
             else sorted(path.glob(pattern)))
    if files:
      return open_, files, []
  return None, [], []


def _open_safetensors(file: Path, stack: contextlib.ExitStack) -> list:
  try:
    opened = stack.enter_context(safe_open(file, framework='numpy'))
  except Exception as e:
    raise InputError(
        f'{file} is not a readable safetensors file ({e}); fetch it again.'
    ) from e
  return [(name, opened.get_slice(name)) for name in opened.keys()]
