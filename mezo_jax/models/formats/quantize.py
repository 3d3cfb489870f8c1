"""Makes `mezo_jax.QuantizedArray` of floats or of the weights of a GGUF file.

A matrix has a scale for each 32 weights along the axis that is last in the
files, as a rule the inputs; the rest (norms, biases, tables of few rows) are
floats. Of 4 bits embeddings have 8, as llama.cpp has it: they are scored
against, too.
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

_LEAST = 2**10  # weights; fewer are not worth it


@dataclasses.dataclass(frozen=True)
class Form:
  """What one parameter is quantised to."""

  bits: int
  offsets: bool
  axis: int  # of one layer's, from the end: where weights share scales
  kept: bool = False  # the file's own codes

  def parts(self, shape: tuple[int, ...]
            ) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
    """Shapes and dtypes of the arrays of `QuantizedArray`."""
    axis = len(shape) + self.axis
    at = lambda n: (*shape[:axis], n, *shape[axis + 1:])
    n = shape[axis]
    groups = n // quantized.GROUP if n % quantized.GROUP == 0 else 1
    runs = at(groups), jnp.float16
    out = {'codes': (shape, jnp.int8) if self.bits == 8 else (
        at(n // 2), jnp.uint8), 'scales': runs}
    return out | ({'offsets': runs} if self.offsets else {})

  def codes(self, arrays: dict[str, Any]) -> QuantizedArray:
    packed = self.axis if self.bits == 4 else None
    return QuantizedArray(bits=self.bits, packed=packed, **arrays)


def form(row: Row, dtype: Any, tensors: dict[str, Any] | None = None,
         layers: int = 1) -> Form | None:
  """How a parameter is quantised; None if it is not.

  Args:
    row: of it.
    dtype: 'int8', 'int4', or 'codes', which is as ``tensors`` of a GGUF file
      are, if those of all ``layers`` are of one kind that is known.
    tensors: by their names; for 'codes'.
    layers: of the model.
  """
  if (dtype not in QUANTISED or len(row.shape) != 2
      or np.prod(row.shape) < _LEAST):
    return None
  axis = row.last - 2
  if dtype != 'codes':
    coarse = dtype == 'int4' and not row.path.endswith('/embedding')
    bits = 4 if coarse and row.shape[axis] % 2 == 0 else 8
    return Form(bits, bits == 4, axis)
  assert tensors is not None  # codes are those of a file
  kinds = {tensors[row.name.format(l=l)].kind
           for l in range(layers if row.stacked else 1)}
  known = gguf.CODES.get(kinds.pop()) if len(kinds) == 1 else None
  return known and Form(*known, axis, kept=True)


def shapes(shape: tuple[int, ...], form_: Form, place: Any) -> QuantizedArray:
  """A parameter as shapes; ``place(shape)`` says where an array is."""
  return form_.codes({
      name: jax.ShapeDtypeStruct(part, dtype, sharding=place(part))
      for name, (part, dtype) in form_.parts(shape).items()})


def read(row: Row, shape: tuple[int, ...], form_: Form, tensors: dict[str, Any],
         place: Any) -> QuantizedArray:
  """One parameter; each device's part of it is read and quantised alone.

  Args:
    row: of it.
    shape: of all its layers.
    form_: what it becomes.
    tensors: by their names.
    place: from the shape of an array to where it is.
  """
  axis, n = len(shape) + form_.axis, shape[form_.axis]

  @functools.cache  # codes, scales and offsets are of the same weights
  def block(index: tuple[tuple[int, int], ...]):
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
    run = n // part[axis]
    def of(index):
      index = [i.indices(m)[:2] for i, m in zip(index, part)]
      start, stop = (run * i for i in index[axis])
      # A device's part may begin amid weights that share a scale.
      index[axis] = first, _ = start // group * group, -(-stop // group) * group
      cut = [slice(None)] * len(part)
      cut[axis] = slice((start - first) // run, (stop - first) // run)
      return block(tuple(index))[name][tuple(cut)].astype(dtype)
    return jax.make_array_from_callback(part, place(part), of)

  return form_.codes({name: make(name, *of) for name, of in parts.items()})


def _layer(row: Row, tensor, index, form_: Form) -> dict[str, Any]:
  """The arrays of (a part of) one layer."""
  if not form_.kept:
    q, scales, offsets = quantized.quantized(
        row.read(tensor, index), form_.bits, 2 + form_.axis)
  else:
    q, scales, offsets = (
        x if x is None else row.read(_Runs(x, run), index)
        for x, run in tensor.codes())
  if form_.bits == 4:
    q = np.asarray(quantized.pack(q, form_.axis))
  out = {'codes': q, 'scales': scales}
  return out | ({} if offsets is None else {'offsets': offsets})


class _Runs:
  """A tensor with an entry for each run along its last axis."""

  def __init__(self, array, run: int):
    self.array, self.run = array, run

  def __getitem__(self, index):
    first, last = index
    return self.array[first, last.start // self.run:last.stop // self.run]
