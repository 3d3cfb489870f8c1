r"""SPSA with a scale per layer: variance-modified and expectation-modified.

Each layer has a scale d, and z/d divides each element of z by the scale of its
layer.

.. math:: g = \frac{\mathcal{L}(\theta + \epsilon z/d; \mathcal{B})
          - \mathcal{L}(\theta - \epsilon z/d; \mathcal{B})}{2 \epsilon},
          \qquad \hat\nabla = g\, (d \odot z) \text{ or } g\, z.

The first has the mean of the gradient, with another variance. The second has
the mean :math:`\nabla \mathcal{L} / d`, which is equally long in every layer if
d is the norm of the layer's gradient. Source: Malladi et al. (2023), Appendix
B.3, Definitions 6 and 7.
"""

from collections.abc import Callable
import dataclasses
from typing import Any, Unpack

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import arguments, paths
from mezo_jax.directions import noise
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement, Multiplier
from mezo_jax.perturb.api import perturbed
from mezo_jax.transforms import losses
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions

_LEAST = 1e-2  # least norm, relative to the root mean square of all layers


def grad_norms(value_fn: Callable[..., Any], params: Any, key: Any, *,
               num_samples: int = 4, eps: float = 1e-3,
               directions: Directions | str = Normal()) -> Any:
  r"""Returns the norm of each layer's gradient, by forward passes.

  .. math:: d_\ell^2 \propto \frac{1}{n} \sum_j \left[\frac{
            \mathcal{L}(\theta + \epsilon z_{j,\ell})
            - \mathcal{L}(\theta - \epsilon z_{j,\ell})}{2 \epsilon}\right]^2

  with :math:`z_{j,\ell}` zero except in layer :math:`\ell` (Malladi et al.,
  Proposition 1). Parameters outside of layers (embedding, head) are grouped by
  the first component of their path. Each group takes 2n evaluations.

  Args:
    value_fn: A function of the parameters that returns what the ``value_fn`` of
      `mezo_jax.spsa` may return.
    params: The parameters before training.
    key: A `jax.random.key` or an integer seed.
    num_samples: n, the number of directions.
    eps: Perturbation scale :math:`\epsilon`.
    directions: Distribution of z.

  Returns:
    A tree of float32 numbers, with arrays [L] for stacks of L layers, scaled so
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
      at = perturbed(value_fn, dataclasses.replace(
          directions, multiplier=Multiplier(only)))
      loss = lambda key, c: losses.mean(at(params, Displacement(key, c)))
      def of_key(key):
        plus, minus = lax.map(lambda c: loss(key, c), jnp.array([eps, -eps]))
        return ((plus - minus) / (2 * eps)) ** 2
      return jnp.mean(lax.map(of_key, keys))
    return lax.map(of_layer, jnp.arange(count))

  return _in_units(params, squares(params), layers, directions)


def no_norms(params: Any, directions: Directions | str = Normal()) -> Any:
  """Returns ones in place of norms that are not known yet."""
  arguments.tree('params', params)
  layers, _ = _layers(params, as_directions(directions).stacked)
  return _tree(params, [jnp.ones(of.shape, jnp.float32) for of in layers])


def variance_modified(eps: Any = 1e-3, *, norms: Any,
                      **options: Unpack[SpsaOptions]) -> Estimator:
  r"""SPSA with :math:`\hat\nabla = g\, (d \odot z)`, where g is measured along
  z/d.

  Args:
    eps: Perturbation scale, as for `mezo_jax.spsa`.
    norms: d, from `grad_norms`, or another tree like the params of positive
      numbers, with arrays [L] for stacks of L layers. It is the memory of the
      state.
    **options: Other options of `mezo_jax.spsa`.
  """
  return _modified(eps, norms, options, back=True)


def expectation_modified(eps: Any = 1e-3, *, norms: Any,
                         **options: Unpack[SpsaOptions]) -> Estimator:
  r"""SPSA with :math:`\hat\nabla = g z`, where g is measured along z/d.

  The arguments are those of `variance_modified`.
  """
  return _modified(eps, norms, options, back=False)


def _modified(eps, norms, options, *, back: bool) -> Estimator:
  spsa = Spsa(eps, **options)
  arguments.tree('norms', norms)
  for d in jax.tree.leaves(norms):
    arguments.array('norms', d)

  def memory(params):
    del params
    return jax.tree.map(lambda d: jnp.asarray(d, jnp.float32), norms)

  def measure(state, params, value_fn, batch):
    inverse = jax.tree.map(lambda d: 1 / d, state.memory)
    along = spsa.along(multiplier=Multiplier(inverse))
    return along.measure(state, params, value_fn, batch)

  def apply(state, params, numbers):
    along = spsa.along(multiplier=Multiplier(state.memory)) if back else spsa
    return along.apply(state, params, numbers), state.memory

  return Estimator(spsa, measure=measure, apply=apply, memory=memory)


# --- layers -----------------------------------------------------------------


def _layers(params, stacked) -> tuple[list, int]:
  """Returns the number of the layer of each leaf, or [L] of them for a stack,
  and how many layers there are."""
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
  """Returns norms, none below `_LEAST`, scaled so that z/d is as long as z."""
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
