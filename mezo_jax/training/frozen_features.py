"""Caches the activations of frozen layers.

If only the last layers or the head are trained, the input of the first trained
layer is the same in every step. `keep` computes it once for each row. Steps and
evaluations then run only the layers after it.
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

# Paths of the parameters that the cached activations depend on.
_TRUNK = r'^(embed|project_in|positions|types|embed_norm|prompt|layers)/'
# Version of the files. A file of another version is not used.
_FORMAT = 2


def is_frozen(trained: Any) -> bool:
  """Returns whether the activations after ``layers`` stay constant in training.

  Args:
    trained: The trained parameters. ``layers/...`` and everything before it
      must not be among them; ``last_layers/...`` may.
  """
  return not any(re.search(_TRUNK, path)
                 for path, _ in paths.named_leaves(trained))


def keep(config: Any, built: build_lib.Built, directory: str | os.PathLike[str],
         say: Callable[[str], None] = print) -> build_lib.Built:
  """Returns the same run with cached activations of its frozen layers.

  Batches then contain the activations, ``width`` numbers per token. Up to
  ``config.cache_memory`` GiB are kept in memory. A larger cache is written to
  files, which a resumed run uses again if its rows and weights are the same.

  ``built.frozen`` keeps only the parameters that steps and evaluations still
  read. These are all of them if answers are generated, because generation runs
  the whole model.

  Args:
    config: Config of the run.
    built: The run. If it is abstract, the activations are zeros.
    directory: Directory for the files.
    say: A function that reports a line to the user. Defaults to `print`.

  Returns:
    The run with cached activations. It is unchanged if a parameter of
    ``layers`` or before them is trained, if ``config.cache_frozen`` is False,
    or if the answers of all splits are generated.
  """
  if not config.cache_frozen or not is_frozen(built.params):
    return built
  splits, model = built.splits, built.model
  of = {name: getattr(splits, name) for name in ('train', 'dev', 'test')}
  of |= {f'prior_{name}': data for name, data in splits.prior.items()}
  of |= {f'gold_{name}': data for name, data in splits.gold.items()}
  wanted = {k: v for k, v in of.items() if not v.generates}
  if not wanted:
    return built

  # Decide between memory and files.
  like = jax.tree.leaves(built.params)[0]
  dtype = np.dtype(models.float_dtype(config.model.dtype))
  shape = lambda data: (int(data.lengths.sum()), model.config.width)
  size = sum(int(np.prod(shape(data))) for data in wanted.values()) * (
      dtype.itemsize)
  abstract = isinstance(like, jax.ShapeDtypeStruct)
  in_files = size > config.cache_memory * 2**30 and not abstract
  where = f'files of {directory}' if in_files else 'memory'
  rows = sum(len(data.prompts) for data in wanted.values())
  much = f'{size / 2**20:.0f} MiB, '
  if methods.method_of(config).private:
    much = ''  # the size would reveal the total length of private rows
  say(f'caching frozen-layer activations for {rows} rows ({much}in {where})')

  # Compute the activations.
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
  of |= {name: data._replace(hidden_states=Kept(
      kept[name], np.cumsum(data.lengths) - data.lengths))
         for name, data in wanted.items()}

  # Keep only the frozen parameters that are still read: all of them if some
  # rows are not cached, and the embedding if the head is tied to it.
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
  """Computes the activations of all rows, or opens a file that has them.

  The rows are stored one after the other without padding.

  Args:
    model: The model.
    params: All its parameters.
    data: The encoded rows.
    sizes: Sizes of the batches.
    mesh: Mesh that the parameters are on.
    dtype: Dtype of the activations.
    shape: Their shape, (tokens of all rows, width of the model).
    file: File for the activations; None to keep them in memory.

  Returns:
    The activations, as an array in memory or a read-only memory map.
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
    """Writes the activations of a batch without its padding."""
    x_BxSxD = np.asarray(x_BxSxD.addressable_data(0))
    for i, row in enumerate(index):
      n = data.row_length(row)
      out[ends[row] - n:ends[row]] = x_BxSxD[i, :n]

  # Write each batch after the next one has been dispatched, so that the device
  # computes while the host writes.
  waiting = None
  for found in evaluate.each_batch(
      _hidden_states(model, dtype), data, sizes, mesh)(params):
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
      if other != file:  # a cache for other rows or weights
        other.unlink()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'hidden_states {file.name}')
  return opened(file)


# Cached, so that all splits share the compiled programs.
@functools.lru_cache(maxsize=4)
def _hidden_states(model, dtype) -> Callable:
  """Returns a function that computes the activations of a batch."""
  def hidden_states(params, batch):
    """Runs the frozen layers."""
    found = score.apply(model, params, batch)(
        features='hidden_states', shared_prompt='answer_of' in batch)
    return found.astype(dtype)
  return hidden_states


def _make_room(file: Path, size: int) -> None:
  """Creates a file and reserves its space on the disk.

  If the disk were full later, a write to the memory map would kill the process
  without a message (SIGBUS).

  Args:
    file: The file to create.
    size: Its size in bytes.

  Raises:
    InputError: if the disk does not have enough space.
  """
  with file.open('wb') as f:
    try:
      f.truncate(size)
      if hasattr(os, 'posix_fallocate'):  # macOS lacks it
        os.posix_fallocate(f.fileno(), 0, size)
    except OSError as e:
      if e.errno == errno.EOPNOTSUPP:  # the file system cannot reserve space
        return
      file.unlink()
      raise InputError(
          f'{file.parent} does not have {size / 2**30:.2f} GiB of free space '
          f'for cached activations ({e.strerror}); free some space, choose '
          'another --workdir, or set --config.cache_frozen=False.') from e


def _everywhere(here: bool) -> bool:
  """Returns whether a condition holds on all processes."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.process_allgather(jnp.asarray(here)).all())


def _mark(config, model, below: dict) -> str:
  """Returns a string that identifies the model and its frozen weights.

  The string does not depend on the mesh.
  """
  return repr((_FORMAT, model.config, config.model.dtype,
               fingerprint.of_weights(below)))


def _name(mark: str, data: Encoded) -> str:
  """Returns a file name that identifies rows, model and frozen weights."""
  rows = repr((mark, data.prompts, data.candidates, data.types))
  return hashlib.sha256(rows.encode()).hexdigest()[:32]
