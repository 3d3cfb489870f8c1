r"""Evaluates losses at displaced weights, for one point or for n directions."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, cast, get_args, Literal

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments, paths, sharding
from mezo_jax.directions.base import Directions
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.directions.low_rank import LowRank
from mezo_jax.perturb.api import perturbed
from mezo_jax.transforms import losses as losses_lib

# Number of elements that one forward pass may always build; see `check_room`.
_ROOM = 2**24
Over = Literal['scan', 'batch', 'rows']
OVER = get_args(Over)


def estimate(
    value_fn: Callable[..., Any],
    params: Any,
    z: Displacement,
    eps: Any,
    directions: Directions | str,
    *,
    signs: tuple[float, ...] = (1.0, -1.0),
    over: Over = 'scan',
    micro_batches: int = 1,
    batch: Mapping[str, Any] | None = None,
    around: Displacement | None = None,
    of_rows: bool = False,
) -> jax.Array:
  r"""Evaluates the loss at points along n directions.

  .. math:: \ell_{j,s} = \mathcal{L}(\theta + s \epsilon z_j; \mathcal{B})

  Under `jax.set_mesh` of a mesh with an axis ``direction`` (see
  `mezo_jax.sharding.make_mesh`), the groups of devices along this axis evaluate
  different points at the same time and exchange the losses.

  Args:
    value_fn: The loss, ``value_fn(params, **batch)``. It returns a scalar,
      per-example losses ``[B]`` or ``(losses, weights)``; see `mezo_jax.spsa`.
    params: The params :math:`\theta`.
    z: A `Displacement` with n terms, which are the :math:`z_j`.
    eps: Perturbation scale :math:`\epsilon`. A number, or an OrderedDict
      ``{regular expression: number}`` for groups of params.
    directions: Distribution of z, or its name.
    signs: The factors s. The loss at s = 0 is evaluated once for all
      directions. Defaults to (1.0, -1.0).
    over: How the points are evaluated. 'scan', the default, evaluates one point
      after the other, with one forward pass in memory. 'batch' evaluates all
      points in one forward pass, each on the whole batch. 'rows' also uses one
      forward pass, but divides the rows of the batch into n equal parts and
      evaluates each direction on its own part. In such a pass over several
      points, `LowRank` directions need one product with each clean weight for
      all points. Other directions build each layer once per point.
    micro_batches: Number of equal parts in which the batch is evaluated, one
      after the other. With 'rows', it must divide n. Defaults to 1.
    batch: Arguments of ``value_fn``, by name. Arguments that ``value_fn`` does
      not take are ignored. Defaults to None, for no arguments.
    around: A displacement that is added to ``params`` for the evaluation.
      Defaults to None.
    of_rows: Whether to return the losses of the B rows, [n, len(signs), B],
      instead of their means. ``value_fn`` must then return one value per row.
      Defaults to False.

  Returns:
    Losses [n, len(signs)], float32 or float64. With 'rows', entry j is n times
    the contribution of the rows of direction j to the loss of the batch. The
    mean over directions is then the loss of the batch, even if rows have
    different weights.

  Raises:
    ValueError: If ``over`` is unknown, if ``value_fn`` returns half precision
      or something that is not a loss, if the rows cannot be divided into n or
      ``micro_batches`` equal parts, if a forward pass over all points would
      build several times as many weights as the model has, or if ``of_rows`` is
      True and ``value_fn`` does not return one value per row or the batch is
      split.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Definition 1.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax
    >>> z = mezo_jax.Displacement(
    ...     jax.random.split(jax.random.key(0), 4), jnp.ones(4))
    >>> loss = lambda params, x: jnp.mean((params - x) ** 2)
    >>> mezo_jax.estimate(loss, jnp.zeros(3), z, 1e-3, 'normal',
    ...                   batch={'x': jnp.ones(3)}).shape
    (4, 2)
  """
  arguments.function('value_fn', value_fn)
  directions = as_directions(directions)
  check_over(over)
  check_displacement('z', z)
  if around is not None:
    check_displacement('around', around)
  n, groups = z.keys.shape[0], sharding.direction_groups()
  if over != 'scan':
    check_room(params, directions, -(-n * len(signs) // groups))
  at = at_point(value_fn, params, eps, directions, around, over, z)
  batch = losses_lib.accepted(value_fn, dict(batch or {}))
  if of_rows and (over == 'rows' or micro_batches > 1):
    raise ValueError("of_rows: the losses of rows need over='scan' or 'batch' "
                     'and micro_batches=1.')
  if over == 'rows':
    if groups > 1:
      raise ValueError(
          "over='rows' cannot be used with a mesh axis 'direction' above 1, "
          'since each device evaluates the directions of its own rows. Split '
          "the axis 'data' instead.")
    return _losses_of_rows(
        at, z, np.array(signs, np.float32), micro_batches, batch)

  def loss_at(batch, point):
    """Evaluates the loss of the batch at one point."""
    if of_rows:
      return losses_lib.of_rows(at(batch, point))
    return losses_lib.mean_over_parts(
        lambda part: at(part, point), batch, micro_batches)
  return over_points(loss_at, batch, z, signs, over)


def at_point(value_fn: Callable[..., Any], params: Any, eps: Any,
             directions: Directions, around: Displacement | None, over: Over,
             z: Displacement) -> Callable[..., Any]:
  """Returns a function ``(batch, point) -> result of value_fn`` at one point.

  The arguments are those of `estimate`.
  """
  displaced = perturbed(value_fn, directions)
  if around is not None and (
      over == 'rows' or over == 'batch' and z.keys.shape[0] > 1):
    # If all points are evaluated in one pass, the displacement ``around``,
    # which they share, is applied to the weights once for all points.
    center, perturbed_at = around, displaced
    at_center = lambda params, **part: perturbed_at(params, center, **part)
    displaced, around = perturbed(at_center, directions), None

  def at(part, z):
    """Evaluates a part of the batch at one point."""
    return displaced(params, sum_of(z.times(eps), around, eps), **part)
  return at


def sum_of(point: Displacement, around: Displacement | None, eps: Any
           ) -> Displacement:
  """Returns a point, moved by a displacement if there is one.

  One sum perturbs the weights in a single pass.

  Args:
    point: The point, with coefficients for each group of eps.
    around: The displacement, or None.
    eps: Perturbation scale, a number or groups.
  """
  if around is None:
    return point
  return around.times(jax.tree.map(jnp.ones_like, eps)).joined(point)


def over_points(of_point: Callable[..., Any], batch: dict[str, Any],
                z: Displacement, signs: tuple[float, ...], over: Over,
                at_once: int | None = None) -> Any:
  """Evaluates a function at the points s z_j of n directions.

  Args:
    of_point: A function ``(batch, point) -> arrays``, where ``point`` is a
      `Displacement` of one term.
    batch: Its first argument.
    z: The n directions.
    signs: The factors s. The point s = 0 is evaluated once for all directions.
    over: 'scan' or 'batch'; see `estimate`.
    at_once: With 'batch', the number of points that are evaluated together.
      Defaults to None, for all of them.

  Returns:
    The arrays, with the axes [n, len(signs)] before their own.
  """
  n, coefs = z.keys.shape[0], cast(jax.Array, z.coefs)
  # A point is a displacement of one term. The points of the nonzero signs come
  # first, direction by direction. The point of sign 0 comes last, if there is
  # one. The signs are a NumPy array, so that they are constants of the program.
  moved: Any = np.array([s for s in signs if s], np.float32)
  keys = jnp.repeat(z.keys, len(moved))
  coefs = jnp.outer(coefs, moved).ravel()
  if 0 in signs:
    keys, coefs = jnp.append(keys, z.keys[0]), jnp.append(coefs, 0.0)
  points = Displacement(keys, coefs)

  def of_all(batch, points):
    """Evaluates several points."""
    one = functools.partial(of_point, batch)
    if over == 'scan':
      return lax.map(one, points)
    if at_once is None or at_once >= points.keys.shape[0]:
      return jax.vmap(one)(points)
    return lax.map(one, points, batch_size=at_once)
  groups = sharding.direction_groups()
  if groups > 1:
    out = _split(of_all, batch, points, groups)
  elif over == 'batch' and n == 1:
    # `jax.vmap` maps over the coefficients only, so that the signs of the
    # direction share its key and its factors.
    out = jax.vmap(lambda c: of_point(batch, Displacement(
        z.keys, c[None])))(coefs)
  else:
    out = of_all(batch, points)

  def ordered(x):
    """Orders the results by direction and sign."""
    each = x[:n * len(moved)].reshape(n, len(moved), *x.shape[1:])
    columns = iter([each[:, i] for i in range(len(moved))])
    return jnp.stack([
        next(columns) if s else jnp.broadcast_to(x[-1], (n, *x.shape[1:]))
        for s in signs], axis=1)
  return jax.tree.map(ordered, out)


def _split(of_all: Callable, batch: dict, points: Displacement,
           groups: int) -> Any:
  """Evaluates points in parallel on the groups of the mesh axis 'direction'.

  Every group evaluates the same number of points. If the points cannot be
  divided evenly, the last point is repeated, and the repetitions are dropped
  from the result.

  Args:
    of_all: A function ``(batch, points) -> arrays``.
    batch: Its first argument.
    points: The points, one term for each.
    groups: Number of groups.
  """
  n = points.keys.shape[0]
  index = np.minimum(np.arange(-(-n // groups) * groups), n - 1)
  def of_groups(x):
    """Splits an array over the groups."""
    return lax.with_sharding_constraint(
        x[index].reshape(groups, -1), jax.P('direction'))
  of_points = functools.partial(of_all, batch)
  out = jax.vmap(of_points, spmd_axis_name='direction')(
      jax.tree.map(of_groups, points))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n],
                      lax.with_sharding_constraint(out, jax.P()))


def _losses_of_rows(at, z, signs, parts, batch):
  """Returns the losses of n directions, each on its own part of the rows.

  Args:
    at: A function ``(part of the batch, z) -> result of the loss``.
    z: The n directions.
    signs: The factors s, a NumPy array.
    parts: Number of parts that are evaluated one after the other.
    batch: Arguments of the loss.

  Returns:
    Losses [n, len(signs)]; see `estimate`.
  """
  n = z.keys.shape[0]
  rows, sums_of = losses_lib.in_parts(
      at, batch, n, "over='rows': num_samples")

  def of_rows(term, rows):
    """Evaluates all signs of one direction on its own rows."""
    return jax.vmap(lambda s: sums_of(rows, term.times(s)))(signs)

  # The rows are split over the devices of a mesh, and so are the directions.
  together = jax.vmap(of_rows, spmd_axis_name=sharding.rows_axes())
  with sharding.rows_have_directions():
    if parts == 1:
      total, weight = together(z, rows)
    else:
      some = jax.tree.map(lambda x: sharding.split_rows(x, parts), (z, rows))
      sums = lax.map(lambda part: together(*part), some)
      total, weight = (x.reshape(n, -1) for x in sums)
  return n * total / jnp.sum(weight, 0)


def check_displacement(name: str, displacement: Any) -> None:
  """Raises ValueError if an argument is not a `Displacement`."""
  if not isinstance(displacement, Displacement):
    raise ValueError(f'{name} must be a mezo_jax.Displacement, got '
                     f'{displacement!r}.')


def check_over(over: str) -> None:
  """Raises ValueError if ``over`` is not one of `OVER`."""
  if not isinstance(over, str) or over not in OVER:
    raise ValueError(f'over must be one of {OVER}, got {over!r}.')


def check_room(params, directions: Directions, points: int) -> None:
  """Checks the memory of evaluating several points in one forward pass.

  Args:
    params: The params.
    directions: Distribution of z. `LowRank` builds no weights, so that any
      number of points is accepted.
    points: Number of points that one device evaluates in one pass. Each builds
      one layer of perturbed weights at a time.

  Raises:
    ValueError: If this takes more than 4 times the memory of the model.
  """
  if isinstance(directions, LowRank):
    return
  layers = [0]
  stacks = paths.stacked(params, directions.stacked)
  for (_, x), is_stack in zip(paths.named_leaves(params), stacks):
    if paths.is_floating(x):
      layers.append(x.size // x.shape[0] if is_stack else x.size)
  total = paths.size_of(params)
  if points * max(layers) > max(4 * total, _ROOM):
    raise ValueError(
        f'over: evaluating {points} points in one pass would build perturbed '
        f'weights of up to {points * max(layers) / total:.0f} times the memory '
        "of the model. Use over='scan', fewer directions, or "
        'directions=mezo_jax.LowRank(), which builds no weights.')
