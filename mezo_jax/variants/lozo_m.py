r"""LOZO-M: momentum of low-rank steps, of the size of a factor.

With V the same for some steps and a new U in each step (`LazyLowRank`), for
each matrix

.. math::
  N \leftarrow \beta N + (1 - \beta)\, g U, \qquad
  W \leftarrow W - \frac{\eta}{\sqrt r} N V^\top

and, when V changes, first :math:`N \leftarrow \frac{1}{k} N (V_{old}^\top
V_{new})`, which expresses the momentum in the new V. Vectors and small
matrices, which have no factors, have no momentum. Source: Chen et al., 2024,
arXiv:2410.07698, Algorithm 2.
"""

from typing import Any, Unpack

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import arguments, paths, xla
from mezo_jax.directions import low_rank
from mezo_jax.directions.displacement import Displacement, of_leaves
from mezo_jax.directions.low_rank import LazyLowRank
from mezo_jax.directions.subzero import SubZero
from mezo_jax.perturb.api import zeros
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions


def lozo_m(eps: Any = 1e-3, *, beta: float = 0.9,
           **options: Unpack[SpsaOptions]) -> Estimator:
  r"""SPSA along `LazyLowRank` directions, with momentum of their factor.

  The memory is N, float32 [rows, rank] for each matrix. The paper's normal
  factors have no :math:`1/\sqrt r`: use its learning rates times r.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`, without groups.
    beta: :math:`\beta`.
    **options: Other options of `mezo_jax.spsa`, with one direction per step.
      ``directions`` defaults to ``LazyLowRank(rank=2, every=50)``.
  """
  options.setdefault('directions', LazyLowRank(rank=2, every=50))
  spsa = Spsa(eps, **options).one_eps()
  arguments.number('beta', beta, least=0, below=1)
  kind = spsa.directions
  if not isinstance(kind, LazyLowRank) or isinstance(kind, SubZero):
    raise ValueError('lozo_m needs directions=mezo_jax.LazyLowRank(...), got '
                     f'{kind!r}.')
  if spsa.num_samples > 1:
    raise ValueError('lozo_m has one direction per step: leave num_samples '
                     'at 1.')

  def draws_at(params, keys):
    z = Displacement(keys, jnp.ones(1))
    return [draws for *_, draws in of_leaves(params, z, kind)]

  def memory(params):
    key = jax.random.key(0)  # only shapes are used
    shapes = jax.eval_shape(lambda params: [
        _factors(draws, x)[0] if _has_factors(draws) else None
        for draws, (_, x) in zip(draws_at(params, kind.keys(key, 0, 1)),
                                 paths.named_leaves(params))], params)
    return jax.tree.map(lambda u: jnp.zeros(u.shape, jnp.float32), shapes)

  def apply(state, params, numbers):
    g = numbers.projected_grad[0]
    there = jnp.isfinite(g)
    changes = (state.count > 0) & (state.count % kind.every == 0)
    now, before = (
        draws_at(params, kind.keys(state.key, count, 1))
        for count in (state.count, jnp.maximum(state.count - 1, 0)))

    def of_leaf(x, draws, old, momentum):
      if draws is None:
        return zeros(x), None
      if momentum is None:
        return jnp.where(there, g, 0.0) * draws.built(x), None
      u, v = _factors(draws, x)
      def projected(momentum):
        _, v_old = _factors(old, x)
        layers = x.shape[0] if draws.is_stack() else 1
        apart = lambda v: v.reshape(layers, -1, kind.rank)
        meet = jnp.einsum('lka,lkb->lab', apart(v_old), apart(v),
                          precision='highest') / apart(v).shape[1]
        meet = meet.reshape(layers, *(1,) * (len(x.shape) - 1),
                            *meet.shape[1:])
        return jnp.einsum('...a,...ab->...b', momentum, meet,
                          precision='highest')
      moved = lax.cond(changes, projected, lambda m: m, momentum)
      # Built once: each use could otherwise be fused with other products.
      moved = xla.made_first(
          lambda there, moved, g, u, momentum: jnp.where(
              there, beta * moved + (1 - beta) * g * u, momentum),
          there, moved, g, u, momentum)
      step = draws.coefs[0] * low_rank.product(moved, v)  # 1 / sqrt(r)
      step = draws.scaled_by(step)
      return jnp.where(there, draws.masked(x, step, 0.0), 0.0), moved

    leaves = [x for _, x in paths.named_leaves(params)]
    updates, momenta = zip(*map(of_leaf, leaves, now, before, state.memory))
    return jax.tree.unflatten(paths.structure(params), updates), [*momenta]

  return Estimator(spsa, apply=apply, memory=memory)


def _has_factors(draws) -> bool:
  return draws is not None and len(draws.streams) == 2


def _factors(draws, x) -> list[jax.Array]:
  """Returns U and V of a leaf, with all of its axes and one for the rank."""
  return [low_rank.of_block(
      draws.directions.factor(s, x.shape, jnp.float32), s, x.shape)
          for s in draws.streams]
