"""The decoder that all families share: blocks, scanned over the layers.

Shapes in names: B batch, S sequence, D width, N query heads, K key and value
heads, H head width, F feed-forward width, V vocabulary, L layers, A answers.
"""

import dataclasses

from flax import linen as nn
import jax
import jax.numpy as jnp

from mezo_jax.sharding import split_rows, splits_vocabulary


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Scaling of rotary frequencies: 'linear' or 'llama3'."""

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_length: int = 8192


@dataclasses.dataclass(frozen=True)
class Config:
  """The choices that make a family and a size of it."""

  family: str
  vocab_size: int
  width: int
  ff_width: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  head_width: int
  max_length: int
  norm_eps: float
  norm: str = 'rms'  # or 'layer'
  activation: str = 'silu'  # or 'relu'
  gated: bool = True  # act(gate(x)) * up(x), else act(up(x))
  learned_positions: bool = False  # rotary otherwise
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  attention_bias: bool = False
  mlp_bias: bool = False
  tied_head: bool = False


_init = nn.initializers.normal(0.02)
_ACTIVATIONS = {'silu': jax.nn.silu, 'relu': jax.nn.relu}
_CHUNK = 4096  # rows of the vocabulary at a time
POSITION_OFFSET = 2  # of learned positions: rows 0 and 1 are for padding


class RMSNorm(nn.Module):
  """``x / rms(x) * scale`` in float32 (Zhang and Sennrich, 2019)."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return scale * y.astype(x.dtype)


class LayerNorm(nn.Module):
  """``(x - mean) / std * scale + bias`` in float32 (Ba et al., 2016)."""

  eps: float

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return (y * scale + bias).astype(x.dtype)


def _norm(config: Config, name: str) -> nn.Module:
  kind = {'rms': RMSNorm, 'layer': LayerNorm}[config.norm]
  return kind(config.norm_eps, name=name)


class Linear(nn.Module):
  """``x @ kernel + bias``; the kernel is [inputs, outputs]."""

  inputs: int
  outputs: int
  use_bias: bool = False

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', _init, (self.inputs, self.outputs))
    y = x @ kernel.astype(x.dtype)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.outputs,))
      y = y + bias.astype(x.dtype)
    return y


def rope_tables(config: Config, positions_BxS) -> tuple[jax.Array, jax.Array]:
  """(cos, sin), float32 [B, S, H], of rotary positions (Su et al., 2021)."""
  h = config.head_width
  freq = config.rope_theta ** (-jnp.arange(0, h, 2, dtype=jnp.float32) / h)
  scaling = config.rope_scaling
  if scaling and scaling.kind == 'linear':
    freq = freq / scaling.factor
  elif scaling:  # llama3: low frequencies are stretched, high ones kept
    turns = scaling.original_max_length * freq / (2 * jnp.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    freq = keep * freq + (1 - keep) * freq / scaling.factor
  angle = positions_BxS.astype(jnp.float32)[..., None] * freq
  angle = jnp.concatenate([angle, angle], -1)
  return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x_BxSxNxH, cos_BxSxH, sin_BxSxH):
  """Rotates pairs (i, i + H/2) of every head, in float32."""
  x = x_BxSxNxH.astype(jnp.float32)
  first, second = jnp.split(x, 2, -1)
  turned = jnp.concatenate([-second, first], -1)
  out = x * cos_BxSxH[:, :, None] + turned * sin_BxSxH[:, :, None]
  return out.astype(x_BxSxNxH.dtype)


class Attention(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, x_BxSxD, mask_Bx1xSxS, rope):
    c = self.config
    b, s, _ = x_BxSxD.shape
    # Kernels are matrices: with a head axis XLA copies them all on TPU.
    head = lambda n, name: Linear(
        c.width, n * c.head_width, c.attention_bias, name=name)(
            x_BxSxD).reshape(b, s, n, c.head_width)
    q_BxSxNxH = head(c.num_heads, 'q')
    k_BxSxKxH = head(c.num_kv_heads, 'k')
    v_BxSxKxH = head(c.num_kv_heads, 'v')
    if rope is not None:
      q_BxSxNxH = apply_rope(q_BxSxNxH, *rope)
      k_BxSxKxH = apply_rope(k_BxSxKxH, *rope)
    out_BxSxNxH = jax.nn.dot_product_attention(
        q_BxSxNxH, k_BxSxKxH, v_BxSxKxH, mask=mask_Bx1xSxS)
    return Linear(c.num_heads * c.head_width, c.width, c.attention_bias,
                  name='o')(out_BxSxNxH.reshape(b, s, -1))


class MLP(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, x_BxSxD):
    c = self.config
    up = lambda name: Linear(
        c.width, c.ff_width, c.mlp_bias, name=name)(x_BxSxD)
    act = _ACTIVATIONS[c.activation]
    h_BxSxF = act(up('gate')) * up('up') if c.gated else act(up('up'))
    return Linear(c.ff_width, c.width, c.mlp_bias, name='down')(h_BxSxF)


class Block(nn.Module):
  """One pre-norm layer; the signature that `nn.scan` wants."""

  config: Config

  @nn.compact
  def __call__(self, x_BxSxD, mask_Bx1xSxS, rope):
    norm = lambda name: _norm(self.config, name)
    x_BxSxD += Attention(self.config, name='attn')(
        norm('attn_norm')(x_BxSxD), mask_Bx1xSxS, rope)
    x_BxSxD += MLP(self.config, name='mlp')(norm('mlp_norm')(x_BxSxD))
    return split_rows(x_BxSxD), None


class Table(nn.Module):
  """Rows of width D, one a token: looked up, or scored against."""

  rows: int
  width: int

  @nn.compact
  def __call__(self, ids=None):
    table_VxD = self.param('embedding', _init, (self.rows, self.width))
    return table_VxD if ids is None else table_VxD[ids]


def _logits(x_BxAxD, rows_VxD):
  return jnp.einsum('bad,vd->bav', x_BxAxD, rows_VxD,
                    preferred_element_type=jnp.float32)


def log_likelihood(x_BxAxD, table_VxD, targets_BxA, chunk: int = _CHUNK):
  r"""log p of the targets, float32 [B, A], without logits [B, A, V].

  .. math:: \log p_t = x^\top w_t - \log \sum_v \exp(x^\top w_v)

  Parts of the vocabulary in turn update a running maximum and sum, so that
  neither all logits nor, under `mezo_jax.perturbed`, a whole perturbed table
  is ever alive. Where the vocabulary is split over `tensor` each device has
  such a part already.
  """
  picked_BxA = jnp.einsum('bad,bad->ba', x_BxAxD, table_VxD[targets_BxA],
                          preferred_element_type=jnp.float32)

  def add(carry, rows_CxD):
    top, total = carry
    logits = _logits(x_BxAxD, rows_CxD)
    new_top = jnp.maximum(top, logits.max(-1))
    total = total * jnp.exp(top - new_top) + jnp.sum(
        jnp.exp(logits - new_top[..., None]), -1)
    return new_top, total

  vocab = table_VxD.shape[0]
  chunk = vocab if splits_vocabulary() else min(chunk, vocab)
  carry, rest = (picked_BxA, jnp.zeros_like(picked_BxA)), vocab % chunk
  if rest:
    carry = add(carry, table_VxD[vocab - rest:])
  (top, total), _ = jax.lax.scan(
      lambda carry, start: (add(carry, jax.lax.dynamic_slice_in_dim(
          table_VxD, start, chunk)), None),
      carry, jnp.arange(0, vocab - rest, chunk))
  return picked_BxA - top - jnp.log(total)


class Transformer(nn.Module):
  """A causal language model over the nested dict of its parameters.

  ``model.apply({'params': params}, input_ids, attention_mask)`` gives float32
  logits [B, S, V]. Parameters of layers are stacked, ``layers/...`` [L, ...].
  With ``remat`` backpropagation keeps each layer's input alone.
  """

  config: Config
  remat: bool = False

  @nn.compact
  def __call__(self, input_ids, attention_mask=None, *, answer_at=None,
               token_ids=None, targets=None):
    """Next-token logits, or log-likelihoods of given tokens.

    Args:
      input_ids: integers [B, S].
      attention_mask: [B, S], 1 at tokens and 0 at padding on either side; None
        for no padding.
      answer_at: integers [B, A], the positions whose logits are wanted; None
        for all. [B, S, V] logits are then never made.
      token_ids: integers [C], the tokens whose logits are wanted; None for all.
      targets: integers [B, A or S], the tokens whose log-likelihoods are wanted
        instead of logits.

    Returns:
      float32 logits [B, A or S, C or V]; with ``targets``, their
      log-likelihoods [B, A or S].
    """
    c = self.config
    b, s = input_ids.shape
    if s > c.max_length:
      raise ValueError(
          f'{s} tokens exceed the {c.max_length} positions of this model.')
    embed = Table(c.vocab_size, c.width, name='embed')
    x_BxSxD = embed(input_ids)
    if c.learned_positions:
      rope, seen = None, jnp.ones((b, s), jnp.int32)
      if attention_mask is not None:
        seen = attention_mask.astype(jnp.int32)
      at_BxS = jnp.cumsum(seen, 1) * seen - 1 + POSITION_OFFSET
      x_BxSxD += Table(c.max_length + POSITION_OFFSET, c.width,
                       name='positions')(at_BxS)
    else:
      rope = rope_tables(c, jnp.broadcast_to(jnp.arange(s), (b, s)))
    mask_Bx1xSxS = jnp.broadcast_to(
        jnp.tril(jnp.ones((s, s), bool)), (b, 1, s, s))
    if attention_mask is not None:
      mask_Bx1xSxS &= attention_mask.astype(bool)[:, None, None, :]
    x_BxSxD = split_rows(x_BxSxD)
    layers = nn.scan(
        nn.remat(Block, prevent_cse=False) if self.remat else Block,
        variable_axes={'params': 0}, split_rngs={'params': True},
        in_axes=(nn.broadcast, nn.broadcast), length=c.num_layers)
    x_BxSxD, _ = layers(c, name='layers')(x_BxSxD, mask_Bx1xSxS, rope)
    if answer_at is not None:
      x_BxSxD = jnp.take_along_axis(x_BxSxD, answer_at[..., None], 1)
    x_BxSxD = _norm(c, 'norm')(x_BxSxD)
    head = embed if c.tied_head else Table(
        c.vocab_size, c.width, name='lm_head')
    if targets is not None:
      return log_likelihood(x_BxSxD, head(), targets)
    return _logits(x_BxSxD, head(token_ids))
