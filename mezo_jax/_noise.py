r"""The direction z(key): made on demand, any part of it, never stored.

One leaf of the parameters has one stream of draws,

.. math:: z_{leaf}[i] = f(\text{bits}(k_{leaf}, i)), \qquad
          k_{leaf} = \text{fold\_in}(key, \text{crc32}(path)),

where ``i`` is the row-major index of the element and ``bits`` a counter-based
generator. A layer of a stacked ``[L, ...]`` leaf has the key of that layer
alone, ``fold_in(leaf_key, l)``, so a stacked leaf and L separate ones see the
same noise (see `locate`). With the generator 'threefry2x32', bit for bit,

  ``z[leaf] == jax.random.normal(leaf_key(key, path), shape)``      (float32)
  ``z[leaf][l] == jax.random.normal(fold_in(leaf_key, l), shape[1:])``;

'hash32', the default, is a cheaper one of ours (benchmarks/results/noise.md).
Nothing else enters: not the dtype, the sharding, the mesh, the siblings, their
order, nor the batch. The draws are written out in elementwise integer and
float32 operations: they fuse into whatever consumes them, need no temporary of
a leaf's size, are partitioned without communication and can be indexed.

Source: SPSA directions, Spall (1992); "z is never stored but regenerated",
Malladi et al. (2023), Algorithm 1; Threefry, Salmon et al. (2011), Random123.
"""

import dataclasses
import functools
import math
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax import _paths

GENERATORS = ('threefry2x32', 'hash32')
DISTRIBUTIONS = ('normal', 'rademacher')


def check_names(distribution: str, generator: str,
                distributions: tuple[str, ...] = DISTRIBUTIONS) -> None:
  """Raises ValueError for an unknown distribution or generator."""
  for name, value, known in (('distribution', distribution, distributions),
                             ('generator', generator, GENERATORS)):
    if value not in known:
      raise ValueError(f'{name} must be one of {known}, got {value!r}.')


_U32 = jnp.uint32
_UNROLLED = 8  # directions


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('keys', 'lo', 'hi', 'there'), meta_fields=('strides',))
@dataclasses.dataclass(frozen=True)
class Stream:
  """Where the draws of a block lie: an affine view into those of a leaf.

  Element i of a block of ``len(strides)`` axes is draw number
  ``2**32 * hi + lo + sum_a strides[a] * i[a]`` of its keys. The arrays have the
  block's axes, of its length or of length 1 (then they are broadcast), so that
  a row, a run, a transpose or a reshape of a leaf is a stream again: see
  `mezo_jax._streams`. ``pairs`` directions can be held at once (a displacement
  has several).
  """

  keys: jax.Array  # uint32 [*axes, pairs, 2]
  lo: jax.Array  # uint32 [*axes]
  strides: tuple[int, ...]  # below 2**32
  hi: jax.Array | None = None  # uint32 [*axes]; None where 0 for all
  there: jax.Array | None = None  # bool [*axes], where z is not 0; None for all


# --- keys -------------------------------------------------------------------


def as_key(key) -> jax.Array:
  """A typed threefry key from a typed key, raw key data or an integer seed."""
  if isinstance(key, jax.Array) and jnp.issubdtype(
      key.dtype, jax.dtypes.prng_key):
    if key.shape:
      raise ValueError(f'key must be one key, got an array of {key.shape}.')
    if jax.random.key_impl(key) == 'threefry2x32':
      return key
    return _wrap(jax.random.bits(key, (2,), jnp.uint32))
  key = jnp.asarray(key)
  if key.shape == (2,) and key.dtype == jnp.uint32:
    return _wrap(key)
  if key.shape or not jnp.issubdtype(key.dtype, jnp.integer):
    raise ValueError(
        'key must be a jax.random.key or an integer seed, got '
        f'{key.dtype}{list(key.shape)}.')
  return jax.random.key(key, impl='threefry2x32')


def _wrap(words: jax.Array) -> jax.Array:
  return jax.random.wrap_key_data(words, impl='threefry2x32')


def direction_key(key: jax.Array, count, sample=0) -> jax.Array:
  """The key of direction number ``sample`` of step number ``count``."""
  return jax.random.fold_in(jax.random.fold_in(key, count), sample)


def leaf_key(key: jax.Array, path: str) -> jax.Array:
  """The key of one leaf; of one layer where the path has a layer number."""
  name, layer, _ = _paths.locate(path)
  key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
  return key if layer is None else jax.random.fold_in(key, layer)


# --- words ----------------------------------------------------------------


def words(s: Stream, pair: int | jax.Array, like: jax.Array,
          generator: str) -> jax.Array:
  """A uint32 word for each element of a block.

  Args:
    s: the stream of the block.
    pair: which of its directions.
    like: gives the shape of the block and, where mesh axes are Explicit, its
      sharding.
    generator: one of `GENERATORS`; or 'rounding', cheaper than either and good
      enough for `stochastic_round`.
  """
  place = _explicit(like, s.strides)
  index_shape = tuple(n if step else 1 for n, step in zip(
      like.shape, s.strides, strict=True))

  # Counters start from lo plus a word of the key: XLA would share one index, as
  # large as a layer, between the layers, and keep it.
  def lo_plus(word):
    total = s.lo + word
    for axis, step in enumerate(s.strides):
      if step:
        total = total + _U32(step) * lax.broadcasted_iota(
            jnp.uint32, index_shape, axis, out_sharding=place)
    return total

  k0, k1 = s.keys[..., pair, 0], s.keys[..., pair, 1]
  hi = jnp.zeros((), jnp.uint32)
  if s.hi is not None:
    hi = s.hi + (lo_plus(_U32(0)) < s.lo).astype(jnp.uint32)
  fn = {'threefry2x32': _threefry2x32, 'hash32': _hash32,
        'rounding': _rounding}[generator]
  return fn(k0, k1, hi, lo_plus)


def _explicit(like: jax.Array,
              strides: tuple) -> jax.sharding.NamedSharding | None:
  """The sharding of a block's counted axes, if it is part of its type."""
  sharding = jax.typeof(like).sharding
  if not any(t == jax.sharding.AxisType.Explicit
             for t in sharding.mesh.axis_types):
    return None
  return sharding.update(spec=jax.P(*(
      name if step else None for name, step in zip(sharding.spec, strides))))


def _threefry2x32(k0, k1, hi, lo_plus):
  """Threefry-2x32, 20 rounds, unrolled: jax's own is a loop on CPU, which
  does not fuse and needs four temporaries of the leaf's size."""
  ks = (k0, k1, k0 ^ k1 ^ _U32(0x1BD11BDA))
  x0, x1 = hi + k0, lo_plus(k1)
  for i in range(5):
    for r in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
      x0 = x0 + x1
      x1 = x0 ^ ((x1 << r) | (x1 >> (32 - r)))
    x0, x1 = x0 + ks[(i + 1) % 3], x1 + ks[(i + 2) % 3] + _U32(i + 1)
  return x0 ^ x1


def _hash32(k0, k1, hi, lo_plus):
  """Keyed rounds of 32-bit finalisers over a Weyl sequence of the counter.

  Far cheaper than threefry. The sum at the end makes a key's draws a random
  function of the counter and not a permutation, which would lack repetitions.
  Not cryptographic; its statistics are tested (benchmarks/noise.py), not
  proven.
  """
  weyl = lo_plus(k0 * _U32(0x144CBC89)) * _U32(0x9E3779B9)  # k0 + lo * G
  x = _finalise(weyl, 0x7FEB352D, 0x846CA68B)
  x = x ^ (k1 + hi * _U32(0x85EBCA6B))
  x = _finalise((x ^ (x >> 17)) * _U32(0xED5AD4BB), 0xAC4C1B51, 0x31848BAB)
  return x + weyl


def _rounding(k0, k1, hi, lo_plus):
  """One keyed finaliser."""
  return _finalise(lo_plus(k0) ^ (k1 + hi), 0x7FEB352D, 0x846CA68B)


def _finalise(x, m0, m1):
  """A bijection of 32-bit words in which each bit comes to matter to each."""
  x = (x ^ (x >> 16)) * _U32(m0)
  x = (x ^ (x >> 15)) * _U32(m1)
  return x ^ (x >> 16)


# --- draws ------------------------------------------------------------------


def from_bits(bits: jax.Array, distribution: str, generator: str) -> jax.Array:
  """float32 draws of mean 0 and variance 1 from uint32 words.

  With threefry2x32 they are, bit for bit, what `jax.random.normal` and
  `jax.random.rademacher` make of the same words; with hash32 normal draws are
  `_quantile`'s, which are cheaper (benchmarks/results/noise.md).
  """
  if distribution == 'rademacher':
    one = (bits & _U32(0x80000000)) | _U32(0x3F800000)  # a sign and 1.0
    return lax.bitcast_convert_type(one, jnp.float32)
  if generator == 'hash32':
    return _quantile(bits)
  one, low = np.float32(1), np.nextafter(np.float32(-1), np.float32(0))
  unit = lax.bitcast_convert_type(
      (bits >> 9) | _U32(0x3F800000), jnp.float32) - one
  uniform = jnp.maximum(low, unit * (one - low) + low)
  return np.float32(np.sqrt(2)) * lax.erf_inv(uniform)


def _quantile(bits: jax.Array) -> jax.Array:
  r"""Normal draws: bit 0 is the sign, the others the two-sided tail t.

  .. math:: w = -2 \ln t, \quad y = \sqrt{w}, \quad
            |z| = \Phi^{-1}(1 - t/2) \approx w\, P_3(y) / Q_4(y)

  The form is that of Abramowitz and Stegun 26.2.23; the coefficients are our
  least-maximum fit; in float32 |z| is within 5e-6 of the quantile for all
  t >= 2**-32, that is |z| <= 6.34. The logarithm is a polynomial too, in the
  fraction bits of t: multiplications, additions, one square root, one division,
  no branch.
  """
  tail = ((bits >> 1).astype(jnp.int32).astype(jnp.float32)
          + np.float32(0.5)) * np.float32(2**-31)
  word = lax.bitcast_convert_type(tail, jnp.int32)
  exponent = (word - 0x3F3504F3) >> 23  # the fraction is in [sqrt(1/2), sqrt 2)
  m = lax.bitcast_convert_type(word - (exponent << 23), jnp.float32)
  m = m - np.float32(1)
  w = m * _polynomial(_LOG, m) + exponent.astype(jnp.float32) * np.float32(
      -2 * math.log(2))
  w = jnp.maximum(w, np.float32(0))
  y = jnp.sqrt(w)
  z = w * _polynomial(_P, y) / _polynomial(_Q, y)
  sign = bits << 31
  return lax.bitcast_convert_type(
      lax.bitcast_convert_type(z, jnp.uint32) | sign, jnp.float32)


_LOG = (-2.0000064, 1.0000393, -0.6660660, 0.4976268, -0.4120935, 0.3780396,
        -0.2365496)  # of -2 ln(1 + m) / m
_P = (0.6271003, 0.6916010, 0.5510004, 0.1647054)
_Q = (1.0, 1.1099032, 1.1097076, 0.5660853, 0.1643640)


def _polynomial(coefs, x):
  """Horner's rule, constant coefficient first."""
  total = np.float32(coefs[-1])
  for c in coefs[-2::-1]:
    total = total * x + np.float32(c)
  return total


def add(w: jax.Array, coefs: jax.Array, s: Stream, *, distribution: str,
        generator: str) -> jax.Array:
  r"""``w + sum_j coefs[j] * z_j`` in float32 (float64 for float64 weights).

  Args:
    w: a block of weights.
    coefs: float32 [pairs], or [pairs, ...] that w's shape broadcasts with.
    s: the stream of the block.
    distribution: one of `DISTRIBUTIONS`.
    generator: one of `GENERATORS`.
  """
  start = w.astype(jnp.promote_types(jnp.float32, w.dtype))
  return _sum(start, w, coefs, s, distribution, generator)


def combination(like: jax.Array, coefs: jax.Array, s: Stream, *,
                distribution: str, generator: str) -> jax.Array:
  """``sum_j coefs[j] * z_j`` in float32 for a block shaped ``like`` this."""
  return jnp.broadcast_to(
      _sum(None, like, coefs, s, distribution, generator), like.shape)


def _sum(start, like, coefs, s, distribution, generator):
  def term(j):
    bits = words(s, j, like, generator)
    return coefs[j] * from_bits(bits, distribution, generator)
  n, first = coefs.shape[0], 0 if start is not None else 1
  total = term(0) if start is None else start
  if n <= _UNROLLED:  # fuses: no sum of a leaf's size is kept
    for j in range(first, n):
      total = total + term(j)
  else:
    total = lax.fori_loop(first, n, lambda j, total: total + term(j), total)
  if s.there is None:
    return total
  return jnp.where(s.there, total, 0 if start is None else start)


def stochastic_round(x: jax.Array, dtype, bits: jax.Array) -> jax.Array:
  """Rounds float32 to a narrower float so that the expectation is ``x``.

  Of the two neighbours of ``x`` the farther is taken with probability equal
  to its closeness (Connolly, Higham and Mary, 2021, "Stochastic rounding").

  Args:
    x: float32.
    dtype: bfloat16, whose 16 lost bits ``bits`` decide about exactly, or
      float16, where the probability has 24 bits.
    bits: uint32 words of x's shape, uniform and independent of x.
  """
  if dtype == jnp.bfloat16:  # float32 cut short: a carry out of the part cut
    word = lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 16)
    cut = lax.bitcast_convert_type(word & _U32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(dtype)
  near = x.astype(dtype)
  error = x - near.astype(jnp.float32)
  toward = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(dtype)
  far = lax.nextafter(near, toward)
  gap = jnp.abs(far.astype(jnp.float32) - near.astype(jnp.float32))
  unit = (bits >> 8).astype(jnp.float32) * np.float32(2**-24)
  use_far = (unit * gap < jnp.abs(error)) & jnp.isfinite(far)
  return jnp.where(use_far, far, near)
