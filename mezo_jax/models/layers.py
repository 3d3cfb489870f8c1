"""Defines the layers that all model families share, and their configuration.

The suffix of a variable's name gives its shape: ``x_BxSxD`` has the shape
[B, S, D]. The letters are: B batch, S sequence, T keys (S without a cache, else
the cache's length), D width, N query heads, K key and value heads, G query
heads per key head, H head width, F feed-forward width, V vocabulary, L layers,
A answer positions, M tokens of a prefix or soft prompt, R rank.
"""

import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from mezo_jax.core.sharding import fetched


@dataclasses.dataclass(frozen=True)
class Rope:
  r"""Configures rotary position embeddings.

  The pair of coordinates i of a head rotates with the frequency
  :math:`\theta^{-2i/H}`, which ``kind`` may rescale.

  Attributes:
    theta: Base of the frequencies.
    kind: Rescaling of the frequencies. 'default' leaves them as they are.
      'linear' divides all of them by ``factor``. 'llama3' divides the low
      frequencies by ``factor``, keeps the high ones, and interpolates for the
      frequencies in between.
    factor: Divisor of the frequencies. Used unless ``kind`` is 'default'.
    low_freq_factor: For 'llama3': frequencies with at most this many full turns
      in ``original_max_length`` tokens are divided by ``factor``.
    high_freq_factor: For 'llama3': frequencies with at least this many full
      turns in ``original_max_length`` tokens are kept.
    original_max_length: For 'llama3': number of positions of the model before
      its context was extended.

  References:
    Su et al., 2021, RoFormer (https://arxiv.org/abs/2104.09864).
  """

  theta: float = 10000.0
  kind: str = 'default'  # 'default', 'linear' or 'llama3'
  factor: float = 1.0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_length: int = 8192


@dataclasses.dataclass(frozen=True)
class Config:
  """Describes the architecture and the sizes of a model.

  A config is usually read from a model's files by `load_config` or
  `read_config`. All fields are hashable, so it can be a static argument of a
  jitted function.
  """

  # Hugging Face's model_type; a key of `mezo_jax.models.FAMILIES`.
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
  # 'rms' (scale w), 'rms+1' (scale 1 + w) or 'layer' (LayerNorm).
  norm: str = 'rms'
  # 'pre' is x + f(norm(x)), 'post' is norm(x + f(x)), 'both' is
  # x + norm(f(norm(x))), and 'after' is x + norm(f(x)).
  norm_place: str = 'pre'
  final_norm: bool = True  # Whether a norm follows the last layer.
  activation: str = 'silu'  # 'silu', 'relu', 'gelu' or 'gelu_tanh'
  gated: bool = True  # True is act(gate(x)) * up(x); False is act(up(x)).
  rope: Rope | None = Rope()  # None selects learned positions.
  # Rotary positions of the layers with a window. None means those of `rope`.
  local_rope: Rope | None = None
  # In the table of learned positions, position i is in row position_offset + i.
  position_offset: int = 0
  causal: bool = True
  # In a layer with a window, a query attends to at most this many keys,
  # including the key of its own token. None means no limit.
  window: int | None = None
  # For each layer, whether the window applies to it. () means to all layers.
  local_layers: tuple[bool, ...] = ()
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  qk_norm: bool = False  # Whether each head of q and k is normalised.
  # Whether the norm of q and k is over all heads together.
  qk_norm_whole: bool = False
  # Number of experts in each feed-forward layer, see `experts`; 0 means none.
  # The width of an expert is `ff_width`.
  num_experts: int = 0
  experts_per_token: int = 0
  # Whether the weights of the experts of a token sum to 1.
  normalize_experts: bool = False
  # Factor of the attention scores. None means head_width ** -0.5.
  query_scale: float | None = None
  # Soft caps, see `softcap`, of the attention scores and of the logits. None
  # means no cap.
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  # Factor of the logits, and of what a layer's two parts add to its input. None
  # means 1.
  logit_scale: float | None = None
  residual_scale: float | None = None
  # Width of the embedding, if it differs from `width`. Linear layers then
  # project from it to `width` and back. None means `width` and no projections.
  embed_width: int | None = None
  # Factor by which embeddings are multiplied. None means 1.
  embed_scale: float | None = None
  embed_norm: bool = False  # Whether a norm follows the embedding.
  token_types: int = 0  # Number of token types (segments). 0 means none.
  # Whether the head has a dense layer, an activation and a norm before the
  # output matrix, as in masked language models.
  masked_head: bool = False
  tied_head: bool = False  # Whether the embedding is the output matrix.
  # Whether there is a language model's head. The files of a base class, such as
  # BertModel, have none; such a model returns features only.
  head: bool = True
  # Text of the config.json that this config was read from. `save` writes it.
  source: str = dataclasses.field(
      default='', compare=False, repr=False)


class Cache(NamedTuple):
  """Holds the keys and values of the tokens that a model has seen.

  `make_cache` returns an empty cache and `Transformer` returns filled ones.
  """

  k: jax.Array  # [L, B, T, K, H]
  v: jax.Array  # [L, B, T, K, H]
  length: jax.Array  # int32 []: number of the T entries that are filled.


class Shared(NamedTuple):
  """Holds the inputs that are the same for all layers.

  The ``local_`` fields replace the others in layers with a window.

  Sometimes the output of a layer is needed at only A of the S tokens. The layer
  then gets these A tokens as its input, and all S tokens as ``context``, from
  which it computes keys and values.
  """

  mask: jax.Array  # bool [B, 1, S or A, T]
  local_mask: jax.Array | None
  rope: tuple[jax.Array, jax.Array] | None  # cos, sin: float32 [B, S, H]
  local_rope: tuple[jax.Array, jax.Array] | None
  start: jax.Array | None  # int32 []: index of the first token in the cache.
  context: jax.Array | None = None  # [B, S, D]
  wanted: jax.Array | None = None  # int32 [B, A]: positions of the A tokens.


init = nn.initializers.normal(0.02)  # transformers' initializer_range
_ACTIVATIONS = {
    'silu': jax.nn.silu, 'relu': jax.nn.relu,
    'gelu': lambda x: jax.nn.gelu(x, approximate=False),
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True)}


class RMSNorm(nn.Module):
  r"""Divides vectors by their root mean square.

  .. math:: y = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}} \cdot w

  The quotient is computed in float32 and multiplied by the scale in the dtype
  of the input, as in transformers' Llama. With ``plus_one`` the factor is 1 + w
  and the product is computed in float32, too, as in transformers' Gemma. In
  bfloat16 the two round differently.

  Attributes:
    eps: Number that is added to the mean square.
    plus_one: Whether the factor is 1 + w. Defaults to False.

  References:
    Zhang and Sennrich, 2019 (https://arxiv.org/abs/1910.07467).
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
  r"""Normalises vectors to mean 0 and variance 1, in float32.

  .. math:: y = \frac{x - \mathrm{mean}(x)}{\sqrt{\mathrm{var}(x) + \epsilon}}
            \cdot w + b

  Attributes:
    eps: Number that is added to the variance.

  References:
    Ba et al., 2016 (https://arxiv.org/abs/1607.06450).
  """

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
  """Returns a norm of the config's kind, with its parameters under ``name``."""
  if config.norm == 'layer':
    return LayerNorm(config.norm_eps, name=name)
  return RMSNorm(config.norm_eps, config.norm == 'rms+1', name=name)


class Linear(nn.Module):
  r"""Computes ``x @ kernel + bias``.

  If the parameters also have ``lora_a`` A [inputs, R], ``lora_b`` B
  [R, outputs] and ``lora_scale`` s [] (see `mezo_jax.peft.lora`), it computes
  :math:`x W + s\, (x A) B + b`, without forming the product A B.

  Attributes:
    inputs: Length of the input's last axis; axis 0 of the kernel.
    outputs: Length of the output's last axis; axis 1 of the kernel.
    use_bias: Whether there is a bias. Defaults to False.
  """

  inputs: int
  outputs: int
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Any) -> Any:
    kernel = fetched(self.param('kernel', init, (self.inputs, self.outputs)))
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
  """Looks up rows of an embedding table.

  If it is called without ids, it returns the whole table, for use as an output
  matrix.

  Attributes:
    rows: Number of rows: the vocabulary's size, or a number of positions or
      token types.
    width: Length of each row.
  """

  rows: int
  width: int

  @nn.compact
  def __call__(self, ids: Any = None) -> Any:
    table_VxD = self.param('embedding', init, (self.rows, self.width))
    return table_VxD if ids is None else table_VxD[ids]


def activation(config: Config, x: jax.Array) -> jax.Array:
  """Applies the activation function that the config names."""
  return _ACTIVATIONS[config.activation](x)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
  """Returns ``cap * tanh(x / cap)``, or x itself if cap is None."""
  return x if cap is None else cap * jnp.tanh(x / cap)


def rope_tables(rope: Rope, head_width: int, positions_BxS: jax.Array
                ) -> tuple[jax.Array, jax.Array]:
  """Returns the cosines and sines of the rotary angles.

  Args:
    rope: Base and rescaling of the frequencies.
    head_width: Width H of a head, an even number.
    positions_BxS: Integer positions of the tokens, of shape [B, S].

  Returns:
    ``cos, sin``: float32 arrays of shape [B, S, H]. The second half of the last
    axis repeats the first, as coordinates i and i + H/2 form a pair.
  """
  h = head_width
  freq = rope.theta ** (-jnp.arange(0, h, 2, dtype=jnp.float32) / h)
  if rope.kind == 'linear':
    freq = freq / rope.factor
  elif rope.kind == 'llama3':
    # Number of full turns within the original context. Below `low` a frequency
    # is divided by the factor, above `high` it is kept.
    turns = rope.original_max_length * freq / (2 * jnp.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    freq = keep * freq + (1 - keep) * freq / rope.factor
  angle = positions_BxS.astype(jnp.float32)[..., None] * freq
  angle = jnp.concatenate([angle, angle], -1)
  return jnp.cos(angle), jnp.sin(angle)


def take_tokens(x_BxSxD: jax.Array, at_BxA: jax.Array) -> jax.Array:
  """Returns the vectors at positions ``at_BxA`` of each text, [B, A, D]."""
  return jnp.take_along_axis(x_BxSxD, at_BxA[..., None], 1)


def apply_rope(x_BxSxNxH: jax.Array, cos_BxSxH: jax.Array, sin_BxSxH: jax.Array
               ) -> jax.Array:
  """Rotates the coordinate pairs (i, i + H/2) of every head, in float32.

  Args:
    x_BxSxNxH: Queries or keys.
    cos_BxSxH: Cosines from `rope_tables`.
    sin_BxSxH: Sines from `rope_tables`.

  Returns:
    An array of the shape and dtype of ``x_BxSxNxH``.
  """
  x = x_BxSxNxH.astype(jnp.float32)
  first, second = jnp.split(x, 2, -1)
  turned = jnp.concatenate([-second, first], -1)
  out = x * cos_BxSxH[:, :, None] + turned * sin_BxSxH[:, :, None]
  return out.astype(x_BxSxNxH.dtype)


def attend(config: Config, q_BxSxNxH: jax.Array, k_BxTxKxH: jax.Array,
           v_BxTxKxH: jax.Array, mask_Bx1xSxT: jax.Array) -> jax.Array:
  r"""Computes attention over the keys that the mask allows.

  .. math:: \mathrm{softmax}(\mathrm{cap}(s\, q k^\top))\, v, \quad
            s = 1 / \sqrt{H} \text{ or query\_scale}

  Gemma 2 caps the attention scores (see `softcap`); most models do not.

  Args:
    config: Config of the model. It has the scale s, the cap and the number of
      key heads.
    q_BxSxNxH: Queries.
    k_BxTxKxH: Keys. N / K consecutive query heads share a key head.
    v_BxTxKxH: Values.
    mask_Bx1xSxT: Booleans; a query attends to the keys where it is True.

  Returns:
    An array of shape [B, S, N, H] in the dtype of the values.

  References:
    Vaswani et al., 2017 (https://arxiv.org/abs/1706.03762).
  """
  # In float16, jax.nn.dot_product_attention requests a precision that CPUs do
  # not support. The code below uses the default precision, with which products
  # are summed in float32 on all devices.
  half = q_BxSxNxH.dtype == jnp.float16
  if config.attention_softcap is None and not half:
    return jax.nn.dot_product_attention(
        q_BxSxNxH, k_BxTxKxH, v_BxTxKxH, mask=mask_Bx1xSxT,
        scale=config.query_scale)
  # jax.nn.dot_product_attention cannot cap its scores, so they are computed
  # here.
  b, s, n, h = q_BxSxNxH.shape
  k = config.num_kv_heads
  scale = config.query_scale or h ** -0.5
  q_BxSxKxGxH = q_BxSxNxH.reshape(b, s, k, n // k, h)
  scores = jnp.einsum('bskgh,btkh->bkgst', q_BxSxKxGxH, k_BxTxKxH,
                      preferred_element_type=jnp.float32)
  scores = softcap(scores * scale, config.attention_softcap)
  # Masked scores are a large negative number instead of -inf, so that a query
  # without any key gets equal weights instead of NaN.
  scores = jnp.where(mask_Bx1xSxT[:, :, None], scores, -1e30)
  weights = jax.nn.softmax(scores).astype(v_BxTxKxH.dtype)
  return jnp.einsum('bkgst,btkh->bskgh', weights, v_BxTxKxH).reshape(b, s, n, h)


class Attention(nn.Module):
  """Computes multi-head attention, with its input and output matrices.

  If the parameters also have ``prefix_k`` and ``prefix_v`` [M, K, H] (see
  `mezo_jax.peft.prefix`), every token also attends to these keys and values.
  Rotary positions are not applied to prefix keys.
  """

  config: Config

  @nn.compact
  def __call__(self, x_BxSxD: jax.Array, of_BxTxD: jax.Array, cache: Any,
               shared: Shared, local: jax.Array | None, layer: jax.Array | None
               ) -> Any:
    """Returns the output of the attention, and the cache.

    Args:
      x_BxSxD: The tokens for which queries are computed.
      of_BxTxD: The tokens for which keys and values are computed. Usually they
        are the same tokens; see `Shared`.
      cache: Keys and values of earlier tokens, to which new ones are added.
        None for no cache.
      shared: Inputs that are the same for all layers.
      local: Whether the window applies to this layer, bool []. None if all
        layers are the same.
      layer: Index of this layer in the cache, int []. None without a cache.
    """
    c = self.config
    b, s, _ = x_BxSxD.shape
    # Kernels are stored as matrices, without a head axis: with one, XLA copies
    # all of them on TPU.
    def head(n, name, x):
      y = Linear(c.width, n * c.head_width, c.qkv_bias, name=name)(x)
      if c.qk_norm_whole and name in 'qk':
        y = make_norm(c, f'{name}_norm')(y)
      return y.reshape(*x.shape[:2], n, c.head_width)
    q_BxSxNxH = head(c.num_heads, 'q', x_BxSxD)
    k_BxTxKxH = head(c.num_kv_heads, 'k', of_BxTxD)
    v_BxTxKxH = head(c.num_kv_heads, 'v', of_BxTxD)
    if c.qk_norm and not c.qk_norm_whole:
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
      # dynamic_update_slice requires indices of one dtype. With jax_enable_x64
      # the layer index is int64 while the cache's length is int32.
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
  """Applies the feed-forward network to each token.

  It computes ``down(act(gate(x)) * up(x))`` if the config is gated, and
  ``down(act(up(x)))`` otherwise.
  """

  config: Config

  @nn.compact
  def __call__(self, x_BxSxD: jax.Array) -> Any:
    c = self.config
    up = lambda name: Linear(
        c.width, c.ff_width, c.mlp_bias, name=name)(x_BxSxD)
    h_BxSxF = activation(c, up('gate')) * up('up') if c.gated else activation(
        c, up('up'))
    return Linear(c.ff_width, c.width, c.mlp_bias, name='down')(h_BxSxF)
