"""Prefix tuning and prompt tuning: trained context before every text.

A prefix is M keys and values for each layer (Li and Liang, 2021), trained as
they are, without a network that makes them: ``layers/attn/prefix_k`` and
``prefix_v`` [L, M, K, H]. A prompt is M soft tokens, rows that the embedding
lacks (Lester et al., 2021): ``prompt/embedding`` [M, D], used at the token ids
V to V + M - 1, which `prepend` puts before a text.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax.core.errors import InputError
from mezo_jax.models.transformer import (
  apply,
  known_ids,
  make_cache,
  Transformer,
)

INITS = ('tokens', 'normal', 'text')


def init(model: Transformer, params: dict[str, Any], key: jax.Array, *,
         num_tokens: int = 5, init: str = 'tokens',
         token_ids: Sequence[int] = ()) -> dict[str, Any]:
  """A prefix, float32, that starts as the context of real tokens.

  Args:
    model: from `mezo_jax.models.load`.
    params: its parameters.
    key: of what is random.
    num_tokens: M; the paper's is 5.
    init: 'tokens', what the layers make of M random tokens of the vocabulary
      read as one text (Malladi et al., 2023); 'text', of the
      given tokens; 'normal', N(0, 1).
    token_ids: of 'text', repeated or cut to M.

  Raises:
    ValueError: for another ``init``, no tokens, or M below 1.
  """
  ids = _ids(model, key, num_tokens, init, token_ids)
  c = model.config
  if ids is None:
    shape = (c.num_layers, num_tokens, c.num_kv_heads, c.head_width)
    k, v = jax.random.normal(key, (2, *shape))
  else:
    dtype = params['embed']['embedding'].dtype
    read = jax.jit(lambda params: apply(
        model, params, ids[None], features='body',
        cache=make_cache(c, 1, num_tokens, dtype))[1])
    cache = read(params)
    k, v = (x[:, 0].astype(jnp.float32) for x in (cache.k, cache.v))
  return {'layers': {'attn': {'prefix_k': k, 'prefix_v': v}}}


def init_prompt(model: Transformer, params: dict[str, Any], key: jax.Array, *,
                num_tokens: int = 10, init: str = 'tokens',
                token_ids: Sequence[int] = ()) -> dict[str, Any]:
  """A soft prompt, float32; arguments as for `init`."""
  ids = _ids(model, key, num_tokens, init, token_ids)
  table = params['embed']['embedding']
  if ids is None:
    rows = jax.random.normal(key, (num_tokens, table.shape[1]))
  else:
    rows = table[ids].astype(jnp.float32) * (model.config.embed_scale or 1)
  return {'prompt': {'embedding': rows}}


def _ids(model, key, num_tokens, init, token_ids) -> jax.Array | None:
  """int32 [M], the tokens to start from."""
  if num_tokens < 1:
    raise InputError(f'num_tokens must be at least 1, got {num_tokens}.')
  if init not in INITS:
    raise InputError(f'init {init!r} is none of {", ".join(INITS)}.')
  if init == 'text':
    if not len(token_ids):
      raise InputError("init 'text' needs a text of at least one token.")
    ids, _ = known_ids(
        'token_ids', token_ids, model.config.vocab_size, (None,))
    return jnp.resize(jnp.asarray(ids), num_tokens)
  if init == 'tokens':
    return jax.random.randint(
        key, (num_tokens,), 0, model.config.vocab_size, jnp.int32)
  return None


def soft_ids(vocab_size: int, params: dict[str, Any]) -> list[int]:
  """The token ids of the soft prompt in ``params``; none without one."""
  rows = len(params['prompt']['embedding']) if 'prompt' in params else 0
  return list(range(vocab_size, vocab_size + rows))


def prepend(ids: Sequence[int], input_ids: Any, attention_mask: Any = None
            ) -> tuple[jax.Array, jax.Array]:
  """Puts the soft tokens ``ids`` before the texts of a batch.

  Args:
    ids: from `soft_ids`.
    input_ids: integers [B, S], padded on either side.
    attention_mask: [B, S]; None for no padding.

  Returns:
    ``input_ids, attention_mask``, int32 [B, M + S]. Positions count tokens, so
    padding between the soft tokens and a text does not matter.
  """
  input_ids = jnp.asarray(input_ids, jnp.int32)
  mask = (jnp.ones_like(input_ids) if attention_mask is None
          else jnp.asarray(attention_mask, jnp.int32))
  soft = jnp.broadcast_to(
      jnp.asarray(ids, jnp.int32), (len(input_ids), len(ids)))
  return (jnp.concatenate([soft, input_ids], 1),
          jnp.concatenate([jnp.ones_like(soft), mask], 1))
