"""The layers that all families share, and the choices that tell them apart.

Shapes in names: B batch, S sequence, T keys (S, or the cache's length), D
width, N query heads, K key and value heads, H head width, F feed-forward width,
V vocabulary, L layers, A answers.
"""

import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from mezo_jax.core.sharding import constrain_rows, fetched


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions (Su et al., 2021): frequencies theta^(-i/H) and scaling.

  ``kind`` is 'default', 'linear' (all frequencies / factor) or 'llama3' (low
  ones are stretched, high ones kept).
  """

  theta: float = 10000.0
  kind: str = 'default'
  factor: float = 1.0
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
  norm: str = 'rms'  # or 'rms+1', whose scale is 1 + w, or 'layer'
  norm_place: str = 'pre'  # x + f(norm(x)); 'post' norm(x + f(x)); 'both'
  final_norm: bool = True
  activation: str = 'silu'  # or 'relu', 'gelu', 'gelu_tanh'
  gated: bool = True  # act(gate(x)) * up(x), else act(up(x))
  rope: Rope | None = Rope()  # None: learned positions
  local_rope: Rope | None = None  # of local layers; None: the same
  position_offset: int = 0  # rows of learned positions before the first
  causal: bool = True
  window: int | None = None  # keys that a local layer sees, itself included
  local_layers: tuple[bool, ...] = ()  # which are local; () for all
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False  # of every head of q and k
  query_scale: float | None = None  # None: head_width ** -0.5
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  embed_width: int | None = None  # projected to and from width if it differs
  embed_scale: float | None = None
  embed_norm: bool = False
  token_types: int = 0
  masked_head: bool = False  # dense, activation and norm before the vocabulary
  tied_head: bool = False
  head: bool = True  # False: files of a base class, whose head is not in them
  source: str = dataclasses.field(  # the config.json that it was read from
      default='', compare=False, repr=False)


class Cache(NamedTuple):
  """Keys and values of the tokens so far; `Transformer` fills it."""

  k: jax.Array  # [L, B, T, K, H]
  v: jax.Array  # [L, B, T, K, H]
  length: jax.Array  # int32 []: how many of the T are filled


class Shared(NamedTuple):
  """What all layers see; the local fields are for layers with a window.

  A layer of which A of the S tokens alone are wanted has these as its input,
  and all as ``context``.
  """

  mask: jax.Array  # bool [B, 1, S or A, T]
  local_mask: jax.Array | None
  rope: tuple[jax.Array, jax.Array] | None  # cos, sin: float32 [B, S, H]
  local_rope: tuple[jax.Array, jax.Array] | None
  start: jax.Array | None  # int32 []: where these tokens stand in the cache
  context: jax.Array | None = None  # [B, S, D], of which A tokens are wanted:
  wanted: jax.Array | None = None  # int32 [B, A]


_init = nn.initializers.normal(0.02)
_ACTIVATIONS = {
    'silu': jax.nn.silu, 'relu': jax.nn.relu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True)}


class RMSNorm(nn.Module):
  """``x / rms(x) * scale`` in float32 (Zhang and Sennrich, 2019).

  With ``plus_one`` it is ``1 + scale``, all in float32, as Gemma has it.
  """

  eps: float
  plus_one: bool = False

  @nn.compact
  def __call__(self, x: Any) -> Any:
    init = nn.initializers.zeros if self.plus_one else nn.initializers.ones
    scale = fetched(self.param('scale', init, (x.shape[-1],)))
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    if self.plus_one:
      return (y * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return scale.astype(x.dtype) * y.astype(x.dtype)


class LayerNorm(nn.Module):
  """``(x - mean) / std * scale + bias`` in float32 (Ba et al., 2016)."""

  eps: float

  @nn.compact
  def __call__(self, x: Any) -> Any:
    scale = fetched(self.param('scale', nn.initializers.ones, (x.shape[-1],)))
    bias = fetched(self.param('bias', nn.initializers.zeros, (x.shape[-1],)))
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps)
    return (y * scale + bias).astype(x.dtype)


def make_norm(config: Config, name: str) -> nn.Module:
  if config.norm == 'layer':
    return LayerNorm(config.norm_eps, name=name)
  return RMSNorm(config.norm_eps, config.norm == 'rms+1', name=name)


class Linear(nn.Module):
  r"""``x @ kernel + bias``; the kernel is [inputs, outputs].

  Where the parameters have ``lora_a`` [inputs, R], ``lora_b`` [R, outputs] and
  ``lora_scale`` [], see `mezo_jax.peft.lora`, their product is added without
  being built: :math:`x W + s\, (x A) B`.
  """

  inputs: int
  outputs: int
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Any) -> Any:
    kernel = fetched(self.param('kernel', _init, (self.inputs, self.outputs)))
    y = x @ kernel.astype(x.dtype)
    if self.has_variable('params', 'lora_a'):
      a, b, scale = (self.get_variable('params', f'lora_{name}')
                     for name in ('a', 'b', 'scale'))
      y = y + (x @ a.astype(x.dtype) * scale.astype(x.dtype)
               ) @ b.astype(x.dtype)
    if self.use_bias:
      bias = fetched(self.param(
          'bias', nn.initializers.zeros, (self.outputs,)))
      y = y + bias.astype(x.dtype)
    return y


class Table(nn.Module):
  """Rows of width D, one a token: looked up, or scored against."""

  rows: int
  width: int

  @nn.compact
  def __call__(self, ids: Any = None) -> Any:
    table_VxD = self.param('embedding', _init, (self.rows, self.width))
    return table_VxD if ids is None else table_VxD[ids]


def activation(config: Config, x: jax.Array) -> jax.Array:
  return _ACTIVATIONS[config.activation](x)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """``cap * tanh(x / cap)``, within (-cap, cap); x itself without a cap."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def rope_tables(rope: Rope, head_width: int, positions_BxS: jax.Array
                ) -> tuple[jax.Array, jax.Array]:
  """(cos, sin), float32 [B, S, H]."""
  h = head_width
  freq = rope.theta ** (-jnp.arange(0, h, 2, dtype=jnp.float32) / h)
  if rope.kind == 'linear':
    freq = freq / rope.factor
  elif rope.kind == 'llama3':
    turns = rope.original_max_length * freq / (2 * jnp.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    freq = keep * freq + (1 - keep) * freq / rope.factor
  angle = positions_BxS.astype(jnp.float32)[..., None] * freq
  angle = jnp.concatenate([angle, angle], -1)
  return jnp.cos(angle), jnp.sin(angle)


def take_tokens(x_BxSxD: jax.Array, at_BxA: jax.Array) -> jax.Array:
  """[B, A, D]: those tokens of each text."""
  return jnp.take_along_axis(x_BxSxD, at_BxA[..., None], 1)


def apply_rope(x_BxSxNxH: jax.Array, cos_BxSxH: jax.Array, sin_BxSxH: jax.Array
               ) -> jax.Array:
  """Rotates pairs (i, i + H/2) of every head, in float32."""
  x = x_BxSxNxH.astype(jnp.float32)
  first, second = jnp.split(x, 2, -1)
  turned = jnp.concatenate([-second, first], -1)
  out = x * cos_BxSxH[:, :, None] + turned * sin_BxSxH[:, :, None]
  return out.astype(x_BxSxNxH.dtype)


def attend(config: Config, q_BxSxNxH: jax.Array, k_BxTxKxH: jax.Array,
           v_BxTxKxH: jax.Array, mask_Bx1xSxT: jax.Array) -> jax.Array:
  r"""Attention over the keys that the mask allows, [B, S, N, H].

  .. math:: \mathrm{softmax}(\mathrm{cap}(s\, q k^\top))\, v, \quad
            s = 1 / \sqrt{H} \text{ or query\_scale}

  (Vaswani et al., 2017; the cap is Gemma 2's.) N / K queries share a key.
  """
  # jax's attention asks for a precision of float16 that CPUs do not have; with
  # the default one, as below, products are summed in float32 everywhere.
  half = q_BxSxNxH.dtype == jnp.float16
  if config.attention_softcap is None and not half:
    return jax.nn.dot_product_attention(
        q_BxSxNxH, k_BxTxKxH, v_BxTxKxH, mask=mask_Bx1xSxT,
        scale=config.query_scale)
  # No library's fused attention caps its scores.
  b, s, n, h = q_BxSxNxH.shape
  k = config.num_kv_heads
  scale = config.query_scale or h ** -0.5
  q_BxSxKxGxH = q_BxSxNxH.reshape(b, s, k, n // k, h)
  scores = jnp.einsum('bskgh,btkh->bkgst', q_BxSxKxGxH, k_BxTxKxH,
                      preferred_element_type=jnp.float32)
  scores = softcap(scores * scale, config.attention_softcap)
  scores = jnp.where(mask_Bx1xSxT[:, :, None], scores, -1e30)
  weights = jax.nn.softmax(scores).astype(v_BxTxKxH.dtype)
  return jnp.einsum('bkgst,btkh->bskgh', weights, v_BxTxKxH).reshape(b, s, n, h)


class Attention(nn.Module):
  """Queries, keys, values, and the output matrix.

  Where the parameters have ``prefix_k`` and ``prefix_v`` [M, K, H], see
  `mezo_jax.peft.prefix`, every token sees these keys (rotated already) and
  values as well.
  """

  config: Config

  @nn.compact
  def __call__(self, x_BxSxD: jax.Array, of_BxTxD: jax.Array, cache: Any,
               shared: Shared, local: jax.Array | None, layer: jax.Array | None
               ) -> Any:
    c = self.config
    b, s, _ = x_BxSxD.shape
    # Kernels are matrices: with a head axis XLA copies them all on TPU.
    head = lambda n, name, x: Linear(
        c.width, n * c.head_width, c.qkv_bias, name=name)(
            x).reshape(*x.shape[:2], n, c.head_width)
    q_BxSxNxH = head(c.num_heads, 'q', x_BxSxD)
    k_BxTxKxH = head(c.num_kv_heads, 'k', of_BxTxD)
    v_BxTxKxH = head(c.num_kv_heads, 'v', of_BxTxD)
    if c.qk_norm:
      q_BxSxNxH = make_norm(c, 'q_norm')(q_BxSxNxH)
      k_BxTxKxH = make_norm(c, 'k_norm')(k_BxTxKxH)
    mask, rope = shared.mask, shared.rope
    if local is not None:
      pick = lambda a, b: jnp.where(local, a, b)
      mask = pick(shared.local_mask, mask)
      if shared.local_rope is not None:
        rope = jax.tree.map(pick, shared.local_rope, rope)
    if rope is not None:
      q_BxSxNxH = apply_rope(q_BxSxNxH, *(rope if shared.wanted is None else [
          take_tokens(x, shared.wanted) for x in rope]))
      k_BxTxKxH = apply_rope(k_BxTxKxH, *rope)
    if cache is not None:
      # All must have one dtype, which jax_enable_x64 changes for some of them.
      assert layer is not None and shared.start is not None
      at = (layer, 0, shared.start.astype(layer.dtype), 0, 0)
      put = lambda all_, new: jax.lax.dynamic_update_slice(
          all_, new[None].astype(all_.dtype), at)
      cache = cache._replace(k=put(cache.k, k_BxTxKxH),
                             v=put(cache.v, v_BxTxKxH))
      k_BxTxKxH, v_BxTxKxH = cache.k[layer], cache.v[layer]
    if self.has_variable('params', 'prefix_k'):
      before = lambda name, x: jnp.concatenate([jnp.broadcast_to(
          self.get_variable('params', name).astype(x.dtype),
          (b, *self.get_variable('params', name).shape)), x], 1)
      k_BxTxKxH = before('prefix_k', k_BxTxKxH)
      v_BxTxKxH = before('prefix_v', v_BxTxKxH)
      more = k_BxTxKxH.shape[1] - mask.shape[-1]
      mask = jnp.pad(mask, [(0, 0)] * 3 + [(more, 0)], constant_values=True)
    out_BxSxNxH = attend(c, q_BxSxNxH, k_BxTxKxH, v_BxTxKxH, mask)
    return Linear(c.num_heads * c.head_width, c.width, c.out_bias,
                  name='o')(out_BxSxNxH.reshape(b, s, -1)), cache


class MLP(nn.Module):
  config: Config

  @nn.compact
  def __call__(self, x_BxSxD: jax.Array) -> Any:
    c = self.config
    up = lambda name: Linear(
        c.width, c.ff_width, c.mlp_bias, name=name)(x_BxSxD)
    h_BxSxF = activation(c, up('gate')) * up('up') if c.gated else activation(
        c, up('up'))
    return Linear(c.ff_width, c.width, c.mlp_bias, name='down')(h_BxSxF)


class Block(nn.Module):
  """One layer; the signature that `nn.scan` wants."""

  config: Config

  @nn.compact
  def __call__(self, carry: Any, shared: Shared, local: jax.Array | None,
               layer: jax.Array | None) -> Any:
    c = self.config
    x_BxSxD, cache = carry
    norm = lambda name: make_norm(c, name)
    of_BxTxD = x_BxSxD if shared.context is None else shared.context
    if c.norm_place == 'post':
      y, cache = Attention(c, name='attn')(
          x_BxSxD, of_BxTxD, cache, shared, local, layer)
      x_BxSxD = norm('attn_norm')(x_BxSxD + y)
      x_BxSxD = norm('mlp_norm')(x_BxSxD + MLP(c, name='mlp')(x_BxSxD))
    else:
      after = norm if c.norm_place == 'both' else lambda name: lambda y: y
      before = norm('attn_norm')
      normed = before(x_BxSxD)
      y, cache = Attention(c, name='attn')(
          normed, normed if shared.context is None else before(of_BxTxD), cache,
          shared, local, layer)
      x_BxSxD += after('attn_post_norm')(y)
      y = MLP(c, name='mlp')(norm('mlp_norm')(x_BxSxD))
      x_BxSxD += after('mlp_post_norm')(y)
    return (constrain_rows(x_BxSxD), cache), None
