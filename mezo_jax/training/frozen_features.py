"""Caches the activations of frozen layers.

If nothing below the last k layers is trained, the input of these layers is the
same in every step. `keep` computes it once for each row, and steps and
evaluations run the other layers only.
"""

from collections.abc import Callable
import errno
import functools
import hashlib
import os
from pathlib import Path
import re
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np

from mezo_jax import models, peft
from mezo_jax.core import fingerprint, paths
from mezo_jax.core.errors import InputError
from mezo_jax.tasks import evaluate, score
from mezo_jax.tasks.encode import Encoded, Kept
from mezo_jax.training import build as build_lib
from mezo_jax.training import methods

_TRUNK = r'^(embed|project_in|positions|types|embed_norm|prompt|layers)/'
_FORMAT = 2  # of the files; those of another format are computed again


def is_frozen(trained: Any) -> bool:
  """Returns whether all trained parameters come after the `layers` of a model.
  """
  return not any(re.search(_TRUNK, path)
                 for path, _ in paths.named_leaves(trained))


def keep(config: Any, built: build_lib.Built, directory: str | os.PathLike[str],
         say: Callable[[str], None] = print) -> build_lib.Built:
  """Returns the same run with cached activations of its frozen layers.

  Batches then have the activations, D numbers per token. Up to
  ``config.trunk_memory`` they are kept in memory, else in files of
  ``directory``, which a resumed run finds again if rows and weights are the
  same. ``frozen`` keeps the parameters that steps and evaluations still read.
  These are all parameters if answers are generated, which takes the whole
  model.

  Args:
    config: Config of the run.
    built: The run. If it is abstract, the activations are zeros.
    directory: Directory for files.
    say: Reports what is cached, and where.

  Returns:
    The run, unchanged if a layer below is trained, if ``config.keep_trunk`` is
    off, or if all answers are generated.
  """
  if not config.keep_trunk or not is_frozen(built.params):
    return built
  splits, model = built.splits, built.model
  of = {name: getattr(splits, name) for name in ('train', 'dev', 'test')}
  of |= {f'prior_{name}': data for name, data in splits.prior.items()}
  of |= {f'gold_{name}': data for name, data in splits.gold.items()}
  wanted = {k: v for k, v in of.items() if not v.generates}
  if not wanted:
    return built

  # Memory or files?
  like = jax.tree.leaves(built.params)[0]
  dtype = np.dtype(models.float_dtype(config.model.dtype))
  shape = lambda data: (int(data.lengths.sum()), model.config.width)
  size = sum(int(np.prod(shape(data))) for data in wanted.values()) * (
      dtype.itemsize)
  abstract = isinstance(like, jax.ShapeDtypeStruct)
  in_files = size > config.trunk_memory * 2**30 and not abstract
  where = f'files of {directory}' if in_files else 'memory'
  rows = sum(len(data.prompts) for data in wanted.values())
  much = f' {size / 2**20:.0f} MiB,'
  if methods.method_of(config).private:
    much = ''  # it would tell how long the rows are
  say(f'trunk: all below what is trained is computed once for each of {rows} '
      f'rows,{much} and kept in {where}')

  # Compute.
  whole = peft.join(built.params, built.frozen)
  below, rest = peft.split(built.frozen, _TRUNK)
  if abstract:
    kept = {name: np.broadcast_to(np.zeros((), dtype), shape(data))
            for name, data in wanted.items()}
  else:
    mark = _mark(config, model, below) if in_files else ''
    sizes = build_lib.eval_sizes(config, splits)
    kept = {}
    for name, data in wanted.items():
      file = (Path(directory) / f'{name}-{_name(mark, data)}' if in_files
              else None)
      kept[name] = _computed(model, whole, data, sizes[name], built.mesh,
                             dtype, shape(data), file)
  of |= {name: data._replace(trunk=Kept(
      kept[name], np.cumsum(data.lengths) - data.lengths))
         for name, data in wanted.items()}

  # Keep the frozen parameters that are still read.
  if len(wanted) < len(of):
    rest = built.frozen
  elif model.config.tied_head and not config.task.traits.new_head:
    rest = peft.join(rest, {'embed': built.frozen['embed']})
  return built._replace(frozen=rest, splits=splits._replace(
      train=of['train'], dev=of['dev'], test=of['test'],
      prior={name: of[f'prior_{name}'] for name in splits.prior},
      gold={name: of[f'gold_{name}'] for name in splits.gold}))


def _computed(model, params, data: Encoded, sizes, mesh, dtype, shape,
              file: Path | None) -> np.ndarray:
  """Returns activations [tokens, D], in memory or of a file, which may exist.
  """
  opened = lambda path: np.memmap(path, dtype, 'r', shape=shape)
  if file and _everywhere(file.exists()):
    return opened(file)
  writes = not file or jax.process_index() == 0
  part = None if file is None else file.with_suffix('.part')
  if not file:
    out = np.empty(shape, dtype)
  elif writes and part is not None:
    file.parent.mkdir(parents=True, exist_ok=True)
    _make_room(part, int(np.prod(shape)) * dtype.itemsize)
    out = np.memmap(part, dtype, 'r+', shape=shape)
  ends = np.cumsum(data.lengths)

  def write(index, x_BxSxD):
    x_BxSxD = np.asarray(x_BxSxD.addressable_data(0))
    for i, row in enumerate(index):
      n = data.row_length(row)
      out[ends[row] - n:ends[row]] = x_BxSxD[i, :n]

  waiting = None  # the device goes on while the host writes
  for found in evaluate.each_batch(
      _trunk(model, dtype), data, sizes, mesh)(params):
    if waiting and writes:
      write(*waiting)
    waiting = found
  if writes:
    assert waiting is not None  # there are rows
    write(*waiting)
  if not file:
    return out
  if writes and part is not None:
    assert isinstance(out, np.memmap)
    out.flush()
    os.replace(part, file)
    for other in file.parent.glob(f'{file.name.partition("-")[0]}-*'):
      if other != file:  # of other rows or weights
        other.unlink()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'trunk {file.name}')
  return opened(file)


@functools.lru_cache(maxsize=4)  # splits share what is compiled
def _trunk(model, dtype) -> Callable:
  def trunk(params, batch):
    return score.apply(model, params, batch)(
        features='trunk', shared_prompt='answer_of' in batch).astype(dtype)
  return trunk


def _make_room(file: Path, size: int) -> None:
  """Makes a file of so many bytes and reserves the room on the disk.

  Writing into a memory map for which the disk has no room kills the process
  without a message.

  Raises:
    InputError: if the disk does not have the room.
  """
  with file.open('wb') as f:
    try:
      f.truncate(size)
      if hasattr(os, 'posix_fallocate'):  # not on a Mac
        os.posix_fallocate(f.fileno(), 0, size)
    except OSError as e:
      if e.errno == errno.EOPNOTSUPP:  # a file system that cannot tell
        return
      file.unlink()
      raise InputError(
          f'{file.parent} has no room for {size / 2**30:.2f} GiB of rows\' '
          f'trunks ({e.strerror}): make some, choose another --workdir, or set '
          '--config.keep_trunk=False.') from e


def _everywhere(here: bool) -> bool:
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(jnp.asarray(here)).all())


def _mark(config, model, below: dict) -> str:
  """Returns a text that is equal for equal weights, on any mesh."""
  return repr((_FORMAT, model.config, config.model.dtype,
               fingerprint.of_weights(below)))


def _name(mark: str, data: Encoded) -> str:
  rows = repr((mark, data.prompts, data.candidates, data.types))
  return hashlib.sha256(rows.encode()).hexdigest()[:32]
