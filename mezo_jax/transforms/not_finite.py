"""Provides a wrapper that skips steps whose loss is not finite."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from mezo_jax.core import sharding, xla
from mezo_jax.transforms.types import ZerothOrderTransformation


def skip_not_finite(
    inner: optax.GradientTransformation) -> ZerothOrderTransformation:
  r"""Makes a whole chain skip a step that its estimator skips.

  .. math:: u_t = \begin{cases} \text{inner}(g_t) & \text{if } g_t
            \text{ is finite} \\ 0 & \text{otherwise} \end{cases}

  If a loss or a projected gradient is not finite, `mezo_jax.spsa` returns zero
  updates and counts the step as skipped. Later links of the chain could still
  change the weights: Adam has momentum, and weight decay does not depend on the
  updates. With this wrapper, the updates of the whole chain are zero in such a
  step. All states except that of the estimator stay as they were, including the
  step counts of schedules. `mezo_jax.mezo` contains this wrapper.

  Args:
    inner: A transform that contains an estimator, such as
      ``chain(spsa(...), adam(1e-4))``.

  Returns:
    An `optax.GradientTransformationExtraArgs` with the state of ``inner``.

  Raises:
    ValueError: If ``inner`` is not a transform. ``init`` raises it if ``inner``
      contains no estimator, and ``update`` raises it if the estimator is not
      the first link of its chain.

  References:
    `optax.apply_if_finite` does this for a chain that gets gradients.

  Example:
    >>> import jax.numpy as jnp, mezo_jax, optax
    >>> tx = mezo_jax.skip_not_finite(
    ...     optax.chain(mezo_jax.spsa(1e-3, key=0), optax.adam(1e-4)))
    >>> params = jnp.ones(3)
    >>> updates, state = tx.update(None, tx.init(params), params,
    ...                            value_fn=lambda params: jnp.nan)
    >>> bool(jnp.any(updates))
    False
  """
  check_transform('inner', inner)
  inner = optax.with_extra_args_support(inner)

  def init_fn(params):
    state = inner.init(params)
    if not estimators(state):
      raise ValueError(
          'inner of skip_not_finite must contain an estimator, as in '
          'skip_not_finite(optax.chain(mezo_jax.spsa(...), ...)).')
    return sharding.beside(state, params)

  def update_fn(updates, state, params=None, **extra_args):
    updates, new = inner.update(updates, state, params, **extra_args)
    count = cast(jax.Array, sum(x.notfinite_count for x in estimators(new)))
    skipped = count > 0
    def keep(old, x):
      return x if is_estimator(x) else jnp.where(skipped, old, x)
    def zero(u):
      return jnp.where(skipped, jnp.zeros_like(u), xla.rounded(u, count))
    return jax.tree.map(zero, updates), jax.tree.map(
        keep, state, new, is_leaf=is_estimator)

  return ZerothOrderTransformation(init_fn, update_fn)


def check_transform(name: str, tx: Any) -> None:
  """Raises ValueError if an argument is not an optax transform."""
  if not (hasattr(tx, 'init') and hasattr(tx, 'update')):
    raise ValueError(f'{name} must be an optax.GradientTransformation such as '
                     f'mezo_jax.mezo(...), got {tx!r}.')


def is_estimator(x: Any) -> bool:
  """Returns whether an object is the state of an estimator."""
  # The state of optax.apply_if_finite has a field of the same name.
  return hasattr(x, 'notfinite_count') and not isinstance(
      x, optax.ApplyIfFiniteState)


def estimators(state: Any) -> list[Any]:
  """Returns the states of all estimators within a state."""
  return [*filter(is_estimator, jax.tree.leaves(state, is_leaf=is_estimator))]
