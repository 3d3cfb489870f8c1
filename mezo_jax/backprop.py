"""Backpropagation in MeZO's place: the baseline, with the same ``update``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mezo_jax import perturb
from mezo_jax.spsa import accepted, split_batch


class BackpropState(NamedTuple):
  count: jax.Array  # int32 [], updates made
  value: jax.Array  # float32 [], the loss
  grad_norm: jax.Array  # float32 []
  notfinite_count: jax.Array  # int32 [], in a row, up to now
  total_notfinite: jax.Array  # int32 []
  inner: Any  # the optimizer's


def backprop(inner: optax.GradientTransformation, *,
             mask: str | Callable | None = None,
             micro_batches: int = 1) -> optax.GradientTransformationExtraArgs:
  """An optimizer of first order that is called as `mezo_jax.mezo` is.

  ``update(None, state, params, value_fn=..., **kwargs)`` differentiates
  ``value_fn(params, ...)`` and hands the gradient to ``inner``, which sees the
  leaves that the mask selects and no others. A loss or gradient that is not
  finite changes nothing and is counted, as in `mezo_jax.spsa`.

  Args:
    inner: such as ``optax.adam(1e-5)``.
    mask: which leaves are trained; see `mezo_jax.perturb.selected`.
    micro_batches: gradient accumulation: the gradient is the mean over this
      many equal parts of the batch, one at a time.
  """
  def trained(params):
    """The selected leaves, in order, and a function that puts them back."""
    chosen = perturb.selected(params, mask)
    leaves, treedef = jax.tree.flatten(params)
    picked = jax.tree.leaves(chosen)
    def put(some, others):
      some = iter(some)
      return treedef.unflatten(
          [next(some) if p else x for p, x in zip(picked, others)])
    return [x for p, x in zip(picked, leaves) if p], leaves, put

  def init_fn(params):
    # Arrays of their own: one that stood twice could not be donated.
    return BackpropState(
        count=jnp.zeros([], jnp.int32), value=jnp.zeros([], jnp.float32),
        grad_norm=jnp.zeros([], jnp.float32),
        notfinite_count=jnp.zeros([], jnp.int32),
        total_notfinite=jnp.zeros([], jnp.int32),
        inner=inner.init(trained(params)[0]))

  def gradient(loss, some, batch):
    """(loss, gradient), float32 sums over the parts divided by their number."""
    if micro_batches == 1:
      return jax.value_and_grad(loss)(some, batch)
    def add(total, part):
      found = jax.value_and_grad(loss)(some, part)
      return jax.tree.map(lambda t, x: t + x.astype(jnp.float32), total,
                          found), None
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32),
                        (jnp.zeros([]), some))
    total, _ = jax.lax.scan(add, zero, split_batch(batch, micro_batches))
    value, grads = jax.tree.map(lambda x: x / micro_batches, total)
    return value, [g.astype(x.dtype) for g, x in zip(grads, some)]

  def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
    if updates is not None or params is None or value_fn is None:
      raise ValueError('backprop makes its own updates: call tx.update(None, '
                       'state, params, value_fn=loss_fn, batch=batch).')
    batch = accepted(value_fn, extra_args)
    some, leaves, put = trained(params)
    def loss(some, batch):
      return jnp.asarray(value_fn(put(some, leaves), **batch), jnp.float32)
    value, grads = gradient(loss, some, batch)
    norm = optax.global_norm(grads).astype(jnp.float32)
    finite = jnp.isfinite(value) & jnp.isfinite(norm)
    updates, new = inner.update(grads, state.inner, some)
    keep = lambda x, old: jnp.where(finite, x, old)
    updates = [keep(u, jnp.zeros_like(u)) for u in updates]
    return put(updates, [jnp.zeros_like(x) for x in leaves]), BackpropState(
        optax.safe_increment(state.count), value, norm,
        jnp.where(finite, 0, state.notfinite_count + 1),
        state.total_notfinite + (1 - finite.astype(jnp.int32)),
        jax.tree.map(keep, new, state.inner))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)
