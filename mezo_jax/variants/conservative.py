r"""Provides ZO-SGD-Cons, which makes a step only if it lowers the loss."""

from typing import Any, Unpack

from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions


def conservative(eps: Any = 1e-3, *, learning_rate: float | optax.Schedule,
                 **options: Unpack[SpsaOptions]) -> Estimator:
  r"""Estimates the gradient like SPSA, and makes a step only if it helps.

  The estimator evaluates the loss of the batch at the current weights and after
  a step in either direction. The weights move to the best of these points:

  .. math:: \theta \leftarrow \arg\min_{\theta' \in \{\theta, \theta - \eta
            \hat g, \theta + \eta \hat g\}} \mathcal{L}(\theta'; \mathcal{B}),
            \qquad \hat g = \frac{1}{n} \sum_{j=1}^n g_j z_j

  Accordingly, the projected gradients :math:`g_j` of SPSA are kept, negated or
  set to 0. A step takes 2n + 3 evaluations of the loss. The comparison does not
  include weight decay.

  Args:
    eps: Perturbation scale :math:`\epsilon`, in the forms of `mezo_jax.spsa`.
      Defaults to 1e-3.
    learning_rate: Learning rate :math:`\eta`, a number or a schedule. Pass the
      same one to `mezo_jax.mezo`.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``combine``, ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`.

  Raises:
    ValueError: If ``learning_rate`` is not a number or a schedule, or for an
      option that `mezo_jax.spsa` does not accept.

  References:
    Zhang et al., 2024, `Revisiting Zeroth-Order Optimization for
    Memory-Efficient LLM Fine-Tuning: A Benchmark
    <https://arxiv.org/abs/2402.11592>`_ (ZO-Bench), ZO-SGD-Cons.

  Example:
    >>> import mezo_jax
    >>> from mezo_jax import variants
    >>> tx = mezo_jax.mezo(1e-6, estimator=variants.conservative(
    ...     1e-3, learning_rate=1e-6, key=0))
  """
  spsa = Spsa(eps, **options)
  learning_rate = arguments.rate('learning_rate', learning_rate, groups=False)

  def measure(state, params, value_fn, batch):
    value, g = spsa.measure(state, params, value_fn, batch)
    # Schedules of the learning rate count the steps that were not skipped.
    made = state.count - state.total_notfinite
    step = arguments.at(learning_rate, made) * g / spsa.num_samples
    z = spsa.z(state).after(value)
    loss = spsa.loss_at(params, value_fn, batch)
    # argmin returns the first of equal losses, so ties keep the weights.
    signs = jnp.array([0.0, -1.0, 1.0])
    losses = lax.map(lambda sign: loss(z.times(sign * step)), signs)
    losses = jnp.where(jnp.isfinite(losses), losses, jnp.inf)
    best = signs[jnp.argmin(losses)]
    # If an element of g is not finite, keep it, so that the step is skipped for
    # any values of the losses.
    return value, jnp.where(jnp.isfinite(g), -best, 1.0) * g

  return Estimator(spsa, measure=measure)
