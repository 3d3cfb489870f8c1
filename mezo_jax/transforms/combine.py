r"""Combines the losses of n directions into a value and n coefficients of z."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax.core import arguments


@dataclasses.dataclass(frozen=True)
class Combine:
  r"""Turns the losses of n directions into a value and n coefficients of z.

  Attributes:
    signs: The s of the points :math:`\theta + s \epsilon z` that are evaluated
      for each direction. The loss of s = 0, the same for all directions, is
      evaluated once.
    fn: ``(losses [n, signs], eps) -> (value [], projected_grad [n])``.
    needs_all: Whether a coefficient depends on the losses of other directions
      than its own, as z-scores and ranks do. If not, replicas can evaluate a
      part of the directions each (``part=``). Defaults to True.

  Raises:
    ValueError: for signs that are not numbers, or a ``fn`` that cannot be
      called.
  """

  signs: tuple[float, ...]
  fn: Callable
  _: dataclasses.KW_ONLY
  needs_all: bool = True

  def __post_init__(self) -> None:
    if not isinstance(self.signs, (tuple, list)) or not self.signs:
      raise ValueError('signs must be a tuple of numbers, such as (1.0, -1.0), '
                       f'got {self.signs!r}.')
    for sign in self.signs:
      arguments.number('each of signs', sign)
    arguments.function('fn', self.fn)
    arguments.boolean('needs_all', self.needs_all)
    object.__setattr__(self, 'signs', tuple(self.signs))

  def evaluations(self, n: int) -> int:
    """Returns how many times n directions evaluate the loss of a batch."""
    clean = 0 in self.signs
    return n * (len(self.signs) - clean) + clean

  # No __call__: optax.inject_hyperparams takes what is callable for a schedule.
  def apply(self, losses: jax.Array, eps: Any) -> tuple[jax.Array, jax.Array]:
    """Returns ``fn(losses, eps)``, whose shapes are checked.

    Raises:
      ValueError: for something else than a value and n coefficients.
    """
    out = self.fn(losses, eps)
    if not isinstance(out, (tuple, list)) or len(out) != 2:
      raise ValueError('the fn of a Combine must return (value, '
                       f'projected_grad), got {type(out).__name__}.')
    value, g = map(jnp.asarray, out)
    if value.shape or g.shape != losses.shape[:1]:
      raise ValueError(
          'the fn of a Combine must return a value [] and projected_grad '
          f'[{losses.shape[0]}], one for each direction, got '
          f'{[*value.shape]} and {[*g.shape]}.')
    return value, g


def _two_sided(losses, eps):
  loss_plus, loss_minus = losses.T
  return jnp.mean(losses), (loss_plus - loss_minus) / (2 * eps)


def _one_sided(losses, eps):
  loss_plus, loss = losses.T
  return loss[0], (loss_plus - loss) / eps


def _fzoo(losses, eps):
  del eps  # the differences and their deviation are both proportional to it
  losses, loss = losses.T
  if len(losses) < 2:
    raise ValueError('fzoo divides by the standard deviation of the losses of '
                     'its directions: it needs num_samples of at least 2.')
  least = jnp.finfo(jnp.float32).eps * jnp.maximum(1.0, jnp.abs(loss[0]))
  std = jnp.maximum(jnp.std(losses, ddof=1), least)
  return loss[0], (losses - loss) / std


# Its bias is O(eps**2); it takes 2n evaluations.
two_sided: Combine = Combine((1.0, -1.0), _two_sided, needs_all=False)
# Its bias is O(eps); it takes n + 1 evaluations.
one_sided: Combine = Combine((1.0, 0.0), _one_sided, needs_all=False)
# FZOO (arXiv:2506.09034) is for Rademacher directions: (l_j - l_0) / std(l), so
# the length of a step does not depend on the gradient. The deviation is that of
# a sample (n - 1), and no less than the rounding error of a float32 loss.
fzoo: Combine = Combine((1.0, 0.0), _fzoo)
COMBINES: dict[str, Combine] = {
    'two_sided': two_sided, 'one_sided': one_sided, 'fzoo': fzoo}


def as_combine(combine: Combine | str) -> Combine:
  """Returns a combine function, which may be given by name.

  Raises:
    ValueError: for an unknown name, or something else.
  """
  if isinstance(combine, Combine):
    return combine
  if not isinstance(combine, str) or combine not in COMBINES:
    raise ValueError(
        f'combine must be one of {tuple(COMBINES)}, or a mezo_jax.Combine, got '
        f'{combine!r}.')
  return COMBINES[combine]
