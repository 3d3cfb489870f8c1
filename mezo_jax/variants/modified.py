r"""Provides SPSA with a scale for each layer, in two variants.

Each layer has a scale d. Losses are evaluated along z/d, which is z with each
element divided by the scale of its layer:

.. math:: g = \frac{\mathcal{L}(\theta + \epsilon z/d; \mathcal{B})
          - \mathcal{L}(\theta - \epsilon z/d; \mathcal{B})}{2 \epsilon}.

The update of `variance_modified` is :math:`g\, (d \odot z)`. Like that of SPSA,
its expectation is the gradient, but its variance is different. The update of
`expectation_modified` is :math:`g\, z`. Its expectation is :math:`\nabla
\mathcal{L} / d`, which has the same length in every layer if d is the norm of
the layer's gradient. `grad_norms` estimates these norms.

References:
  Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
  <https://arxiv.org/abs/2305.17333>`_, Appendix B.3, Definitions 6 and 7.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, Unpack

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import arguments, paths
from mezo_jax.directions import noise
from mezo_jax.directions.base import Directions, Normal
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement, Multiplier
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions
from mezo_jax.transforms.evaluate_points import estimate

# Smallest norm that is returned, relative to the root mean square of all norms.
_LEAST = 1e-2


def grad_norms(
    value_fn: Callable[..., Any],
    params: Any,
    key: Any,
    *,
    num_samples: int = 4,
    eps: float = 1e-3,
    directions: Directions | str = Normal(),
) -> Any:
  r"""Estimates the norm of each layer's gradient by forward passes.

  .. math:: d_\ell^2 \propto \frac{1}{n} \sum_{j=1}^n \left[\frac{
            \mathcal{L}(\theta + \epsilon z_{j,\ell})
            - \mathcal{L}(\theta - \epsilon z_{j,\ell})}{2 \epsilon}\right]^2

  Here :math:`z_{j,\ell}` is zero except in layer :math:`\ell`. Params outside
  of layers (such as the embedding) are grouped by the first component of their
  paths, and each group counts as a layer. Each layer takes 2n evaluations.

  Args:
    value_fn: A function of the params that returns what the ``value_fn`` of
      `mezo_jax.spsa` may return.
    params: The params before training.
    key: A `jax.random.key` or an integer seed.
    num_samples: Number n of directions. Defaults to 4.
    eps: Perturbation scale :math:`\epsilon`. Defaults to 1e-3.
    directions: Distribution of z, or its name. Defaults to ``Normal()``.

  Returns:
    A tree of float32 numbers with the structure of the params, and arrays [L]
    for stacks of L layers. The norms are scaled so that z/d is as long as z on
    average. Norms below a hundredth of the root mean square of all norms are
    replaced by that value.

  Raises:
    ValueError: If an argument is out of range or has the wrong type.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Appendix B.3, Proposition 1.

  Example:
    >>> import jax.numpy as jnp
    >>> from mezo_jax import variants
    >>> params = {'a': jnp.ones(8), 'b': jnp.ones(8)}
    >>> loss = lambda p: jnp.sum(p['a']) + 5 * jnp.sum(p['b'])
    >>> norms = variants.grad_norms(loss, params, key=0)
    >>> bool(norms['b'] > norms['a'])
    True
  """
  arguments.function('value_fn', value_fn)
  arguments.tree('params', params)
  arguments.whole('num_samples', num_samples)
  arguments.number('eps', eps, above=0)
  directions = as_directions(directions)
  layers, count = _layers(params, directions.stacked)
  keys = noise.step_keys(noise.as_key(key), 0, num_samples)

  @jax.jit
  def squared_norms(params):
    def of_layer(layer):
      only = jax.tree.map(
          lambda of: (of == layer).astype(jnp.float32), layers)
      along = dataclasses.replace(directions, multiplier=Multiplier(only))
      def of_key(key):
        z = Displacement(key[None], jnp.ones(1))
        plus, minus = estimate(value_fn, params, z, eps, along)[0]
        return ((plus - minus) / (2 * eps))**2
      return jnp.mean(lax.map(of_key, keys))
    return lax.map(of_layer, jnp.arange(count))

  squares = squared_norms(params)
  # The number of elements with a z in each layer.
  size = jnp.zeros(count)
  leaves = map(jax.tree.leaves, (layers, directions.selected(params)))
  for (_, x), of, mask in zip(paths.named_leaves(params), *leaves):
    in_layer = math.prod(paths.shape_of(x)[of.ndim:])
    has_z = jnp.any(jnp.asarray(mask))
    size = size.at[of].add(has_z * float(in_layer))
  there = size > 0
  mean = jnp.sum(squares * there) / jnp.maximum(jnp.sum(there), 1)
  least = jnp.maximum(_LEAST**2 * mean, 1e-30)
  squares = jnp.maximum(squares, least)
  # Scale the norms so that z/d is as long as z on average.
  squares = squares * jnp.sum(size / squares) / jnp.sum(size)
  return jax.tree.map(lambda of: jnp.sqrt(squares)[of], layers)


def no_norms(params: Any, directions: Directions | str = Normal()) -> Any:
  r"""Returns a placeholder for the result of `grad_norms`.

  .. math:: d_\ell = 1

  Use it to create a state before a checkpoint is restored into it or norms are
  estimated.

  Args:
    params: The params.
    directions: Distribution of z, or its name. Defaults to ``Normal()``.

  Returns:
    A tree of ones with the structure and the shapes of that of `grad_norms`.

  Raises:
    ValueError: If ``params`` is None or ``directions`` are unknown.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Appendix B.3.

  Example:
    >>> import jax.numpy as jnp
    >>> from mezo_jax import variants
    >>> norms = variants.no_norms({'layers': {'w': jnp.zeros((3, 4, 5))}})
    >>> norms['layers']['w'].tolist()
    [1.0, 1.0, 1.0]
  """
  arguments.tree('params', params)
  layers, _ = _layers(params, as_directions(directions).stacked)
  return jax.tree.map(lambda of: jnp.ones(of.shape, jnp.float32), layers)


def variance_modified(eps: Any = 1e-3, *, norms: Any,
                      **options: Unpack[SpsaOptions]) -> Estimator:
  r"""Modifies the variance of SPSA by a scale d for each layer.

  .. math:: u = g\, (d \odot z), \qquad
            g = \frac{\mathcal{L}(\theta + \epsilon z/d; \mathcal{B})
            - \mathcal{L}(\theta - \epsilon z/d; \mathcal{B})}{2 \epsilon}

  The expectation of the update is the gradient, as in SPSA.

  Args:
    eps: Perturbation scale :math:`\epsilon`, in the forms of `mezo_jax.spsa`.
      Defaults to 1e-3.
    norms: The scales d, from `grad_norms`, or another tree of positive numbers
      with the structure of the params, and arrays [L] for stacks of L layers.
      They are the memory of the state, so that checkpoints include them.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``combine``, ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`.

  Raises:
    ValueError: If ``norms`` are not a tree of numbers, or for an option that
      `mezo_jax.spsa` does not accept.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Appendix B.3, Definition 6.

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> from mezo_jax import variants
    >>> params = {'a': jnp.ones(8), 'b': jnp.ones(8)}
    >>> norms = variants.grad_norms(lambda p: jnp.sum(p['a']), params, key=0)
    >>> tx = mezo_jax.mezo(1e-6, estimator=variants.variance_modified(
    ...     1e-3, norms=norms, key=0))
  """
  return _modified(eps, norms, options, back=True)


def expectation_modified(eps: Any = 1e-3, *, norms: Any,
                         **options: Unpack[SpsaOptions]) -> Estimator:
  r"""Modifies the expectation of SPSA by a scale d for each layer.

  .. math:: u = g\, z, \qquad
            g = \frac{\mathcal{L}(\theta + \epsilon z/d; \mathcal{B})
            - \mathcal{L}(\theta - \epsilon z/d; \mathcal{B})}{2 \epsilon}

  The expectation of the update is :math:`\nabla \mathcal{L} / d`. It has the
  same length in every layer if d is the norm of the layer's gradient.

  Args:
    eps: Perturbation scale :math:`\epsilon`, in the forms of `mezo_jax.spsa`.
      Defaults to 1e-3.
    norms: The scales d, from `grad_norms`, or another tree of positive numbers
      with the structure of the params, and arrays [L] for stacks of L layers.
      They are the memory of the state, so that checkpoints include them.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``combine``, ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`.

  Raises:
    ValueError: If ``norms`` are not a tree of numbers, or for an option that
      `mezo_jax.spsa` does not accept.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Appendix B.3, Definition 7.

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> from mezo_jax import variants
    >>> params = {'a': jnp.ones(8), 'b': jnp.ones(8)}
    >>> norms = variants.grad_norms(lambda p: jnp.sum(p['a']), params, key=0)
    >>> tx = mezo_jax.mezo(1e-6, estimator=variants.expectation_modified(
    ...     1e-3, norms=norms, key=0))
  """
  return _modified(eps, norms, options, back=False)


def _modified(eps, norms, options, *, back: bool) -> Estimator:
  """Returns one of the variants. With ``back``, updates are multiplied by d."""
  spsa = Spsa(eps, **options)
  arguments.tree('norms', norms)
  for d in jax.tree.leaves(norms):
    arguments.array('norms', d)

  def memory(_):
    # Copies, since steps donate the state.
    return jax.tree.map(lambda d: jnp.array(d, jnp.float32), norms)

  def measure(state, params, value_fn, batch):
    inverse = jax.tree.map(lambda d: 1 / d, state.memory)
    along = spsa.along(multiplier=Multiplier(inverse))
    return along.measure(state, params, value_fn, batch)

  def apply(state, params, numbers):
    along = spsa
    if back:
      along = spsa.along(multiplier=Multiplier(state.memory))
    return along.apply(state, params, numbers), state.memory

  return Estimator(spsa, measure=measure, apply=apply, memory=memory)


def _layers(params, stacked) -> tuple[Any, int]:
  """Numbers the layers of a model.

  Returns:
    ``(layers, count)``. ``layers`` is a tree with an array for each leaf: the
    number of its layer, [], or the numbers [L] of the layers in a stack.
    ``count`` is the number of layers.
  """
  numbers = {}
  layers = []
  stacks = paths.stacked(params, stacked)
  for (path, x), is_stack in zip(paths.named_leaves(params), stacks):
    part, layer = paths.layer_of(path)
    index = range(paths.shape_of(x)[0]) if is_stack else [layer]
    of = [numbers.setdefault((part, i), len(numbers)) for i in index]
    layers.append(jnp.array(of if is_stack else of[0]))
  return jax.tree.unflatten(paths.structure(params), layers), len(numbers)
