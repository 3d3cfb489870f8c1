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

  def memory(params):
    def rows(params):
      """Returns U of each matrix, and None for any other leaf."""
      z = Displacement(jax.random.key(0), 1.0)  # only shapes are computed
      leaves = of_leaves(params, z, kind)
      return [_factors(draws, x)[0] for _, x, draws in leaves]
    shapes = jax.eval_shape(rows, params)
    return jax.tree.map(lambda u: jnp.zeros(u.shape, jnp.float32), shapes)

  def apply(state, params, numbers):
    g = numbers.projected_grad[0]
    there = jnp.isfinite(g)
    changes = (state.count > 0) & (state.count % kind.every == 0)

    def averaged(there, moved, g, u, momentum):
      """Returns the next momentum of a matrix."""
      return jnp.where(there, beta * moved + (1 - beta) * g * u, momentum)

    def of_matrix(x, draws, old, momentum):
      """Returns the update and the next momentum of a matrix."""
      u, v = _factors(draws, x)
      def projected(momentum):
        _, v_old = _factors(old, x)
        layers = x.shape[0] if draws.is_stack() else 1
        return _projected(momentum, v_old, v, layers)
      moved = lax.cond(changes, projected, lambda m: m, momentum)
      # Store the momentum before it is used. Otherwise, XLA could compute it
      # twice, for the state and for the update, and round differently.
      moved = xla.made_first(averaged, there, moved, g, u, momentum)
      # The coefficient of the direction is 1 / sqrt(r).
      step = draws.coefs[0] * low_rank.product(moved, v)
      step = draws.masked(x, draws.scaled_by(step), 0.0)
      return jnp.where(there, step, 0.0), moved

    last = jnp.maximum(state.count - 1, 0)
    now = of_leaves(params, spsa.z(state), kind)
    before = of_leaves(params, spsa.z(state, last), kind)
    updates, momenta = [], []
    for (_, x, draws), (_, _, old), momentum in zip(now, before, state.memory):
      if momentum is not None:
        update, momentum = of_matrix(x, draws, old, momentum)
      elif draws is not None:
        update = jnp.where(there, g, 0.0) * draws.built(x)
      else:
        update = zeros(x)
      updates.append(update)
      momenta.append(momentum)
    return jax.tree.unflatten(paths.structure(params), updates), momenta

  return Estimator(spsa, apply=apply, memory=memory)


def _projected(momentum, v_old, v, layers: int) -> jax.Array:
  """Returns N (V_old^T V_new) / k, for each layer of a stack."""
  rank = v.shape[-1]
  v_old = v_old.reshape(layers, -1, rank)
  v = v.reshape(layers, -1, rank)
  meet = jnp.einsum('lka,lkb->lab', v_old, v, precision='highest') / v.shape[1]
  ones = (1,) * (momentum.ndim - 2)
  return jnp.einsum('...a,...ab->...b', momentum,
                    meet.reshape(layers, *ones, rank, rank),
                    precision='highest')


def _factors(draws, x) -> list[Any]:
  """Returns U and V of a leaf, or None twice for a leaf without factors.

  Each has one axis for each axis of the leaf, of length 1 where the factor does
  not vary, followed by an axis for the rank.
  """
  if draws is None or len(draws.streams) < 2:
    return [None, None]
  factors = []
  for stream in draws.streams:
    factor = draws.directions.factor(stream, x.shape, jnp.float32)
    factors.append(low_rank.of_block(factor, stream, x.shape))
  return factors
