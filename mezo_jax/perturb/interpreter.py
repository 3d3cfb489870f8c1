"""An interpreter of jaxprs that displaces weights where they are consumed.

In `evaluate`, some values are lazy:

* A `Block` is a parameter leaf, or a view of it, with its `Draws`. A lookup,
  slice, transpose, reshape or cast of a block is a block again, and a scan over
  its first axis passes one row of it to each iteration.
* An `Expression` is a large result of an operation on lazy values and scalars,
  such as a concatenation, a product with a scale, or LoRA's A @ B.

Any other operation of a lazy value consumes it: the displaced weight is built
there. If layers are not scanned, a large operation of this kind is a function
of its own (on CPU) or behind a barrier (on GPU), so that the compiler frees
what is built for it when it is done.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp

from mezo_jax.core import jax_versions, views, xla
from mezo_jax.core.quantized import Codes, is_codes
from mezo_jax.directions.displacement import Draws

RULES: dict[str, Callable[..., Any]] = {}  # the modules `rules_...` fill it
# Programs of one operation, whose arguments have no names.
_NO_NAMES = core.DebugInfo('mezo_jax', 'bind', None, None)
SMALL = 2**16  # elements; a smaller weight may be built anywhere


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('w', 'draws'), meta_fields=('casts', 'leaf'))
@dataclasses.dataclass(frozen=True)
class Block:
  """Stands for ``w + sum_j coefs[j] * z_j``, for a view ``w`` of a leaf."""

  w: jax.Array | Codes
  draws: Draws  # of the same view
  casts: tuple[Any, ...] = ()  # dtypes to which the program cast the weights
  leaf: str | None = None  # path of the leaf; '' for a part of it

  @property
  def shape(self) -> tuple[int, ...]:
    return self.w.shape

  def view(self, w: jax.Array | Codes, draws: Draws) -> 'Block':
    leaf = self.leaf if w.size == self.w.size else ''
    return dataclasses.replace(self, w=w, draws=draws, leaf=leaf)

  def viewed(self, *chain: views.View, w: jax.Array | None = None
             ) -> 'Block | None':
    """Returns a view of the block, or None if it must be built.

    Args:
      *chain: Views, applied one after the other.
      w: The result for the weights, if it is known and they are not `Codes`.
    """
    draws, new, shape = self.draws, self.w if w is None else w, self.shape
    for view in chain:
      draws = draws.viewed(view, shape)
      if is_codes(new):
        new = new.viewed(view)
      elif w is None:
        new = view.array(new, shape)
      if draws is None or new is None:
        return None
      shape = view.shape(shape)
    return self.view(new, draws)

  def as_it_lies(self) -> tuple['Block', tuple[int, ...]]:
    """Returns the block with its axes in the order of the leaf, and the order
    that they have here: a transpose must not be built before it is read."""
    lies = self.draws.lies()
    block = self.transpose(lies)
    return block, tuple(lies.index(a) for a in range(len(lies)))

  def transpose(self, order: Sequence[int]) -> 'Block':
    block = self.viewed(views.Transpose(order))
    assert block is not None  # axes can always be exchanged
    return block

  def build(self) -> jax.Array:
    """Returns the weights, displaced and cast."""
    w = self.draws.add(self.w).astype(self.w.dtype)
    for dtype in self.casts:
      w = w.astype(dtype)
    return w


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('args',), meta_fields=('op', 'index', 'shape'))
@dataclasses.dataclass(frozen=True)
class Expression:
  """Stands for result ``index`` of an operation on lazy values and scalars."""

  args: tuple[Any, ...]
  op: 'Operation'
  index: int
  shape: tuple[int, ...]


Lazy = Block | Expression


class Operation:
  """The operation of an equation. Operations that do the same are equal."""

  def __init__(self, eqn: Any) -> None:
    self.eqn = eqn
    inputs = tuple((v.aval, str(v.val) if isinstance(v, core.Literal) else '')
                   for v in eqn.invars)
    self._key = (eqn.primitive, inputs, *sorted(
        eqn.params.items(), key=lambda item: item[0]))
    try:
      self._hash = hash(self._key)
    except TypeError:  # a parameter that is a list, an array, ...
      self._key, self._hash = id(self), id(self)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Operation) and self._key == other._key


@dataclasses.dataclass(frozen=True)
class Context:
  """Holds what one evaluation has in common."""

  total: int  # number of elements of all lazy leaves
  apart: bool = True  # whether operations consume in functions of their own
  # Functions by operation, order of axes and whether there is a form for CPUs.
  functions: dict[Any, Any] = dataclasses.field(default_factory=dict)
  # {leaf: why it is built whole}.
  built: dict[str, str] = dataclasses.field(default_factory=dict)

  def force(self, x: Any) -> Any:
    """Returns the array that a value stands for."""
    if isinstance(x, Expression):
      return bind(x.op.eqn, [*map(self.force, x.args)])[x.index]
    if not isinstance(x, Block):
      return x
    x, order = x.as_it_lies()
    w = x.build()
    if x.draws.directions.dear:
      # A TPU would draw z again for each tile of rows that it multiplies by w.
      w = lax.optimization_barrier(w)
    return w.transpose(order)

  def consume(self, fn: Callable[..., Any], op: Operation, ins: list[Any],
              fn_on_cpu: Callable[..., Any] | None = None) -> list[Any]:
    """Returns ``fn(ins)``, after which what it builds can be freed.

    Args:
      fn: A function of lazy and other values. It must be the same for all
        operations that are equal.
      op: The operation.
      ins: Lazy and other values; None for literals.
      fn_on_cpu: A function that does the same with less memory. It is not used
        for parts of leaves.
    """
    size = sum(math.prod(x.shape) for x in ins if isinstance(x, Lazy))
    small = size < SMALL and 1000 * size < self.total
    if not self.apart or small or op.eqn.effects:
      return fn(ins)
    part = any(map(_is_part, ins))
    ins, orders = pack(ins)
    kind = op, orders, fn_on_cpu is not None
    if kind not in self.functions:
      unpacked = lambda fn: lambda ins: fn(unpack(ins, orders))
      called = xla.apart(unpacked(fn_on_cpu or fn))
      jitted = jax.jit(unpacked(fn))
      tied = lambda ins: jitted(_tied(ins))
      self.functions[kind] = called, tied, jitted
    called, tied, jitted = self.functions[kind]
    if _inner(op.eqn) and jax.sharding.get_abstract_mesh().manual_axes:
      # Behind a barrier, values vary over all manual axes of all of them, which
      # the carry of a loop must not.
      tied = jitted
    # A part of a leaf would be copied to be passed to a function.
    return lax.platform_dependent(ins, cpu=jitted if part else called,
                                  cuda=tied, rocm=tied, default=jitted)

  def note(self, x: Any, why: str, stacked: bool = False) -> None:
    """Records that a large leaf is built whole: one of more than 4 % of all
    elements. With ``stacked``, only stacks of layers count."""
    if isinstance(x, Expression):
      for arg in x.args:
        self.note(arg, why, stacked)
    elif isinstance(x, Block) and x.leaf and x.w.size > max(
        0.04 * self.total, SMALL) and (
            not stacked or x.draws.is_stack()):
      self.built.setdefault(x.leaf, why)


def _is_part(x) -> bool:
  """Returns whether a value is a part of a leaf."""
  if isinstance(x, Expression):
    return any(map(_is_part, x.args))
  return isinstance(x, Block) and x.leaf == ''


def _tied(values) -> list:
  """Returns values in which blocks wait, by a barrier, for the other values.

  A compiler for GPUs would otherwise build the blocks of all layers at once.
  """
  met = [x for x in values if x is not None and not isinstance(x, Lazy)]
  def one(x):
    if isinstance(x, Expression):
      return dataclasses.replace(x, args=tuple(map(one, x.args)))
    if not isinstance(x, Block):
      return x
    w, keys, _ = lax.optimization_barrier((x.w, x.draws.keys(), met))
    return dataclasses.replace(x, w=w, draws=x.draws.tied(keys))
  return [*map(one, values)] if met else values


def pack(values: Any) -> tuple[list[Any], tuple[Any, ...]]:
  """Returns values as arguments of a function that equal layers share.

  They have no names, and blocks have the axes of their leaves. The second
  result has the orders of axes, for `unpack`.
  """
  out, orders = [], []
  for x in values:
    order = None
    if isinstance(x, Block):
      x, order = dataclasses.replace(x, leaf=None).as_it_lies()
    elif isinstance(x, Expression):
      args, order = pack(x.args)
      x = dataclasses.replace(x, args=tuple(args))
    out.append(x)
    orders.append(order)
  return out, tuple(orders)


def unpack(values: Any, orders: Any) -> list[Any]:
  """Undoes `pack`, except for the names."""
  def one(x, order):
    if isinstance(x, Block):
      return x.transpose(order)
    if isinstance(x, Expression):
      return dataclasses.replace(x, args=tuple(unpack(x.args, order)))
    return x
  return [*map(one, values, orders)]


# --- evaluation -------------------------------------------------------------


def evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Any,
             context: Context) -> list[Any]:
  """Evaluates a jaxpr. Inputs may be lazy, and then so may outputs be."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
  read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
  for eqn in jaxpr.eqns:
    ins = [read(v) for v in eqn.invars]
    with jax_versions.context_of(eqn):
      outs = _evaluate_one(eqn, ins, context)
    env.update(zip(eqn.outvars, outs))
  return [read(v) for v in jaxpr.outvars]


def _evaluate_one(eqn, ins, context: Context) -> list:
  """Evaluates an operation by its rule, if a value is lazy."""
  if not any(isinstance(x, Lazy) for x in ins):
    return bind(eqn, ins)
  outs = None
  if eqn.primitive.name in RULES:
    outs = RULES[eqn.primitive.name](eqn, ins, context)
  return otherwise(eqn, ins, context) if outs is None else outs


def bind(eqn: Any, ins: Sequence[Any]) -> list[Any]:
  """Evaluates an operation on arrays."""
  known = {v: x for v, x in zip(eqn.invars, ins)
           if not isinstance(v, core.Literal)}
  alone = core.Jaxpr((), [*known], eqn.outvars, [eqn], eqn.effects, _NO_NAMES)
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*known.values())


def otherwise(eqn: Any, ins: Sequence[Any], context: Context,
              by_parts: Callable[..., Any] | None = None) -> list[Any]:
  """Evaluates an operation without a rule, as an expression or by consuming its
  lazy values. ``by_parts``, if given, does the same with less memory."""
  op = Operation(eqn)
  ins = [None if isinstance(v, core.Literal) else x
         for v, x in zip(eqn.invars, ins)]
  if _waits(eqn, ins):
    return [Expression(tuple(ins), op, i, v.aval.shape)
            for i, v in enumerate(eqn.outvars)]
  for x in ins:
    context.note(x, f'all of it is used at once, by {eqn.primitive.name}',
                 stacked=not _inner(eqn))
  return context.consume(
      lambda ins: bind(eqn, [*map(context.force, ins)]), op, ins, by_parts)


def _waits(eqn, ins) -> bool:
  """Returns whether an operation is on weights alone and its results are large.
  """
  return (
      all(x is None or isinstance(x, Lazy) or not jnp.ndim(x) for x in ins)
      and all(math.prod(v.aval.shape) >= SMALL for v in eqn.outvars)
      and not eqn.effects and not _inner(eqn))


def _inner(eqn) -> bool:
  """Returns whether an operation contains programs, as loops do."""
  return any(isinstance(x, (core.Jaxpr, core.ClosedJaxpr)) or callable(x)
             for value in eqn.params.values()
             for x in (value if isinstance(value, tuple) else (value,)))
