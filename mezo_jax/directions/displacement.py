r"""Displacements Σ c·z(key), and the share of each leaf, `Draws`.

`Draws` are one leaf's share of a displacement, or a view of it. They are added
to weights where the weights are used. Their `Directions` are the distribution
of z.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments, dtypes, paths, sharding, views
from mezo_jax.core.quantized import Codes, is_codes
from mezo_jax.directions import noise
from mezo_jax.directions import streams as streams_lib

_U32 = jnp.uint32
_ROUNDED = np.uint32(0x3C6EF372)  # makes rounding bits independent of draws
_AT_ONCE = 2**20  # elements of all terms; above, a loop adds them


class Displacement(NamedTuple):
  r"""The vector :math:`\sum_{j=1}^n c_j z(key_j)`, as large as the model.

  It is never stored. It is a pytree of two small arrays, which can be scanned,
  joined, saved or sent. A single key and number stand for n = 1.
  """

  keys: jax.Array  # typed keys [n]
  # float32 [n]; or {regular expression: [n]}, by the first that is found in a
  # leaf's path: an OrderedDict, since JAX sorts the keys of a dict.
  coefs: jax.typing.ArrayLike | OrderedDict[str, Any]

  def times(self, factors: Any) -> 'Displacement':
    """Returns it with terms multiplied by factors [n], or an OrderedDict of
    them."""
    return self._replace(coefs=jax.tree.map(lambda f: self.coefs * f, factors))

  def joined(self, other: 'Displacement') -> 'Displacement':
    """Returns the sum of both."""
    return jax.tree.map(lambda a, b: jnp.concatenate(
        [jnp.reshape(a, -1), jnp.reshape(b, -1)]), self, other)

  def after(self, value: jax.Array) -> 'Displacement':
    """Returns it with keys that depend on ``value`` for the compiler.

    The compiler would otherwise find the same z in an earlier evaluation and
    keep it, as large as the model. The keys are unchanged unless the value is
    above 3e38.
    """
    words = jax.random.key_data(self.keys)
    words = jnp.where(value > jnp.float32(3e38), words ^ _U32(1), words)
    return self._replace(keys=jax.random.wrap_key_data(
        words, impl=jax.random.key_impl(self.keys)))


class Multiplier(NamedTuple):
  r"""Multiplies the elements of z, or keeps only some of them.

  Attributes:
    values: A number s, or a tree like the params of numbers, of arrays [L] for
      the layers of stacked leaves, or of arrays of the leaves' shapes. The
      direction is :math:`s \odot z`.
    keeps: ``(w, values) -> bool``, of the weights that z is added to. If it is
      given, z is kept where it is True and is 0 elsewhere, and values are not
      factors. It must be a function that is defined once, since programs are
      cached by it.
  """

  values: Any
  keeps: Callable[[jax.Array, jax.Array], jax.Array] | None = None


# --- of leaves --------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('streams', 'coefs'), meta_fields=('directions',))
@dataclasses.dataclass(frozen=True)
class Draws:
  """Stands for ``sum_j coefs[j] * z_j`` of one leaf, or of a view of it.

  Nothing is drawn until `add` or `built` is called.
  """

  # One stream for the elements, or two: for the rows and for the columns.
  streams: tuple[noise.Stream, ...]
  coefs: jax.Array  # float32 [n], or [n, ...] that broadcasts with the block
  directions: Any  # `Directions`, bare

  @property
  def is_everywhere(self) -> bool:
    """Returns whether z is neither masked nor multiplied."""
    first = self.streams[0]
    return first.there is None and first.values is None

  @property
  def _keeps(self) -> Callable | None:
    multiplier = self.directions.multiplier
    return None if multiplier is None else multiplier.keeps

  @property
  def _factors(self) -> jax.Array | None:
    """Factors of the elements of z, if there are any."""
    return None if self._keeps else self.streams[0].values

  def masked(self, w: jax.Array, x: jax.Array, other: Any) -> jax.Array:
    """Returns ``x`` where z is kept next to weights w, else ``other``."""
    first, keeps = self.streams[0], self._keeps
    for there in (
        first.there, None if keeps is None else keeps(w, first.values)):
      if there is not None:
        x = jnp.where(there, x, other)
    return x

  def scaled_by(self, x: jax.Array) -> jax.Array:
    """Returns ``x`` times the factors of z."""
    return x if self._factors is None else x * self._factors

  def add(self, w: jax.Array | Codes) -> jax.Array:
    """Returns ``w + sum`` in float32 (float64 for float64 weights). With
    ``on_grid``, quantised weights move by whole steps of their grid."""
    if is_codes(w):
      if self.directions.on_grid and len(self.coefs):
        steps = w.steps(self.built(w), self._bits(w.astype(jnp.float32)))
        return w.at(w.integers() + steps)
      w = w.astype(jnp.float32)
    return self._sum(w.astype(dtypes.wide(w.dtype)), w)

  def built(self, like: jax.Array | Codes) -> jax.Array:
    """Returns ``sum`` in float32, in the shape and sharding of ``like``."""
    like = like.astype(jnp.float32) if is_codes(like) else like
    total = jnp.broadcast_to(self._sum(None, like), like.shape)
    return sharding.split_as(total, like)

  def _sum(self, start, like):
    plain = lambda self, start, like: self._by_terms(start, like)
    at_once = self.directions.at_once(self.coefs)
    if self._factors is not None or sharding.is_explicit(like):
      # Terms are scaled one by one; and a product of factors would be whole on
      # each device where shardings are part of types.
      at_once = None
    total = plain(self, start, like) if at_once is None else (
        lax.platform_dependent(self, start, like, default=plain,
                               tpu=lambda self, start, like: at_once(
                                   self.streams, self.coefs, start, like)))
    return self.masked(like, total, 0 if start is None else start)

  def _bits(self, like) -> jax.Array:
    """Returns random words that are independent of the draws."""
    s = self.streams[0]
    return noise.words(
        dataclasses.replace(s, keys=s.keys ^ _ROUNDED), 0, like, 'rounding')

  def term(self, j: jax.Array | int, like: jax.Array) -> jax.Array:
    """Returns ``coefs[j] * z_j`` in float32."""
    return self._scaled(self.coefs[j], self.directions.z(self.streams, j, like))

  def _scaled(self, c, z):
    return self.scaled_by(c * z)

  def _by_terms(self, start, like):
    n = self.coefs.shape[0]
    if n <= self.directions.unrolled:  # fuses: no sum of a leaf's size is kept
      terms = map(self._scaled, self.coefs,
                  self.directions.each(self.streams, n, like))
      return sum(terms, next(terms) if start is None else start)
    term = lambda j: self.term(j, like)
    first, total = (1, term(0)) if start is None else (0, start)
    if n * like.size <= _AT_ONCE:  # rounds of a loop would cost more
      total = total + jnp.sum(self._each_term(first, like), 0)
    else:
      total = lax.fori_loop(first, n, lambda j, total: total + term(j), total)
    return total

  def _each_term(self, first: int, like) -> jax.Array:
    """Returns the terms of directions ``first`` and later along a new axis.

    Terms are mapped over, because TPUs are slow at looking up keys.
    """
    def one(keys, cores, c):
      streams = [dataclasses.replace(
          s, keys=key[..., None, :],
          core=None if core is None else core[..., None, :, :])
                 for s, key, core in zip(self.streams, keys, cores)]
      return dataclasses.replace(
          self, streams=tuple(streams), coefs=c[None]).term(0, like)
    rest = functools.partial(lax.slice_in_dim, start_index=first,
                             limit_index=None)
    return jax.vmap(one, (-2, -3, 0))(
        [rest(s.keys, axis=-2) for s in self.streams],
        [None if s.core is None else rest(s.core, axis=-3)
         for s in self.streams], rest(self.coefs, axis=0))

  def viewed(self, view: views.View, shape: Sequence[int]) -> 'Draws | None':
    """Returns the draws of a view of a block of this shape, if there are."""
    if isinstance(view, views.Keep):
      return self.where(view.there)
    streams = tuple(
        streams_lib.viewed(s, view, shape) for s in self.streams)
    if any(s is None for s in streams):
      return None
    return dataclasses.replace(self, streams=streams)

  def where(self, there: jax.Array) -> 'Draws':
    """Returns the same draws where ``there`` is True, and 0 elsewhere."""
    if self.streams[0].there is not None:
      there = there & self.streams[0].there
    return self._first(there=there)

  def multiplied(self, values: jax.Array) -> 'Draws':
    """Returns the draws with the values of a `Multiplier`, which broadcast with
    the block."""
    if self._keeps is None and values.size == 1:
      return dataclasses.replace(self, coefs=self.coefs * values.reshape(()))
    if self._keeps is None:
      values = values.astype(jnp.float32)
    return self._first(values=values)

  def _first(self, **changes):
    first, *rest = self.streams
    return dataclasses.replace(self, streams=(
        dataclasses.replace(first, **changes), *rest))

  def rows(self, length: int) -> tuple[list[jax.Array], Callable[..., Any]]:
    """Returns ``along, of_row``: a list of arrays to scan over, and a function
    from their entries for one index of the first axis to its draws."""
    arrays, tree = jax.tree.flatten(tuple(
        streams_lib.spread(s, 0, length) for s in self.streams))
    varies = [a.shape[0] == length for a in arrays]
    shared = [a[0] for a, v in zip(arrays, varies) if not v]

    def of_row(along):
      along, rest = iter(along), iter(shared)
      streams = jax.tree.unflatten(
          tree, [next(along if v else rest) for v in varies])
      return dataclasses.replace(self, streams=tuple(
          dataclasses.replace(s, strides=s.strides[1:]) for s in streams))

    return [a for a, v in zip(arrays, varies) if v], of_row

  def keys(self) -> list[Any]:
    return [s.keys for s in self.streams]

  def tied(self, keys: jax.Array) -> 'Draws':
    """Returns the draws with these keys, which are the same behind a barrier of
    the compiler."""
    return dataclasses.replace(self, streams=tuple(
        dataclasses.replace(s, keys=k) for s, k in zip(self.streams, keys)))

  def lies(self) -> list[int]:
    """Returns the block's axes in the order in which the leaf has them."""
    steps = [*zip(*(s.strides for s in self.streams))]  # rows before columns
    return sorted(range(len(steps)), key=lambda a: (
        any(steps[a]), *(-step for step in steps[a])))

  def is_stack(self) -> bool:
    """Returns whether a leaf has several keys along its first axis."""
    keys = self.streams[0].keys
    return keys.ndim > 2 and keys.shape[0] > 1


def stack(several: list[Draws]) -> Draws:
  """Returns draws of blocks of one shape as draws of their stack."""
  streams, coefs = jax.tree.map(
      lambda *x: jnp.stack(x), *((x.streams, x.coefs) for x in several))
  streams = tuple(dataclasses.replace(s, strides=(0, *s.strides))
                  for s in streams)
  axes = len(streams[0].strides) - 1
  return dataclasses.replace(
      several[0], streams=streams,
      coefs=coefs.T.reshape(coefs.shape[::-1] + (1,) * axes))


def of_leaves(params: Any, displacement: Displacement, directions: Any
              ) -> list[tuple[str, Any, Draws | None]]:
  """Returns paths, leaves and their draws, which are None where z is 0.

  Raises:
    ValueError: For something that is not a displacement, or a mask that does
      not fit.
  """
  keys, coefs = _arrays(displacement)
  leaves = paths.named_leaves(params)
  used = jax.tree.leaves(directions.selected(params))
  stacks = paths.stacked(params, directions.stacked)
  shapes = {
      path: (paths.shape_of(x), is_stack) for (path, x), use, is_stack in zip(
          leaves, used, stacks) if use is not False}
  streams = streams_lib.of_leaves(keys, shapes)
  others = directions.of_columns(keys)
  columns = {} if others is None else streams_lib.of_leaves(others, shapes)

  multiplier = directions.multiplier
  values = [None] * len(leaves)
  if multiplier is not None:
    values = _of_each('the values of multiplier', multiplier.values, leaves)

  def draws(path, x, use, value):
    if use is False:
      return None
    c = coefs
    if isinstance(c, OrderedDict):
      c = c[paths.group_of(path, c)]
    out = directions.of_leaf(
        streams[path], c, paths.shape_of(x), columns.get(path))
    if use is not True:
      out = out.where(use)
    return out if multiplier is None else out.multiplied(_of_block(value, x))

  return [(path, x, draws(path, x, use, value))
          for (path, x), use, value in zip(leaves, used, values)]


def _of_each(name: str, values, leaves: list) -> list:
  """Returns the value of each leaf, from a number or a tree of them."""
  if isinstance(values, (int, float, np.generic)):
    return [values] * len(leaves)
  values = jax.tree.leaves(values)
  for value in values:
    arguments.array(name, value)
  if len(values) != len(leaves):
    raise ValueError(f'{name} are of {len(values)} leaves, but the params have '
                     f'{len(leaves)}: give one number, or one for each leaf.')
  return values


def _of_block(value, x) -> jax.Array:
  """Returns a value of a leaf with as many axes as the leaf has."""
  value, axes = jnp.asarray(value), len(paths.shape_of(x))
  return value.reshape(value.shape + (1,) * (axes - value.ndim))


def _arrays(displacement) -> tuple[jax.Array, jax.Array | dict]:
  """Returns keys and coefficients [n]."""
  if not isinstance(displacement, Displacement):
    raise ValueError(
        'displacement must be a mezo_jax.Displacement(keys, coefs), got a '
        f'{type(displacement).__name__}.')
  if type(displacement.coefs) is dict:
    raise ValueError('coefs of groups must be a collections.OrderedDict: their '
                     'order counts, and JAX sorts the keys of a dict.')
  keys = noise.as_keys(displacement.keys)
  coefs = jax.tree.map(
      lambda c: arguments.array(
          'coefs of a displacement', c).astype(jnp.float32).reshape(-1),
      displacement.coefs)
  sizes = {c.shape[0] for c in jax.tree.leaves(coefs)}
  if not keys.shape[0] or sizes != {keys.shape[0]}:
    raise ValueError(
        f'a displacement needs at least one key and a coefficient for each, '
        f'got {keys.shape[0]} and {sorted(sizes)}.')
  return keys, coefs
