"""Makes a step whose loss is not finite change nothing."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from mezo_jax.core import sharding, xla
from mezo_jax.transforms.types import ZerothOrderTransformation


def skip_not_finite(
    inner: optax.GradientTransformation) -> ZerothOrderTransformation:
  """Makes a step that an estimator within ``inner`` skips change nothing.

  If a loss or projected gradient is not finite, `mezo_jax.spsa` returns zero
  updates and counts the step. The links after it would move the weights all the
  same: Adam by its momentum, and weight decay. Within this wrapper, the updates
  of such a step are zero and every state except the estimator's stays as it
  was, including the counts of schedules:
  ``skip_not_finite(chain(spsa(...), adam(1e-4)))``. `mezo_jax.mezo` has it.

  Args:
    inner: A transformation with an estimator in it.

  Raises:
    ValueError: If it has none; in ``update``, if the estimator is not the first
      link of its chain.
  """
  if not (hasattr(inner, 'init') and hasattr(inner, 'update')):
    raise ValueError('inner must be an optax.GradientTransformation, got '
                     f'{inner!r}.')
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    state = inner.init(params)
    if not _estimators(state):
      raise ValueError(
          'skip_not_finite needs an estimator inside, which says what is not '
          'finite: skip_not_finite(optax.chain(mezo_jax.spsa(...), ...)).')
    return sharding.beside(state, params)

  def update_fn(updates, state, params=None, **extra_args):
    updates, new = inner.update(updates, state, params, **extra_args)
    count = cast(jax.Array, sum(x.notfinite_count for x in _estimators(new)))
    skipped = count > 0
    def keep(old, x):
      return x if is_estimator(x) else jnp.where(skipped, old, x)
    def zero(u):
      return jnp.where(skipped, jnp.zeros_like(u), xla.rounded(u, count))
    return jax.tree.map(zero, updates), jax.tree.map(
        keep, state, new, is_leaf=is_estimator)

  return ZerothOrderTransformation(init_fn, update_fn)


def is_estimator(x: Any) -> bool:
  """Returns whether something is the state of an estimator."""
  # This wrapper of optax counts updates of its own, under the same name.
  return hasattr(x, 'notfinite_count') and not isinstance(
      x, optax.ApplyIfFiniteState)


def _estimators(state) -> list:
  return [x for x in jax.tree.leaves(state, is_leaf=is_estimator)
          if is_estimator(x)]
