"""Leaves everything as it is in a step whose loss is not finite."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from mezo_jax.core import sharding, xla
from mezo_jax.transforms.types import ZerothOrderTransformation


def skip_not_finite(
    inner: optax.GradientTransformation) -> ZerothOrderTransformation:
  """Makes a step that an estimator within ``inner`` skips change nothing.

  Where a loss or projected gradient is not finite, `mezo_jax.spsa` returns zero
  updates and counts the step. The links after it would go on all the same: Adam
  by its momentum, weight decay by itself. Within this wrapper the updates are
  zero in such a step and every state stays as it was, the counts of schedules
  too, except the estimator's own:
  ``skip_not_finite(chain(spsa(...), adam(1e-4)))``. `mezo_jax.mezo` and the
  variants have it.

  Args:
    inner: A transformation with an estimator in it, that is one whose state has
      the field ``notfinite_count``.

  Raises:
    ValueError: if there is none; and in ``update`` if the estimator is not the
      first link of its chain.
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
