r"""Relatives that do something else with the scalars g, and nothing with z."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, sharding
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.transforms.evaluate_points import Combine, two_sided
from mezo_jax.transforms.mezo import descent, mezo
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.types import ZerothOrderTransformation
from mezo_jax.variants._told import Remembering, told


def _sign(losses, eps):
  value, g = two_sided.apply(losses, eps)
  return value, jnp.sign(g)


_SIGN = Combine(two_sided.signs, _sign, by_direction=True)


def sign(learning_rate: float | optax.Schedule,
         eps: float | optax.Schedule = 1e-3, **options: Any
         ) -> ZerothOrderTransformation:
  r"""ZO-SGD-Sign: :math:`\theta \leftarrow \theta - \eta\,
  \mathrm{sign}(g) z`.

  Of the scalar, as ZO-Bench has it (Zhang et al., 2024, arXiv:2402.11592), so
  each step is as long as every other. Options are those of `mezo_jax.mezo` but
  ``combine``; a NaN is a skipped step.
  """
  return mezo(learning_rate, eps, combine=_SIGN, **options)


def scalar_adam(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, b2: float = 0.999, adam_eps: float = 1e-8,
    directions: Directions | str = Normal(), weight_decay: float = 0.0,
    decay: Any = None, stochastic_rounding: bool = True, **options: Any
) -> ZerothOrderTransformation:
  r"""MEAZO: one second moment, of g, for all weights.

  .. math:: v \leftarrow \beta_2 v + (1 - \beta_2) \frac{1}{n} \sum_j g_j^2,
            \quad \theta \leftarrow \theta - \eta
            \frac{1}{\sqrt{\hat v} + \epsilon_{Adam}} \frac{1}{n} \sum_j g_j z_j

  with Adam's correction :math:`\hat v = v / (1 - \beta_2^t)`. Elements of a
  zeroth-order gradient differ too little for a moment each to be worth it ("On
  adaptivity in zeroth-order optimization", arXiv:2605.03869). Other options are
  those of `mezo_jax.mezo`.

  Args:
    learning_rate: :math:`\eta`: the typical change of an element.
    eps: see `mezo_jax.spsa`.
    key: a `jax.random.key` or an integer seed.
    b2: :math:`\beta_2`.
    adam_eps: :math:`\epsilon_{Adam}`.
    directions: what z is.
    weight_decay: as of `mezo_jax.mezo`, and the next two.
    decay: which leaves are decayed.
    stochastic_rounding: of half-precision weights.
    **options: of `mezo_jax.spsa`.
  """
  directions = as_directions(directions)
  arguments.number('b2', b2, least=0, below=1)
  arguments.number('adam_eps', adam_eps, least=0)
  estimate = spsa(eps, key=key, directions=directions, dtype=jnp.float32,
                  **options)

  def init_fn(params):
    return sharding.beside(Remembering(
        estimate.init(params), (jnp.zeros([]), jnp.zeros([]))), params)

  def update_fn(updates, state, params=None, **extra_args):
    before, (v, weight) = state
    updates, new = estimate.update(updates, before, params, **extra_args)
    g = new.projected_grad
    there = jnp.all(jnp.isfinite(g))
    keep = lambda x, old: jnp.where(there, b2 * old + (1 - b2) * x, old)
    v, weight = keep(jnp.mean(g**2), v), keep(1.0, weight)
    length = jnp.sqrt(v / jnp.maximum(weight, 1e-30)) + adam_eps
    return jax.tree.map(
        lambda u: (u / length).astype(u.dtype), updates), Remembering(
            new, (v, weight))

  return descent(
      ZerothOrderTransformation(init_fn, update_fn), learning_rate,
      key=key, directions=directions, weight_decay=weight_decay, decay=decay,
      stochastic_rounding=stochastic_rounding)


def one_point(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, directions: Directions | str = Normal(),
    weight_decay: float = 0.0, decay: Any = None,
    stochastic_rounding: bool = True, **options: Any
) -> ZerothOrderTransformation:
  r"""One evaluation a step, against that of the step before.

  .. math:: g_t = \frac{\mathcal{L}(\theta_t + \epsilon z_t; \mathcal{B}_t) -
            \mathcal{L}(\theta_{t-1} + \epsilon z_{t-1};
            \mathcal{B}_{t-1})}{\epsilon}

  (Zhang et al., 2022, residual feedback; Malladi et al., 2023, Definition 8,
  who find it to need twice as many evaluations and more.) The first step, which
  has none before it, moves nothing. One direction; options are those of
  `mezo_jax.mezo` but ``combine`` and ``num_samples``.
  """
  directions = as_directions(directions)
  alone = Combine((1.0,), lambda losses, eps: (
      losses[0, 0], jnp.ones(1) / eps))  # for the difference, which is not here
  estimate = spsa(eps, key=key, directions=directions, combine=alone,
                  num_samples=1, dtype=jnp.float32, **options)

  def make(state, last, params, given):
    seen = estimate.update(None, state, params, **given)[1]
    return seen.value, jnp.where(
        jnp.isnan(last) & jnp.isfinite(seen.value), 0.0,
        (seen.value - last) * seen.projected_grad)

  return descent(
      told(estimate, make, init=lambda state: jnp.float32(jnp.nan),
           after=lambda new, last: jnp.where(
               jnp.isfinite(new.value), new.value, last)),
      learning_rate, key=key, directions=directions, weight_decay=weight_decay,
      decay=decay, stochastic_rounding=stochastic_rounding)
