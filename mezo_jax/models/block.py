"""Defines the block of which a language model is a stack.

Suffixes of names give shapes, with the letters of `mezo_jax.models.layers`.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from mezo_jax.core.sharding import constrain_rows
from mezo_jax.models.experts import Experts
from mezo_jax.models.layers import (
  Attention,
  Config,
  make_norm,
  MLP,
  Shared,
)


class Block(nn.Module):
  """Applies one layer: attention and feed-forward, with norms and residuals.

  It has the signature that `nn.scan` requires. The carry is ``(x, cache)``,
  where the cache holds the keys and values of all layers. The other arguments
  are those of `Attention`.
  """

  config: Config

  @nn.compact
  def __call__(self, carry: Any, shared: Shared, local: jax.Array | None,
               layer: jax.Array | None) -> Any:
    c = self.config
    x_BxSxD, cache = carry
    norm = lambda name: make_norm(c, name)
    mlp = Experts(c, name='experts') if c.num_experts else MLP(c, name='mlp')
    of_BxTxD = x_BxSxD if shared.context is None else shared.context
    if c.norm_place == 'post':
      y, cache = Attention(c, name='attn')(
          x_BxSxD, of_BxTxD, cache, shared, local, layer)
      x_BxSxD = norm('attn_norm')(x_BxSxD + y)
      x_BxSxD = norm('mlp_norm')(x_BxSxD + mlp(x_BxSxD))
    else:
      plain = lambda name: lambda y: y
      after = norm if c.norm_place in ('both', 'after') else plain
      ahead = plain if c.norm_place == 'after' else norm
      scaled = lambda y: y if c.residual_scale is None else (
          y * jnp.asarray(c.residual_scale, y.dtype))
      before = ahead('attn_norm')
      normed = before(x_BxSxD)
      # The norm is shared between the tokens and their context, so that both
      # use the same parameters.
      y, cache = Attention(c, name='attn')(
          normed, normed if shared.context is None else before(of_BxTxD), cache,
          shared, local, layer)
      x_BxSxD += scaled(after('attn_post_norm')(y))
      y = mlp(ahead('mlp_norm')(x_BxSxD))
      x_BxSxD += scaled(after('mlp_post_norm')(y))
    return (constrain_rows(x_BxSxD), cache), None
