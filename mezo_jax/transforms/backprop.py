"""Provides backpropagation with the same ``update`` as SPSA, as a baseline."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mezo_jax.core import sharding
from mezo_jax.transforms import chain, estimator, losses
from mezo_jax.transforms.types import ZerothOrderTransformation


class BackpropState(NamedTuple):
  """Holds the state of `backprop`.

  Attributes:
    count: Number of steps so far, including skipped steps. int32 [].
    value: Loss of the last step, float32 [].
    grad_norm: Norm of the last gradient, float32 [].
    notfinite_count: Number of consecutive skipped steps up to now, int32 [].
    total_notfinite: Number of skipped steps so far, int32 [].
  """

  count: jax.Array
  value: jax.Array
  grad_norm: jax.Array
  notfinite_count: jax.Array
  total_notfinite: jax.Array


def backprop(*, micro_batches: int = 1) -> ZerothOrderTransformation:
  """Computes gradients by backpropagation. Use it first in an optax chain.

  ``update(None, state, params, value_fn=loss, **batch)`` differentiates
  ``loss(params, **batch)`` with respect to all params. To train only some of
  them, separate them with `mezo_jax.peft.split`. If the loss or the gradient is
  not finite, the step is skipped: its updates are zero, and the state counts
  it. Wrap the chain so that the other links skip the step, too:
  ``skip_not_finite(chain(backprop(), adam(1e-5)))``.

  Args:
    micro_batches: Number of equal parts of the batch over which the gradient is
      accumulated. Defaults to 1.

  Returns:
    An `optax.GradientTransformationExtraArgs` with the state `BackpropState`.
  """
  def init_fn(params):
    # Each field has an array of its own, since an array that occurs twice in
    # the state cannot be donated.
    return sharding.beside(BackpropState(
        count=jnp.zeros([], jnp.int32), value=jnp.zeros([], jnp.float32),
        grad_norm=jnp.zeros([], jnp.float32),
        notfinite_count=jnp.zeros([], jnp.int32),
        total_notfinite=jnp.zeros([], jnp.int32)), params)

  def gradient(value_fn, params, batch):
    """Returns the loss of the batch and its gradient.

    Over several parts, both are summed in float32 and divided by the sum of the
    weights of all examples.
    """
    if micro_batches == 1:
      def loss(params):
        return losses.mean(value_fn(params, **batch)).astype(jnp.float32)
      return jax.value_and_grad(loss)(params)
    rows, sums_of = losses.in_parts(
        lambda part, params: value_fn(params, **part), batch, micro_batches)
    gradient_of = jax.value_and_grad(
        lambda params, rows: sums_of(rows, params), has_aux=True)
    def add(total, rows):
      """Adds the sum of weighted losses of a part, its weight and gradient."""
      (value, weight), grads = gradient_of(params, rows)
      return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total,
                          (value, weight, grads)), None
    zero = optax.tree.zeros_like(params, jnp.float32)
    (value, weight, grads), _ = jax.lax.scan(
        add, (jnp.zeros([]), jnp.zeros([]), zero), rows)
    value, grads = jax.tree.map(lambda x: x / weight, (value, grads))
    return value, optax.tree.cast_like(grads, params)

  def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
    if updates is not None or params is None or value_fn is None:
      raise ValueError('backprop computes its own updates: call '
                       'tx.update(None, state, params, value_fn=loss_fn, '
                       'batch=batch).')
    chain.check_first('backprop')
    value, grads = gradient(
        value_fn, params, losses.accepted(value_fn, extra_args))
    norm = optax.tree.norm(grads).astype(jnp.float32)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    zero = optax.tree.zeros_like(grads)
    state = state._replace(
        value=value, grad_norm=norm, **estimator.counts(state, finite))
    return optax.tree.where(finite, grads, zero), state

  return ZerothOrderTransformation(init_fn, update_fn)
