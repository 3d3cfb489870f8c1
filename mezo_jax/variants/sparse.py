r"""Sparse-MeZO: the smallest weights alone are perturbed and moved.

.. math:: z \leftarrow z \odot [\,|\theta| \le h\,]

with a threshold h for each leaf and layer that is found once, and the mask that
of the weights as they are: looked up where z is added, in both evaluations and
in the update, and kept nowhere (Liu et al., 2024, arXiv:2402.15751; perturbed
weights would give another mask, the trap of making it in place).
"""

from typing import Any, Unpack

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import arguments, paths
from mezo_jax.core.quantized import is_codes
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions


def smallest(params: Any, share: float = 0.25, *, stacked: Any = None) -> Any:
  r"""Thresholds that so large a part of each leaf, or layer, is not above.

  Args:
    params: the weights, before training.
    share: of the elements, above 0; the paper trains the smallest 20 to 25 %.
    stacked: as `mezo_jax.Directions.stacked`.

  Returns:
    A tree for `mezo_jax.Directions.limits`: numbers, of stacks of L layers
    arrays [L], in the leaves' dtypes. Of shapes (`jax.ShapeDtypeStruct`) zeros.

  Raises:
    ValueError: for a share that is not above 0 and at most 1.
  """
  arguments.tree('params', params)
  arguments.number('share', share)
  if not 0 < share <= 1:
    raise ValueError(f'share must be above 0 and at most 1, got {share!r}.')

  def of_one(x):
    last = max(round(share * x.size) - 1, 0)
    return jnp.sort(jnp.abs(x).ravel())[last]
  of_stack = jax.jit(lambda x: lax.map(of_one, x))
  of_leaf = jax.jit(of_one)
  stacks = jax.tree.unflatten(
      paths.structure(params), paths.stacked(params, stacked))

  def limit(path, x, is_stack):
    del path
    if is_codes(x):
      x = x.astype(x.dtype)
    if isinstance(x, jax.ShapeDtypeStruct):
      return jnp.zeros(x.shape[:1] if is_stack else (), x.dtype)
    if not paths.is_floating(x):
      return jnp.zeros(())
    return (of_stack if is_stack else of_leaf)(jnp.asarray(x))
  return paths.map_named(limit, params, stacks)


def sparse_mezo(eps: Any = 1e-3, *, limits: Any,
                **options: Unpack[SpsaOptions]) -> Estimator:
  r"""SPSA of the weights that are not above their thresholds.

  A weight that a step took past its threshold is not moved again. With fewer
  elements the estimate varies less, so learning rates may be larger.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`.
    limits: Thresholds, from `smallest`.
    **options: Other options of `mezo_jax.spsa`.
  """
  arguments.tree('limits', limits)
  return Estimator(Spsa(eps, **options).along(limits=limits))
