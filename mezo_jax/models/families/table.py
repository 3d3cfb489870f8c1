"""Defines how parameters correspond to the tensors of a checkpoint.

Each parameter has one `Row`. The functions below return the rows of common
groups of parameters.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from mezo_jax.models.layers import Config


@dataclasses.dataclass(frozen=True)
class Row:
  """Maps one parameter to its tensor, or tensors, in a checkpoint.

  Attributes:
    path: Path of the parameter, such as 'layers/attn/q/kernel'.
    shape: Shape of the parameter, without the layer axis.
    name: Name of the tensor. A name with ``{l}`` means one tensor per layer;
      they are stacked along a leading axis. A name with ``{{e}}`` means one
      tensor per expert, too. These are then one tensor with the leading axis
      'e' for ``layout``; see `Experts`.
    layout: A letter for each axis, first in the order of the tensor, then in
      the order of the parameter: ``'f d -> d f'`` is a transpose. From these
      letters `mezo_jax.core.sharding` decides which axes to split: 'v', 'n' and
      'f' are vocabulary, heads and feed-forward, and 'd' is the width.
    part: ``(i, n)`` means that the parameter is part i of n equal parts of the
      tensor along its last axis. Defaults to (0, 1), the whole tensor.
    otherwise: Name of the tensor to read if there is no tensor ``name``.
      It may have a ``{l}``, too. Defaults to None, for no other name.
    copy: Another name under which files may contain the same tensor again.
      `save` writes it under both names. Defaults to None, for no other name.
    together: For tensors of experts, ``(name, i, n)``: a tensor of all experts,
      which files may have instead. The parameter is part i of n equal parts of
      its second axis. Defaults to None, for no such tensor.
  """

  path: str
  shape: tuple[int, ...]
  name: str
  layout: str
  part: tuple[int, int] = (0, 1)
  otherwise: str | None = None
  copy: str | None = None
  together: tuple[str, int, int] | None = None

  @property
  def stacked(self) -> bool:
    """Returns whether the parameter has a layer axis."""
    return '{l}' in self.name

  @property
  def of_experts(self) -> bool:
    """Returns whether there is a tensor for each expert."""
    return '{{e}}' in self.name

  def names(self, config: Config) -> list[str]:
    """Returns the names of all tensors of the parameter."""
    layers = range(config.num_layers if self.stacked else 1)
    found = [self.name.format(l=l) for l in layers]
    if not self.of_experts:
      return found
    return [name.format(e=e) for name in found for e in range(self.shape[0])]

  def other_names(self, config: Config) -> list[str]:
    """Returns the names that its tensors may have instead."""
    layers = range(config.num_layers if self.stacked else 1)
    names = [self.otherwise, self.together and self.together[0]]
    return [name.format(l=l) for name in names if name for l in layers]

  def without_prefix(self, prefix: str) -> 'Row':
    """Returns the row with names of tensors without a prefix."""
    cut = lambda name: name and name.removeprefix(prefix)
    together = self.together and (cut(self.together[0]), *self.together[1:])
    return dataclasses.replace(self, name=cut(self.name), otherwise=cut(
        self.otherwise), together=together)

  @property
  def axes(self) -> str:
    """Returns a letter for each axis of the parameter except the layer axis."""
    return self.layout.split('->')[1].replace(' ', '')

  def _order(self) -> list[int]:
    """Returns the axis of the parameter for each axis of the tensor."""
    return [self.axes.index(a) for a in self.layout.split('->')[0].split()]

  @property
  def last(self) -> int:
    """Returns the axis of the parameter that is the last axis of the tensor."""
    return self._order()[-1]

  def source_shape(self) -> tuple[int, ...]:
    """Returns the shape of the tensor in the checkpoint."""
    *rest, last = (self.shape[i] for i in self._order())
    return (*rest, last * self.part[1])

  def read(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a block of the parameter, and nothing else of the tensor.

    Args:
      tensor: The tensor of one layer; it is read when it is sliced.
      index: A slice of each axis of the parameter except the layer axis.
    """
    order = self._order()
    *rest, last = (index[i] for i in order)
    skip = self.part[0] * self.shape[order[-1]]
    last = slice(last.start + skip, last.stop + skip)
    return np.asarray(tensor[(*rest, last)]).transpose(np.argsort(order))

  def write(self, block: np.ndarray) -> np.ndarray:
    """Returns one layer of the parameter in the layout of the tensor."""
    return block.transpose(self._order())


class Experts:
  """Presents the tensors of the experts of a layer as one tensor."""

  def __init__(self, tensors: Sequence[Any]):
    """Takes the tensors of the experts, in their order."""
    self._tensors = tensors

  def get_shape(self) -> list[int]:
    """Returns the shape, with the axis of the experts first."""
    shapes = {tuple(x.get_shape()) for x in self._tensors}
    return [len(self._tensors), *(shapes.pop() if len(shapes) == 1 else ())]

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a block; ``index`` has a slice for each axis."""
    first, *rest = index
    return np.stack([
        np.asarray(x[tuple(rest)]) for x in self._tensors[first]])


class Part:
  """Presents one of equal parts of a tensor along its second axis."""

  def __init__(self, tensor: Any, part: int, parts: int):
    """Takes the tensor, the number of the part and the number of parts."""
    self._tensor, self._part, self._parts = tensor, part, parts

  def get_shape(self) -> list[int]:
    """Returns the shape of the part."""
    first, second, *rest = self._tensor.get_shape()
    return [first, second // self._parts, *rest]

  def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a block; ``index`` has a slice for each axis."""
    first, second, *rest = index
    skip = self._part * self.get_shape()[1]
    second = slice(second.start + skip, second.stop + skip)
    return np.asarray(self._tensor[(first, second, *rest)])


# --- the kinds of parameters ------------------------------------------------


def embedding(path: str, name: str, rows: int, width: int, letter: str = 'v',
              **kwargs: Any) -> list[Row]:
  """Returns the row of an embedding table.

  Args:
    path: Path of the table's module, such as 'embed'.
    name: Name of the tensor, without '.weight'.
    rows: Number of rows of the table.
    width: Length of each row.
    letter: What the rows stand for: 'v' tokens, 's' positions, or 't' token
      types. Defaults to 'v'.
    **kwargs: Further fields of the `Row`.
  """
  return [Row(f'{path}/embedding', (rows, width), f'{name}.weight',
              f'{letter} d -> {letter} d', **kwargs)]


def linear(path: str, name: str, inputs: tuple[str, int],
           outputs: tuple[str, int], bias: bool) -> list[Row]:
  """Returns the rows of a `torch.nn.Linear`.

  Args:
    path: Path of the linear module, such as 'layers/attn/q'.
    name: Name of the tensors, without '.weight' and '.bias'.
    inputs: Letter and length of the input axis.
    outputs: Letter and length of the output axis.
    bias: Whether there is a bias.
  """
  (i, n), (o, m) = inputs, outputs
  rows = [Row(
      f'{path}/kernel', (n, m), f'{name}.weight', f'{o} {i} -> {i} {o}')]
  if bias:
    rows.append(Row(f'{path}/bias', (m,), f'{name}.bias', f'{o} -> {o}'))
  return rows


def norm(path: str, name: str, width: int, bias: bool) -> list[Row]:
  """Returns the rows of a norm: its scale, and its bias if it has one.

  Args:
    path: Path of the norm's module, such as 'layers/attn_norm'.
    name: Name of the tensors, without '.weight' and '.bias'.
    width: Length of the vectors that are normalised.
    bias: Whether there is a bias.
  """
  rows = [Row(f'{path}/scale', (width,), f'{name}.weight', 'd -> d')]
  if bias:
    rows.append(Row(f'{path}/bias', (width,), f'{name}.bias', 'd -> d'))
  return rows


def attention(c: Config, q: str, k: str, v: str, o: str) -> list[Row]:
  """Returns the rows of the attention matrices.

  Args:
    c: Config of the model.
    q: Name of the query tensors, without '.weight' and '.bias'.
    k: Name of the key tensors.
    v: Name of the value tensors.
    o: Name of the output tensors.
  """
  d = ('d', c.width)
  n, m = (('n', heads * c.head_width)
          for heads in (c.num_heads, c.num_kv_heads))
  return [
      *linear('layers/attn/q', q, d, n, c.qkv_bias),
      *linear('layers/attn/k', k, d, m, c.qkv_bias),
      *linear('layers/attn/v', v, d, m, c.qkv_bias),
      *linear('layers/attn/o', o, n, d, c.out_bias)]


def mlp(c: Config, up: str, down: str, gate: str = '') -> list[Row]:
  """Returns the rows of the feed-forward matrices.

  Args:
    c: Config of the model.
    up: Name of the first matrix, without '.weight' and '.bias'.
    down: Name of the last matrix.
    gate: Name of the gate's matrix. Defaults to '', for no gate.
  """
  d, f = ('d', c.width), ('f', c.ff_width)
  return [
      *(linear('layers/mlp/gate', gate, d, f, c.mlp_bias) if gate else []),
      *linear('layers/mlp/up', up, d, f, c.mlp_bias),
      *linear('layers/mlp/down', down, f, d, c.mlp_bias)]


def experts(c: Config, layer: str, router: str, gate: str, up: str, down: str
            ) -> list[Row]:
  """Returns the rows of a mixture of experts.

  Args:
    c: Config of the model.
    layer: Prefix of the names that transformers gives tensors of all experts,
      as in ``mlp.experts.gate_up_proj``.
    router: Name of the router's tensor, without '.weight'.
    gate: Name of the tensors of the experts' gates, with ``{{e}}`` for the
      number of the expert.
    up: Name of the other first matrices.
    down: Name of the last matrices.
  """
  e, d, f = ('e', c.num_experts), ('d', c.width), ('f', c.ff_width)
  def each(name, tensor, inputs, outputs, whole, *part):
    (i, n), (o, m) = inputs, outputs
    return Row(f'layers/experts/{name}/kernel', (c.num_experts, n, m),
               f'{tensor}.weight', f'e {o} {i} -> e {i} {o}',
               together=(f'{layer}experts.{whole}', *part))
  (row,) = linear('layers/experts/router', router, d, e, False)
  return [dataclasses.replace(row, otherwise=f'{layer}gate.weight'),
          each('gate', gate, d, f, 'gate_up_proj', 0, 2),
          each('up', up, d, f, 'gate_up_proj', 1, 2),
          each('down', down, f, d, 'down_proj', 0, 1)]
