r"""MeZO, ZO-SGD: :math:`\theta \leftarrow \theta - \eta (g z + \lambda\theta)`.

Malladi et al. (2023), Algorithm 1 and Definition 2; the estimate ``g z`` is
`mezo_jax.spsa`.
"""

from collections.abc import Mapping
import re

import jax
import jax.numpy as jnp
import optax

from mezo_jax import _noise, _paths, _streams
from mezo_jax._perturb import zeros
from mezo_jax._spsa import spsa

_ROUNDING = 2**31  # no direction has this number
_NOT_DECAYED = re.compile(
    r'(?i)(^|/)(bias|b|scale|beta|gamma|\w*norm\w*|ln(_?\w+)?)(/|$)')


def mezo(
    learning_rate: float | optax.Schedule | Mapping,
    eps: float | optax.Schedule | Mapping = 1e-3,
    *,
    key: jax.Array | int,
    weight_decay: float = 0.0,
    mask=None,
    num_samples: int | None = None,
    distribution: str = 'normal',
    generator: str = 'hash32',
    one_sided: bool = False,
    sum_samples: bool = False,
    micro_batches: int | None = None,
    equal_parts: bool = False,
    stochastic_rounding: bool = True,
) -> optax.GradientTransformationExtraArgs:
  r"""Memory-efficient zeroth-order SGD.

  ``chain(spsa(...), add_decayed_weights(...), scale_by_learning_rate(...))``,
  as `optax.sgd` is to `optax.trace`, and two cares more: a step whose loss is
  not finite changes nothing, and half-precision weights are rounded
  stochastically, since at a usual :math:`\eta g` rounding to nearest moves
  almost none of them. Put ``update`` and `optax.apply_updates` in one
  `jax.jit` with params and state donated: no tree of updates is then built.

  Args:
    learning_rate: :math:`\eta`, a number or a schedule; or groups of them,
      ``{regular expression: number or schedule}``, by the first that is found
      in a parameter's path. The paper: 1e-7 to 1e-6 for 13B in full, 5e-5 to
      1e-4 with LoRA, 1e-3 to 1e-2 with prefixes.
    eps: :math:`\epsilon`, likewise. The paper: 1e-3 in full, 1e-2 with LoRA (on
      RoBERTa 1e-3), 1e-1 with prefixes.
    key: a `jax.random.key` or an integer seed.
    weight_decay: :math:`\lambda`; biases and norms of every family are exempt
      (by name, and any leaf with fewer than two axes to a layer).
    mask: which leaves are perturbed, updated and decayed; see
      `mezo_jax._paths.selected`.
    num_samples: directions per step.
    distribution: of the directions: 'normal', 'rademacher' or 'sphere'.
    generator: of the noise: 'threefry2x32' or 'hash32'.
    one_sided: whether to compare with the clean loss.
    sum_samples: whether to sum over directions instead of averaging.
    micro_batches: parts that the batch is evaluated in.
    equal_parts: whether parts whose loss is a scalar weigh the same; these
      options are described in full at `mezo_jax.spsa`.
    stochastic_rounding: whether bfloat16 and float16 weights are rounded
      stochastically, with bits of the step's key, instead of to nearest.

  Returns:
    An `optax.GradientTransformationExtraArgs` whose ``update`` is that of
    `spsa`, followed by the rest. Updates have the dtypes of the parameters.
    The state is the chain's: `SpsaState` is its first element.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1, Tables 15 and 16.

  Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> tx = mezo(learning_rate=1e-2, key=jax.random.key(0))
    >>> loss_fn = lambda params, x: jnp.sum((params - x) ** 2)
    >>> params = jnp.zeros(3)
    >>> state = tx.init(params)
    >>> updates, state = tx.update(
    ...     None, state, params, value_fn=loss_fn, x=jnp.ones(3))
    >>> params = optax.apply_updates(params, updates)
  """
  def decayed(params):
    return _paths.map_named(
        lambda path, p, used: used and is_decayed(path, p),
        params, _paths.selected(params, mask))

  chain = optax.chain(
      spsa(eps, key=key, mask=mask, num_samples=num_samples,
           distribution=distribution, generator=generator, one_sided=one_sided,
           sum_samples=sum_samples, micro_batches=micro_batches,
           equal_parts=equal_parts, dtype=jnp.float32),
      optax.add_decayed_weights(weight_decay, decayed),
      by_group(optax.scale_by_learning_rate, learning_rate))

  def update_fn(updates, state, params=None, **extra_args):
    run = state[0]
    updates, state = chain.update(updates, state, params, **extra_args)
    skip = state[0].notfinite_count > 0
    key_ = _noise.direction_key(run.key, run.count, _ROUNDING)[None]

    half = _streams.of_leaves(key_, {
        path: p.shape for (path, p), used in zip(
            _paths.named_leaves(params),
            jax.tree.leaves(_paths.selected(params, mask)))
        if used and stochastic_rounding
        and p.dtype in (jnp.bfloat16, jnp.float16)})

    def finish(path, p, update):
      if jnp.issubdtype(jnp.result_type(p), jax.dtypes.prng_key):
        return zeros(p)
      update = jnp.where(skip, 0, update)
      if path in half:
        bits = _noise.words(half[path], 0, p, 'rounding')
        moved = _noise.stochastic_round(
            p.astype(jnp.float32) + update, p.dtype, bits)
        update = moved.astype(jnp.float32) - p.astype(jnp.float32)
      return update.astype(jnp.result_type(p))

    return _paths.map_named(finish, params, updates), state

  return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def by_group(make, value) -> optax.GradientTransformation:
  """``make(value)``, or for groups of values each for its own parameters."""
  if not isinstance(value, Mapping):
    return make(value)
  return optax.partition(
      {group: make(v) for group, v in value.items()},
      lambda params: _paths.groups_of(params, value))


def is_decayed(path: str, leaf) -> bool:
  """Whether weight decay applies: a matrix (per layer), no bias or norm."""
  axes = jnp.ndim(leaf) - (_paths.locate(path)[2] and jnp.ndim(leaf) > 0)
  return axes >= 2 and not _NOT_DECAYED.search(path)
