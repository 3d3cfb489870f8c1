r"""What z is: its distribution, its generator, where it is not zero.

A `Directions` says all that there is to say of a direction but its key, and
nothing else does. `Draws` are one leaf's share of a displacement, or a view of
it, to be added to weights where they are used.
"""

from collections import OrderedDict
from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax import _noise, _paths, _streams

_U32 = jnp.uint32
_AT_ONCE = 2**20  # elements of terms that are made at once


class Displacement(NamedTuple):
  r"""The vector :math:`\sum_{j=1}^n c_j z(key_j)`, as large as the model.

  It is never stored: a pytree of two arrays, to be scanned, joined, kept or
  sent. A single key and number are n = 1.
  """

  keys: jax.Array  # typed keys [n]
  # float32 [n]; or {regular expression: [n]}, by the first that is found in a
  # leaf's path: an OrderedDict, since JAX sorts the keys of a dict.
  coefs: jax.Array | OrderedDict

  def times(self, factors) -> 'Displacement':
    """With each term multiplied by a factor [n], or an OrderedDict of them."""
    return self._replace(coefs=jax.tree.map(lambda f: self.coefs * f, factors))

  def joined(self, other: 'Displacement') -> 'Displacement':
    """The sum of both."""
    return jax.tree.map(lambda a, b: jnp.concatenate(
        [jnp.reshape(a, -1), jnp.reshape(b, -1)]), self, other)

  def after(self, value: jax.Array) -> 'Displacement':
    """With keys that depend on ``value`` for the compiler: it would otherwise
    find the same z in what came before and keep it, as large as the model."""
    words = jax.random.key_data(self.keys)
    words = jnp.where(value > jnp.float32(3e38), words ^ _U32(1), words)
    return self._replace(keys=jax.random.wrap_key_data(
        words, impl=jax.random.key_impl(self.keys)))


@dataclasses.dataclass(frozen=True)
class Directions:
  """What z is, as a function of a key; base of the kinds of it.

  Attributes:
    generator: 'hash32', cheap and tested (benchmarks/results/noise.md); or
      'threefry2x32', with which draws are, bit for bit, those of `jax.random`.
    mask: where z is not 0: None (every floating-point leaf), a tree or prefix
      tree of bools (or, for elements, bool arrays of the leaves' shapes), a
      function from params to one, or a regular expression that is searched for
      in the leaves' paths. Leaves without z are neither perturbed nor updated.
    stacked: a mask of the leaves whose first axis is that of layers, each with
      a key of its own; None to tell by the names (`mezo_jax._paths.locate`).

  Raises:
    ValueError: for an unknown generator.
  """

  generator: str = 'hash32'
  _: dataclasses.KW_ONLY
  mask: Any = None
  stacked: Any = None

  unrolled: ClassVar[int] = 8  # terms that are added in one pass
  dear: ClassVar[bool] = False  # cost of a draw: better kept than made again

  def __post_init__(self):
    if self.generator not in _noise.GENERATORS:
      raise ValueError(f'generator must be one of {_noise.GENERATORS}, got '
                       f'{self.generator!r}.')

  def draw(self, bits: jax.Array) -> jax.Array:
    """float32 draws of mean 0 and variance 1 from uint32 words."""
    raise NotImplementedError

  def takes(self, leaf) -> bool:
    """Whether z has a part for a leaf of this dtype."""
    return _paths.is_floating(leaf)

  def of_leaf(self, stream: _noise.Stream, coefs, shape) -> 'Draws':
    """The draws of a leaf of this shape."""
    del shape
    return Draws((stream,), coefs, self.bare())

  def z(self, streams, j, like: jax.Array) -> jax.Array:
    """Direction j of the streams of a block, in a shape that broadcasts to
    that of ``like``."""
    return self.draw(_noise.words(streams[0], j, like, self.generator))

  def at_once(self, coefs: jax.Array) -> Callable | None:
    """``(streams, coefs, start, like) -> start + sum``, a way to add all terms
    that costs a TPU less than one after the other; None where there is none."""
    return None

  def plain(self, params, keys) -> tuple['Directions', Displacement]:
    """z(key_j) of keys [n] as the terms of a displacement, in directions whose
    elements depend on no others."""
    del params
    return self, Displacement(keys, jnp.ones(keys.shape, jnp.float32))

  def selected(self, params):
    """Where z is not 0: a tree of bools, or arrays of them for elements."""
    return _paths.selected(params, self.mask, self.takes)

  def bare(self) -> 'Directions':
    """Without what is said of leaves: hashable, and the same for each."""
    return dataclasses.replace(self, mask=None, stacked=None)


class Normal(Directions):
  """Elements are independent standard normal draws (MeZO, Algorithm 1)."""

  dear = True

  def draw(self, bits):
    if self.generator == 'hash32':
      return _quantile(bits)
    one, low = np.float32(1), np.nextafter(np.float32(-1), np.float32(0))
    unit = lax.bitcast_convert_type(
        (bits >> 9) | _U32(0x3F800000), jnp.float32) - one
    uniform = jnp.maximum(low, unit * (one - low) + low)
    return np.float32(np.sqrt(2)) * lax.erf_inv(uniform)


class Rademacher(Directions):
  """Elements are 1 or -1, independently, with probability 1/2 each."""

  def draw(self, bits):
    one = (bits & _U32(0x80000000)) | _U32(0x3F800000)  # a sign and 1.0
    return lax.bitcast_convert_type(one, jnp.float32)


class Sphere(Directions):
  r"""Uniform on the sphere of radius :math:`\sqrt d`: normal draws, scaled.

  One more pass of noise for each key.
  """

  def plain(self, params, keys):
    normal = Normal(self.generator, mask=self.mask, stacked=self.stacked)
    def factor(key):
      length, size = norm(params, key, normal)
      return jnp.sqrt(jnp.float32(size)) / length
    factors = lax.map(factor, keys)
    return normal, Displacement(keys, factors).after(factors[0])


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


# --- of leaves --------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('streams', 'coefs'), meta_fields=('directions',))
@dataclasses.dataclass(frozen=True)
class Draws:
  """One leaf's ``sum_j coefs[j] * z_j``, or a view of it: nothing is drawn.

  A view (rows by index, a run, a transpose, a reshape) is of the same draws:
  see `mezo_jax._streams`. The methods that make one return None where they
  cannot.
  """

  # Of a block: of its elements; or of its rows and its columns.
  streams: tuple[_noise.Stream, ...]
  coefs: jax.Array  # float32 [n], or [n, ...] that broadcasts with the block
  directions: Directions  # bare

  @property
  def there(self) -> jax.Array | None:
    """Where z is not 0; None for everywhere."""
    return self.streams[0].there

  def add(self, w: jax.Array) -> jax.Array:
    """``w + sum`` in float32 (float64 for float64 weights)."""
    return self._sum(w.astype(jnp.promote_types(jnp.float32, w.dtype)), w)

  def built(self, like: jax.Array) -> jax.Array:
    """``sum`` in float32, in the shape of ``like``."""
    return jnp.broadcast_to(self._sum(None, like), like.shape)

  def _sum(self, start, like):
    plain = lambda self, start, like: self._by_terms(start, like)
    at_once = self.directions.at_once(self.coefs)
    total = plain(self, start, like) if at_once is None else (
        lax.platform_dependent(self, start, like, default=plain,
                               tpu=lambda self, start, like: at_once(
                                   self.streams, self.coefs, start, like)))
    if self.there is None:
      return total
    return jnp.where(self.there, total, 0 if start is None else start)

  def term(self, j, like):
    """``coefs[j] * z_j`` in float32."""
    return self.coefs[j] * self.directions.z(self.streams, j, like)

  def _by_terms(self, start, like):
    term = lambda j: self.term(j, like)
    n, first = self.coefs.shape[0], 0 if start is not None else 1
    total = term(0) if start is None else start
    if n <= self.directions.unrolled:  # fuses: no sum of a leaf's size is kept
      for j in range(first, n):
        total = total + term(j)
    elif n * like.size <= _AT_ONCE:  # rounds of a loop would cost more
      terms = jnp.sum(jax.vmap(term)(jnp.arange(first, n)), 0)
      total = total + terms
    else:
      total = lax.fori_loop(first, n, lambda j, total: total + term(j), total)
    return total

  def on(self, move) -> 'Draws | None':
    """With each stream moved, if it can be."""
    streams = tuple(map(move, self.streams))
    if any(s is None for s in streams):
      return None
    return dataclasses.replace(self, streams=streams)

  def take(self, axis, index):
    return self.on(lambda s: _streams.take(s, axis, index))

  def window(self, starts, sizes, steps):
    return self.on(lambda s: _streams.window(s, starts, sizes, steps))

  def transpose(self, order):
    return self.on(lambda s: _streams.transpose(s, order))

  def reshape(self, old, new):
    return self.on(lambda s: _streams.reshape(s, old, new))

  def where(self, there):
    """Zero elsewhere."""
    if self.there is not None:
      there = there & self.there
    first, *rest = self.streams
    return dataclasses.replace(self, streams=(
        dataclasses.replace(first, there=there), *rest))

  def rows(self, length):
    """Of each entry of the first axis: ``along, of_row``, a list of arrays to
    scan over, and a function from those of one entry to its draws."""
    arrays, tree = jax.tree.flatten(self.on(
        lambda s: _streams.spread(s, 0, length)).streams)
    varies = [a.shape[0] == length for a in arrays]
    shared = [a[0] for a, v in zip(arrays, varies) if not v]

    def of_row(along):
      along, rest = iter(along), iter(shared)
      streams = jax.tree.unflatten(
          tree, [next(along if v else rest) for v in varies])
      return dataclasses.replace(self, streams=tuple(
          dataclasses.replace(s, strides=s.strides[1:]) for s in streams))

    return [a for a, v in zip(arrays, varies) if v], of_row

  def keys(self) -> list:
    return [s.keys for s in self.streams]

  def tied(self, keys) -> 'Draws':
    """With the same keys, as the compiler is to see them."""
    return dataclasses.replace(self, streams=tuple(
        dataclasses.replace(s, keys=k) for s, k in zip(self.streams, keys)))

  def lies(self) -> list[int]:
    """The block's axes in the order in which the leaf has them."""
    steps = [*zip(*(s.strides for s in self.streams))]  # rows before columns
    return sorted(range(len(steps)), key=lambda a: (
        any(steps[a]), *(-step for step in steps[a])))

  def is_stack(self) -> bool:
    """Whether a leaf has a key for each entry of its first axis."""
    keys = self.streams[0].keys
    return keys.ndim > 2 and keys.shape[0] > 1


def stack(several: list[Draws]) -> Draws:
  """The draws of blocks of one shape as those of one, with a new first axis."""
  streams, coefs = jax.tree.map(
      lambda *x: jnp.stack(x), *((x.streams, x.coefs) for x in several))
  streams = tuple(dataclasses.replace(s, strides=(0, *s.strides))
                  for s in streams)
  axes = len(streams[0].strides) - 1
  return dataclasses.replace(
      several[0], streams=streams,
      coefs=coefs.T.reshape(coefs.shape[::-1] + (1,) * axes))


def of_leaves(params, displacement: Displacement, directions: Directions
              ) -> list[tuple[str, Any, Draws | None]]:
  """Paths, leaves and their draws; None where z is 0.

  Raises:
    ValueError: for what is no displacement, or a mask that does not fit.
  """
  keys, coefs = _arrays(displacement)
  directions, z = directions.plain(params, keys)
  keys, coefs = z.times(coefs)
  leaves = _paths.named_leaves(params)
  used = jax.tree.leaves(directions.selected(params))
  stacks = _paths.stacked(params, directions.stacked)
  streams = _streams.of_leaves(keys, {
      path: (jnp.shape(x), is_stack)
      for (path, x), use, is_stack in zip(leaves, used, stacks)
      if use is not False})

  def draws(path, x, use):
    if use is False:
      return None
    c = coefs
    if isinstance(c, OrderedDict):
      c = c[_paths.group_of(path, c)]
    out = directions.of_leaf(streams[path], c, jnp.shape(x))
    return out if use is True else out.where(use)

  return [(path, x, draws(path, x, use))
          for (path, x), use in zip(leaves, used)]


def _arrays(displacement) -> tuple[jax.Array, jax.Array | dict]:
  """Keys and coefficients [n]."""
  if not isinstance(displacement, Displacement):
    raise ValueError(
        'a displacement must be a mezo_jax.Displacement(keys, coefs), got a '
        f'{type(displacement).__name__}.')
  if type(displacement.coefs) is dict:
    raise ValueError('coefs of groups must be a collections.OrderedDict: their '
                     'order counts, and JAX sorts the keys of a dict.')
  keys = _noise.as_keys(displacement.keys)
  coefs = jax.tree.map(lambda c: jnp.asarray(c, jnp.float32).reshape(-1),
                       displacement.coefs)
  sizes = {c.shape[0] for c in jax.tree.leaves(coefs)}
  if not keys.shape[0] or sizes != {keys.shape[0]}:
    raise ValueError(
        f'a displacement needs at least one key and a coefficient for each, '
        f'got {keys.shape[0]} and {sorted(sizes)}.')
  return keys, coefs


def norm(params, key: jax.Array, directions: Directions
         ) -> tuple[jax.Array, int]:
  """(‖z(key)‖ in float32, number of elements) over the selected leaves."""
  squares, size = [], 0
  for _, x, draws in of_leaves(params, Displacement(key, 1.0), directions):
    if draws is not None:
      squares.append(jnp.sum(jnp.square(draws.built(jnp.asarray(x)))))
      there = draws.there
      size += jnp.size(x) if there is None else jnp.sum(there)
  return jnp.sqrt(sum(squares)), size
