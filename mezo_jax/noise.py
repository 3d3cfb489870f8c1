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

import math
import re
from typing import NamedTuple
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

GENERATORS = ('threefry2x32', 'hash32')
DISTRIBUTIONS = ('normal', 'rademacher')

_LAYERS = re.compile(r'(?i)(.*(?:layers?|blocks?)|h)(?:_(\d+))?')
_U32 = jnp.uint32
_UNROLLED = 8  # directions


class Stream(NamedTuple):
  """Where a block of a leaf's draws lies: key and first counter, per row.

  The block has shape ``[*lead, *inner]``; element ``j`` (row-major) of the
  inner part of a row is draw number ``2**32 * hi + lo + j`` of that row's keys.
  ``pairs`` directions can be held at once (a displacement has several).
  """

  keys: jax.Array  # uint32 [*lead, pairs, 2]
  hi: jax.Array | None  # uint32 [*lead]; None where all counters fit in lo
  lo: jax.Array  # uint32 [*lead]


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


def path_str(path) -> str:
  """``'layers/attn/q/kernel'`` from a jax key path, Linen's or NNX's alike."""
  parts = [str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k))))
           for k in path]
  if len(parts) > 1 and parts[-1] in ('value', 'raw_value'):  # an NNX Variable
    parts = parts[:-1]
  return '/'.join(parts)


def locate(path: str) -> tuple[str, int | None, bool]:
  """Splits a path into (path without layer number, layer, stacked?).

  The first component named ``[...]layer[s]``, ``[...]block[s]`` or ``h``
  decides: followed by a number (``layers_3``, ``layers/3``) the leaf is that
  layer; without one its leading axis is the layer axis. ``layers/3/q/kernel``
  of shape [a, b] is thus row 3 of ``layers/q/kernel`` of shape [L, a, b]. Any
  other path has neither; its leaf is one block, however it is scanned.
  """
  parts = path.split('/')
  for i, part in enumerate(parts[:-1]):
    match = _LAYERS.fullmatch(part)
    if not match:
      continue
    name, number = match.groups()
    if number is not None:
      return '/'.join([*parts[:i], name, *parts[i + 1:]]), int(number), False
    if parts[i + 1].isdigit():
      return '/'.join(parts[:i + 1] + parts[i + 2:]), int(parts[i + 1]), False
    return path, None, True
  return path, None, False


def leaf_key(key: jax.Array, path: str) -> jax.Array:
  """The key of one leaf; of one layer where the path has a layer number."""
  name, layer, _ = locate(path)
  key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
  return key if layer is None else jax.random.fold_in(key, layer)


def check_paths(paths) -> None:
  """Raises if two leaves would draw the same noise (a collision of crc32)."""
  seen = {}
  for path in paths:
    name, layer, _ = locate(path)
    other = seen.setdefault((zlib.crc32(name.encode()), layer), path)
    if other != path:
      raise ValueError(
          f'Parameters {other!r} and {path!r} would draw the same noise '
          '(their names hash alike); rename one of them.')


# --- streams: random access to a leaf's draws -------------------------------


def stream(keys: jax.Array, path: str, shape: tuple[int, ...]) -> Stream:
  """The stream of a whole leaf.

  Args:
    keys: typed keys [pairs], one a direction.
    path: the leaf's path, as `path_str` gives it.
    shape: the leaf's shape.

  Returns:
    A stream with lead ``[L]`` for a stacked leaf, ``[]`` for any other, or
    ``[shape[0]]`` where more than 2**32 elements make rows necessary.
  """
  _, _, stacked = locate(path)
  keys = jax.vmap(lambda k: leaf_key(k, path))(keys)
  if stacked and shape:
    layers = jnp.arange(shape[0], dtype=jnp.uint32)
    keys = jax.vmap(lambda l: jax.vmap(
        lambda k: jax.random.fold_in(k, l))(keys))(layers)
  keys = jax.random.key_data(keys)
  zero = jnp.zeros(keys.shape[:-2], jnp.uint32)
  inner = shape[zero.ndim:]
  whole = Stream(keys, zero if math.prod(inner) > 2**32 else None, zero)
  while math.prod(inner) > 2**32:
    axis, index = whole.lo.ndim, jnp.arange(inner[0], dtype=jnp.uint32)
    whole = Stream(*(jnp.expand_dims(x, axis) for x in whole))
    whole, inner = _offset(whole, index, math.prod(inner[1:])), inner[1:]
  return whole


def rows(s: Stream, inner: tuple[int, ...], index: jax.Array) -> Stream:
  """The stream of the rows ``index`` of a block's axis 0.

  Args:
    s: the stream of the block.
    inner: the shape of that part of the block that follows the lead axes.
    index: integers of any shape; they become the first lead axes.
  """
  if s.lo.ndim:
    return jax.tree.map(lambda x: x[index], s)
  return _offset(s, index.astype(jnp.uint32), math.prod(inner[1:]))


def _offset(s: Stream, index: jax.Array, size: int) -> Stream:
  """Moves each row's first counter by ``index * size`` (64-bit if need be)."""
  if s.hi is None:
    hi, lo = None, s.lo + index * _U32(size)
  else:
    hi, lo = _mul_wide(index, size)
    lo = s.lo + lo
    hi = s.hi + hi + (lo < s.lo).astype(jnp.uint32)
  return Stream(jnp.broadcast_to(s.keys, lo.shape + s.keys.shape[-2:]), hi, lo)


def _mul_wide(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
  """(high, low) words of the 64-bit product of uint32 ``a`` and an int."""
  if b >= 2**32:
    hi, lo = _mul_wide(a, b % 2**32)
    return hi + a * _U32(b >> 32), lo
  b0, b1, mask = _U32(b & 0xFFFF), _U32(b >> 16), _U32(0xFFFF)
  a0, a1 = a & mask, a >> 16
  mid = a1 * b0 + ((a0 * b0) >> 16)
  low_mid = (mid & mask) + a0 * b1
  return a1 * b1 + (mid >> 16) + (low_mid >> 16), a * _U32(b)


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
  lead = s.lo.ndim
  inner = like.shape[lead:]
  wide = lambda x: x.reshape(x.shape + (1,) * len(inner))
  place = _explicit(like, lead)

  # Counters start from lo plus a word of the key: XLA would share one index, as
  # large as a layer, between the layers, and keep it.
  def lo_plus(word):
    total = wide(s.lo) + word
    for axis in range(len(inner)):
      total = total + _U32(math.prod(inner[axis + 1:])) * lax.broadcasted_iota(
          jnp.uint32, inner, axis, out_sharding=place)
    return total

  k0, k1 = wide(s.keys[..., pair, 0]), wide(s.keys[..., pair, 1])
  hi = jnp.zeros((), jnp.uint32)
  if s.hi is not None:
    hi = wide(s.hi) + (lo_plus(_U32(0)) < wide(s.lo)).astype(jnp.uint32)
  fn = {'threefry2x32': _threefry2x32, 'hash32': _hash32,
        'rounding': _rounding}[generator]
  return fn(k0, k1, hi, lo_plus)


def _explicit(like: jax.Array, lead: int) -> jax.sharding.NamedSharding | None:
  """The sharding of a block's inner axes, if it is part of its type."""
  sharding = jax.typeof(like).sharding
  if not any(t == jax.sharding.AxisType.Explicit
             for t in sharding.mesh.axis_types):
    return None
  return sharding.update(spec=jax.P(*sharding.spec[lead:]))


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
    coefs: float32 [pairs].
    s: the stream of the block.
    distribution: one of `DISTRIBUTIONS`.
    generator: one of `GENERATORS`.
  """
  start = w.astype(jnp.promote_types(jnp.float32, w.dtype))
  return _sum(start, w, coefs, s, distribution, generator)


def combination(like: jax.Array, coefs: jax.Array, s: Stream, *,
                distribution: str, generator: str) -> jax.Array:
  """``sum_j coefs[j] * z_j`` in float32 for a block shaped ``like`` this."""
  return _sum(None, like, coefs, s, distribution, generator)


def _sum(start, like, coefs, s, distribution, generator):
  def term(j):
    bits = words(s, j, like, generator)
    return coefs[j] * from_bits(bits, distribution, generator)
  n, first = coefs.shape[0], 0 if start is not None else 1
  total = term(0) if start is None else start
  if n <= _UNROLLED:  # fuses: no sum of a leaf's size is kept
    for j in range(first, n):
      total = total + term(j)
    return total
  return lax.fori_loop(first, n, lambda j, total: total + term(j), total)


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
