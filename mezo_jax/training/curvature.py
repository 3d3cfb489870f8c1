r"""Measures the gradient, the curvature and the noise of a loss.

Along a direction z, with a perturbation scale ε, three losses of a batch give a
projected gradient and a projected curvature:

.. math:: g = \frac{\ell_+ - \ell_-}{2 \epsilon} \approx z^\top \nabla \ell,
   \qquad c = \frac{\ell_+ + \ell_- - 2 \ell_0}{\epsilon^2} \approx z^\top H z

`sample` measures both on two independent batches for each direction.
`quantities` turns the samples into the numbers that decide a learning rate, and
`spread` gives their standard errors. Nothing here computes a derivative, except
for `largest_eigenvalue` and `descents`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import direction, perturbed
from mezo_jax.transforms import losses
from mezo_jax.transforms.evaluate_points import estimate

Batch = Mapping[str, Any]
_RESAMPLES = 400  # bootstrap resamples from which standard errors are computed


class Samples(NamedTuple):
  """Holds what was measured along J directions, on two batches each.

  Attributes:
    g: Projected gradients, float64 [J, 2].
    c: Projected curvatures, float64 [J, 2].
    loss: Losses of the unperturbed model, float64 [J, 2].
  """

  g: np.ndarray
  c: np.ndarray
  loss: np.ndarray


class Quantities(NamedTuple):
  r"""Holds the estimates that follow from `Samples`.

  H is the Hessian of the loss, and an index B marks a quantity of one batch.

  Attributes:
    loss: Mean loss.
    gradient: :math:`|\nabla L|^2 = E[g_1 g_2]`, where 1 and 2 are independent
      batches.
    batch_gradient: :math:`E|\nabla L_B|^2 = E[g^2]`.
    signal: Share of ``gradient`` in ``batch_gradient``.
    trace: :math:`\mathrm{tr} H = E[c]`.
    cost: :math:`E[g_1^2 c_2]`, twice the loss that the noise of a step of rate
      1 along one direction adds.
    along: :math:`E[\nabla L_B^\top H \nabla L_B] = (E[g_1^2 c_2] - E[g^2] E[c])
      / 2`, which holds for normal z.
    rank: :math:`\mathrm{tr} H / (\mathrm{along} / \mathrm{batch\_gradient})`,
      the effective rank of H along the gradient.
  """

  loss: Any
  gradient: Any
  batch_gradient: Any
  signal: Any
  trace: Any
  cost: Any
  along: Any
  rank: Any

  def per_step(self, n: int) -> Any:
    r"""Returns the curvature of a step along n directions.

    A step of rate η changes the loss by :math:`-\eta |\nabla L|^2 + \eta^2 D /
    2` on average, and this is

    .. math:: D = E[g_1^2 c_2] / n + (1 - 1 / n) E[\nabla L_B^\top H \nabla L_B]
    """
    return self.cost / n + (1 - 1 / n) * self.along

  def best_rate(self, n: int) -> Any:
    r"""Returns the rate whose next step lowers the loss most, |∇L|² / D."""
    return self.gradient / self.per_step(n)

  def largest_stable_rate(self, n: int) -> Any:
    r"""Returns the rate above which a step raises the loss of its own batch.

    It is :math:`2 E|\nabla L_B|^2 / D`.
    """
    return 2 * self.batch_gradient / self.per_step(n)

  def slowdown(self, n: int) -> Any:
    r"""Returns by how much less a step gains than one of gradient descent.

    Both have their best rates: :math:`D / E[\nabla L_B^\top H \nabla L_B] =
    (r + n + 1) / n`, with the effective rank r. The MeZO paper (Theorem 1) has
    :math:`\mathrm{tr} H / \|H\|` in place of r.
    """
    return (self.rank + n + 1) / n


def sample(value_fn: Callable[..., Any], params: Any, batches: Iterator[Batch],
           count: int, *, eps: float, key: jax.Array,
           directions: Directions | str = Normal()) -> Samples:
  """Measures projected gradients and curvatures along random directions.

  Each direction takes two batches and six forward passes.

  Args:
    value_fn: The loss, ``value_fn(params, **batch)``, as in `mezo_jax.spsa`.
    params: The params. They are not changed.
    batches: Yields the arguments of the loss by name. The batches must be
      independent of each other.
    count: Number J of directions.
    eps: Perturbation scale.
    key: A PRNG key.
    directions: Distribution of z, or its name. Defaults to ``Normal()``.
  """
  directions = as_directions(directions)

  @jax.jit
  def losses_at(params, key, batch):
    z = Displacement(key[None], jnp.ones(1))
    return estimate(value_fn, params, z, eps, directions,
                    signs=(1.0, -1.0, 0.0), batch=batch)[0]
  found = []
  for at in jax.random.split(key, count):
    found.append([losses_at(params, at, next(batches)) for _ in range(2)])
  plus, minus, still = np.moveaxis(
      np.asarray(jax.device_get(found), np.float64), -1, 0)
  return Samples((plus - minus) / (2 * eps),
                 (plus + minus - 2 * still) / eps**2, still)


def quantities(samples: Samples) -> Quantities:
  """Returns the estimates that follow from samples.

  Args:
    samples: The samples. Axes before [J, 2] are kept.
  """
  g, c = samples.g, samples.c
  mean = lambda x: x.mean(-1)
  gradient = mean(g[..., 0] * g[..., 1])
  batch_gradient, trace = mean((g**2).mean(-1)), mean(c.mean(-1))
  cost = mean((g**2 * c[..., ::-1]).mean(-1))
  along = (cost - batch_gradient * trace) / 2
  with np.errstate(divide='ignore', invalid='ignore'):
    return Quantities(
        mean(samples.loss.mean(-1)), gradient, batch_gradient,
        gradient / batch_gradient, trace, cost, along,
        trace * batch_gradient / along)


def spread(samples: Samples, function: Callable[[Quantities], Any],
           seed: int = 0) -> tuple[float, float]:
  """Returns an estimate and its standard error, by the bootstrap.

  Args:
    samples: The samples.
    function: A function of `Quantities`, which may have a further axis.
    seed: Seed of the resamples. Defaults to 0.
  """
  index = np.random.RandomState(seed).randint(
      0, len(samples.g), (_RESAMPLES, len(samples.g)))
  with np.errstate(divide='ignore', invalid='ignore'):
    again = function(quantities(Samples(*(x[index] for x in samples))))
  # A ratio is now and then divided by almost nothing. Half the distance between
  # the quantiles of one standard deviation does not depend on these resamples.
  low, high = np.nanquantile(again, [0.1587, 0.8413])
  return float(function(quantities(samples))), float(high - low) / 2


def decreases(value_fn: Callable[..., Any], params: Any,
              batches: Iterator[Batch], rates: Sequence[float], n: int,
              count: int, *, eps: float, key: jax.Array,
              directions: Directions | str = Normal()) -> np.ndarray:
  r"""Measures by how much one step lowers the loss, for several rates.

  A step :math:`\theta - \frac{\eta}{n} \sum_j g_j z_j` is computed on one batch
  and its loss on another, so the mean is the decrease that training sees. No
  quadratic model of the loss is assumed. The steps are not applied.

  Args:
    value_fn: The loss, as in `sample`.
    params: The params. They are not changed.
    batches: Yields the arguments of the loss by name.
    rates: Learning rates η.
    n: Number of directions of a step.
    count: Number of steps that are tried. Each takes 2n + 1 forward passes and
      one for each rate.
    eps: Perturbation scale.
    key: A PRNG key.
    directions: Distribution of z, or its name. Defaults to ``Normal()``.

  Returns:
    Decreases of the loss, float64 [count, len(rates)].
  """
  directions = as_directions(directions)

  @jax.jit
  def gradients(params, keys, batch):
    found = estimate(value_fn, params, Displacement(keys, jnp.ones(n)), eps,
                     directions, batch=batch)
    return (found[:, 0] - found[:, 1]) / (2 * eps)

  @jax.jit
  def losses_after(params, keys, g, batch):
    batch = losses.accepted(value_fn, dict(batch))
    at = perturbed(value_fn, directions)
    return jax.lax.map(lambda rate: losses.mean_over_parts(
        lambda part: at(params, Displacement(keys, -rate / n * g), **part),
        batch, 1), jnp.array([0.0, *rates]))
  found = []
  for at in jax.random.split(key, count):
    keys = jax.random.split(at, n)
    g = gradients(params, keys, next(batches))
    found.append(losses_after(params, keys, g, next(batches)))
  found = np.asarray(jax.device_get(found), np.float64)
  return found[:, :1] - found[:, 1:]


def gradients_by_eps(value_fn: Callable[..., Any], params: Any,
                     batches: Iterator[Batch], scales: Sequence[float],
                     count: int, *, key: jax.Array,
                     directions: Directions | str = Normal()) -> np.ndarray:
  """Measures projected gradients of the same directions with several eps.

  Args:
    value_fn: The loss, as in `sample`.
    params: The params. They are not changed.
    batches: Yields the arguments of the loss by name.
    scales: Perturbation scales.
    count: Number of directions, each on a batch of its own. Each takes two
      forward passes for each scale.
    key: A PRNG key.
    directions: Distribution of z, or its name. Defaults to ``Normal()``.

  Returns:
    Projected gradients, float64 [count, len(scales)].
  """
  directions = as_directions(directions)

  @jax.jit
  def of_all(params, key, batch):
    def of_one(eps):
      found = estimate(value_fn, params, Displacement(key[None], jnp.ones(1)),
                       eps, directions, batch=batch)[0]
      return (found[0] - found[1]) / (2 * eps)
    return jax.lax.map(of_one, jnp.array(scales, jnp.float32))
  found = [of_all(params, at, next(batches))
           for at in jax.random.split(key, count)]
  return np.asarray(jax.device_get(found), np.float64)


def errors_of_eps(gradients: np.ndarray) -> np.ndarray:
  """Returns the relative error of projected gradients for each eps.

  The error of a large eps comes from the curvature of the loss, and that of a
  small eps from rounding. The scale that agrees best with its neighbours serves
  as the reference.

  Args:
    gradients: Projected gradients [J, E], for E perturbation scales in order.

  Returns:
    Root mean square of the difference from the reference, divided by that of
    the reference, [E]. The reference itself gets the smaller one of the errors
    of its two neighbours.
  """
  rms = lambda x: np.sqrt(np.mean(x**2, 0))
  steps = rms(np.diff(gradients, axis=1))
  # The first and the last scale have one neighbour and cannot be chosen.
  best = 1 + int(np.argmin(steps[:-1] + steps[1:]))
  found = rms(gradients - gradients[:, best:best + 1])
  found[best] = min(found[best - 1], found[best + 1])
  return found / rms(gradients[:, best])


def moved_shares(params: Any, displacement: Displacement,
                 directions: Directions | str = Normal()
                 ) -> tuple[float, float] | None:
  """Returns the shares of half-precision weights that an update moves.

  Args:
    params: The params.
    displacement: The update.
    directions: Distribution of z, or its name. Defaults to ``Normal()``.

  Returns:
    The share if sums are rounded to nearest, and the expected share if they are
    rounded stochastically. None if there are no bfloat16 or float16 weights.
  """
  is_half = lambda p: jnp.result_type(p) in (jnp.bfloat16, jnp.float16)

  def shares(p, u):
    """Returns the numbers of weights that move in both cases."""
    old, exact = p.astype(jnp.float32), p.astype(jnp.float32) + u
    near = exact.astype(p.dtype)
    toward = jnp.where(exact > old, jnp.inf, -jnp.inf).astype(p.dtype)
    gap = jnp.abs(jax.lax.nextafter(p, toward).astype(jnp.float32) - old)
    return (jnp.sum(near != p, dtype=jnp.float32),
            jnp.sum(jnp.minimum(jnp.abs(u) / gap, 1.0), dtype=jnp.float32))

  @jax.jit
  def of_all(params, displacement):
    updates = direction(params, displacement, directions, dtype=jnp.float32)
    found = [shares(p, u) for p, u in zip(
        jax.tree.leaves(params), jax.tree.leaves(updates)) if is_half(p)]
    return jnp.sum(jnp.array(found), 0)
  total = sum(p.size for p in jax.tree.leaves(params) if is_half(p))
  if not total:
    return None
  near, expected = of_all(params, displacement)
  return float(near) / total, float(expected) / total


# --- with derivatives -------------------------------------------------------


def mean_loss(value_fn: Callable[..., Any], batches: Sequence[Batch]
              ) -> Callable[[Any], jax.Array]:
  """Returns the mean loss of batches as a function of the params.

  Args:
    value_fn: The loss, as in `sample`.
    batches: The arguments of the loss by name, of equal shapes.
  """
  of_batch = lambda params, batch: losses.mean_over_parts(
      lambda part: value_fn(params, **part),
      losses.accepted(value_fn, dict(batch)), 1)
  return lambda params: jnp.mean(jnp.stack([
      of_batch(params, batch) for batch in batches]))


def largest_eigenvalue(loss: Callable[[Any], jax.Array], params: Any, *,
                       key: jax.Array, iterations: int = 30
                       ) -> tuple[float, float]:
  r"""Returns the eigenvalue of the Hessian with the largest absolute value.

  Power iteration with products Hv, which are forward-mode derivatives of a
  gradient. They take the memory of backpropagation, and two vectors as large as
  the params.

  Args:
    loss: A function of the params.
    params: The params, all of floating-point dtype.
    key: A PRNG key for the first vector.
    iterations: Number of products. Defaults to 30.

  Returns:
    The eigenvalue, and the norm of Hv - λv for the last vector v, which has
    norm 1. The difference from an exact eigenvalue is at most this norm.
  """
  dot = lambda a, b: sum(
      jnp.vdot(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b))))

  @jax.jit
  def product(params, v):
    """Returns the Rayleigh quotient, the next vector, and the residual."""
    v = jax.tree.map(lambda x: x / jnp.sqrt(dot(v, v)), v)
    hv = jax.jvp(jax.grad(loss), (params,), (v,))[1]
    value = dot(v, hv)
    rest = jax.tree.map(lambda a, b: a - value * b, hv, v)
    return value, hv, jnp.sqrt(dot(rest, rest))
  leaves, tree = jax.tree.flatten(params)
  v = tree.unflatten([
      jax.random.normal(k, x.shape, x.dtype)
      for k, x in zip(jax.random.split(key, len(leaves)), leaves)])
  for _ in range(iterations):
    value, v, rest = product(params, v)
  return float(value), float(rest)


def descents(loss: Callable[[Any], jax.Array], params: Any,
             rates: Sequence[float]) -> np.ndarray:
  """Returns by how much a step of gradient descent lowers a loss.

  Args:
    loss: A function of the params.
    params: The params, all of floating-point dtype.
    rates: Learning rates.

  Returns:
    Decreases of the loss for each rate, float64 [len(rates)].
  """
  @jax.jit
  def after(params, gradient, rate):
    return loss(jax.tree.map(lambda p, g: p - rate * g, params, gradient))
  gradient = jax.jit(jax.grad(loss))(params)
  found = np.array([after(params, gradient, rate) for rate in (0.0, *rates)],
                   np.float64)
  return found[0] - found[1:]
