r"""Sparse-MeZO: the smallest weights alone are perturbed and moved.

.. math:: z \leftarrow z \odot [\,|\theta| \le h\,]

with a threshold h for each leaf and layer, which is found once. The mask is
computed from the clean weights where z is added, in both evaluations and in the
update, and is stored nowhere. (Perturbed weights would give another mask.)
Source: Liu et al., 2024, arXiv:2402.15751.
"""

from typing import Any, Unpack

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import arguments, paths
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions.displacement import Multiplier
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions


def smallest(params: Any, share: float = 0.25, *, stacked: Any = None) -> Any:
  r"""Returns thresholds below which a share of each leaf, or layer, is.

  Args:
    params: The weights before training.
    share: Share of the elements, above 0 and at most 1. The paper trains the
      smallest 20 to 25 %.
    stacked: As `mezo_jax.Directions.stacked`.

  Returns:
    A tree of numbers in the leaves' dtypes, with arrays [L] for stacks of L
    layers. For shapes (`jax.ShapeDtypeStruct`) they are zeros.

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
  for x in jax.tree.leaves(limits):
    arguments.array('limits', x)
  return Estimator(Spsa(eps, **options).along(
      multiplier=Multiplier(limits, is_below)))


def is_below(w: jax.Array, limits: jax.Array) -> jax.Array:
  """Returns where weights are not above their thresholds, in their dtype."""
  return jnp.abs(w) <= limits.astype(w.dtype)
