"""Saves and loads the checkpoints of a run, with orbax.

The newest ones are kept, and the one that is best on dev rows.
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
  """A directory whose name may contain the characters of a glob pattern.

  orbax searches directories with ``path.glob('...*')``, and etils interprets
  the path itself as a part of the pattern.
  """

  def glob(self, pattern: str) -> Iterator['_Directory']:
    for name in glob.glob(pattern, root_dir=os.fspath(self)):
      yield self / name


# orbax logs an error with its traceback in each thread that it passes through,
# and then raises it. The exception alone is enough.
logging.getLogger('absl').addFilter(lambda record: not (
    record.levelno >= logging.ERROR and 'orbax' in record.pathname))


class Checkpoints:
  """The checkpoints of one working directory.

  A checkpoint gets its final name when it is complete. A run that is killed
  while it saves resumes from the checkpoint before.
  """

  def __init__(self, directory: Path, keep: int = 1, clean: bool = True):
    """Opens a directory, which need not exist yet.

    Args:
      directory: Directory of the checkpoints.
      keep: Number of the newest checkpoints that are kept, in addition to the
        best.
      clean: Whether to remove what a killed run left incomplete. Must be False
        while a run writes to the directory.

    Raises:
      Damaged: if orbax cannot open the directory.
    """
    policies = ocp.training.preservation_policies
    best = policies.BestN(
        # orbax compares what this returns, so a tuple is as good as a float.
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
          f'a checkpoint in {directory} is damaged: orbax cannot open the '
          f'directory ({first_line(e)[:200]}). Move the newest one, {newest}, '
          'out of it and run the same command again; the log replays its '
          'steps.') from e

  def save(self, step: int, state: Any, metrics: dict[str, Any] | None = None
           ) -> None:
    """Starts to save. The arrays may be donated as soon as this returns.

    Args:
      step: Number of steps made.
      state: A tree of arrays. PRNG keys must be of threefry2x32.
      metrics: ``score`` and ``loss`` of the dev rows, where they were
        evaluated. If one of them is not finite, the step is never the best.
    """
    if metrics and not _is_finite(metrics):
      metrics = None
    state = _key_data(state)
    recorded = {'state': fingerprint.of_weights(state), 'metrics': metrics,
                'leaves': fingerprint.of_leaves(state)}
    recorded['check'] = fingerprint.of(recorded)
    with self._writing():
      self._checkpointer.save_async(
          step, state, metrics=metrics, force=True, custom_metadata=recorded)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """Raises OSError if the disk refuses to write in any thread of orbax."""
    try:
      yield
    except Exception as e:
      _raise_of_the_disk(e, self._directory)
      raise

  def latest_step(self) -> int | None:
    """Returns the step of the newest checkpoint, None if there is none."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, in order."""
    return [c.step for c in self._checkpointer.checkpoints]

  def best_step(self) -> int:
    """Returns the step with the best metrics.

    Raises:
      MissingError: if no checkpoint has metrics that are finite.
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
    """Returns the state of a step.

    Args:
      step: A step that has a checkpoint.
      like: A tree with the shapes, dtypes and shardings of the state.

    Raises:
      Damaged: if the checkpoint is not what was saved.
      InputError: if the checkpoint is of another model.
    """
    def abstract(x):
      data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
      return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)
    like_data, recorded = jax.tree.map(abstract, like), self._recorded(step)
    if recorded['leaves'] != fingerprint.of_leaves(like_data):
      raise InputError(
          f'checkpoint {self._path(step)} is of another model: its arrays have '
          'other names, shapes or dtypes. Choose another --workdir.')
    try:
      state = self._checkpointer.load(step, like_data)
    except Exception as e:
      _raise_of_the_disk(e, self._path(step), _REFUSED)
      raise self._damaged(step, e) from e
    if recorded['state'] != fingerprint.of_weights(state):
      raise self._damaged(step, 'its checksum differs')
    def restored(x, like):
      if not _is_key(like):
        return x
      return jax.jit(_wrap, out_shardings=like.sharding)(x)
    return jax.tree.map(restored, state, like)

  def _recorded(self, step: int) -> dict:
    """Returns the record that `save` made of a checkpoint's contents."""
    try:
      about = self._checkpointer.metadata(step)
      recorded: dict[str, Any] = dict(cast(Any, about.custom_metadata) or {})
    except Exception as e:
      _raise_of_the_disk(e, self._path(step), _REFUSED)
      raise self._damaged(step, e) from e
    if (recorded.pop('check', '') != fingerprint.of(recorded)
        or recorded['metrics'] != about.metrics):
      raise self._damaged(
          step, 'it has no record of its contents, or a wrong one')
    return recorded

  def _path(self, step: int) -> Path:
    return self._directory / str(step)

  def _damaged(self, step: int, why) -> Damaged:
    return Damaged(
        f'checkpoint {self._path(step)} is damaged ({first_line(why)[:200]}). '
        'Training moves it aside and resumes without it.')

  def set_aside(self, step: int) -> Path:
    """Moves a damaged checkpoint out of the way and returns its new path."""
    self.wait()
    to = self._aside / str(step)
    _meet('looked')  # another process may still read it
    if jax.process_index() == 0:
      shutil.rmtree(to, ignore_errors=True)
      to.parent.mkdir(exist_ok=True)
      self._path(step).rename(to)
    _meet('moved')
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

  def wait(self) -> None:
    """Returns when what `save` started is on the disk."""
    with self._writing():
      self._checkpointer.wait()

  def close(self) -> None:
    """Waits, and closes the directory."""
    with self._writing():
      self._checkpointer.close()


# Errors that do not mean that a checkpoint is damaged.
_REFUSED = frozenset({errno.EACCES, errno.EPERM})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def _raise_of_the_disk(e: Exception, path: Path,
                       codes: frozenset[int] | None = None) -> None:
  """Raises OSError if an exception of orbax comes from the system.

  Args:
    e: The exception.
    path: What orbax was reading or writing.
    codes: The error numbers that count. Defaults to all.
  """
  code = of_the_disk(e)
  if code is not None and (codes is None or code in codes):
    raise OSError(code, os.strerror(code), str(path)) from e


def _meet(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def latest_step(directory: Path) -> int:
  """Returns the last step saved in a directory, 0 for none.

  Only the names are read. A checkpoint that is being written does not have a
  number for its name.
  """
  steps = [int(path.name) for path in directory.glob('*')
           if path.name.isdigit()]
  return max(steps, default=0)


# A state has no other keys; see `mezo_jax.directions.noise.as_key`.
_wrap = functools.partial(jax.random.wrap_key_data, impl='threefry2x32')


def _key_data(state):
  """Returns a state with the data of its keys in their place.

  That is an array like any other, on any number of processes.
  """
  return jax.tree.map(
      lambda x: jax.random.key_data(x) if _is_key(x) else x, state)


def _is_key(x) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_finite(metrics: Any) -> bool:
  return all(isinstance(x, float | int) and -np.inf < x < np.inf for x in (
      (metrics or {}).get('score'), (metrics or {}).get('loss')))


def order(metrics: Any) -> tuple[float, float]:
  """Returns the key by which checkpoints are ranked.

  A higher score is better, and of equal scores the lower loss. Metrics that are
  not finite rank last.
  """
  if metrics is None or not _is_finite(metrics):
    return -np.inf, -np.inf
  return metrics['score'], -metrics['loss']
