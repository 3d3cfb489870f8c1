"""Interprets jaxprs, and displaces weights where operations consume them.

During `evaluate`, some values are lazy:

* A `Block` is a parameter leaf, or a view of one, with its `Draws`. A lookup,
  slice, transpose, reshape or cast of a block is a block again. A scan over its
  first axis passes one entry to each iteration.
* An `Expression` is a recorded operation on lazy values and scalars with a
  large result, such as a concatenation, a product with a scale, or A @ B of
  LoRA.

Every other operation on a lazy value *consumes* it: the displaced weight is
built for this operation. In a model whose layers are not scanned, the compiler
might build the weights of all layers early and keep them. On CPU, a large
operation of this kind is therefore put into a function of its own. On GPU, an
optimization barrier delays its weights until the other operands are known. The
compiler can then free the weights right after the operation.
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
from mezo_jax.core.quantized import is_codes, QuantizedArray
from mezo_jax.directions.displacement import Draws

# Maps the name of a primitive to its rule, ``(eqn, ins, context) -> outs``. A
# rule that does not apply returns None, and `otherwise` evaluates the equation.
# The modules rules_*.py add their rules when they are imported.
RULES: dict[str, Callable[..., Any]] = {}
# Debug information for the jaxprs in `bind`, whose arguments have no names.
_NO_NAMES = core.DebugInfo('mezo_jax', 'bind', None, None)
# Number of elements below which a weight may be built anywhere, since it takes
# so little memory.
SMALL = 2**16


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('w', 'draws'), meta_fields=('casts', 'leaf'))
@dataclasses.dataclass(frozen=True)
class Block:
  """Represents ``w + sum_j coefs[j] * z_j`` for a leaf w, or a view of one.

  Attributes:
    w: The clean weights, that is, the weights without a displacement.
    draws: The draws of the same view.
    casts: Dtypes to which the program has cast the weights, in order. They are
      applied after z has been added.
    leaf: Path of the leaf, or '' if the block is only a part of the leaf. It is
      None inside loops and shared functions, where the path is not known.
  """

  w: jax.Array | QuantizedArray
  draws: Draws
  casts: tuple[Any, ...] = ()
  leaf: str | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.w.shape

  def view(self, w: jax.Array | QuantizedArray, draws: Draws) -> 'Block':
    """Returns the block of a view, given its weights and its draws."""
    leaf = self.leaf if w.size == self.w.size else ''
    return dataclasses.replace(self, w=w, draws=draws, leaf=leaf)

  def viewed(self, *chain: views.View, w: jax.Array | None = None
             ) -> 'Block | None':
    """Returns a view of the block.

    Args:
      *chain: Views, which are applied one after the other.
      w: The view of the clean weights, if the caller has already computed it.
        Must be None for a `QuantizedArray`. Defaults to None, which computes
        the view.

    Returns:
      The view. None if the draws or the `QuantizedArray` do not have this view,
      so that the block must be built instead.
    """
    is_known = w is not None
    new = w if is_known else self.w
    draws, shape = self.draws, self.shape
    for view in chain:
      draws = draws.viewed(view, shape)
      if is_codes(new):
        new = new.viewed(view)
      elif not is_known:
        new = view.array(new, shape)
      if draws is None or new is None:
        return None
      shape = view.shape(shape)
    return self.view(new, draws)

  def as_it_lies(self) -> tuple['Block', tuple[int, ...]]:
    """Undoes a transpose of the block.

    Weights are built with their axes in the order of the leaf and transposed
    afterwards. XLA can then fuse the transpose with the operation that consumes
    the weights, instead of storing a transposed copy.

    Returns:
      The block with its axes in the order of the leaf, and the order of axes
      that transposes it back.
    """
    lies = self.draws.lies()
    block = self.transpose(lies)
    return block, tuple(lies.index(a) for a in range(len(lies)))

  def transpose(self, order: Sequence[int]) -> 'Block':
    """Returns the block with axis ``order[a]`` in the place of axis a."""
    block = self.viewed(views.Transpose(order))
    assert block is not None  # every block has a transpose
    return block

  def build(self) -> jax.Array:
    """Returns the displaced weights, with all casts applied."""
    return self.cast(self.draws.add(self.w))

  def cast(self, w: jax.Array | QuantizedArray) -> jax.Array:
    """Returns an array in the dtype of the leaf, with all casts applied."""
    out = w.astype(self.w.dtype)
    for dtype in self.casts:
      out = out.astype(dtype)
    return out


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('args',), meta_fields=('op', 'index', 'shape'))
@dataclasses.dataclass(frozen=True)
class Expression:
  """Represents a result of an operation that has not been executed yet.

  Attributes:
    args: Inputs of the operation: lazy values and scalars. None stands for a
      literal, whose value is a part of the equation.
    op: The operation.
    index: Which of the results of the operation it is.
    shape: Shape of the result.
  """

  args: tuple[Any, ...]
  op: 'Operation'
  index: int
  shape: tuple[int, ...]


Lazy = Block | Expression


class Operation:
  """Wraps an equation, so that equivalent equations compare equal.

  An operation is a dictionary key in `Context.functions` and static data in
  pytrees. The layers of an unrolled model thus share one traced function.

  Args:
    eqn: The equation.
    how: How it is evaluated, if there are several ways. Operations are equal
      only if they are evaluated in the same way. Defaults to ''.
  """

  def __init__(self, eqn: Any, how: str = '') -> None:
    self.eqn = eqn
    literals = tuple(
        str(v.val) if isinstance(v, core.Literal) else '' for v in eqn.invars)
    inputs = tuple(v.aval for v in eqn.invars)
    params = sorted(eqn.params.items(), key=lambda item: item[0])
    self._key = eqn.primitive, how, inputs, literals, *params
    try:
      self._hash = hash(self._key)
    except TypeError:
      # If a parameter is not hashable (a list, an array), the operation is
      # equal only to itself.
      self._key = self._hash = id(self)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Operation) and self._key == other._key


@dataclasses.dataclass(frozen=True)
class Context:
  """Holds the state that all equations of one evaluation share.

  Attributes:
    total: Number of elements of all lazy leaves.
    apart: Whether large operations consume weights in functions of their own or
      behind barriers. It is False inside loops in which only one layer is in
      memory at a time.
    functions: Functions that consume weights. Their keys are the operation, the
      order of axes, and whether there is a separate function for CPUs.
    built: The path of each large leaf that is built in full, and the reason.
  """

  total: int
  apart: bool = True
  functions: dict[Any, Any] = dataclasses.field(default_factory=dict)
  built: dict[str, str] = dataclasses.field(default_factory=dict)

  def force(self, x: Any) -> Any:
    """Returns the array that a lazy value represents.

    Values that are not lazy are returned unchanged.
    """
    if isinstance(x, Expression):
      results = bind(x.op.eqn, [self.force(arg) for arg in x.args])
      return results[x.index]
    if not isinstance(x, Block):
      return x
    x, order = x.as_it_lies()
    w = x.build()
    if x.draws.directions.dear:
      # XLA for TPUs would fuse the draws into a product and draw z again for
      # each tile of rows that is multiplied by w.
      w = lax.optimization_barrier(w)
    return w.transpose(order)

  def consume(self, fn: Callable[..., Any], op: Operation, ins: list[Any],
              fn_on_cpu: Callable[..., Any] | None = None) -> list[Any]:
    """Evaluates an operation so that the weights it builds can be freed.

    Args:
      fn: A function of ``ins`` that builds the weights. It is cached, and used
        again for all operations that are equal to ``op``.
      op: The operation.
      ins: Lazy and other values, and None for literals.
      fn_on_cpu: A function that does the same with less memory on CPUs.
        Defaults to None, for ``fn``. It is not used for parts of leaves.

    Returns:
      ``fn(ins)``.
    """
    # Small weights do not need a function of their own. If the whole model is
    # small (as in tests and examples), they are treated like large ones.
    size = sum(math.prod(x.shape) for x in ins if isinstance(x, Lazy))
    small = size < SMALL and 1000 * size < self.total
    if not self.apart or small or op.eqn.effects:
      return fn(ins)
    # Prepare the blocks as arguments of a function that equal layers share.
    # Paths are removed, since they differ between layers. Transposes are
    # undone, so that axes have the same order as in the leaf.
    args, tree = jax.tree.flatten(ins, is_leaf=_is_block)
    part = any(x.leaf == '' for x in args if _is_block(x))
    orders = [None] * len(args)
    for i, x in enumerate(args):
      if _is_block(x):
        args[i], orders[i] = dataclasses.replace(x, leaf=None).as_it_lies()
    ins = tree.unflatten(args)

    def unpacked(fn):
      """Returns ``fn`` as a function of the prepared values."""
      def run(ins):
        args = [x if order is None else x.transpose(order) for x, order in zip(
            tree.flatten_up_to(ins), orders)]
        return fn(tree.unflatten(args))
      return run

    kind = op, tree, tuple(orders), fn_on_cpu is not None
    if kind not in self.functions:
      called = xla.apart(unpacked(fn_on_cpu or fn))
      jitted = jax.jit(unpacked(fn))
      tied = lambda ins: jitted(_tied(ins))
      self.functions[kind] = called, tied, jitted
    called, tied, jitted = self.functions[kind]
    if _inner(op.eqn) and jax.sharding.get_abstract_mesh().manual_axes:
      # After a barrier, each value counts as varying over the manual axes of
      # all values that passed it. The carry of a loop must keep its type, so no
      # barrier is used here.
      tied = jitted
    # On CPU, a part of a leaf would have to be copied before it can be passed
    # to a function that is not inlined. On TPU, a plain function is enough.
    on_cpu = jitted if part else called
    return lax.platform_dependent(
        ins, cpu=on_cpu, cuda=tied, rocm=tied, default=jitted)

  def note(self, x: Any, why: str, stacked: bool = False) -> None:
    """Records that a leaf is built in full, if the leaf is large.

    A leaf is large if it has more than `SMALL` elements and more than 4 % of
    the elements of all lazy leaves.

    Args:
      x: Any value. The leaves of an expression are recorded one by one.
      why: The reason why it is built in full, for the warning.
      stacked: Whether to record only stacks of layers. Defaults to False.
    """
    least = max(0.04 * self.total, SMALL)
    for block in filter(_is_block, jax.tree.leaves(x, is_leaf=_is_block)):
      is_large = block.leaf and block.w.size > least
      if is_large and (block.draws.is_stack() or not stacked):
        self.built.setdefault(block.leaf, why)


def _is_block(x) -> bool:
  """Returns whether a value is a `Block`, to map over trees of values."""
  return isinstance(x, Block)


def _tied(values) -> list:
  """Makes lazy values depend on all other values, by an optimization barrier.

  The other values are activations, which an operation multiplies by weights.
  Without this dependence, XLA for GPUs may build the weights of all layers
  before the first layer is evaluated.
  """
  met = [x for x in values if x is not None and not isinstance(x, Lazy)]
  if not met:
    return values
  def one(x):
    if not _is_block(x):
      return x
    w, keys, _ = lax.optimization_barrier((x.w, x.draws.keys(), met))
    return dataclasses.replace(x, w=w, draws=x.draws.tied(keys))
  return jax.tree.map(one, values, is_leaf=_is_block)


# --- evaluation -------------------------------------------------------------


def evaluate(jaxpr: core.Jaxpr, consts: Sequence[Any], args: Any,
             context: Context) -> list[Any]:
  """Evaluates a jaxpr, in which inputs and results may be lazy.

  Args:
    jaxpr: The jaxpr.
    consts: Values of its ``constvars``.
    args: Values of its ``invars``.
    context: The state of this evaluation.

  Returns:
    The results, some of which may be lazy; see `Context.force`.
  """
  env = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
  read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
  for eqn in jaxpr.eqns:
    ins = [read(v) for v in eqn.invars]
    rule = RULES.get(eqn.primitive.name, otherwise)
    with jax_versions.context_of(eqn):
      if any(isinstance(x, Lazy) for x in ins):
        outs = rule(eqn, ins, context)
        if outs is None:
          outs = otherwise(eqn, ins, context)
      else:
        outs = bind(eqn, ins)
    env.update(zip(eqn.outvars, outs))
  return [read(v) for v in jaxpr.outvars]


def bind(eqn: Any, ins: Sequence[Any]) -> list[Any]:
  """Evaluates an equation on arrays, as JAX itself would.

  It evaluates a jaxpr that contains only this equation. JAX then converts the
  parameters of primitives such as custom_jvp_call, which cannot be passed to
  ``eqn.primitive.bind`` as they are.
  """
  known = {v: x for v, x in zip(eqn.invars, ins)
           if not isinstance(v, core.Literal)}
  alone = core.Jaxpr((), [*known], eqn.outvars, [eqn], eqn.effects, _NO_NAMES)
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*known.values())


def otherwise(eqn: Any, ins: Sequence[Any], context: Context,
              by_parts: Callable[..., Any] | None = None) -> list[Any]:
  """Evaluates an equation that no rule handles.

  Args:
    eqn: The equation.
    ins: Its inputs, some of which are lazy.
    context: The state of this evaluation.
    by_parts: A function of the inputs that computes the same results with less
      memory, for CPUs. Defaults to None, for no such function.

  Returns:
    Expressions, if the operation has no inputs but weights and scalars and its
    results are large. Otherwise arrays, for which the lazy inputs are built.
  """
  op = Operation(eqn)
  ins = [None if isinstance(v, core.Literal) else x
         for v, x in zip(eqn.invars, ins)]
  shapes = [v.aval.shape for v in eqn.outvars]
  if _waits(eqn, ins, shapes):
    return [Expression(tuple(ins), op, i, shape)
            for i, shape in enumerate(shapes)]
  for x in ins:
    context.note(x, f'{eqn.primitive.name} uses all of it at once',
                 stacked=not _inner(eqn))
  def whole(ins):
    """Builds the lazy inputs."""
    return bind(eqn, [context.force(x) for x in ins])
  return context.consume(whole, op, ins, by_parts)


def _waits(eqn, ins, shapes) -> bool:
  """Returns whether to record an equation as an expression, to run it later.

  This is the case if its inputs are weights, scalars and literals, and its
  results are large. If it was run now, the large results would be in memory
  until they are used.
  """
  if any(x is not None and not isinstance(x, Lazy) and jnp.ndim(x)
         for x in ins):
    return False
  if any(math.prod(shape) < SMALL for shape in shapes):
    return False
  return not eqn.effects and not _inner(eqn)


def _inner(eqn) -> bool:
  """Returns whether an equation contains jaxprs or functions, as loops do."""
  for value in eqn.params.values():
    for x in value if isinstance(value, tuple) else (value,):
      if isinstance(x, (core.Jaxpr, core.ClosedJaxpr)) or callable(x):
        return True
  return False
