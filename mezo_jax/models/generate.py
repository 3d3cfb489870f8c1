"""Decoding: greedy or sampled, in one jitted loop over a key-value cache."""

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
  b, s = input_ids.shape
  total = s + max_new_tokens
  dtype = params['embed']['embedding'].dtype
  mask_BxT = jnp.concatenate(
      [mask, jnp.ones((b, max_new_tokens), mask.dtype)], 1)
  stops = jnp.array(stop_ids or (-1,), jnp.int32)

  def step(ids, cache, key):
    """(next tokens [B], whether they mean anything [B], cache) after the tokens
    ids [B, S]."""
    last = jnp.full((b, 1), ids.shape[1] - 1)
    logits, cache = apply(
        model, params, ids, mask_BxT, answer_at=last, cache=cache)
    logits = logits[:, 0]
    finite = jnp.isfinite(jnp.max(logits, -1))
    if not sample:
      return jnp.argmax(logits, -1).astype(jnp.int32), finite, cache
    # A temperature that the program is given may be 0.
    warm = temperature > 0
    kept = _keep(logits / jnp.where(warm, temperature, 1.0), top_k, top_p)
    tokens = jnp.where(warm, jax.random.categorical(key, kept),
                       jnp.argmax(logits, -1))
    return tokens.astype(jnp.int32), finite, cache

  def write(out, done, tokens, i):
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
    return (i < max_new_tokens) & ~jnp.all(done)

  def one(carry):
    i, out, finite, done, tokens, cache = carry
    tokens, fine, cache = step(
        tokens[:, None], cache, jax.random.fold_in(key, i))
    finite &= done | fine
    out, done, tokens = write(out, done, tokens, i)
    return i + 1, out, finite, done, tokens, cache

  return jax.lax.while_loop(
      more, one, (1, out, finite, done, tokens, cache))[1:3]


def _keep(logits, top_k: int, top_p: jax.Array | None):
  """Logits with all but the likeliest tokens at -inf."""
  if top_k:
    least = jax.lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < least, -jnp.inf, logits)
  if top_p is None:
    return logits
  ordered = jnp.sort(logits, -1)[:, ::-1]
  # The likeliest stays, and each whose likelier ones sum to less than top_p.
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
  """Continues prompts, one token of each a step, until all have stopped.

  The prompts pass through the model once; then a `lax.while_loop` feeds back
  one token a row and a step over a cache of keys and values. All of it is one
  program, compiled once for each shape of ``input_ids`` and each choice of
  ``max_new_tokens``, ``stop_ids``, ``pad_id`` and ``top_k``. It may be called
  inside another jit and under `mezo_jax.perturbed`.

  Args:
    model: a causal `Transformer`.
    params: its parameters.
    input_ids: integers [B, S], padded on the left. Arrays of jax or numpy, or
      lists, as all arguments.
    attention_mask: [B, S], 0 at padding and 1 at tokens; None for no padding.
    max_new_tokens: tokens to add at most.
    stop_ids: the token, or tokens, that end a row; they are part of its result.
    pad_id: the token that follows in a row that has ended.
    temperature: 0 takes the likeliest token; else tokens are drawn from
      softmax(logits / temperature).
    top_k: draw from the k likeliest; 0 for all.
    top_p: draw from the fewest likeliest that have this probability together.
    key: a PRNG key or a seed for the draws; needed if temperature > 0.
    check: whether to return also for which rows the model's logits were finite.
      The likeliest token of NaNs is one like any other.

  Returns:
    int32 [B, max_new_tokens]; with ``check`` also bool [B].

  Raises:
    TypeError: for ids that are not integers, or numbers of tokens that are not
      known, as the arguments of a jitted function are.
    ValueError: for a model that is not causal, prompts with padding on the
      right, an empty prompt, tokens that the model does not have, more tokens
      than it has positions, draws without a key, or a temperature, top_k or
      top_p out of range. Values that are not known yet, inside a jitted
      function, are not checked: tokens that the model does not have then give
      logits of NaN, which ``check`` reports.
  """
  c = model.config
  if not c.causal:
    raise ValueError(f'{c.family} is a masked model: it cannot generate text.')
  if 'embed' not in params:
    raise ValueError('params has no embed: give what models.load returned, or '
                     "what is under 'params'.")
  soft = params['prompt']['embedding'].shape[0] if 'prompt' in params else 0
  # Where values are not known, the model gives NaN.
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
    raise ValueError('the prompts are empty; give each one token or more.')
  if s + max_new_tokens > c.max_length:
    raise ValueError(
        f'{s} tokens of prompt and {max_new_tokens} new ones exceed the '
        f'{c.max_length} positions of this model.')
  if np.ndim(temperature) or np.ndim(top_p):
    raise ValueError('temperature and top_p are one number each, for all rows.')
  given = lambda x: isinstance(x, Tracer)  # to a program around this
  if (not given(temperature) and not 0 <= temperature < float('inf')
      or not given(top_p) and not 0 < top_p <= 1 or top_k < 0):
    raise ValueError(f'temperature {temperature}, top_k {top_k} and top_p '
                     f'{top_p} must be >= 0, >= 0 and in (0, 1].')
  sample = given(temperature) or bool(temperature > 0)
  if sample and key is None:
    raise ValueError('temperature > 0 draws tokens: give a key.')
  if attention_mask is None:
    attention_mask = jnp.ones((b, s), jnp.int32)
  else:
    if is_known(attention_mask):
      mask = np.asarray(attention_mask)
      if mask.ndim == 2 and not (mask <= 1).all():
        raise ValueError('attention_mask must be 0 at padding and 1 at tokens.')
      if mask.ndim == 2 and not mask[:, -1].all():
        raise ValueError('a prompt ends in padding; pad prompts on the left.')
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
  """Returns a whole number that must be known when a program is traced."""
  try:
    return operator.index(value)
  except TypeError as e:
    raise TypeError(f'{name} must be a whole number that is known when the '
                    f'program is traced, not {value!r}.') from e
