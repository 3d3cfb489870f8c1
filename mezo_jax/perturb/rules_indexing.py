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
    if not isinstance(x, Block):
      return None
    view = view_of(eqn, x.shape, *others)
    if view is None:
      return None
    return _viewed(eqn, ins, view)
  return rule


def _viewed(eqn, ins, *chain: views.View) -> list | None:
  """Returns the block that an equation computes, given the same as views.

  The equation itself is applied to the clean weights, since its parameters may
  contain a sharding of the result. Quantised weights are viewed.
  """
  x, *others = ins
  w = None if is_codes(x.w) else bind(eqn, [x.w, *others])[0]
  block = x.viewed(*chain, w=w)
  return None if block is None else [block]


def _same(eqn, ins, context):
  """Evaluates an operation that changes neither elements nor their order."""
  del context
  return _viewed(eqn, ins) if isinstance(ins[0], Block) else None


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
  sizes = eqn.outvars[0].aval.shape
  inside = []
  for start, n, size in zip(starts, shape, sizes):
    inside.append(jnp.clip(start, 0, n - size))
  return views.Window(inside, sizes, (1,) * len(shape))


def _gather(eqn, ins, context):
  """Evaluates a lookup of entries along one axis, such as embedding rows."""
  x, *others = ins
  found = gathered_axis(eqn)
  if found is None or not isinstance(x, Block):
    return None
  if any(isinstance(y, Lazy) for y in others):
    return None
  axis, at = found
  index, n = others[0][..., 0], x.shape[axis]
  after = len(x.shape) - axis - 1
  # For an index out of bounds, JAX returns a fill value. The view clips such an
  # index to one within bounds, and `Keep` removes the z of the result. The
  # clean weights, including the fill values, come from the gather itself
  # (`_viewed`).
  chain: list[views.View] = [views.Take(axis, jnp.clip(index, 0, n - 1))]
  if eqn.params['mode'] == lax.GatherScatterMode.FILL_OR_DROP:
    inside = (index >= 0) & (index < n)
    chain.append(views.Keep(
        inside.reshape((1,) * axis + index.shape + (1,) * after)))
  # `Take` puts the axes of the index in the place of the looked-up axis. Move
  # them to where this gather has them.
  before, end = [*range(axis)], axis + index.ndim
  rest = [*before, *range(end, end + after)]
  rest[at:at] = range(axis, end)
  return _viewed(eqn, ins, *chain, views.Transpose(rest))


def gathered_axis(eqn: Any) -> tuple[int, int] | None:
  """Returns the axis along which a gather looks up entries.

  Returns:
    ``(axis, at)``, or None if the gather does anything else. ``axis`` is the
    axis of the operand, and ``at`` is the first axis in the result that belongs
    to the index.
  """
  p, d = eqn.params, eqn.params['dimension_numbers']
  if len(d.start_index_map) != 1 or d.operand_batching_dims:
    return None
  if d.collapsed_slice_dims != d.start_index_map:
    return None
  (axis,) = d.start_index_map
  sizes = list(eqn.invars[0].aval.shape)
  sizes[axis] = 1
  if list(p['slice_sizes']) != sizes:
    return None
  index = [a for a in range(eqn.outvars[0].aval.ndim) if a not in d.offset_dims]
  if not index:
    return axis, axis
  is_consecutive = index[-1] - index[0] == len(index) - 1
  return (axis, index[0]) if is_consecutive else None


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
  for x in ins:
    if isinstance(x, Lazy) and (not isinstance(x, Block) or is_codes(x.w)):
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
    names = [None] * a.ndim
    for axis, name in enumerate(to.spec):
      if a.shape[axis] == x.w.shape[axis] > 1:
        names[axis] = name
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
  known = [None if isinstance(x, Lazy) else x for x in ins]
  if any(x is not None for x in known):
    known = lax.optimization_barrier(known)
  return [x if y is None else y for x, y in zip(ins, known)]


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
