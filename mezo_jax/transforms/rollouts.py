r"""Evaluates functions of the weights whose results a reward is computed from.

A reward is often a Python function of a text, which cannot be a part of a
compiled program. A step then has three parts: a program that computes the
*rollouts* (the texts, as tokens) of all members of the population, the rewards
of the rollouts on the host, and the program of the update, which gets the
projected gradients as a replay does.

The first and the second part call ``measure`` of the estimator like any step,
with a `Rollout` and then with the `Recorded` losses in the place of a loss.
`mezo_jax.transforms.estimator.Spsa.losses` recognises them. They work for every
estimator that evaluates the loss once at all of its points.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax.numpy as jnp

from mezo_jax.core import sharding
from mezo_jax.directions.base import Directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.directions.low_rank import LowRank
from mezo_jax.perturb.api import displace
from mezo_jax.transforms import evaluate_points
from mezo_jax.transforms.evaluate_points import Over
from mezo_jax.transforms.losses import accepted


@dataclasses.dataclass(frozen=True)
class Rollout:
  """Marks a function that computes rollouts instead of a loss.

  Attributes:
    fn: A function ``(params, **batch) -> arrays``.
    at_once: Number of points that are evaluated together with over='batch'.
      Defaults to None, for all of them.
    build: With over='scan' and directions that are not low-rank, whether to
      build the weights of a point once. If not, a loop that generates text
      draws z again for each token. Defaults to True.
  """

  fn: Callable[..., Any]
  at_once: int | None = None
  build: bool = True

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Raises an error, since the estimator has called it as a loss."""
    raise ValueError(
        'tx: this estimator evaluates the loss more than once in a step, or at '
        'other points than those of its directions, so it cannot be used with '
        'a reward. Use mezo_jax.mezo or mezo_jax.spsa.')


@dataclasses.dataclass
class Recorded:
  """Holds losses that were measured before, in the place of a loss.

  Attributes:
    losses: The losses [n, len(signs), B].
    signs: The signs s for which they were measured.
    used: Whether the estimator has got them. It gets them once.
  """

  losses: Any
  signs: tuple[float, ...]
  used: bool = False

  __call__ = Rollout.__call__

  def at(self, signs: tuple[float, ...], of_rows: bool) -> Any:
    """Returns the losses [n, len(signs)], or those of rows; see `estimate`."""
    if self.used or signs != self.signs:
      self()
    self.used = True
    losses = jnp.asarray(self.losses, jnp.float32)
    return losses if of_rows else jnp.mean(losses, -1)


class RolledOut(Exception):
  """Carries rollouts out of an estimator.

  Attributes:
    outputs: The results of the `Rollout`.
    signs: The signs s of the estimator.
  """

  def __init__(self, outputs: Any, signs: tuple[float, ...]) -> None:
    super().__init__('this exception is caught by mezo_jax.transforms.step.')
    self.outputs, self.signs = outputs, signs


def evaluate(rollout: Rollout, params: Any, z: Displacement, eps: Any,
             directions: Directions, *, signs: tuple[float, ...], over: Over,
             around: Displacement | None, batch: Mapping[str, Any]) -> Any:
  r"""Evaluates a function at the points of n directions.

  .. math:: o_{j,s} = f(\theta + s \epsilon z_j; \mathcal{B})

  Args:
    rollout: The function f.
    params: The params :math:`\theta`.
    z: A `Displacement` with n terms.
    eps: Perturbation scale; see `evaluate_points.estimate`.
    directions: Distribution of z.
    signs: The factors s.
    over: 'scan' or 'batch'; see `evaluate_points.estimate`.
    around: A displacement that is added to ``params``, or None.
    batch: Arguments of f, by name. Those that it does not take are ignored.

  Returns:
    The results, with the axes [n, len(signs)] before those of their arrays.

  Raises:
    ValueError: If ``over`` is 'rows', or if a pass over all points would build
      several times as many weights as the model has.
  """
  if over == 'rows':
    raise ValueError("over='rows' cannot be used with a reward, since all "
                     "members answer the same prompts; use 'scan' or 'batch'.")
  if over == 'batch':
    points = -(-z.keys.shape[0] * len(signs) // sharding.direction_groups())
    evaluate_points.check_room(
        params, directions, min(points, rollout.at_once or points))
  at = evaluate_points.at_point(
      rollout.fn, params, eps, directions, around, over, z)
  if rollout.build and over == 'scan' and not isinstance(directions, LowRank):
    def at(batch, point):
      """Evaluates the function at weights that are built."""
      point = evaluate_points.sum_of(point.times(eps), around, eps)
      return rollout.fn(displace(params, point, directions), **batch)
  return evaluate_points.over_points(
      at, accepted(rollout.fn, dict(batch)), z, signs, over, rollout.at_once)
