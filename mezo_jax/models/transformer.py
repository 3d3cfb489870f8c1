"""The language model: embedding, layers in a scan, head.

Shapes in names are those of `mezo_jax.models.layers`.
"""

from collections.abc import Mapping
from typing import Any, cast

from flax import linen as nn
import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from mezo_jax.core.sharding import constrain_rows, splits_vocabulary
from mezo_jax.models.layers import (
  activation,
  Block,
  Cache,
  Config,
  Linear,
  make_norm,
  rope_tables,
  Shared,
  softcap,
  Table,
  take_tokens,
)
from mezo_jax.perturb.api import dequantized

_CHUNK = 4096  # rows of the vocabulary at a time
_FEATURES = ('', 'head', 'body', 'trunk')


def log_likelihood(x_BxAxD: jax.Array, table_VxD: jax.Array,
                   targets_BxA: jax.Array, bias_V: jax.Array | None = None,
                   cap: float | None = None, chunk: int = _CHUNK) -> jax.Array:
  r"""log p of the targets, float32 [B, A], without logits [B, A, V].

  .. math:: \log p_t = x^\top w_t - \log \sum_v \exp(x^\top w_v)

  Parts of the vocabulary in turn update a running maximum and sum, so that
  neither all logits nor, under `mezo_jax.perturbed`, a whole perturbed table
  is ever alive. Where the vocabulary is split over `tensor` each device has
  such a part already. A target that is not a row of the table gives NaN.
  """
  def finish(logits, bias):
    return softcap(logits if bias is None else logits + bias, cap)

  picked_BxA = finish(
      jnp.einsum('bad,bad->ba', x_BxAxD, table_VxD[targets_BxA],
                 preferred_element_type=jnp.float32),
      None if bias_V is None else bias_V[targets_BxA])

  inside_BxA = (targets_BxA >= 0) & (targets_BxA < table_VxD.shape[0])
  picked_BxA = jnp.where(inside_BxA, picked_BxA, jnp.nan)

  def add(carry, take):
    top, total = carry
    logits = finish(_products(x_BxAxD, take(table_VxD)),
                    None if bias_V is None else take(bias_V))
    new_top = jnp.maximum(top, logits.max(-1))
    total = total * jnp.exp(top - new_top) + jnp.sum(
        jnp.exp(logits - new_top[..., None]), -1)
    return new_top, total

  vocab = table_VxD.shape[0]
  chunk = vocab if splits_vocabulary() else min(chunk, vocab)
  carry, rest = (picked_BxA, jnp.zeros_like(picked_BxA)), vocab % chunk
  if rest:
    carry = add(carry, lambda rows: rows[vocab - rest:])
  (top, total), _ = jax.lax.scan(
      lambda carry, start: (add(
          carry, lambda rows: jax.lax.dynamic_slice_in_dim(
              rows, start, chunk)), None),
      carry, jnp.arange(0, vocab - rest, chunk))
  return picked_BxA - top - jnp.log(total)


def _products(x_BxAxD, rows_VxD):
  return jnp.einsum('bad,vd->bav', x_BxAxD, rows_VxD,
                    preferred_element_type=jnp.float32)


class Head(nn.Module):
  """What a masked language model does before it scores the vocabulary."""

  config: Config

  @nn.compact
  def __call__(self, x_BxAxD: jax.Array) -> Any:
    c = self.config
    x_BxAxD = Linear(c.width, c.width, True, name='dense')(x_BxAxD)
    x_BxAxD = make_norm(c, 'norm')(activation(c, x_BxAxD))
    return x_BxAxD, self.param('bias', nn.initializers.zeros, (c.vocab_size,))


class Transformer(nn.Module):
  """A language model over the nested dict of its parameters.

  ``model.apply({'params': params}, input_ids, attention_mask)`` gives float32
  logits [B, S, V]. Parameters of layers are stacked, ``layers/...`` [L, ...];
  the last k may stand apart, ``last_layers/...`` [k, ...]. Parameters that
  `mezo_jax.peft` adds (LoRA, a prefix of M keys and values, a prompt of M soft
  tokens) are used where they are there.

  Attributes:
    config: the family and its size.
    remat: whether backpropagation keeps each layer's input alone.
    prefix_positions: Positions of the tokens after a prefix: 'zero', from 0 on
      as without one (the paper), or 'after', from M on (PEFT).
  """

  config: Config
  remat: bool = False
  prefix_positions: str = 'zero'

  @nn.compact
  def __call__(self, input_ids: Any, attention_mask: Any = None, *,
               token_type_ids: Any = None, answer_at: Any = None,
               token_ids: Any = None, targets: Any = None, cache: Any = None,
               shared_prompt: bool = False, features: str = '',
               trunk: jax.Array | None = None) -> Any:
    """Logits, or log-likelihoods of given tokens.

    Args:
      input_ids: integers [B, S]; V, V + 1, ... are the tokens of a soft prompt.
        All numbers may be arrays of jax or numpy, or lists. Those whose values
        are known are checked. In a program of `jax.jit` that is given them, a
        row with a token, a token type or a position that the model does not
        have gives NaN.
      attention_mask: integers or booleans [B, S]: 0 at padding, on either side,
        and 1 at tokens; or 1, 2, ... for several texts packed into a row, none
        of which sees another and each of which starts at position 0. None for
        no padding. With a cache [B, T]: of its tokens and of these.
      token_type_ids: integers [B, S], for families that have them; None for 0.
      answer_at: integers [B, A], the positions whose logits are wanted, counted
        from the end if negative; None for all. [B, S, V] logits are then never
        made.
      token_ids: integers [C], the tokens whose logits are wanted; None for all.
      targets: integers [B, A or S], the tokens whose log-likelihoods are wanted
        instead of logits.
      cache: of the tokens before these, from `make_cache`, with room for these;
        without it the result is NaN.
      shared_prompt: text 1 of a row is a prompt that its texts 2, 3, ...
        continue, each as if it were alone with it. Each continuation with the
        prompt, but not all of them together, must fit the model's positions.
      features: what to return instead of logits: 'head' for what the
        vocabulary is scored against, 'body' for what the last layer gives
        (after the final norm; they differ in masked models), 'trunk' for what
        ``layers`` give, to be the input of ``last_layers`` and the head.
      trunk: vectors [B, S, D] of these tokens, as features='trunk' gives them,
        to go on from; ``layers``, and what is before them, are not used.

    Returns:
      float32 logits [B, A or S, C or V]; with ``targets``, their
      log-likelihoods [B, A or S]; with ``features``, vectors [B, A or S, D] in
      the dtype of the parameters, of the trunk always [B, S, D]. With a cache,
      a pair of that and the cache with these tokens added.

    Raises:
      TypeError: for ids that are not integers.
      ValueError: for shapes that do not fit, for more tokens than the model has
        positions or the cache has room for, for a token or token type that the
        model does not have, for what a model without its head cannot say, or
        for a trunk with a cache.
    """
    c = self.config
    if features not in _FEATURES:
      raise ValueError(f'features is {features!r}, not one of '
                       f'{", ".join(_FEATURES[1:])}.')
    have = self.variables.get('params', {})
    soft = have['prompt']['embedding'].shape[0] if 'prompt' in have else 0
    input_ids, inside = known_ids(
        'input_ids', input_ids, c.vocab_size + soft, (None, None))
    b, s = input_ids.shape
    inside = [inside]
    if attention_mask is not None:
      attention_mask = known_mask(
          attention_mask, b, s if cache is None else cache.k.shape[2])
    if token_type_ids is not None:
      if not c.token_types:
        raise ValueError(f'a {c.family} has no token types: leave '
                         'token_type_ids out.')
      token_type_ids, types_inside = known_ids(
          'token_type_ids', token_type_ids, c.token_types, ((1, b), (1, s)))
      inside.append(types_inside)
    if answer_at is not None:
      answer_at, _ = known_ids(
          'answer_at', answer_at, s, ((1, b), None), least=-s)
    if targets is not None:
      targets, _ = known_ids('targets', targets, c.vocab_size, (
          b, s if answer_at is None else answer_at.shape[1]))
    tokens_inside = None
    if token_ids is not None:
      token_ids, tokens_inside = known_ids(
          'token_ids', token_ids, c.vocab_size, (None,))
    shift = self._shift(have)
    longest = s if cache is None else cache.k.shape[2]
    if self.prefix_positions != 'zero':
      longest += prefix_length(have)
    if longest > c.max_length and not shared_prompt:
      raise ValueError(f'{longest} tokens exceed the {c.max_length} '
                       'positions of this model.')
    if cache is not None and (trunk is not None or features == 'trunk'):
      raise ValueError('a cache is of all layers: leave it out with a trunk.')
    if cache is not None:
      inside.append(_has_room(cache, s))
    embed = Table(c.vocab_size, c.embed_width or c.width, name='embed')
    shared, at_BxS = _shared(
        c, b, s, attention_mask, cache, shared_prompt, shift)
    if longest > c.max_length:
      # Only texts that share a prompt can be longer together than one may be.
      fits = at_BxS < c.max_length
      if attention_mask is not None and cache is None:
        fits |= attention_mask == 0
      if not isinstance(fits, Tracer) and not fits.all():
        raise ValueError(f'a text exceeds the {c.max_length} positions of this '
                         'model.')
      inside.append(fits)
    if trunk is not None:
      x_BxSxD = trunk
    else:
      x_BxSxD = self._embed(embed, input_ids, token_type_ids, at_BxS, have)
      for mask in inside:
        if mask is not None:
          x_BxSxD = jnp.where(mask[..., None], x_BxSxD, jnp.nan)
    carry, first = (constrain_rows(x_BxSxD), cache), 0
    for name, length in _parts(c, have):
      if name == 'layers' and trunk is not None:
        first += length
        continue
      if name == 'last_layers' and features == 'trunk':
        break
      if (answer_at is not None and cache is None and length == 1
          and first + length == c.num_layers):
        # Of the last layer, apart, no more is computed than is read.
        carry, shared = _wanted(carry, shared, answer_at)
      layers = nn.scan(
          nn.remat(Block, prevent_cse=False) if self.remat else Block,
          variable_axes={'params': 0}, split_rngs={'params': True},
          # flax takes a tuple, one entry for each argument.
          in_axes=cast(Any, (nn.broadcast, 0, 0)), length=length)
      index = jnp.arange(first, first + length)
      carry, _ = layers(c, name=name)(
          carry, shared,
          jnp.array(c.local_layers)[index] if c.local_layers else None,
          None if cache is None else index)
      first += length
    x_BxSxD, cache = carry
    if features == 'trunk':
      return x_BxSxD
    if answer_at is not None and shared.wanted is None:
      x_BxSxD = take_tokens(x_BxSxD, answer_at)
    if c.final_norm:
      x_BxSxD = make_norm(c, 'norm')(x_BxSxD)
    if features == 'body':
      return self._with(cache, s, x_BxSxD)
    if not c.head and (c.masked_head or not features):
      raise ValueError(
          f'the files of this {c.family} are of a base class, without the '
          "head that makes logits: ask for features='body', or load a model "
          'that was saved with its head.')
    if c.embed_width:
      x_BxSxD = Linear(c.width, c.embed_width, name='project_out')(x_BxSxD)
    bias_V = None
    if c.masked_head:
      x_BxSxD, bias_V = Head(c, name='head')(x_BxSxD)
    if features == 'head':
      return self._with(cache, s, x_BxSxD)
    head = embed if c.tied_head else Table(
        c.vocab_size, c.embed_width or c.width, name='lm_head')
    if targets is not None:
      out = log_likelihood(x_BxSxD, head(), targets, bias_V, c.logit_softcap)
    else:
      out = _products(x_BxSxD, head(token_ids))
      if bias_V is not None:
        out += bias_V if token_ids is None else bias_V[token_ids]
      out = softcap(out, c.logit_softcap)
      if tokens_inside is not None:
        out = jnp.where(tokens_inside, out, jnp.nan)
    return self._with(cache, s, out)

  def _embed(self, embed, input_ids, token_type_ids, at_BxS, have):
    """What goes into the first layer."""
    c = self.config
    x_BxSxD = embed(input_ids)
    if c.embed_scale:
      x_BxSxD *= jnp.asarray(c.embed_scale, x_BxSxD.dtype)
    if 'prompt' in have:  # as PEFT has it, after the scale
      soft_MxD = have['prompt']['embedding'].astype(x_BxSxD.dtype)
      at_BxSxM = jax.nn.one_hot(
          input_ids - c.vocab_size, len(soft_MxD), dtype=x_BxSxD.dtype)
      x_BxSxD = jnp.where(
          input_ids[..., None] < c.vocab_size, x_BxSxD, at_BxSxM @ soft_MxD)
    if c.embed_width:
      x_BxSxD = Linear(c.embed_width, c.width, name='project_in')(x_BxSxD)
    if c.rope is None:
      x_BxSxD += Table(c.max_length + c.position_offset, c.width,
                       name='positions')(at_BxS + c.position_offset)
    if c.token_types:
      if token_type_ids is None:
        token_type_ids = jnp.zeros((1, 1), jnp.int32)
      x_BxSxD += Table(c.token_types, c.width, name='types')(token_type_ids)
    if c.embed_norm:
      x_BxSxD = make_norm(c, 'embed_norm')(x_BxSxD)
    return x_BxSxD

  def _with(self, cache, s, out):
    """The result, with a cache also the cache with these tokens added."""
    if cache is None:
      return out
    return out, cache._replace(length=cache.length + s)

  def _shift(self, params) -> int:
    """Returns how much larger positions are than without a prefix."""
    return 0 if self.prefix_positions == 'zero' else prefix_length(params)


def known_ids(name: str, ids: Any, size: int, shape: tuple[Any, ...],
              least: int = 0) -> tuple[jax.Array, jax.Array | None]:
  """Checks numbers that select rows: token ids, token types, positions.

  jax reads the nearest row for a number that no row has, where torch raises.

  Args:
    name: The argument, for the error.
    ids: An array of jax or numpy, or lists.
    size: Numbers below it are allowed.
    shape: The length of each axis, or a tuple of lengths to choose from; None
      for any.
    least: Numbers from it on are allowed.

  Returns:
    ``ids, inside``: the integers, and which of them are allowed. ``inside`` is
    None where the values are known, as all are then allowed.

  Raises:
    TypeError: for other than integers.
    ValueError: for another shape, or a number that is not allowed.
  """
  known = is_known(ids)
  if not isinstance(ids, jax.Array):
    ids = np.asarray(ids)
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise TypeError(f'{name} must be integers, not {ids.dtype}.')
  fits = lambda m, n: m in n if isinstance(n, tuple) else n in (None, m)
  if len(ids.shape) != len(shape) or not all(map(fits, ids.shape, shape)):
    hint = ': a single text is a batch of one, [None] adds the axis' if (
        len(ids.shape) == 1 and len(shape) == 2) else ''
    want = ', '.join('any' if n is None else str(n) for n in shape)
    raise ValueError(
        f'{name} has the shape {tuple(ids.shape)}, not ({want}){hint}.')
  if known:
    values = np.asarray(ids)
    wrong = values[(values < least) | (values >= size)]
    if wrong.size:
      raise ValueError(
          f'{name} has {wrong[0]}, and this model takes {least} to {size - 1}.')
  ids = jnp.asarray(ids)
  if ids.dtype.itemsize < 4 or jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
    ids = ids.astype(jnp.int32)
  return ids, None if known else (ids >= least) & (ids < size)


def known_mask(mask: Any, rows: int, length: int) -> jax.Array:
  """Returns an attention mask as int32 [B or 1, T].

  Raises:
    ValueError: for another shape or, where they are known, for values other
      than 0, 1, 2, ..., such as those of a mask that is added to scores.
  """
  if not isinstance(mask, jax.Array):
    mask = np.asarray(mask)
  if len(mask.shape) != 2 or mask.shape[1] != length or (
      mask.shape[0] not in (1, rows)):
    raise ValueError(f'attention_mask has the shape {tuple(mask.shape)}, not '
                     f'({rows}, {length}).')
  if is_known(mask):
    values = np.asarray(mask)
    if not np.all((values >= 0) & (values % 1 == 0)):
      raise ValueError('attention_mask must be 0 at padding and 1 at tokens.')
  return jnp.asarray(mask).astype(jnp.int32)


def is_known(x: Any) -> bool:
  """Returns whether the values of an array can be read here and now."""
  return not isinstance(x, Tracer) and (
      not isinstance(x, jax.Array) or x.is_fully_addressable)


def _has_room(cache: Cache, tokens: int) -> jax.Array | None:
  """Returns whether a cache has room for more tokens; None if it is known to.

  Raises:
    ValueError: if it is known not to.
  """
  most = cache.k.shape[2]
  if isinstance(cache.length, Tracer):
    return (cache.length + tokens <= most)[None, None]
  if int(cache.length) + tokens > most:
    raise ValueError(f'the cache has {int(cache.length)} tokens and room for '
                     f'{most}: {tokens} more do not fit.')
  return None


def apply(model: Transformer, params: dict[str, Any], *args: Any, **kwargs: Any
          ) -> Any:
  """``model.apply({'params': params}, ...)``, of quantised weights too."""
  return dequantized(lambda params: model.apply(
      {'params': params}, *args, **kwargs))(params)


def prefix_length(params: Mapping[str, Any]) -> int:
  """M, the keys and values that `mezo_jax.peft.prefix` put before the texts."""
  attn = params.get('layers', {}).get('attn', {})
  return attn['prefix_k'].shape[1] if 'prefix_k' in attn else 0


def _parts(c: Config, params: Mapping[str, Any]) -> list[tuple[str, int]]:
  """The stacks of layers, in order, and how many layers each has."""
  last = jax.tree.leaves(params.get('last_layers', {}))
  k = len(last[0]) if last else 0
  return [(name, n) for name, n in (
      ('layers', c.num_layers - k), ('last_layers', k)) if n]


def _shared(c: Config, b: int, s: int, attention_mask, cache, shared_prompt,
            shift):
  """(what all layers see, positions of the tokens [B or 1, S])."""
  start, t = (0, s) if cache is None else (cache.length, cache.k.shape[2])
  query_Sx1 = start + jnp.arange(s)[:, None]
  key_T = jnp.arange(t)
  before_1xSxT = (key_T <= query_Sx1)[None]
  if attention_mask is None:
    same_BxSxT, at_BxS = jnp.ones((1, s, t), bool), query_Sx1.T
  else:
    # Padding is a text of its own: then no token attends to nothing.
    text_BxT = attention_mask
    text_BxS = jax.lax.dynamic_slice_in_dim(text_BxT, start, s, 1)
    same_BxSxT = text_BxS[:, :, None] == text_BxT[:, None]
    if shared_prompt:
      same_BxSxT |= (text_BxS[:, :, None] > 1) & (text_BxT[:, None] == 1)
    at_BxS = jnp.sum(same_BxSxT & before_1xSxT, -1) - 1
  at_BxS = at_BxS + shift
  mask_BxSxT = same_BxSxT & before_1xSxT if c.causal else same_BxSxT
  # A continuation lies further from the prompt in the row than in its text.
  ago_BxSxT = (at_BxS[:, :, None] - at_BxS[:, None] if shared_prompt
               else query_Sx1 - key_T)
  window = c.window
  near = (lambda x: x) if window is None else (
      lambda x: x & (ago_BxSxT < window))
  rope = lambda r: r and rope_tables(r, c.head_width, at_BxS)
  if c.local_layers:
    local_mask, local_rope = near(mask_BxSxT)[:, None], rope(c.local_rope)
  else:
    mask_BxSxT, local_mask, local_rope = near(mask_BxSxT), None, None
  return Shared(
      jnp.broadcast_to(mask_BxSxT[:, None], (b, 1, s, t)), local_mask,
      rope(c.rope), local_rope, None if cache is None else cache.length), at_BxS


def _wanted(carry, shared: Shared, at_BxA):
  """What a layer is given of which these tokens alone are wanted."""
  x_BxSxD, cache = carry
  masks = [m if m is None else jnp.take_along_axis(
      m, at_BxA[:, None, :, None], 2) for m in (shared.mask, shared.local_mask)]
  return (take_tokens(x_BxSxD, at_BxA), cache), shared._replace(
      mask=masks[0], local_mask=masks[1], context=x_BxSxD, wanted=at_BxA)


def make_cache(config: Config, rows: int, length: int,
               dtype: jax.typing.DTypeLike) -> Cache:
  """An empty cache for ``length`` tokens of each of ``rows`` texts.

  Args:
    config: of the model.
    rows: B, texts in the batch.
    length: T, tokens of prompt and continuation together.
    dtype: of the keys and values, as a rule that of the parameters.

  Returns:
    A `Cache` with k and v [L, B, T, K, H] and length 0.
  """
  shape = (config.num_layers, rows, length, config.num_kv_heads,
           config.head_width)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype),
               jnp.zeros((), jnp.int32))
