"""Tensors of ``pytorch_model.bin`` files, read without torch.

Such a file is a zip archive of raw storages and a pickle that says which part
of which is a tensor. Only the names that weights need are let through, so that
a file cannot run code, and nothing is read before it is sliced. Older
checkpoints, OPT's among them, have no safetensors.
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
  """A tensor that is read when it is sliced."""

  def __init__(self, array: np.ndarray):
    self.array = array  # a view of the mapped file

  def get_shape(self) -> list[int]:
    return list(self.array.shape)

  def __getitem__(self, index: Any) -> np.ndarray:
    return np.array(self.array[index])


class _Unpickler(pickle.Unpickler):

  def __init__(self, file, storage):
    super().__init__(file)
    self.storage = storage

  def find_class(self, module, name):
    if module == 'torch' and name in _DTYPES:
      return _DTYPES[name]
    allowed = {
        ('collections', 'OrderedDict'): collections.OrderedDict,
        ('torch._utils', '_rebuild_tensor_v2'): self.tensor,
        ('torch._utils', '_rebuild_parameter'): lambda tensor, *_: tensor,
    }
    if (module, name) not in allowed:
      raise ValueError(f'it holds {module}.{name}, which is no weight')
    return allowed[module, name]

  def persistent_load(self, pid):
    _, dtype, key, _, size = pid
    return self.storage(key, dtype, size)

  def tensor(self, storage, offset, shape, strides, *_):
    bytes_ = storage.dtype.itemsize
    return Tensor(np.ndarray(
        shape, storage.dtype, storage, offset * bytes_,
        [s * bytes_ for s in strides]))


def open_file(file: Path, stack: contextlib.ExitStack) -> list[Any]:
  """[(name, tensor)] of a file; ``stack`` is not needed: views keep it open.

  Raises:
    ValueError: if it is not such a file, or holds more than weights.
  """
  del stack
  try:
    with zipfile.ZipFile(file) as archive, open(file, 'rb') as raw:
      mapped = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ)
      entries = {i.filename.split('/', 1)[1]: i for i in archive.infolist()}

      def storage(key, dtype, size):
        entry = entries[f'data/{key}']
        if entry.compress_type != zipfile.ZIP_STORED:
          raise ValueError('it is compressed')
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
          raise ValueError(f'it holds {name!r}, which is no weight')
  except Exception as e:
    raise InputError(
        f'{file} is not a readable file of PyTorch weights ({e}); fetch it '
        'again, or, if it is older than PyTorch 1.6, save the model as '
        'safetensors.') from e
  return list(tensors.items())
