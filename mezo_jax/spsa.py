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

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax import masks, noise, perturb

DISTRIBUTIONS = (*noise.DISTRIBUTIONS, 'sphere')


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
    num_samples: int = 1,
    distribution: str = 'normal',
    generator: str = 'hash32',
    mask=None,
    one_sided: bool = False,
    sum_samples: bool = False,
    micro_batches: int = 1,
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
  is given ``None`` in their place (or, inside a wrapper that wants a tree such
  as `optax.apply_if_finite`, the params themselves, whose values are ignored).

  Args:
    eps: perturbation scale :math:`\epsilon`, a number or a schedule of the
      step number; or groups of them, ``{regular expression: number or
      schedule}``, by the first that is found in a parameter's path. With
      :math:`\epsilon_i` for the parameters of group i, :math:`g z` is
      :math:`(\ell_+ - \ell_-) / (2 \epsilon_i) \cdot z` there, and the state
      has ``projected_grad`` with that of the first group.
    key: a `jax.random.key` or an integer seed; fixes every direction of the
      run. Step t, direction j uses ``fold_in(fold_in(key, t), j)``.
    num_samples: directions per step (n-SPSA). They share the batch.
    distribution: 'normal'; 'rademacher' (signs); or 'sphere', uniform on the
      sphere of radius :math:`\sqrt d` (one more pass of noise per direction).
    generator: 'hash32', cheap and tested (benchmarks/results/noise.md); or
      'threefry2x32', with which z is, bit for bit, what `jax.random` draws.
    mask: which leaves are perturbed and updated; see
      `mezo_jax.masks.selected`. The others get zero updates.
    one_sided: use :math:`(\mathcal{L}(\theta + \epsilon z) -
      \mathcal{L}(\theta)) / \epsilon`: n + 1 evaluations instead of 2n, with
      a bias of :math:`O(\epsilon)`.
    sum_samples: sum over the directions instead of their mean, which scales
      the learning rate by n.
    micro_batches: evaluate the batch in this many equal parts and average the
      losses, all with one z: gradient accumulation. Every array passed on to
      ``value_fn`` is split along its leading axis, but those in ``frozen``.
    dtype: of the updates; None for each parameter's own.

  Returns:
    An `optax.GradientTransformationExtraArgs`. Its ``update(None, state,
    params, value_fn=..., **kwargs)`` calls ``value_fn(params, ...)`` with those
    of ``kwargs`` that it takes by name, in float32 whatever it returns. A
    value or projected gradient that is not finite gives zero updates and is
    counted in the state.

  Raises:
    ValueError: for an option out of range, missing ``params`` or ``value_fn``,
      updates of an earlier transform, or params with `optax.MaskedNode` holes.

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
    ``optax.MultiSteps(optax.chain(spsa(...), ...))`` cannot accumulate, since
    the estimate does not depend on the updates it is handed: it is refused.
    Use ``micro_batches``, or put only what follows inside `optax.MultiSteps`.
  """
  _check_options(eps, num_samples, distribution, generator, micro_batches)
  of_noise = dict(generator=generator, mask=mask, distribution=(
      'normal' if distribution == 'sphere' else distribution))

  def init_fn(params):
    masks.selected(params, mask)
    return SpsaState(
        count=jnp.zeros([], jnp.int32),
        key=jnp.copy(noise.as_key(key)),  # the caller's may not be donated
        value=jnp.zeros([], jnp.float32),
        projected_grad=jnp.zeros([num_samples], jnp.float32),
        notfinite_count=jnp.zeros([], jnp.int32),
        total_notfinite=jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None, *, value_fn=None, **extra_args):
    _check_update(updates, params, value_fn)
    kwargs = masks.accepted(value_fn, extra_args)
    epsilon, relative = _epsilon(eps, state.count)

    keys = jax.vmap(
        lambda j: noise.direction_key(state.key, state.count, j))(
            jnp.arange(num_samples))
    radii = jnp.ones(num_samples)
    if distribution == 'sphere':
      radii = lax.map(lambda k: _to_sphere(params, k, of_noise), keys)

    def loss_at(key_and_scale):  # L(theta + scale * z(key); B)
      z, scale = key_and_scale
      loss = perturb.perturbed(value_fn, scales=relative, **of_noise)
      return _mean_loss(lambda batch: loss(params, [(z, scale)], **batch),
                        kwargs, micro_batches)

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
    g = jnp.where(finite, projected_grad * radii, 0.0)
    g = g if sum_samples else g / num_samples
    keys = _after(keys, value)
    updates = perturb.direction(
        params, [*zip(keys, g)], dtype=dtype,
        scales=relative and {i: 1 / s for i, s in relative.items()}, **of_noise)
    return updates, SpsaState(
        count=optax.safe_increment(state.count),
        key=state.key,
        value=value,
        projected_grad=projected_grad,
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


def _mean_loss(loss: Callable, batch: dict, parts: int) -> jax.Array:
  """float32 mean of ``loss`` over equal parts of a batch, one at a time."""
  def scalar(batch):
    out = jnp.asarray(loss(batch))
    if out.shape:
      raise ValueError(
          f'value_fn must return a scalar, it returned shape {out.shape}.')
    return out.astype(jnp.float32)
  if parts == 1:
    return scalar(batch)
  whole = {k: batch[k] for k in ('frozen',) if k in batch}
  return jnp.mean(lax.map(
      lambda part: scalar(part | whole), split_batch(batch, parts)))


def split_batch(batch: dict, parts: int) -> dict:
  """Every array [B, ...] as [parts, B / parts, ...]; ``frozen`` is left out.

  Raises:
    ValueError: if ``parts`` does not divide B.
  """
  def split(x):
    if not jnp.ndim(x) or x.shape[0] % parts:
      raise ValueError(
          f'micro_batches={parts} does not divide the leading axis of an array '
          f'of shape {jnp.shape(x)} among the arguments of value_fn.')
    return x.reshape(parts, -1, *x.shape[1:])
  return jax.tree.map(
      split, {k: v for k, v in batch.items() if k != 'frozen'})


def _to_sphere(params, key, of_noise) -> jax.Array:
  """The factor that brings z(key) to the sphere of radius sqrt(d)."""
  length, size = perturb.norm(params, key, **of_noise)
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
  for name, value, known in (('distribution', distribution, DISTRIBUTIONS),
                             ('generator', generator, noise.GENERATORS)):
    if value not in known:
      raise ValueError(f'{name} must be one of {known}, got {value!r}.')


def _check_update(updates, params, value_fn):
  if params is None:
    raise ValueError(
        'spsa needs params: tx.update(None, state, params, value_fn=...).')
  if value_fn is None:
    raise ValueError(
        'spsa needs value_fn: call tx.update(None, state, params, '
        'value_fn=loss_fn, batch=batch). Wrappers that drop extra arguments, '
        "as flax's TrainState.apply_gradients does, cannot be used.")
  is_hole = lambda x: isinstance(x, optax.MaskedNode)
  if any(map(is_hole, jax.tree.leaves(params, is_leaf=is_hole))):
    raise ValueError(
        'spsa was given params with holes (optax.MaskedNode), on which '
        'value_fn would compute a wrong loss. Do not wrap it in optax.masked '
        'or optax.partition: pass its own mask=... instead.')
  handed, own = jax.tree.leaves(updates), jax.tree.leaves(params)
  if handed and [*map(id, handed)] != [*map(id, own)]:
    raise ValueError(
        'spsa makes its own updates and was handed some: it must be first in '
        'the chain and called with updates=None (or with params in their '
        'place, where a wrapper wants a tree). To accumulate, use '
        'micro_batches=k or chain(spsa(...), MultiSteps(rest, k)'
        '.gradient_transformation()), not MultiSteps(chain(spsa(...), ...)).')
