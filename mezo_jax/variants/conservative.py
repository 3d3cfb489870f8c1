r"""ZO-SGD-Cons: makes a step only if the loss of the batch says that it helps.

.. math:: \theta \leftarrow \arg\min_{\theta' \in \{\theta, \theta - \eta
          \hat g, \theta + \eta \hat g\}} \mathcal{L}(\theta'; \mathcal{B}),
          \qquad \hat g = \frac{1}{n} \sum_j g_j z_j

Source: ZO-Bench (Zhang et al., 2024, arXiv:2402.11592).
"""

from typing import Any, Unpack

from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions


def conservative(eps: Any = 1e-3, *, learning_rate: float | optax.Schedule,
                 **options: Unpack[SpsaOptions]) -> Estimator:
  r"""SPSA whose projected gradients are kept, negated or set to 0.

  A step takes 2n + 3 evaluations. Weight decay, if any, is added to the point
  that was chosen.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`.
    learning_rate: :math:`\eta`, the one that `mezo_jax.mezo` has: a number or a
      schedule.
    **options: Other options of `mezo_jax.spsa`.
  """
  spsa = Spsa(eps, **options)
  learning_rate = arguments.rate('learning_rate', learning_rate, groups=False)

  def measure(state, params, value_fn, batch):
    value, g = spsa.measure(state, params, value_fn, batch)
    g = jnp.where(jnp.isfinite(value), g, jnp.nan)
    made = state.count - state.total_notfinite  # the count of a schedule
    rate = arguments.at(learning_rate, made)
    z, loss = spsa.z(state).after(value), spsa.loss_at(params, value_fn, batch)
    signs = jnp.array([0.0, -1.0, 1.0])  # of equal losses the first counts
    losses = lax.map(
        lambda sign: loss(z.times(sign * rate * g / spsa.num_samples)), signs)
    best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
    # If g is not finite the step is skipped, whatever the losses are.
    return value, jnp.where(jnp.isfinite(g), -signs[best], 1.0) * g

  return Estimator(spsa, measure=measure)
