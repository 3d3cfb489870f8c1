"""The rule of matrix products, which consume most weights."""

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
  """A product that is a function of its own and builds no weights."""

  def __init__(self, eqn):
    super().__init__(eqn)
    self._key = self._key, 'by factors'


def _factors(eqn, ins, at) -> tuple | None:
  """Returns which factor of z is first in x @ (W + c z), and the axes in W of
  both; None if z has no factors, or W must be built."""
  w, x = ins[at], ins[1 - at]
  draws = w.draws
  if (len(draws.streams) < 2 or not draws.is_everywhere or
      draws.coefs.ndim > 1 or in_sharded_types(w.w) or
      not jnp.issubdtype(x.dtype, jnp.floating)):
    return None
  contracted = {*eqn.params['dimension_numbers'][0][at]}
  axes = [{*low_rank.counted(s, w.shape)} for s in draws.streams]
  mine = [contracted & a for a in axes]
  for first in (0, 1):
    if mine[1 - first] <= axes[first]:
      return first, axes
  return None


def _by_factors(eqn, ins, at):
  r"""Returns ``x W + c / sqrt(r) (x U) V^T``, or the same with V first.

  The terms are added in float32.
  """
  p, out = eqn.params, eqn.outvars[0].aval
  w, x = ins[at], ins[1 - at]
  factors = _factors(eqn, ins, at)
  assert factors is not None  # the caller has asked
  first, axes = factors
  wide = dtypes.wide(out.dtype)
  product = lambda a, b: lax.dot_general(
      a if at else b, b if at else a, p['dimension_numbers'], p['precision'],
      wide)
  clean = w.w.astype(w.w.dtype)
  for dtype in w.casts:
    clean = clean.astype(dtype)

  # Einstein's sums, by numbers: 0, 1, ... are the axes of W.
  n_, r_ = len(w.shape), len(w.shape) + 1  # directions, rank
  (of_x, of_w), (batch_x, batch_w) = ((pair[1 - at], pair[at]) for pair in
                                      p['dimension_numbers'])
  met = dict(zip((*of_x, *batch_x), (*of_w, *batch_w)))
  of_x_alone = [a for a in range(x.ndim) if a not in met]
  names = {a: r_ + 1 + a for a in of_x_alone} | met
  free = [a for a in range(n_) if a not in (*of_w, *batch_w)]
  mine = [names[a] for a in of_x_alone]
  result = [*batch_w, *(mine + free if at else free + mine)]
  factors = [w.draws.directions.factor(s, w.shape, x.dtype)
             for s in w.draws.streams]
  subs = [[*sorted(a), n_, r_] for a in axes]
  kept = [a for a in (*names.values(), *sorted(axes[first]))
          if a not in of_w or a in axes[1 - first]]
  kept = [*dict.fromkeys(kept), n_, r_]
  sums = lambda *args, dtype=wide: jnp.einsum(
      *args, preferred_element_type=dtype, precision=_precision(p))
  narrow = sums(x, [names[a] for a in range(x.ndim)], factors[first],
                subs[first], kept)
  narrow = narrow * w.draws.coefs.reshape(
      (1,) * (narrow.ndim - 2) + (-1, 1))  # no rank promotion
  core = w.draws.streams[0].core
  if core is not None:  # between the factors
    there = [a for a in range(n_) if core.shape[a] > 1]
    core = core.reshape([core.shape[a] for a in there] + [*core.shape[n_:]])
    new = r_ + 1 + x.ndim
    narrow = sums(narrow, kept, core, [*there, n_, *(
        (r_, new) if first == 0 else (new, r_))], [*kept[:-1], new])
  narrow = narrow.astype(x.dtype)
  there = [a for a in result if a in kept or a in axes[1 - first]]
  # This term is small, so x.dtype is precise enough, and halves the traffic.
  added = sums(narrow, kept, factors[1 - first], subs[1 - first], there,
               dtype=x.dtype)
  # Restore axes of length 1 that neither factor has.
  added = added.reshape([1 if a not in there else n for a, n in zip(
      result, out.shape)])
  return [(product(x, clean) + added.astype(wide)).astype(out.dtype)]


def _precision(params):
  p = params['precision']
  return p if isinstance(p, (tuple, lax.Precision)) else None


# --- parts of a large matrix ------------------------------------------------


def _by_parts(eqn, ins, at, context) -> Callable | None:
  """Returns a product that builds some rows of the matrix at a time, for CPUs;
  None if the matrix is at most 1/8 of the model, or cannot be split."""
  p = eqn.params
  w = ins[at]
  contracted, batch = (pair[at] for pair in p['dimension_numbers'])
  free = [a for a in range(len(w.shape)) if a not in (*contracted, *batch)]
  if (not free or 8 * w.w.size <= context.total or in_sharded_types(w.w)):
    return None
  axis = max(free, key=lambda a: w.shape[a])
  size, wanted = w.shape[axis], -(-32 * w.w.size // context.total)
  parts = next((n for n in range(wanted, size) if size % n == 0), size)
  if parts > 16 * wanted:
    return None
  others = len(ins[1 - at].shape) - len(contracted) - len(batch)
  out_axis = len(batch) + (others if at else 0) + free.index(axis)
  # Every parts-th row: runs of rows may be on different devices.
  apart = lambda shape, axis: (
      *shape[:axis], shape[axis] // parts, parts, *shape[axis + 1:])
  whole, order = w.as_it_lies()
  along = order[axis]
  split = views.Reshape(apart(whole.shape, along))
  if whole.viewed(split) is None:
    return None

  def run(ins):
    (w, _), x = ins[at].as_it_lies(), ins[1 - at]
    rows = w.viewed(split)
    def part(i, out):
      i = jnp.asarray(i)  # a Python number under jax.disable_jit
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
  """Returns whether axes of the mesh are Explicit or Manual here. A loop must
  then specify the sharding of its carry."""
  w = w.codes if is_codes(w) else w
  mesh = jax.typeof(w).sharding.mesh
  return any(t != jax.sharding.AxisType.Auto for t in mesh.axis_types) or bool(
      jax.sharding.get_abstract_mesh().manual_axes)


RULES['dot_general'] = _dot
