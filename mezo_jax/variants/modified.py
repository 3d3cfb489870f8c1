r"""SPSA with a scale for each layer: variance- and expectation-modified.

With a number d for each layer, and z/d its elements over their layer's number,

.. math:: g = \frac{\mathcal{L}(\theta + \epsilon z/d; \mathcal{B})
          - \mathcal{L}(\theta - \epsilon z/d; \mathcal{B})}{2 \epsilon},
          \qquad \hat\nabla = g\, (d \odot z) \text{ or } g\, z,

of which the first has the mean of the gradient, with another variance, and the
second that of the gradient over d: of equal length for each layer where d is
the gradient's norm. Malladi et al. (2023), Appendix B.3, Definitions 6 and 7.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from mezo_jax.core import arguments, paths, sharding
from mezo_jax.directions import noise
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement
from mezo_jax.perturb.api import perturbed
from mezo_jax.transforms import losses
from mezo_jax.transforms.mezo import descent
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.types import ZerothOrderTransformation
from mezo_jax.variants._told import Remembering

_LEAST = 1e-2  # of the layers' root mean square: no norm is taken for less


def grad_norms(value_fn: Callable[..., Any], params: Any, key: Any, *,
               num_samples: int = 4, eps: float = 1e-3,
               directions: Directions | str = Normal()) -> Any:
  r"""The norm of each layer's gradient, by forward passes.

  .. math:: d_\ell^2 \propto \frac{1}{n} \sum_j \left[\frac{
            \mathcal{L}(\theta + \epsilon z_{j,\ell})
            - \mathcal{L}(\theta - \epsilon z_{j,\ell})}{2 \epsilon}\right]^2

  with :math:`z_{j,\ell}` zero but for layer :math:`\ell` (Malladi et al.,
  Proposition 1). What is in no layer (embedding, head) counts by the first
  component of its path. 2 n evaluations for each.

  Args:
    value_fn: a function of the parameters, which returns what the ``value_fn``
      of `mezo_jax.spsa` may return.
    params: before training.
    key: of the directions; a `jax.random.key` or an integer seed.
    num_samples: n.
    eps: :math:`\epsilon`.
    directions: what z is, and which leaves have it.

  Returns:
    A tree of numbers, of stacks of L layers arrays [L], float32: in such units
    that z/d is as long as z. None is less than a hundredth of their root mean
    square.
  """
  arguments.function('value_fn', value_fn)
  arguments.tree('params', params)
  arguments.whole('num_samples', num_samples)
  arguments.number('eps', eps, above=0)
  directions = as_directions(directions)
  layers, count = _layers(params, directions.stacked)
  keys = noise.step_keys(noise.as_key(key), 0, num_samples)

  @jax.jit
  def squares(params):
    def of_layer(layer):
      only = _tree(params, [(of == layer).astype(jnp.float32) for of in layers])
      at = perturbed(value_fn, dataclasses.replace(directions, scales=only))
      loss = lambda key, c: losses.mean(at(params, Displacement(key, c)))
      def of_key(key):
        plus, minus = lax.map(lambda c: loss(key, c), jnp.array([eps, -eps]))
        return ((plus - minus) / (2 * eps)) ** 2
      return jnp.mean(lax.map(of_key, keys))
    return lax.map(of_layer, jnp.arange(count))

  return _in_units(params, squares(params), layers, directions)


def no_norms(params: Any, directions: Directions | str = Normal()) -> Any:
  """Ones in the place of norms, until a state is restored or they are made."""
  arguments.tree('params', params)
  layers, _ = _layers(params, as_directions(directions).stacked)
  return _tree(params, [jnp.ones(of.shape, jnp.float32) for of in layers])


def variance_modified(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, norms: Any,
    directions: Directions | str = Normal(), weight_decay: float = 0.0,
    decay: Any = None, stochastic_rounding: bool = True, **options: Any
) -> ZerothOrderTransformation:
  r"""MeZO with :math:`\hat\nabla = g\, (d \odot z)`, g along z/d.

  Args:
    learning_rate: :math:`\eta`.
    eps: see `mezo_jax.spsa`.
    key: a `jax.random.key` or an integer seed.
    norms: d, from `grad_norms`, or any tree like the params of positive
      numbers, or of arrays [L] for stacked layers. It is part of the state, as
      ``memory``.
    directions: what z is.
    weight_decay: as of `mezo_jax.mezo`, and the next two.
    decay: which leaves are decayed.
    stochastic_rounding: of half-precision weights.
    **options: of `mezo_jax.spsa`.

  Raises:
    ValueError: as `mezo_jax.spsa`; for norms of other leaves than the params'.
  """
  return _modified(True, learning_rate, eps, key, norms, directions,
                   weight_decay, decay, stochastic_rounding, options)


def expectation_modified(
    learning_rate: float | optax.Schedule, eps: float | optax.Schedule = 1e-3,
    *, key: jax.Array | int, norms: Any,
    directions: Directions | str = Normal(), weight_decay: float = 0.0,
    decay: Any = None, stochastic_rounding: bool = True, **options: Any
) -> ZerothOrderTransformation:
  r"""MeZO with :math:`\hat\nabla = g z`, g along z/d, else as
  `variance_modified`: of each layer the gradient over d."""
  return _modified(False, learning_rate, eps, key, norms, directions,
                   weight_decay, decay, stochastic_rounding, options)


def _modified(back, learning_rate, eps, key, norms, directions, weight_decay,
              decay, stochastic_rounding, options):
  directions = as_directions(directions)
  at = lambda scales: spsa(
      eps, key=key, dtype=jnp.float32,
      directions=dataclasses.replace(directions, scales=scales), **options)
  at(None)  # refuses options that cannot be used
  arguments.tree('norms', norms)
  for d in jax.tree.leaves(norms):
    arguments.array('norms', d)

  def init_fn(params):
    own = jax.tree.map(lambda d: jnp.asarray(d, jnp.float32), norms)
    return sharding.beside(Remembering(at(None).init(params), own), params)

  def update_fn(updates, state, params=None, *, value_fn=None,
                projected_grad=None, value=None, **extra_args):
    old, norms = state
    own = old
    if value_fn is not None:
      inverse = jax.tree.map(lambda d: 1 / d, norms)
      _, seen = at(inverse).update(
          updates, old, params, value_fn=value_fn,
          projected_grad=projected_grad, **extra_args)
      projected_grad, value = seen.projected_grad, seen.value
      # Else the compiler might keep z, as large as the model.
      own = old._replace(key=Displacement(old.key, 1.0).after(value).keys)
    given = {} if value is None else dict(value=value)
    updates, new = at(norms if back else None).update(
        updates, own, params, projected_grad=projected_grad, **given,
        **({} if value_fn is not None else extra_args))
    return updates, Remembering(new._replace(key=old.key), norms)

  return descent(
      ZerothOrderTransformation(init_fn, update_fn), learning_rate,
      key=key, directions=directions, weight_decay=weight_decay, decay=decay,
      stochastic_rounding=stochastic_rounding)


# --- layers -----------------------------------------------------------------


def _layers(params, stacked) -> tuple[list, int]:
  """Of each leaf the number of its layer, or [L] of them; how many there are.
  """
  seen = {}
  number = lambda name: seen.setdefault(name, len(seen))
  out = []
  for (path, x), stack in zip(paths.named_leaves(params),
                              paths.stacked(params, stacked)):
    part, layer = paths.layer_of(path)
    if stack:
      out.append(jnp.array([
          number((part, i)) for i in range(paths.shape_of(x)[0])]))
    else:
      out.append(jnp.array(number((part, layer))))
  return out, len(seen)


def _in_units(params, squares, layers, directions: Directions):
  """Norms from their squares: no less than `_LEAST`, z/d as long as z."""
  used = [jnp.any(jnp.asarray(m)) for m in jax.tree.leaves(
      directions.selected(params))]
  size = jnp.zeros(len(squares))
  for (_, x), of, there in zip(paths.named_leaves(params), layers, used):
    shape = paths.shape_of(x)
    each = jnp.prod(jnp.array(shape[of.ndim:], jnp.float32))
    size = size.at[of].add(there * each)
  mean = jnp.sum(squares * (size > 0)) / jnp.maximum(jnp.sum(size > 0), 1)
  squares = jnp.maximum(squares, jnp.maximum(_LEAST**2 * mean, 1e-30))
  squares = squares * jnp.sum(size / squares) / jnp.sum(size)
  return _tree(params, [jnp.sqrt(squares)[of] for of in layers])


def _tree(params, leaves):
  return jax.tree.unflatten(paths.structure(params), leaves)
