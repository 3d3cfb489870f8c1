r"""Defines estimators, which split a step into two halves.

.. math::
  g = \text{measure}(\theta, \mathcal{L}, \mathcal{B}), \qquad
  u = \text{apply}(\theta, g)

``measure`` evaluates losses and returns a few numbers g. It does not change the
weights. ``apply`` turns the numbers into updates u. It does not evaluate a
loss. Training calls both. To replay a step, only ``apply`` is called, with
recorded numbers. Replicas call it with numbers that they received.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, cast, NamedTuple, NotRequired, TypedDict

import jax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, paths, sharding
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions import noise
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import direction, perturbed, zeros
from mezo_jax.transforms import chain, losses, rollouts
from mezo_jax.transforms.combine import as_combine, Combine, two_sided
from mezo_jax.transforms.evaluate_points import (
  check_displacement,
  check_over,
  estimate,
  Over,
)
from mezo_jax.transforms.types import ZerothOrderTransformation

# --- state ------------------------------------------------------------------


class SpsaState(NamedTuple):
  r"""Holds the state of `mezo_jax.spsa` and of most variants.

  For `mezo_jax.spsa`, ``projected_grad`` has the scalars

  .. math:: g_j = (\ell_j^+ - \ell_j^-) / (2 \epsilon).

  Attributes:
    count: Number of steps so far, including skipped steps. int32 [].
    key: Key of the whole run, a typed threefry2x32 key [].
    value: Mean loss of the last step, float32 []. NaN if it was not reported.
    projected_grad: Numbers of the last step, float32 [size]. Pass them to
      ``update(..., projected_grad=)`` to replay the step.
    notfinite_count: Number of consecutive skipped steps up to now, int32 [].
    total_notfinite: Number of skipped steps so far, int32 [].

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1.

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> tx = mezo_jax.spsa(1e-3, key=0, num_samples=4)
    >>> state = tx.init(jnp.zeros(3))
    >>> int(state.count), state.projected_grad.shape
    (0, (4,))
  """

  count: jax.Array
  key: jax.Array
  value: jax.Array
  projected_grad: jax.Array
  notfinite_count: jax.Array
  total_notfinite: jax.Array

  @property
  def memory(self) -> tuple[()]:
    """Returns an empty tuple, since this state has no memory."""
    return ()


class SpsaStateWithMemory(NamedTuple):
  """Holds the state of an estimator that keeps a memory between steps.

  It also has the attributes of `SpsaState`, to read them directly.

  Attributes:
    spsa: The state without the memory.
    memory: Any pytree, as ``apply`` of the estimator returned it.
  """

  spsa: SpsaState
  memory: Any

  # Tuples have a method `count`, so `__getattr__` is not called for this name.
  @property
  def count(self) -> jax.Array:
    return self.spsa.count

  def __getattr__(self, name: str) -> Any:
    """Returns a field of the state without the memory."""
    return getattr(self.spsa, name)


class Numbers(NamedTuple):
  r"""Holds the result of `Estimator.measure`, the input of `Estimator.apply`.

  .. math:: g = \text{measure}(\theta, \mathcal{L}, \mathcal{B}), \qquad
            u = \text{apply}(\theta, g)

  Attributes:
    value: Mean loss of the step, float32 []. NaN if it is not reported.
    projected_grad: The numbers g from which ``apply`` computes the update,
      float32 [size]. For `mezo_jax.spsa`, they are the projected gradients of
      the n directions. They are NaN if ``value`` is not finite, and the step is
      then skipped.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1, ``projected_grad``.

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> tx, params = mezo_jax.spsa(1e-3, key=0), jnp.ones(3)
    >>> numbers = tx.measure(tx.init(params), params, jnp.sum, {})
    >>> numbers.projected_grad.shape
    (1,)
  """

  value: Any
  projected_grad: Any


class Measured(Exception):
  """Carries the numbers of a step out of an optax chain; see `measure`."""

  def __init__(self, numbers: Numbers) -> None:
    super().__init__('this exception is caught by mezo_jax.transforms.estimator'
                     '.measure; measure_only= is not for other callers.')
    self.numbers = numbers


# --- SPSA -------------------------------------------------------------------


class SampleOptions(TypedDict):
  """Lists the options of `mezo_jax.spsa` that every variant has."""

  key: jax.Array | int
  directions: NotRequired[Directions | str]
  num_samples: NotRequired[int | None]
  micro_batches: NotRequired[int | None]
  dtype: NotRequired[jax.typing.DTypeLike | None]


class LossOptions(SampleOptions):
  """Lists the options of a variant that has no ``combine`` option."""

  over: NotRequired[Over]


class SpsaOptions(LossOptions):
  """Lists the options of a variant that also has a ``combine`` option."""

  combine: NotRequired[Combine | str]


@dataclasses.dataclass(frozen=True)
class Spsa:
  """Implements the two halves of `mezo_jax.spsa`, which documents the fields.

  A variant replaces one or both of these halves by functions of its own. These
  functions may call the methods of this class.
  """

  eps: Any = 1e-3
  _: dataclasses.KW_ONLY
  key: Any
  directions: Any = Normal()
  combine: Any = two_sided
  num_samples: Any = None
  over: Over = 'scan'
  micro_batches: Any = None
  dtype: Any = None

  def __post_init__(self) -> None:
    """Checks the fields, and replaces names by the objects they stand for."""
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
    """Returns a copy whose directions have some fields replaced.

    Args:
      **changes: Fields of `mezo_jax.Directions` by name, such as ``mask``.
    """
    return dataclasses.replace(
        self, directions=dataclasses.replace(self.directions, **changes))

  def one_eps(self) -> 'Spsa':
    """Checks that eps has no groups, and returns this object.

    A variant that changes projected gradients in a nonlinear way needs this
    check, since projected gradients are computed for the first group only.

    Raises:
      ValueError: If eps has groups.
    """
    if isinstance(self.eps, Mapping):
      raise ValueError('eps: this variant does not support groups, since it '
                       'has one projected gradient per direction; pass one '
                       'number or schedule.')
    return self

  def eps_at(self, state: Any) -> Any:
    """Returns eps at the step of a state, float32 [].

    For groups, returns an OrderedDict with the eps of each group.
    """
    def now(eps):
      return jnp.asarray(arguments.at(eps, state.count), jnp.float32)
    if isinstance(self.eps, Mapping):
      return OrderedDict((group, now(e)) for group, e in self.eps.items())
    return now(self.eps)

  def z(self, state: Any, count: Any = None) -> Displacement:
    """Returns the n directions of a step, with coefficients of 1.

    Args:
      state: State of the estimator.
      count: Number of the step. Defaults to None, for the step of the state.
    """
    count = state.count if count is None else count
    keys = self.directions.keys(state.key, count, self.num_samples)
    return Displacement(keys, jnp.ones(self.num_samples, jnp.float32))

  def losses(self, state: Any, params: Any, value_fn: Callable[..., Any],
             batch: Mapping[str, Any], *, signs: tuple[float, ...],
             around: Displacement | None = None, part: Any = None,
             of_rows: bool = False) -> jax.Array:
    r"""Returns the losses at :math:`\theta + s \epsilon z_j`.

    Args:
      state: State of the estimator.
      params: The params.
      value_fn: The loss; see `mezo_jax.spsa`.
      batch: Arguments of ``value_fn``, by name.
      signs: The values of s.
      around: A displacement that is added to the params. Defaults to None.
      part: ``(i, r)``, to evaluate only part i of r of the directions. Defaults
        to None, for all directions.
      of_rows: Whether to return the losses of rows, [n, len(signs), B].
        Defaults to False.

    Returns:
      Losses [n, len(signs)]; with ``part``, those of its directions.
    """
    if isinstance(value_fn, rollouts.Recorded):
      return value_fn.at(signs, of_rows)
    z, eps = self.z(state), self.eps_at(state)
    if part is not None:
      some = _part(part, self)
      z = jax.tree.map(lambda x: x[some], z)
    if isinstance(value_fn, rollouts.Rollout):
      if self.micro_batches > 1:
        raise ValueError('micro_batches must be 1 with a reward; lower at_once '
                         'instead.')
      raise rollouts.RolledOut(rollouts.evaluate(
          value_fn, params, z, eps, self.directions, signs=signs,
          over=self.over, around=around,
          batch={'step': state.count, **batch}), signs)
    return estimate(
        value_fn, params, z, eps, self.directions, signs=signs, over=self.over,
        micro_batches=self.micro_batches, around=around, batch=batch,
        of_rows=of_rows)

  def loss_at(self, params: Any, value_fn: Callable[..., Any],
              batch: Mapping[str, Any]) -> Callable[[Displacement], jax.Array]:
    """Returns a function that maps a displacement to the loss at this point."""
    batch = losses.accepted(value_fn, dict(batch))
    displaced = perturbed(value_fn, self.directions)
    return lambda point: losses.mean_over_parts(
        lambda part: displaced(params, point, **part), batch,
        self.micro_batches)

  def measure(self, state: Any, params: Any, value_fn: Callable[..., Any],
              batch: Mapping[str, Any], *, around: Displacement | None = None,
              part: Any = None) -> tuple[Any, jax.Array]:
    """Returns the mean loss and the projected gradients [n].

    The arguments are those of `losses`. With ``part``, the projected gradients
    of all other directions are NaN.
    """
    losses = self.losses(state, params, value_fn, batch, around=around,
                         part=part, signs=self.combine.signs,
                         of_rows=self.combine.of_rows)
    value, g = self.combine.apply(losses, _first(self.eps_at(state)))
    if part is not None:
      missing = jnp.full(self.num_samples, jnp.nan, g.dtype)
      g = missing.at[_part(part, self)].set(g)
    return value, g

  def apply(self, state: Any, params: Any, numbers: Numbers) -> Any:
    r"""Returns :math:`\frac{1}{n} \sum_j g_j z_j`, float32."""
    g = numbers.projected_grad
    # If the step is skipped, g is NaN, and the updates must be 0.
    mean = jnp.where(jnp.isfinite(g), g, 0.0) / self.num_samples
    eps = self.eps_at(state)
    # Projected gradients are differences divided by the eps of the first group.
    # Convert them, for each group, to differences divided by its own eps.
    of_group = jax.tree.map(lambda e: mean * (_first(eps) / e), eps)
    return direction(params, self.z(state).times(of_group), self.directions,
                     dtype=jnp.float32)


def _first(eps) -> jax.Array:
  """Returns the eps by which differences of losses are divided.

  If there are groups, this is the eps of the first group.
  """
  return jax.tree.leaves(eps)[0]


def _part(part: tuple[int, int], spsa: Spsa) -> slice:
  """Returns the slice of the n directions that a replica evaluates."""
  n = spsa.num_samples
  i, parts = check_part(part)
  if n % parts:
    raise ValueError(f'part={part}: num_samples={n} cannot be divided into so '
                     'many equal parts.')
  if parts > 1 and spsa.combine.needs_all:
    raise ValueError(
        f'part={part} evaluates only some of the directions, but '
        f'{spsa.combine!r} may need the losses of all, as fzoo does for their '
        'standard deviation. If each coefficient depends only on the losses of '
        'its own direction, pass Combine(..., needs_all=False).')
  return slice(i * n // parts, (i + 1) * n // parts)


def check_part(part: Any) -> tuple[int, int]:
  """Checks and returns a pair ``(i, r)``, which means part i of r parts.

  Raises:
    ValueError: If ``part`` is not a pair of integers with 0 <= i < r.
  """
  if not isinstance(part, (tuple, list)) or len(part) != 2:
    raise ValueError('part must be (i, r), part number i of r, with i from 0 '
                     f'to r - 1, got {part!r}.')
  i = arguments.whole('i of part=(i, r)', part[0], least=0)
  return i, arguments.whole('r of part=(i, r)', part[1], least=i + 1)


# --- the transform ----------------------------------------------------------


class Estimator(ZerothOrderTransformation):
  r"""Defines an optax transform whose ``update`` evaluates losses itself.

  .. math:: u = \text{apply}(\theta, \text{measure}(\theta, \mathcal{L},
            \mathcal{B}))

  `mezo_jax.spsa` and all variants are estimators. To write a variant, pass
  functions that replace one of the two halves of SPSA, or both. ``update(None,
  state, params, value_fn=...)`` calls both. ``update(None, state, params,
  projected_grad=g)`` calls only ``apply``, which is the replay path.

  Args:
    options: An instance of `mezo_jax.transforms.Spsa`. Its ``measure`` and
      ``apply`` are used unless others are passed.
    measure: Evaluates losses: ``(state, params, value_fn, batch, **where) ->
      (value, numbers)``. ``batch`` has all further arguments of ``update``, by
      name. ``numbers`` is a float32 array [size]. ``value`` is the mean loss,
      or None if it must not be reported. If it is not finite, all numbers are
      replaced by NaN. ``state.memory`` can be read but not changed. ``where``
      may contain ``around``, a displacement that is added to the params (for
      ``apply_every`` of `mezo_jax.mezo`), and ``part``, the part of the
      directions that this replica evaluates. Pass them on to ``Spsa.measure``
      or ``Spsa.losses``. A function without these arguments is allowed, but
      then they are not supported. Defaults to None, for that of SPSA.
    apply: Computes float32 updates: ``(state, params, numbers) -> updates``,
      where ``numbers`` is a `Numbers`. With a memory, it returns ``(updates,
      memory)``. It must not depend on anything else, since only the recorded
      numbers are known when a step is replayed. Their ``value`` may be NaN. If
      the step is skipped, all numbers are NaN, and the old memory must be
      returned; see `mezo_jax.transforms.unless_skipped`. Defaults to None, for
      that of SPSA.
    memory: Returns the first ``state.memory``, given the params. Requires
      ``apply``. Defaults to None, for no memory.
    size: Length of the array of numbers. Defaults to None, for the number of
      directions.
    check: Raises ValueError for params that cannot be used. Defaults to None.

  Attributes:
    options: The ``options`` above.

  Raises:
    ValueError: If there is a ``memory`` but no ``apply``.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1.

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> from mezo_jax.transforms import Spsa
    >>> spsa = Spsa(1e-3, key=0)
    >>> def measure(state, params, value_fn, batch):
    ...   value, g = spsa.measure(state, params, value_fn, batch)
    ...   return value, jnp.sign(g)
    >>> tx = mezo_jax.Estimator(spsa, measure=measure)
    >>> params = jnp.ones(3)
    >>> _, state = tx.update(None, tx.init(params), params, value_fn=jnp.sum)
    >>> float(jnp.abs(state.projected_grad[0]))
    1.0
  """

  options: Spsa
  _made: dict[str, Any]

  def __new__(
      cls, options: Spsa, *, measure: Callable[..., Any] | None = None,
      apply: Callable[..., Any] | None = None,
      memory: Callable[[Any], Any] | None = None, size: int | None = None,
      check: Callable[[Any], None] | None = None) -> 'Estimator':
    """Creates the transform; the class documents the arguments."""
    if memory is not None and apply is None:
      raise ValueError('memory: an estimator with a memory needs apply=, which '
                       'returns the updates and the next memory.')
    made = dict(measure=measure, apply=apply, memory=memory, size=size,
                check=check)
    self = super().__new__(
        cls, lambda params: self._init(params), lambda *args, **kwargs: (
            self._update(*args, **kwargs)))
    self.options, self._made = options, made
    return self

  def __getnewargs_ex__(self) -> tuple[tuple[Any], dict[str, Any]]:
    """Returns the arguments from which `copy` and `pickle` create a copy."""
    return (self.options,), self._made

  @property
  def size(self) -> int:
    """Returns the length of the array of numbers that a step measures."""
    return self._made['size'] or self.options.num_samples

  @property
  def is_linear(self) -> bool:
    """Returns whether updates are the sum of g_j z_j / n, as in SPSA."""
    return self._made['apply'] is None

  def in_float32(self) -> 'Estimator':
    """Returns a copy of this estimator whose updates are float32."""
    options = dataclasses.replace(self.options, dtype=jnp.float32)
    return Estimator(options, **self._made)

  def measure(self, state: Any, params: Any, value_fn: Callable[..., Any],
              batch: Mapping[str, Any], *, around: Displacement | None = None,
              part: tuple[int, int] | None = None) -> Numbers:
    """Evaluates losses, which is the first half of a step.

    Args:
      state: State of the estimator.
      params: The params. They are not changed.
      value_fn: The loss; see `mezo_jax.spsa`.
      batch: Arguments of ``value_fn``, by name.
      around: A displacement that is added to the params for the evaluation.
        Defaults to None.
      part: ``(i, r)``, to evaluate only part i of r of the directions. Defaults
        to None, for all directions.

    Returns:
      The `Numbers` of the step.

    Raises:
      ValueError: If this estimator does not support ``around`` or ``part``.
    """
    if around is not None:
      check_displacement('around', around)
    measure = self._made['measure'] or self.options.measure
    where = {'around': around, 'part': part}
    where = {name: x for name, x in where.items() if x is not None}
    # Refuse an argument that this ``measure`` does not have.
    for name in where.keys() - losses.accepted(measure, where).keys():
      raise ValueError(
          f'{name}= is not supported by this estimator, since its measure has '
          'no such argument. (apply_every of mezo needs around=.)')
    value, g = measure(state, params, value_fn, batch, **where)
    # A loss that is not finite invalidates all numbers. If no loss is reported,
    # only the numbers themselves decide whether the step is skipped.
    if value is None:
      value = jnp.nan
    else:
      g = jnp.where(jnp.isfinite(value), g, jnp.nan)
    return Numbers(jnp.float32(value), g.astype(jnp.float32))

  def apply(self, state: Any, params: Any, numbers: Numbers
            ) -> tuple[Any, Any]:
    """Turns numbers into updates, which is the second half of a step.

    Args:
      state: State of the estimator.
      params: The params.
      numbers: The result of `measure`, or recorded numbers.

    Returns:
      The updates and the next state.

    Raises:
      ValueError: If ``numbers`` has the wrong length.
    """
    numbers = self.checked(*numbers)
    g = numbers.projected_grad
    # If any number is not finite, the step is skipped: all of them become NaN.
    valid = numbers._replace(
        projected_grad=jnp.where(jnp.all(jnp.isfinite(g)), g, jnp.nan))
    apply, memory = self._made['apply'] or self.options.apply, ()
    updates = apply(state, params, valid)
    if self._made['memory'] is not None:
      updates, memory = updates
    if self.options.dtype is None:
      updates = paths.map_named(_as_param, params, updates)
    elif self.options.dtype != jnp.float32:
      updates = optax.tree.cast(updates, self.options.dtype)
    return updates, counted(state, numbers, memory)

  def checked(self, value: Any, projected_grad: Any) -> Numbers:
    """Converts recorded numbers to `Numbers` with float32 arrays.

    Raises:
      ValueError: If ``projected_grad`` does not have the shape [size].
    """
    g = arguments.array('projected_grad', projected_grad)
    if g.shape != (self.size,):
      raise ValueError(
          f'projected_grad must have the shape [{self.size}], the numbers of '
          'one step in the order of state.projected_grad; got the shape '
          f'{list(g.shape)}.')
    return Numbers(jnp.float32(value), g.astype(jnp.float32))

  def _init(self, params):
    """Implements ``init``, which returns the first state."""
    arguments.tree('params', params)
    _check_holes(params)
    if self._made['check'] is not None:
      self._made['check'](params)
    self.options.directions.selected(params)
    state = SpsaState(
        count=jnp.zeros([], jnp.int32),
        key=noise.state_key(self.options.key),  # a copy, which can be donated
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
    """Implements ``update``, which makes a step or replays one."""
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
    # Make the key depend on the loss. Otherwise XLA recognises that both halves
    # draw the same z and stores it in between, which is as large as the model.
    later = with_key(state, after(state.key, numbers.value))
    updates, new = self.apply(later, params, numbers)
    # The next state gets the original key.
    return updates, with_key(new, state.key)


def measure(tx: optax.GradientTransformation, state: Any, params: Any,
            **given: Any) -> Numbers:
  """Calls only ``measure`` of the estimator in an optax chain.

  optax always calls all links of a chain. The estimator therefore raises an
  exception that carries the numbers, so that the links after it are not traced.

  Args:
    tx: A transform that contains an estimator.
    state: State of ``tx``.
    params: The params.
    **given: Further arguments of ``tx.update``, such as ``value_fn``.

  Returns:
    The `Numbers` of the step.

  Raises:
    ValueError: If ``tx`` contains no estimator.
  """
  try:
    optax.with_extra_args_support(tx).update(
        cast(Any, None), state, params, measure_only=True, **given)
  except Measured as e:
    return e.numbers
  raise ValueError('tx must contain an estimator, such as mezo_jax.spsa(...).')


def counted(state: Any, numbers: Numbers, memory: Any = ()) -> Any:
  """Returns the state after a step with these numbers.

  Args:
    state: The state before the step.
    numbers: The numbers of the step. If any is not finite, the step counts as
      skipped.
    memory: The memory after the step. It is ignored for an `SpsaState`.
  """
  finite = jnp.all(jnp.isfinite(numbers.projected_grad))
  old = getattr(state, 'spsa', state)
  new = old._replace(
      value=numbers.value, projected_grad=numbers.projected_grad,
      **counts(old, finite))
  return new if old is state else SpsaStateWithMemory(new, memory)


def counts(state: Any, finite: jax.Array) -> dict[str, jax.Array]:
  """Returns the counts of a state after a step, by name.

  Args:
    state: The state before the step.
    finite: Whether the step was made. If False, it counts as skipped.
  """
  return dict(
      count=cast(jax.Array, optax.safe_increment(state.count)),
      notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
      total_notfinite=state.total_notfinite + (1 - finite.astype(jnp.int32)))


def unless_skipped(numbers: Numbers, new: Any, old: Any) -> Any:
  """Returns ``new``, or ``old`` if the step is skipped.

  Args:
    numbers: The numbers that ``apply`` received. NaN marks a skipped step.
    new: A pytree of arrays, such as the next memory.
    old: A pytree with the same structure.
  """
  kept = jnp.isfinite(numbers.projected_grad[0])
  return optax.tree.where(kept, new, old)


def with_key(state: Any, key: jax.Array) -> Any:
  """Returns a copy of a state with another key."""
  if isinstance(state, SpsaState):
    return state._replace(key=key)
  return state._replace(spsa=state.spsa._replace(key=key))


def after(key: jax.Array, value: jax.Array) -> jax.Array:
  """Makes a key depend on a value; see `Displacement.after`."""
  return Displacement(key, 1.0).after(value).keys


def _as_param(path, x, update):
  """Casts an update to the dtype of its param.

  For a param that is not of a floating-point dtype, returns an update that
  leaves it unchanged.
  """
  del path
  if is_codes(x):
    return update.astype(x.dtype)
  if paths.is_floating(x):
    return update.astype(jnp.result_type(x))
  return zeros(x)


# --- checks -----------------------------------------------------------------


def _check_holes(params):
  """Raises ValueError if an optax wrapper has removed leaves of the params."""
  leaves = jax.tree.leaves(
      params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
  if any(isinstance(x, optax.MaskedNode) for x in leaves):
    raise ValueError(
        'params contain optax.MaskedNode, so value_fn would compute a wrong '
        'loss. Do not wrap spsa in optax.masked or optax.partition; pass a '
        'mask to spsa instead: directions=mezo_jax.Normal(mask=...).')


def check_update(updates: Any, state: Any, params: Any, value_fn: Any,
                 projected_grad: Any) -> None:
  """Checks the arguments of ``update``.

  Raises:
    ValueError: If an argument is missing or unsuitable, or if the estimator is
      not the first link of its chain.
  """
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
        'spsa got both value_fn and projected_grad: pass value_fn to evaluate '
        'losses, or projected_grad to make an update without evaluation.')
  if value_fn is not None:
    arguments.function('value_fn', value_fn)
  if not isinstance(state, SpsaState | SpsaStateWithMemory):
    raise ValueError('state must be the SpsaState that tx.init returned, got a '
                     f'{type(state).__name__}.')
  _check_holes(params)
  chain.check_first('spsa')
  # nnx.Optimizer passes an empty tree in place of None, which is fine.
  if jax.tree.leaves(updates):
    raise ValueError(
        'updates: spsa computes its own updates. It must be the first link of '
        'a chain and be called with updates=None. If a wrapper needs a tree of '
        'updates, wrap the links after spsa instead: '
        'chain(spsa(...), MultiSteps(rest, k).gradient_transformation()), '
        'chain(spsa(...), apply_if_finite(rest, 5)). To accumulate over a '
        'batch, use micro_batches=k.')
