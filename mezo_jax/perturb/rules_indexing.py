"""Defines the rules of primitives that select or move elements.

Applied to a block, these primitives return a block again. Nothing is built: the
view is applied to the clean weights and to the counters of their draws.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import views
from mezo_jax.core.quantized import is_codes
from mezo_jax.perturb.interpreter import bind, Block, Lazy, RULES


def _view(view_of: Callable) -> Callable:
  """Returns the rule of a primitive that only selects or moves elements.

  Args:
    view_of: A function ``(eqn, shape, *others) -> View | None``. It is called
      with the equation, the shape of the block and the other operands, and
      returns the view that the equation computes. None means that the operation
      is not a view, so that it consumes the block.
  """
  def rule(eqn, ins, context):
    x, *others = ins
    if not isinstance(x, Block) or any(isinstance(y, Lazy) for y in others):
      return None
    view = view_of(eqn, x.shape, *others)
    if view is None or (block := x.viewed(view, w=_bound(eqn, ins))) is None:
      return None
    return [block]
  return rule


def _bound(eqn, ins) -> jax.Array | None:
  """Applies an equation to the clean weights of a block.

  The equation itself is evaluated, since its parameters may contain a sharding
  of the result. Returns None for quantised weights.
  """
  x, *others = ins
  return None if is_codes(x.w) else bind(eqn, [x.w, *others])[0]


def _same(eqn, ins, context):
  """Evaluates an operation that changes neither elements nor their order."""
  (x,) = ins
  return [x.viewed(w=_bound(eqn, ins))] if isinstance(x, Block) else None


def _reshaped(eqn, shape, *others):
  """Returns the view of a reshape, squeeze or broadcast_in_dim, or None."""
  del others
  new = eqn.outvars[0].aval.shape
  if math.prod(new) != math.prod(shape):
    # The operation is a broadcast that repeats elements. Their draws would have
    # to repeat, too, which a view cannot represent.
    return None
  return views.Reshape(new)


def _sliced(eqn, shape):
  """Returns the view of a slice."""
  p = eqn.params
  return views.Window(p['start_indices'], eqn.outvars[0].aval.shape,
                      p['strides'] or (1,) * len(shape))


def _dynamically_sliced(eqn, shape, *starts):
  """Returns the view of a dynamic_slice.

  XLA clamps the start so that the slice is inside of the array. So does this
  function.
  """
  size = eqn.outvars[0].aval.shape
  starts = [jnp.clip(i, 0, n - m) for i, n, m in zip(starts, shape, size)]
  return views.Window(starts, size, (1,) * len(shape))


def _gather(eqn, ins, context):
  """Evaluates a lookup of entries along one axis, such as embedding rows."""
  x, *others = ins
  found = gathered_axis(eqn)
  if found is None or not isinstance(x, Block) or any(
      isinstance(y, Lazy) for y in others):
    return None
  axis, at = found
  index, n = others[0][..., 0], x.shape[axis]
  # For an index out of bounds, JAX returns a fill value. The view clips such an
  # index to one within bounds, and `Keep` removes the z of the result. The
  # clean weights, including the fill values, come from the gather itself
  # (`_bound`).
  chain: list[views.View] = [views.Take(axis, jnp.clip(index, 0, n - 1))]
  order = [*range(len(x.shape) - 1 + index.ndim)]
  if eqn.params['mode'] == lax.GatherScatterMode.FILL_OR_DROP:
    inside = (index >= 0) & (index < n)
    chain.append(views.Keep(inside.reshape(
        (1,) * axis + index.shape + (1,) * (len(x.shape) - axis - 1))))
  # `Take` puts the axes of the index in the place of the looked-up axis. Move
  # them to where this gather has them.
  moved = order[axis:axis + index.ndim]
  rest = [a for a in order if a not in moved]
  chain.append(views.Transpose(rest[:at] + moved + rest[at:]))
  block = x.viewed(*chain, w=_bound(eqn, ins))
  return None if block is None else [block]


def gathered_axis(eqn: Any) -> tuple[int, int] | None:
  """Returns the axis along which a gather looks up entries.

  Returns:
    ``(axis, at)``, or None if the gather does anything else. ``axis`` is the
    axis of the operand, and ``at`` is the first axis in the result that belongs
    to the index.
  """
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
  """Records a cast to a floating-point dtype.

  `Block.build` applies the cast after z has been added, as the program would.
  """
  del context
  x, dtype = ins[0], eqn.params['new_dtype']
  if not isinstance(x, Block) or not jnp.issubdtype(dtype, jnp.floating):
    return None
  return [dataclasses.replace(x, casts=(*x.casts, dtype))]


def _put(eqn, ins, context):
  """Evaluates a device_put, which changes placement but not indexing."""
  del context
  if any(isinstance(x, Lazy) and (not isinstance(x, Block) or is_codes(x.w))
         for x in ins):
    return None
  outs = bind(eqn, [x.w if isinstance(x, Block) else x for x in ins])
  return [x.view(out, x.draws) if isinstance(x, Block) else out
          for x, out in zip(ins, outs)]


def _resharded(eqn, ins, context):
  """Reshards weights together with the arrays of their draws."""
  del context
  (x,), to = ins, eqn.params['dst_sharding']
  if not isinstance(x, Block) or is_codes(x.w):
    return None

  def follow(a):
    """Reshards an array that broadcasts with the block."""
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
  """Applies a barrier to the values that are not lazy.

  Lazy values are returned unchanged, since they have not been computed yet.
  """
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
    'broadcast_in_dim': _view(_reshaped),
    'transpose': _view(
        lambda eqn, shape: views.Transpose(eqn.params['permutation'])),
    'slice': _view(_sliced),
    'dynamic_slice': _view(_dynamically_sliced),
    'gather': _gather,
    'reshard': _resharded,
    'copy': _same,
    'sharding_constraint': _same,
    'pvary': _same,
})
