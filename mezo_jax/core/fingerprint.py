"""Computes fingerprints of weights, rows, models and files.

A fingerprint does not depend on the mesh or on the number of processes.
"""

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
  """Returns the fingerprint of a tree of arrays, as 32 hex digits.

  The fingerprint covers the paths, shapes, dtypes and elements of all leaves.
  Computing it reads the weights once and does not copy them. It detects
  accidental differences, but is not secure against deliberate collisions.

  Args:
    params: A tree of arrays.
    but: A regular expression. Leaves whose path contains a match are left out.
      Defaults to None, which includes all leaves.
  """
  leaves = jax.tree.leaves_with_path(params)
  if but is not None:
    leaves = [(path, x) for path, x in leaves if not re.search(
        but, jax.tree_util.keystr(path, simple=True, separator='/'))]
  sums = jax.device_get(_checksums([x for _, x in leaves]))
  return _digest((jax.tree_util.keystr(path), x.shape, str(x.dtype), int(total))
                 for (path, x), total in zip(leaves, sums))


def checksum(params: Any) -> int:
  """Returns the first 32 bits of `of_weights(params)`, as an integer."""
  return int(of_weights(params)[:8], 16)


def of(values: dict[str, Any]) -> str:
  """Returns the fingerprint of a dict of JSON values, as 32 hex digits.

  The order of keys does not matter.
  """
  return _digest([json.dumps(values, sort_keys=True)])


def of_model(config: Any) -> dict[str, Any]:
  """Returns the fields of a model's config as JSON values.

  They are not hashed, so that the configs of two versions of this library can
  be compared field by field. The field `source` is left out, since it has no
  influence on what the model computes.

  Args:
    config: A `mezo_jax.models.Config`.
  """
  fields = dataclasses.asdict(config)
  fields.pop('source')
  return json.loads(json.dumps(fields))


def of_tokenizer(tokenizer: Any) -> str:
  """Returns the fingerprint of a tokenizer, as 32 hex digits.

  It covers the vocabulary and the special tokens.
  """
  special = sorted((name, str(token)) for name, token in
                   tokenizer.special_tokens_map.items())
  return _digest([sorted(tokenizer.get_vocab().items()), special])


def of_files(*paths: Path) -> str:
  """Returns the fingerprint of the contents of files, as 32 hex digits."""
  return _digest(path.read_bytes() for path in paths)


def of_leaves(tree: Any) -> str:
  """Returns the fingerprint of a tree's structure, as 32 hex digits.

  It covers the paths, shapes and dtypes of the leaves, not their elements, so
  the leaves may be `jax.ShapeDtypeStruct`s.
  """
  return _digest((jax.tree_util.keystr(path, simple=True), x.shape,
                  str(x.dtype)) for path, x in jax.tree.leaves_with_path(tree))


def of_rows(*data: Any, key: bytes = b'') -> str:
  """Returns the fingerprint of tokenized, labelled rows, as 32 hex digits.

  Args:
    *data: Encoded rows, as `mezo_jax.tasks.encode` returns them.
    key: Secret key of the hash. Without the key, nobody can use the fingerprint
      to test a guess about the rows. Defaults to b'', which hashes without a
      key.
  """
  def parts(d):
    """Returns what is hashed; gaps only if there are any, as in old runs."""
    gaps = d.gaps
    has = any(gap for of_row in gaps for gap in of_row)
    return (d.prompts, d.candidates, d.types, d.golds, *([gaps] if has else []))
  return _digest(map(parts, data), key)


def _digest(parts: Iterable, key: bytes = b'') -> str:
  """Hashes the `repr` of each part and returns 32 hex digits."""
  digest = hashlib.blake2b(digest_size=16, key=key)
  for part in parts:
    digest.update(repr(part).encode())
  return digest.hexdigest()


@jax.jit
def _checksums(leaves: list) -> list:
  """Returns the checksum of each array, computed by one compiled program."""
  return [*map(_checksum, leaves)]


def _checksum(x: jax.Array) -> jax.Array:
  """Returns a uint32 checksum of the positions and values of all elements."""
  if not sharding.is_on_host(x):
    return _sum(x, 0)
  # An array in the host's memory may be too large for the device, so only one
  # layer at a time is copied there.
  def add(layer, total):
    """Adds the checksum of one layer."""
    block = jax.lax.dynamic_slice_in_dim(x, layer, 1)
    return total + _sum(sharding.fetched(block), layer)
  return jax.lax.fori_loop(0, x.shape[0], add, jnp.uint32(0))


def _sum(x: jax.Array, first) -> jax.Array:
  """Returns the checksum of a block of an array along its first axis.

  Each element is hashed with its position, and the hashes are added modulo
  2**32. That sum is exact in any order, so the checksum depends neither on how
  the array is sharded nor on the blocks in which it is read.

  Args:
    x: The block.
    first: Index in the whole array of the block's first row.
  """
  if x.dtype == bool or x.dtype in (jnp.int4, jnp.uint4):
    x = x.astype(jnp.int8)
  word = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  # The bitcast of a 64-bit dtype adds an axis of length 2, which is included.
  for axis in range(words.ndim):
    at = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    if axis == 0:
      at = at + jnp.asarray(first).astype(jnp.uint32)
    words = (words ^ (at + 1)) * jnp.uint32(0x9E3779B1)
    words ^= words >> 15
  return jnp.sum(words, dtype=jnp.uint32)
