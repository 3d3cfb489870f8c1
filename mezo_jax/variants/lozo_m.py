r"""LOZO-M: momentum of low-rank steps, of a factor's size.

With V the same for some steps on end and a new U each step (`LazyLowRank`),

.. math::
  N \leftarrow \beta N + (1 - \beta)\, g U, \qquad
  W \leftarrow W - \frac{\eta}{\sqrt r} N V^\top

of each matrix, and whenever V changes :math:`N \leftarrow \frac{1}{k} N
(V_{old}^\top V_{new})` first, the momentum as the new V has it. What is drawn
whole (vectors, small matrices) has no momentum. Chen et al. (2024,
arXiv:2410.07698), Algorithm 2.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, paths, sharding, xla
from mezo_jax.directions import low_rank
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement, of_leaves
from mezo_jax.directions.low_rank import LazyLowRank
from mezo_jax.directions.subzero import SubZero
from mezo_jax.perturb.api import zeros
from mezo_jax.transforms.mezo import descent
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.types import ZerothOrderTransformation
from mezo_jax.variants._told import check_one_eps, Remembering


def lozo_m(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, beta: float = 0.9,
    directions: LazyLowRank | str = LazyLowRank(rank=2, every=50),
    weight_decay: float = 0.0, decay: Any = None,
    stochastic_rounding: bool = True, **options: Any
) -> ZerothOrderTransformation:
  r"""MeZO along `LazyLowRank` directions, with momentum of their factor.

  Args:
    learning_rate: :math:`\eta`; the paper's, whose normal factors have no
      :math:`1/\sqrt r`, times r.
    eps: see `mezo_jax.spsa`; no groups.
    key: a `jax.random.key` or an integer seed.
    beta: :math:`\beta`.
    directions: U and V; one a step.
    weight_decay: as of `mezo_jax.mezo`, and the next two.
    decay: which leaves are decayed.
    stochastic_rounding: of half-precision weights.
    **options: of `mezo_jax.spsa` but ``num_samples``.

  Returns:
    The transform; N, float32 [rows, rank] of each matrix, is in its state.

  Raises:
    ValueError: as `mezo_jax.spsa`; for directions of another kind, or groups
      of eps.
  """
  check_one_eps(eps)
  kind = as_directions(directions)
  arguments.number('beta', beta, least=0, below=1)
  if not isinstance(kind, LazyLowRank) or isinstance(kind, SubZero):
    raise ValueError('lozo_m needs directions=mezo_jax.LazyLowRank(...), got '
                     f'{kind!r}.')
  directions = kind
  estimate = spsa(eps, key=key, directions=directions, num_samples=1,
                  dtype=jnp.float32, **options)
  draws_at = lambda params, keys: [
      draws for *_, draws in of_leaves(
          params, Displacement(keys, jnp.ones(1)), directions)]

  def init_fn(params):
    state = estimate.init(params)
    like = jax.eval_shape(lambda params: [
        _factors(draws, x)[0] if _has(draws) else None
        for draws, (_, x) in zip(
            draws_at(params, directions.keys(state.key, 0, 1)),
            paths.named_leaves(params))], params)
    return sharding.beside(Remembering(state, jax.tree.map(
        lambda u: jnp.zeros(u.shape, jnp.float32), like)), params)

  def update_fn(updates, state, params=None, **extra_args):
    before, momenta = state
    _, new = estimate.update(  # its updates are not used, nor made
        updates, before, params, **extra_args)
    g = new.projected_grad[0]
    there = jnp.isfinite(g)
    keys_at = lambda count: Displacement(directions.keys(
        before.key, count, 1), jnp.ones(1)).after(new.value).keys
    changes = (before.count > 0) & (before.count % directions.every == 0)
    now = draws_at(params, keys_at(before.count))
    past = draws_at(params, keys_at(jnp.maximum(before.count - 1, 0)))

    def of_leaf(x, draws, old, momentum):
      if draws is None:
        return zeros(x), None
      if momentum is None:
        return jnp.where(there, g, 0.0) * draws.built(x), None
      u, v = _factors(draws, x)
      def projected(momentum):
        _, v_old = _factors(old, x)
        layers = x.shape[0] if draws.is_stack() else 1
        apart = lambda v: v.reshape(layers, -1, directions.rank)
        meet = jnp.einsum('lka,lkb->lab', apart(v_old), apart(v),
                          precision='highest') / apart(v).shape[1]
        meet = meet.reshape(layers, *(1,) * (len(x.shape) - 1),
                            *meet.shape[1:])
        return jnp.einsum('...a,...ab->...b', momentum, meet,
                          precision='highest')
      moved = lax.cond(changes, projected, lambda m: m, momentum)
      # Made once: each use could join other products and sums in one operation.
      moved = xla.made_first(
          lambda there, moved, g, u, momentum: jnp.where(
              there, beta * moved + (1 - beta) * g * u, momentum),
          there, moved, g, u, momentum)
      step = draws.coefs[0] * low_rank.product(moved, v)  # 1 / sqrt(r)
      return jnp.where(there, _kept(draws, x, step), 0.0), moved

    leaves = [x for _, x in paths.named_leaves(params)]
    out = [of_leaf(*of) for of in zip(leaves, now, past, momenta)]
    return (jax.tree.unflatten(paths.structure(params), [u for u, _ in out]),
            Remembering(new, [m for _, m in out]))

  return descent(
      ZerothOrderTransformation(init_fn, update_fn), learning_rate,
      key=key, directions=directions, weight_decay=weight_decay, decay=decay,
      stochastic_rounding=stochastic_rounding)


def _has(draws) -> bool:
  return draws is not None and len(draws.streams) == 2


def _factors(draws, x) -> list[jax.Array]:
  """U and V of a leaf, with all of its axes and one of the rank."""
  return [low_rank.of_block(
      draws.directions.factor(s, x.shape, jnp.float32), s, x.shape)
          for s in draws.streams]


def _kept(draws, x, step):
  """Zero where z is, and scaled as it is."""
  scale, nonzero = draws.streams[0].scale, draws.nonzero(x)
  step = step if scale is None else step * scale
  return step if nonzero is None else jnp.where(nonzero, step, 0.0)
