"""The layers below all that is trained, computed once for each row.

Where nothing below the last k layers is trained, what goes into them is the
same at every step: `keep` computes it once, steps and evaluations run the rest.
"""

from collections.abc import Callable
import errno
import functools
import hashlib
import os
from pathlib import Path
import re

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
_FORMAT = 2  # of the files; another one is made anew


def is_frozen(trained) -> bool:
  """Whether all that is trained comes after ``layers`` of a `Transformer`."""
  return not any(re.search(_TRUNK, path)
                 for path, _ in paths.named_leaves(trained))


def keep(config, built: build_lib.Built, directory: str | os.PathLike,
         say: Callable[[str], None] = print) -> build_lib.Built:
  """The same run with its rows' trunks computed, and without its weights.

  The rows' ``trunk`` are then there in `mezo_jax.tasks.encode.batch_of`, which
  takes D numbers a token: in memory up to ``config.trunk_memory``, beyond in
  files of ``directory``, which are found again if rows and weights are the
  same. ``frozen`` keeps what steps and evaluations still read; all of it where
  answers are generated, which takes the whole model.

  Args:
    config: of the run.
    built: with weights, or abstract: then rows have trunks of zeros.
    directory: for files.
    say: reports what is kept where.

  Returns:
    ``built`` as it was where something below is trained, where
    ``config.keep_trunk`` is off, or where all answers are generated.
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

  # Where to.
  like = jax.tree.leaves(built.params)[0]
  dtype = np.dtype(models.float_dtype(config.model.dtype))
  shape = lambda data: (int(data.lengths.sum()), model.config.width)
  size = sum(int(np.prod(shape(data))) for data in wanted.values()) * (
      dtype.itemsize)
  abstract = isinstance(like, jax.ShapeDtypeStruct)
  in_files = size > config.trunk_memory * 2**30 and not abstract
  where = f'files of {directory}' if in_files else 'memory'
  rows = sum(len(data.prompts) for data in wanted.values())
  private = methods.method_of(config).private
  much = '' if private else f' {size / 2**20:.0f} MiB,'
  say(f'trunk: all below what is trained is computed once for each of {rows} '
      f'rows,{much} and kept in {where}')

  # What.
  whole = peft.join(built.params, built.frozen)
  below, rest = peft.split(built.frozen, _TRUNK)
  if abstract:
    kept = {name: np.broadcast_to(np.zeros((), dtype), shape(data))
            for name, data in wanted.items()}
  else:
    mark = _mark(config, model, below) if in_files else ''
    sizes = evaluate.sizes_of(config, splits)
    kept = {}
    for name, data in wanted.items():
      file = (Path(directory) / f'{name}-{_name(mark, data)}' if in_files
              else None)
      kept[name] = _computed(model, whole, data, sizes[name], built.mesh,
                             dtype, shape(data), file)
  of |= {name: data._replace(trunk=Kept(
      kept[name], np.cumsum(data.lengths) - data.lengths))
         for name, data in wanted.items()}

  # What is still read.
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
  """[tokens, D], in memory or of a file, which may be there already."""
  opened = lambda: np.memmap(file, dtype, 'r', shape=shape)
  if file and _everywhere(file.exists()):
    return opened()
  writes = not file or jax.process_index() == 0
  part = file and file.with_suffix('.part')
  if not file:
    out = np.empty(shape, dtype)
  elif writes:
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
    write(*waiting)
  if not file:
    return out
  if writes:
    out.flush()
    os.replace(part, file)
    for other in file.parent.glob(f'{file.name.partition("-")[0]}-*'):
      if other != file:  # of other rows or weights
        other.unlink()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'trunk {file.name}')
  return opened()


@functools.lru_cache(maxsize=4)  # splits share what is compiled
def _trunk(model, dtype) -> Callable:
  def trunk(params, batch):
    return score.apply(model, params, batch)(
        features='trunk', shared_prompt='answer_of' in batch).astype(dtype)
  return trunk


def _make_room(file: Path, size: int) -> None:
  """Makes a file of so many bytes that the disk has: to write into a map of
  more ends a process without a word.

  Raises:
    InputError: if it has not.
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
  """Of the weights: equal for equal ones, on any mesh."""
  return repr((_FORMAT, model.config, config.model.dtype,
               fingerprint.of_weights(below)))


def _name(mark: str, data: Encoded) -> str:
  rows = repr((mark, data.prompts, data.candidates, data.types))
  return hashlib.sha256(rows.encode()).hexdigest()[:32]
