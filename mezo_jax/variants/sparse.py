r"""Provides Sparse-MeZO, which trains only the smallest weights.

Before training, `smallest` finds a threshold for each leaf and layer.
`sparse_mezo` perturbs and moves only weights whose absolute value is not above
the threshold. The mask of these weights is not stored. It is computed wherever
z is added: in both evaluations of the loss and in the update. It is computed
from the unperturbed weights, since perturbed weights would give another mask.
"""

from typing import Any, Unpack

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import arguments, paths
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions.displacement import Multiplier
from mezo_jax.transforms.estimator import Estimator, Spsa, SpsaOptions


def smallest(params: Any, share: float = 0.25, *, stacked: Any = None) -> Any:
  r"""Returns the threshold of each leaf and layer, for `sparse_mezo`.

  .. math:: h = \min \bigl\{ t : \#\{i : |\theta_i| \le t\} \ge \rho\, d \bigr\}

  Here :math:`\rho` is the share and d the number of elements of the leaf, or of
  the layer in a stack; :math:`\rho\, d` is rounded to an integer of at least 1.

  Args:
    params: The params before training.
    share: Share :math:`\rho` of the elements that are trained, above 0 and at
      most 1. The paper trains the smallest 20 to 25 %. Defaults to 0.25.
    stacked: The leaves that are stacks of layers, in the forms of
      `mezo_jax.Directions.stacked`. Defaults to None, which selects them by
      their paths and shapes.

  Returns:
    A tree of numbers in the dtypes of the params, with arrays [L] for stacks of
    L layers. If ``params`` are shapes (`jax.ShapeDtypeStruct`), the numbers are
    zeros.

  Raises:
    ValueError: If ``share`` is out of range or ``params`` is None.

  References:
    Liu et al., 2024, `Sparse MeZO: Less Parameters for Better Performance in
    Zeroth-Order LLM Fine-Tuning <https://arxiv.org/abs/2402.15751>`_.

  Example:
    >>> import jax.numpy as jnp
    >>> from mezo_jax import variants
    >>> params = {'w': jnp.array([[1.0, -2.0], [3.0, -4.0]])}
    >>> float(variants.smallest(params, share=0.5)['w'])
    2.0
  """
  arguments.tree('params', params)
  arguments.number('share', share, above=0, most=1)

  def of_layer(x):
    """Returns the threshold of a single layer."""
    last = max(round(share * x.size) - 1, 0)
    return jnp.sort(jnp.abs(x).ravel())[last]

  @jax.jit
  def of_layers(x):
    """Returns the thresholds of a stack of layers."""
    return lax.map(of_layer, x)

  def of_leaf(path, x, is_stack):
    """Returns the threshold of one leaf, or those of its layers."""
    del path
    if is_codes(x):
      x = x.astype(x.dtype)
    if isinstance(x, jax.ShapeDtypeStruct):
      return jnp.zeros(x.shape[:1] if is_stack else (), x.dtype)
    if not paths.is_floating(x):
      return jnp.zeros(())
    x = jnp.asarray(x)
    return of_layers(x) if is_stack else of_layers(x[None])[0]

  stacks = paths.stacked(params, stacked)
  stacks = jax.tree.unflatten(paths.structure(params), stacks)
  return paths.map_named(of_leaf, params, stacks)


def sparse_mezo(eps: Any = 1e-3, *, limits: Any,
                **options: Unpack[SpsaOptions]) -> Estimator:
  r"""Runs SPSA on weights whose absolute value is not above a threshold.

  .. math:: u = g\, m \odot z, \qquad g = \frac{\mathcal{L}(\theta + \epsilon\,
            m \odot z; \mathcal{B}) - \mathcal{L}(\theta - \epsilon\, m \odot z;
            \mathcal{B})}{2 \epsilon}, \qquad m = [\,|\theta| \le h\,]

  The mask m changes during training: a weight that a step has moved past its
  threshold h is not moved again. With fewer elements, the estimate has less
  variance, which allows larger learning rates.

  Args:
    eps: Perturbation scale :math:`\epsilon`, in the forms of `mezo_jax.spsa`.
      Defaults to 1e-3.
    limits: Thresholds h, from `smallest`.
    **options: Options of `mezo_jax.spsa`: ``key`` (required), ``directions``,
      ``combine``, ``num_samples``, ``over``, ``micro_batches`` and ``dtype``.

  Returns:
    A `mezo_jax.Estimator`, which takes the place of `mezo_jax.spsa`.

  Raises:
    ValueError: If ``limits`` are not a tree of numbers, or for an option that
      `mezo_jax.spsa` does not accept.

  References:
    Liu et al., 2024, `Sparse MeZO: Less Parameters for Better Performance in
    Zeroth-Order LLM Fine-Tuning <https://arxiv.org/abs/2402.15751>`_.

  Example:
    >>> import jax.numpy as jnp, mezo_jax
    >>> from mezo_jax import variants
    >>> limits = variants.smallest({'w': jnp.ones((2, 8))}, share=0.25)
    >>> tx = mezo_jax.mezo(1e-6, estimator=variants.sparse_mezo(
    ...     1e-3, limits=limits, key=0))
  """
  arguments.tree('limits', limits)
  for x in jax.tree.leaves(limits):
    arguments.array('limits', x)
  spsa = Spsa(eps, **options)
  return Estimator(spsa.along(multiplier=Multiplier(limits, is_below)))


def is_below(w: jax.Array, limits: jax.Array) -> jax.Array:
  """Returns where the absolute value of a weight is at most its threshold."""
  return jnp.abs(w) <= limits.astype(w.dtype)
