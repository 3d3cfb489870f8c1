r"""Provides variants that change the scalars g and leave z as it is."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from mezo_jax.core import arguments, xla
from mezo_jax.transforms.combine import two_sided
from mezo_jax.transforms.estimator import (
  Estimator,
  LossOptions,
  Spsa,
  SpsaOptions,
  unless_skipped,
)


def sign(eps: Any = 1e-3, **options: Unpack[LossOptions]) -> Estimator:
  r"""Replaces each projected gradient by its sign (ZO-SGD-Sign).

  .. math:: u = \frac{1}{n} \sum_{j=1}^n \mathrm{sign}(g_j)\, z_j

  The sign is that of the scalar :math:`g_j`, as in ZO-Bench, not that of each
  element. The length of a step therefore does not depend on the loss.

  Args:
    eps: Perturbation scale :math:`\epsilon`, in the forms of `mezo_jax.spsa`.
      Defaults to 1e-3.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`.

  Raises:
    ValueError: For an option that `mezo_jax.spsa` does not accept.

  References:
    Zhang et al., 2024, `Revisiting Zeroth-Order Optimization for
    Memory-Efficient LLM Fine-Tuning: A Benchmark
    <https://arxiv.org/abs/2402.11592>`_ (ZO-Bench), ZO-SGD-Sign.

  Example:
    >>> import mezo_jax
    >>> from mezo_jax import variants
    >>> tx = mezo_jax.mezo(1e-4, estimator=variants.sign(1e-3, key=0))
  """
  spsa = Spsa(eps, combine=two_sided, **options)

  def measure(state, params, value_fn, batch, **where):
    value, g = spsa.measure(state, params, value_fn, batch, **where)
    return value, jnp.sign(g)

  return Estimator(spsa, measure=measure)


def scalar_adam(eps: Any = 1e-3, *, b2: float = 0.999, adam_eps: float = 1e-8,
                **options: Unpack[SpsaOptions]) -> Estimator:
  r"""Divides SPSA updates by the root of the second moment of g (MEAZO).

  All weights share this second moment v:

  .. math:: v \leftarrow \beta_2 v + (1 - \beta_2) \frac{1}{n} \sum_{j=1}^n
            g_j^2, \qquad u = \frac{1}{\sqrt{\hat v} + \epsilon_{Adam}}
            \frac{1}{n} \sum_{j=1}^n g_j z_j

  Here :math:`\hat v = v / (1 - \beta_2^t)`, as in Adam. A typical element then
  changes by the learning rate in a step. The paper finds that the elements of a
  zeroth-order gradient differ too little to need a second moment each.

  Args:
    eps: Perturbation scale :math:`\epsilon`, in the forms of `mezo_jax.spsa`.
      Defaults to 1e-3.
    b2: Decay rate :math:`\beta_2` of the second moment, at least 0 and below 1.
      Defaults to 0.999.
    adam_eps: Term :math:`\epsilon_{Adam}` that is added to the denominator.
      Defaults to 1e-8.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``combine``, ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`. The memory
    of its state is two float32 numbers, v and :math:`1 - \beta_2^t`.

  Raises:
    ValueError: If ``b2`` or ``adam_eps`` is out of range, or for an option that
      `mezo_jax.spsa` does not accept.

  References:
    `On adaptivity in zeroth-order optimization
    <https://arxiv.org/abs/2605.03869>`_.

  Example:
    >>> import mezo_jax
    >>> from mezo_jax import variants
    >>> tx = mezo_jax.mezo(1e-4, estimator=variants.scalar_adam(1e-3, key=0))
  """
  spsa = Spsa(eps, **options)
  arguments.number('b2', b2, least=0, below=1)
  arguments.number('adam_eps', adam_eps, least=0)

  def memory(_):
    return jnp.zeros([]), jnp.zeros([])  # v and 1 - b2**t

  def apply(state, params, numbers):
    updates = spsa.apply(state, params, numbers)
    def average(old, x):
      # Round both products, so that no compiler fuses one of them with the sum,
      # and all programs compute the same bits.
      return xla.rounded(b2 * old) + xla.rounded((1 - b2) * x)
    square = jnp.mean(numbers.projected_grad**2)
    new = jax.tree.map(average, state.memory, (square, jnp.float32(1.0)))
    v, weight = unless_skipped(numbers, new, state.memory)
    length = jnp.sqrt(v / jnp.maximum(weight, 1e-30)) + adam_eps
    updates = jax.tree.map(lambda u: (u / length).astype(u.dtype), updates)
    return updates, (v, weight)

  return Estimator(spsa, apply=apply, memory=memory)


def one_point(eps: Any = 1e-3, **options: Unpack[LossOptions]) -> Estimator:
  r"""Evaluates the loss once per step, and subtracts that of the step before.

  .. math:: u_t = g_t z_t, \qquad g_t = \frac{\mathcal{L}(\theta_t + \epsilon
            z_t; \mathcal{B}_t) - \mathcal{L}(\theta_{t-1} + \epsilon z_{t-1};
            \mathcal{B}_{t-1})}{\epsilon}

  The first step has no earlier loss and does not move the weights. Malladi et
  al. find that this estimate needs more than twice as many evaluations as the
  two-sided one.

  Args:
    eps: Perturbation scale :math:`\epsilon`, in the forms of `mezo_jax.spsa`.
      Defaults to 1e-3.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``over``, ``micro_batches`` and ``dtype``. ``num_samples`` must be 1.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`. The memory
    of its state is the loss of the last step, float32 [].

  Raises:
    ValueError: If ``num_samples`` is above 1, or for an option that
      `mezo_jax.spsa` does not accept.

  References:
    Zhang et al., 2022, on zeroth-order optimization with residual feedback.
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Definition 8.

  Example:
    >>> import mezo_jax
    >>> from mezo_jax import variants
    >>> tx = mezo_jax.mezo(1e-6, estimator=variants.one_point(1e-3, key=0))
  """
  spsa = Spsa(eps, combine=two_sided, **options)
  if spsa.num_samples > 1:
    raise ValueError('num_samples must be 1 for one_point, which compares the '
                     'loss with that of the step before.')

  def memory(_):
    return jnp.float32(jnp.nan)  # the loss of the last step

  def measure(state, params, value_fn, batch):
    losses = spsa.losses(state, params, value_fn, batch, signs=(1.0,))
    value = losses[0, 0]
    first_eps = jax.tree.leaves(spsa.eps_at(state))[0]
    g = (value - state.memory) * (jnp.ones(1) / first_eps)
    return value, jnp.where(jnp.isnan(state.memory), 0.0, g)

  def apply(state, params, numbers):
    updates = spsa.apply(state, params, numbers)
    is_valid = jnp.isfinite(numbers.value)
    return updates, jnp.where(is_valid, numbers.value, state.memory)

  return Estimator(spsa, measure=measure, apply=apply, memory=memory)
