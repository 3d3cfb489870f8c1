r"""Provides MaZO, which trains only the weights that matter most to all tasks.

`saliency` scores weights before training and returns a mask. `mazo` runs SPSA
on the weights of the mask.

References:
  Zhang et al., 2025, `MaZO <https://arxiv.org/abs/2502.11513>`_, Section 4.
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
from mezo_jax.perturb.api import mapped
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions
from mezo_jax.transforms.evaluate_points import estimate

_PART = 2**20  # Largest number of elements that are scored in one operation.


def saliency(
    value_fns: Sequence[Callable[..., Any]],
    params: Any,
    key: Any,
    *,
    share: float = 0.25,
    num_samples: int = 16,
    eps: float = 1e-3,
    alpha: float = 1.0,
    beta: float = 0.0,
    directions: Directions | str = Normal(),
) -> Any:
  r"""Returns a mask of the weights that matter most, for `mazo`.

  For each task t, n directions :math:`z_j` are evaluated. They estimate the
  gradient and the diagonal of the Hessian:

  .. math::
    g_j = \frac{\ell_j^+ - \ell_j^-}{2 \epsilon}, \quad
    h_j = \frac{\ell_j^+ - 2 \ell^0 + \ell_j^-}{\epsilon^2}, \quad
    \hat g = \frac{1}{n} \sum_j g_j z_j, \quad
    \hat H = \frac{1}{2n} \sum_j h_j (z_j^2 - 1).

  The score of a weight w is

  .. math:: S^t = \frac{\hat g^2}{2 |\hat H|} + \alpha \hat g^2 + \beta |w|,

  divided by the sum of the scores in its row. The first term is the cost of not
  moving the weight to its optimum, the second is the gain of a step of gradient
  descent, and the third is the size of the weight. The scores of all tasks are
  added. The mask selects the highest scores of each row.

  Scores are computed for some rows at a time, from the keys and from g and h.
  No array of the size of the weights is stored except the mask. If n is far
  smaller than the number of weights, each score is mostly noise, and the mask
  is close to a random mask.

  There is no public code for the paper. This implementation makes three choices
  of its own: gradient and curvature are estimated by forward passes,
  :math:`|\hat H|` is at least the mean of its row, and a row runs along the
  last axis of a leaf.

  Args:
    value_fns: A sequence of functions of the params, one for each task. Each
      returns what the ``value_fn`` of `mezo_jax.spsa` may return.
    params: The params before training.
    key: A `jax.random.key` or an integer seed.
    share: Share of the weights of each row that are trained, above 0 and at
      most 1. At least one weight of each row is trained. Defaults to 0.25.
    num_samples: Number n of directions. Each task takes 2n + 1 evaluations.
      Defaults to 16.
    eps: Perturbation scale :math:`\epsilon`. Defaults to 1e-3.
    alpha: Weight :math:`\alpha` of the gain of a step, which includes a
      learning rate. Defaults to 1.
    beta: Weight :math:`\beta` of the size of a weight. Defaults to 0.
    directions: A `mezo_jax.Normal`, whose mask selects the leaves that are
      scored and trained. Defaults to ``Normal()``.

  Returns:
    A tree of bools with the structure of the params. A matrix, or a stack of
    matrices, has a bool array with the same number of True in each row. Other
    leaves have a single bool, which is True if directions select them.

  Raises:
    ValueError: If an argument is out of range, if ``directions`` are not normal
      or have a mask of elements, or if there are `QuantizedArray` among the
      params.

  References:
    Zhang et al., 2025, `MaZO: Masked Zeroth-Order Optimization for Multi-Task
    Fine-Tuning of Large Language Models <https://arxiv.org/abs/2502.11513>`_,
    Section 4.

  Example:
    >>> import jax.numpy as jnp
    >>> from mezo_jax import variants
    >>> params = {'w': jnp.ones((2, 8)), 'b': jnp.zeros(8)}
    >>> tasks = [lambda p: jnp.sum(p['w'] ** 2), lambda p: jnp.sum(p['b'])]
    >>> mask = variants.saliency(tasks, params, key=0)
    >>> mask['w'].sum(-1).tolist(), mask['b']
    ([2, 2], True)
  """
  if not isinstance(value_fns, Sequence) or not value_fns:
    raise ValueError('value_fns must be a sequence of functions, one for each '
                     f'task, got {value_fns!r}.')
  for value_fn in value_fns:
    arguments.function('each of value_fns', value_fn)
  arguments.number('share', share, above=0, most=1)
  n = arguments.whole('num_samples', num_samples)
  arguments.number('eps', eps, above=0)
  arguments.number('alpha', alpha)
  arguments.number('beta', beta)
  directions = as_directions(directions)
  if type(directions) is not Normal:
    raise ValueError('directions must be a mezo_jax.Normal(...) for saliency, '
                     f'got {directions!r}.')
  unscored = no_scores(params, directions)
  if any(is_codes(x) for _, x in paths.named_leaves(params)):
    raise ValueError('params: saliency cannot score quantised weights '
                     '(QuantizedArray); use params of floating point.')
  if any(map(jnp.ndim, jax.tree.leaves(directions.selected(params)))):
    raise ValueError('directions: the mask must select whole leaves, since '
                     'saliency selects elements itself.')
  key = noise.as_key(key)
  tasks = range(len(value_fns))
  keys = [noise.step_keys(key, t, n) for t in tasks]

  @jax.jit
  def scalars(params):
    """Returns g and h of the directions of all tasks, both [tasks * n]."""
    g, h = [], []
    for value_fn, of_task in zip(value_fns, keys):
      z = Displacement(of_task, jnp.ones(n))
      losses = estimate(value_fn, params, z, eps, directions,
                        signs=(1.0, -1.0, 0.0))
      plus, minus, clean = losses.T
      g.append((plus - minus) / (2 * eps))
      h.append((plus - 2 * clean + minus) / eps**2)
    return jnp.concatenate(g), jnp.concatenate(h)

  @jax.jit
  def masks(params, g, h):
    """Returns the masks of all leaves."""
    ones = jnp.ones(len(g))

    def of_rows(w, draws):
      """Returns which elements of some rows have the k highest scores."""
      def add(j, sums):
        """Adds the terms of direction j to the sums of g z and h (z^2 - 1)."""
        grad, curve = sums
        z = jnp.broadcast_to(draws.term(j, w), w.shape)
        return grad + g[j] * z, curve + h[j] * (z**2 - 1)
      zero = jnp.zeros(w.shape)
      total = 0.0
      for t in tasks:
        first = t * n
        grad, curve = lax.fori_loop(first, first + n, add, (zero, zero))
        grad = grad / n
        curve = jnp.abs(curve) / (2 * n)
        least = jnp.maximum(jnp.mean(curve, -1, keepdims=True), 1e-30)
        cost = grad**2 / (2 * jnp.maximum(curve, least))
        gain = alpha * grad**2
        score = cost + gain + beta * jnp.abs(w.astype(jnp.float32))
        total += score / jnp.maximum(jnp.sum(score, -1, keepdims=True), 1e-30)
      # The rank of each score, so that exactly k are selected even with ties.
      rank = jnp.argsort(jnp.argsort(-total, -1), -1)
      return rank < max(round(share * w.shape[-1]), 1)

    def of_block(w, draws):
      """Returns the mask of a leaf, or of a part of it.

      A leaf is scored layer by layer, and a large layer some rows at a time,
      since scoring needs several float32 arrays that are as large as the scored
      part.
      """
      length = parts = len(w)
      if w.ndim > 1 and not draws.is_stack():
        parts = next(k for k in range(1, length + 1) if k == length or (
            length % k == 0 and w.size // k <= _PART))
      if w.ndim < 2 or parts == 1:
        return of_rows(w, draws)
      shape = w.shape
      if parts < length:
        split = parts, length // parts, *shape[1:]
        draws = draws.viewed(views.Reshape(split), shape)
        w = w.reshape(split)
      along, of_part = draws.rows(parts)
      found = lax.map(lambda part: of_block(part[0], of_part(part[1])),
                      (w, along))
      return found.reshape(shape)

    def of_leaf(w, draws):
      if w.ndim < 2:  # not a matrix, so the result is not used
        return jnp.ones(w.shape, bool)
      # Small leaves arrive as a stack whose coefficients have more axes.
      return of_block(w, dataclasses.replace(draws, coefs=ones))

    z = Displacement(jnp.concatenate(keys), ones)
    return mapped(of_leaf, params, z, directions, dtype=bool)

  found = masks(params, *scalars(params))
  # Leaves that are not matrices have a bool.
  return jax.tree.map(
      lambda mask, none: mask if jnp.ndim(none) else none, found, unscored)


def mazo(eps: Any = 1e-3, *, mask: Any, **options: Unpack[SpsaOptions]
         ) -> Estimator:
  r"""Runs SPSA on the weights that a mask M selects (MaZO).

  .. math:: \ell_\pm = \mathcal{L}(\theta \pm \epsilon\, z \odot M;
            \mathcal{B}), \qquad g = \frac{\ell_+ - \ell_-}{2 \epsilon}, \qquad
            u = g\, (z \odot M)

  All other weights are neither perturbed nor moved. The arrays of the mask take
  one byte per element. They are stored in the state, so that checkpoints
  include them and compiled programs do not hold them as constants.

  Args:
    eps: Perturbation scale :math:`\epsilon`, in the forms of `mezo_jax.spsa`.
      Defaults to 1e-3.
    mask: The mask M, a tree of bools and bool arrays such as `saliency`
      returns.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``
      (without a mask), ``combine``, ``num_samples``, ``over``,
      ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`.

  Raises:
    ValueError: If ``mask`` is not a tree of bools, if ``directions`` also have
      a mask, or for an option that `mezo_jax.spsa` does not accept.

  References:
    Zhang et al., 2025, `MaZO: Masked Zeroth-Order Optimization for Multi-Task
    Fine-Tuning of Large Language Models <https://arxiv.org/abs/2502.11513>`_,
    Section 4.

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> from mezo_jax import variants
    >>> params = {'w': jnp.ones((2, 8))}
    >>> mask = variants.saliency(
    ...     [lambda p: jnp.sum(p['w'] ** 2)], params, key=0)
    >>> tx = mezo_jax.mezo(
    ...     1e-6, estimator=variants.mazo(1e-3, mask=mask, key=0))
  """
  spsa = Spsa(eps, **options)
  if spsa.directions.mask is not None:
    raise ValueError('directions.mask cannot be combined with mask=; pass your '
                     'mask to saliency(directions=...) instead.')
  if mask is None or isinstance(mask, str) or callable(mask):
    raise ValueError('mask must be a tree of bools, such as saliency returns, '
                     f'got {mask!r}.')

  def masked(state):
    """Returns SPSA with the mask; its arrays are those of the state."""
    arrays = iter(state.memory)
    return spsa.along(mask=jax.tree.map(
        lambda m: next(arrays) if jnp.ndim(m) else m, mask))

  def memory(params):
    leaves = zip(jax.tree.leaves(mask), paths.named_leaves(params))
    return [_beside(m, x) for m, (_, x) in leaves if jnp.ndim(m)]

  def measure(state, params, value_fn, batch):
    return masked(state).measure(state, params, value_fn, batch)

  def apply(state, params, numbers):
    return masked(state).apply(state, params, numbers), state.memory

  return Estimator(spsa.along(mask=mask), measure=measure, apply=apply,
                   memory=memory)


def no_scores(params: Any, directions: Directions | str = Normal()) -> Any:
  r"""Returns a placeholder for the mask of `saliency`, without any scores.

  .. math:: M = 0 \text{ for the elements of matrices}

  Use it to create a state before a checkpoint is restored into it or scores are
  computed.

  Args:
    params: The params.
    directions: A `mezo_jax.Normal`, as for `saliency`. Defaults to
      ``Normal()``.

  Returns:
    A tree of bools and bool arrays with the shapes of those of `saliency`. It
    selects no element of a matrix.

  Raises:
    ValueError: If ``params`` is None or a mask of ``directions`` does not fit.

  References:
    Zhang et al., 2025, `MaZO <https://arxiv.org/abs/2502.11513>`_, Section 4.

  Example:
    >>> import jax.numpy as jnp
    >>> from mezo_jax import variants
    >>> mask = variants.no_scores({'w': jnp.ones((2, 8))})
    >>> mask['w'].shape, bool(mask['w'].any())
    ((2, 8), False)
  """
  arguments.tree('params', params)
  directions = as_directions(directions)

  def of_leaf(x, used, is_stack):
    if used is False or x.ndim - is_stack < 2:
      return used is not False
    return np.broadcast_to(False, x.shape)

  stacks = paths.stacked(params, directions.stacked)
  stacks = jax.tree.unflatten(paths.structure(params), stacks)
  return jax.tree.map(of_leaf, params, directions.selected(params), stacks)


def _beside(mask, x) -> jax.Array:
  """Returns a copy of a mask's array, with the sharding of its weights."""
  place = None
  if not isinstance(x, Tracer):
    place = getattr(x, 'sharding', None)
  if not isinstance(place, jax.sharding.NamedSharding):
    place = None
  return jax.device_put(jnp.copy(mask), place)
