"""One row a parameter: where it is in a checkpoint and how it is laid out."""

import dataclasses
from typing import Any

import numpy as np

from mezo_jax.models.layers import Config


@dataclasses.dataclass(frozen=True)
class Row:
  """A parameter of ours and the tensor(s) of a checkpoint it is read from.

  ``layout`` names the axes, the checkpoint's first: ``'f d -> d f'``. A name
  with ``{l}`` stands for one tensor a layer, stacked on a leading axis.
  """

  path: str
  shape: tuple[int, ...]  # of one layer
  name: str
  layout: str
  part: tuple[int, int] = (0, 1)  # (i, n): the i-th of n parts of its last axis
  otherwise: str | None = None  # the tensor to read where ``name`` is not there
  copy: str | None = None  # another name that files give the same tensor

  @property
  def stacked(self) -> bool:
    return '{l}' in self.name

  @property
  def axes(self) -> str:
    """A letter for each axis of one layer of ours."""
    return self.layout.split('->')[1].replace(' ', '')

  def _order(self) -> list[int]:
    """Of which axis of ours each axis of the checkpoint is."""
    return [self.axes.index(a) for a in self.layout.split('->')[0].split()]

  @property
  def last(self) -> int:
    """Which axis of ours is the checkpoint's last."""
    return self._order()[-1]

  def source_shape(self) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor."""
    *rest, last = (self.shape[i] for i in self._order())
    return (*rest, last * self.part[1])

  def read(self, tensor: Any, index: tuple[slice, ...]) -> np.ndarray:
    """The part ``index`` of our array; nothing else of the tensor is read."""
    order = self._order()
    *rest, last = (index[i] for i in order)
    skip = self.part[0] * self.shape[order[-1]]
    last = slice(last.start + skip, last.stop + skip)
    return np.asarray(tensor[(*rest, last)]).transpose(np.argsort(order))

  def write(self, block: np.ndarray) -> np.ndarray:
    """One layer of ours in the layout of the checkpoint."""
    return block.transpose(self._order())


# --- the kinds of parameters ------------------------------------------------


def embedding(path: str, name: str, rows: int, width: int, letter: str = 'v',
              **kwargs: Any) -> list[Row]:
  """A table with a row a token ('v') or a position ('s')."""
  return [Row(f'{path}/embedding', (rows, width), f'{name}.weight',
              f'{letter} d -> {letter} d', **kwargs)]


def linear(path: str, name: str, inputs: tuple[str, int],
           outputs: tuple[str, int], bias: bool) -> list[Row]:
  """A `torch.nn.Linear`: (letter, size) of its inputs and outputs."""
  (i, n), (o, m) = inputs, outputs
  rows = [Row(
      f'{path}/kernel', (n, m), f'{name}.weight', f'{o} {i} -> {i} {o}')]
  if bias:
    rows.append(Row(f'{path}/bias', (m,), f'{name}.bias', f'{o} -> {o}'))
  return rows


def norm(path: str, name: str, width: int, bias: bool) -> list[Row]:
  """The scale of a norm and, of a LayerNorm, its bias."""
  rows = [Row(f'{path}/scale', (width,), f'{name}.weight', 'd -> d')]
  if bias:
    rows.append(Row(f'{path}/bias', (width,), f'{name}.bias', 'd -> d'))
  return rows


def attention(c: Config, q: str, k: str, v: str, o: str) -> list[Row]:
  """Queries, keys, values and output, under the checkpoint's four names."""
  d = ('d', c.width)
  n, m = (('n', heads * c.head_width)
          for heads in (c.num_heads, c.num_kv_heads))
  return [
      *linear('layers/attn/q', q, d, n, c.qkv_bias),
      *linear('layers/attn/k', k, d, m, c.qkv_bias),
      *linear('layers/attn/v', v, d, m, c.qkv_bias),
      *linear('layers/attn/o', o, n, d, c.out_bias)]


def mlp(c: Config, up: str, down: str, gate: str = '') -> list[Row]:
  """The feed-forward matrices, under the checkpoint's names."""
  d, f = ('d', c.width), ('f', c.ff_width)
  return [
      *(linear('layers/mlp/gate', gate, d, f, c.mlp_bias) if gate else []),
      *linear('layers/mlp/up', up, d, f, c.mlp_bias),
      *linear('layers/mlp/down', down, f, d, c.mlp_bias)]
