r"""Keys and random bits of directions z, drawn on demand and never stored.

One leaf of the parameters has one stream of draws,

.. math:: z_{leaf}[i] = f(\text{bits}(k_{leaf}, i)), \qquad
          k_{leaf} = \text{fold\_in}(key, \text{crc32}(path)),

where ``i`` is the row-major index of the element (for low-rank directions, that
of a row or a column) and ``bits`` is a counter-based generator. A layer of a
stacked ``[L, ...]`` leaf has the key of that layer alone, ``fold_in(leaf_key,
l)``, so a stacked leaf and L separate ones have the same noise (see
`mezo_jax.core.paths.locate`). Normal draws with the generator 'threefry2x32'
are, bit for bit,

  ``z[leaf] == jax.random.normal(leaf_key(key, path), shape)``      (float32)
  ``z[leaf][l] == jax.random.normal(fold_in(leaf_key, l), shape[1:])``;

The default generator, 'hash32', is cheaper (benchmarks/results/noise.md). z
depends on nothing else: not on the dtype, the sharding, the mesh, other leaves,
their order, or the batch. Draws are elementwise integer and float32 operations:
they fuse into whatever consumes them, need no temporary of a leaf's size, are
partitioned without communication, and can be indexed.

Source: SPSA directions, Spall (1992); "z is never stored but regenerated",
Malladi et al. (2023), Algorithm 1; Threefry, Salmon et al. (2011), Random123.
"""

import dataclasses
import functools
import sys
from typing import Any
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import paths

GENERATORS = ('threefry2x32', 'hash32')
_U32 = jnp.uint32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('keys', 'lo', 'hi', 'there', 'values', 'core'),
    meta_fields=('strides',))
@dataclasses.dataclass(frozen=True)
class Stream:
  """Locates the elements of a block among the draws of its leaf.

  Element i of a block with ``len(strides)`` axes is draw number
  ``2**32 * hi + lo + sum_a strides[a] * i[a]`` of its keys. The arrays begin
  with the axes of the block, which have the block's length or length 1 (then
  they broadcast). So a row, a slice, a transpose or a reshape of a leaf has a
  stream again: see `mezo_jax.directions.streams`. A stream has all n keys of a
  displacement.
  """

  keys: jax.Array  # uint32 [*axes, n, 2]
  lo: jax.Array  # uint32 [*axes]
  strides: tuple[int, ...]  # below 2**32
  hi: jax.Array | None = None  # uint32 [*axes]; None where 0 for all
  there: jax.Array | None = None  # bool [*axes], where z is kept; None for all
  values: jax.Array | None = None  # [*axes], of a `Multiplier`
  core: jax.Array | None = None  # float32 [*axes, n, r, r], of `SubZero`


# --- keys -------------------------------------------------------------------


def as_key(key: Any, name: str = 'key') -> jax.Array:
  """Returns a typed threefry key.

  Args:
    key: A typed key of any implementation, the data of a raw key, or a seed
      that `jax.random.key` accepts.
    name: The argument's name, for the error.

  Raises:
    ValueError: If it is something else.
  """
  if is_typed(key):
    if key.shape:
      raise ValueError(f'{name} must be one key, got an array of {key.shape}.')
    if jax.random.key_impl(key) == 'threefry2x32':
      return key
    return _wrap(jax.random.bits(key, (2,), jnp.uint32))
  if isinstance(key, (jax.Array, np.ndarray)) and key.dtype == np.uint32:
    if key.shape == (2,):
      return _wrap(jnp.asarray(key))
    if key.shape == (4,):  # of jax.random.PRNGKey where 'rbg' is the default
      return as_key(jax.random.wrap_key_data(jnp.asarray(key), impl='rbg'))
  try:  # jax takes bools for seeds, too
    is_seed = not np.shape(key) and jnp.result_type(key).kind in 'iub'
  except (TypeError, ValueError):
    is_seed = False
  except OverflowError:  # a Python integer that is decided about below
    is_seed = True
  if not is_seed:
    found = f'{key.dtype}{[*key.shape]}' if hasattr(key, 'dtype') else repr(key)
    raise ValueError(
        f'{name} must be a jax.random.key or an integer seed, got {found}.')
  try:
    return jax.random.key(key, impl='threefry2x32')
  except (OverflowError, TypeError) as e:  # bools, too, if they are NumPy's
    raise ValueError(f'{name} must be a seed that jax.random.key takes, below '
                     f'2**63, got {key!r}.') from e


def check_key(key: Any, name: str = 'key') -> None:
  """Raises ValueError for something that `as_key` does not accept.

  Nothing is computed for a seed, since devices may not be set up yet.
  """
  if not isinstance(key, (int, np.integer)):
    as_key(key, name)


def is_typed(key: Any) -> bool:
  """Returns whether something is an array of typed PRNG keys."""
  return hasattr(key, 'dtype') and jnp.issubdtype(
      key.dtype, jax.dtypes.prng_key)


def state_key(key: Any) -> jax.Array:
  """Returns a copy of a key for an optimizer's state, which may be donated.

  In programs that import `flax.serialization`, this registers how it saves a
  typed key: as the key's data.
  """
  flax = sys.modules.get('flax.serialization')
  if flax is not None:
    with jax.ensure_compile_time_eval():  # its type, not that of a tracer
      kind = type(jax.random.key(0, impl='threefry2x32'))
    if not flax.is_serializable(kind):
      flax.register_serialization_state(
          kind, jax.random.key_data,
          lambda like, data: jax.random.wrap_key_data(
              jnp.asarray(data), impl=jax.random.key_impl(like)))
  return jnp.copy(as_key(key))


def _wrap(words: jax.Array) -> jax.Array:
  return jax.random.wrap_key_data(words, impl='threefry2x32')


def as_keys(keys: jax.Array) -> jax.Array:
  """Returns typed threefry keys [n].

  Args:
    keys: An array of typed keys [n], the data of raw keys [n, 2], or one key
      that `as_key` accepts.
  """
  if is_typed(keys) and keys.ndim == 1:
    if jax.random.key_impl(keys) == 'threefry2x32':
      return keys
    return _wrap(jax.vmap(lambda k: jax.random.bits(k, (2,), jnp.uint32))(keys))
  if isinstance(keys, (jax.Array, np.ndarray)) and keys.dtype == np.uint32 and (
      keys.ndim == 2 and keys.shape[1] == 2):
    return _wrap(jnp.asarray(keys))
  return as_key(keys, 'the keys of a displacement')[None]


def direction_key(key: jax.Array, count: jax.Array | int,
                  sample: jax.Array | int = 0) -> jax.Array:
  """Returns the key of a direction of a step."""
  return jax.random.fold_in(jax.random.fold_in(key, count), sample)


def step_keys(key: jax.Array, count: jax.Array | int, n: int) -> jax.Array:
  """Returns the keys [n] of the directions of a step."""
  return jax.vmap(lambda j: direction_key(key, count, j))(jnp.arange(n))


def leaf_key(key: jax.Array, path: str) -> jax.Array:
  """Returns the key of a leaf, or of a layer if the path has its number."""
  name, layer, _ = paths.locate(path)
  key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
  return key if layer is None else jax.random.fold_in(key, layer)


def only(s: Stream, j: int | jax.Array) -> Stream:
  """Returns the stream of direction j alone."""
  if isinstance(j, int):
    keys = lax.index_in_dim(s.keys, j, -2)
  else:
    keys = lax.dynamic_index_in_dim(s.keys, j, -2)
  return dataclasses.replace(s, keys=keys)


# --- words ----------------------------------------------------------------


def bits(key: jax.Array, index: jax.Array, generator: str) -> jax.Array:
  """Returns the uint32 word of a key for each index, a uint32 array."""
  k0, k1 = jax.random.key_data(key)
  return _generators[generator](k0, k1, _U32(0), lambda word: index + word)


def words(s: Stream, j: int | jax.Array, like: jax.Array,
          generator: str) -> jax.Array:
  """Returns a random uint32 word for each element of a block.

  Args:
    s: The stream of the block.
    j: The number of the direction.
    like: An array with the shape of the block and, where mesh axes are
      Explicit, its sharding.
    generator: One of `GENERATORS`; or 'rounding', which is cheaper and good
      enough for `stochastic_round`.
  """
  return _words(
      only(s, j).keys[..., 0, :], s.lo, s.hi, strides=s.strides,
      shape=like.shape, place=_explicit(like, s.strides), generator=generator)


# Blocks of one shape are traced once. For XLA, inline=True changes nothing.
@functools.partial(jax.jit, inline=True, static_argnames=(
    'strides', 'shape', 'place', 'generator'))
def _words(key, lo, hi, *, strides, shape, place, generator):
  index_shape = tuple(n if step else 1 for n, step in zip(
      shape, strides, strict=True))

  # Add a word of the key to the counter first. Otherwise XLA shares one index,
  # as large as a layer, between the layers, and keeps it alive.
  def lo_plus(word):
    total = lo + word
    for axis, step in enumerate(strides):
      if step:
        total = total + _U32(step) * lax.broadcasted_iota(
            jnp.uint32, index_shape, axis, out_sharding=place)
    return total

  k0, k1 = key[..., 0], key[..., 1]
  if hi is None:
    hi = jnp.zeros((), jnp.uint32)
  else:
    hi = hi + (lo_plus(_U32(0)) < lo).astype(jnp.uint32)
  return _generators[generator](k0, k1, hi, lo_plus)


def _explicit(like: jax.Array,
              strides: tuple) -> jax.sharding.NamedSharding | None:
  """Returns the sharding of a block's counted axes, if mesh axes are Explicit.
  """
  sharding = jax.typeof(like).sharding
  if not any(t == jax.sharding.AxisType.Explicit
             for t in sharding.mesh.axis_types):
    return None
  return sharding.update(spec=jax.P(*(
      name if step else None for name, step in zip(sharding.spec, strides))))


def _threefry2x32(k0, k1, hi, lo_plus):
  """Returns words of Threefry-2x32 with 20 rounds, unrolled. That of JAX is a
  loop on CPU, which does not fuse and needs four temporaries of a leaf's size.
  """
  ks = (k0, k1, k0 ^ k1 ^ _U32(0x1BD11BDA))
  x0, x1 = hi + k0, lo_plus(k1)
  for i in range(5):
    for r in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
      x0 = x0 + x1
      x1 = x0 ^ ((x1 << r) | (x1 >> (32 - r)))
    x0, x1 = x0 + ks[(i + 1) % 3], x1 + ks[(i + 2) % 3] + _U32(i + 1)
  return x0 ^ x1


def _hash32(k0, k1, hi, lo_plus):
  """Returns keyed rounds of 32-bit finalisers over a Weyl sequence.

  This is far cheaper than Threefry. The sum at the end makes the words a random
  function of the counter instead of a permutation, which would never repeat.
  The generator is not cryptographic, and its statistics are tested
  (benchmarks/noise.py), not proven.
  """
  weyl = lo_plus(k0 * _U32(0x144CBC89)) * _U32(0x9E3779B9)  # k0 + lo * G
  x = _finalise(weyl, 0x7FEB352D, 0x846CA68B)
  x = x ^ (k1 + hi * _U32(0x85EBCA6B))
  x = _finalise((x ^ (x >> 17)) * _U32(0xED5AD4BB), 0xAC4C1B51, 0x31848BAB)
  return x + weyl


def _rounding(k0, k1, hi, lo_plus):
  """Returns the words of one keyed finaliser."""
  return _finalise(lo_plus(k0) ^ (k1 + hi), 0x7FEB352D, 0x846CA68B)


def _finalise(x, m0, m1):
  """Applies a bijection of 32-bit words that mixes all bits."""
  x = (x ^ (x >> 16)) * _U32(m0)
  x = (x ^ (x >> 15)) * _U32(m1)
  return x ^ (x >> 16)


_generators = {'threefry2x32': _threefry2x32, 'hash32': _hash32,
               'rounding': _rounding}
