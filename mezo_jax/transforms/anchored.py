r"""Provides weight decay towards the weights at the start of training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mezo_jax.core import arguments, dtypes, paths, xla
from mezo_jax.core.quantized import is_codes
from mezo_jax.transforms.types import ZerothOrderTransformation


class AnchoredState(NamedTuple):
  """Holds the state of `anchored`.

  Attributes:
    start: A copy of the params at the start.
  """

  start: Any


def anchored(weight_decay: float) -> ZerothOrderTransformation:
  r"""Adds weight decay towards the params at the start of training.

  .. math:: u \leftarrow u + \lambda (\theta - \theta_0)

  Evolution strategies change all weights a little in every step, in random
  directions, so that a model forgets what it could do. This term bounds the
  distance from the start. It comes before the learning rate in a chain, like
  `optax.add_decayed_weights`, so that a step multiplies the distance by
  :math:`1 - \eta \lambda`.

  The state is a copy of the params, which takes as much memory as they do, on
  the devices and in each checkpoint. With LoRA, or another small part of a
  model, that is little. LoRA begins without an effect, so the model is pulled
  towards the one before training.

  Args:
    weight_decay: The factor :math:`\lambda`, a number of at least 0.

  Returns:
    An `optax.GradientTransformation` with an `AnchoredState`.

  Raises:
    ValueError: If ``weight_decay`` is negative. ``init`` raises it for
      quantised weights.

  References:
    Evolution strategies with anchored weight decay, 2026, arXiv:2605.30148.

  Example:
    >>> import jax.numpy as jnp, mezo_jax, optax
    >>> from mezo_jax import anchored
    >>> tx = optax.chain(mezo_jax.spsa(1e-3, key=0), anchored(0.1),
    ...                  optax.sgd(1e-2))
    >>> state = tx.init(jnp.ones(3))
  """
  arguments.number('weight_decay', weight_decay, least=0)

  def init_fn(params):
    if any(map(is_codes, jax.tree.leaves(params, is_leaf=is_codes))):
      raise ValueError('params contain quantised weights, whose distance from '
                       'the start is not defined; train LoRA instead.')
    return AnchoredState(jax.tree.map(jnp.copy, params))

  def update_fn(updates, state, params=None, **extra_args):
    del extra_args
    if params is None:
      raise ValueError('anchored needs params: tx.update(updates, state, '
                       'params).')
    def add(p, u, start):
      if not paths.is_floating(p):
        return u
      wide = dtypes.wide(p.dtype)
      moved = p.astype(wide) - start.astype(wide)
      # Rounding both terms keeps a compiler from fusing the product and the sum
      # in some programs and not in others.
      return xla.rounded(u) + xla.rounded(weight_decay * moved)
    return jax.tree.map(add, params, updates, state.start), state

  return ZerothOrderTransformation(init_fn, update_fn)
