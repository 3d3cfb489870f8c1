"""The training step, compiled."""

from collections.abc import Callable
import contextlib
import functools
import time
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax.core import arguments, paths, sharding, trees
from mezo_jax.directions import streams
from mezo_jax.transforms import accumulate, not_finite
from mezo_jax.transforms.estimator import check_part, measure


def make_step(tx: optax.GradientTransformation,
              value_fn: Callable[..., Any] | None, *,
              mesh: jax.sharding.Mesh | None = None,
              on_compile: Callable[..., Any] | None = None,
              part: tuple[int, int] | None = None) -> 'Step':
  """Returns ``step(params, state, batch, frozen=None, **more) -> params, state,
  metrics``, where ``more`` are further arguments of ``tx.update``.

  A step of MeZO is two programs, the two halves of the estimator. ``measure``
  is compiled for each shape of a batch. ``apply`` is compiled once. Its inputs
  are the weights, the state and the numbers of a step. So replaying recorded
  numbers moves the weights bitwise as training did. A step of backpropagation
  is one program.

  Args:
    tx: A transformation with an estimator in it, such as `mezo_jax.mezo`.
    value_fn: ``value_fn(params, batch)``; see `mezo_jax.spsa`. A batch is any
      tree that `jax.jit` takes. None for a step that only replays.
    mesh: The mesh of the params. Programs are traced under it.
    on_compile: ``(batch, program, seconds)``, called for each program that was
      compiled; the batch is None for all but the losses.
    part: For a replica, ``(i, r)``: the directions that it evaluates. It calls
      ``g, value = step.losses(...)``, sends these to the others, and calls
      ``step.update(params, state, g, value)`` with the numbers of all.

  Returns:
    A `Step`. ``params`` and ``state`` are donated, ``frozen`` is not: with it,
    ``value_fn`` gets ``mezo_jax.peft.join(params, frozen)``. Metrics are device
    arrays: ``loss``, ``projected_grad`` (or ``grad_norm``), ``skipped`` and
    ``skipped_in_a_row``.
  """
  if not (hasattr(tx, 'init') and hasattr(tx, 'update')):
    raise ValueError('tx must be an optax.GradientTransformation such as '
                     f'mezo_jax.mezo(...), got {tx!r}.')
  if value_fn is not None:
    arguments.function('value_fn', value_fn)
  if on_compile is not None:
    arguments.function('on_compile', on_compile)
  if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
    raise ValueError(f'mesh must be a jax.sharding.Mesh, got {mesh!r}.')
  if part is not None:
    part = check_part(part)
  return Step(tx, value_fn, mesh, on_compile, part)


class Step:
  """A compiled step; see `make_step`. Each program is compiled once, when it is
  needed first."""

  def __init__(self, tx: Any, value_fn: Callable[..., Any] | None,
               mesh: jax.sharding.Mesh | None,
               on_compile: Callable[..., Any] | None,
               part: tuple[int, int] | None) -> None:
    # By the shape of the batch; by None (the update) and by 'flush'.
    self.compiled: dict[Any, Any] = {}
    self._mesh, self._on_compile, self._part = mesh, on_compile, part
    only = {} if part is None else dict(part=part)

    def loss_of(frozen):
      assert value_fn is not None  # _trace_losses has asked
      loss_fn = value_fn
      return lambda params, batch: loss_fn(_join(params, frozen), batch)

    def losses(params, state, frozen, batch, more):
      numbers = measure(tx, state, params, value_fn=loss_of(frozen),
                        batch=batch, **more, **only)
      return numbers.projected_grad, numbers.value

    def update(params, state, projected_grad, value):
      moved = functools.partial(
          _moved, tx, projected_grad=projected_grad, value=value)
      def noted(params, state):  # counts the step without touching weights
        return params, tx.update(
            None, state, params, projected_grad=projected_grad, value=value,
            fold=False)[1]
      if pends(state):
        params, state = jax.lax.cond(
            accumulate.is_due(state), functools.partial(moved, fold=True),
            noted, params, state)
      else:
        params, state = moved(params, state)
      return params, state, _metrics(state)

    def flush(params, state):
      params, state = _moved(tx, params, state, flush=True)
      return params, state, _metrics(state)

    def whole(params, state, frozen, batch, more):
      updates, state = tx.update(
          None, state, params, value_fn=loss_of(frozen), batch=batch, **more)
      return optax.apply_updates(params, updates), state, _metrics(state)

    self._losses, self._update, self._whole = losses, update, whole
    self._flush, self._value_fn = flush, value_fn
    self._shapes = ()  # of the numbers of an update, when it is traced

  def __call__(self, params: Any, state: Any, batch: Any, frozen: Any = None,
               **more: Any) -> tuple[Any, Any, dict[str, Any]]:
    if self._part is not None:
      raise ValueError('a part of the directions makes no step: call losses, '
                       'and update with the numbers of all replicas.')
    out = self.losses(params, state, batch, frozen, **more)
    # A whole step has three results, losses have two.
    return out if len(out) == 3 else self.update(params, state, *out)

  def losses(self, params: Any, state: Any, batch: Any, frozen: Any = None,
             **more: Any) -> tuple[Any, ...]:
    """Returns ``projected_grad, value`` of a step; nothing is donated.

    With `backprop` it makes the whole step instead: it returns ``params, state,
    metrics``, and ``params`` and ``state`` are donated.
    """
    program = self._program(_shape((batch, more)), batch, lambda: (
        self._trace_losses(params, state, batch, frozen, more)))
    return program(params, state, frozen, batch, more)

  def update(self, params: Any, state: Any,
             projected_grad: jax.typing.ArrayLike, value: Any = jnp.nan
             ) -> tuple[Any, Any, dict[str, Any]]:
    """Makes a step from projected gradients [n], without evaluating losses."""
    program = self._program(
        None, None, lambda: self._trace_update(params, state))
    # The compiled program transfers arrays of the host by itself.
    numbers = [_numbers(name, x, shape) for name, x, shape in zip(
        ('projected_grad', 'value'), (projected_grad, value), self._shapes)]
    return program(params, state, *numbers)

  def flush(self, params: Any, state: Any) -> tuple[Any, Any]:
    """Returns ``params, state`` after applying accumulated updates, with
    ``fold_every`` of `mezo_jax.mezo`; otherwise as they are. Both are donated.
    """
    if not pends(state):
      return params, state
    return self._program('flush', None, lambda: self._trace_flush(
        params, state))(params, state)[:2]

  def trace(self, params: Any, state: Any, batch: Any, frozen: Any = None,
            **more: Any) -> list[Any]:
    """Returns the programs of a step, each a `jax.stages.Traced`.

    These are the losses, the update and, if updates accumulate, `flush`; one
    program for backpropagation. The arguments may be arrays, or shapes with
    shardings.
    """
    out = [self._trace_losses(params, state, batch, frozen, more)]
    if _replays(state):
      out.append(self._trace_update(params, state))
    if pends(state):
      out.append(self._trace_flush(params, state))
    return out

  def lower(self, params: Any, state: Any, batch: Any, frozen: Any = None,
            **more: Any) -> list[Any]:
    """Returns the programs of `trace`, lowered."""
    return [*map(self._lower, self.trace(
        params, state, batch, frozen, **more))]

  def compile(self, params: Any, state: Any, batch: Any, frozen: Any = None,
              **more: Any) -> None:
    """Compiles the programs of the first step without making it."""
    self._program(_shape((batch, more)), batch, lambda: self._trace_losses(
        params, state, batch, frozen, more))
    if _replays(state):
      self._program(None, None, lambda: self._trace_update(params, state))

  def _trace_losses(self, params, state, batch, frozen, more):
    _check_state(state)
    arguments.function('value_fn', self._value_fn)
    args = params, state, frozen, batch, more
    if _replays(state):
      return self._trace(self._losses, args)
    return self._trace(self._whole, args, (params, state))

  def _trace_update(self, params, state):
    _check_state(state)
    if not _replays(state):
      raise ValueError('a step of backpropagation is one program: it has no '
                       'update that could be made from recorded numbers.')
    numbers = [jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=_place(x))
               for x in (field(state, 'projected_grad'), field(state, 'value'))]
    self._shapes = [x.shape for x in numbers]
    return self._trace(self._update, (params, state, *numbers), (params, state))

  def _trace_flush(self, params, state):
    return self._trace(self._flush, (params, state), (params, state))

  def _trace(self, fn, args, kept=()):
    """Traces a program that donates ``kept``, its first arguments, and returns
    their new values with the same shardings."""
    out = self._mesh and sharding.replicated(self._mesh)
    if kept:
      out = (*jax.tree.map(_place, kept), out)
    jitted = jax.jit(
        fn, donate_argnums=range(len(kept)), out_shardings=out)
    with self._on_mesh():
      return jitted.trace(*args)

  def _lower(self, traced):
    with self._on_mesh():
      return traced.lower()

  def _on_mesh(self):
    return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(
        self._mesh)

  def _program(self, shape, batch, trace: Callable):
    if shape not in self.compiled:
      began = time.time()
      self.compiled[shape] = self._lower(trace()).compile()
      if self._on_compile:
        self._on_compile(batch, self.compiled[shape], time.time() - began)
    return self.compiled[shape]


def _moved(tx, params, state, **how):
  """Returns ``params, state`` after an update. Weights in the host's memory go
  to the device and back, one layer at a time."""
  def only(on_host):
    return jax.tree.map(
        lambda x: x if sharding.is_on_host(x) == on_host else None, params)
  offloads = any(map(sharding.is_on_host, jax.tree.leaves(params)))
  here = only(False) if offloads else params
  updates, new_state = tx.update(None, state, here, **how)
  here = optax.apply_updates(here, updates)
  if not offloads:
    return here, new_state
  away = only(True)
  depth = _depth(away, state)

  def one(layer, away):
    rows = sharding.fetched(jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, layer, 1), away))
    with streams.stacks_begin_at(layer):  # the rows begin with this layer
      updates, _ = tx.update(None, state, rows, **how)
    return jax.tree.map(
        lambda x, new: lax.dynamic_update_slice_in_dim(
            x, sharding.to_host(new), layer, 0),
        away, optax.apply_updates(rows, updates))
  away = lax.fori_loop(0, depth, one, away)
  return jax.tree.map(lambda a, b: b if a is None else a, here, away,
                      is_leaf=lambda x: x is None), new_state


def _depth(away, state) -> int:
  """Returns the number of layers of the stacks in the host's memory."""
  depths = {x.shape[0] if is_stack else 0 for (_, x), is_stack in zip(
      paths.named_leaves(away), paths.stacked(away))}
  shapes = {x.shape for x in jax.tree.leaves(away)}
  if len(depths) > 1 or 0 in depths:
    raise ValueError(
        'only stacks of the same number of layers may be in the memory of the '
        f'host; found {sorted(p for p, _ in paths.named_leaves(away))}.')
  if any(x.shape in shapes for x in jax.tree.leaves(state)):
    raise ValueError(
        'weights in the memory of the host are updated layer by layer, but '
        'this optimizer has state as large as the weights: use mezo_jax.mezo.')
  return depths.pop()


def _shape(tree) -> tuple:
  """Returns what a program that is compiled for a tree depends on."""
  def kind(x):
    if hasattr(x, 'shape') and hasattr(x, 'dtype'):
      return x.shape, x.dtype, getattr(x, 'weak_type', False)
    return type(x)  # a Python number
  return jax.tree.structure(tree), *map(kind, jax.tree.leaves(tree))


def _numbers(name: str, x, shape: tuple) -> jax.Array | np.ndarray:
  """Returns numbers as a program takes them."""
  try:
    if x is None or isinstance(x, jax.Array) and x.shape != shape:
      raise ValueError
    return x if isinstance(x, jax.Array) else np.reshape(
        np.asarray(x, np.float32), shape)
  except (TypeError, ValueError) as e:
    raise ValueError(f'{name} must be float32 numbers of the shape {[*shape]}, '
                     f'got {x!r}.') from e


def _check_state(state) -> None:
  """Raises ValueError for the state of something that is not an estimator."""
  if field(state, 'notfinite_count') is None:
    raise ValueError(
        'tx or state: a step needs an optimizer with an estimator in it, such '
        'as mezo_jax.mezo, or chain(mezo_jax.spsa(...), adam(...)), and the '
        'state that its init returned.')


def _place(x):
  """Returns an array's sharding on a mesh; None leaves it to the compiler."""
  place = getattr(x, 'sharding', None)
  return place if isinstance(place, jax.NamedSharding) else None


def _join(params, frozen):
  return params if frozen is None else trees.join(params, frozen)


def field(state: Any, name: str) -> Any:
  """Returns a field of the state of the estimator, or of accumulated updates.

  Other links, such as `optax.apply_if_finite`, may have fields of these names.

  Returns:
    The field, or None if there is none.

  Raises:
    ValueError: if there are several estimators.
  """
  is_own = lambda x: not_finite.is_estimator(x) or isinstance(
      x, accumulate.PendingState)
  found = []
  for x in jax.tree.leaves(state, is_leaf=is_own):
    if not is_own(x):
      continue
    if hasattr(x, name):
      found.append(getattr(x, name))
  if len(found) > 1:
    raise ValueError(
        f'tx has {len(found)} estimators, and a step needs one: the first link '
        'of the chain makes the updates, and the others work on them.')
  return found[0] if found else None


def _replays(state) -> bool:
  return field(state, 'projected_grad') is not None


def pends(state: Any) -> bool:
  """Returns whether updates accumulate before they are applied."""
  return field(state, 'pending') is not None


def _metrics(state) -> dict[str, Any]:
  name = 'projected_grad' if _replays(state) else 'grad_norm'
  return {
      'loss': field(state, 'value'), name: field(state, name),
      'skipped': field(state, 'total_notfinite'),
      'skipped_in_a_row': field(state, 'notfinite_count')}
