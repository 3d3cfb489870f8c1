r"""MaZO: the weights that matter most to all tasks are perturbed and moved.

For each task t, n directions give scalars,

.. math::
  g_j = \frac{\ell_j^+ - \ell_j^-}{2 \epsilon}, \quad
  h_j = \frac{\ell_j^+ - 2 \ell^0 + \ell_j^-}{\epsilon^2}, \quad
  \hat g = \frac{1}{n} \sum_j g_j z_j, \quad
  \hat H = \frac{1}{2n} \sum_j h_j (z_j^2 - 1)

of which :math:`\hat g` has the gradient's mean and :math:`\hat H` that of the
Hessian's diagonal, for normal z. The score of a weight w is

.. math:: S^t = \frac{\hat g^2}{2 |\hat H|} + \alpha \hat g^2 + \beta |w|

(what freezing it costs at the optimum, what a step of descent gains by it, its
size), divided by its row's sum; those of all tasks are added, and the k
greatest of each row are trained (Zhang et al., 2025, arXiv:2502.11513, Section
4). No code of it is public: how curvature and gradient are found without
derivatives, that :math:`|\hat H|` is at least its leaf's mean, and that a row
is one of our leaves as they lie, are ours.

Nothing of the weights' size is kept of the directions: the scores of a leaf are
made of the scalars and the keys. With n directions of d elements each score is
mostly noise where n is far below d; the mask then is a random one, which still
makes d smaller.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax import _noise, _paths, _values
from mezo_jax._directions import Directions, Normal
from mezo_jax._displacement import Displacement
from mezo_jax._mezo import mezo
from mezo_jax._perturb import mapped, perturbed
from mezo_jax._spsa import as_directions


def saliency(value_fns: Sequence[Callable], params, key, *,
             share: float = 0.25, num_samples: int = 16, eps: float = 1e-3,
             alpha: float = 1.0, beta: float = 0.0,
             directions: Directions = Normal()):
  r"""Which weights of each row matter most: a mask for `mazo`.

  Args:
    value_fns: functions of the parameters, one for each task; see
      `mezo_jax._values` for what they return.
    params: before training.
    key: of the directions; a `jax.random.key` or an integer seed.
    share: of each row, k over its length, above 0 and at most 1.
    num_samples: n, of 2 n + 1 evaluations a task.
    eps: :math:`\epsilon`.
    alpha: :math:`\alpha`, with a learning rate in it.
    beta: :math:`\beta`.
    directions: normal ones, and which leaves are scored.

  Returns:
    A tree of bools: arrays for matrices (of each layer), of whose rows exactly
    k are True; True for vectors that are trained and False for what is not.

  Raises:
    ValueError: for a share or a number of directions out of range.
  """
  if not 0 < share <= 1 or num_samples < 1:
    raise ValueError('share must be above 0 and at most 1, and num_samples at '
                     f'least 1, got {share!r} and {num_samples!r}.')
  key, n = _noise.as_key(key), num_samples
  keys = jnp.stack([_noise.direction_key(key, t, j)
                    for t in range(len(value_fns)) for j in range(n)])

  @jax.jit
  def scalars(params):
    """g, h: [tasks, n]."""
    found = []
    for t, value_fn in enumerate(value_fns):
      at = lambda point, f=value_fn: _values.mean(
          perturbed(f, directions)(params, point))
      mine = keys[t * n:(t + 1) * n]
      both = lax.map(at, Displacement(
          jnp.repeat(mine, 2), jnp.tile(jnp.float32([eps, -eps]), n)))
      plus, minus = both.reshape(n, 2).T
      clean = at(Displacement(mine[0], 0.0).after(minus[-1]))
      found.append(((plus - minus) / (2 * eps),
                    (plus - 2 * clean + minus) / eps**2))
    return tuple(map(jnp.stack, zip(*found)))

  def of_leaf(g, h, w, draws):
    draws = dataclasses.replace(draws, coefs=jnp.ones_like(draws.coefs))
    total = 0.0
    for t in range(len(g)):
      def add(j, sums, t=t):
        z = jnp.broadcast_to(draws.term(t * n + j, w), w.shape)
        return sums[0] + g[t, j] * z, sums[1] + h[t, j] * (z**2 - 1)
      zero = jnp.zeros(w.shape, g.dtype)
      grad, curve = lax.fori_loop(0, n, add, (zero, zero))
      grad, curve = grad / n, jnp.abs(curve) / (2 * n)
      curve = jnp.maximum(curve, jnp.maximum(jnp.mean(curve), 1e-30))
      score = grad**2 / (2 * curve) + alpha * grad**2 + (
          beta * jnp.abs(w.astype(jnp.float32)))
      total += score / jnp.maximum(jnp.sum(score, -1, keepdims=True), 1e-30)
    k = max(round(share * w.shape[-1]), 1)
    order = jnp.argsort(jnp.argsort(-total, -1), -1)  # exactly k, ties or not
    return order < k

  @jax.jit
  def masks(params, g, h):
    return mapped(
        lambda w, draws: of_leaf(g, h, w, draws), params,
        Displacement(keys, jnp.ones(len(keys))), directions, dtype=bool)

  chosen = masks(params, *scalars(params))
  stacks = jax.tree.unflatten(
      _paths.structure(params), _paths.stacked(params, directions.stacked))
  return jax.tree.map(
      lambda m, x, used, stack: m if used is not False and (
          x.ndim - stack >= 2) else used is not False,
      chosen, params, directions.selected(params), stacks)


def mazo(
    learning_rate: float | optax.Schedule | Mapping,
    eps: float | optax.Schedule | Mapping = 1e-3, *, mask,
    directions: Directions | str = Normal(), **options
) -> optax.GradientTransformationExtraArgs:
  r"""MeZO of the weights that a mask of `saliency` chooses.

  .. math:: \theta \leftarrow \theta - \eta g\, (z \odot M), \qquad
            \ell_\pm = \mathcal{L}(\theta \pm \epsilon\, z \odot M)

  Weights that are not chosen are neither moved nor perturbed.

  Args:
    learning_rate: :math:`\eta`.
    eps: see `mezo_jax.mezo`.
    mask: M, a byte an element beside the weights.
    directions: what z is, without a mask of its own.
    **options: of `mezo_jax.mezo`, ``key`` among them; no weight decay.

  Raises:
    ValueError: as `mezo_jax.mezo`; for directions that have a mask.
  """
  directions = as_directions(directions)
  if directions.mask is not None:
    raise ValueError('mazo has the mask of saliency, which directions with '
                     'one of their own were to be given to.')
  return mezo(learning_rate, eps, directions=dataclasses.replace(
      directions, mask=mask), **options)
