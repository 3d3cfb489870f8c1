r"""HiZOO: directions scaled by an estimate of the Hessian's diagonal.

With H, one positive number for each weight, at first 1,

.. math::
  \ell_\pm &= \mathcal{L}(\theta \pm \epsilon H^{-1/2} z; \mathcal{B}), \quad
  g = \frac{\ell_+ - \ell_-}{2 \epsilon}, \quad
  h = \frac{|\ell_+ - 2 \ell_0 + \ell_-|}{2 \epsilon^2} \\
  \theta &\leftarrow \theta - \eta\, g H^{-1/2} z, \qquad
  H \leftarrow (1 - \alpha) H + \alpha\, h\, H \odot z^2

(Zhao et al., 2024, arXiv:2402.15173.) H is as large as the weights in float32:
this is the one of MeZO's relatives that takes twice the memory of inference, of
half-precision weights three times, and during an update as much again. The
state has :math:`H^{-1/2}`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, paths, sharding
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import mapped
from mezo_jax.transforms import losses as losses_lib
from mezo_jax.transforms.evaluate_points import estimate
from mezo_jax.transforms.mezo import descent
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.types import ZerothOrderTransformation
from mezo_jax.variants._told import check_one_eps, Remembering


def hizoo(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, alpha: float = 1e-8,
    directions: Directions | str = Normal(), num_samples: int | None = None,
    over: str = 'scan', micro_batches: int | None = None,
    weight_decay: float = 0.0, decay: Any = None,
    stochastic_rounding: bool = True) -> ZerothOrderTransformation:
  r"""MeZO along :math:`H^{-1/2} z`, of 2n + 1 evaluations a step.

  The direction that was evaluated is the one that is moved along: H changes
  after the weights. Of n directions the mean of :math:`h z^2` is taken. The
  door takes both scalars of each direction: ``projected_grad`` is [2n], first
  all g, then all h, as the state has it.

  Args:
    learning_rate: :math:`\eta`.
    eps: see `mezo_jax.spsa`; no groups.
    key: a `jax.random.key` or an integer seed.
    alpha: :math:`\alpha`. h is about half the Hessian's trace, which of a large
      model is large: the authors have 1e-8 in their example (and 0, which is
      plain MeZO, as their code's default).
    directions: what z is.
    num_samples: n, 1 if None.
    over: How directions are evaluated, as in `mezo_jax.spsa`.
    micro_batches: Number of parts in which the batch is evaluated.
    weight_decay: as of `mezo_jax.mezo`, and the next two.
    decay: which leaves are decayed.
    stochastic_rounding: of half-precision weights.

  Raises:
    ValueError: as `mezo_jax.spsa`; for an alpha out of range, or groups of eps.
  """
  check_one_eps(eps)
  directions = as_directions(directions)
  arguments.number('alpha', alpha, least=0, below=1)
  eps = arguments.rate('eps', eps, above=0, groups=False)
  n = 1 if num_samples is None else arguments.whole('num_samples', num_samples)
  plain = lambda kind: spsa(
      eps, key=key, directions=kind, num_samples=n, over=over,
      micro_batches=micro_batches, dtype=jnp.float32)

  plain(directions)  # refuses options that cannot be used

  def init_fn(params):
    state = plain(directions).init(params)
    scales = paths.map_named(
        lambda path, x, used: _ones(x, used), params,
        directions.selected(params))
    return sharding.beside(Remembering(state._replace(
        projected_grad=jnp.zeros([2 * n], jnp.float32)), scales), params)

  def update_fn(updates, state, params=None, *, value_fn=None,
                projected_grad=None, value=None, **extra_args):
    old, scales = state
    kind = dataclasses.replace(directions, scales=scales)
    tx = plain(kind)
    if value_fn is not None and projected_grad is None and params is not None:
      value, projected_grad = _losses(
          value_fn, params, old, kind, extra_args)
      old, value_fn, extra_args = old._replace(key=Displacement(
          old.key, 1.0).after(value).keys), None, {}
    given = {} if value is None else dict(value=value)
    numbers = projected_grad
    if numbers is not None:
      numbers = arguments.array('projected_grad', numbers).astype(jnp.float32)
      if numbers.shape != (2 * n,):
        raise ValueError(
            f'projected_grad must have the shape [{2 * n}], first g of each '
            f'direction, then h of each, got {list(numbers.shape)}.')
      there = jnp.all(jnp.isfinite(numbers))
      numbers = jnp.where(there, numbers, jnp.nan)
    updates, new = tx.update(
        updates, old._replace(projected_grad=old.projected_grad[:n]), params,
        value_fn=value_fn, **({} if numbers is None else dict(
            projected_grad=numbers[:n])), **given, **extra_args)
    assert numbers is not None  # update wants losses or numbers
    curved = jnp.where(there, numbers[n:], 0.0) / n
    shrink = jnp.where(there, alpha, 0.0)
    # Of scaled draws; with s for H^(-1/2), H z^2 is (s z)^2 / s^4.
    squares = mapped(
        lambda w, draws: sum(curved[j] * draws.term(j, w)**2 for j in range(n)),
        params, Displacement(directions.keys(old.key, old.count, n),
                             jnp.ones(n)), kind, dtype=jnp.float32)
    def after(s, square):
      if not s.ndim and square.ndim:
        return s  # of a leaf without z
      hessian = (1 - shrink + shrink * square / s**2) / s**2
      return jnp.minimum(jax.lax.rsqrt(hessian), jnp.float32(1e6))
    return updates, Remembering(
        new._replace(key=state.spsa.key, projected_grad=numbers),
        jax.tree.map(after, scales, squares))

  def _losses(value_fn, params, state, kind, extra_args):
    epsilon = arguments.at(eps, state.count)
    z = Displacement(kind.keys(state.key, state.count, n),
                     jnp.ones(n, jnp.float32))
    losses = estimate(
        value_fn, params, z, epsilon, kind, signs=(1.0, -1.0, 0.0),
        over=over, micro_batches=micro_batches or 1,
        batch=losses_lib.accepted(value_fn, extra_args))
    plus, minus, clean = losses.T
    value = jnp.mean(losses[:, :2])
    g = (plus - minus) / (2 * epsilon)
    curved = jnp.abs(plus - 2 * clean + minus) / (2 * epsilon**2)
    return value, jnp.where(
        jnp.isfinite(value), jnp.concatenate([g, curved]), jnp.nan)

  return descent(
      ZerothOrderTransformation(init_fn, update_fn), learning_rate,
      key=key, directions=directions, weight_decay=weight_decay, decay=decay,
      stochastic_rounding=stochastic_rounding)


def _ones(x, used) -> jax.Array:
  """Where x lies, if it is used; one number if not."""
  if used is False:
    return jnp.ones((), jnp.float32)
  if is_codes(x):
    return jnp.ones(x.shape, jnp.float32)
  return jnp.ones_like(x, jnp.float32)
