"""Reads the tensors of ``pytorch_model.bin`` files without torch.

Older checkpoints, such as those of OPT, have no safetensors files. A file of
this format is a zip archive with raw storages and a pickle, which describes
each tensor as a view of a storage. A file cannot run code, since the unpickler
resolves only the names that tensors need. The data of a tensor are read when it
is sliced.
"""

import collections
import contextlib
import mmap
from pathlib import Path
import pickle
import struct
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from mezo_jax.core.errors import InputError

_DTYPES = {
    'FloatStorage': np.float32, 'HalfStorage': np.float16,
    'BFloat16Storage': ml_dtypes.bfloat16, 'DoubleStorage': np.float64,
    'LongStorage': np.int64, 'IntStorage': np.int32, 'BoolStorage': np.bool_,
    'ByteStorage': np.uint8}


class Tensor:
  """Holds a tensor that is read from its file when it is sliced."""

  def __init__(self, array: np.ndarray):
    self.array = array  # A view of the memory-mapped file.

  def get_shape(self) -> list[int]:
    """Returns the shape, as the slices of safetensors do."""
    return list(self.array.shape)

  def __getitem__(self, index: Any) -> np.ndarray:
    return np.array(self.array[index])


class _Unpickler(pickle.Unpickler):
  """Reads the pickle of a file, and raises for anything but tensors.

  Its ``storage`` is a function of a storage's key, dtype and number of elements
  that returns a flat array.
  """

  def __init__(self, file, storage):
    super().__init__(file)
    self.storage = storage

  def find_class(self, module, name):
    """Returns the object of an allowed name; raises ValueError for others."""
    if module == 'torch' and name in _DTYPES:
      return _DTYPES[name]
    allowed = {
        ('collections', 'OrderedDict'): collections.OrderedDict,
        ('torch._utils', '_rebuild_tensor_v2'): self.tensor,
        ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
    }
    if (module, name) not in allowed:
      raise ValueError(f'it contains {module}.{name}, which is not a tensor')
    return allowed[module, name]

  def persistent_load(self, pid):
    """Resolves a reference to a storage, as torch.save writes it."""
    _, dtype, key, _, size = pid
    return self.storage(key, dtype, size)

  def tensor(self, storage, offset, shape, strides, *_):
    """Returns a view of a storage; takes torch's ``_rebuild_tensor_v2`` args.
    """
    bytes_ = storage.dtype.itemsize
    return Tensor(np.ndarray(
        shape, storage.dtype, storage, offset * bytes_,
        [s * bytes_ for s in strides]))


def open_file(file: Path, stack: contextlib.ExitStack) -> list[Any]:
  """Opens a file of PyTorch weights.

  Args:
    file: Path of the file.
    stack: Not used, because the tensors themselves keep the file mapped. All
      readers have this argument.

  Returns:
    Pairs of a name and a `Tensor`.

  Raises:
    ValueError: If it is not a file of this format, or contains anything but
      tensors.
  """
  del stack
  try:
    with zipfile.ZipFile(file) as archive, open(file, 'rb') as raw:
      mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
      entries = {i.filename.split('/', 1)[1]: i for i in archive.infolist()}

      def storage(key, dtype, size):
        """Returns a storage as a flat view of the mapped file."""
        entry = entries[f'data/{key}']
        if entry.compress_type != zipfile.ZIP_STORED:
          raise ValueError('it is compressed')
        # zipfile does not give the position of the data: it follows the local
        # header of 30 bytes, a name and an extra field. The lengths of the
        # latter two are at bytes 26 and 28.
        head = entry.header_offset
        name, extra = struct.unpack_from('<HH', mapped, head + 26)
        start = head + 30 + name + extra
        return np.frombuffer(mapped, dtype, size, start)

      if entries['data.pkl'].compress_type != zipfile.ZIP_STORED:
        raise ValueError('it is compressed')
      with archive.open(entries['data.pkl']) as pickled:
        tensors = dict(_Unpickler(pickled, storage).load())
      for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
          raise ValueError(f'it contains {name!r}, which is not a tensor')
  except Exception as e:
    raise InputError(
        f'{file} is not a readable file of PyTorch weights ({e}). Fetch it '
        'again or, if PyTorch before 1.6 wrote it, convert it to safetensors.'
    ) from e
  return list(tensors.items())
