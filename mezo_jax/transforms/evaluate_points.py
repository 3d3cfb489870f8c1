r"""Losses at displaced weights: of one point, and of n directions."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, cast

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

_ROOM = 2**24  # elements: less is never refused
OVER = ('scan', 'batch', 'rows')


def loss_at(value_fn: Callable[..., Any], params: Any, directions: Directions,
            batch: Mapping[str, Any], micro_batches: int = 1
            ) -> Callable[[Displacement], jax.Array]:
  r"""Returns a function from a displacement :math:`\delta` to the loss
  :math:`\mathcal{L}(\theta + \delta; \mathcal{B})`.

  Args:
    value_fn: The loss; see `mezo_jax.spsa`.
    params: :math:`\theta`.
    directions: What z is.
    batch: Arguments of ``value_fn``, by name; others are ignored.
    micro_batches: Number of equal parts in which the batch is evaluated.
  """
  batch = losses_lib.accepted(value_fn, dict(batch))
  displaced = perturbed(value_fn, directions)
  return lambda point: losses_lib.mean_over_parts(
      lambda part: displaced(params, point, **part), batch, micro_batches)


def estimate(
    value_fn: Callable[..., Any],
    params: Any,
    z: Displacement,
    eps: Any,
    directions: Directions | str,
    *,
    signs: tuple[float, ...] = (1.0, -1.0),
    over: str = 'scan',
    micro_batches: int = 1,
    batch: Mapping[str, Any] | None = None,
    around: Displacement | None = None,
) -> jax.Array:
  r"""Returns losses :math:`\mathcal{L}(\theta + s \epsilon z_j;
  \mathcal{B}_j)`.

  Args:
    value_fn: ``value_fn(params, **batch)``. It returns a scalar, per-example
      losses ``[B]`` or ``(losses, weights)``; see `mezo_jax.spsa`.
    params: :math:`\theta`.
    z: A displacement whose n terms are :math:`z_j`.
    eps: :math:`\epsilon`, or an OrderedDict ``{regular expression: number}``.
    directions: Distribution of z, or its name.
    signs: Values of s. The loss of s = 0 is evaluated once for all directions.
    over: How the n directions and their signs are evaluated. 'scan' evaluates
      one after the other, with one forward pass in memory. 'batch' evaluates
      all in one pass, each on the whole batch. 'rows' evaluates all in one
      pass, each on its own n-th of the rows. With `LowRank` directions all
      share one product with each weight; others build a layer per point.
    micro_batches: Number of parts of the batch that are evaluated one after the
      other. With 'rows' it must divide n.
    batch: Arguments of ``value_fn``, by name; others are ignored.
    around: A displacement from ``params`` to :math:`\theta`. Defaults to None,
      for none.

  Under `jax.set_mesh` of a mesh with an axis `direction`, as
  `mezo_jax.sharding.make_mesh` makes it, its groups evaluate the points at
  the same time, each its part, and exchange the losses.

  Returns:
    Losses [n, signs], float32 or float64. With 'rows' they are n times what the
    rows add to the loss of the batch, so their mean is that loss, however much
    the rows weigh.

  Raises:
    ValueError: For an unknown ``over``; for a ``value_fn`` that returns
      something else, or losses of half precision; if n does not divide the
      rows, or ``micro_batches`` does not divide n or the rows; or if building
      directions would take several times the memory of the weights.
  """
  arguments.function('value_fn', value_fn)
  directions = as_directions(directions)
  check_over(over)
  check_displacement('z', z)
  if around is not None:
    check_displacement('around', around)
  if over != 'scan':
    _check_room(params, directions, -(-z.keys.shape[0] * len(signs)
                                      // sharding.direction_groups()))
  n = z.keys.shape[0]
  if around is not None and (  # all points share it, so apply it once
      over == 'rows' or over == 'batch' and n > 1):
    value_fn = _displaced(value_fn, around, directions)
    around = None

  def at(z, part):
    point = z.times(eps)
    if around is not None:  # one sum, so weights are perturbed in one pass
      point = around.times(jax.tree.map(jnp.ones_like, eps)).joined(point)
    return perturbed(value_fn, directions)(params, point, **part)

  batch = losses_lib.accepted(value_fn, dict(batch or {}))
  if over == 'rows':
    if sharding.direction_groups() > 1:
      raise ValueError(
          "over='rows' gives each row's directions to the device that has the "
          'row: leave the mesh axis direction at 1, and split data instead.')
    return _losses_of_rows(
        at, z, np.array(signs, np.float32), micro_batches, batch)

  coefs = cast(jax.Array, z.coefs)
  # In NumPy, since a JAX array would not be a constant to the compiler.
  moved: Any = np.array([s for s in signs if s], np.float32)
  points = Displacement(
      jnp.repeat(z.keys, len(moved)), jnp.outer(coefs, moved).ravel())
  if 0 in signs:
    points = Displacement(jnp.append(points.keys, z.keys[0]),
                          jnp.append(cast(jax.Array, points.coefs), 0.0))
  def loss_at(batch, point):
    return losses_lib.mean_over_parts(
        lambda part: at(point, part), batch, micro_batches)
  def of_all(batch, points):
    loss = functools.partial(loss_at, batch)
    return jax.vmap(loss)(points) if over == 'batch' else lax.map(loss, points)
  groups = sharding.direction_groups()
  if groups > 1:
    losses = _split(of_all, batch, points, groups)
  elif over == 'batch' and n == 1:  # signs of one direction share its factors
    losses = jax.vmap(lambda c: loss_at(batch, Displacement(
        z.keys, c[None])))(points.coefs)
  else:
    losses = of_all(batch, points)
  columns = iter(losses[:n * len(moved)].reshape(n, -1).T)
  return jnp.stack([next(columns) if s else jnp.broadcast_to(losses[-1], n)
                    for s in signs], axis=1)


def _split(of_all: Callable, batch: dict, points: Displacement,
           groups: int) -> jax.Array:
  """Returns the losses of points. Each group of a mesh's `direction` axis
  evaluates as many; the last points are repeated if they do not divide."""
  n = points.keys.shape[0]
  index = np.minimum(np.arange(-(-n // groups) * groups), n - 1)
  points = jax.tree.map(lambda x: lax.with_sharding_constraint(
      x[index].reshape(groups, -1), jax.P('direction')), points)
  losses = jax.vmap(functools.partial(of_all, batch),
                    spmd_axis_name='direction')(points)
  return lax.with_sharding_constraint(losses, jax.P()).ravel()[:n]


def _displaced(value_fn: Callable, by: Displacement,
               directions: Directions) -> Callable:
  return lambda params, **kwargs: perturbed(value_fn, directions)(
      params, by, **kwargs)


def _losses_of_rows(at, z, signs, parts, batch):
  n = z.keys.shape[0]
  rows, with_rows = losses_lib.split_batch(batch, n, "over='rows': num_samples")
  count = losses_lib.rows_of_parts(rows)

  def of_rows(term, rows):
    def of_sign(s):
      out = at(term.times(s), with_rows(rows))
      losses_lib.check_parts(
          out, n, "over='rows': num_samples", rows=count)
      return losses_lib.sums(out)
    return jax.vmap(of_sign)(signs)

  # Rows, and so their directions, are split between the devices of a mesh.
  together = jax.vmap(of_rows, spmd_axis_name=sharding.rows_axes())
  with sharding.rows_have_directions():
    if parts == 1:
      total, weight = together(z, rows)
    else:
      some = lambda x: sharding.split_rows(x, parts)
      total, weight = lax.map(
          lambda part: together(*part), jax.tree.map(some, (z, rows)))
      total, weight = (x.reshape(n, -1) for x in (total, weight))
  return n * total / jnp.sum(weight, 0)


def check_displacement(name: str, displacement: Any) -> None:
  if not isinstance(displacement, Displacement):
    raise ValueError(f'{name} must be a mezo_jax.Displacement, got '
                     f'{displacement!r}.')


def check_over(over: str) -> None:
  if not isinstance(over, str) or over not in OVER:
    raise ValueError(f'over must be one of {OVER}, got {over!r}.')


def _check_room(params, directions: Directions, points: int) -> None:
  """Checks that building a layer for each of many points fits in memory.

  Raises:
    ValueError: If it takes several times the memory of the weights.
  """
  if isinstance(directions, LowRank):
    return
  leaves = [x for _, x in paths.named_leaves(params)]
  stacks = paths.stacked(params, directions.stacked)
  layers = [x.size // x.shape[0] if is_stack else x.size
            for x, is_stack in zip(leaves, stacks) if paths.is_floating(x)]
  total = paths.size_of(params)
  if points * max(layers, default=0) > max(4 * total, _ROOM):
    raise ValueError(
        f'{points} points at once would each build perturbed weights of their '
        f'own, up to {points * max(layers) / total:.0f} times the memory of '
        'the model: use directions=mezo_jax.LowRank(), which builds none, '
        "over='scan', or fewer directions.")
