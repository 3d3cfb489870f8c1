"""Backpropagation with the same ``update`` as SPSA, as a baseline."""

from typing import cast, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mezo_jax.core import sharding
from mezo_jax.transforms import chain, losses
from mezo_jax.transforms.types import ZerothOrderTransformation


class BackpropState(NamedTuple):
  """State of `backprop`."""

  count: jax.Array  # shape=(), dtype=int32: steps made, skipped ones included
  value: jax.Array  # shape=(), dtype=float32: loss of the last step
  grad_norm: jax.Array  # shape=(), dtype=float32
  notfinite_count: jax.Array  # shape=(), dtype=int32: skipped in a row
  total_notfinite: jax.Array  # shape=(), dtype=int32: skipped in all


def backprop(*, micro_batches: int = 1) -> ZerothOrderTransformation:
  """Computes the gradient by backpropagation, first in a chain like `spsa`.

  ``update(None, state, params, value_fn=..., **kwargs)`` differentiates
  ``value_fn(params, ...)``; to train some of the parameters,
  `mezo_jax.peft.split` them. A loss or gradient that is not finite gives zeros
  and is counted: ``skip_not_finite(chain(backprop(), adam(1e-5)))``.

  Args:
    micro_batches: Number of equal parts of the batch over which the gradient is
      accumulated. Defaults to 1.
  """
  def init_fn(params):
    # One array each: an array that is in the state twice cannot be donated.
    return sharding.beside(BackpropState(
        count=jnp.zeros([], jnp.int32), value=jnp.zeros([], jnp.float32),
        grad_norm=jnp.zeros([], jnp.float32),
        notfinite_count=jnp.zeros([], jnp.int32),
        total_notfinite=jnp.zeros([], jnp.int32)), params)

  def gradient(value_fn, params, batch):
    """Returns the loss and its gradient. Over several parts, both are summed in
    float32 and divided by the sum of the weights."""
    if micro_batches == 1:
      return jax.value_and_grad(lambda params: losses.mean(
          value_fn(params, **batch)).astype(jnp.float32))(params)
    rows, with_rows = losses.split_batch(batch, micro_batches)
    count = losses.rows_of_parts(rows)
    def of_part(params, part):
      out = value_fn(params, **with_rows(part))
      losses.check_parts(out, micro_batches, rows=count)
      return losses.sums(out)
    def add(total, part):
      (value, weight), grads = jax.value_and_grad(
          of_part, has_aux=True)(params, part)
      return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total,
                          (value, weight, grads)), None
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32),
                        (jnp.zeros([]), jnp.zeros([]), params))
    (value, weight, grads), _ = jax.lax.scan(add, zero, rows)
    value, grads = jax.tree.map(lambda x: x / weight, (value, grads))
    return value, jax.tree.map(lambda g, x: g.astype(x.dtype), grads, params)

  def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
    if updates is not None or params is None or value_fn is None:
      raise ValueError('backprop makes its own updates: call tx.update(None, '
                       'state, params, value_fn=loss_fn, batch=batch).')
    chain.check_first('backprop')
    value, grads = gradient(
        value_fn, params, losses.accepted(value_fn, extra_args))
    norm = optax.tree.norm(grads).astype(jnp.float32)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    grads = jax.tree.map(
        lambda g: jnp.where(finite, g, jnp.zeros_like(g)), grads)
    return grads, BackpropState(
        cast(jax.Array, optax.safe_increment(state.count)), value, norm,
        jnp.where(finite, 0, state.notfinite_count + 1),
        state.total_notfinite + (1 - finite.astype(jnp.int32)))

  return ZerothOrderTransformation(init_fn, update_fn)
