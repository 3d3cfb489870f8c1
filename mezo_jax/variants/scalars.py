r"""Variants that change the scalars g and leave z as it is."""

from typing import Any, Unpack

import jax
import jax.numpy as jnp

from mezo_jax.core import arguments, xla
from mezo_jax.transforms.combine import Combine, two_sided
from mezo_jax.transforms.estimator import (
  Estimator,
  LossOptions,
  Spsa,
  SpsaOptions,
  unless_skipped,
)


def _sign(losses, eps):
  value, g = two_sided.apply(losses, eps)
  return value, jnp.sign(g)


_SIGN = Combine(two_sided.signs, _sign, needs_all=False)


def sign(eps: Any = 1e-3, **options: Unpack[LossOptions]) -> Estimator:
  r"""ZO-SGD-Sign: :math:`u = \mathrm{sign}(g) z`.

  The sign is that of the scalar, as in ZO-Bench (Zhang et al., 2024,
  arXiv:2402.11592), so all steps are equally long.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`.
    **options: Other options of `mezo_jax.spsa`.
  """
  return Estimator(Spsa(eps, combine=_SIGN, **options))


def scalar_adam(eps: Any = 1e-3, *, b2: float = 0.999, adam_eps: float = 1e-8,
                **options: Unpack[SpsaOptions]) -> Estimator:
  r"""MEAZO: one second moment, that of g, for all weights.

  .. math:: v \leftarrow \beta_2 v + (1 - \beta_2) \frac{1}{n} \sum_j g_j^2,
            \qquad u = \frac{1}{\sqrt{\hat v} + \epsilon_{Adam}}
            \frac{1}{n} \sum_j g_j z_j

  with Adam's correction :math:`\hat v = v / (1 - \beta_2^t)`. The learning rate
  is then the typical change of an element. Source: "On adaptivity in
  zeroth-order optimization" (arXiv:2605.03869), which finds that the elements
  of a zeroth-order gradient differ too little for a moment each.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`.
    b2: :math:`\beta_2`.
    adam_eps: :math:`\epsilon_{Adam}`.
    **options: Other options of `mezo_jax.spsa`.
  """
  spsa = Spsa(eps, **options)
  arguments.number('b2', b2, least=0, below=1)
  arguments.number('adam_eps', adam_eps, least=0)

  def memory(params):
    del params
    return jnp.zeros([]), jnp.zeros([])  # v, 1 - b2^t

  def apply(state, params, numbers):
    updates = spsa.apply(state, params, numbers)
    def average(old, x):
      return xla.rounded(b2 * old) + xla.rounded((1 - b2) * x)
    new = jax.tree.map(average, state.memory, (
        jnp.mean(numbers.projected_grad**2), jnp.float32(1.0)))
    v, weight = unless_skipped(numbers, new, state.memory)
    length = jnp.sqrt(v / jnp.maximum(weight, 1e-30)) + adam_eps
    updates = jax.tree.map(lambda u: (u / length).astype(u.dtype), updates)
    return updates, (v, weight)

  return Estimator(spsa, apply=apply, memory=memory)


def one_point(eps: Any = 1e-3, **options: Unpack[LossOptions]) -> Estimator:
  r"""One evaluation per step, compared with that of the step before.

  .. math:: g_t = \frac{\mathcal{L}(\theta_t + \epsilon z_t; \mathcal{B}_t) -
            \mathcal{L}(\theta_{t-1} + \epsilon z_{t-1};
            \mathcal{B}_{t-1})}{\epsilon}

  The first step moves nothing. Source: Zhang et al., 2022 (residual feedback);
  Malladi et al., 2023, Definition 8, who find that it needs more than twice as
  many evaluations.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`.
    **options: Other options of `mezo_jax.spsa`, with one direction per step.
  """
  def inverse(losses, eps):  # is multiplied by the difference of losses below
    return losses[0, 0], jnp.ones(1) / eps
  spsa = Spsa(eps, combine=Combine((1.0,), inverse), **options)
  if spsa.num_samples > 1:
    raise ValueError('one_point has one direction per step: leave num_samples '
                     'at 1.')

  def memory(params):
    del params
    return jnp.float32(jnp.nan)  # the loss of the last step

  def measure(state, params, value_fn, batch):
    value, g = spsa.measure(state, params, value_fn, batch)
    last = state.memory
    is_first = jnp.isnan(last) & jnp.isfinite(value)
    return value, jnp.where(is_first, 0.0, (value - last) * g)

  def apply(state, params, numbers):
    value = numbers.value
    return spsa.apply(state, params, numbers), jnp.where(
        jnp.isfinite(value), value, state.memory)

  return Estimator(spsa, measure=measure, apply=apply, memory=memory)
