"""Defines the rules of primitives that contain jaxprs: calls and loops.

The jaxpr of a call is evaluated in line. A scan over stacked weights passes one
layer to each iteration. If each iteration of a loop uses all of a weight, the
weight is built before the loop, since z would otherwise be drawn again in each
iteration. Weights in the initial carry of a loop are built, too.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mezo_jax.core import jax_versions, views
from mezo_jax.core.quantized import is_codes
from mezo_jax.perturb.interpreter import (
  bind,
  Block,
  evaluate,
  Expression,
  Lazy,
  Operation,
  RULES,
)
from mezo_jax.perturb.rules_dot import has_factors
from mezo_jax.perturb.rules_indexing import gathered_axis


def _nested(eqn):
  """Returns the jaxpr that an equation calls, and its constants."""
  p = eqn.params
  inner = p['jaxpr'] if 'jaxpr' in p else p['call_jaxpr']
  return getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ())


def _call(eqn, ins, context):
  """Evaluates the jaxpr of a call (jit, remat, ...) in line."""
  jaxpr, consts = _nested(eqn)
  return evaluate(jaxpr, consts, ins, context)


def _forced(eqn, ins, context):
  """Returns two functions of the inputs that evaluate a call.

  Both return arrays. The first function evaluates the jaxpr in line, with lazy
  weights. The second builds the weights and binds the original primitive, which
  has the custom derivative.
  """
  jaxpr, consts = _nested(eqn)
  in_line = lambda ins: [*map(context.force, evaluate(
      jaxpr, consts, ins, context))]
  by_rule = lambda ins: bind(eqn, [*map(context.force, ins)])
  return in_line, by_rule


def _custom_jvp(eqn, ins, context):
  """Evaluates a `jax.custom_jvp` function in line, and keeps its derivative."""
  in_line, by_rule = _forced(eqn, ins, context)
  run = jax.custom_jvp(in_line)
  run.defjvp(lambda primals, tangents: jax.jvp(by_rule, primals, tangents))
  return run(ins)


def _custom_vjp(eqn, ins, context):
  """Evaluates a `jax.custom_vjp` function in line, and keeps its derivative."""
  in_line, by_rule = _forced(eqn, ins, context)
  run = jax.custom_vjp(in_line)
  run.defvjp(lambda ins: jax.vjp(by_rule, ins),
             lambda pullback, cotangents: pullback(cotangents))
  return run(ins)


# --- loops ------------------------------------------------------------------


def _scan(eqn, ins, context):
  """Passes one layer of stacked weights, and its key, to each iteration.

  The inputs of a scan are, in this order, constants, the initial carry and
  arrays to scan over. Weights among the arrays stay lazy if they can be split
  along their first axis. Weights among the constants stay lazy unless an
  iteration uses all of them. Weights in the initial carry are built.
  """
  body, (n, m) = eqn.params['jaxpr'].jaxpr, jax_versions.scan_starts(eqn.params)
  # Inputs before n are constants, and those from m on are scanned over.
  ins, whole = [*ins], [False] * len(ins)
  for i, x in enumerate(ins):
    if isinstance(x, Lazy) and n <= i < m or i >= m and (
        isinstance(x, Expression) or isinstance(x, Block) and not _rowwise(x)):
      context.note(x, 'it is in the initial carry of a scan' if i < m else
                   'an operation on all layers precedes a scan over them')
      ins[i] = context.force(x)
    elif isinstance(x, Lazy) and i < n and not _by_parts(body, body.invars[i]):
      context.note(x, 'each iteration of a scan uses all of it')
      whole[i] = True
  if not any(whole):
    return _scan_layers(eqn, ins, context)
  # The loop as a whole consumes the weights that are built before it, so the
  # operations in its body do not need functions of their own.
  def run(ins):
    ins = [context.force(x) if b else x for x, b in zip(ins, whole)]
    return _scan_layers(eqn, ins, dataclasses.replace(context, apart=False))
  return context.consume(run, _Loop(eqn, whole), ins)


class _Loop(Operation):
  """Identifies a loop together with the inputs that are built before it."""

  def __init__(self, eqn, whole):
    super().__init__(eqn)
    self._key = self._key, tuple(whole)


def _scan_layers(eqn, ins, context):
  """Evaluates a scan whose constants and arrays may still be lazy."""
  p, body = eqn.params, eqn.params['jaxpr']
  (n, m), length = jax_versions.scan_starts(p), p['length']
  xs, of_row = [], []
  for x in ins[m:]:
    rows, remake = _rows(x, length) if isinstance(x, Block) else (x, None)
    xs.append(rows)
    of_row.append(remake)
  # If a scan is over weights, only one layer is in memory at a time. Its
  # operations can then consume weights without functions of their own.
  within = dataclasses.replace(
      context, apart=context.apart and not any(of_row))

  def step(carry, rows):
    """Evaluates the body with the blocks of one iteration."""
    rows = [x if remake is None else remake(x)
            for x, remake in zip(rows, of_row)]
    outs = evaluate(body.jaxpr, body.consts, [*ins[:n], *carry, *rows], within)
    outs = [*map(context.force, outs)]
    return outs[:m - n], outs[m - n:]

  carry, ys = lax.scan(
      step, ins[n:m], xs, length, p['reverse'], p['unroll'])
  return [*carry, *ys]


def _rowwise(x: Block) -> bool:
  """Returns whether a block can be split along its first axis.

  Quantised weights can only be split if each entry has scales of its own.
  """
  return not is_codes(x.w) or all(
      len(a) == len(x.w) for a in jax.tree.leaves(x.w))


def _rows(x: Block, length: int):
  """Splits a block along its first axis, for a scan.

  Returns:
    A tree of arrays to scan over, and a function that takes their entries in
    one iteration and returns the block of this iteration.
  """
  along, draws_of = x.draws.rows(length)
  def remake(row):
    w, along = row
    return dataclasses.replace(x, w=w, draws=draws_of(along), leaf=None)
  return (x.w, along), remake


def _while(eqn, ins, context):
  """Evaluates a while_loop.

  Lazy constants and the initial carry are treated as in `_scan`.
  """
  p = eqn.params
  cond, body = p['cond_jaxpr'], p['body_jaxpr']
  n, m = p['cond_nconsts'], p['cond_nconsts'] + p['body_nconsts']
  # Inputs before n are constants of the condition, those before m are constants
  # of the body, and the others are the initial carry.
  variables = [*cond.jaxpr.invars[:n], *body.jaxpr.invars[:m - n]]
  whole = [isinstance(x, Lazy) and not _by_parts(
      cond.jaxpr if i < n else body.jaxpr, v, has_factors(x))
           for i, (x, v) in enumerate(zip(ins, variables))]
  for x, built in zip(ins, whole):
    if built:
      context.note(x, 'each iteration of a while_loop uses all of it')
  for x in ins[m:]:
    context.note(x, 'it is in the initial carry of a while_loop')
  ins = [*ins[:m], *map(context.force, ins[m:])]
  whole += [False] * (len(ins) - m)

  def run(ins):
    ins = [context.force(x) if b else x for x, b in zip(ins, whole)]
    within = dataclasses.replace(context, apart=False) if any(whole) else (
        context)
    def part(closed, consts, carry):
      """Evaluates the condition or the body, and returns arrays."""
      return [*map(context.force, evaluate(
          closed.jaxpr, closed.consts, [*consts, *carry], within))]
    return lax.while_loop(
        lambda carry: part(cond, ins[:n], carry)[0],
        lambda carry: part(body, ins[n:m], carry), ins[m:])

  if any(whole):
    return context.consume(run, _Loop(eqn, whole), ins)
  return run(ins)


def _cond(eqn, ins, context):
  """Evaluates the branches with lazy weights, and builds their results."""
  index, *operands = ins
  def branch(closed):
    """Returns a function that evaluates one branch and returns arrays."""
    def run(*args):
      return [*map(context.force, evaluate(
          closed.jaxpr, closed.consts, args, context))]
    return run
  branches = [branch(b) for b in eqn.params['branches']]
  return lax.switch(index.astype(jnp.int32), branches, *operands)


def _shard_map(eqn, ins, context):
  """Passes each device its shard of a leaf and the draws of this shard.

  Inside the function, a device sees its shard as a whole array. Draws, however,
  depend on the index of an element in the whole leaf. The draws of the whole
  leaf are therefore passed to all devices, which is cheap, and each device
  computes the view that belongs to its shard.
  """
  p = eqn.params
  args, specs, trees = [], [], []
  for x, spec in zip(ins, p['in_specs']):
    tree = None
    if isinstance(x, Expression) or isinstance(x, Block) and is_codes(x.w):
      context.note(x, 'an operation on it precedes a shard_map')
      x = context.force(x)
    elif isinstance(x, Block):
      arrays, tree = jax.tree.flatten(x.draws)
      x, spec = (x.w, arrays), (spec, [P()] * len(arrays))
    args.append(x)
    specs.append(spec)
    trees.append(tree)

  def body(*args):
    """Evaluates the body with the shards of one device."""
    local = []
    for x, lazy, tree, spec in zip(args, ins, trees, p['in_specs']):
      if tree is not None:
        w, arrays = x
        starts = [0] * w.ndim
        for axis, names in enumerate(spec):
          if names is not None:  # a mesh axis, or several, that split this axis
            starts[axis] = lax.axis_index(names) * w.shape[axis]
        draws = jax.tree.unflatten(tree, arrays).viewed(
            views.Window(starts, w.shape, (1,) * w.ndim), lazy.shape)
        x = dataclasses.replace(lazy, w=w, draws=draws, leaf=None)
      local.append(x)
    outs = evaluate(p['jaxpr'], (), local, context)
    return tuple(map(context.force, outs))

  return [*jax.shard_map(
      body, mesh=p['mesh'], in_specs=tuple(specs),
      out_specs=tuple(p['out_specs']), check_vma=p['check_vma'],
      axis_names=p['newly_manual_axes'])(*args)]


# --- which weights a loop uses in parts --------------------------------------


def _by_parts(jaxpr, var, factors: bool = False) -> bool:
  """Returns whether an iteration of a loop uses only parts of a constant.

  A part is a layer or some rows. If an iteration uses all of a constant, the
  constant should be built before the loop, since z would otherwise be drawn
  again in each iteration.

  Args:
    jaxpr: The body of the loop.
    var: The variable of the constant in the body.
    factors: Whether products with the constant are computed from the factors of
      z, so that they need not build it. Defaults to False.
  """
  if any(v is var for v in jaxpr.outvars):
    return False
  for eqn in jaxpr.eqns:
    for i, v in enumerate(eqn.invars):
      if v is var and not _eqn_by_parts(eqn, i, factors):
        return False
      if v is var and eqn.primitive.name in _PASSING:
        if not all(_by_parts(jaxpr, out, factors) for out in eqn.outvars):
          return False
  return True


def _eqn_by_parts(eqn, i: int, factors: bool) -> bool:
  """Returns whether an equation uses only parts of operand number ``i``.

  An equation that passes the operand on, as a reshape does, counts as well.
  """
  name, p = eqn.primitive.name, eqn.params
  if name in _PASSING:
    return True
  if name == 'gather':
    return i == 0 and gathered_axis(eqn) is not None
  if name == 'dot_general':
    return factors
  if name in ('slice', 'dynamic_slice'):
    return i == 0
  if name == 'scan':
    consts, carried = jax_versions.scan_starts(p)
    if i >= consts:
      return i >= carried
    return _by_parts(p['jaxpr'].jaxpr, p['jaxpr'].jaxpr.invars[i], factors)
  if name == 'while':
    n, m = p['cond_nconsts'], p['cond_nconsts'] + p['body_nconsts']
    jaxpr = (p['cond_jaxpr'] if i < n else p['body_jaxpr']).jaxpr
    return i < m and _by_parts(
        jaxpr, jaxpr.invars[i if i < n else i - n], factors)
  if name == 'cond':
    return i > 0 and all(_by_parts(b.jaxpr, b.jaxpr.invars[i - 1], factors)
                         for b in p['branches'])
  if name in _CALLS:
    inner, _ = _nested(eqn)
    return _by_parts(inner, inner.invars[i], factors)
  return False


# Primitives whose result is the operand in another form. For these, `_by_parts`
# checks how the result is used.
_PASSING = ('convert_element_type', 'reshape', 'squeeze', 'transpose', 'copy',
            'sharding_constraint', 'reshard', 'pvary')
_CALLS = {
    **dict.fromkeys(('jit', 'closed_call', 'remat2'), _call),
    'custom_jvp_call': _custom_jvp,
    'custom_vjp_call': _custom_vjp,
}
RULES.update(_CALLS, scan=_scan, cond=_cond, shard_map=_shard_map)
RULES['while'] = _while
