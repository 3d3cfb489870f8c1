"""Fingerprints of weights, rows, models and files, the same on any mesh."""

from collections.abc import Iterable
import dataclasses
import hashlib
import json
from pathlib import Path
import re
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax.core import sharding


def of_weights(params: Any, but: str | None = None) -> str:
  """Returns 32 hex digits of a tree's paths, shapes, dtypes and elements.

  It takes one pass over the weights, without a copy. It detects accidental
  differences, not deliberate collisions.

  Args:
    params: The tree.
    but: A regular expression of paths that do not count.
  """
  leaves = [(path, x) for path, x in jax.tree.leaves_with_path(params)
            if but is None or not re.search(but, jax.tree_util.keystr(
                path, simple=True, separator='/'))]
  sums = jax.device_get(_checksums([x for _, x in leaves]))
  return _digest((jax.tree_util.keystr(path), x.shape, str(x.dtype), int(total))
                 for (path, x), total in zip(leaves, sums))


def checksum(params: Any) -> int:
  """Returns 32 bits of `of_weights`."""
  return int(of_weights(params)[:8], 16)


def of(values: dict[str, Any]) -> str:
  """Returns 32 hex digits of JSON values."""
  return _digest([json.dumps(values, sort_keys=True)])


def of_model(config: Any) -> dict[str, Any]:
  """Returns what a model computes with its weights: the fields of its config as
  JSON values, so that two of different versions can be compared."""
  fields = dataclasses.asdict(config)
  fields.pop('source')
  return json.loads(json.dumps(fields))


def of_tokenizer(tokenizer: Any) -> str:
  """Returns 32 hex digits of a tokenizer's vocabulary and special tokens."""
  special = sorted((name, str(token)) for name, token in
                   tokenizer.special_tokens_map.items())
  return _digest([sorted(tokenizer.get_vocab().items()), special])


def of_files(*paths: Path) -> str:
  """Returns 32 hex digits of the contents of files."""
  return _digest(path.read_bytes() for path in paths)


def of_leaves(tree: Any) -> str:
  """Returns 32 hex digits of a tree's paths, shapes and dtypes."""
  return _digest((jax.tree_util.keystr(path, simple=True), x.shape,
                  str(x.dtype)) for path, x in jax.tree.leaves_with_path(tree))


def of_rows(*data: Any, key: bytes = b'') -> str:
  """Returns 32 hex digits of rows as tokens, with their right answers.

  Args:
    *data: Encoded rows, as `mezo_jax.tasks.encode` returns them.
    key: A secret. Without it, the digits reveal nothing about the rows.
  """
  return _digest(((d.prompts, d.candidates, d.types, d.golds) for d in data),
                 key)


def _digest(parts: Iterable, key: bytes = b'') -> str:
  digest = hashlib.blake2b(digest_size=16, key=key)
  for part in parts:
    digest.update(repr(part).encode())
  return digest.hexdigest()


@jax.jit
def _checksums(leaves: list) -> list:
  return [*map(_checksum, leaves)]


def _checksum(x: jax.Array) -> jax.Array:
  """Returns a uint32 checksum of the positions and values of all elements."""
  if not sharding.is_on_host(x):
    return _sum(x, 0)
  def add(layer, total):  # one is on the device at a time
    return total + _sum(sharding.fetched(
        jax.lax.dynamic_slice_in_dim(x, layer, 1)), layer)
  return jax.lax.fori_loop(0, x.shape[0], add, jnp.uint32(0))


def _sum(x: jax.Array, first) -> jax.Array:
  """Returns the checksum of rows, of which the first has number ``first``."""
  if x.dtype == bool or x.dtype in (jnp.int4, jnp.uint4):
    x = x.astype(jnp.int8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  for axis in range(words.ndim):  # one more for dtypes of 64 bits
    at = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    if axis == 0:
      at = at + jnp.asarray(first).astype(jnp.uint32)
    words = (words ^ (at + 1)) * jnp.uint32(0x9E3779B1)
    words ^= words >> 15
  return jnp.sum(words, dtype=jnp.uint32)
