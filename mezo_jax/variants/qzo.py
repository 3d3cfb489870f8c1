r"""Provides QZO, which trains the scales of quantised weights.

A quantised weight is :math:`s q + o` with an integer q
(`mezo_jax.QuantizedArray`). QZO leaves q as it is and trains a factor f for
each scale s, so that the weight becomes :math:`f s q + o`. `qzo` estimates the
gradient with respect to f, and `nonnegative` keeps f at 0 or above.
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
  r"""Runs SPSA with clipped projected gradients, for the factors of scales.

  .. math::
    g = \mathrm{clip}\left(\frac{\mathcal{L}(f + \epsilon z) - \mathcal{L}(f -
        \epsilon z)}{2 \epsilon}, -C, C\right), \qquad
    f \leftarrow \max(f - \eta g z, 0)

  To train the scales of a model with quantised ``params``, pass
  ``mezo_jax.peft.factors(params)`` to ``init`` and ``update`` as params, and
  ``lambda f, batch: loss(mezo_jax.peft.join(f, params), batch)`` as
  ``value_fn``. All factors are 1 at first. `qzo` computes g, and `nonnegative`
  takes the maximum with 0.

  The paper perturbs the scales themselves. Factors are relative to the scales,
  so that the same :math:`\epsilon` suits both small and large scales.

  Args:
    eps: Perturbation scale :math:`\epsilon` of the factors, in the forms of
      `mezo_jax.spsa`. Defaults to 1e-3.
    clip: Largest absolute value C of a projected gradient, above 0. Defaults to
      100.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``combine``, ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`.

  Raises:
    ValueError: If ``clip`` is out of range, or for an option that
      `mezo_jax.spsa` does not accept.

  References:
    Shang et al., 2025, "Fine-tuning quantized neural networks with zeroth-order
    optimization".

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> from mezo_jax import peft, variants
    >>> params = {'w': mezo_jax.quantize(jnp.ones((32, 4)))}
    >>> factors = peft.factors(params)
    >>> tx = variants.nonnegative(
    ...     mezo_jax.mezo(0.1, estimator=variants.qzo(1e-3, key=0)))
    >>> state = tx.init(factors)
  """
  spsa = Spsa(eps, **options)
  arguments.number('clip', clip, above=0)

  def measure(state, params, value_fn, batch, **where):
    value, g = spsa.measure(state, params, value_fn, batch, **where)
    return value, jnp.clip(g, -clip, clip)

  return Estimator(spsa, measure=measure)


def nonnegative(tx: optax.GradientTransformation) -> ZerothOrderTransformation:
  r"""Wraps an optimizer so that the factors of scales stay at 0 or above.

  .. math:: u \leftarrow \max(u, -f)

  This applies to params whose path ends in ``factors``. The updates of all
  other params are not changed.

  Args:
    tx: An optimizer whose updates are added to the params without further
      changes, such as ``mezo(0.1, estimator=qzo(...))``.

  Returns:
    An `optax.GradientTransformationExtraArgs` with the state of ``tx``.

  Raises:
    ValueError: If ``tx`` is not a transform.

  References:
    Shang et al., 2025, "Fine-tuning quantized neural networks with zeroth-order
    optimization".

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from mezo_jax import variants
    >>> tx = variants.nonnegative(optax.sgd(1.0))
    >>> params = {'factors': jnp.ones(2)}
    >>> updates, _ = tx.update(
    ...     {'factors': jnp.array([0.5, 2.0])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)['factors'].tolist()
    [0.5, 0.0]
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
