r"""ZO-SGD-Cons: a step is made only if the batch's loss says that it helps."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import perturbed
from mezo_jax.transforms import losses as losses_lib
from mezo_jax.transforms.mezo import descent
from mezo_jax.transforms.spsa import check_part, spsa
from mezo_jax.transforms.types import ZerothOrderTransformation
from mezo_jax.variants._told import told


def conservative(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, directions: Directions | str = Normal(),
    num_samples: int | None = None, micro_batches: int | None = None,
    weight_decay: float = 0.0, decay: Any = None,
    stochastic_rounding: bool = True, **options: Any
) -> ZerothOrderTransformation:
  r"""MeZO that takes the best of three points for its step.

  .. math:: \theta \leftarrow \arg\min_{\theta' \in \{\theta, \theta - \eta
            \hat g, \theta + \eta \hat g\}} \mathcal{L}(\theta'; \mathcal{B}),
            \qquad \hat g = \frac{1}{n} \sum_j g_j z_j

  (ZO-Bench, Zhang et al., 2024, arXiv:2402.11592.) 2n + 3 evaluations. The
  three are of displaced weights, so nothing is tried on the weights themselves.
  Weight decay, if any, is added to what was chosen. Options are those of
  `mezo_jax.mezo`; the state has :math:`g_j` of the chosen point: 0, or negated.
  """
  directions = as_directions(directions)
  learning_rate = arguments.rate(
      'learning_rate', learning_rate, groups=False)
  n = 1 if num_samples is None else num_samples
  estimate = spsa(
      eps, key=key, directions=directions, num_samples=n,
      micro_batches=micro_batches, dtype=jnp.float32, **options)

  def make(state, memory, params, given):
    del memory
    part = given.get('part')
    if part is not None and check_part(part)[1] > 1:
      raise ValueError(
          f'part={part} evaluates some of the directions, and conservative '
          'tries the step of all of them.')
    seen = estimate.update(None, state, params, **given)[1]
    value_fn = given.pop('value_fn')
    batch = losses_lib.accepted(value_fn, given)
    made = state.count - state.total_notfinite  # what a schedule counts
    rate = arguments.at(learning_rate, made)
    keys = directions.keys(state.key, state.count, n)
    z = Displacement(keys, jnp.ones(n, jnp.float32)).after(seen.value)

    def loss(sign):
      point = z.times(sign * rate * seen.projected_grad / n)
      return losses_lib.mean_over_parts(
          lambda part: perturbed(value_fn, directions)(params, point, **part),
          batch, micro_batches or 1)
    signs = jnp.array([0.0, -1.0, 1.0])  # the first of equals
    losses = lax.map(loss, signs)
    best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
    # A g that is not finite is a skipped step, whatever the others are.
    return seen.value, jnp.where(
        jnp.isfinite(seen.projected_grad), -signs[best], 1.0
    ) * seen.projected_grad

  return descent(
      told(estimate, make), learning_rate, key=key, directions=directions,
      weight_decay=weight_decay, decay=decay,
      stochastic_rounding=stochastic_rounding)
