"""Checkpoints of a run, kept by orbax: the latest, and the best on dev."""

import functools
from pathlib import Path
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from mezo_jax.errors import InputError, MissingError


class Checkpoints:
  """The checkpoints of one working directory.

  A checkpoint is written beside the others and named only when it is complete:
  a run killed while saving goes on from the one before.
  """

  def __init__(self, directory: Path, clean: bool = True):
    """Opens a directory, which need not be there yet.

    Args:
      directory: of the checkpoints.
      clean: remove what a killed run has half written; not while one runs.
    """
    keep = ocp.training.preservation_policies
    best = keep.BestN(
        n=1, get_metric_fn=_order, keep_checkpoints_without_metrics=False)
    self._checkpointer = ocp.training.Checkpointer(
        directory.absolute(), cleanup_tmp_directories=clean,
        preservation_policy=keep.AnyPreservationPolicy(
            [keep.LatestN(1), best]))

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
    self._checkpointer.save_async(step, state, metrics=metrics, force=True)

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
              if c.metrics and _is_finite(c.metrics)]
    if not scored:
      raise MissingError(
          f'{self._checkpointer.directory} has no checkpoint whose evaluation '
          'is finite: there is no best step.')
    return max(scored, key=lambda c: _order(c.metrics)).step

  def load(self, step: int, like: Any) -> Any:
    """The state of a step, with the shapes, dtypes and shardings of ``like``.

    Raises:
      ValueError: if it cannot be read, or is of another model.
    """
    def abstract(x):
      data = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x
      return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=x.sharding)
    def restore(x, like):
      if _is_key(x) or not _is_key(like):  # a key: of an earlier version
        return x
      return jax.jit(_wrap, out_shardings=like.sharding)(x)
    try:
      state = self._checkpointer.load(step, jax.tree.map(abstract, like))
      return jax.tree.map(restore, state, like)
    except Exception as e:
      where = Path(self._checkpointer.directory) / str(step)
      raise InputError(
          f'checkpoint {where} cannot be read ({str(e).splitlines()[0]}); '
          'delete that directory to go on from the one before, if any.') from e

  def wait(self) -> None:
    self._checkpointer.wait()

  def close(self) -> None:
    self._checkpointer.close()


def latest_step(directory: Path) -> int:
  """The last step saved in a directory, 0 for none; nothing is touched."""
  if not directory.is_dir():
    return 0
  checkpoints = Checkpoints(directory, clean=False)
  step = checkpoints.latest_step() or 0
  checkpoints.close()
  return step


# The only keys that there are in a state; see `mezo_jax._noise.as_key`.
_wrap = functools.partial(jax.random.wrap_key_data, impl='threefry2x32')


def _is_key(x) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _is_finite(metrics: dict) -> bool:
  return all(np.isfinite(x) for x in metrics.values())


def _order(metrics: dict) -> tuple:
  """A higher score wins; of equals, the lower loss; what is not finite never
  (earlier versions kept such metrics)."""
  if not _is_finite(metrics):
    return -np.inf, -np.inf
  return metrics['score'], -metrics['loss']


def preemption():
  """``wanted(step)``: whether SIGTERM or Ctrl-C asks for a last checkpoint."""
  if jax.process_count() > 1:  # all processes must agree on the step
    return multihost_utils.reached_preemption_sync_point
  asked = []
  def handle(number, frame):
    del frame
    asked.append(number)
    signal.signal(number, signal.SIG_DFL)  # a second one ends the run at once
  if threading.current_thread() is threading.main_thread():
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, handle)
  return lambda step: bool(asked)
