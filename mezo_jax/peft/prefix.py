"""Creates the adapters of prefix tuning and of prompt tuning.

Both train a context that precedes every text.

A prefix is M keys and M values per layer (Li and Liang, 2021). The parameters
are ``layers/attn/prefix_k`` and ``prefix_v`` [L, M, K, H], with L layers, K
key-value heads and H elements per head. They are trained directly, without the
network that generates them in the paper.

A prompt is M soft tokens (Lester et al., 2021), which extend the embedding of V
tokens: the parameter ``prompt/embedding`` [M, D] holds the vectors of the token
ids V to V + M - 1. `prepend` puts these ids before the texts of a batch.

References:
  Li and Liang (2021), Prefix-Tuning: Optimizing Continuous Prompts for
    Generation.
  Lester et al. (2021), The Power of Scale for Parameter-Efficient Prompt
    Tuning.
"""

from collections.abc import Sequence
from typing import Any, get_args, Literal

import jax
import jax.numpy as jnp

from mezo_jax.core.errors import InputError
from mezo_jax.models.transformer import (
  apply,
  known_ids,
  make_cache,
  Transformer,
)

Init = Literal['tokens', 'normal', 'text']
INITS = get_args(Init)


def init(model: Transformer, params: dict[str, Any], key: jax.Array, *,
         num_tokens: int = 5, init: Init = 'tokens',
         token_ids: Sequence[int] = ()) -> dict[str, Any]:
  """Creates a prefix, by default from the keys and values of real tokens.

  Args:
    model: Model from `mezo_jax.models.load`.
    params: Parameters of the model.
    key: PRNG key.
    num_tokens: Length M of the prefix. Defaults to 5, as in Malladi et al.
      (2023).
    init: Initial keys and values. 'tokens' computes them from M random tokens
      of the vocabulary, read as one text (Malladi et al., 2023). 'text'
      computes them from ``token_ids``. 'normal' draws them from N(0, 1).
      Defaults to 'tokens'.
    token_ids: Token ids for 'text', which are repeated or cut to M.

  Returns:
    A nested dict ``layers/attn/prefix_k`` and ``prefix_v``, float32
    [L, M, K, H]. `mezo_jax.peft.join` adds it to the parameters.

  Raises:
    InputError: If ``init`` is unknown, ``num_tokens`` is below 1, or ``init``
      is 'text' and there are no ``token_ids``.
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
                num_tokens: int = 10, init: Init = 'tokens',
                token_ids: Sequence[int] = ()) -> dict[str, Any]:
  """Creates a soft prompt, by default from the embeddings of real tokens.

  Args:
    model: Model from `mezo_jax.models.load`.
    params: Parameters of the model.
    key: PRNG key.
    num_tokens: Length M of the prompt. Defaults to 10.
    init: Initial vectors. 'tokens' copies the embeddings of M random tokens of
      the vocabulary, 'text' those of ``token_ids``. 'normal' draws them from
      N(0, 1). Defaults to 'tokens'.
    token_ids: Token ids for 'text', which are repeated or cut to M.

  Returns:
    A nested dict ``prompt/embedding``, float32 [M, D].

  Raises:
    InputError: As for `init`.
  """
  ids = _ids(model, key, num_tokens, init, token_ids)
  table = params['embed']['embedding']
  if ids is None:
    rows = jax.random.normal(key, (num_tokens, table.shape[1]))
  else:
    # The model scales the embeddings of its tokens but not those of a prompt.
    rows = table[ids].astype(jnp.float32) * (model.config.embed_scale or 1)
  return {'prompt': {'embedding': rows}}


def _ids(model, key, num_tokens, init, token_ids) -> jax.Array | None:
  """Checks the arguments of `init` and returns the tokens to start from.

  Returns:
    Token ids, int32 [M], or None for random vectors.
  """
  if num_tokens < 1:
    raise InputError(f'num_tokens must be at least 1, got {num_tokens}.')
  if init not in INITS:
    raise InputError(
        f'unknown init {init!r}; choose one of {", ".join(INITS)}.')
  if init == 'text':
    if not len(token_ids):
      raise InputError("init 'text' needs a text of at least one token; give "
                       'token_ids, or peft.text in a config.')
    ids, _ = known_ids(
        'token_ids', token_ids, model.config.vocab_size, (None,))
    return jnp.resize(jnp.asarray(ids), num_tokens)
  if init == 'tokens':
    return jax.random.randint(
        key, (num_tokens,), 0, model.config.vocab_size, jnp.int32)
  return None


def soft_ids(vocab_size: int, params: dict[str, Any]) -> list[int]:
  """Returns the token ids of the soft prompt in some parameters.

  Args:
    vocab_size: Number V of tokens of the model.
    params: Parameters of the model.

  Returns:
    The ids V to V + M - 1, or [] if the parameters have no soft prompt.
  """
  rows = len(params['prompt']['embedding']) if 'prompt' in params else 0
  return list(range(vocab_size, vocab_size + rows))


def prepend(ids: Sequence[int], input_ids: Any, attention_mask: Any = None
            ) -> tuple[jax.Array, jax.Array]:
  """Puts the tokens of a soft prompt before the texts of a batch.

  The model counts positions over tokens and skips padding, so padding between
  the prompt and a text is harmless.

  Args:
    ids: Token ids of the prompt, from `soft_ids`.
    input_ids: Integers [B, S], padded on either side.
    attention_mask: Integers [B, S], 0 at padding and 1 at tokens. Defaults to
      None, which means no padding.

  Returns:
    A pair ``(input_ids, attention_mask)`` of int32 [B, M + S].
  """
  input_ids = jnp.asarray(input_ids, jnp.int32)
  mask = (jnp.ones_like(input_ids) if attention_mask is None
          else jnp.asarray(attention_mask, jnp.int32))
  soft = jnp.broadcast_to(
      jnp.asarray(ids, jnp.int32), (len(input_ids), len(ids)))
  return (jnp.concatenate([soft, input_ids], 1),
          jnp.concatenate([jnp.ones_like(soft), mask], 1))
