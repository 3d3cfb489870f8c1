r"""MaZO: only the weights that matter most to all tasks are trained.

For each task t, n directions give scalars,

.. math::
  g_j = \frac{\ell_j^+ - \ell_j^-}{2 \epsilon}, \quad
  h_j = \frac{\ell_j^+ - 2 \ell^0 + \ell_j^-}{\epsilon^2}, \quad
  \hat g = \frac{1}{n} \sum_j g_j z_j, \quad
  \hat H = \frac{1}{2n} \sum_j h_j (z_j^2 - 1)

For normal z, the mean of :math:`\hat g` is the gradient, and that of
:math:`\hat H` is the Hessian's diagonal. The score of a weight w is

.. math:: S^t = \frac{\hat g^2}{2 |\hat H|} + \alpha \hat g^2 + \beta |w|

(the cost of freezing it at the optimum, the gain of a step of descent, and its
size), divided by the sum of its row. The scores of all tasks are added, and the
k highest of each row are trained. Source: Zhang et al., 2025, arXiv:2502.11513,
Section 4. No code of the paper is public. Finding curvature and gradient
without derivatives, bounding :math:`|\hat H|` by its row's mean from below, and
taking the rows of a leaf as it is stored are our choices.

Nothing of the weights' size is kept except the mask: scores are computed for
some rows at a time from the scalars and the keys. If n is far below the number
d of elements, each score is mostly noise, and the mask is close to a random
one, which still makes d smaller.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, Unpack

import jax
from jax import lax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments, paths, views
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions import noise
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import mapped, perturbed
from mezo_jax.transforms import losses
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions

_PART = 2**20  # elements that are scored at once


def saliency(value_fns: Sequence[Callable[..., Any]], params: Any, key: Any, *,
             share: float = 0.25, num_samples: int = 16, eps: float = 1e-3,
             alpha: float = 1.0, beta: float = 0.0,
             directions: Directions | str = Normal()) -> Any:
  r"""Returns the mask of the weights of each row that matter most, for `mazo`.

  Args:
    value_fns: Functions of the parameters, one for each task. Each returns
      what the ``value_fn`` of `mezo_jax.spsa` may return.
    params: The parameters before training.
    key: A `jax.random.key` or an integer seed.
    share: Share of each row that is trained, above 0 and at most 1.
    num_samples: n, the number of directions. Each task takes 2n + 1
      evaluations.
    eps: Perturbation scale :math:`\epsilon`.
    alpha: :math:`\alpha`, which includes a learning rate.
    beta: :math:`\beta`.
    directions: `Normal`, with the leaves that are scored.

  Returns:
    A tree of bools. For matrices (of each layer) they are arrays, with exactly
    k True in each row; for other leaves True or False.

  Raises:
    ValueError: For a share or a number of directions out of range; for
      directions that are not normal or have a mask of elements; for `Codes`.
  """
  if callable(value_fns) or not isinstance(value_fns, Sequence) or not (
      value_fns):
    raise ValueError('value_fns must be a sequence of functions, one for each '
                     f'task, got {value_fns!r}.')
  for value_fn in value_fns:
    arguments.function('each of value_fns', value_fn)
  arguments.tree('params', params)
  arguments.whole('num_samples', num_samples)
  arguments.number('eps', eps, above=0)
  arguments.number('alpha', alpha)
  arguments.number('beta', beta)
  arguments.number('share', share)
  directions = as_directions(directions)
  if type(directions) is not Normal:
    raise ValueError('saliency needs directions=mezo_jax.Normal(...), got '
                     f'{directions!r}.')
  if any(map(is_codes, jax.tree.leaves(params, is_leaf=is_codes))):
    raise ValueError('saliency cannot score quantised weights (Codes).')
  if any(jnp.ndim(m) for m in jax.tree.leaves(directions.selected(params))):
    raise ValueError('saliency chooses elements: directions may have a mask of '
                     'leaves, not of elements.')
  if not 0 < share <= 1 or num_samples < 1:
    raise ValueError('share must be above 0 and at most 1, and num_samples at '
                     f'least 1, got {share!r} and {num_samples!r}.')
  key, n = noise.as_key(key), num_samples
  keys = jnp.stack([noise.direction_key(key, t, j)
                    for t in range(len(value_fns)) for j in range(n)])

  @jax.jit
  def scalars(params):
    """g, h: [tasks, n]."""
    found = []
    for t, value_fn in enumerate(value_fns):
      at = lambda point, f=value_fn: losses.mean(
          perturbed(f, directions)(params, point))
      mine = keys[t * n:(t + 1) * n]
      both = lax.map(at, Displacement(
          jnp.repeat(mine, 2), jnp.tile(jnp.float32([eps, -eps]), n)))
      plus, minus = both.reshape(n, 2).T
      clean = at(Displacement(mine[0], 0.0).after(minus[-1]))
      found.append(((plus - minus) / (2 * eps),
                    (plus - 2 * clean + minus) / eps**2))
    return tuple(map(jnp.stack, zip(*found)))

  def of_rows(g, h, w, draws):
    total = 0.0
    for t in range(len(g)):
      def add(j, sums, t=t):
        z = jnp.broadcast_to(draws.term(t * n + j, w), w.shape)
        return sums[0] + g[t, j] * z, sums[1] + h[t, j] * (z**2 - 1)
      zero = jnp.zeros(w.shape, g.dtype)
      grad, curve = lax.fori_loop(0, n, add, (zero, zero))
      grad, curve = grad / n, jnp.abs(curve) / (2 * n)
      curve = jnp.maximum(curve, jnp.maximum(
          jnp.mean(curve, -1, keepdims=True), 1e-30))
      score = grad**2 / (2 * curve) + alpha * grad**2 + (
          beta * jnp.abs(w.astype(jnp.float32)))
      total += score / jnp.maximum(jnp.sum(score, -1, keepdims=True), 1e-30)
    k = max(round(share * w.shape[-1]), 1)
    order = jnp.argsort(jnp.argsort(-total, -1), -1)  # exactly k, ties or not
    return order < k

  def of_leaf(g, h, w, draws):
    """Scores a leaf layer by layer and some rows at a time, since scores need
    several arrays of that size."""
    if w.ndim < 2:
      return of_rows(g, h, w, draws)
    if draws.is_stack():
      length, size = w.shape[0], w.shape[0]
    else:
      length = w.shape[0]
      size = next(n for n in range(1, length + 1)
                  if length % n == 0 and w.size // n <= _PART or n == length)
    if size == 1:
      return of_rows(g, h, w, draws)
    if size < length:
      split = views.Reshape((size, length // size, *w.shape[1:]))
      draws = draws.viewed(split, w.shape)
    along, of_part = draws.rows(size)
    return lax.map(
        lambda part: of_leaf(g, h, part[0], of_part(part[1])),
        (w.reshape(size, *(() if size == length else (length // size,)),
                   *w.shape[1:]), along)).reshape(w.shape)

  @jax.jit
  def masks(params, g, h):
    return mapped(
        lambda w, draws: of_leaf(g, h, w, dataclasses.replace(
            draws, coefs=jnp.ones(len(keys)))), params,
        Displacement(keys, jnp.ones(len(keys))), directions, dtype=bool)

  chosen = masks(params, *scalars(params))
  stacks = jax.tree.unflatten(
      paths.structure(params), paths.stacked(params, directions.stacked))
  return jax.tree.map(
      lambda m, x, used, stack: m if used is not False and (
          x.ndim - stack >= 2) else used is not False,
      chosen, params, directions.selected(params), stacks)


def mazo(eps: Any = 1e-3, *, mask: Any, **options: Unpack[SpsaOptions]
         ) -> Estimator:
  r"""SPSA of the weights that a mask of `saliency` chooses.

  .. math:: \ell_\pm = \mathcal{L}(\theta \pm \epsilon\, z \odot M), \qquad
            u = g\, (z \odot M)

  Weights that are not chosen are neither moved nor perturbed.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`.
    mask: M, one byte per element. Its arrays are stored in the state, so
      checkpoints include them and programs do not have them as constants.
    **options: Other options of `mezo_jax.spsa`. Its directions may not have a
      mask.
  """
  spsa = Spsa(eps, **options)
  if spsa.directions.mask is not None:
    raise ValueError('directions.mask cannot be used together with mask=: pass '
                     'your mask to saliency(directions=...) instead.')
  if mask is None or isinstance(mask, str) or callable(mask):
    raise ValueError('mask must be a tree of bools, such as saliency returns, '
                     f'got {mask!r}.')
  leaves, tree = jax.tree.flatten(mask)
  is_array = [bool(jnp.ndim(m)) for m in leaves]

  def masked(state):
    arrays = iter(state.memory)
    return spsa.along(mask=jax.tree.unflatten(tree, [
        next(arrays) if a else m for m, a in zip(leaves, is_array)]))

  def memory(params):
    return [_beside(m, x) for m, a, (_, x) in zip(
        leaves, is_array, paths.named_leaves(params)) if a]

  def measure(state, params, value_fn, batch):
    return masked(state).measure(state, params, value_fn, batch)

  def apply(state, params, numbers):
    return masked(state).apply(state, params, numbers), state.memory

  return Estimator(spsa.along(mask=mask), measure=measure, apply=apply,
                   memory=memory)


def no_scores(params: Any, directions: Directions | str = Normal()) -> Any:
  """Returns a mask like that of `saliency` that chooses no element of matrices.

  It is used until a state is restored or scores are computed.
  """
  arguments.tree('params', params)
  directions = as_directions(directions)
  stacks = jax.tree.unflatten(
      paths.structure(params), paths.stacked(params, directions.stacked))
  return jax.tree.map(
      lambda x, used, stack: np.broadcast_to(False, x.shape) if (
          used is not False and x.ndim - stack >= 2) else used is not False,
      params, directions.selected(params), stacks)


def _beside(mask, x) -> jax.Array:
  """Returns a copy of a mask with the sharding of its weights."""
  on_mesh = isinstance(getattr(x, 'sharding', None),
                       jax.sharding.NamedSharding) and not isinstance(
                           x, Tracer)
  return jax.device_put(jnp.copy(mask), x.sharding if on_mesh else None)
