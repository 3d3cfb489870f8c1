"""Checkpoints of a run, kept by orbax: the newest, and the best on dev."""

from collections.abc import Iterator, Sequence
import contextlib
import errno
import functools
import glob
import logging
import os
from pathlib import Path
import shutil
import tempfile
from typing import Any

from etils import epath
from etils.epath import gpath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from mezo_jax.core import fingerprint
from mezo_jax.core.errors import (
  first_line,
  InputError,
  MissingError,
  of_the_disk,
)


@epath.register_path_cls
class _Directory(gpath.PosixGPath):
  """A directory whose name may have the characters of a pattern.

  orbax searches directories by ``path.glob('...*')``, for which etils takes the
  path itself as a pattern too.
  """

  def glob(self, pattern: str) -> Iterator['_Directory']:
    for name in glob.glob(pattern, root_dir=os.fspath(self)):
      yield self / name


# orbax logs an error with its traceback in each thread that it passes, and
# raises it all the same.
logging.getLogger('absl').addFilter(lambda record: not (
    record.levelno >= logging.ERROR and 'orbax' in record.pathname))


class Damaged(InputError):
  """A checkpoint that is not what was saved."""


class Checkpoints:
  """The checkpoints of one working directory.

  A checkpoint is written beside the others and named only when it is complete:
  a run killed while saving goes on from the one before.
  """

  def __init__(self, directory: Path, keep: int = 1, clean: bool = True):
    """Opens a directory, which need not be there yet.

    Args:
      directory: of the checkpoints.
      keep: how many of the newest stay, beside the best.
      clean: remove what a killed run has half written; not while one runs.
    """
    policies = ocp.training.preservation_policies
    best = policies.BestN(
        n=1, get_metric_fn=order, keep_checkpoints_without_metrics=False)
    open_ = functools.partial(
        ocp.training.Checkpointer, _Directory(directory.absolute()),
        cleanup_tmp_directories=clean,
        preservation_policy=policies.AnyPreservationPolicy(
            [policies.LatestN(keep), best]))
    self._directory, self.put_aside = directory.absolute(), []
    try:
      self._checkpointer = open_()
    except Exception as e:
      _raise_of_the_disk(e, self._directory, _REFUSED | _FULL)
      damaged = [*_unreadable(self._directory)]
      if not damaged or not clean:
        raise Damaged(
            f'checkpoints of {directory} are damaged '
            f'({", ".join(map(str, damaged))}: {first_line(e)[:200]}). '
            'train.py puts them aside and goes on without them.') from e
      self.put_aside = self._move(damaged)
      self._checkpointer = open_()

  def save(self, step: int, state: Any, metrics: dict | None = None) -> None:
    """Starts to save; the arrays may be donated as soon as this returns.

    Args:
      step: the number of steps made.
      state: a tree of arrays, threefry keys included.
      metrics: ``score`` and ``loss`` of the dev rows, where there was an
        evaluation. With one that is not finite the step is never the best.
    """
    if metrics and not _is_finite(metrics):
      metrics = None
    # Key data, not keys: an array like any other, on however many processes.
    state = jax.tree.map(
        lambda x: jax.random.key_data(x) if _is_key(x) else x, state)
    recorded = {'state': fingerprint.of_weights(state), 'metrics': metrics,
                'leaves': fingerprint.of_leaves(state)}
    recorded['check'] = fingerprint.of(recorded)
    with self._writing():
      self._checkpointer.save_async(
          step, state, metrics=metrics, force=True, custom_metadata=recorded)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Raises OSError for what the disk refuses, in whichever thread of orbax
    that was."""
    try:
      yield
    except Exception as e:
      _raise_of_the_disk(e, self._directory)
      raise

  def latest_step(self) -> int | None:
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def steps(self) -> list[int]:
    """The steps that there are checkpoints of."""
    return [c.step for c in self._checkpointer.checkpoints]

  def best_step(self) -> int:
    """The step with the best metrics.

    Raises:
      FileNotFoundError: if no checkpoint has metrics that are finite.
    """
    self.wait()
    scored = [c for c in self._checkpointer.checkpoints
              if _is_finite(c.metrics)]
    if not scored:
      raise MissingError(
          f'{self._checkpointer.directory} has no checkpoint whose evaluation '
          'is finite: there is no best step.')
    return max(scored, key=lambda c: order(c.metrics)).step

  def load(self, step: int, like: Any) -> Any:
    """The state of a step, with the shapes, dtypes and shardings of ``like``.

    Raises:
      Damaged: if it is not what was saved.
      InputError: if it is of another model.
    """
    def abstract(x):
      data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
      return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)
    def restore(x, like):
      if _is_key(x) or not _is_key(like):  # a key: of an earlier version
        return x
      return jax.jit(_wrap, out_shardings=like.sharding)(x)
    like_data, recorded = jax.tree.map(abstract, like), self._recorded(step)
    other = InputError(
        f'checkpoint {self._path(step)} cannot be read: it is of another '
        'model, or of a version that kept another state. Choose another '
        '--workdir.')
    if recorded.get('leaves') not in (None, fingerprint.of_leaves(like_data)):
      raise other
    try:
      state = self._checkpointer.load(step, like_data)
    except Exception as e:
      _raise_of_the_disk(e, self._path(step), _REFUSED)
      # Of an earlier version nothing tells the one from the other.
      raise (self._damaged(step, e) if recorded else other) from e
    if recorded.get('state') not in (None, fingerprint.of_weights(jax.tree.map(
        lambda x: jax.random.key_data(x) if _is_key(x) else x, state))):
      raise self._damaged(step, 'its checksum is another')
    return jax.tree.map(restore, state, like)

  def _recorded(self, step: int) -> dict:
    """What a checkpoint says of itself; {} of an earlier version."""
    try:
      about = self._checkpointer.metadata(step)
      recorded = dict(about.custom_metadata or {})
    except Exception as e:
      _raise_of_the_disk(e, self._path(step), _REFUSED)
      raise self._damaged(step, e) from e
    if recorded and (recorded.pop('check', '') != fingerprint.of(recorded)
                 or recorded.get('metrics') != about.metrics):
      raise self._damaged(step, 'what it says of itself is not what was saved')
    return recorded

  def _path(self, step: int) -> Path:
    return self._directory / str(step)

  def _damaged(self, step: int, why) -> 'Damaged':
    return Damaged(
        f'checkpoint {self._path(step)} is damaged ({first_line(why)[:200]}). '
        'train.py puts it aside and goes on without it.')

  def set_aside(self, step: int) -> Path:
    """Moves a checkpoint out of the way and returns where to."""
    self.wait()
    to, = self._move([self._path(step)])
    self._checkpointer.reload()
    return to

  def delete_after(self, step: int) -> None:
    """Deletes the checkpoints of all later steps."""
    self.wait()
    for later in [s for s in self.steps() if s > step]:
      self._checkpointer.delete(later)

  def was_set_aside(self, step: int) -> bool:
    """Returns whether a checkpoint of this step was set aside before."""
    return (self._aside / str(step)).exists()

  @property
  def _aside(self) -> Path:
    return self._directory.parent / 'damaged'

  def _move(self, paths: Sequence[Path]) -> list[Path]:
    moved = [self._aside / path.name for path in paths]
    _meet('looked')  # another process may still read them
    if jax.process_index() == 0:
      for path, to in zip(paths, moved):
        shutil.rmtree(to, ignore_errors=True)
        to.parent.mkdir(exist_ok=True)
        path.rename(to)
    _meet('moved')
    return moved

  def wait(self) -> None:
    with self._writing():
      self._checkpointer.wait()

  def close(self) -> None:
    with self._writing():
      self._checkpointer.close()


# Errors that are no sign of a damaged checkpoint.
_REFUSED = frozenset({errno.EACCES, errno.EPERM})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def _raise_of_the_disk(e: Exception, path: Path,
                       codes: frozenset[int] | None = None) -> None:
  """Raises OSError if an exception of orbax means that the system refused to
  read or write, with one of these codes."""
  code = of_the_disk(e)
  if code is not None and (codes is None or code in codes):
    raise OSError(code, os.strerror(code), str(path)) from e


def _meet(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def latest_step(directory: Path) -> int:
  """The last step saved in a directory, 0 for none; nothing is read."""
  return max((int(path.name) for path in _complete(directory)), default=0)


def _complete(directory: Path) -> list[Path]:
  """The checkpoints of a directory; one that is being written has no number for
  its name."""
  return [path for path in directory.glob('*') if path.name.isdigit()]


def _unreadable(directory: Path) -> Iterator[Path]:
  """Those that hinder orbax to open a directory: which one, it does not say."""
  for path in _complete(directory):
    with tempfile.TemporaryDirectory() as alone:
      (Path(alone) / path.name).symlink_to(path, target_is_directory=True)
      try:
        ocp.training.Checkpointer(alone).close()
      except Exception:
        yield path


# The only keys that a state has; see `mezo_jax.directions.noise.as_key`.
_wrap = functools.partial(jax.random.wrap_key_data, impl='threefry2x32')


def _is_key(x) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_finite(metrics: dict | None) -> bool:
  return all(isinstance(x, float | int) and -np.inf < x < np.inf for x in (
      (metrics or {}).get('score'), (metrics or {}).get('loss')))


def order(metrics: dict | None) -> tuple:
  """A higher score wins; of equals, the lower loss; what is not finite never
  (earlier versions kept such metrics)."""
  if not _is_finite(metrics):
    return -np.inf, -np.inf
  return metrics['score'], -metrics['loss']
