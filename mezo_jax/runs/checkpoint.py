"""Saves and loads the checkpoints of a run with orbax.

The newest checkpoints and the best one on the dev rows are kept.
"""

from collections.abc import Iterator
import contextlib
import errno
import functools
import glob
import logging
import os
from pathlib import Path
import shutil
from typing import Any, cast

from etils import epath
from etils.epath import gpath
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from mezo_jax.core import fingerprint
from mezo_jax.core.errors import (
  Damaged,
  first_line,
  InputError,
  MissingError,
  of_the_disk,
)


@epath.register_path_cls
class _Directory(gpath.PosixGPath):
  """Represents a directory whose path may contain glob characters such as [.

  orbax searches directories with ``path.glob('...*')``, and etils interprets
  the path itself as a part of the pattern.
  """

  def glob(self, pattern: str) -> Iterator['_Directory']:
    """Yields the entries of the directory that match a pattern."""
    for name in glob.glob(pattern, root_dir=os.fspath(self)):
      yield self / name


# orbax logs an exception, with its traceback, in each thread that the exception
# passes through, and then raises it to the caller as well. The exception is
# enough, so these log records are dropped.
logging.getLogger('absl').addFilter(lambda record: not (
    record.levelno >= logging.ERROR and 'orbax' in record.pathname))


class Checkpoints:
  """Saves and loads the checkpoints of one directory.

  A checkpoint gets its final name when it is complete. So a run that was killed
  while it saved resumes from the previous checkpoint.
  """

  def __init__(self, directory: Path, keep: int = 1, clean: bool = True):
    """Opens a directory, which need not exist yet.

    Args:
      directory: Directory of the checkpoints.
      keep: Number of the newest checkpoints to keep, in addition to the best.
        Defaults to 1.
      clean: Whether to remove incomplete checkpoints of a killed run. Must be
        False while another run may write to the directory. Defaults to True.

    Raises:
      Damaged: If orbax cannot open the directory.
      OSError: If the system does not allow it, or the disk is full.
    """
    policies = ocp.training.preservation_policies
    best = policies.BestN(
        # orbax declares a float but only compares the results, so a tuple that
        # breaks ties works, too.
        n=1, get_metric_fn=cast(Any, order),
        keep_checkpoints_without_metrics=False)
    self._directory = directory.absolute()
    try:
      self._checkpointer = ocp.training.Checkpointer(
          _Directory(self._directory), cleanup_tmp_directories=clean,
          preservation_policy=cast(Any, policies.AnyPreservationPolicy(
              [policies.LatestN(keep), best])))
    except Exception as e:
      _raise_of_the_disk(e, self._directory, _REFUSED | _FULL)
      newest = self._path(latest_step(self._directory))
      raise Damaged(
          f'orbax cannot open {directory}, because a checkpoint may be '
          f'damaged ({first_line(e)[:200]}). Move the newest one, {newest}, '
          'elsewhere and run the same command again; it resumes from the one '
          'before.') from e

  def save(self, step: int, state: Any, metrics: dict[str, Any] | None = None
           ) -> None:
    """Starts to save a checkpoint in the background.

    The arrays may be donated after this has returned.

    Args:
      step: Number of completed steps.
      state: A tree of arrays. PRNG keys must have the implementation
        threefry2x32.
      metrics: ``{'score': ..., 'loss': ...}`` on the dev rows. Defaults to
        None, for a step without an evaluation. A step without metrics, or with
        one that is not finite, is never the best.

    Raises:
      OSError: If the disk does not accept the data of this checkpoint or of an
        earlier one.
    """
    if metrics and not _is_finite(metrics):
      metrics = None
    state = _key_data(state)
    # The record is saved with the checkpoint. `load` compares it with what it
    # reads, since orbax alone may not notice that a file is damaged.
    recorded = {'state': fingerprint.of_weights(state), 'metrics': metrics,
                'leaves': fingerprint.of_leaves(state)}
    recorded['check'] = fingerprint.of(recorded)
    with self._writing():
      self._checkpointer.save_async(
          step, state, metrics=metrics, force=True, custom_metadata=recorded)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Raises OSError if a write to the disk fails in any thread of orbax."""
    try:
      yield
    except Exception as e:
      _raise_of_the_disk(e, self._directory)
      raise

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, or None without one."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, in increasing order."""
    return [c.step for c in self._checkpointer.checkpoints]

  def best_step(self) -> int:
    """Returns the step with the best metrics; see `order`.

    Raises:
      MissingError: If no checkpoint has finite metrics.
    """
    self.wait()
    scored = [c for c in self._checkpointer.checkpoints
              if _is_finite(c.metrics)]
    if not scored:
      raise MissingError(
          f'{self._checkpointer.directory} has no checkpoint with a finite '
          'evaluation, so there is no best step.')
    return max(scored, key=lambda c: order(c.metrics)).step

  def load(self, step: int, like: Any) -> Any:
    """Loads the state of a step.

    Args:
      step: A step that has a checkpoint.
      like: A tree of arrays or shapes that has the structure, shapes, dtypes
        and shardings of the state.

    Raises:
      Damaged: If the checkpoint is not what was saved.
      InputError: If the checkpoint belongs to another model.
      OSError: If the system does not allow to read it.
    """
    def abstract(x):
      """Returns the shape of a leaf as it is stored."""
      data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
      return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)
    like_data, recorded = jax.tree.map(abstract, like), self._recorded(step)
    if recorded['leaves'] != fingerprint.of_leaves(like_data):
      raise InputError(
          f'checkpoint {self._path(step)} belongs to another model: the names, '
          'shapes or dtypes of its arrays differ. Choose another --workdir.')
    try:
      state = self._checkpointer.load(step, like_data)
    except Exception as e:
      _raise_of_the_disk(e, self._path(step), _REFUSED)
      raise self._damaged(step, e) from e
    if recorded['state'] != fingerprint.of_weights(state):
      raise self._damaged(step, 'its checksum differs')
    def restored(x, like):
      """Returns a loaded leaf, with the data of a key turned into a key."""
      if not _is_key(like):
        return x
      return jax.jit(_wrap, out_shardings=like.sharding)(x)
    return jax.tree.map(restored, state, like)

  def _recorded(self, step: int) -> dict:
    """Returns what `save` recorded about the contents of a checkpoint.

    Raises:
      Damaged: If the record is missing or damaged, or does not match the
        metrics.
    """
    try:
      about = self._checkpointer.metadata(step)
      recorded: dict[str, Any] = dict(cast(Any, about.custom_metadata) or {})
    except Exception as e:
      _raise_of_the_disk(e, self._path(step), _REFUSED)
      raise self._damaged(step, e) from e
    if (recorded.pop('check', '') != fingerprint.of(recorded)
        or recorded['metrics'] != about.metrics):
      raise self._damaged(
          step, 'the record of its contents is missing or wrong')
    return recorded

  def _path(self, step: int) -> Path:
    """Returns the directory of a checkpoint."""
    return self._directory / str(step)

  def _damaged(self, step: int, why) -> Damaged:
    """Returns the error for a damaged checkpoint.

    Args:
      step: Step of the checkpoint.
      why: The reason, a phrase or an exception.
    """
    return Damaged(
        f'checkpoint {self._path(step)} is damaged ({first_line(why)[:200]}). '
        'Training moves it aside and resumes without it.')

  def set_aside(self, step: int) -> Path:
    """Moves a damaged checkpoint to another directory.

    All processes must call it.

    Args:
      step: Step of the checkpoint.

    Returns:
      The new path.
    """
    self.wait()
    to = self._aside / str(step)
    _meet('looked')  # no process may read it any more when it is moved
    if jax.process_index() == 0:
      shutil.rmtree(to, ignore_errors=True)
      to.parent.mkdir(exist_ok=True)
      self._path(step).rename(to)
    _meet('moved')
    self._checkpointer.reload()
    return to

  def delete_after(self, step: int) -> None:
    """Deletes the checkpoints of all steps after this one."""
    self.wait()
    for later in [s for s in self.steps() if s > step]:
      self._checkpointer.delete(later)

  def was_set_aside(self, step: int) -> bool:
    """Returns whether `set_aside` moved a checkpoint of this step before."""
    return (self._aside / str(step)).exists()

  @property
  def _aside(self) -> Path:
    """Returns the directory for damaged checkpoints."""
    return self._directory.parent / 'damaged'

  def wait(self) -> None:
    """Waits until the checkpoints that `save` started are on the disk."""
    with self._writing():
      self._checkpointer.wait()

  def close(self) -> None:
    """Waits like `wait`, and closes the directory."""
    with self._writing():
      self._checkpointer.close()


# Errors with these numbers do not mean that a checkpoint is damaged. `_REFUSED`
# is for missing permissions, `_FULL` for a disk that is full or read-only.
_REFUSED = frozenset({errno.EACCES, errno.EPERM})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def _raise_of_the_disk(e: Exception, path: Path,
                       codes: frozenset[int] | None = None) -> None:
  """Raises OSError if an exception of orbax is a file-system error.

  Otherwise it returns, and the caller decides what the exception means.

  Args:
    e: The exception.
    path: The file or directory that orbax was reading or writing.
    codes: The error numbers to raise for. Defaults to None, for all that
      `mezo_jax.core.errors.of_the_disk` recognises.
  """
  code = of_the_disk(e)
  if code is not None and (codes is None or code in codes):
    raise OSError(code, os.strerror(code), str(path)) from e


def _meet(name: str) -> None:
  """Waits until all processes have called this function with this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def latest_step(directory: Path) -> int:
  """Returns the last step that is saved in a directory, or 0 for none.

  It may be called while a run writes to the directory. It reads only names, and
  the name of an incomplete checkpoint is not a number.

  Args:
    directory: Directory of checkpoints, which need not exist.
  """
  steps = [int(path.name) for path in directory.glob('*')
           if path.name.isdigit()]
  return max(steps, default=0)


# All keys in a state have this implementation; see
# `mezo_jax.directions.noise.as_key`.
_wrap = functools.partial(jax.random.wrap_key_data, impl='threefry2x32')


def _key_data(state):
  """Returns a state with PRNG keys replaced by their data.

  The data are ordinary arrays, which orbax can save on any number of processes.
  """
  return jax.tree.map(
      lambda x: jax.random.key_data(x) if _is_key(x) else x, state)


def _is_key(x) -> bool:
  """Returns whether an array is of typed PRNG keys."""
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_finite(metrics: Any) -> bool:
  """Returns whether both the score and the loss are finite numbers."""
  return all(isinstance(x, float | int) and -np.inf < x < np.inf for x in (
      (metrics or {}).get('score'), (metrics or {}).get('loss')))


def order(metrics: Any) -> tuple[float, float]:
  """Returns the sort key by which checkpoints are ranked, the best last.

  A higher score is better. Of equal scores, the one with the lower loss is
  better. Missing metrics, and metrics that are not finite, rank lowest.

  Args:
    metrics: ``{'score': ..., 'loss': ...}``, or None.
  """
  if metrics is None or not _is_finite(metrics):
    return -np.inf, -np.inf
  return metrics['score'], -metrics['loss']
