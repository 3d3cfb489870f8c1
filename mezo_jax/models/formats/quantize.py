"""Quantises weights as they are read, or keeps a GGUF file's quantisation.

A matrix has one scale per 32 weights along one axis, the last axis of the
tensor in the file, which is usually that of the inputs. All other parameters
(norms, biases, small tables) are floats. With 'int4', embeddings have 8 bits,
as in llama.cpp, because an embedding may also be the output matrix.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import quantized
from mezo_jax.core.quantized import QUANTISED, QuantizedArray
from mezo_jax.models.families.table import Row
from mezo_jax.models.formats import gguf

_LEAST = 2**10  # Matrices with fewer weights are not quantised.


@dataclasses.dataclass(frozen=True)
class Form:
  """Describes how one parameter is quantised."""

  bits: int  # 8 or 4
  offsets: bool  # Whether there are offsets in addition to scales.
  # Axis along which weights share a scale, counted from the end.
  axis: int
  kept: bool = False  # Whether the quantised weights of the file are kept.

  def parts(self, shape: tuple[int, ...]
            ) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
    """Returns the shape and dtype of each array of a `QuantizedArray`.

    Args:
      shape: Shape of the parameter before quantisation.
    """
    axis = len(shape) + self.axis
    at = lambda n: (*shape[:axis], n, *shape[axis + 1:])
    n = shape[axis]
    groups = n // quantized.GROUP if n % quantized.GROUP == 0 else 1
    runs = at(groups), jnp.float16
    out = {'codes': (shape, jnp.int8) if self.bits == 8 else (
        at(n // 2), jnp.uint8), 'scales': runs}
    return out | ({'offsets': runs} if self.offsets else {})

  def codes(self, arrays: dict[str, Any]) -> QuantizedArray:
    """Returns a `QuantizedArray` of these arrays, named as in `parts`."""
    packed = self.axis if self.bits == 4 else None
    return QuantizedArray(bits=self.bits, packed=packed, **arrays)


def form(row: Row, dtype: Any, tensors: dict[str, Any] | None = None,
         layers: int = 1) -> Form | None:
  """Returns how a parameter is quantised, or None if it is not.

  Args:
    row: Row of the parameter.
    dtype: 'int8', 'int4' or 'codes'; any other dtype results in None. 'codes'
      keeps the quantisation of a GGUF file if all layers have the same kind and
      it is one of `gguf.CODES`.
    tensors: {name: tensor} of the GGUF file. Required for 'codes'.
    layers: Number of layers of the model. Used for 'codes'.
  """
  sizes = row.shape[1:] if row.of_experts else row.shape
  if (dtype not in QUANTISED or len(sizes) != 2
      or np.prod(sizes) < _LEAST):
    return None
  axis = row.last - len(row.shape)
  if dtype != 'codes':
    coarse = dtype == 'int4' and not row.path.endswith('/embedding')
    bits = 4 if coarse and row.shape[axis] % 2 == 0 else 8
    return Form(bits, bits == 4, axis)
  assert tensors is not None
  kinds = {tensors[row.name.format(l=l)].kind
           for l in range(layers if row.stacked else 1)}
  known = gguf.CODES.get(kinds.pop()) if len(kinds) == 1 else None
  return known and Form(*known, axis, kept=True)


def shapes(shape: tuple[int, ...], form_: Form, place: Any) -> QuantizedArray:
  """Returns a `QuantizedArray` of shapes instead of arrays.

  Args:
    shape: Shape of the parameter before quantisation.
    form_: How it is quantised.
    place: A function that returns the sharding of an array of a given shape.
  """
  return form_.codes({
      name: jax.ShapeDtypeStruct(part, dtype, sharding=place(part))
      for name, (part, dtype) in form_.parts(shape).items()})


def read(row: Row, shape: tuple[int, ...], form_: Form, tensors: dict[str, Any],
         place: Any) -> QuantizedArray:
  """Reads and quantises one parameter, separately for each device's shard.

  Args:
    row: Row of the parameter.
    shape: Shape of the parameter, with the layer axis if it is stacked.
    form_: How it is quantised.
    tensors: {name: tensor} of the files.
    place: A function that returns the sharding of an array of a given shape.
  """
  axis, n = len(shape) + form_.axis, shape[form_.axis]

  # The quantised weights, scales and offsets of a shard all come from the same
  # block of the file. The cache reads it once instead of three times.
  @functools.cache
  def block(index: tuple[tuple[int, int], ...]):
    """Returns the arrays for a block, given as (start, stop) per axis."""
    where = tuple(slice(*i) for i in index)
    if not row.stacked:
      return _layer(row, tensors[row.name], where, form_)
    layers, *rest = where
    found = [_layer(row, tensors[row.name.format(l=l)], tuple(rest), form_)
             for l in range(layers.start, layers.stop)]
    return {name: np.stack([x[name] for x in found]) for name in found[0]}

  parts = form_.parts(shape)
  group = n // parts['scales'][0][axis]

  def make(name, part, dtype):
    """Builds one array of the `QuantizedArray` from blocks of weights."""
    run = n // part[axis]  # Number of weights that share an entry.
    def of(index):
      """Returns the shard of the array at an index."""
      index = [i.indices(m)[:2] for i, m in zip(index, part)]
      start, stop = (run * i for i in index[axis])
      # A shard may begin or end within weights that share a scale. So a block
      # of whole groups is read, and the shard is cut out of it.
      index[axis] = first, _ = start // group * group, -(-stop // group) * group
      cut = [slice(None)] * len(part)
      cut[axis] = slice((start - first) // run, (stop - first) // run)
      return block(tuple(index))[name][tuple(cut)].astype(dtype)
    return jax.make_array_from_callback(part, place(part), of)

  return form_.codes({name: make(name, *of) for name, of in parts.items()})


def _layer(row: Row, tensor, index, form_: Form) -> dict[str, Any]:
  """Returns the arrays of `QuantizedArray` for a block of one layer."""
  if not form_.kept:
    q, scales, offsets = quantized.quantized(
        row.read(tensor, index), form_.bits, len(index) + form_.axis)
  else:
    q, scales, offsets = (
        x if x is None else row.read(_Runs(x, run), index)
        for x, run in tensor.codes())
  if form_.bits == 4:
    q = np.asarray(quantized.pack(q, form_.axis))
  out = {'codes': q, 'scales': scales}
  return out | ({} if offsets is None else {'offsets': offsets})


class _Runs:
  """Wraps an array that has one entry per ``run`` weights along its last axis.

  A slice of the last axis counts weights instead of entries. It must begin and
  end at multiples of ``run``.
  """

  def __init__(self, array, run: int):
    self.array, self.run = array, run

  def __getitem__(self, index):
    first, last = index
    return self.array[first, last.start // self.run:last.stop // self.run]
