r"""Momentum and Adam at the memory of inference: made of the last steps again.

A step is a pair of a key and a number, so the last h of them are h pairs, and
what an optimiser remembers of gradients can be made of those, element by
element, where it is added to the weights. Nothing of the weights' size is kept.
Source: Malladi et al., 2023, Appendix B.2 (momentum and Adam of the history);
AdaMeZO (arXiv:2605.00650), with a window of h.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, sharding
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import direction, mapped
from mezo_jax.transforms.mezo import descent
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.types import ZerothOrderTransformation
from mezo_jax.variants._told import check_one_eps, Remembering


def momentum_by_history(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, beta: float = 0.9, window: int = 8,
    directions: Directions | str = Normal(), weight_decay: float = 0.0,
    decay: Any = None, stochastic_rounding: bool = True, **options: Any
) -> ZerothOrderTransformation:
  r"""MeZO with (heavy-ball) momentum of the last h steps.

  .. math:: \theta \leftarrow \theta - \eta \sum_{s=t-h+1}^{t} \beta^{t-s}
            \frac{1}{n} \sum_j g_{s,j} z_{s,j}

  As ``chain(spsa, trace(beta), ...)`` to which older steps would add less than
  :math:`\beta^h` of what they were, without its trace. An update draws h times
  as many directions as MeZO's, in one pass; cheap ones are `Rademacher` and
  `LowRank`. More than 8 terms, of `LowRank` 32, keep a float32 sum of the
  largest leaf's size.

  Args:
    learning_rate: :math:`\eta`, a number or a schedule.
    eps: see `mezo_jax.spsa`; no groups.
    key: a `jax.random.key` or an integer seed.
    beta: :math:`\beta`.
    window: h.
    directions: what z is.
    weight_decay: as of `mezo_jax.mezo`, and the next two.
    decay: which leaves are decayed.
    stochastic_rounding: of half-precision weights.
    **options: of `mezo_jax.spsa`, such as ``num_samples``.

  Raises:
    ValueError: as `mezo_jax.mezo`; for a window below 1, or groups of eps.
  """
  directions = as_directions(directions)
  arguments.number('beta', beta, least=0, below=1)

  def fn(params, kind, keys, scale, g):
    steps, n = g.shape
    age = steps - 1 - jnp.arange(steps)
    coefs = jnp.where(jnp.isnan(g), 0.0, g) * (_powers(beta, age) / n)[:, None]
    return direction(params, Displacement(keys, scale * coefs.ravel()), kind,
                     dtype=jnp.float32)

  return descent(
      _of_history(eps, key, window, directions, fn, options), learning_rate,
      key=key, directions=directions, weight_decay=weight_decay, decay=decay,
      stochastic_rounding=stochastic_rounding)


def adam_by_history(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, b1: float = 0.9, b2: float = 0.99, window: int = 8,
    adam_eps: float = 1e-8, directions: Directions | str = Normal(),
    weight_decay: float = 0.0, decay: Any = None,
    stochastic_rounding: bool = True, **options: Any
) -> ZerothOrderTransformation:
  r"""MeZO with Adam's moments of the last h steps (AdaMeZO).

  With the step's estimate :math:`\hat g_s = \frac{1}{n} \sum_j g_{s,j} z_{s,j}`

  .. math::
    m = \frac{\sum_s \beta_1^{t-s} \hat g_s}{\sum_s \beta_1^{t-s}}, \quad
    v = \frac{\sum_s \beta_2^{t-s} \hat g_s^2}{\sum_s \beta_2^{t-s}}, \quad
    \theta \leftarrow \theta - \eta \frac{m}{\sqrt v + \epsilon_{Adam}}

  element by element, over the last h steps that were not skipped: Adam with its
  correction of bias, as far back as that. (With one direction of `Rademacher` v
  is the same for all elements: then `scalar_adam` does it for less.)

  Args:
    learning_rate: :math:`\eta`, a number or a schedule: of Adam's size.
    eps: see `mezo_jax.spsa`; no groups.
    key: a `jax.random.key` or an integer seed.
    b1: :math:`\beta_1`.
    b2: :math:`\beta_2`.
    window: h; its h n draws of an element are made in one pass.
    adam_eps: :math:`\epsilon_{Adam}`.
    directions: what z is.
    weight_decay: as of `mezo_jax.mezo`, and the next two.
    decay: which leaves are decayed.
    stochastic_rounding: of half-precision weights.
    **options: of `mezo_jax.spsa`, such as ``num_samples``.

  Raises:
    ValueError: as `mezo_jax.mezo`; for a window below 1, or groups of eps.
  """
  directions = as_directions(directions)
  arguments.number('b1', b1, least=0, below=1)
  arguments.number('b2', b2, least=0, below=1)
  arguments.number('adam_eps', adam_eps, least=0)

  def fn(params, kind, keys, scale, g):
    steps, n = g.shape
    age = steps - 1 - jnp.arange(steps)
    def weights(beta):
      there = jnp.where(jnp.isnan(g[:, 0]), 0.0, _powers(beta, age))
      return there / jnp.maximum(jnp.sum(there), 1e-30)
    w1, w2 = weights(b1), weights(b2)
    g = jnp.where(jnp.isnan(g), 0.0, g) / n
    def moments(w, draws):
      m = v = jnp.zeros(w.shape, jnp.float32)
      for s in range(steps):  # not a loop, which would keep sums of leaves
        estimate = sum(g[s, j] * draws.term(s * n + j, w) for j in range(n))
        m, v = m + w1[s] * estimate, v + w2[s] * estimate**2
      out = m / (jnp.sqrt(v) + adam_eps)
      nonzero = draws.nonzero(w)
      return out if nonzero is None else jnp.where(nonzero, out, 0.0)
    return mapped(moments, params, Displacement(keys, scale), kind,
                  dtype=jnp.float32)

  return descent(
      _of_history(eps, key, window, directions, fn, options), learning_rate,
      key=key, directions=directions, weight_decay=weight_decay, decay=decay,
      stochastic_rounding=stochastic_rounding)


def _powers(beta, age: jax.Array) -> jax.Array:
  """Returns ``beta**age``, where dtypes may not be promoted, too."""
  return lax.pow(jnp.broadcast_to(jnp.asarray(beta), age.shape), age)


def _of_history(eps, key, window: int, directions: Directions, fn: Callable,
                options: dict) -> ZerothOrderTransformation:
  """The estimate that ``fn(params, directions, keys [h * n], coefs [h * n] of
  z, projected_grad [h, n])`` makes of the last steps, the oldest first; NaN
  where there was none or it was skipped."""
  arguments.whole('window', window)
  check_one_eps(eps)
  estimate = spsa(eps, key=key, directions=directions, **options)

  def init_fn(params):
    state = estimate.init(params)
    return sharding.beside(Remembering(state, jnp.full(
        (window, *state.projected_grad.shape), jnp.nan, jnp.float32)), params)

  def update_fn(updates, state, params=None, **extra_args):
    before, past = state
    _, new = estimate.update(  # its updates are not used, nor made
        updates, before, params, **extra_args)
    g = new.projected_grad
    g = jnp.where(jnp.all(jnp.isfinite(g)), g, jnp.nan)
    past = jnp.concatenate([past[1:], g[None]])
    steps = before.count - jnp.arange(window)[::-1]
    keys = jax.vmap(lambda t: directions.keys(before.key, t, g.shape[0]))(
        steps).reshape(-1)
    z = Displacement(keys, jnp.ones(keys.shape, jnp.float32)).after(new.value)
    return (fn(params, directions, z.keys, z.coefs, past),
            Remembering(new, past))

  return ZerothOrderTransformation(init_fn, update_fn)
