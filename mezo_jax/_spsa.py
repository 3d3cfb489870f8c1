r"""SPSA: a gradient estimate from two forward passes (MeZO, Algorithm 1).

In the paper's letters, one step on the batch :math:`\mathcal{B}`:

.. math::
  z &\sim \mathcal{N}(0, I_d), \quad
  \ell_\pm = \mathcal{L}(\theta \pm \epsilon z; \mathcal{B}) \\
  \text{projected\_grad} &= (\ell_+ - \ell_-) / (2 \epsilon) \\
  \hat\nabla \mathcal{L} &= \text{projected\_grad} \cdot z

The rest of the algorithm, :math:`\theta \leftarrow \theta - \eta \hat\nabla
\mathcal{L}`, is optax's: see `mezo_jax.mezo`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax import _noise, _paths, _perturb, _values, sharding

DISTRIBUTIONS = (*_noise.DISTRIBUTIONS, 'sphere')


class SpsaState(NamedTuple):
  """State of `spsa`."""

  count: jax.Array  # shape=(), dtype=int32: steps made, skipped ones included
  key: jax.Array  # shape=(), dtype=key<fry>: of the whole run
  value: jax.Array  # shape=(), dtype=float32: mean loss of the last step
  projected_grad: jax.Array  # shape=(num_samples,), dtype=float32
  notfinite_count: jax.Array  # shape=(), dtype=int32: skipped in a row
  total_notfinite: jax.Array  # shape=(), dtype=int32: skipped in all


def spsa(
    eps: float | optax.Schedule | Mapping = 1e-3,
    *,
    key: jax.Array | int,
    num_samples: int | None = None,
    distribution: str = 'normal',
    generator: str = 'hash32',
    mask=None,
    one_sided: bool = False,
    sum_samples: bool = False,
    micro_batches: int | None = None,
    equal_parts: bool = False,
    dtype=None,
) -> optax.GradientTransformationExtraArgs:
  r"""Estimates the gradient by simultaneous perturbation.

  With n = ``num_samples`` directions the updates are

  .. math::
    \frac{1}{n} \sum_{j=1}^n g_j z_j, \qquad g_j =
    \frac{\mathcal{L}(\theta + \epsilon z_j; \mathcal{B})
    - \mathcal{L}(\theta - \epsilon z_j; \mathcal{B})}{2 \epsilon}
    \approx z_j^\top \nabla \mathcal{L},

  an estimate of :math:`E[zz^\top]\nabla\mathcal{L} = \nabla\mathcal{L}` that is
  unbiased up to :math:`O(\epsilon^2)`. ``update`` needs ``params`` and
  ``value_fn`` and makes its own updates, so it stands first in any chain and
  is given ``None`` in their place.

  Args:
    eps: perturbation scale :math:`\epsilon`, a number or a schedule of the
      step number; or groups of them, ``{regular expression: number or
      schedule}``, by the first that is found in a parameter's path. With
      :math:`\epsilon_i` for the parameters of group i, :math:`g z` is
      :math:`(\ell_+ - \ell_-) / (2 \epsilon_i) \cdot z` there, and the state
      has ``projected_grad`` with that of the first group.
    key: a `jax.random.key` or an integer seed; fixes every direction of the
      run. Step t, direction j uses ``fold_in(fold_in(key, t), j)``.
    num_samples: directions per step (n-SPSA), 1 if None. They share the batch.
    distribution: 'normal'; 'rademacher' (signs); or 'sphere', uniform on the
      sphere of radius :math:`\sqrt d` (one more pass of noise per direction).
    generator: 'hash32', cheap and tested (benchmarks/results/noise.md); or
      'threefry2x32', with which z is, bit for bit, what `jax.random` draws.
    mask: which leaves are perturbed and updated; see
      `mezo_jax._paths.selected`. The others get zero updates.
    one_sided: use :math:`(\mathcal{L}(\theta + \epsilon z) -
      \mathcal{L}(\theta)) / \epsilon`: n + 1 evaluations instead of 2n, with
      a bias of :math:`O(\epsilon)`.
    sum_samples: sum over the directions instead of their mean, which scales
      the learning rate by n.
    micro_batches: evaluate the batch in this many equal parts (1 if None), all
      with one z: gradient accumulation. Every array passed on to ``value_fn``
      is split along its leading axis, but those in ``frozen``. The value is
      that of the whole batch, so ``value_fn`` must return the rows' values
      ``[B]`` or ``(values, weights)``: see `mezo_jax._values`.
    equal_parts: average the scalars of the parts as they are.
    dtype: of the updates; None for each parameter's own.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its ``update(None, state,
    params, value_fn=..., **kwargs)`` calls ``value_fn(params, ...)`` with those
    of ``kwargs`` that it takes by name. That returns a scalar, the rows'
    values ``[B]`` or ``(values, weights)``, in float32 or float64. A value or
    projected gradient that is not finite gives zero updates and is counted in
    the state. (`optax.apply_updates` cannot add to PRNG keys among the params:
    `mezo_jax.peft.split` sets them apart.)

  Raises:
    ValueError: for an option out of range, missing ``params`` or ``value_fn``,
      updates of an earlier transform, params with `optax.MaskedNode` holes, a
      loss that is none of the above or of half precision, or parts of unknown
      weight.

  References:
    Spall, 1992, "Multivariate stochastic approximation using a simultaneous
    perturbation gradient approximation"; Malladi et al., 2023, `Fine-Tuning
    Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Definition 1 and Algorithms 1 and 2.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> loss_fn = lambda params, x: jnp.sum((params - x) ** 2)
    >>> tx = optax.chain(spsa(1e-3, key=0), optax.adam(1e-1))
    >>> params = jnp.zeros(3)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(
    ...     None, state, params, value_fn=loss_fn, x=jnp.ones(3))
    >>> params = optax.apply_updates(params, updates)

  .. warning::
    Wrappers that want a tree of updates (`optax.MultiSteps`, ``flatten``,
    ``apply_if_finite``, ``conditionally_mask``, ``conditionally_transform``,
    ``contrib.mechanize``) or hide a part of the params (``masked``,
    ``partition``) cannot hold an estimate, which does not depend on what it is
    handed. Put them around what follows: ``chain(spsa(...), wrapper(rest))``.
    `optax.lookahead` cannot be used: it passes no extra arguments on.
  """
  num_samples = 1 if num_samples is None else num_samples
  micro_batches = 1 if micro_batches is None else micro_batches
  _check_options(eps, num_samples, distribution, generator, micro_batches)
  of_noise = dict(generator=generator, mask=mask, distribution=(
      'normal' if distribution == 'sphere' else distribution))

  def init_fn(params):
    _check_holes(params)
    _paths.selected(params, mask)
    return _beside(SpsaState(
        count=jnp.zeros([], jnp.int32),
        key=jnp.copy(_noise.as_key(key)),  # the caller's may not be donated
        value=jnp.zeros([], jnp.float32),
        projected_grad=jnp.zeros([num_samples], jnp.float32),
        notfinite_count=jnp.zeros([], jnp.int32),
        total_notfinite=jnp.zeros([], jnp.int32)), params)

  def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
    _check_update(updates, params, value_fn)
    kwargs = _values.accepted(value_fn, extra_args)
    epsilon, relative = _epsilon(eps, state.count)

    keys = jax.vmap(
        lambda j: _noise.direction_key(state.key, state.count, j))(
            jnp.arange(num_samples))
    radii = jnp.ones(num_samples)
    if distribution == 'sphere':
      radii = lax.map(lambda k: _to_sphere(params, k, of_noise), keys)

    def loss_at(key_and_scale):  # L(theta + scale * z(key); B)
      z, scale = key_and_scale
      loss = _perturb.perturbed(value_fn, scales=relative, **of_noise)
      return _values.mean_over_parts(
          lambda batch: loss(params, [(z, scale)], **batch), kwargs,
          micro_batches, equal_parts)

    # One loop over (direction, sign): one forward to compile, one in memory.
    signs = np.array([1.0] if one_sided else [1.0, -1.0], np.float32)
    scales = (radii[:, None] * signs * epsilon).ravel()
    at_keys = jnp.repeat(keys, len(signs))
    if one_sided:  # the last evaluation, at scale 0, is L(theta)
      at_keys, scales = jnp.append(at_keys, keys[0]), jnp.append(scales, 0.0)
    losses = lax.map(loss_at, (at_keys, scales))
    if one_sided:
      value = losses[-1]
      projected_grad = (losses[:-1] - value) / epsilon
    else:
      value = jnp.mean(losses)
      loss_plus, loss_minus = losses.reshape(num_samples, 2).T
      projected_grad = (loss_plus - loss_minus) / (2 * epsilon)

    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(projected_grad))
    g = jnp.where(finite, projected_grad * radii, 0.0).astype(jnp.float32)
    g = g if sum_samples else g / num_samples
    keys = _after(keys, value)
    updates = _perturb.direction(
        params, [*zip(keys, g)], dtype=dtype,
        scales=relative and {i: 1 / s for i, s in relative.items()}, **of_noise)
    return updates, SpsaState(
        count=optax.safe_increment(state.count),
        key=state.key,
        value=value.astype(jnp.float32),
        projected_grad=projected_grad.astype(jnp.float32),
        notfinite_count=jnp.where(finite, 0, state.notfinite_count + 1),
        total_notfinite=state.total_notfinite + (1 - finite.astype(jnp.int32)))

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _epsilon(eps, count) -> tuple[jax.Array, dict | None]:
  """The (first group's) epsilon, and what the groups' are as multiples."""
  groups = eps if isinstance(eps, Mapping) else {'': eps}
  values = {i: jnp.asarray(e(count) if callable(e) else e, jnp.float32)
            for i, e in groups.items()}
  first = next(iter(values.values()))
  return first, ({i: e / first for i, e in values.items()}
                 if isinstance(eps, Mapping) else None)


def _to_sphere(params, key, of_noise) -> jax.Array:
  """The factor that brings z(key) to the sphere of radius sqrt(d)."""
  length, size = _perturb.norm(params, key, **of_noise)
  return jnp.sqrt(jnp.float32(size)) / length


def _after(keys: jax.Array, value: jax.Array) -> jax.Array:
  """Makes the keys depend on ``value`` for the compiler: it would otherwise
  find the same z in the forward pass and keep it, as large as the model."""
  words = jax.random.key_data(keys)
  words = jnp.where(value > jnp.float32(3e38), words ^ jnp.uint32(1), words)
  return jax.random.wrap_key_data(words, impl=jax.random.key_impl(keys))


def _check_options(eps, num_samples, distribution, generator, micro_batches):
  for name, value in (('num_samples', num_samples),
                      ('micro_batches', micro_batches)):
    if not isinstance(value, (int, np.integer)) or value < 1:
      raise ValueError(
          f'{name} must be a Python integer of at least 1, got {value!r}; '
          f"under optax.inject_hyperparams name it in static_args.")
  for e in eps.values() if isinstance(eps, Mapping) else (eps,):
    if isinstance(e, (int, float)) and not e > 0:
      raise ValueError(f'eps must be positive, got {eps}.')
  _noise.check_names(distribution, generator, DISTRIBUTIONS)


def _check_holes(params):
  is_hole = lambda x: isinstance(x, optax.MaskedNode)
  if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
    raise ValueError(
        'spsa was given params with holes (optax.MaskedNode), on which '
        'value_fn would compute a wrong loss. Do not wrap it in optax.masked '
        'or optax.partition: pass its own mask=... instead.')


def _check_update(updates, params, value_fn):
  if params is None:
    raise ValueError(
        'spsa needs params: tx.update(None, state, params, value_fn=...).')
  if value_fn is None:
    raise ValueError(
        'spsa needs value_fn: call tx.update(None, state, params, '
        'value_fn=loss_fn, batch=batch). Wrappers that drop extra arguments, '
        "as flax's TrainState.apply_gradients does, cannot be used.")
  _check_holes(params)
  if jax.tree.leaves(updates):  # nnx.Optimizer makes an empty tree of None
    raise ValueError(
        'spsa makes its own updates and was handed some: it must be first in '
        'the chain and called with updates=None. A wrapper that wants a tree '
        'of updates goes around what follows, not around the estimate: '
        'chain(spsa(...), MultiSteps(rest, k).gradient_transformation()), '
        'chain(spsa(...), apply_if_finite(rest, 5)). To accumulate, use '
        'micro_batches=k.')


def _beside(state: SpsaState, params) -> SpsaState:
  """The state on the mesh that params are on: else a second step compiles
  again, for a state that the first one has put there."""
  for x in jax.tree.leaves(params):
    if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and (
        isinstance(x.sharding, jax.NamedSharding)):
      everywhere = jax.NamedSharding(x.sharding.mesh, jax.P())
      return sharding.place(state, everywhere)
  return state
