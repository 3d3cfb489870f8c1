"""One row a parameter: where it is in a checkpoint and how it is laid out."""

import dataclasses
import re

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
  """A parameter of ours and the tensor(s) of a checkpoint it is read from.

  ``layout`` is written as in einops, checkpoint first: ``'(n h) d -> d n h'``.
  A name with ``{l}`` stands for one tensor a layer, stacked on a leading axis.
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
    return ''.join(self._axes()[1])

  def _axes(self) -> tuple[list[list[str]], list[str]]:
    source, target = self.layout.split('->')
    groups = [(g or n).split() for g, n in
              re.findall(r'\(([^)]*)\)|(\w+)', source)]
    return groups, target.split()

  def source_shape(self) -> tuple[int, ...]:
    """The shape of the checkpoint's tensor."""
    groups, target = self._axes()
    size = dict(zip(target, self.shape))
    return tuple(int(np.prod([size[a] for a in g])) for g in groups)

  def read(self, tensor, index: tuple[slice, ...]) -> np.ndarray:
    """The part ``index`` of our array, from a sliceable tensor.

    Only what is needed is read, but for the inner axes of a group: of
    ``(n h)`` whole heads are.
    """
    groups, target = self._axes()
    size = dict(zip(target, self.shape))
    part = {a: range(size[a])[i] for a, i in zip(target, index)}
    cut, shape, names = [], [], []
    for first, *inner in groups:
      step = int(np.prod([size[a] for a in inner]))
      cut.append(slice(part[first].start * step, part[first].stop * step))
      shape += [len(part[first]), *(size[a] for a in inner)]
      names += [first, *inner]
    block = np.asarray(tensor[tuple(cut)]).reshape(shape)
    block = block.transpose([names.index(a) for a in target])
    outer = {g[0] for g in groups}
    return block[tuple(slice(None) if a in outer else
                       slice(part[a].start, part[a].stop) for a in target)]
