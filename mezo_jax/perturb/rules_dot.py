"""Defines the rule of dot_general, which consumes most weights.

The rule has three forms. With low-rank directions, x (W + c z) is computed from
the factors of z, without building W + c z. On CPUs, a large matrix is built and
multiplied in parts. In all other cases the weight is built for the product.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import dtypes, views
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions import low_rank
from mezo_jax.perturb.interpreter import (
  Block,
  Lazy,
  Operation,
  otherwise,
  RULES,
)


def _dot(eqn, ins, context):
  """Evaluates a product, in one of the three forms described above."""
  lazy = [i for i, x in enumerate(ins) if isinstance(x, Lazy)]
  if len(lazy) > 1 or not isinstance(ins[lazy[0]], Block):
    return None
  (at,) = lazy
  if _factors(eqn, ins, at) is None:
    return otherwise(eqn, ins, context, _by_parts(eqn, ins, at, context))
  # The functions that `Context.consume` caches must differ from those of the
  # same product with a weight that is built.
  op = Operation(eqn, 'by factors')
  return context.consume(lambda ins: _by_factors(eqn, ins, at), op, ins)


# --- low-rank directions ----------------------------------------------------


def _factors(eqn, ins, at) -> tuple | None:
  """Decides whether x @ (W + c z) can be computed from the factors of z.

  With z = U Vᵀ, x is first multiplied by the factor whose axes are contracted:
  by U for x @ W, and by V for x @ Wᵀ. This is impossible if the contraction
  runs over axes of both factors.

  Returns:
    ``(first, axes)``, or None if the weight must be built. ``first`` is 0 if x
    is multiplied by U first, and 1 if by V. ``axes`` has, for each factor, the
    set of axes of W along which the factor varies.
  """
  w, x = ins[at], ins[1 - at]
  draws = w.draws
  if not has_factors(w) or not jnp.issubdtype(x.dtype, jnp.floating):
    return None
  contracted = eqn.params['dimension_numbers'][0][at]
  axes = [set(low_rank.counted(s, w.shape)) for s in draws.streams]
  for first, second in ((0, 1), (1, 0)):
    if axes[second].intersection(contracted) <= axes[first]:
      return first, axes
  return None


def has_factors(w: Any) -> bool:
  """Returns whether z of a weight consists of factors that products can use."""
  return (isinstance(w, Block) and len(w.draws.streams) >= 2
          and w.draws.is_everywhere and w.draws.coefs.ndim <= 1
          and not _in_sharded_types(w.w))


def _by_factors(eqn, ins, at):
  r"""Returns the product ``x W + c / sqrt(r) (x U) V^T``, or with V first.

  Both terms are added in float32, or in float64 for a float64 result. The
  product may have several contracted, batch and free axes, so the factors are
  multiplied by `jnp.einsum` with numbered axes.
  """
  p, out = eqn.params, eqn.outvars[0].aval
  w, x = ins[at], ins[1 - at]
  wide = dtypes.wide(out.dtype)
  lhs, rhs = w.cast(w.w), x
  if at:
    lhs, rhs = rhs, lhs

  # jnp.einsum names axes by integers. 0, 1, ... are the axes of W, followed by
  # n_ for the directions and r_ for the rank, and then by the axes of x. A
  # contracted axis or a batch axis of x has the name of the corresponding axis
  # of W.
  n_, r_ = len(w.shape), len(w.shape) + 1
  contracted, batch = p['dimension_numbers']
  of_w, batch_w = contracted[at], batch[at]
  names = [[*range(n_)], [*range(n_)]]
  of_x = names[1 - at] = [r_ + 1 + a for a in range(x.ndim)]
  alone = {*of_x}
  for a, name in zip((*contracted[1 - at], *batch[1 - at]), (*of_w, *batch_w)):
    alone.remove(of_x[a])
    of_x[a] = name
  # ``result`` has the names of the axes of the product, as dot_general orders
  # them: batch axes, then the free axes of both operands.
  result = dict.fromkeys((*batch_w, *names[0], *names[1]))
  result = [a for a in result if a not in of_w]

  found = _factors(eqn, ins, at)
  assert found is not None  # `_dot` has checked this
  first, axes = found
  second = 1 - first
  factors = [w.draws.directions.factor(s, w.shape, x.dtype)
             for s in w.draws.streams]
  subs = [[*sorted(a), n_, r_] for a in axes]
  # ``kept`` has the axes of the product of x with the first factor, which are
  # all axes that are not contracted yet. An axis along which the second factor
  # varies, too, is contracted only in the product with the second factor.
  kept = dict.fromkeys((*sorted(alone), *of_w, *batch_w, *subs[first]))
  kept = [a for a in kept if a not in of_w or a in axes[second]]
  # jnp.einsum takes a precision for each operand, but not the name of an
  # algorithm.
  precision = p['precision']
  if not isinstance(precision, (tuple, lax.Precision)):
    precision = None
  sums = functools.partial(jnp.einsum, precision=precision)
  # x U, or x V: a narrow array with axes for the directions and the rank.
  narrow = sums(x, of_x, factors[first], subs[first], kept,
                preferred_element_type=wide)
  # Under jax_numpy_rank_promotion='raise', arrays must have equally many axes
  # to broadcast, so axes of length 1 are added.
  coefs = w.draws.coefs.reshape((1,) * (narrow.ndim - 2) + (-1, 1))
  narrow = narrow * coefs
  core = w.draws.streams[0].core
  if core is not None:  # Multiply by the matrix C of SubZero, or its transpose.
    there = [a for a in range(n_) if core.shape[a] > 1]
    core = core.reshape([core.shape[a] for a in there] + [*core.shape[n_:]])
    new = r_ + 1 + x.ndim
    ranks = [r_, new] if first == 0 else [new, r_]
    narrow = sums(narrow, kept, core, [*there, n_, *ranks], [*kept[:-1], new],
                  preferred_element_type=wide)
  narrow = narrow.astype(x.dtype)
  there = [a for a in result if a in kept or a in axes[second]]
  # This product also sums over the directions. The perturbation is small
  # relative to x W, so the dtype of x is precise enough for it. If that is half
  # precision, it halves the memory traffic.
  added = sums(narrow, kept, factors[second], subs[second], there,
               preferred_element_type=x.dtype)
  # Restore the axes of length 1 along which neither factor varies.
  added = added.reshape(
      [n if a in there else 1 for a, n in zip(result, out.shape)])
  clean = lax.dot_general(
      lhs, rhs, p['dimension_numbers'], p['precision'], wide)
  return [(clean + added.astype(wide)).astype(out.dtype)]


# --- parts of a large matrix ------------------------------------------------


def _by_parts(eqn, ins, at, context) -> Callable | None:
  """Returns a function that multiplies by a large matrix, some rows at a time.

  Some matrices, such as the output embedding of a language model, are a large
  part of the model. On CPU, the whole perturbed matrix would be stored. The
  returned function builds at most about 1/32 of the model's elements at a time.

  Returns:
    A function of the inputs, or None if the matrix has at most 1/8 of the
    model's elements or cannot be split into rows.
  """
  p, w = eqn.params, ins[at]
  contracted, batch = (pair[at] for pair in p['dimension_numbers'])
  free = [a for a in range(len(w.shape)) if a not in (*contracted, *batch)]
  if not free or 8 * w.w.size <= context.total or _in_sharded_types(w.w):
    return None
  axis = max(free, key=lambda a: w.shape[a])
  size, wanted = w.shape[axis], -(-32 * w.w.size // context.total)
  parts = min(wanted, size)
  while size % parts:
    parts += 1
  if parts > 16 * wanted:  # no suitable divisor, such as for a prime length
    return None
  # The position of this axis in the result: after the batch axes and, if the
  # weight is the right operand, after the free axes of the left one.
  out_axis = len(batch) + free.index(axis)
  if at:
    out_axis += len(ins[0].shape) - len(contracted) - len(batch)
  # Part i consists of the rows i, i + parts, i + 2 * parts, ... On a mesh,
  # neighbouring rows are often on the same device, so this spreads the rows of
  # each part over all devices.
  apart = lambda shape, axis: (
      *shape[:axis], shape[axis] // parts, parts, *shape[axis + 1:])
  whole, order = w.as_it_lies()
  along = order[axis]
  split = views.Reshape(apart(whole.shape, along))
  if whole.viewed(split) is None:
    return None

  def run(ins):
    """Computes the product, one part of the rows at a time."""
    w, _ = ins[at].as_it_lies()
    rows = w.viewed(split)
    def part(i, out):
      i = jnp.asarray(i)  # under jax.disable_jit it is a Python integer
      some = rows.viewed(views.Take(along + 1, i))
      lhs, rhs = context.force(some).transpose(order), ins[1 - at]
      if at:
        lhs, rhs = rhs, lhs
      product = lax.dot_general(
          lhs, rhs, p['dimension_numbers'], p['precision'],
          p['preferred_element_type'])
      return lax.dynamic_update_index_in_dim(out, product, i, out_axis + 1)
    out = eqn.outvars[0].aval
    start = jnp.zeros(apart(out.shape, out_axis), out.dtype)
    return [lax.fori_loop(0, parts, part, start).reshape(out.shape)]

  return run


def _in_sharded_types(w) -> bool:
  """Returns whether any mesh axis is Explicit or Manual at this point.

  In that case, types of arrays include shardings, and a loop has to specify the
  sharding of its carry. The rules above do not do that.

  Args:
    w: A weight.
  """
  array = w.codes if is_codes(w) else w
  mesh = jax.typeof(array).sharding.mesh
  if jax.sharding.get_abstract_mesh().manual_axes:
    return True
  return any(t != jax.sharding.AxisType.Auto for t in mesh.axis_types)


RULES['dot_general'] = _dot
