"""Defines the rule of dot_general, which consumes most weights.

The rule has three forms. With low-rank directions, x (W + c z) is computed from
the factors of z, without building W + c z. On CPUs, a large matrix is built and
multiplied in parts. In all other cases the weight is built for the product.
"""

from collections.abc import Callable
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
  if sum(isinstance(x, Lazy) for x in ins) == 1:
    at = 0 if isinstance(ins[0], Lazy) else 1
    if isinstance(ins[at], Block):
      if _factors(eqn, ins, at):
        return context.consume(
            lambda ins: _by_factors(eqn, ins, at), _Product(eqn), ins)
      return otherwise(eqn, ins, context, _by_parts(eqn, ins, at, context))
  return otherwise(eqn, ins, context)


# --- low-rank directions ----------------------------------------------------


class _Product(Operation):
  """Identifies a product that is computed from the factors of z.

  `Context.consume` caches functions by operation. The key of this operation
  must differ from that of the same product with a weight that is built.
  """

  def __init__(self, eqn):
    super().__init__(eqn)
    self._key = self._key, 'by factors'


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
  contracted = {*eqn.params['dimension_numbers'][0][at]}
  axes = [{*low_rank.counted(s, w.shape)} for s in draws.streams]
  mine = [contracted & a for a in axes]
  for first in (0, 1):
    if mine[1 - first] <= axes[first]:
      return first, axes
  return None


def has_factors(w: Any) -> bool:
  """Returns whether z of a weight consists of factors that products can use."""
  return (isinstance(w, Block) and len(w.draws.streams) >= 2
          and w.draws.is_everywhere and w.draws.coefs.ndim <= 1
          and not in_sharded_types(w.w))


def _by_factors(eqn, ins, at):
  r"""Returns the product ``x W + c / sqrt(r) (x U) V^T``, or with V first.

  Both terms are added in float32, or in float64 for a float64 result. The
  product may have several contracted, batch and free axes, so the factors are
  multiplied by `jnp.einsum` with numbered axes.
  """
  p, out = eqn.params, eqn.outvars[0].aval
  w, x = ins[at], ins[1 - at]
  factors = _factors(eqn, ins, at)
  assert factors is not None  # `_dot` has checked this
  first, axes = factors
  wide = dtypes.wide(out.dtype)
  product = lambda a, b: lax.dot_general(
      a if at else b, b if at else a, p['dimension_numbers'], p['precision'],
      wide)
  clean = w.w.astype(w.w.dtype)
  for dtype in w.casts:
    clean = clean.astype(dtype)

  # jnp.einsum names axes by integers. 0, 1, ... are the axes of W, followed by
  # n_ for the directions and r_ for the rank, and then by the free axes of x.
  n_, r_ = len(w.shape), len(w.shape) + 1
  (of_x, of_w), (batch_x, batch_w) = ((pair[1 - at], pair[at]) for pair in
                                      p['dimension_numbers'])
  # A contracted axis or a batch axis of x has the name of the corresponding
  # axis of W. The free axes of x get names of their own.
  met = dict(zip((*of_x, *batch_x), (*of_w, *batch_w)))
  of_x_alone = [a for a in range(x.ndim) if a not in met]
  names = {a: r_ + 1 + a for a in of_x_alone} | met
  free = [a for a in range(n_) if a not in (*of_w, *batch_w)]
  mine = [names[a] for a in of_x_alone]
  result = [*batch_w, *(mine + free if at else free + mine)]
  # ``result`` has the names of the axes of the product, as dot_general orders
  # them: batch axes, then the free axes of both operands.
  factors = [w.draws.directions.factor(s, w.shape, x.dtype)
             for s in w.draws.streams]
  subs = [[*sorted(a), n_, r_] for a in axes]
  # ``kept`` has the axes of the product of x with the first factor, which are
  # all axes that are not contracted yet. An axis along which the second factor
  # varies, too, is contracted only in the product with the second factor.
  kept = [a for a in (*names.values(), *sorted(axes[first]))
          if a not in of_w or a in axes[1 - first]]
  kept = [*dict.fromkeys(kept), n_, r_]
  sums = lambda *args, dtype=wide: jnp.einsum(
      *args, preferred_element_type=dtype, precision=_precision(p))
  # x U, or x V: a narrow array with axes for the directions and the rank.
  narrow = sums(x, [names[a] for a in range(x.ndim)], factors[first],
                subs[first], kept)
  narrow = narrow * w.draws.coefs.reshape(
      # Under jax_numpy_rank_promotion='raise', arrays must have equally many
      # axes to broadcast, so axes of length 1 are added.
      (1,) * (narrow.ndim - 2) + (-1, 1))
  core = w.draws.streams[0].core
  if core is not None:  # Multiply by the matrix C of SubZero, or its transpose.
    there = [a for a in range(n_) if core.shape[a] > 1]
    core = core.reshape([core.shape[a] for a in there] + [*core.shape[n_:]])
    new = r_ + 1 + x.ndim
    narrow = sums(narrow, kept, core, [*there, n_, *(
        (r_, new) if first == 0 else (new, r_))], [*kept[:-1], new])
  narrow = narrow.astype(x.dtype)
  there = [a for a in result if a in kept or a in axes[1 - first]]
  # This product also sums over the directions. The perturbation is small
  # relative to x W, so the dtype of x is precise enough for it. If that is half
  # precision, it halves the memory traffic.
  added = sums(narrow, kept, factors[1 - first], subs[1 - first], there,
               dtype=x.dtype)
  # Restore the axes of length 1 along which neither factor varies.
  added = added.reshape([1 if a not in there else n for a, n in zip(
      result, out.shape)])
  return [(product(x, clean) + added.astype(wide)).astype(out.dtype)]


def _precision(params):
  """Returns the precision of a product, in a form that jnp.einsum accepts."""
  p = params['precision']
  return p if isinstance(p, (tuple, lax.Precision)) else None


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
  p = eqn.params
  w = ins[at]
  contracted, batch = (pair[at] for pair in p['dimension_numbers'])
  free = [a for a in range(len(w.shape)) if a not in (*contracted, *batch)]
  if (not free or 8 * w.w.size <= context.total or in_sharded_types(w.w)):
    return None
  axis = max(free, key=lambda a: w.shape[a])
  size, wanted = w.shape[axis], -(-32 * w.w.size // context.total)
  parts = next((n for n in range(wanted, size) if size % n == 0), size)
  if parts > 16 * wanted:  # no suitable divisor, such as for a prime length
    return None
  others = len(ins[1 - at].shape) - len(contracted) - len(batch)
  out_axis = len(batch) + (others if at else 0) + free.index(axis)
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
    (w, _), x = ins[at].as_it_lies(), ins[1 - at]
    rows = w.viewed(split)
    def part(i, out):
      i = jnp.asarray(i)  # under jax.disable_jit it is a Python integer
      some = rows.viewed(views.Take(along + 1, i))
      built = context.force(some).transpose(order)
      lhs, rhs = (x, built) if at else (built, x)
      return lax.dynamic_update_index_in_dim(out, lax.dot_general(
          lhs, rhs, p['dimension_numbers'], p['precision'],
          p['preferred_element_type']), i, out_axis + 1)
    out = eqn.outvars[0].aval
    return [lax.fori_loop(0, parts, part, jnp.zeros(
        apart(out.shape, out_axis), out.dtype)).reshape(out.shape)]

  return run


def in_sharded_types(w: Any) -> bool:
  """Returns whether any mesh axis is Explicit or Manual at this point.

  In that case, types of arrays include shardings, and a loop has to specify the
  sharding of its carry. The rules above do not do that.

  Args:
    w: A weight.
  """
  w = w.codes if is_codes(w) else w
  mesh = jax.typeof(w).sharding.mesh
  return any(t != jax.sharding.AxisType.Auto for t in mesh.axis_types) or bool(
      jax.sharding.get_abstract_mesh().manual_axes)


RULES['dot_general'] = _dot
