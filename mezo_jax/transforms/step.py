"""Compiles an optimizer and a loss into a training step."""

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
  if reward is not None:
    arguments.function('reward', reward)
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
      have the shapes of their batch as key, the update has the key None,
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
    self._mesh, self._on_compile, self._part = mesh, on_compile, part
    self._reward = reward
    # The signs of the estimator, set when rollouts are traced, and the metrics
    # of the last rewards.
    self._signs, self._reward_metrics = (), {}
    only = {} if part is None else dict(part=part)

    def loss_of(frozen):
      assert value_fn is not None  # `_trace_losses` has checked this
      loss_fn = value_fn
      return lambda params, batch: loss_fn(_join(params, frozen), batch)

    def rollout_of(frozen):
      assert value_fn is not None  # `_trace_losses` has checked this
      fn = value_fn
      def of_whole(params, batch, step):
        given = accepted(fn, dict(step=step))
        return fn(_join(params, frozen), batch, **given)
      return rollout(of_whole)

    def losses(params, state, frozen, batch, more):
      """Evaluates losses: the first program."""
      numbers = measure(tx, state, params, value_fn=loss_of(frozen),
                        batch=batch, **more, **only)
      return numbers.projected_grad, numbers.value

    def rollouts(params, state, frozen, batch, more):
      """Computes rollouts, from which the host computes rewards."""
      try:
        measure(tx, state, params, value_fn=rollout_of(frozen),
                batch=batch, **more, **only)
      except RolledOut as e:
        self._signs = e.signs
        return e.outputs
      raise ValueError('tx: this estimator evaluates no loss, so it cannot be '
                       'used with a reward.')

    def combined(params, state, recorded):
      """Turns the losses of rewards into numbers."""
      numbers = measure(tx, state, params, value_fn=Recorded(
          recorded, self._signs), **only)
      return numbers.projected_grad, numbers.value

    def update(params, state, projected_grad, value):
      """Updates the weights from recorded numbers: the second program."""
      moved = functools.partial(
          _moved, tx, projected_grad=projected_grad, value=value)
      def noted(params, state):
        """Records the numbers of a step, without reading the weights."""
        return params, tx.update(
            None, state, params, projected_grad=projected_grad, value=value,
            apply=False)[1]
      if pends(state):
        # Most steps only record coefficients. A branch of `lax.cond` that does
        # not touch the weights avoids reading and writing them.
        params, state = jax.lax.cond(
            accumulate.is_due(state), functools.partial(moved, apply=True),
            noted, params, state)
      else:
        params, state = moved(params, state)
      return params, state, _metrics(state)

    def apply_accumulated(params, state):
      """Applies accumulated updates."""
      params, state = _moved(tx, params, state, apply_only=True)
      return params, state, _metrics(state)

    def whole(params, state, frozen, batch, more):
      """Makes a step of backpropagation."""
      updates, state = tx.update(
          None, state, params, value_fn=loss_of(frozen), batch=batch, **more)
      return optax.apply_updates(params, updates), state, _metrics(state)

    self._losses = losses if reward is None else rollouts
    self._combined, self._update, self._whole = combined, update, whole
    self._apply, self._value_fn = apply_accumulated, value_fn
    # Shapes of projected_grad and value, set when the update is traced.
    self._shapes = ()

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
    program = self._program(_shape((batch, more)), batch, lambda: (
        self._trace_losses(params, state, batch, frozen, more)))
    out = program(params, state, frozen, batch, more)
    if self._reward is None:
      return out
    if not _replays(state):
      raise ValueError('tx: backpropagation cannot be used with a reward.')
    rewards = self._rewards(jax.device_get(out), batch)
    key = 'rewards', rewards.shape
    if key not in self.compiled:  # tiny, so that `on_compile` is not told
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
    if isinstance(found, tuple):
      found, more = found
    rewards = np.asarray(found, np.float32)
    want = jax.tree.leaves(outputs)[0].shape[:2]
    if rewards.ndim != 3 or rewards.shape[:2] != want:
      raise ValueError(
          'reward must return one number for each answer, of shape [n, signs, '
          f'B] = [{want[0]}, {want[1]}, B], but returned an array of shape '
          f'{[*rewards.shape]}.')
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
    program = self._program(
        None, None, lambda: self._trace_update(params, state))
    # The compiled program itself transfers NumPy arrays to the devices.
    numbers = [_numbers(name, x, shape) for name, x, shape in zip(
        ('projected_grad', 'value'), (projected_grad, value), self._shapes)]
    return program(params, state, *numbers)

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
    return self._program('apply', None, lambda: self._trace_apply(
        params, state))(params, state)[:2]

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
    out = [self._trace_losses(params, state, batch, frozen, more)]
    if _replays(state):
      out.append(self._trace_update(params, state))
    if pends(state):
      out.append(self._trace_apply(params, state))
    return out

  def lower(self, params: Any, state: Any, batch: Any, frozen: Any = None,
            **more: Any) -> list[Any]:
    """Lowers the programs of `trace`, which documents the arguments."""
    return [*map(self._lower, self.trace(
        params, state, batch, frozen, **more))]

  def compile(self, params: Any, state: Any, batch: Any, frozen: Any = None,
              **more: Any) -> None:
    """Compiles the programs of a step without running them.

    The arguments are those of `trace`.
    """
    self._program(_shape((batch, more)), batch, lambda: self._trace_losses(
        params, state, batch, frozen, more))
    if _replays(state):
      self._program(None, None, lambda: self._trace_update(params, state))

  def _trace_losses(self, params, state, batch, frozen, more):
    """Traces the program of the losses, or of a whole step."""
    _check_state(state)
    arguments.function('value_fn', self._value_fn)
    args = params, state, frozen, batch, more
    if _replays(state):
      return self._trace(self._losses, args)
    return self._trace(self._whole, args, (params, state))

  def _trace_update(self, params, state):
    """Traces the program that updates the weights."""
    _check_state(state)
    if not _replays(state):
      raise ValueError('tx: a step of backpropagation is one program and '
                       'cannot be replayed from recorded numbers.')
    numbers = [jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=_place(x))
               for x in (field(state, 'projected_grad'), field(state, 'value'))]
    self._shapes = [x.shape for x in numbers]
    return self._trace(self._update, (params, state, *numbers), (params, state))

  def _trace_apply(self, params, state):
    """Traces the program that applies accumulated updates."""
    return self._trace(self._apply, (params, state), (params, state))

  def _trace(self, fn, args, kept=()):
    """Traces a program of a step.

    Args:
      fn: The function.
      args: Its arguments.
      kept: Those arguments that are donated; they must be the first ones. The
        first results of the function must be their new values, which keep the
        shardings of the arguments. All other results are replicated.
    """
    out = self._mesh and sharding.replicated(self._mesh)
    if kept:
      out = (*jax.tree.map(_place, kept), out)
    jitted = jax.jit(
        fn, donate_argnums=range(len(kept)), out_shardings=out)
    with self._on_mesh():
      return jitted.trace(*args)

  def _lower(self, traced):
    """Lowers a traced program under the mesh."""
    with self._on_mesh():
      return traced.lower()

  def _on_mesh(self):
    """Returns a context that sets the mesh, if there is one."""
    return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(
        self._mesh)

  def _program(self, shape, batch, trace: Callable):
    """Returns a compiled program, which is compiled on first use."""
    if shape not in self.compiled:
      began = time.time()
      self.compiled[shape] = self._lower(trace()).compile()
      if self._on_compile:
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
  def only(on_host):
    """Replaces the params that are in the other memory by None."""
    return jax.tree.map(
        lambda x: x if sharding.is_on_host(x) == on_host else None, params)
  # Update the params on the device as usual. This also gives the next state.
  offloads = any(map(sharding.is_on_host, jax.tree.leaves(params)))
  here = only(False) if offloads else params
  updates, new_state = tx.update(None, state, here, **how)
  here = optax.apply_updates(here, updates)
  if not offloads:
    return here, new_state
  # Update the other params layer by layer. Each call of ``tx.update`` returns
  # the same state, which is ignored.
  away = only(True)
  depth = _depth(away, state)

  def one(layer, away):
    """Updates one layer of each stack in the memory of the host."""
    rows = sharding.fetched(jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, layer, 1), away))
    with streams.stacks_begin_at(layer):  # ``rows`` has only this layer
      updates, _ = tx.update(None, state, rows, **how)
    return jax.tree.map(
        lambda x, new: lax.dynamic_update_slice_in_dim(
            x, sharding.to_host(new), layer, 0),
        away, optax.apply_updates(rows, updates))
  away = lax.fori_loop(0, depth, one, away)
  return jax.tree.map(lambda a, b: b if a is None else a, here, away,
                      is_leaf=lambda x: x is None), new_state


def _depth(away, state) -> int:
  """Returns the number of layers of the stacks in the memory of the host.

  Raises:
    ValueError: If a leaf there is not a stack, if stacks have different numbers
      of layers, or if the optimizer has state of the size of the weights.
  """
  depths = {x.shape[0] if is_stack else 0 for (_, x), is_stack in zip(
      paths.named_leaves(away), paths.stacked(away))}
  shapes = {x.shape for x in jax.tree.leaves(away)}
  if len(depths) > 1 or 0 in depths:
    raise ValueError(
        'params in the memory of the host must all be stacks of the same '
        'number of layers; found '
        f'{sorted(p for p, _ in paths.named_leaves(away))}.')
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
  def kind(x):
    if hasattr(x, 'shape') and hasattr(x, 'dtype'):
      return x.shape, x.dtype, getattr(x, 'weak_type', False)
    return type(x)  # a Python number
  return jax.tree.structure(tree), *map(kind, jax.tree.leaves(tree))


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
    if x is None or isinstance(x, jax.Array) and x.shape != shape:
      raise ValueError
    return x if isinstance(x, jax.Array) else np.reshape(
        np.asarray(x, np.float32), shape)
  except (TypeError, ValueError) as e:
    raise ValueError(f'{name} must be float32 numbers of shape {[*shape]}, got '
                     f'{x!r}.') from e


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


def _join(params, frozen):
  """Returns the params of the whole model."""
  return params if frozen is None else trees.join(params, frozen)


def field(state: Any, name: str) -> Any:
  """Returns a field of the state of an estimator or of accumulated updates.

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
        f'tx contains {len(found)} estimators, but make_step needs exactly '
        'one, as the first link of the chain.')
  return found[0] if found else None


def _replays(state) -> bool:
  """Returns whether steps can be replayed, unlike those of backpropagation."""
  return field(state, 'projected_grad') is not None


def pends(state: Any) -> bool:
  """Returns whether the optimizer accumulates updates (``apply_every``)."""
  return field(state, 'pending') is not None


def _metrics(state) -> dict[str, Any]:
  """Returns the metrics of the last step; see `make_step` for their names."""
  name = 'projected_grad' if _replays(state) else 'grad_norm'
  return {
      'loss': field(state, 'value'), name: field(state, name),
      'skipped': field(state, 'total_notfinite'),
      'skipped_in_a_row': field(state, 'notfinite_count')}
