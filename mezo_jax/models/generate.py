"""Generates text, greedily or by sampling, in one jitted program."""

from collections.abc import Sequence
import functools
import operator
from typing import Any, Literal, overload

import jax
from jax.core import Tracer
import jax.numpy as jnp
import numpy as np

from mezo_jax.models.transformer import (
  apply,
  is_known,
  known_ids,
  known_mask,
  make_cache,
  Transformer,
)


@functools.partial(jax.jit, static_argnames=(
    'model', 'max_new_tokens', 'stop_ids', 'pad_id', 'sample', 'top_k'))
def _generate(model, params, input_ids, mask, key, temperature, top_p, *,
              max_new_tokens, stop_ids, pad_id, sample, top_k):
  """Generates tokens; the arguments are those of `generate`, checked.

  ``mask`` is an int32 array [B, S], and ``top_p`` is None where it has no
  effect.

  Returns:
    ``out, finite``: int32 tokens [B, max_new_tokens], and booleans [B].
  """
  b, s = input_ids.shape
  total = s + max_new_tokens
  dtype = params['embed']['embedding'].dtype
  mask_BxT = jnp.concatenate(
      [mask, jnp.ones((b, max_new_tokens), mask.dtype)], 1)
  # No token has the id -1, so without stop ids no row stops early.
  stops = jnp.array(stop_ids or (-1,), jnp.int32)

  def step(ids, cache, key):
    """Returns the tokens that follow ``ids`` [B, S].

    Returns:
      ``tokens, finite, cache``: int32 tokens [B], whether their logits were
      finite [B], and the cache with ``ids`` added.
    """
    last = jnp.full((b, 1), ids.shape[1] - 1)
    logits, cache = apply(
        model, params, ids, mask_BxT, answer_at=last, cache=cache)
    logits = logits[:, 0]
    finite = jnp.isfinite(jnp.max(logits, -1))
    if not sample:
      return jnp.argmax(logits, -1).astype(jnp.int32), finite, cache
    # A traced temperature may be 0, which selects the likeliest token. Dividing
    # by 1 instead keeps the branch that is not selected free of NaN.
    warm = temperature > 0
    kept = _keep(logits / jnp.where(warm, temperature, 1.0), top_k, top_p)
    tokens = jnp.where(warm, jax.random.categorical(key, kept),
                       jnp.argmax(logits, -1))
    return tokens.astype(jnp.int32), finite, cache

  def write(out, done, tokens, i):
    """Writes column i of the output: padding in rows that have stopped."""
    tokens = jnp.where(done, pad_id, tokens)
    out = jax.lax.dynamic_update_index_in_dim(out, tokens, i, 1)
    return out, done | jnp.isin(tokens, stops), tokens

  cache = make_cache(model.config, b, total, dtype)
  tokens, finite, cache = step(input_ids, cache, jax.random.fold_in(key, 0))
  out, done, tokens = write(
      jnp.full((b, max_new_tokens), pad_id, jnp.int32),
      jnp.zeros(b, bool), tokens, 0)

  def more(carry):
    i, _, _, done, *_ = carry
    return (i < max_new_tokens) & ~_all(done)

  def one(carry):
    i, out, finite, done, tokens, cache = carry
    tokens, fine, cache = step(
        tokens[:, None], cache, jax.random.fold_in(key, i))
    # Rows that have stopped continue with padding, whose logits do not count.
    finite &= done | fine
    out, done, tokens = write(out, done, tokens, i)
    return i + 1, out, finite, done, tokens, cache

  return jax.lax.while_loop(
      more, one, (1, out, finite, done, tokens, cache))[1:3]


@jax.custom_batching.custom_vmap
def _all(done: jax.Array) -> jax.Array:
  """Returns whether all rows have stopped, also those of other members.

  `jax.vmap` over members of a population would otherwise give each of them a
  condition of its own, and the loop would then select between the old and the
  new cache of every member in each iteration.
  """
  return jnp.all(done)


@_all.def_vmap
def _all_of_members(axis_size, in_batched, done):
  """Returns one condition for all members."""
  del axis_size, in_batched
  return _all(done), False


def _keep(logits, top_k: int, top_p: jax.Array | None):
  """Returns logits with -inf for tokens outside of top-k and top-p."""
  if top_k:
    least = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is None:
    return logits
  ordered = jnp.sort(logits, -1)[:, ::-1]
  # A token is kept if the probabilities of all likelier tokens sum to less than
  # top_p. So the likeliest token is always kept.
  before = jnp.cumsum(jax.nn.softmax(ordered), -1) - jax.nn.softmax(ordered)
  least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1,
                  keepdims=True)
  return jnp.where(logits < least, -jnp.inf, logits)


@overload
def generate(model: Transformer, params: Any, input_ids: Any,
             attention_mask: Any = None, *,
             max_new_tokens: int, stop_ids: int | Sequence[int] = (),
             pad_id: int = 0, temperature: float | jax.Array = 0.0,
             top_k: int = 0, top_p: float | jax.Array = 1.0,
             key: jax.Array | int | None = None, check: Literal[False] = False
             ) -> jax.Array:
  ...


@overload
def generate(model: Transformer, params: Any, input_ids: Any,
             attention_mask: Any = None, *,
             max_new_tokens: int, stop_ids: int | Sequence[int] = (),
             pad_id: int = 0, temperature: float | jax.Array = 0.0,
             top_k: int = 0, top_p: float | jax.Array = 1.0,
             key: jax.Array | int | None = None, check: Literal[True]
             ) -> tuple[jax.Array, jax.Array]:
  ...


def generate(model: Transformer, params: Any, input_ids: Any,
             attention_mask: Any = None, *, max_new_tokens: int,
             stop_ids: int | Sequence[int] = (), pad_id: int = 0,
             temperature: float | jax.Array = 0.0, top_k: int = 0,
             top_p: float | jax.Array = 1.0, key: jax.Array | int | None = None,
             check: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Generates continuations of prompts.

  One forward pass processes the prompts. Then a `lax.while_loop` over a cache
  of keys and values adds one token per row and step, until all rows have
  stopped. All of it is one program. It is compiled once for each shape of
  ``input_ids`` and each choice of ``max_new_tokens``, ``stop_ids``, ``pad_id``
  and ``top_k``. `generate` may be called inside another jitted function and
  under `mezo_jax.perturbed`.

  Args:
    model: A causal `Transformer`.
    params: Parameters of the model, as `load` returns them.
    input_ids: Token ids of the prompts, integers of shape [B, S], padded on the
      left. This and all other arrays may be jax arrays, numpy arrays or lists.
    attention_mask: Integers of shape [B, S], 0 at padding and 1 at tokens.
      Defaults to None, for no padding.
    max_new_tokens: Number of tokens to add to each prompt at most.
    stop_ids: The token or tokens that end a row. The result includes them.
      Defaults to (), for none.
    pad_id: The token that fills a row after its end. Defaults to 0.
    temperature: Tokens are sampled from softmax(logits / temperature). Defaults
      to 0, which selects the likeliest token instead.
    top_k: Number of likeliest tokens to sample from. Defaults to 0, for all.
    top_p: Samples from the smallest set of likeliest tokens whose probabilities
      sum to at least top_p. Defaults to 1, for all.
    key: A PRNG key or an integer seed. Required if the temperature is above 0.
    check: Whether to return, in addition to the tokens, a bool for each row
      that is True if all its logits were finite. Without it, NaN logits are not
      noticed, because their argmax is an ordinary token. Defaults to False.

  Returns:
    The new tokens, int32 of shape [B, max_new_tokens]. With ``check``, a pair
    of these and booleans of shape [B].

  Raises:
    TypeError: If ids are not integers, or if ``max_new_tokens``, ``top_k``,
      ``pad_id`` or ``stop_ids`` are not known when the program is traced.
    ValueError: If the model is not causal, a prompt is empty or padded on the
      right, a token is not in the vocabulary, the tokens exceed the model's
      positions, sampling has no key, or a temperature, top_k or top_p is out of
      range. Traced values cannot be checked; a token outside of the vocabulary
      then results in NaN logits, which ``check`` reports.
  """
  c = model.config
  if not c.causal:
    raise ValueError(f'model: {c.family} is a masked model and cannot generate '
                     'text; use a causal model.')
  if 'embed' not in params:
    raise ValueError("params has no 'embed'; pass the parameters that "
                     'models.load returns, not {"params": ...}.')
  soft = params['prompt']['embedding'].shape[0] if 'prompt' in params else 0
  # The mask of valid ids is not needed: the model checks ids again and returns
  # NaN for invalid ones.
  input_ids, _ = known_ids(
      'input_ids', input_ids, c.vocab_size + soft, (None, None))
  b, s = input_ids.shape
  max_new_tokens = _number('max_new_tokens', max_new_tokens)
  top_k = _number('top_k', top_k)
  pad_id = _number('pad_id', pad_id)
  stops = stop_ids if isinstance(stop_ids, Sequence) else np.ravel(stop_ids)
  stop_ids = tuple(_number('stop_ids', x) for x in stops)
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens is {max_new_tokens}; give 1 or more.')
  if not s:
    raise ValueError('input_ids: the prompts are empty; pass at least one '
                     'token per prompt.')
  if s + max_new_tokens > c.max_length:
    raise ValueError(
        f'{s} prompt tokens and max_new_tokens={max_new_tokens} exceed the '
        f'{c.max_length} positions of this model; shorten one of them.')
  if np.ndim(temperature) or np.ndim(top_p):
    raise ValueError('temperature and top_p must be scalars; they apply to all '
                     'rows.')
  # Arguments of an enclosing jitted function are tracers, without known values.
  given = lambda x: isinstance(x, Tracer)
  if (not given(temperature) and not 0 <= temperature < float('inf')
      or not given(top_p) and not 0 < top_p <= 1 or top_k < 0):
    raise ValueError(f'got temperature={temperature}, top_k={top_k} and top_p='
                     f'{top_p}; temperature must be finite and at least 0, '
                     'top_k at least 0, and top_p above 0 and at most 1.')
  sample = given(temperature) or bool(temperature > 0)
  if sample and key is None:
    raise ValueError('temperature > 0 samples tokens; pass a key or a seed.')
  if attention_mask is None:
    attention_mask = jnp.ones((b, s), jnp.int32)
  else:
    if is_known(attention_mask):
      mask = np.asarray(attention_mask)
      if mask.ndim == 2 and not (mask <= 1).all():
        raise ValueError('attention_mask must be 0 at padding and 1 at tokens; '
                         'generate takes one prompt per row.')
      if mask.ndim == 2 and not mask[:, -1].all():
        raise ValueError('attention_mask: a prompt ends in padding; pad '
                         'prompts on the left.')
    attention_mask = jnp.broadcast_to(known_mask(attention_mask, b, s), (b, s))
  if key is None or isinstance(key, int | np.integer):
    key = jax.random.key(key or 0)
  out = _generate(
      model, params, input_ids, attention_mask, key, temperature,
      top_p if given(top_p) or top_p < 1 else None,
      max_new_tokens=max_new_tokens, stop_ids=stop_ids, pad_id=pad_id,
      sample=sample, top_k=0 if top_k >= c.vocab_size else top_k)
  return out if check else out[0]


def _number(name: str, value) -> int:
  """Returns an argument as an int that is known while tracing.

  Raises:
    TypeError: If it is not a whole number, or is a tracer.
  """
  try:
    return operator.index(value)
  except TypeError as e:
    raise TypeError(f'{name} must be a whole number, not {value!r}. Inside jit '
                    'it must be a static argument.') from e
