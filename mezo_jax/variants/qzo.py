r"""QZO: quantised weights whose integers stay, and whose scales are trained.

With a weight :math:`f s q + o` (`mezo_jax.Codes`), a factor f for each scale,
at first 1, is what is perturbed and moved:

.. math::
  g = \mathrm{clip}\left(\frac{\mathcal{L}(f + \epsilon z) - \mathcal{L}(f -
      \epsilon z)}{2 \epsilon}, -C, C\right), \qquad
  f \leftarrow \max(f - \eta g z, 0)

(Shang et al., 2025, "Fine-tuning quantized neural networks with zeroth-order
optimization", of the scales themselves: ours are relative to them, so that one
:math:`\epsilon` fits small and large ones.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, paths
from mezo_jax.core.quantized import FACTORS
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.transforms.mezo import descent
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.types import ZerothOrderTransformation
from mezo_jax.variants._told import told


def qzo(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, clip: float = 100.0,
    directions: Directions | str = Normal(), num_samples: int | None = None,
    weight_decay: float = 0.0, decay: Any = None,
    stochastic_rounding: bool = True, **options: Any
) -> ZerothOrderTransformation:
  r"""MeZO of factors that are never below 0, with bounded projected gradients.

  Its params are `mezo_jax.peft.factors` of a model's, and its ``value_fn`` is
  ``lambda f, batch: loss(mezo_jax.peft.join(f, params), batch)``.

  Args:
    learning_rate: :math:`\eta`.
    eps: see `mezo_jax.spsa`; relative to the scales.
    key: a `jax.random.key` or an integer seed.
    clip: C, of each direction's projected gradient.
    directions: what z is.
    num_samples: directions a step.
    weight_decay: as of `mezo_jax.mezo`, and the next two.
    decay: which factors are decayed.
    stochastic_rounding: of half-precision factors.
    **options: of `mezo_jax.spsa`.

  Raises:
    ValueError: as `mezo_jax.spsa`; for a clip that is not positive.
  """
  arguments.number('clip', clip, above=0)
  directions = as_directions(directions)
  estimate = spsa(eps, key=key, directions=directions, num_samples=num_samples,
                  dtype=jnp.float32, **options)

  def make(state, memory, params, given):
    del memory
    seen = estimate.update(None, state, params, **given)[1]
    return seen.value, jnp.clip(seen.projected_grad, -clip, clip)

  tx = descent(told(estimate, make), learning_rate, key=key,
               directions=directions, weight_decay=weight_decay, decay=decay,
               stochastic_rounding=stochastic_rounding)

  def update_fn(updates, state, params=None, **extra_args):
    updates, state = tx.update(updates, state, params, **extra_args)
    return paths.map_named(
        lambda path, u, x: jnp.maximum(u, -x) if path.endswith(FACTORS) else u,
        updates, params), state

  return ZerothOrderTransformation(tx.init, update_fn)
