r"""Provides LOZO-M, whose momentum has the size of a low-rank factor."""

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
  r"""Runs SPSA along low-rank directions, with momentum of one factor (LOZO-M).

  The directions are those of `mezo_jax.LazyLowRank`: V stays the same for some
  steps, and U is new in each step. For each matrix with k columns,

  .. math::
    N \leftarrow \beta N + (1 - \beta)\, g U, \qquad
    W \leftarrow W - \frac{\eta}{\sqrt r} N V^\top.

  When V changes, the momentum is first projected onto the new factor, by
  :math:`N \leftarrow \frac{1}{k} N (V_{old}^\top V_{new})`. Vectors and small
  matrices have no factors, and therefore no momentum.

  In the paper, the factors are normal and there is no :math:`1 / \sqrt r`.
  Multiply learning rates of the paper by r to use them here.

  Args:
    eps: Perturbation scale :math:`\epsilon`, a number or a schedule. Defaults
      to 1e-3.
    beta: Decay rate :math:`\beta` of the momentum, at least 0 and below 1.
      Defaults to 0.9.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``combine``, ``over``, ``micro_batches`` and ``dtype``. ``num_samples``
      must be 1. ``directions`` must be a `mezo_jax.LazyLowRank`, and defaults
      to ``LazyLowRank(rank=2, every=50)``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`. The memory
    of its state has N for each matrix, float32 [rows, rank].

  Raises:
    ValueError: If ``beta`` is out of range, if ``directions`` or
      ``num_samples`` is unsuitable, if ``eps`` has groups, or for an option
      that `mezo_jax.spsa` does not accept.

  References:
    Chen et al., 2024, `Enhancing Zeroth-order Fine-tuning for Language Models
    with Low-rank Structures <https://arxiv.org/abs/2410.07698>`_, Algorithm 2.

  Example:
    >>> import mezo_jax
    >>> from mezo_jax import variants
    >>> tx = mezo_jax.mezo(1e-6, estimator=variants.lozo_m(1e-3, key=0))
  """
  options.setdefault('directions', LazyLowRank(rank=2, every=50))
  spsa = Spsa(eps, **options).one_eps()
  arguments.number('beta', beta, least=0, below=1)
  kind = spsa.directions
  if not isinstance(kind, LazyLowRank) or isinstance(kind, SubZero):
    raise ValueError('lozo_m needs directions=mezo_jax.LazyLowRank(...), got '
                     f'{kind!r}.')
  if spsa.num_samples > 1:
    raise ValueError('num_samples must be 1 for lozo_m, which keeps the '
                     'momentum of a single direction per step.')

  def draws_at(params, keys):
    """Returns the draws of each leaf, or None for a leaf without a z."""
    z = Displacement(keys, jnp.ones(1))
    return [draws for *_, draws in of_leaves(params, z, kind)]

  def memory(params):
    key = jax.random.key(0)  # any key, since only shapes are computed
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
      """Returns the update and the next momentum of one leaf."""
      if draws is None:
        return zeros(x), None
      if momentum is None:
        return jnp.where(there, g, 0.0) * draws.built(x), None
      u, v = _factors(draws, x)
      def projected(momentum):
        """Returns N (V_old^T V_new) / k, for each layer of a stack."""
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
      # Store the momentum before it is used. Otherwise, XLA could compute it
      # twice, for the state and for the update, and round differently.
      moved = xla.made_first(
          lambda there, moved, g, u, momentum: jnp.where(
              there, beta * moved + (1 - beta) * g * u, momentum),
          there, moved, g, u, momentum)
      # The coefficient of the direction is 1 / sqrt(r).
      step = draws.coefs[0] * low_rank.product(moved, v)
      step = draws.scaled_by(step)
      return jnp.where(there, draws.masked(x, step, 0.0), 0.0), moved

    leaves = [x for _, x in paths.named_leaves(params)]
    updates, momenta = zip(*map(of_leaf, leaves, now, before, state.memory))
    return jax.tree.unflatten(paths.structure(params), updates), [*momenta]

  return Estimator(spsa, apply=apply, memory=memory)


def _has_factors(draws) -> bool:
  """Returns whether a leaf has low-rank directions."""
  return draws is not None and len(draws.streams) == 2


def _factors(draws, x) -> list[jax.Array]:
  """Returns U and V of a leaf.

  Each has one axis for each axis of the leaf, of length 1 where the factor does
  not vary, followed by an axis for the rank.
  """
  return [low_rank.of_block(
      draws.directions.factor(s, x.shape, jnp.float32), s, x.shape)
          for s in draws.streams]
