r"""An estimator in two halves: losses become numbers, numbers become updates.

.. math::
  g = \text{measure}(\theta, \mathcal{L}, \mathcal{B}), \qquad
  u = \text{apply}(\theta, g)

``measure`` evaluates losses and never touches the weights. ``apply`` moves the
weights and never evaluates a loss. Training is ``apply(measure(...))``. Replay,
replicas and a resumed run call ``apply`` alone, with numbers that were recorded
or received.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, cast, NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax.core import arguments, paths, sharding
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions import noise
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import direction, zeros
from mezo_jax.transforms import chain, losses
from mezo_jax.transforms.combine import as_combine, Combine, two_sided
from mezo_jax.transforms.evaluate_points import (
  check_displacement,
  check_over,
  estimate,
  loss_at,
)
from mezo_jax.transforms.types import ZerothOrderTransformation

# --- state ------------------------------------------------------------------


class SpsaState(NamedTuple):
  """State of an estimator."""

  count: jax.Array  # shape=(), dtype=int32: steps made, skipped ones included
  key: jax.Array  # shape=(), dtype=key<fry>: of the whole run
  value: jax.Array  # shape=(), dtype=float32: mean loss of the last step
  projected_grad: jax.Array  # dtype=float32: the numbers of the last step
  notfinite_count: jax.Array  # shape=(), dtype=int32: skipped in a row
  total_notfinite: jax.Array  # shape=(), dtype=int32: skipped in all

  @property
  def memory(self) -> tuple[()]:
    """Returns an empty memory: this estimator keeps nothing between steps."""
    return ()


class SpsaStateWithMemory(NamedTuple):
  """State of an estimator with memory. It has the attributes of `SpsaState`."""

  spsa: SpsaState
  memory: Any

  @property
  def count(self) -> jax.Array:  # overrides the method of tuples
    return self.spsa.count

  def __getattr__(self, name: str) -> Any:
    return getattr(self.spsa, name)


class Numbers(NamedTuple):
  """The result of `measure`: all that `apply` knows of the losses.

  Attributes:
    value: Mean loss, float32 [].
    projected_grad: Numbers from which `apply` makes the update, float32 [size].
      For `mezo_jax.spsa` they are the projected gradient of each direction.
  """

  value: Any
  projected_grad: Any


class Measured(Exception):
  """Carries the numbers of a step out of a chain; see `measure`."""

  def __init__(self, numbers: Numbers) -> None:
    super().__init__('raised for `measure` alone')
    self.numbers = numbers


# --- SPSA -------------------------------------------------------------------


class SampleOptions(TypedDict):
  """Options of `mezo_jax.spsa` that every variant has."""

  key: jax.Array | int
  directions: NotRequired[Directions | str]
  num_samples: NotRequired[int | None]
  micro_batches: NotRequired[int | None]
  dtype: NotRequired[jax.typing.DTypeLike | None]


class LossOptions(SampleOptions):
  """Options of a variant that combines losses in its own way."""

  over: NotRequired[str]


class SpsaOptions(LossOptions):
  """Options of a variant that starts from projected gradients."""

  combine: NotRequired[Combine | str]


@dataclasses.dataclass(frozen=True)
class Spsa:
  """The two halves of `mezo_jax.spsa`, which documents the fields.

  A variant calls them in its own halves, or replaces one of them.
  """

  eps: Any = 1e-3
  _: dataclasses.KW_ONLY
  key: Any
  directions: Any = Normal()
  combine: Any = two_sided
  num_samples: Any = None
  over: str = 'scan'
  micro_batches: Any = None
  dtype: Any = None

  def __post_init__(self) -> None:
    def put(name, value):
      object.__setattr__(self, name, value)
    for name in ('num_samples', 'micro_batches'):
      value = getattr(self, name)
      put(name, 1 if value is None else arguments.whole(name, value))
    put('directions', as_directions(self.directions))
    put('combine', as_combine(self.combine))
    put('eps', arguments.rate('eps', self.eps, above=0))
    noise.check_key(self.key)
    arguments.floating('dtype', self.dtype)
    check_over(self.over)
    if self.over == 'rows' and self.num_samples % self.micro_batches:
      raise ValueError(
          f"with over='rows' micro_batches={self.micro_batches} must divide "
          f'num_samples={self.num_samples}.')

  def along(self, **changes: Any) -> 'Spsa':
    """Returns the same with changed directions.

    Args:
      **changes: Fields of `mezo_jax.Directions`, such as ``mask``.
    """
    return dataclasses.replace(
        self, directions=dataclasses.replace(self.directions, **changes))

  def one_eps(self) -> 'Spsa':
    """Returns itself.

    Raises:
      ValueError: For groups of eps, since the projected gradients in a state
        are those of the first group.
    """
    if isinstance(self.eps, Mapping):
      raise ValueError('eps: this variant has one projected gradient per '
                       'direction and cannot have groups of eps: give one '
                       'number or schedule.')
    return self

  def eps_at(self, state: Any) -> Any:
    """Returns eps of a step, float32; for groups an OrderedDict of them."""
    def now(eps):
      return jnp.asarray(arguments.at(eps, state.count), jnp.float32)
    if isinstance(self.eps, Mapping):
      return OrderedDict((group, now(e)) for group, e in self.eps.items())
    return now(self.eps)

  def z(self, state: Any) -> Displacement:
    """Returns the n directions of a step, each with the coefficient 1."""
    keys = self.directions.keys(state.key, state.count, self.num_samples)
    return Displacement(keys, jnp.ones(self.num_samples, jnp.float32))

  def losses(self, state: Any, params: Any, value_fn: Callable[..., Any],
             batch: Mapping[str, Any], *, signs: tuple[float, ...],
             around: Displacement | None = None, part: Any = None) -> jax.Array:
    r"""Returns the losses at :math:`\theta + s \epsilon z_j`, [n, signs]."""
    z = self.z(state)
    if part is not None:
      z = jax.tree.map(lambda x: x[_part(part, self)], z)
    return estimate(
        value_fn, params, z, self.eps_at(state), self.directions, signs=signs,
        over=self.over, micro_batches=self.micro_batches, around=around,
        batch=batch)

  def loss_at(self, params: Any, value_fn: Callable[..., Any],
              batch: Mapping[str, Any]) -> Callable[[Displacement], jax.Array]:
    """Returns a function from a displacement to the loss of the batch there."""
    return loss_at(value_fn, params, self.directions, batch, self.micro_batches)

  def measure(self, state: Any, params: Any, value_fn: Callable[..., Any],
              batch: Mapping[str, Any], *, around: Displacement | None = None,
              part: Any = None) -> tuple[Any, jax.Array]:
    """Returns the mean loss and the projected gradients [n]."""
    losses = self.losses(state, params, value_fn, batch, around=around,
                         part=part, signs=self.combine.signs)
    value, g = self.combine.apply(losses, _first(self.eps_at(state)))
    if part is not None:
      g = jnp.full(self.num_samples, jnp.nan, g.dtype).at[
          _part(part, self)].set(g)
    return value, g

  def apply(self, state: Any, params: Any, numbers: Numbers) -> Any:
    r"""Returns :math:`\frac{1}{n} \sum_j g_j z_j`, float32."""
    g = numbers.projected_grad
    mean = jnp.where(jnp.isfinite(g), g, 0.0) / self.num_samples
    eps = self.eps_at(state)
    of_group = jax.tree.map(lambda e: mean * (_first(eps) / e), eps)
    return direction(params, self.z(state).times(of_group), self.directions,
                     dtype=jnp.float32)


def _first(eps) -> jax.Array:
  """Returns the eps to which projected gradients refer: that of the first
  group."""
  return jax.tree.leaves(eps)[0]


def _part(part: tuple[int, int], spsa: Spsa) -> slice:
  """Returns which of the n directions are evaluated."""
  n = spsa.num_samples
  i, parts = check_part(part)
  if n % parts:
    raise ValueError(f'part={part} of num_samples={n} directions: the number '
                     'of parts must divide them.')
  if parts > 1 and spsa.combine.needs_all:
    raise ValueError(
        f'part={part} evaluates some of the directions, and {spsa.combine!r} '
        'may need the losses of all, as fzoo does for their deviation. If each '
        'coefficient depends on the losses of its own direction alone, say '
        'Combine(..., needs_all=False).')
  return slice(i * n // parts, (i + 1) * n // parts)


def check_part(part: Any) -> tuple[int, int]:
  """Returns ``(i, r)``, part i of r.

  Raises:
    ValueError: If it is something else.
  """
  is_pair = isinstance(part, (tuple, list)) and len(part) == 2 and all(
      isinstance(x, (int, np.integer)) and not isinstance(x, bool)
      for x in part)
  if not is_pair or not 0 <= part[0] < part[1]:
    raise ValueError('part must be (i, r), part number i of r, with i from 0 '
                     f'to r - 1, got {part!r}.')
  return int(part[0]), int(part[1])


# --- the transform ----------------------------------------------------------


class Estimator(ZerothOrderTransformation):
  """An optax transform that evaluates losses itself, in two halves.

  ``update`` is ``apply(measure(...))``; with ``projected_grad=`` it is
  ``apply`` alone, which is the replay path of any chain.

  Attributes:
    options: The `Spsa` that it was made from.
  """

  options: Spsa
  _made: dict[str, Any]

  def __new__(
      cls, options: Spsa, *, measure: Callable[..., Any] | None = None,
      apply: Callable[..., Any] | None = None,
      memory: Callable[[Any], Any] | None = None, size: int | None = None,
      check: Callable[[Any], None] | None = None) -> 'Estimator':
    """Makes the transform of two halves.

    Args:
      options: SPSA, whose halves are used where none is given.
      measure: ``(state, params, value_fn, batch, **where) -> value, numbers``,
        with ``size`` numbers, where ``batch`` has all further arguments of
        ``update``. It may read ``state.memory`` and cannot change it. If the
        value is not finite, all numbers become NaN; None stands for a value
        that is not reported. ``where`` may have ``around``, the accumulated
        updates around which losses are evaluated (`mezo_jax.mezo` with
        ``fold_every``), and ``part``, the part of the directions that this
        replica evaluates. Pass it on to `Spsa.measure` or `Spsa.losses`, or
        leave it out of the arguments if the estimator supports neither.
      apply: ``(state, params, Numbers) -> updates``, float32; with a memory,
        which needs it, ``-> updates, memory``. It may depend on nothing else,
        since a replayed step has only the numbers that were recorded, and
        perhaps no value (it is NaN then). The numbers of a step that is skipped
        are NaN: `unless_skipped` keeps the memory as it was.
      memory: Returns ``state.memory`` before the first step, from params.
        Defaults to None, for no memory.
      size: Length of the numbers. Defaults to the number of directions.
      check: Raises ValueError for params that cannot be used.
    """
    if memory is not None and apply is None:
      raise ValueError('an estimator with a memory needs apply, which returns '
                       'updates and the next memory.')
    made = dict(measure=measure, apply=apply, memory=memory, size=size,
                check=check)
    self = super().__new__(
        cls, lambda params: self._init(params), lambda *args, **kwargs: (
            self._update(*args, **kwargs)))
    self.options, self._made = options, made
    return self

  def __getnewargs_ex__(self) -> tuple[tuple[Any], dict[str, Any]]:
    return (self.options,), self._made  # for copies

  @property
  def size(self) -> int:
    """Returns how many numbers a step has."""
    return self._made['size'] or self.options.num_samples

  @property
  def is_linear(self) -> bool:
    """Returns whether updates are the sum of the numbers times z."""
    return self._made['apply'] is None

  def in_float32(self) -> 'Estimator':
    """Returns the same estimator with float32 updates."""
    options = dataclasses.replace(self.options, dtype=jnp.float32)
    return Estimator(options, **self._made)

  def measure(self, state: Any, params: Any, value_fn: Callable[..., Any],
              batch: Mapping[str, Any], *, around: Displacement | None = None,
              part: tuple[int, int] | None = None) -> Numbers:
    """Evaluates losses; the first half of a step.

    Args:
      state: State of the estimator.
      params: The weights.
      value_fn: The loss; see `mezo_jax.spsa`.
      batch: Arguments of ``value_fn``, by name.
      around: A displacement from ``params`` to where losses are evaluated.
      part: ``(i, r)`` to evaluate part i of r of the directions.
    """
    if around is not None:
      check_displacement('around', around)
    measure = self._made['measure'] or self.options.measure
    where = {'around': around, 'part': part}
    where = {name: x for name, x in where.items() if x is not None}
    for name in where.keys() - losses.accepted(measure, where).keys():
      raise ValueError(
          f'this estimator does not support {name}=, since its measure has no '
          'such argument; fold_every of mezo needs around=.')
    value, g = measure(state, params, value_fn, batch, **where)
    if value is None:
      value = jnp.nan
    else:
      g = jnp.where(jnp.isfinite(value), g, jnp.nan)
    return Numbers(jnp.float32(value), g.astype(jnp.float32))

  def apply(self, state: Any, params: Any, numbers: Numbers
            ) -> tuple[Any, Any]:
    """Turns numbers into updates; the second half of a step.

    Args:
      state: State of the estimator.
      params: The weights.
      numbers: From `measure`, or recorded.

    Returns:
      The updates and the next state.
    """
    numbers = self.checked(*numbers)
    g = numbers.projected_grad
    valid = numbers._replace(
        projected_grad=jnp.where(jnp.all(jnp.isfinite(g)), g, jnp.nan))
    apply, memory = self._made['apply'] or self.options.apply, ()
    if self._made['memory'] is None:
      updates = apply(state, params, valid)
    else:
      updates, memory = apply(state, params, valid)
    if self.options.dtype is None:
      updates = paths.map_named(_as_param, params, updates)
    elif self.options.dtype != jnp.float32:
      updates = jax.tree.map(
          lambda u: u.astype(self.options.dtype), updates)
    return updates, counted(state, numbers, memory)

  def checked(self, value: Any, projected_grad: Any) -> Numbers:
    """Returns numbers that were recorded as float32 arrays.

    Raises:
      ValueError: If they are not as many as this estimator has.
    """
    g = arguments.array('projected_grad', projected_grad)
    if g.shape != (self.size,):
      raise ValueError(
          f'projected_grad must have the shape [{self.size}], the numbers of '
          'a step in the order in which the state has them, got '
          f'{list(g.shape)}.')
    return Numbers(jnp.float32(value), g.astype(jnp.float32))

  def _init(self, params):
    arguments.tree('params', params)
    _check_holes(params)
    if self._made['check'] is not None:
      self._made['check'](params)
    self.options.directions.selected(params)
    state = SpsaState(
        count=jnp.zeros([], jnp.int32),
        key=noise.state_key(self.options.key),  # the caller's is not donated
        value=jnp.zeros([], jnp.float32),
        projected_grad=jnp.zeros([self.size], jnp.float32),
        notfinite_count=jnp.zeros([], jnp.int32),
        total_notfinite=jnp.zeros([], jnp.int32))
    if self._made['memory'] is not None:
      state = SpsaStateWithMemory(state, self._made['memory'](params))
    return sharding.beside(state, params)

  def _update(self, updates, state, params=None, *, value_fn=None,
              projected_grad=None, around=None, part=None, measure_only=False,
              **batch):
    check_update(updates, state, params, value_fn, projected_grad)
    if value_fn is None:
      return self.apply(state, params, Numbers(
          batch.get('value', jnp.nan), projected_grad))
    arguments.check_names(value_fn, around=around, part=part,
                          measure_only=measure_only or None)
    numbers = self.measure(
        state, params, value_fn, batch, around=around, part=part)
    if measure_only:
      raise Measured(numbers)
    # Make the key depend on the loss. Otherwise XLA finds the same z in both
    # halves and keeps it in between, as large as the model.
    later = with_key(state, after(state.key, numbers.value))
    updates, new = self.apply(later, params, numbers)
    return updates, with_key(new, state.key)


def measure(tx: optax.GradientTransformation, state: Any, params: Any,
            **given: Any) -> Numbers:
  """Evaluates the losses of a chain with an estimator in it.

  optax calls all links of a chain, so the numbers leave it as an exception,
  before the links after the estimator are traced for nothing.

  Args:
    tx: A transform with an estimator in it.
    state: State of ``tx``.
    params: The weights.
    **given: Further arguments of ``tx.update``, with ``value_fn``.
  """
  try:
    optax.with_extra_args_support(tx).update(
        cast(Any, None), state, params, measure_only=True, **given)
  except Measured as e:
    return e.numbers
  raise ValueError('tx has no estimator in it, such as mezo_jax.spsa.')


def counted(state: Any, numbers: Numbers, memory: Any = ()) -> Any:
  """Returns the state after a step with these numbers."""
  old = getattr(state, 'spsa', state)
  finite = jnp.all(jnp.isfinite(numbers.projected_grad))
  new = SpsaState(
      count=cast(jax.Array, optax.safe_increment(old.count)),
      key=old.key,
      value=numbers.value,
      projected_grad=numbers.projected_grad,
      notfinite_count=jnp.where(finite, 0, old.notfinite_count + 1),
      total_notfinite=old.total_notfinite + (1 - finite.astype(jnp.int32)))
  return new if old is state else SpsaStateWithMemory(new, memory)


def unless_skipped(numbers: Numbers, new: Any, old: Any) -> Any:
  """Returns ``new``, or ``old`` in a step that is skipped."""
  kept = jnp.isfinite(numbers.projected_grad[0])
  return jax.tree.map(lambda a, b: jnp.where(kept, a, b), new, old)


def with_key(state: Any, key: jax.Array) -> Any:
  """Returns a state with another key."""
  if isinstance(state, SpsaState):
    return state._replace(key=key)
  return state._replace(spsa=state.spsa._replace(key=key))


def after(key: jax.Array, value: jax.Array) -> jax.Array:
  """Returns a key that depends on ``value`` for the compiler."""
  return Displacement(key, 1.0).after(value).keys


def _as_param(path, x, update):
  del path
  if is_codes(x) or paths.is_floating(x):
    return update.astype(x.dtype if is_codes(x) else jnp.result_type(x))
  return zeros(x)


# --- checks -----------------------------------------------------------------


def _check_holes(params):
  is_hole = lambda x: isinstance(x, optax.MaskedNode)
  if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
    raise ValueError(
        'spsa was given params with holes (optax.MaskedNode), on which '
        'value_fn would compute a wrong loss. Do not wrap it in optax.masked '
        'or optax.partition: pass its own mask instead, '
        'directions=mezo_jax.Normal(mask=...).')


def check_update(updates: Any, state: Any, params: Any, value_fn: Any,
                 projected_grad: Any) -> None:
  """Raises ValueError for arguments of ``update`` that do not fit."""
  if params is None:
    raise ValueError(
        'spsa needs params: tx.update(None, state, params, value_fn=...).')
  if value_fn is None and projected_grad is None:
    raise ValueError(
        'spsa needs value_fn: call tx.update(None, state, params, '
        'value_fn=loss_fn, batch=batch). Wrappers that drop extra arguments, '
        "as flax's TrainState.apply_gradients does, cannot be used.")
  if value_fn is not None and projected_grad is not None:
    raise ValueError(
        'spsa was given both value_fn and projected_grad: give value_fn to '
        'evaluate losses, or projected_grad to make an update without them.')
  if value_fn is not None:
    arguments.function('value_fn', value_fn)
  if not isinstance(state, SpsaState | SpsaStateWithMemory):
    raise ValueError('state must be the SpsaState that tx.init returned, got a '
                     f'{type(state).__name__}.')
  _check_holes(params)
  chain.check_first('spsa')
  if jax.tree.leaves(updates):  # nnx.Optimizer makes an empty tree of None
    raise ValueError(
        'spsa makes its own updates and was handed some: it must be first in '
        'the chain and called with updates=None. A wrapper that wants a tree '
        'of updates goes around what follows, not around the estimate: '
        'chain(spsa(...), MultiSteps(rest, k).gradient_transformation()), '
        'chain(spsa(...), apply_if_finite(rest, 5)). To accumulate, use '
        'micro_batches=k.')
