r"""The directional derivative itself, by forward-mode differentiation.

.. math:: g = \frac{d}{dc} \mathcal{L}(\theta + c z; \mathcal{B}) \Big|_{c=0}
            = z^\top \nabla \mathcal{L}

What MeZO's difference approaches as :math:`\epsilon \to 0`, without its error
and its choice of :math:`\epsilon`: the baseline that shows what both cost.
Source: Baydin et al., 2022, "Gradients without backpropagation"; Malladi et
al., 2023, Appendix D.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import perturbed
from mezo_jax.transforms import losses
from mezo_jax.transforms.mezo import descent
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.types import ZerothOrderTransformation
from mezo_jax.variants._told import told


def forward_grad(
    learning_rate: float | optax.Schedule,
    *,
    key: jax.Array | int,
    directions: Directions | str = Normal(),
    num_samples: int | None = None,
    micro_batches: int | None = None,
    weight_decay: float = 0.0,
    decay: Any = None,
    stochastic_rounding: bool = True,
) -> ZerothOrderTransformation:
  r"""SGD on :math:`\frac{1}{n} \sum_j (z_j^\top \nabla \mathcal{L}) z_j`.

  One evaluation with its tangent a direction, which takes about as long as two
  and is never beside a z of the weights' size: the derivative is taken by c
  through `mezo_jax.perturbed`, a layer's z at a time. The loss must have a
  derivative. Options are those of `mezo_jax.mezo`.

  Raises:
    ValueError: as `mezo_jax.mezo`.
  """
  directions = as_directions(directions)
  n = 1 if num_samples is None else num_samples
  estimate = spsa(1.0, key=key, directions=directions, num_samples=n,
                  micro_batches=micro_batches, dtype=jnp.float32)

  def make(state, memory, params, given):
    del memory
    value_fn = given.pop('value_fn')
    batch = losses.accepted(value_fn, given)
    keys = directions.keys(state.key, state.count, n)

    def derivative(key):
      def loss(c):
        at = lambda part: perturbed(value_fn, directions)(
            params, Displacement(key, c), **part)
        return losses.mean_over_parts(at, batch, micro_batches or 1)
      return jax.jvp(loss, (jnp.float32(0.0),), (jnp.float32(1.0),))
    values, g = lax.map(derivative, keys)
    return values[0], g

  return descent(
      told(estimate, make), learning_rate, key=key, directions=directions,
      weight_decay=weight_decay, decay=decay,
      stochastic_rounding=stochastic_rounding)
