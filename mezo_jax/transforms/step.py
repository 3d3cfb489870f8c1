"""Compiles an optimizer and a loss into a training step."""

from collections.abc import Callable, Mapping
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
from mezo_jax.transforms.losses import accepted
from mezo_jax.transforms.rollouts import Recorded, RolledOut, Rollout


def make_step(tx: optax.GradientTransformation,
              value_fn: Callable[..., Any] | None, *,
              mesh: jax.sharding.Mesh | None = None,
              on_compile: Callable[..., Any] | None = None,
              part: tuple[int, int] | None = None,
              reward: Callable[..., Any] | None = None,
              at_once: int | None = None, build: bool = True) -> 'Step':
  r"""Returns a compiled training step.

  .. math:: g = \text{measure}(\theta, \mathcal{L}, \mathcal{B}), \qquad
            \theta \leftarrow \theta + \text{apply}(\theta, g)

  The step is a function ``step(params, state, batch, frozen=None, **more) ->
  (params, state, metrics)``, where ``more`` are further arguments of
  ``tx.update``.

  A step of MeZO consists of two programs, one for each half of the estimator.
  The program that evaluates losses is compiled for each shape of a batch. The
  program that updates the weights is compiled once. It depends only on the
  params, the state and the numbers g. A replay of recorded numbers runs the
  same program as training, so that both give bitwise the same weights on one
  kind of hardware. A step of backpropagation is one program.

  Args:
    tx: A transform that contains an estimator, such as `mezo_jax.mezo`.
    value_fn: The loss, ``value_fn(params, batch)``; see `mezo_jax.spsa`. A
      batch is any pytree that `jax.jit` accepts. Pass None for a step that only
      replays.
    mesh: The device mesh of the params, under which programs are traced.
      Defaults to None, for no mesh.
    on_compile: A function ``(batch, program, seconds)`` that is called after
      each compilation. The batch is None unless the program evaluates losses.
      Defaults to None, for no function.
    part: ``(i, r)`` for replica i of r, which evaluates part i of the
      directions. A replica calls ``g, value = step.losses(...)``, exchanges the
      results with the other replicas, and calls ``step.update(params, state, g,
      value)`` with the numbers of all. Defaults to None, for all directions.
    reward: A Python function that computes rewards on the host, between the two
      programs. ``value_fn(params, batch)`` then returns a tree of arrays
      instead of a loss, such as the tokens of B generated texts. It may also
      take ``step``, the number of the step, from which to derive random numbers
      that all members share.
      ``reward(outputs, batch)`` gets NumPy arrays with the axes [n, signs]
      before their own, and returns the rewards [n, signs, B], which are
      maximised: the losses are their negatives. It may return a pair of these
      and a dict of further metrics. Defaults to None, for a loss.
    at_once: With ``reward`` and over='batch', the number of members (pairs of a
      direction and a sign) that are evaluated together. Defaults to None, for
      all of them.
    build: With ``reward`` and over='scan', whether to build the weights of each
      member once, which takes the memory of a second copy of the params. If
      not, z is drawn again whenever a weight is used, for each generated token.
      Low-rank directions never build weights. Defaults to True.

  Returns:
    A `Step`. It donates ``params`` and ``state``, so do not use these arrays
    after the call. ``frozen`` is not donated. If it is given, ``value_fn`` gets
    ``mezo_jax.peft.join(params, frozen)`` as its params. The metrics are device
    arrays with the names ``loss``, ``projected_grad`` (or ``grad_norm``),
    ``skipped`` and ``skipped_in_a_row``. With ``reward``, there are also
    ``reward``, the mean, and ``reward_std`` and ``reward_best``, the standard
    deviation and the maximum over members of their mean rewards.

  Raises:
    ValueError: If an argument has the wrong type. The first call raises it if
      ``tx`` contains no estimator, or several.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1.

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> loss_fn = lambda params, batch: jnp.mean((batch @ params) ** 2)
    >>> tx = mezo_jax.mezo(1e-2, key=0)
    >>> step = mezo_jax.make_step(tx, loss_fn)
    >>> params = jnp.ones(3)
    >>> state = tx.init(params)
    >>> params, state, metrics = step(params, state, jnp.ones((2, 3)))
    >>> round(float(metrics['loss']), 2)
    9.0
  """
  not_finite.check_transform('tx', tx)
  for name, fn in (('value_fn', value_fn), ('on_compile', on_compile),
                   ('reward', reward)):
    if fn is not None:
      arguments.function(name, fn)
  if mesh is not None and not isinstance(mesh, jax.sharding.Mesh):
    raise ValueError(f'mesh must be a jax.sharding.Mesh, got {mesh!r}.')
  if part is not None:
    part = check_part(part)
  if at_once is not None:
    at_once = arguments.whole('at_once', at_once)
  arguments.boolean('build', build)
  return Step(tx, value_fn, mesh, on_compile, part, reward,
              functools.partial(Rollout, at_once=at_once, build=build))


class Step:
  """Runs the compiled programs of a training step; see `make_step`.

  Each program is compiled when it is first needed.

  Attributes:
    compiled: A dict of the compiled programs. Programs that evaluate losses
      have the shapes of their batch as key, the update has the key None, and
      `apply_accumulated` has the key 'apply', and the program that combines
      rewards has the key ('rewards', their shape).
  """

  def __init__(self, tx: Any, value_fn: Callable[..., Any] | None,
               mesh: jax.sharding.Mesh | None,
               on_compile: Callable[..., Any] | None,
               part: tuple[int, int] | None,
               reward: Callable[..., Any] | None,
               rollout: Callable[..., Rollout]) -> None:
    self.compiled: dict[Any, Any] = {}
    self._tx, self._value_fn, self._part = tx, value_fn, part
    self._mesh, self._on_compile = mesh, on_compile
    self._only = {} if part is None else {'part': part}
    self._reward, self._rollout = reward, rollout
    # The signs of the estimator, set when rollouts are traced, and the metrics
    # of the last rewards.
    self._signs, self._reward_metrics = (), {}
    # Shapes of projected_grad and value, set when the update is traced.
    self._shapes: list[Any] = []

  def __call__(self, params: Any, state: Any, batch: Any, frozen: Any = None,
               **more: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Makes a step; see `make_step` for the arguments and the results."""
    if self._part is not None:
      raise ValueError('part: this step evaluates only a part of the '
                       'directions. Call step.losses, and then step.update '
                       'with the numbers of all replicas.')
    out = self.losses(params, state, batch, frozen, **more)
    # The program of a whole step has three results, that of losses has two.
    if len(out) == 3:
      return out
    params, state, metrics = self.update(params, state, *out)
    return params, state, metrics | self._reward_metrics

  def losses(self, params: Any, state: Any, batch: Any, frozen: Any = None,
             **more: Any) -> tuple[Any, ...]:
    """Evaluates the losses of a step. No argument is donated.

    With `backprop`, the method makes the whole step instead. It then donates
    ``params`` and ``state`` and returns ``(params, state, metrics)``.

    Args:
      params: The params.
      state: State of the optimizer.
      batch: The batch, any pytree.
      frozen: Params that are not trained, or None.
      **more: Further arguments of ``tx.update``.

    Returns:
      ``(projected_grad, value)``: the numbers [n] and the mean loss [].
    """
    args = params, state, frozen, batch, more
    program = self._program(
        _shape((batch, more)), self._trace_losses, *args, batch=batch)
    out = program(*args)
    if self._reward is None:
      return out
    rewards = self._rewards(jax.device_get(out), batch)
    key = 'rewards', rewards.shape
    if key not in self.compiled:
      # This program is so small that `on_compile` is not called for it.
      self.compiled[key] = self._lower(self._trace(
          self._combined, (params, state, rewards))).compile()
    return self.compiled[key](params, state, -rewards)

  def _rewards(self, outputs, batch) -> np.ndarray:
    """Calls the reward function and records the metrics of its results.

    Returns:
      Rewards [n, signs, B].

    Raises:
      ValueError: If the function returns something else.
    """
    assert self._reward is not None  # the caller has checked it
    found, more = self._reward(outputs, batch), {}
    if isinstance(found, tuple) and len(found) == 2 and isinstance(
        found[1], Mapping):
      found, more = found
    rewards = np.asarray(found, np.float32)
    want = jax.tree.leaves(outputs)[0].shape[:2]
    if rewards.ndim != 3 or rewards.shape[:2] != want or not rewards.size:
      raise ValueError(
          'reward must return one number for each answer, of shape [n, signs, '
          f'B] = [{want[0]}, {want[1]}, B], or a pair of these and a dict of '
          f'metrics; it returned an array of shape {[*rewards.shape]}.')
    members = rewards.mean(-1)
    self._reward_metrics = {
        'reward': members.mean(), 'reward_std': members.std(),
        'reward_best': members.max(), **more}
    return rewards

  def update(self, params: Any, state: Any,
             projected_grad: jax.typing.ArrayLike, value: Any = jnp.nan
             ) -> tuple[Any, Any, dict[str, Any]]:
    """Makes a step from recorded numbers, without evaluating losses.

    Args:
      params: The params, which are donated.
      state: State of the optimizer, which is donated.
      projected_grad: The numbers [n] of the step.
      value: The mean loss of the step, for the metrics. Defaults to NaN, for an
        unknown loss.

    Returns:
      ``(params, state, metrics)``.
    """
    program = self._program(None, self._trace_update, params, state)
    # The compiled program itself transfers NumPy arrays to the devices.
    of_g, of_value = self._shapes
    return program(params, state,
                   _numbers('projected_grad', projected_grad, of_g),
                   _numbers('value', value, of_value))

  def apply_accumulated(self, params: Any, state: Any) -> tuple[Any, Any]:
    """Applies accumulated updates (``apply_every`` of `mezo_jax.mezo`).

    If the optimizer does not accumulate updates, both arguments are returned
    unchanged.

    Args:
      params: The params, which are donated.
      state: State of the optimizer, which is donated.

    Returns:
      ``(params, state)``.
    """
    if not pends(state):
      return params, state
    program = self._program(
        'apply', self._trace, self._apply, (params, state), 2)
    params, state, _ = program(params, state)
    return params, state

  def flush(self, params: Any, state: Any) -> tuple[Any, Any]:
    """Calls `apply_accumulated`. This is the old name of that method."""
    arguments.warn_renamed('flush', 'apply_accumulated')
    return self.apply_accumulated(params, state)

  def trace(self, params: Any, state: Any, batch: Any, frozen: Any = None,
            **more: Any) -> list[Any]:
    """Returns the traced programs of a step, without compiling them.

    The arguments are those of a call. They may be arrays, or
    `jax.ShapeDtypeStruct` with shardings.

    Returns:
      A list of `jax.stages.Traced`: the program of the losses, that of the
      update and, if the optimizer accumulates updates, that of
      `apply_accumulated`. For backpropagation, the list has one program, the
      whole step.
    """
    out = [self._trace_losses(params, state, frozen, batch, more)]
    if _replays(state):
      out.append(self._trace_update(params, state))
    if pends(state):
      out.append(self._trace(self._apply, (params, state), donated=2))
    return out

  def lower(self, params: Any, state: Any, batch: Any, frozen: Any = None,
            **more: Any) -> list[Any]:
    """Lowers the programs of `trace`, which documents the arguments."""
    programs = self.trace(params, state, batch, frozen, **more)
    return [self._lower(traced) for traced in programs]

  # --- the programs ---

  def _loss(self, frozen):
    """Returns the loss as a function of the params that are trained."""
    # No further arguments, since `tx.update` passes on those that it takes.
    return lambda params, batch: self._called(params, frozen, batch)

  def _called(self, params, frozen, batch, **more):
    """Calls the loss with the params of the whole model."""
    assert self._value_fn is not None  # `_trace_losses` has checked this
    if frozen is not None:
      params = trees.join(params, frozen)
    return self._value_fn(params, batch, **more)

  def _losses(self, params, state, frozen, batch, more):
    """Evaluates losses: the first program."""
    numbers = measure(self._tx, state, params, value_fn=self._loss(frozen),
                      batch=batch, **more, **self._only)
    return numbers.projected_grad, numbers.value

  def _rollouts(self, params, state, frozen, batch, more):
    """Computes rollouts, from which the host computes rewards."""
    assert self._value_fn is not None  # `_trace_losses` has checked this
    takes_step = accepted(self._value_fn, dict(step=0))
    def of_whole(params, batch, step):
      given = dict(step=step) if takes_step else {}
      return self._called(params, frozen, batch, **given)
    try:
      measure(self._tx, state, params, value_fn=self._rollout(of_whole),
              batch=batch, **more, **self._only)
    except RolledOut as e:
      self._signs = e.signs
      return e.outputs
    raise ValueError('tx: this estimator evaluates no loss, so it cannot be '
                     'used with a reward.')

  def _combined(self, params, state, recorded):
    """Turns the losses of rewards into numbers."""
    numbers = measure(self._tx, state, params, value_fn=Recorded(
        recorded, self._signs), **self._only)
    return numbers.projected_grad, numbers.value

  def _update(self, params, state, projected_grad, value):
    """Updates the weights from recorded numbers: the second program."""
    given = dict(projected_grad=projected_grad, value=value)
    def moved(params, state):
      """Records the numbers of a step, and applies all accumulated updates."""
      return _moved(self._tx, params, state, **given, apply=True)
    def noted(params, state):
      """Records the numbers of a step, without reading the weights."""
      _, state = self._tx.update(None, state, params, **given, apply=False)
      return params, state
    if pends(state):
      # Most steps only record coefficients. A branch of `lax.cond` that does
      # not touch the weights avoids reading and writing them.
      params, state = lax.cond(
          accumulate.is_due(state), moved, noted, params, state)
    else:
      params, state = _moved(self._tx, params, state, **given)
    return params, state, _metrics(state)

  def _apply(self, params, state):
    """Applies accumulated updates."""
    params, state = _moved(self._tx, params, state, apply_only=True)
    return params, state, _metrics(state)

  def _whole(self, params, state, frozen, batch, more):
    """Makes a step of backpropagation."""
    updates, state = self._tx.update(
        None, state, params, value_fn=self._loss(frozen), batch=batch, **more)
    return optax.apply_updates(params, updates), state, _metrics(state)

  # --- tracing and compiling them ---

  def _trace_losses(self, *args):
    """Traces the program of the losses, or of a whole step."""
    _, state, *_ = args
    _check_state(state)
    arguments.function('value_fn', self._value_fn)
    if self._reward is not None:
      if not _replays(state):
        raise ValueError('tx: backpropagation cannot be used with a reward.')
      return self._trace(self._rollouts, args)
    if _replays(state):
      return self._trace(self._losses, args)
    return self._trace(self._whole, args, donated=2)

  def _trace_update(self, params, state):
    """Traces the program that updates the weights."""
    _check_state(state)
    if not _replays(state):
      raise ValueError('tx: a step of backpropagation is one program and '
                       'cannot be replayed from recorded numbers.')
    last = field(state, 'projected_grad'), field(state, 'value')
    numbers = [jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=_place(x))
               for x in last]
    self._shapes = [x.shape for x in numbers]
    return self._trace(self._update, (params, state, *numbers), donated=2)

  def _trace(self, fn, args, donated=0):
    """Traces a program of a step.

    Args:
      fn: The function.
      args: Its arguments.
      donated: Number of the first arguments that are donated. As many results
        of the function must be their new values, which keep the shardings of
        the arguments. All other results are replicated.
    """
    out = None if self._mesh is None else sharding.replicated(self._mesh)
    if donated:
      out = (*jax.tree.map(_place, args[:donated]), out)
    jitted = jax.jit(
        fn, donate_argnums=range(donated), out_shardings=out)
    with self._on_mesh():
      return jitted.trace(*args)

  def _lower(self, traced):
    """Lowers a traced program under the mesh."""
    with self._on_mesh():
      return traced.lower()

  def _on_mesh(self):
    """Returns a context that sets the mesh, if there is one."""
    if self._mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self._mesh)

  def _program(self, shape, trace: Callable, *args, batch=None):
    """Returns a compiled program, which is compiled on first use."""
    if shape not in self.compiled:
      began = time.time()
      self.compiled[shape] = self._lower(trace(*args)).compile()
      if self._on_compile is not None:
        self._on_compile(batch, self.compiled[shape], time.time() - began)
    return self.compiled[shape]


def _moved(tx, params, state, **how):
  """Applies an update from recorded numbers.

  Stacks of weights in the memory of the host are copied to the device and back
  one layer at a time, so that the device never holds a whole stack.

  Args:
    tx: The optimizer.
    params: The params.
    state: State of the optimizer.
    **how: Arguments of ``tx.update``, such as ``projected_grad``.

  Returns:
    ``(params, state)`` after the update.
  """
  on_host = jax.tree.map(sharding.is_on_host, params)
  if not any(jax.tree.leaves(on_host)):
    updates, state = tx.update(None, state, params, **how)
    return optax.apply_updates(params, updates), state
  # Update the params on the device as usual. This also gives the next state.
  here = jax.tree.map(lambda x, host: None if host else x, params, on_host)
  away = jax.tree.map(lambda x, host: x if host else None, params, on_host)
  updates, new_state = tx.update(None, state, here, **how)
  here = optax.apply_updates(here, updates)
  depth = _depth(away, state)

  def one(layer, away):
    """Updates one layer of each stack in the memory of the host."""
    rows = sharding.fetched(jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, layer, 1), away))
    with streams.stacks_begin_at(layer):  # ``rows`` has only this layer
      # Each call returns the same state, which is ignored.
      updates, _ = tx.update(None, state, rows, **how)
    rows = optax.apply_updates(rows, updates)
    return jax.tree.map(lambda x, new: lax.dynamic_update_slice_in_dim(
        x, sharding.to_host(new), layer, 0), away, rows)
  away = lax.fori_loop(0, depth, one, away)
  params = jax.tree.map(lambda a, b: b if a is None else a, here, away,
                        is_leaf=lambda x: x is None)
  return params, new_state


def _depth(away, state) -> int:
  """Returns the number of layers of the stacks in the memory of the host.

  Raises:
    ValueError: If a leaf there is not a stack, if stacks have different numbers
      of layers, or if the optimizer has state of the size of the weights.
  """
  found = paths.named_leaves(away)
  depths = {x.shape[0] if is_stack else 0
            for (_, x), is_stack in zip(found, paths.stacked(away))}
  if len(depths) > 1 or 0 in depths:
    raise ValueError(
        'params in the memory of the host must all be stacks of the same '
        f'number of layers; found {sorted(path for path, _ in found)}.')
  shapes = {x.shape for _, x in found}
  if any(x.shape in shapes for x in jax.tree.leaves(state)):
    raise ValueError(
        'tx: weights in the memory of the host are updated layer by layer, '
        'which is impossible for an optimizer whose state is as large as the '
        'weights. Use mezo_jax.mezo.')
  return depths.pop()


def _shape(tree) -> tuple:
  """Returns a hashable key of the structure, shapes and dtypes of a tree.

  Trees with equal keys can use the same compiled program.
  """
  # A Python number has no shape.
  kinds = [(getattr(x, 'shape', type(x)), getattr(x, 'dtype', None),
            getattr(x, 'weak_type', False)) for x in jax.tree.leaves(tree)]
  return jax.tree.structure(tree), *kinds


def _numbers(name: str, x, shape: tuple) -> jax.Array | np.ndarray:
  """Converts recorded numbers to an array that a compiled program accepts.

  Args:
    name: Name of the argument, for the error message.
    x: The numbers.
    shape: The shape that the program was compiled for.

  Raises:
    ValueError: If the numbers do not have this shape.
  """
  try:
    if isinstance(x, jax.Array) and x.shape == shape:
      return x
    if x is not None and not isinstance(x, jax.Array):
      return np.asarray(x, np.float32).reshape(shape)
  except (TypeError, ValueError):
    pass
  raise ValueError(
      f'{name} must be float32 numbers of shape {[*shape]}, got {x!r}.')


def _check_state(state) -> None:
  """Raises ValueError if a state is not that of an optimizer with an estimator.
  """
  if field(state, 'notfinite_count') is None:
    raise ValueError(
        'tx or state: make_step needs an optimizer that contains an estimator, '
        'such as mezo_jax.mezo(...) or chain(mezo_jax.spsa(...), adam(...)), '
        'and the state that its init returned.')


def _place(x):
  """Returns the sharding of an array on a mesh, or None if it is on no mesh."""
  place = getattr(x, 'sharding', None)
  return place if isinstance(place, jax.NamedSharding) else None


def field(state: Any, name: str) -> Any:
  """Returns a field of the state of the estimator.

  States of other links, such as that of `optax.apply_if_finite`, are ignored,
  since they may have fields with the same names.

  Args:
    state: State of an optimizer.
    name: Name of the field.

  Returns:
    The field, or None if there is none.

  Raises:
    ValueError: If the optimizer contains several estimators.
  """
  found = not_finite.estimators(state)
  if len(found) > 1:
    raise ValueError(
        f'tx contains {len(found)} estimators, but make_step needs exactly '
        'one, as the first link of the chain.')
  return getattr(found[0], name, None) if found else None


def _replays(state) -> bool:
  """Returns whether steps can be replayed, unlike those of backpropagation."""
  return field(state, 'projected_grad') is not None


def pends(state: Any) -> bool:
  """Returns whether the optimizer accumulates updates (``apply_every``)."""
  is_ring = lambda x: isinstance(x, accumulate.PendingState)
  return any(map(is_ring, jax.tree.leaves(state, is_leaf=is_ring)))


def _metrics(state) -> dict[str, Any]:
  """Returns the metrics of the last step; see `make_step` for their names."""
  name = 'projected_grad' if _replays(state) else 'grad_norm'
  return {
      'loss': field(state, 'value'), name: field(state, name),
      'skipped': field(state, 'total_notfinite'),
      'skipped_in_a_row': field(state, 'notfinite_count')}
