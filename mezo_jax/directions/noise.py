r"""Derives keys and generates the random bits of the directions z.

The elements of one parameter leaf are drawn as

.. math:: z_{leaf}[i] = f(\text{bits}(k_{leaf}, i)), \qquad
          k_{leaf} = \text{fold\_in}(key, \text{crc32}(path)),

where i is the row-major index of the element. (For low-rank directions, i is
the index of a row or of a column.) ``bits`` is a counter-based generator: it
computes the bits of any index directly, without computing those of smaller
indices. Layer l of a stacked ``[L, ...]`` leaf has the key ``fold_in(leaf_key,
l)``. A stacked leaf and L separate leaves therefore have the same z; see
`mezo_jax.core.paths.locate`. With the generator 'threefry2x32', normal draws
equal those of JAX bit for bit::

  z[leaf] == jax.random.normal(leaf_key(key, path), shape)  # float32
  z[leaf][l] == jax.random.normal(fold_in(leaf_key, l), shape[1:])

The default generator, 'hash32', is cheaper (benchmarks/results/noise.md).

z depends on nothing else. It does not depend on the dtype or the sharding of
the leaf, on the mesh, on other leaves or their order, or on the batch. z is
computed by elementwise integer and float32 operations. XLA can therefore fuse
them with the operation that uses z, without a temporary array of the size of
the leaf, and can partition them without communication.

References:
  Spall, 1992, "Multivariate stochastic approximation using a simultaneous
  perturbation gradient approximation".
  Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
  <https://arxiv.org/abs/2305.17333>`_, Algorithm 1, which regenerates z from a
  seed instead of storing it.
  Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3", for
  Threefry.
"""

import dataclasses
import functools
import sys
from typing import Any, get_args, Literal
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import paths, sharding

Generator = Literal['threefry2x32', 'hash32']
GENERATORS = get_args(Generator)
_U32 = jnp.uint32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('keys', 'lo', 'hi', 'there', 'values', 'core'),
    meta_fields=('strides',))
@dataclasses.dataclass(frozen=True)
class Stream:
  """Locates the elements of a block among the draws of its leaf.

  A block is a leaf or a view of one. Element (i_0, i_1, ...) of a block is draw
  number ``2**32 * hi + lo + sum_a strides[a] * i_a`` of its keys. This number
  is called the counter of the element. Because the counter is an affine
  function of the index, a row, a slice, a transpose or a reshape of a block has
  a stream, too; see `mezo_jax.directions.streams`.

  Every array begins with the axes of the block. Each of these axes has either
  the length that it has in the block, or length 1, in which case it broadcasts.

  Attributes:
    keys: Raw key data of the n directions, uint32 [*axes, n, 2].
    lo: Lower 32 bits of the first counter, uint32 [*axes].
    strides: Difference of the counters of neighbours along each axis, Python
      integers from 0 to 2**32 - 1.
    hi: Upper 32 bits of the first counter, uint32 [*axes]. Defaults to None,
      for a leaf whose counters all fit in 32 bits.
    there: True where z is kept; z is 0 elsewhere. bool [*axes]. Defaults to
      None, which keeps all of z.
    values: Values of a `Multiplier`, [*axes]. Defaults to None, for no
      multiplier.
    core: The matrix C of `SubZero`, float32 [*axes, n, r, r]. Defaults to None,
      for all other distributions.
  """

  keys: jax.Array
  lo: jax.Array
  strides: tuple[int, ...]
  hi: jax.Array | None = None
  there: jax.Array | None = None
  values: jax.Array | None = None
  core: jax.Array | None = None


# --- keys -------------------------------------------------------------------


def as_key(key: Any, name: str = 'key') -> jax.Array:
  """Converts a key or a seed to one typed threefry2x32 key.

  Args:
    key: A typed key of any implementation, the data of a raw key, or a seed
      that `jax.random.key` accepts.
    name: Name of the argument, for the error message. Defaults to 'key'.

  Raises:
    ValueError: If ``key`` is something else, or an array of several keys.
  """
  if _is_raw(key, 1, 4):
    # Where 'rbg' is JAX's default, jax.random.PRNGKey returns four words.
    key = jax.random.wrap_key_data(jnp.asarray(key), impl='rbg')
  if _is_raw(key, 1, 2):
    return typed(jnp.asarray(key))
  if is_typed(key) and not key.shape:
    return _as_threefry(key)
  try:
    return jax.random.key(key, impl='threefry2x32')
  except (OverflowError, TypeError, ValueError) as e:
    raise ValueError(
        f'{name} must be a single jax.random.key or an integer seed that it '
        f'accepts, such as one below 2**63; got {key!r}.') from e


def _is_raw(key: Any, ndim: int, words: int) -> bool:
  """Returns whether an object is an array with the words of raw keys."""
  return (isinstance(key, (jax.Array, np.ndarray)) and key.dtype == np.uint32
          and key.ndim == ndim and key.shape[-1] == words)


def _as_threefry(keys: jax.Array) -> jax.Array:
  """Converts one typed key, or typed keys [n], to threefry2x32."""
  if jax.random.key_impl(keys) == 'threefry2x32':
    return keys
  draw = lambda key: jax.random.bits(key, (2,), jnp.uint32)
  return typed(jax.vmap(draw)(keys) if keys.ndim else draw(keys))


def check_key(key: Any, name: str = 'key') -> None:
  """Checks that `as_key` will accept a key or a seed.

  An integer seed is accepted without any computation, because optimizers may be
  constructed before JAX has set up its devices.

  Args:
    key: A key or a seed; see `as_key`.
    name: Name of the argument, for the error message. Defaults to 'key'.

  Raises:
    ValueError: If `as_key` does not accept ``key``.
  """
  if not isinstance(key, (int, np.integer)):
    as_key(key, name)


def is_typed(key: Any) -> bool:
  """Returns whether an object is a typed PRNG key or an array of them."""
  return hasattr(key, 'dtype') and jnp.issubdtype(
      key.dtype, jax.dtypes.prng_key)


def state_key(key: Any) -> jax.Array:
  """Copies a key for the state of an optimizer.

  The copy can be donated together with the state, while the caller's key stays
  valid.

  `flax.serialization` cannot save typed keys by itself. If the program has
  imported it, this function registers a rule that saves the data of the key.
  """
  flax = sys.modules.get('flax.serialization')
  if flax is not None:
    # Under `jax.jit` the key would be a tracer, which has another type.
    with jax.ensure_compile_time_eval():
      kind = type(jax.random.key(0, impl='threefry2x32'))
    if not flax.is_serializable(kind):
      flax.register_serialization_state(
          kind, jax.random.key_data,
          lambda like, data: jax.random.wrap_key_data(
              jnp.asarray(data), impl=jax.random.key_impl(like)))
  return jnp.copy(as_key(key))


def typed(words: jax.Array) -> jax.Array:
  """Returns typed threefry2x32 keys with these data, uint32 [..., 2]."""
  return jax.random.wrap_key_data(words, impl='threefry2x32')


def as_keys(keys: jax.Array) -> jax.Array:
  """Converts keys to typed threefry2x32 keys.

  Args:
    keys: An array of typed keys [n], the data of raw keys, uint32 [n, 2], or
      one key or seed that `as_key` accepts, for n = 1.

  Returns:
    Typed keys of shape [n].

  Raises:
    ValueError: If ``keys`` is something else.
  """
  if is_typed(keys) and keys.ndim == 1:
    return _as_threefry(keys)
  if _is_raw(keys, 2, 2):
    return typed(jnp.asarray(keys))
  return as_key(keys, 'the keys of a displacement')[None]


def direction_key(key: jax.Array, count: jax.Array | int,
                  sample: jax.Array | int = 0) -> jax.Array:
  """Returns the key of direction number ``sample`` of step number ``count``."""
  return jax.random.fold_in(jax.random.fold_in(key, count), sample)


def step_keys(key: jax.Array, count: jax.Array | int, n: int) -> jax.Array:
  """Returns the keys of the n directions of step number ``count``, [n]."""
  return jax.vmap(lambda j: direction_key(key, count, j))(jnp.arange(n))


def leaf_key(key: jax.Array, path: str, stacked: bool | None = None
             ) -> jax.Array:
  """Returns the key of a leaf.

  If the path contains the number of a layer, this is the key of the layer.

  Args:
    key: Typed key of a direction.
    path: Path of the leaf.
    stacked: Whether the leaf is a stack of layers; see `paths.locate`.
  """
  name, layer, _ = paths.locate(path, stacked)
  key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
  if layer is None:
    return key
  return jax.random.fold_in(key, layer)


def only(s: Stream, j: int | jax.Array) -> Stream:
  """Returns the stream whose only direction is direction j of ``s``."""
  index: Any = lax.dynamic_index_in_dim
  if isinstance(j, int):
    index = lax.index_in_dim
  core = s.core
  if core is not None:
    core = index(core, j, -3)
  return dataclasses.replace(s, keys=index(s.keys, j, -2), core=core)


# --- random words ---------------------------------------------------------


def bits(key: jax.Array, index: jax.Array, generator: str) -> jax.Array:
  """Returns the random words of one key at some indices.

  Args:
    key: A typed key.
    index: Counters, a uint32 array.
    generator: One of `GENERATORS`.

  Returns:
    A uint32 array of the shape of ``index``.
  """
  k0, k1 = jax.random.key_data(key)
  return _generators[generator](k0, k1, _U32(0), lambda word: index + word)


def words(s: Stream, j: int | jax.Array, like: jax.Array,
          generator: str) -> jax.Array:
  """Returns a random uint32 word for each element of a block.

  Args:
    s: The stream of the block.
    j: Index of the direction.
    like: An array with the shape of the block. If mesh axes are Explicit, the
      words have the sharding of this array.
    generator: One of `GENERATORS`, or 'rounding', which is cheaper and random
      enough for `stochastic_round`.

  Returns:
    A uint32 array that broadcasts to the shape of the block. An axis has length
    1 if all elements along it share a word.
  """
  key = only(s, j).keys[..., 0, :]
  return _words(
      key, s.lo, s.hi, strides=s.strides, shape=like.shape,
      place=_explicit(like, s.strides), generator=generator)


# `jax.jit` caches the trace, so that blocks of one shape are traced once. With
# inline=True, the lowered program contains no call.
@functools.partial(jax.jit, inline=True, static_argnames=(
    'strides', 'shape', 'place', 'generator'))
def _words(key, lo, hi, *, strides, shape, place, generator):
  """Returns the words of one key; see `words`."""
  index_shape = [
      n if step else 1 for n, step in zip(shape, strides, strict=True)]

  # Generators receive this function instead of the counters, so that a word of
  # the key is added before anything else is computed. The counters alone are
  # equal for all layers. If they were computed first, XLA would share one
  # layer-sized array of counters between the layers and keep it in memory.
  def lo_plus(word):
    total = lo + word
    for axis, step in enumerate(strides):
      if step:
        index = lax.broadcasted_iota(
            jnp.uint32, index_shape, axis, out_sharding=place)
        total = total + _U32(step) * index
    return total

  k0, k1 = key[..., 0], key[..., 1]
  if hi is None:
    hi = jnp.zeros((), jnp.uint32)
  else:
    # Add 1 where the lower 32 bits of the counter overflow.
    hi = hi + (lo_plus(_U32(0)) < lo).astype(jnp.uint32)
  return _generators[generator](k0, k1, hi, lo_plus)


def _explicit(like: jax.Array,
              strides: tuple) -> jax.sharding.NamedSharding | None:
  """Returns the sharding of a block's counters, or None.

  The result is None unless mesh axes are Explicit. Only axes with a stride are
  sharded, because the counters have length 1 along the others.
  """
  if not sharding.is_explicit(like):
    return None
  place = jax.typeof(like).sharding
  names = [name if step else None for name, step in zip(place.spec, strides)]
  return place.update(spec=jax.P(*names))


def _threefry2x32(k0, k1, hi, lo_plus):
  """Returns words of Threefry-2x32 with 20 unrolled rounds.

  JAX's own Threefry is a loop on CPU. XLA cannot fuse that loop, and it needs
  four temporary arrays of the size of a leaf.
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
  """Returns words that result from hashing a Weyl sequence twice, with the key.

  This takes far fewer operations than Threefry. The last operation adds the
  Weyl sequence once more. Without it, the words of a key would be a permutation
  of the counters and would never repeat. With it, they repeat as often as
  random words do. The generator is not cryptographic. Its statistics are not
  proven, but tested by benchmarks/noise.py.
  """
  # The two constants are inverses modulo 2**32, so this is k0 + lo * G, where G
  # is the second constant.
  weyl = lo_plus(k0 * _U32(0x144CBC89)) * _U32(0x9E3779B9)
  x = _finalise(weyl, 0x7FEB352D, 0x846CA68B)
  x = x ^ (k1 + hi * _U32(0x85EBCA6B))
  x = _finalise((x ^ (x >> 17)) * _U32(0xED5AD4BB), 0xAC4C1B51, 0x31848BAB)
  return x + weyl


def _rounding(k0, k1, hi, lo_plus):
  """Returns words that are hashed only once, for stochastic rounding."""
  return _finalise(lo_plus(k0) ^ (k1 + hi), 0x7FEB352D, 0x846CA68B)


def _finalise(x, m0, m1):
  """Mixes all bits of 32-bit words, as the last step of a hash function does.

  The map is a bijection.
  """
  x = (x ^ (x >> 16)) * _U32(m0)
  x = (x ^ (x >> 15)) * _U32(m1)
  return x ^ (x >> 16)


_generators = {'threefry2x32': _threefry2x32, 'hash32': _hash32,
               'rounding': _rounding}
