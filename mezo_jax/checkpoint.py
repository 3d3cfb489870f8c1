"""Checkpoints of a run, kept by orbax: the latest, and the best on dev."""

from pathlib import Path
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp


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
    # A higher score wins; of equals, the lower loss.
    best = keep.BestN(
        n=1, get_metric_fn=lambda m: (m['score'], -m['loss']),
        keep_checkpoints_without_metrics=False)
    self._checkpointer = ocp.training.Checkpointer(
        directory.absolute(), cleanup_tmp_directories=clean,
        preservation_policy=keep.AnyPreservationPolicy(
            [keep.LatestN(1), best]))

  def save(self, step: int, state: Any, metrics: dict | None = None) -> None:
    """Starts to save; the arrays may be donated as soon as this returns.

    Args:
      step: the number of steps made.
      state: a tree of arrays, typed keys included.
      metrics: ``score`` and ``loss`` of the dev rows, where there was an
        evaluation.
    """
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
      FileNotFoundError: if no checkpoint has metrics.
    """
    self.wait()
    scored = [c for c in self._checkpointer.checkpoints if c.metrics]
    if not scored:
      raise FileNotFoundError('no checkpoint with an evaluation was kept.')
    return max(scored, key=lambda c: (
        c.metrics['score'], -c.metrics['loss'])).step

  def load(self, step: int, like: Any) -> Any:
    """The state of a step, with the shapes, dtypes and shardings of ``like``.

    Raises:
      ValueError: if it cannot be read, or is of another model.
    """
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        like)
    try:
      return self._checkpointer.load(step, abstract)
    except Exception as e:
      where = Path(self._checkpointer.directory) / str(step)
      raise ValueError(
          f'checkpoint {where} cannot be read ({str(e).splitlines()[0]}); '
          'delete that directory to go on from the one before, if any.') from e

  def wait(self) -> None:
    self._checkpointer.wait()

  def close(self) -> None:
    self._checkpointer.close()


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
