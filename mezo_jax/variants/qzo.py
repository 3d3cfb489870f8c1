r"""QZO: quantised weights whose integers stay, and whose scales are trained.

With a weight :math:`f s q + o` (`mezo_jax.Codes`), one factor f per scale, at
first 1, is perturbed and moved:

.. math::
  g = \mathrm{clip}\left(\frac{\mathcal{L}(f + \epsilon z) - \mathcal{L}(f -
      \epsilon z)}{2 \epsilon}, -C, C\right), \qquad
  f \leftarrow \max(f - \eta g z, 0)

Source: Shang et al., 2025, "Fine-tuning quantized neural networks with
zeroth-order optimization". The paper perturbs the scales themselves; relative
ones let one :math:`\epsilon` fit small and large scales.
"""

from typing import Any, Unpack

import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, paths
from mezo_jax.core.quantized import FACTORS
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions
from mezo_jax.transforms.types import ZerothOrderTransformation


def qzo(eps: Any = 1e-3, *, clip: float = 100.0,
        **options: Unpack[SpsaOptions]) -> Estimator:
  """SPSA with bounded projected gradients.

  Its params are `mezo_jax.peft.factors` of a model's, and its ``value_fn`` is
  ``lambda f, batch: loss(mezo_jax.peft.join(f, params), batch)``.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`, relative to the scales.
    clip: C, the largest absolute projected gradient of a direction.
    **options: Other options of `mezo_jax.spsa`.
  """
  spsa = Spsa(eps, **options)
  arguments.number('clip', clip, above=0)

  def measure(state, params, value_fn, batch, **where):
    value, g = spsa.measure(state, params, value_fn, batch, **where)
    return value, jnp.clip(g, -clip, clip)

  return Estimator(spsa, measure=measure)


def nonnegative(tx: optax.GradientTransformation) -> ZerothOrderTransformation:
  """Keeps factors at 0 or above, around ``mezo(0.1, estimator=qzo(...))``.

  Args:
    tx: A transform whose updates are those of the whole step.
  """
  if not (hasattr(tx, 'init') and hasattr(tx, 'update')):
    raise ValueError('tx must be an optax.GradientTransformation such as '
                     f'mezo_jax.mezo(...), got {tx!r}.')
  tx = optax.with_extra_args_support(tx)

  def update_fn(updates, state, params=None, **extra_args):
    updates, state = tx.update(updates, state, params, **extra_args)
    def bounded(path, u, x):
      return jnp.maximum(u, -x) if path.endswith(FACTORS) else u
    return paths.map_named(bounded, updates, params), state

  return ZerothOrderTransformation(tx.init, update_fn)
