"""The rules of operations that only say where a leaf's elements lie: their
results are blocks again."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core.quantized import is_codes
from mezo_jax.perturb.interpreter import bind, Block, Lazy, RULES


def _view(move: Callable) -> Callable:
  """The rule of an operation that only says where elements lie: ``move(draws,
  shape, eqn, others)`` is the view of the draws, or None."""
  def rule(eqn, ins, context):
    x, *others = ins
    if not isinstance(x, Block) or any(isinstance(y, Lazy) for y in others):
      return None
    draws = move(x.draws, x.w.shape, eqn, others)
    if draws is None:
      return None
    if is_codes(x.w):
      w = x.w.viewed(lambda part: move(part, x.w.shape, eqn, others))
    else:
      (w,) = bind(eqn, [x.w, *others])
    return None if w is None else [x.view(w, draws)]
  return rule


def _reshaped(draws, shape, eqn, others):
  del others
  return draws.reshape(shape, eqn.outvars[0].aval.shape)


def _broadcast(draws, shape, eqn, others):
  new = eqn.outvars[0].aval.shape
  if math.prod(new) != math.prod(shape):
    return None  # its draws would be made again for each copy
  return _reshaped(draws, shape, eqn, others)


def _sliced(draws, shape, eqn, others):
  size = eqn.outvars[0].aval.shape
  if others:  # dynamic_slice
    start = [jnp.clip(i, 0, n - m) for i, n, m in zip(others, shape, size)]
    steps = (1,) * len(shape)
  else:
    start = eqn.params['start_indices']
    steps = eqn.params['strides'] or (1,) * len(shape)
  return draws.window(start, size, steps)


def _gathered(draws, shape, eqn, others):
  """Entries of one axis by index, whole along the others: noise for these."""
  found = gathered_axis(eqn)
  if found is None:
    return None
  axis, at = found
  index, mode = others[0][..., 0], eqn.params['mode']
  draws = draws.take(axis, jnp.clip(index, 0, shape[axis] - 1))
  if mode == jax.lax.GatherScatterMode.FILL_OR_DROP:  # no noise on the fill
    inside = (index >= 0) & (index < shape[axis])
    draws = draws.where(inside.reshape(
        (1,) * axis + index.shape + (1,) * (len(shape) - axis - 1)))
  order = [a for a in range(len(shape) - 1 + index.ndim)]
  moved = order[axis:axis + index.ndim]
  rest = [a for a in order if a not in moved]
  return draws.transpose(rest[:at] + moved + rest[at:])


def gathered_axis(eqn: Any) -> tuple[int, int] | None:
  """(axis, where its index's axes stand) of a gather of whole entries."""
  p, shape = eqn.params, eqn.invars[0].aval.shape
  d, out = p['dimension_numbers'], eqn.outvars[0].aval.ndim
  if len(d.start_index_map) != 1 or d.operand_batching_dims or (
      d.collapsed_slice_dims != d.start_index_map):
    return None
  (axis,) = d.start_index_map
  if p['slice_sizes'] != tuple(
      1 if a == axis else n for a, n in enumerate(shape)):
    return None
  index = [a for a in range(out) if a not in d.offset_dims]
  at = index[0] if index else axis
  return (axis, at) if index == [*range(at, at + len(index))] else None


def _cast(eqn, ins, context):
  del context
  x, dtype = ins[0], eqn.params['new_dtype']
  if not isinstance(x, Block) or not jnp.issubdtype(dtype, jnp.floating):
    return None
  return [dataclasses.replace(x, casts=(*x.casts, dtype))]


def _put(eqn, ins, context):
  """Where arrays are is not where their elements lie."""
  del context
  if any(isinstance(x, Lazy) and (not isinstance(x, Block) or is_codes(x.w))
         for x in ins):
    return None
  outs = bind(eqn, [x.w if isinstance(x, Block) else x for x in ins])
  return [x.view(out, x.draws) if isinstance(x, Block) else out
          for x, out in zip(ins, outs)]


def _resharded(eqn, ins, context):
  """The arrays of draws follow the weights to other mesh axes or types."""
  del context
  (x,), to = ins, eqn.params['dst_sharding']
  if not isinstance(x, Block) or is_codes(x.w):
    return None

  def follow(a):  # an array with the axes of the block, or with length 1
    names = [name if n == m > 1 else None
             for name, n, m in zip(to.spec, x.w.shape, a.shape)]
    names += (None,) * (a.ndim - len(names))
    return jax.sharding.reshard(a, to.update(spec=jax.P(*names)))
  (w,) = bind(eqn, [x.w])
  draws = dataclasses.replace(
      x.draws, streams=jax.tree.map(follow, x.draws.streams),
      coefs=jax.sharding.reshard(x.draws.coefs, to.update(spec=jax.P())))
  return [x.view(w, draws)]


def _barrier(eqn, ins, context):
  """A barrier keeps values from being moved; lazy ones are nowhere yet."""
  del eqn, context
  at = [i for i, x in enumerate(ins) if not isinstance(x, Lazy)]
  outs = [*ins]
  if at:
    for i, x in zip(at, lax.optimization_barrier([ins[i] for i in at])):
      outs[i] = x
  return outs


RULES.update({
    'convert_element_type': _cast,
    'device_put': _put,
    'optimization_barrier': _barrier,
    'reshape': _view(_reshaped),
    'squeeze': _view(_reshaped),
    'broadcast_in_dim': _view(_broadcast),
    'transpose': _view(lambda draws, shape, eqn, others: draws.transpose(
        eqn.params['permutation'])),
    'slice': _view(_sliced),
    'dynamic_slice': _view(_sliced),
    'gather': _view(_gathered),
    'reshard': _resharded,
} | dict.fromkeys(
    ('copy', 'sharding_constraint', 'pvary'),
    _view(lambda draws, shape, eqn, others: draws)))
