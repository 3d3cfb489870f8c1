"""Decoding: greedy or sampled, in one jitted loop over a key-value cache."""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp

from mezo_jax.models.transformer import apply, make_cache, Transformer


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
    logits = _keep(logits / temperature, top_k, top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32), finite, cache

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


def generate(model: Transformer, params, input_ids, attention_mask=None, *,
             max_new_tokens: int, stop_ids: Sequence[int] = (),
             pad_id: int = 0, temperature: float = 0.0, top_k: int = 0,
             top_p: float = 1.0, key: jax.Array | None = None,
             check: bool = False) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Continues prompts, one token of each a step, until all have stopped.

  The prompts pass through the model once; then a `lax.while_loop` feeds back
  one token a row and a step over a cache of keys and values. All of it is one
  program, compiled once for each shape of ``input_ids`` and each choice of
  ``max_new_tokens``, ``stop_ids``, ``pad_id`` and ``top_k``; it may stand
  inside another jit and under `mezo_jax.perturbed`.

  Args:
    model: a causal `Transformer`.
    params: its parameters.
    input_ids: integers [B, S], padded on the left.
    attention_mask: [B, S], 0 at padding and 1 at tokens; None for no padding.
    max_new_tokens: tokens to add at most.
    stop_ids: tokens that end a row; they are part of its result.
    pad_id: what follows in a row that has ended.
    temperature: 0 takes the likeliest token; else tokens are drawn from
      softmax(logits / temperature).
    top_k: draw from the k likeliest; 0 for all.
    top_p: draw from the fewest likeliest that have this probability together.
    key: of the draws; needed if temperature > 0.
    check: whether to say also for which rows the model's logits were finite:
      of NaNs the likeliest token is one like any other.

  Returns:
    int32 [B, max_new_tokens]; with ``check`` also bool [B].

  Raises:
    ValueError: for a model that is not causal, a batch with padding on the
      right, more tokens than the model has positions, draws without a key, or a
      temperature, top_k or top_p out of range.
  """
  c = model.config
  if not c.causal:
    raise ValueError(f'{c.family} is a masked model: it cannot generate text.')
  b, s = input_ids.shape
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens is {max_new_tokens}; give 1 or more.')
  if s + max_new_tokens > c.max_length:
    raise ValueError(
        f'{s} tokens of prompt and {max_new_tokens} new ones exceed the '
        f'{c.max_length} positions of this model.')
  if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
    raise ValueError(f'temperature {temperature}, top_k {top_k} and top_p '
                     f'{top_p} must be >= 0, >= 0 and in (0, 1].')
  if temperature and key is None:
    raise ValueError('temperature > 0 draws tokens: give a key.')
  if attention_mask is None:
    attention_mask = jnp.ones((b, s), jnp.int32)
  elif not isinstance(attention_mask, jax.core.Tracer) and not (
      jnp.asarray(attention_mask)[:, -1].all()):
    raise ValueError('a prompt ends in padding; pad prompts on the left.')
  out = _generate(
      model, params, jnp.asarray(input_ids, jnp.int32),
      jnp.asarray(attention_mask, jnp.int32),
      jax.random.key(0) if key is None else key, temperature,
      top_p if top_p < 1 else None, max_new_tokens=max_new_tokens,
      stop_ids=tuple(map(int, stop_ids)), pad_id=int(pad_id),
      sample=bool(temperature), top_k=top_k)
  return out if check else out[0]
