"""Backpropagation in MeZO's place: the baseline, with the same ``update``."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mezo_jax import _values
from mezo_jax._values import accepted


class BackpropState(NamedTuple):
  count: jax.Array  # int32 [], updates made
  value: jax.Array  # float32 [], the loss
  grad_norm: jax.Array  # float32 []
  notfinite_count: jax.Array  # int32 [], in a row, up to now
  total_notfinite: jax.Array  # int32 []
  inner: Any  # the optimizer's


def backprop(
    inner: optax.GradientTransformation, *, micro_batches: int = 1,
    equal_parts: bool = False,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer of first order that is called as `mezo_jax.mezo` is.

  ``update(None, state, params, value_fn=..., **kwargs)`` differentiates
  ``value_fn(params, ...)`` and hands the gradient to ``inner``. To train some
  of the parameters, `mezo_jax.peft.split` them. A loss or gradient that is
  not finite changes nothing and is counted, as in `mezo_jax.spsa`.

  Args:
    inner: such as ``optax.adam(1e-5)``.
    micro_batches: gradient accumulation: the gradient is that of the whole
      batch, made of this many equal parts, one at a time; ``frozen`` is not
      split.
    equal_parts: average the scalars of the parts as they are; as for
      `mezo_jax.spsa`.
  """
  def init_fn(params):
    # Arrays of their own: one that stood twice could not be donated.
    return BackpropState(
        count=jnp.zeros([], jnp.int32), value=jnp.zeros([], jnp.float32),
        grad_norm=jnp.zeros([], jnp.float32),
        notfinite_count=jnp.zeros([], jnp.int32),
        total_notfinite=jnp.zeros([], jnp.int32),
        inner=inner.init(params))

  def gradient(loss, params, batch):
    """(loss, gradient), float32 sums over the parts divided by the weights'."""
    if micro_batches == 1:
      return jax.value_and_grad(lambda params: _values.mean(
          loss(params, **batch)).astype(jnp.float32))(params)
    whole = {k: batch[k] for k in ('frozen',) if k in batch}
    def of_part(params, part):
      out = loss(params, **part, **whole)
      _values.check_parts(out, micro_batches, equal_parts)
      return _values.sums(out)
    def add(total, part):
      (value, weight), grads = jax.value_and_grad(
          of_part, has_aux=True)(params, part)
      return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total,
                          (value, weight, grads)), None
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32),
                        (jnp.zeros([]), jnp.zeros([]), params))
    (value, weight, grads), _ = jax.lax.scan(
        add, zero, _values.split_batch(batch, micro_batches))
    value, grads = jax.tree.map(lambda x: x / weight, (value, grads))
    return value, jax.tree.map(lambda g, x: g.astype(x.dtype), grads, params)

  def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
    if updates is not None or params is None or value_fn is None:
      raise ValueError('backprop makes its own updates: call tx.update(None, '
                       'state, params, value_fn=loss_fn, batch=batch).')
    def loss(params, **batch):
      return value_fn(params, **batch)
    value, grads = gradient(loss, params, accepted(value_fn, extra_args))
    norm = optax.global_norm(grads).astype(jnp.float32)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, new = inner.update(grads, state.inner, params)
    keep = lambda x, old: jnp.where(finite, x, old)
    return jax.tree.map(lambda u: keep(u, jnp.zeros_like(u)), updates), (
        BackpropState(
            optax.safe_increment(state.count), value, norm,
            jnp.where(finite, 0, state.notfinite_count + 1),
            state.total_notfinite + (1 - finite.astype(jnp.int32)),
            jax.tree.map(keep, new, state.inner)))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
