"""Checks the header of a GGUF file against the size of the file.

The `gguf` package trusts the counts and lengths in a header. For a damaged file
it would read for hours or run out of memory, so this check comes first.
"""

import mmap
from pathlib import Path
import struct

import gguf

# Bytes of a value of each type of metadata that has a fixed size.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9  # The types of variable size.
_ALIGNMENT = 32  # Alignment of tensors where the file does not give one.


def check_header(path: Path) -> None:
  """Checks the header of a GGUF file against the size of the file.

  Raises:
    ValueError: If the header is malformed, or has counts, lengths or offsets
      that exceed the file.
  """
  with path.open('rb') as file:
    if path.stat().st_size < 24:
      raise ValueError('it has no header')
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
      _Head(data).check()


class _Head:
  """Steps through the header of a file.

  Attributes:
    data: The bytes of the file.
    at: Position of the next byte to read.
  """

  def __init__(self, data):
    self.data, self.at = data, 0

  def take(self, form: str):
    """Reads a little-endian value with a format of `struct`."""
    size = struct.calcsize('<' + form)
    self.need(size)
    value, = struct.unpack_from('<' + form, self.data, self.at)
    self.at += size
    return value

  def need(self, size: int) -> None:
    """Raises ValueError if the file ends within the next ``size`` bytes."""
    if size > len(self.data) - self.at:
      raise ValueError(f'it ends within the value at byte {self.at}')

  def string(self) -> bytes:
    """Reads a string, whose length is stored before it."""
    size = self.take('Q')
    self.need(size)
    self.at += size
    return self.data[self.at - size:self.at]

  def value(self, kind: int) -> None:
    """Skips a value of the given type."""
    if kind == _STRING:
      self.string()
    elif kind == _ARRAY:
      of, count = self.take('I'), self.take('Q')
      # A string has at least the 8 bytes of its length.
      self.need(count * _SIZES.get(of, 8))
      if of == _STRING:
        for _ in range(count):
          self.string()
      elif of in _SIZES:
        self.at += count * _SIZES[of]
      else:
        raise ValueError(f'it has an array of the unknown type {of}')
    elif kind in _SIZES:
      self.need(_SIZES[kind])
      self.at += _SIZES[kind]
    else:
      raise ValueError(f'it has a value of the unknown type {kind}')

  def check(self) -> None:
    """Reads the whole header; raises ValueError if it does not fit the file."""
    if self.data[:4] != b'GGUF':
      raise ValueError('it does not begin with GGUF')
    self.at = 4
    version, tensors, fields = self.take('I'), self.take('Q'), self.take('Q')
    if version not in (2, 3):
      raise ValueError(f'its version is {version}, not 2 or 3')
    alignment = _ALIGNMENT
    for _ in range(fields):
      name, kind = self.string(), self.take('I')
      if name == b'general.alignment' and kind == 4:
        alignment = struct.unpack_from('<I', self.data, self.at)[0]
      self.value(kind)
    if not 0 < alignment <= 2**20:
      raise ValueError(f'its alignment is {alignment}')
    places = []
    for _ in range(tensors):
      name = self.string()
      dims = self.take('I')
      if not 0 < dims <= 4:
        raise ValueError(f'tensor {name!r} has {dims} axes')
      shape = [self.take('Q') for _ in range(dims)]
      kind, offset = self.take('I'), self.take('Q')
      places.append((offset, offset + _bytes_of(name, shape, kind), name))
    # Offsets count from the end of the header, rounded up to the alignment.
    # Sorted by offset, no tensor may begin before the previous one ends.
    start = -(-self.at // alignment) * alignment
    end = 0
    for first, last, name in sorted(places):
      if first < end or start + last > len(self.data):
        raise ValueError(f'tensor {name!r} overlaps another, or exceeds the '
                         'file')
      end = last


def _bytes_of(name: bytes, shape: list[int], kind: int) -> int:
  """Returns the size of a tensor in bytes."""
  try:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
  except (KeyError, ValueError):
    raise ValueError(f'tensor {name!r} has the unknown type {kind}') from None
  total = 1
  for n in shape:
    total *= n
  if not total or shape[0] % block:
    raise ValueError(f'tensor {name!r} of type {kind} has the impossible shape '
                     f'{shape}')
  return total // block * size
