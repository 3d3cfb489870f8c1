"""One row a parameter: where it is in a checkpoint and how it is laid out."""

import dataclasses

import numpy as np


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

  def source_shape(self) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor."""
    return tuple(self.shape[i] for i in self._order())

  def read(self, tensor, index: tuple[slice, ...]) -> np.ndarray:
    """The part ``index`` of our array; nothing else of the tensor is read."""
    order = self._order()
    block = np.asarray(tensor[tuple(index[i] for i in order)])
    return block.transpose(np.argsort(order))
