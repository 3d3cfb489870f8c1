r"""Momentum and Adam at the memory of inference, recomputed from past steps.

A step is a key and a number, so the last h steps are h such pairs. What an
optimizer remembers of gradients is recomputed from them, element by element,
when it is added to the weights; nothing of the weights' size is kept. Source:
Malladi et al., 2023, Appendix B.2; AdaMeZO (arXiv:2605.00650), with a window of
h steps.
"""

from collections.abc import Callable
from typing import Any, Unpack

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import arguments
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import direction, mapped
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions


def momentum_by_history(eps: Any = 1e-3, *, beta: float = 0.9, window: int = 8,
                        **options: Unpack[SpsaOptions]) -> Estimator:
  r"""SPSA with heavy-ball momentum of the last h steps.

  .. math:: u_t = \sum_{s=t-h+1}^{t} \beta^{t-s}
            \frac{1}{n} \sum_j g_{s,j} z_{s,j}

  It equals ``chain(spsa, trace(beta))`` without what older steps would add,
  which is less than :math:`\beta^h` of their updates. An update draws h times
  as many directions as SPSA, in one pass; `Rademacher` and `LowRank` are cheap.
  With more than 8 terms (32 for `LowRank`), a float32 sum of the size of the
  largest leaf is kept.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`, without groups.
    beta: :math:`\beta`.
    window: h.
    **options: Other options of `mezo_jax.spsa`.
  """
  spsa = Spsa(eps, **options).one_eps()
  arguments.number('beta', beta, least=0, below=1)

  def apply(params, z, g):
    steps, n = g.shape
    age = steps - 1 - jnp.arange(steps)
    coefs = jnp.where(jnp.isnan(g), 0.0, g) * (_powers(beta, age) / n)[:, None]
    return direction(params, z.times(coefs.ravel()), spsa.directions,
                     dtype=jnp.float32)

  return _of_history(spsa, window, apply)


def adam_by_history(eps: Any = 1e-3, *, b1: float = 0.9, b2: float = 0.99,
                    window: int = 8, adam_eps: float = 1e-8,
                    **options: Unpack[SpsaOptions]) -> Estimator:
  r"""SPSA with Adam's moments of the last h steps (AdaMeZO).

  With the estimate of step s, :math:`\hat g_s = \frac{1}{n} \sum_j g_{s,j}
  z_{s,j}`, and for each element

  .. math::
    m = \frac{\sum_s \beta_1^{t-s} \hat g_s}{\sum_s \beta_1^{t-s}}, \quad
    v = \frac{\sum_s \beta_2^{t-s} \hat g_s^2}{\sum_s \beta_2^{t-s}}, \quad
    u_t = \frac{m}{\sqrt v + \epsilon_{Adam}}

  where skipped steps contribute nothing. With one direction of
  `Rademacher`, v is the same for all elements, and `scalar_adam` is cheaper.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`, without groups.
    b1: :math:`\beta_1`.
    b2: :math:`\beta_2`.
    window: h. The h * n draws of an element are made in one pass.
    adam_eps: :math:`\epsilon_{Adam}`.
    **options: Other options of `mezo_jax.spsa`.
  """
  spsa = Spsa(eps, **options).one_eps()
  arguments.number('b1', b1, least=0, below=1)
  arguments.number('b2', b2, least=0, below=1)
  arguments.number('adam_eps', adam_eps, least=0)

  def apply(params, z, g):
    steps, n = g.shape
    age = steps - 1 - jnp.arange(steps)
    def weights(beta):
      there = jnp.where(jnp.isnan(g[:, 0]), 0.0, _powers(beta, age))
      return there / jnp.maximum(jnp.sum(there), 1e-30)
    w1, w2 = weights(b1), weights(b2)
    g = jnp.where(jnp.isnan(g), 0.0, g) / n
    def moments(w, draws):
      m = v = jnp.zeros(w.shape, jnp.float32)
      for s in range(steps):  # a loop of XLA would keep sums of leaves
        estimate = sum(g[s, j] * draws.term(s * n + j, w) for j in range(n))
        m, v = m + w1[s] * estimate, v + w2[s] * estimate**2
      return draws.masked(w, m / (jnp.sqrt(v) + adam_eps), 0.0)
    return mapped(moments, params, z, spsa.directions, dtype=jnp.float32)

  return _of_history(spsa, window, apply)


def _powers(beta, age: jax.Array) -> jax.Array:
  """Returns ``beta**age``, also where dtypes may not be promoted."""
  return lax.pow(jnp.broadcast_to(jnp.asarray(beta), age.shape), age)


def _of_history(spsa: Spsa, window: int, update: Callable) -> Estimator:
  """Returns the estimator with updates ``update(params, z, projected_grad)``.

  There z is a displacement of h * n terms with coefficients 1, the oldest
  first, and projected_grad is [h, n], with NaN for steps that were skipped.
  """
  arguments.whole('window', window)

  def memory(params):
    del params
    return jnp.full((window, spsa.num_samples), jnp.nan, jnp.float32)

  def apply(state, params, numbers):
    past = jnp.concatenate([state.memory[1:], numbers.projected_grad[None]])
    steps = state.count - jnp.arange(window)[::-1]
    keys = jax.vmap(lambda t: spsa.directions.keys(
        state.key, t, spsa.num_samples))(steps).reshape(-1)
    z = Displacement(keys, jnp.ones(keys.shape, jnp.float32))
    return update(params, z, past), past

  return Estimator(spsa, apply=apply, memory=memory)
