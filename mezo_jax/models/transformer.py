"""Defines the language model: an embedding, a scan over layers, and a head.

Suffixes of names give shapes, with the letters of `mezo_jax.models.layers`.
"""

from collections.abc import Mapping
from typing import Any, cast

from flax import linen as nn
import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from mezo_jax.core.sharding import constrain_rows, splits_vocabulary
from mezo_jax.models.block import Block
from mezo_jax.models.layers import (
  activation,
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

_CHUNK = 4096  # Rows of the vocabulary that are scored at a time.
_FEATURES = ('', 'head', 'body', 'hidden_states')


def log_likelihood(x_BxAxD: jax.Array, table_VxD: jax.Array,
                   targets_BxA: jax.Array, bias_V: jax.Array | None = None,
                   cap: float | None = None, chunk: int = _CHUNK,
                   scale: float | None = None) -> jax.Array:
  r"""Returns the log-likelihoods of target tokens without building all logits.

  .. math:: \log p_t = x^\top w_t - \log \sum_v \exp(x^\top w_v)

  The vocabulary is processed in chunks that update a running maximum and sum.
  So the logits of shape [B, A, V] are never in memory as a whole. Neither is
  the perturbed table under `mezo_jax.perturbed`. If the vocabulary is split
  over the `tensor` axis of a mesh, it is processed in one chunk, because each
  device has only a part of it.

  Args:
    x_BxAxD: Features of the answer positions.
    table_VxD: Output matrix, one row per token of the vocabulary.
    targets_BxA: Integer ids of the target tokens.
    bias_V: Bias of the logits. Defaults to None, for no bias.
    cap: Soft cap of the logits (see `softcap`). Defaults to None, for no cap.
    chunk: Number of rows of the table that are scored at a time. Defaults to
      4096.
    scale: Factor of the logits. Defaults to None, for 1.

  Returns:
    Float32 log-likelihoods of shape [B, A]; NaN for a target that is not a row
    of the table.
  """
  def finish(logits, bias):
    """Adds the bias, and applies the factor and the cap."""
    logits = logits if bias is None else logits + bias
    return softcap(logits if scale is None else logits * scale, cap)

  picked_BxA = finish(
      jnp.einsum('bad,bad->ba', x_BxAxD, table_VxD[targets_BxA],
                 preferred_element_type=jnp.float32),
      None if bias_V is None else bias_V[targets_BxA])

  # For an index out of range, jax reads the nearest row of the table. The
  # result for such a target is therefore set to NaN.
  inside_BxA = (targets_BxA >= 0) & (targets_BxA < table_VxD.shape[0])
  picked_BxA = jnp.where(inside_BxA, picked_BxA, jnp.nan)

  # The carry is the largest logit so far and the sum of exp(logit - largest).
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
  # The maximum starts with the logit of the target, which is finite. The sum
  # starts with 0, because the term of the target is added with its chunk. Rows
  # that do not fill a chunk are added first, so that all chunks of the scan
  # have the same size.
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
  """Returns float32 scores [B, A, V] of features against rows of a table."""
  return jnp.einsum('bad,vd->bav', x_BxAxD, rows_VxD,
                    preferred_element_type=jnp.float32)


class Head(nn.Module):
  """Transforms features as masked language models do before they score tokens.

  It applies a dense layer, an activation and a norm. It returns the features
  and the bias of the logits, of shape [V].
  """

  config: Config

  @nn.compact
  def __call__(self, x_BxAxD: jax.Array) -> Any:
    c = self.config
    x_BxAxD = Linear(c.width, c.width, True, name='dense')(x_BxAxD)
    x_BxAxD = make_norm(c, 'norm')(activation(c, x_BxAxD))
    return x_BxAxD, self.param('bias', nn.initializers.zeros, (c.vocab_size,))


class Transformer(nn.Module):
  """Computes logits, log-likelihoods or features of texts.

  ``model.apply({'params': params}, input_ids, attention_mask)`` returns float32
  logits of shape [B, S, V]. The parameters are a plain nested dict, as `load`
  returns it. Those of all layers are stacked: ``layers/...`` of shape [L, ...].
  The last k layers may have a stack of their own: ``layers/...`` [L - k, ...]
  and ``last_layers/...`` [k, ...].

  Parameters that `mezo_jax.peft` adds (LoRA, a prefix of M keys and values, a
  prompt of M soft tokens) are used if they are present.

  Attributes:
    config: The architecture and its sizes.
    remat: Whether to recompute activations in the backward pass, so that only
      the input of each layer is kept. Defaults to False.
    prefix_positions: Positions of the tokens after a prefix. 'zero', the
      default, counts from 0 as without a prefix (as in the MeZO paper); 'after'
      counts from M (as in PEFT).
  """

  config: Config
  remat: bool = False
  prefix_positions: str = 'zero'

  @nn.compact
  def __call__(self, input_ids: Any, attention_mask: Any = None, *,
               token_type_ids: Any = None, answer_at: Any = None,
               token_ids: Any = None, targets: Any = None, cache: Any = None,
               shared_prompt: bool = False, features: str = '',
               hidden_states: jax.Array | None = None) -> Any:
    """Returns logits, log-likelihoods of given tokens, or features.

    All arrays may be jax arrays, numpy arrays or lists. Their values are
    checked if they are known. Inside a jitted function they are not known.
    There, the results are NaN for a row that has a token, a token type or a
    position that the model does not have.

    Args:
      input_ids: Integers of shape [B, S]. The ids V, V + 1, ... are the tokens
        of a soft prompt.
      attention_mask: Integers or booleans of shape [B, S]: 0 at padding, which
        may be on either side, and 1 at tokens. If several texts are packed
        into a row, their tokens have the values 1, 2, ...; each text starts at
        position 0 and does not attend to the others. With a cache it has the
        shape [B, T] and describes the tokens in the cache and the new ones.
        Defaults to None, for no padding.
      token_type_ids: Integers of shape [B, S], for families that have token
        types. Defaults to None, for type 0.
      answer_at: Integers of shape [B, A]: the positions whose results are
        returned. Negative ones count from the end. Logits of shape [B, S, V]
        are then never computed. Defaults to None, for all positions.
      token_ids: Integers of shape [C]: the tokens whose logits are returned.
        Defaults to None, for the whole vocabulary.
      targets: Integers of shape [B, A or S]: the tokens whose log-likelihoods
        are returned instead of logits. Defaults to None, for logits.
      cache: Keys and values of the preceding tokens, from `make_cache` or an
        earlier call. If it has no room for the new tokens, the call raises, or
        returns NaN inside a jitted function. Defaults to None, for no cache.
      shared_prompt: Whether text 1 of each row is a prompt and texts 2, 3, ...
        are continuations of it. Each continuation attends to the prompt and to
        itself, but not to the others, and its positions follow those of the
        prompt. The prompt with any one continuation must fit the model's
        positions; all of them together need not. Defaults to False.
      features: The features to return instead of logits. 'head' selects those
        that are multiplied by the output matrix; 'body' selects the output of
        the last layer after the final norm (in masked models the head follows);
        'hidden_states' selects the output of ``layers``, which is the input of
        ``last_layers``. Defaults to '', for logits.
      hidden_states: Output of ``layers`` for these tokens, of shape [B, S, D],
        as returned with features='hidden_states'. The embedding and ``layers``
        are then skipped. Defaults to None.

    Returns:
      Float32 logits of shape [B, A or S, C or V]; with ``targets``, float32
      log-likelihoods of shape [B, A or S]; with ``features``, vectors of shape
      [B, A or S, D] in the dtype of the parameters (with 'hidden_states' always
      [B, S, D]). With a cache, a pair of that and the extended cache.

    Raises:
      TypeError: If ids are not integers.
      ValueError: If shapes do not fit, if there are more tokens than the model
        has positions or the cache has room for, if the model does not have a
        token or token type, if logits are requested of a model without a head,
        or if ``hidden_states`` or features='hidden_states' is combined with a
        cache.
    """
    c = self.config
    if features not in _FEATURES:
      raise ValueError(f'features={features!r} is unknown; choose one of '
                       f'{", ".join(_FEATURES[1:])}.')
    # `inside` collects masks of the values that could not be checked while
    # tracing. A mask has bools that broadcast to [B, S] and are False for an
    # invalid value, or it is None if all values have been checked.
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
        raise ValueError(f'{c.family} models have no token types; omit '
                         'token_type_ids.')
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
                       'positions of this model; shorten the input.')
    if cache is not None and (
        hidden_states is not None or features == 'hidden_states'):
      raise ValueError('hidden_states and features="hidden_states" cannot be '
                       'combined with a cache, which covers all layers; omit '
                       'one of them.')
    if cache is not None:
      inside.append(_has_room(cache, s))
    embed = Table(c.vocab_size, c.embed_width or c.width, name='embed')
    shared, at_BxS = _shared(
        c, b, s, attention_mask, cache, shared_prompt, shift)
    if longest > c.max_length:
      # Here shared_prompt is True. The row may be longer than the model's
      # positions, but the position of each token may not.
      fits = at_BxS < c.max_length
      if attention_mask is not None and cache is None:
        fits |= attention_mask == 0
      if not isinstance(fits, Tracer) and not fits.all():
        raise ValueError('a prompt with its continuation exceeds the '
                         f'{c.max_length} positions of this model; shorten it.')
      inside.append(fits)
    if hidden_states is not None:
      x_BxSxD = hidden_states
    else:
      x_BxSxD = self._embed(embed, input_ids, token_type_ids, at_BxS, have)
      # A traced program cannot raise. NaN in the embedding of an invalid row
      # makes its result NaN, while jax would silently read the nearest row of
      # the table.
      for mask in inside:
        if mask is not None:
          x_BxSxD = jnp.where(mask[..., None], x_BxSxD, jnp.nan)
    carry, first = (constrain_rows(x_BxSxD), cache), 0
    for name, length in _parts(c, have):
      if name == 'layers' and hidden_states is not None:
        first += length
        continue
      if name == 'last_layers' and features == 'hidden_states':
        break
      if (answer_at is not None and cache is None and length == 1
          and first + length == c.num_layers):
        # The last layer is a stack of its own, so it is evaluated only at the
        # positions that are returned.
        carry, shared = _wanted(carry, shared, answer_at)
      layers = nn.scan(
          nn.remat(Block, prevent_cse=False) if self.remat else Block,
          variable_axes={'params': 0}, split_rngs={'params': True},
          # flax accepts a tuple with one entry per argument, but its annotation
          # does not.
          in_axes=cast(Any, (nn.broadcast, 0, 0)), length=length)
      index = jnp.arange(first, first + length)
      carry, _ = layers(c, name=name)(
          carry, shared,
          jnp.array(c.local_layers)[index] if c.local_layers else None,
          None if cache is None else index)
      first += length
    x_BxSxD, cache = carry
    if features == 'hidden_states':
      return x_BxSxD
    if answer_at is not None and shared.wanted is None:
      x_BxSxD = take_tokens(x_BxSxD, answer_at)
    if c.final_norm:
      x_BxSxD = make_norm(c, 'norm')(x_BxSxD)
    if features == 'body':
      return self._with(cache, s, x_BxSxD)
    if not c.head and (c.masked_head or not features):
      raise ValueError(
          f'the files of this {c.family} are those of a base class, without '
          "the head that computes logits; use features='body', or load a "
          'model that was saved with its head.')
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
      out = log_likelihood(x_BxSxD, head(), targets, bias_V, c.logit_softcap,
                           scale=c.logit_scale)
    else:
      out = _products(x_BxSxD, head(token_ids))
      if bias_V is not None:
        out += bias_V if token_ids is None else bias_V[token_ids]
      if c.logit_scale is not None:
        out *= c.logit_scale
      out = softcap(out, c.logit_softcap)
      if tokens_inside is not None:
        out = jnp.where(tokens_inside, out, jnp.nan)
    return self._with(cache, s, out)

  def _embed(self, embed, input_ids, token_type_ids, at_BxS, have):
    """Returns the input of the first layer, [B, S, D]."""
    c = self.config
    x_BxSxD = embed(input_ids)
    if c.embed_scale:
      x_BxSxD *= jnp.asarray(c.embed_scale, x_BxSxD.dtype)
    if 'prompt' in have:
      # Soft tokens replace the scaled embeddings and are not scaled themselves,
      # as in PEFT. one_hot returns zeros for the ids of ordinary tokens.
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
    """Returns the result, and with a cache also the cache with its new length.
    """
    if cache is None:
      return out
    return out, cache._replace(length=cache.length + s)

  def _shift(self, params) -> int:
    """Returns the number by which a prefix increases the positions of tokens.
    """
    return 0 if self.prefix_positions == 'zero' else prefix_length(params)


def known_ids(name: str, ids: Any, size: int, shape: tuple[Any, ...],
              least: int = 0) -> tuple[jax.Array, jax.Array | None]:
  """Checks integers that select rows: token ids, token types, positions.

  For an index out of range, torch raises an error, but jax reads the nearest
  row. Therefore this function checks the values if they are known. If they are
  not, it returns a mask with which the caller can replace invalid results.

  Args:
    name: Name of the argument, for errors.
    ids: A jax array, a numpy array, or nested lists.
    size: Exclusive upper bound of the values.
    shape: Required length of each axis, or a tuple of permitted lengths, or
      None for any length.
    least: Inclusive lower bound of the values. Defaults to 0.

  Returns:
    ``ids, inside``: the integers as a jax array of at least 32 bits, and a
    boolean array that marks those within the bounds. ``inside`` is None if the
    values are known, as they have been checked then.

  Raises:
    TypeError: If the values are not integers.
    ValueError: If the shape differs, or a known value is out of bounds.
  """
  known = is_known(ids)
  if not isinstance(ids, jax.Array):
    ids = np.asarray(ids)
  if not jnp.issubdtype(ids.dtype, jnp.integer):
    raise TypeError(f'{name} must be integers, not {ids.dtype}.')
  fits = lambda m, n: m in n if isinstance(n, tuple) else n in (None, m)
  if len(ids.shape) != len(shape) or not all(map(fits, ids.shape, shape)):
    hint = '; for a single text add a batch axis with [None]' if (
        len(ids.shape) == 1 and len(shape) == 2) else ''
    want = ', '.join('any' if n is None else str(n) for n in shape)
    raise ValueError(
        f'{name} has the shape {tuple(ids.shape)}, not ({want}){hint}.')
  if known:
    values = np.asarray(ids)
    wrong = values[(values < least) | (values >= size)]
    if wrong.size:
      raise ValueError(
          f'{name} has {wrong[0]}; this model accepts {least} to {size - 1}.')
  ids = jnp.asarray(ids)
  if ids.dtype.itemsize < 4 or jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
    ids = ids.astype(jnp.int32)
  return ids, None if known else (ids >= least) & (ids < size)


def known_mask(mask: Any, rows: int, length: int) -> jax.Array:
  """Checks an attention mask and returns it as int32 of shape [B or 1, T].

  Args:
    mask: A jax array, a numpy array, or nested lists. It is 0 at padding. At a
      token it is 1, or the number of the token's text if the row has several.
    rows: Number B of rows in the batch.
    length: Number T of tokens per row.

  Raises:
    ValueError: If the shape differs, or if a known value is not one of 0, 1, 2,
      ... This is the case for a mask that is meant to be added to scores.
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
      raise ValueError('attention_mask has a value that is negative or not '
                       'whole; it must be 0 at padding and 1 at tokens.')
  return jnp.asarray(mask).astype(jnp.int32)


def is_known(x: Any) -> bool:
  """Returns whether the values of an array can be read by this process.

  The values of tracers cannot be read, nor those of arrays that are partly on
  the devices of other processes.
  """
  return not isinstance(x, Tracer) and (
      not isinstance(x, jax.Array) or x.is_fully_addressable)


def _has_room(cache: Cache, tokens: int) -> jax.Array | None:
  """Checks that a cache has room for more tokens.

  Returns:
    None if the cache is known to have room. While tracing, a boolean of shape
    [1, 1] that tells whether it has.

  Raises:
    ValueError: If the cache is known to have too little room.
  """
  most = cache.k.shape[2]
  if isinstance(cache.length, Tracer):
    return (cache.length + tokens <= most)[None, None]
  if int(cache.length) + tokens > most:
    raise ValueError(f'the cache has {int(cache.length)} tokens and room for '
                     f'{most}; {tokens} more do not fit. Give make_cache a '
                     'larger length.')
  return None


def apply(model: Transformer, params: dict[str, Any], *args: Any, **kwargs: Any
          ) -> Any:
  """Applies a model to parameters that may contain quantised weights.

  Args:
    model: The model.
    params: Its parameters, as `load` returns them.
    *args: Arguments of the model, such as ``input_ids``.
    **kwargs: Keyword arguments of the model, such as ``answer_at``.

  Returns:
    The result of ``model.apply({'params': params}, *args, **kwargs)``.
  """
  return dequantized(lambda params: model.apply(
      {'params': params}, *args, **kwargs))(params)


def prefix_length(params: Mapping[str, Any]) -> int:
  """Returns the number M of prefix keys in the parameters, 0 without a prefix.
  """
  attn = params.get('layers', {}).get('attn', {})
  return attn['prefix_k'].shape[1] if 'prefix_k' in attn else 0


def _parts(c: Config, params: Mapping[str, Any]) -> list[tuple[str, int]]:
  """Returns the stacks of layers in order, as pairs (name, number of layers).
  """
  last = jax.tree.leaves(params.get('last_layers', {}))
  k = len(last[0]) if last else 0
  return [(name, n) for name, n in (
      ('layers', c.num_layers - k), ('last_layers', k)) if n]


def _shared(c: Config, b: int, s: int, attention_mask, cache, shared_prompt,
            shift):
  """Returns the inputs that all layers share, and the tokens' positions.

  Returns:
    ``shared, positions``: a `Shared`, and integers of shape [B or 1, S].
  """
  start, t = (0, s) if cache is None else (cache.length, cache.k.shape[2])
  query_Sx1 = start + jnp.arange(s)[:, None]
  key_T = jnp.arange(t)
  before_1xSxT = (key_T <= query_Sx1)[None]
  if attention_mask is None:
    same_BxSxT, at_BxS = jnp.ones((1, s, t), bool), query_Sx1.T
  else:
    # Padding counts as a text of its own, so that padding tokens attend to each
    # other. Otherwise they would have no keys at all.
    text_BxT = attention_mask
    text_BxS = jax.lax.dynamic_slice_in_dim(text_BxT, start, s, 1)
    same_BxSxT = text_BxS[:, :, None] == text_BxT[:, None]
    if shared_prompt:
      same_BxSxT |= (text_BxS[:, :, None] > 1) & (text_BxT[:, None] == 1)
    # A token's position is the number of earlier tokens of its text. This holds
    # for padding on either side, packed texts and shared prompts.
    at_BxS = jnp.sum(same_BxSxT & before_1xSxT, -1) - 1
  at_BxS = at_BxS + shift
  mask_BxSxT = same_BxSxT & before_1xSxT if c.causal else same_BxSxT
  # A window limits the distance between two tokens of a text. That is also
  # their distance within the row, unless other continuations are stored between
  # a continuation and its prompt.
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
  """Reduces the inputs of a layer to the tokens whose output is needed.

  All tokens remain available as the context for keys and values.
  """
  x_BxSxD, cache = carry
  masks = [m if m is None else jnp.take_along_axis(
      m, at_BxA[:, None, :, None], 2) for m in (shared.mask, shared.local_mask)]
  return (take_tokens(x_BxSxD, at_BxA), cache), shared._replace(
      mask=masks[0], local_mask=masks[1], context=x_BxSxD, wanted=at_BxA)


def make_cache(config: Config, rows: int, length: int,
               dtype: jax.typing.DTypeLike) -> Cache:
  """Returns an empty cache.

  Args:
    config: Config of the model.
    rows: Number B of texts in the batch.
    length: Number T of tokens per text, prompt and continuation together.
    dtype: Dtype of the keys and values, usually that of the parameters.

  Returns:
    A `Cache` with zeros of shape [L, B, T, K, H] as k and v, and length 0.
  """
  shape = (config.num_layers, rows, length, config.num_kv_heads,
           config.head_width)
  return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype),
               jnp.zeros((), jnp.int32))
