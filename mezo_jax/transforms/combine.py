r"""Defines how the losses of n directions become coefficients of z."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax.core import arguments


@dataclasses.dataclass(frozen=True)
class Combine:
  r"""Describes how the losses of n directions become coefficients of z.

  .. math:: \ell_{j,s} = \mathcal{L}(\theta + s \epsilon z_j; \mathcal{B}),
            \qquad (\text{value}, g) = \text{fn}(\ell, \epsilon), \qquad
            u = \frac{1}{n} \sum_j g_j z_j

  `mezo_jax.two_sided`, `mezo_jax.one_sided` and `mezo_jax.fzoo` are instances.

  Attributes:
    signs: The factors s, a tuple of numbers. The loss is evaluated at each of
      them along every direction. At s = 0 it is the same for all directions and
      is evaluated once.
    fn: A function ``(losses, eps) -> (value, projected_grad)`` of the losses
      [n, len(signs)] and the perturbation scale. It returns the mean loss []
      and the coefficients [n].
    needs_all: Whether the coefficient of a direction depends on the losses of
      other directions, as a z-score does. If it does not, each of several
      replicas can evaluate a part of the directions (``part=``). Defaults to
      True.
    of_rows: Whether ``fn`` gets the losses of the B rows of the batch,
      [n, len(signs), B], instead of their means. The loss must then return one
      value per row, [B]. Defaults to False.

  Raises:
    ValueError: If ``signs`` is not a tuple of numbers, ``fn`` is not callable,
      or ``needs_all`` or ``of_rows`` is not a bool.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Definition 1 (``two_sided``).

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> def sign(losses, eps):
    ...   plus, minus = losses.T
    ...   return jnp.mean(losses), jnp.sign(plus - minus)
    >>> combine = mezo_jax.Combine((1.0, -1.0), sign, needs_all=False)
    >>> tx = mezo_jax.spsa(1e-3, key=0, combine=combine)
  """

  signs: tuple[float, ...]
  fn: Callable
  _: dataclasses.KW_ONLY
  needs_all: bool = True
  of_rows: bool = False

  def __post_init__(self) -> None:
    """Checks the fields."""
    if not isinstance(self.signs, (tuple, list)) or not self.signs:
      raise ValueError('signs must be a non-empty tuple of numbers, such as '
                       f'(1.0, -1.0); got {self.signs!r}.')
    for sign in self.signs:
      arguments.number('each of signs', sign)
    arguments.function('fn', self.fn)
    arguments.boolean('needs_all', self.needs_all)
    arguments.boolean('of_rows', self.of_rows)
    object.__setattr__(self, 'signs', tuple(self.signs))

  def evaluations(self, n: int) -> int:
    """Returns how often a step with n directions evaluates the loss."""
    clean = 0 in self.signs
    return n * (len(self.signs) - clean) + clean

  # This is not __call__, because optax.inject_hyperparams treats every callable
  # argument as a schedule.
  def apply(self, losses: jax.Array, eps: Any) -> tuple[jax.Array, jax.Array]:
    """Calls ``fn(losses, eps)`` and checks the shapes of its results.

    Raises:
      ValueError: If ``fn`` does not return a scalar and n coefficients.
    """
    out = self.fn(losses, eps)
    if not isinstance(out, (tuple, list)) or len(out) != 2:
      raise ValueError('the fn of a Combine must return a pair (value, '
                       f'projected_grad), got a {type(out).__name__}.')
    value, g = map(jnp.asarray, out)
    if value.shape or g.shape != losses.shape[:1]:
      raise ValueError(
          'the fn of a Combine must return a scalar value and a projected_grad '
          f'of shape [{losses.shape[0]}], a number for each direction; got '
          f'shapes {[*value.shape]} and {[*g.shape]}.')
    return value, g


def _two_sided(losses, eps):
  """Returns central differences of the losses; see `two_sided`."""
  loss_plus, loss_minus = losses.T
  return jnp.mean(losses), (loss_plus - loss_minus) / (2 * eps)


def _one_sided(losses, eps):
  """Returns forward differences of the losses; see `one_sided`."""
  loss_plus, loss = losses.T
  return loss[0], (loss_plus - loss) / eps


def _fzoo(losses, eps):
  """Returns differences divided by their deviation; see `fzoo`."""
  del eps  # It cancels: differences and deviation are both proportional to it.
  losses, loss = losses.T
  if len(losses) < 2:
    raise ValueError('num_samples must be at least 2 with fzoo, which divides '
                     'by the standard deviation over directions.')
  least = jnp.finfo(jnp.float32).eps * jnp.maximum(1.0, jnp.abs(loss[0]))
  std = jnp.maximum(jnp.std(losses, ddof=1), least)
  return loss[0], (losses - loss) / std


def _per_member(standardize):
  """Returns a ``fn`` of `Combine` that compares the members of a population.

  A member is a pair of a direction and a sign s. The coefficient of direction j
  is the mean over its signs of s times the standardized loss of the member, so
  that the update is the mean over all members, as the papers define it.

  Args:
    standardize: A function from the losses of all members, [members] or
      [members, B], to one number for each, [members].
  """
  def fn(losses, eps):
    del eps  # It cancels, as the losses are standardized.
    n, signs, *rows = losses.shape
    if n * signs < 2:
      raise ValueError('num_samples must be at least 2 with this combine '
                       'function, which compares the members of a population.')
    z = standardize(losses.reshape(n * signs, *rows)).reshape(n, signs)
    return jnp.mean(losses), jnp.mean(z * jnp.array(_SIGNS[signs]), 1)
  return fn


# The signs of a population: one-sided, and antithetic (mirrored) sampling.
_SIGNS = {1: (1.0,), 2: (1.0, -1.0)}


def _z_score(losses):
  """Returns (L - mean) / (std + 1e-8), with the members as denominator."""
  losses = losses - losses[0]  # so that equal losses give exactly 0
  return (losses - jnp.mean(losses)) / (jnp.std(losses) + 1e-8)


def _centered_rank(losses):
  """Returns ranks from -1/2 (least) to 1/2. Equal losses share their mean rank.
  """
  below = jnp.sum(losses[:, None] > losses, 1)
  equal = jnp.sum(losses[:, None] == losses, 1)
  rank = below + (equal - 1) / 2
  # A comparison with NaN is false, so a loss that is NaN would get a rank.
  return jnp.where(jnp.isnan(losses), jnp.nan,
                   rank / (losses.size - 1) - 0.5)


def _per_prompt(losses):
  """Returns the mean over prompts of (L - mean of the prompt) / std."""
  losses = losses - losses[:1]  # so that equal losses give exactly 0
  centered = losses - jnp.mean(losses, 0)
  return jnp.mean(centered, 1) / (jnp.std(centered) + 1e-8)


# Central differences, g = (L(θ + εz) - L(θ - εz)) / (2ε). The bias is O(ε²). A
# step takes 2n evaluations. Malladi et al., 2023, arXiv:2305.17333, Definition
# 1. Example: mezo_jax.spsa(1e-3, key=0, combine=mezo_jax.two_sided)
two_sided: Combine = Combine((1.0, -1.0), _two_sided, needs_all=False)
# Forward differences, g = (L(θ + εz) - L(θ)) / ε. The bias is O(ε), and a step
# takes n + 1 evaluations. Example: mezo_jax.spsa(1e-3, key=0,
# combine=mezo_jax.one_sided, num_samples=4)
one_sided: Combine = Combine((1.0, 0.0), _one_sided, needs_all=False)
# FZOO, g = (L(θ + εz) - L(θ)) / std, for Rademacher directions. std is the
# standard deviation of the losses L(θ + εz_j) over the n directions, with n - 1
# in the denominator, and at least the rounding error of a float32 loss. The
# length of a step then does not depend on the length of the gradient. A step
# takes n + 1 evaluations. FZOO, 2025, arXiv:2506.09034. Example:
# mezo_jax.spsa(1e-3, key=0, directions=mezo_jax.Rademacher(),
# combine=mezo_jax.fzoo, num_samples=8)
fzoo: Combine = Combine((1.0, 0.0), _fzoo)
# Evolution strategies, g = (L(θ + εz) - mean) / (std + 1e-8), with the mean and
# the standard deviation of the n losses. With loss = -reward, learning rate α
# and σ = ε, the step is θ + α/n Σ Z_j z_j of the paper, which includes 1/σ in
# α. Qiu et al., 2025, Evolution strategies at scale, arXiv:2509.24372,
# Algorithm 1.
# Example: mezo_jax.mezo(5e-4, estimator=mezo_jax.spsa(1e-3, key=0,
# combine=mezo_jax.z_score, num_samples=30))
z_score: Combine = Combine(_SIGNS[1], _per_member(_z_score))
# Evolution strategies with ranks. The least loss of a step has the rank -1/2,
# the largest 1/2. Salimans et al., 2017, Evolution strategies as a scalable
# alternative to reinforcement learning, arXiv:1703.03864, Section 2.
centered_rank: Combine = Combine(_SIGNS[1], _per_member(_centered_rank))
# EGGROLL: for each row of the batch, the loss minus its mean over members,
# divided by the standard deviation of these differences over all members and
# rows. The result is averaged over rows. Sarkar et al., 2025, arXiv:2511.16652.
per_prompt: Combine = Combine(
    _SIGNS[1], _per_member(_per_prompt), of_rows=True)
# The same with two antithetic members of each direction, L(θ + εz) and
# L(θ - εz). The 2n members are standardized together, and g = (Z₊ - Z₋) / 2.
antithetic_z_score: Combine = Combine(_SIGNS[2], _per_member(_z_score))
antithetic_centered_rank: Combine = Combine(
    _SIGNS[2], _per_member(_centered_rank))
antithetic_per_prompt: Combine = Combine(
    _SIGNS[2], _per_member(_per_prompt), of_rows=True)
# Names of the functions above, for configs and for ``combine=``.
COMBINES: dict[str, Combine] = {
    'two_sided': two_sided, 'one_sided': one_sided, 'fzoo': fzoo,
    'z_score': z_score, 'centered_rank': centered_rank,
    'per_prompt': per_prompt, 'antithetic_z_score': antithetic_z_score,
    'antithetic_centered_rank': antithetic_centered_rank,
    'antithetic_per_prompt': antithetic_per_prompt}


def as_combine(combine: Combine | str) -> Combine:
  """Converts the name of a `Combine` to the `Combine`.

  Args:
    combine: A `Combine`, which is returned unchanged, or a key of `COMBINES`.

  Raises:
    ValueError: If ``combine`` is neither a `Combine` nor a known name.
  """
  if isinstance(combine, Combine):
    return combine
  if not isinstance(combine, str) or combine not in COMBINES:
    raise ValueError(
        f'combine must be one of the names {tuple(COMBINES)} or a '
        f'mezo_jax.Combine, got {combine!r}.')
  return COMBINES[combine]
