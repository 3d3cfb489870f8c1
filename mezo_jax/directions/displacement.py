r"""Defines displacements Σ c·z(key), and `Draws`, their part in one leaf.

A `Displacement` represents a vector as large as the model by a few keys and
numbers. `of_leaves` splits it into `Draws`, one for each parameter leaf. A view
of a leaf (a slice, a transpose, ...) has `Draws`, too. The random numbers are
generated and added to weights only where the weights are used.
"""

from collections import OrderedDict
from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mezo_jax.core import arguments, dtypes, paths, sharding, views
from mezo_jax.core.quantized import is_codes, QuantizedArray
from mezo_jax.core.views import Shape
from mezo_jax.directions import noise
from mezo_jax.directions import streams as streams_lib

_U32 = jnp.uint32
# XORed into keys, so that the bits of stochastic rounding are independent of z.
_ROUNDED = np.uint32(0x3C6EF372)
# Largest number of elements, of all terms together, that are built as one array
# and summed. A loop adds more.
_AT_ONCE = 2**20


class Displacement(NamedTuple):
  r"""Represents a vector as large as the model by n keys and n numbers.

  .. math:: \sum_{j=1}^n c_j z(key_j)

  The vector itself is never stored. A displacement is a pytree of two small
  arrays, which can be scanned over, concatenated, saved or sent to another
  host. `perturbed` evaluates a function at displaced weights, and `displace`
  builds them.

  Attributes:
    keys: Typed keys [n], one for each direction. A single key or integer seed
      is accepted for n = 1.
    coefs: The coefficients c_j, float32 [n], or one number for n = 1. To give
      groups of leaves their own coefficients, pass an OrderedDict ``{regular
      expression: coefficients}``. A leaf has the coefficients of the first
      expression that is found in its path. A plain dict is not accepted,
      because JAX sorts its keys.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1, which regenerates z from
    a seed.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax
    >>> step = mezo_jax.Displacement(
    ...     jax.random.split(jax.random.key(0), 2), jnp.array([0.1, -0.1]))
    >>> mezo_jax.displace(jnp.ones(3), step).shape
    (3,)
  """

  keys: jax.Array
  coefs: jax.typing.ArrayLike | OrderedDict[str, Any]

  def times(self, factors: Any) -> 'Displacement':
    """Returns a displacement whose coefficients are multiplied by factors.

    Args:
      factors: A number, or an array [n]. An OrderedDict ``{regular expression:
        factors}`` gives groups of leaves their own coefficients; see ``coefs``.
    """
    return self._replace(coefs=jax.tree.map(lambda f: self.coefs * f, factors))

  def joined(self, other: 'Displacement') -> 'Displacement':
    """Returns the sum of two displacements, which has the terms of both."""
    return jax.tree.map(jnp.append, self, other)

  def after(self, value: jax.Array) -> 'Displacement':
    """Makes the keys depend on a value, so that z is drawn after it is known.

    Suppose that a program evaluates losses along z and then updates the weights
    along the same z. XLA recognises the common subexpression and keeps z in
    memory, which is as large as the model. If the keys depend on the loss, XLA
    has to regenerate z instead. The keys have other values only if ``value`` is
    above 3e38, that is, for a loss that has diverged.

    Args:
      value: A float32 scalar, such as a loss.
    """
    words = jax.random.key_data(self.keys)
    words = jnp.where(value > jnp.float32(3e38), words ^ _U32(1), words)
    return self._replace(keys=jax.random.wrap_key_data(
        words, impl=jax.random.key_impl(self.keys)))


class Multiplier(NamedTuple):
  r"""Scales the elements of z, or sets some of them to 0.

  With values s, the direction is one of

  .. math:: s \odot z \qquad \text{or} \qquad z \odot [\text{keeps}(w, s)].

  Attributes:
    values: The values s: one number, or a tree with the structure of the
      params. The leaves of the tree are numbers, arrays [L] for stacks of L
      layers, or arrays that have the shape of the param.
    keeps: A function ``(w, values) -> bools``, where w are the weights that z
      is added to. z is kept where the result is True and is 0 elsewhere, and
      the values are not used as factors. Compiled programs are cached by this
      function, so define it once, outside of any loop. Defaults to None, which
      uses the values as factors.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Appendix B.3, which scales z by layer.
    Liu et al., 2024, `Sparse MeZO <https://arxiv.org/abs/2402.15751>`_, which
    keeps z for small weights only.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax
    >>> half = mezo_jax.Normal(multiplier=mezo_jax.Multiplier(0.5))
    >>> step = mezo_jax.Displacement(jax.random.key(0), 1.0)
    >>> z = mezo_jax.direction(jnp.ones(3), step)
    >>> bool(jnp.allclose(mezo_jax.direction(jnp.ones(3), step, half), z / 2))
    True
  """

  values: Any
  keeps: Callable[[jax.Array, jax.Array], jax.Array] | None = None


# --- the part of a displacement in one leaf ---------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('streams', 'coefs'), meta_fields=('directions',))
@dataclasses.dataclass(frozen=True)
class Draws:
  """Represents ``sum_j coefs[j] * z_j`` for a block: a leaf or a view of one.

  Nothing is drawn until `add`, `built` or `term` is called.

  Attributes:
    streams: One stream, which locates the elements. Low-rank distributions have
      two: one for the rows of U and one for the rows of V in z = U Vᵀ.
    coefs: Coefficients of the directions, float32 [n], or [n, ...] with axes
      that broadcast with the block.
    directions: The distribution of z, without masks; see `Directions.bare`.
  """

  streams: tuple[noise.Stream, ...]
  coefs: jax.Array
  directions: Any

  @property
  def is_everywhere(self) -> bool:
    """Returns whether z has neither a mask nor per-element factors."""
    first = self.streams[0]
    return first.there is None and first.values is None

  @property
  def _keeps(self) -> Callable | None:
    """Returns the mask function of the multiplier, or None."""
    multiplier = self.directions.multiplier
    return None if multiplier is None else multiplier.keeps

  @property
  def _factors(self) -> jax.Array | None:
    """Returns the factors of the elements of z, or None for 1."""
    return None if self._keeps else self.streams[0].values

  def masked(self, w: jax.Array, x: jax.Array, other: Any) -> jax.Array:
    """Returns ``x`` where z is kept, and ``other`` where a mask removes z.

    Args:
      w: The unperturbed weights. The mask of a `Multiplier` may depend on them.
      x: An array of the shape of w.
      other: A number, or an array of the shape of w.
    """
    first, keeps = self.streams[0], self._keeps
    if first.there is not None:
      x = jnp.where(first.there, x, other)
    if keeps is not None:
      x = jnp.where(keeps(w, first.values), x, other)
    return x

  def scaled_by(self, x: jax.Array) -> jax.Array:
    """Returns ``x`` multiplied by the factors of z, if there are any."""
    return x if self._factors is None else x * self._factors

  def add(self, w: jax.Array | QuantizedArray) -> jax.Array:
    """Returns the weights w plus the sum of all terms.

    The sum is computed in float32, or in float64 for float64 weights. With the
    option ``on_grid`` of `Directions`, quantised weights move by whole steps of
    their grid.
    """
    if not is_codes(w):
      return self._sum(w.astype(dtypes.wide(w.dtype)), w)
    floats = w.astype(jnp.float32)
    if not self.directions.on_grid or not len(self.coefs):
      return self._sum(floats, floats)
    first = self.streams[0]
    # These words are independent of z.
    first = dataclasses.replace(first, keys=first.keys ^ _ROUNDED)
    bits = noise.words(first, 0, floats, 'rounding')
    return w.at(w.integers() + w.steps(self.built(w), bits))

  def built(self, like: jax.Array | QuantizedArray) -> jax.Array:
    """Returns the sum of all terms, float32.

    Args:
      like: The weights, which determine the shape and the sharding.
    """
    like = like.astype(jnp.float32) if is_codes(like) else like
    total = jnp.broadcast_to(self._sum(None, like), like.shape)
    return sharding.split_as(total, like)

  def _sum(self, start, like):
    """Returns ``start`` plus the sum of all terms; ``start`` may be None."""
    at_once = self.directions.at_once(self.coefs)
    # Per-element factors apply to each term, but a product of U and V is the
    # sum of all terms. On Explicit mesh axes, each device would compute the
    # whole product.
    if at_once is None or self._factors is not None or (
        sharding.is_explicit(like)):
      total = self._by_terms(start, like)
    else:
      total = lax.platform_dependent(
          self, start, like, default=Draws._by_terms,
          tpu=lambda self, *args: at_once(self.streams, self.coefs, *args))
    return self.masked(like, total, 0 if start is None else start)

  def term(self, j: jax.Array | int, like: jax.Array) -> jax.Array:
    """Returns the term ``coefs[j] * z_j``, float32."""
    streams = [noise.only(s, j) for s in self.streams]
    [z] = self.directions.each(streams, like)
    return self.scaled_by(self.coefs[j] * z)

  def _by_terms(self, start, like):
    """Returns ``start`` plus the sum of all terms, computed term by term."""
    n = self.coefs.shape[0]
    # XLA fuses a few unrolled terms, so that no partial sum is stored.
    if n <= self.directions.unrolled:
      total = start
      for c, z in zip(self.coefs, self.directions.each(self.streams, like)):
        term = self.scaled_by(c * z)
        total = term if total is None else total + term
      return total
    first = 0
    if start is None:
      first, start = 1, self.term(0, like)
    # For few elements, the iterations of a loop would cost more than they save.
    if n * like.size <= _AT_ONCE:
      return start + jnp.sum(self._each_term(first, like), 0)
    return lax.fori_loop(
        first, n, lambda j, total: total + self.term(j, like), start)

  def _each_term(self, first: int, like) -> jax.Array:
    """Returns the terms of directions ``first`` and later along a new axis.

    `jax.vmap` passes the keys of each term, since TPUs are slow at looking them
    up by index.
    """
    def one(keys, core, c):
      """Returns the term of one direction."""
      draws = self.tied([key[..., None, :] for key in keys])
      if core is not None:
        draws = draws._first(core=core[..., None, :, :])
      return dataclasses.replace(draws, coefs=c[None]).term(0, like)

    rest = lambda x, axis: lax.slice_in_dim(x, first, None, axis=axis)
    keys = [rest(key, -2) for key in self.keys()]
    core = self.streams[0].core
    if core is not None:
      core = rest(core, -3)
    return jax.vmap(one, (-2, -3, 0))(keys, core, rest(self.coefs, 0))

  def viewed(self, view: views.View, shape: Shape) -> 'Draws | None':
    """Returns the draws of a view of the block.

    Args:
      view: The view.
      shape: Shape of the block.

    Returns:
      The draws, or None if they are not evenly spaced in the view; see
      `mezo_jax.directions.streams.viewed`.
    """
    if isinstance(view, views.Keep):
      return self.where(view.there)
    streams = [streams_lib.viewed(s, view, shape) for s in self.streams]
    if any(s is None for s in streams):
      return None
    return self._with(streams)

  def where(self, there: jax.Array) -> 'Draws':
    """Returns draws that are 0 where ``there`` is False.

    Args:
      there: Bools that broadcast with the block.
    """
    if self.streams[0].there is not None:
      there = there & self.streams[0].there
    return self._first(there=there)

  def multiplied(self, values: jax.Array) -> 'Draws':
    """Returns the draws with the values of their `Multiplier`.

    Args:
      values: Values of this leaf, which broadcast with the block.
    """
    if self._keeps is not None:
      return self._first(values=values)
    # A single factor can be included in the coefficients. A matrix product with
    # low-rank directions then still works without building the weights.
    if values.size == 1:
      return dataclasses.replace(self, coefs=self.coefs * values.reshape(()))
    return self._first(values=values.astype(jnp.float32))

  def _with(self, streams) -> 'Draws':
    """Returns the draws with other streams."""
    return dataclasses.replace(self, streams=tuple(streams))

  def _first(self, **changes) -> 'Draws':
    """Returns the draws with fields of their first stream replaced."""
    first, *rest = self.streams
    return self._with([dataclasses.replace(first, **changes), *rest])

  def rows(self, length: int) -> tuple[list[jax.Array], Callable[..., Any]]:
    """Splits the draws along the first axis of the block, for a scan.

    Args:
      length: Length of the first axis.

    Returns:
      ``(along, of_row)``. The first is a list of arrays to scan over. The
      second is a function that takes their entries for one index and returns
      the draws at this index.
    """
    # Arrays with an entry per index are scanned over. Arrays of length 1 are
    # shared by all indices.
    arrays, tree = jax.tree.flatten(
        [streams_lib.spread(s, 0, length) for s in self.streams])
    shared = [None if a.shape[0] == length else a[0] for a in arrays]

    def of_row(along):
      along = iter(along)
      streams = jax.tree.unflatten(
          tree, [next(along) if x is None else x for x in shared])
      return self._with(
          dataclasses.replace(s, strides=s.strides[1:]) for s in streams)

    return [a for a, x in zip(arrays, shared) if x is None], of_row

  def keys(self) -> list[Any]:
    """Returns the raw key data of each stream."""
    return [s.keys for s in self.streams]

  def tied(self, keys: list[Any]) -> 'Draws':
    """Returns the draws with the keys replaced.

    Args:
      keys: The result of `keys`, passed through an optimisation barrier.
    """
    return self._with(
        dataclasses.replace(s, keys=k) for s, k in zip(self.streams, keys))

  def lies(self) -> list[int]:
    """Returns the axes of the block in the order that they have in the leaf.

    Axes are sorted by their strides, the largest first. Axes without a stride,
    such as the layer axis of a stack, come before all others.
    """
    # For a low-rank distribution, the axes of rows come before those of
    # columns, since the stride of a row is compared first.
    steps = [*zip(*(s.strides for s in self.streams))]
    before_all = (math.inf,)
    return sorted(
        range(len(steps)), reverse=True,
        key=lambda a: steps[a] if any(steps[a]) else before_all)

  def is_stack(self) -> bool:
    """Returns whether the first axis stacks layers with keys of their own."""
    keys = self.streams[0].keys
    return keys.ndim > 2 and keys.shape[0] > 1


def stack(several: list[Draws]) -> Draws:
  """Returns the draws of a stack of several blocks that have the same shape.

  The blocks must have the same distribution and the same number of directions.
  """
  both = jax.tree.map(lambda *x: jnp.stack(x), *several)
  # Coefficients become [n, blocks, 1, ...], which broadcasts with the stack.
  axes = len(both.streams[0].strides)
  coefs = both.coefs.T
  both = dataclasses.replace(
      both, coefs=coefs.reshape(coefs.shape + (1,) * axes))
  return both._with(
      dataclasses.replace(s, strides=(0, *s.strides)) for s in both.streams)


def of_leaves(params: Any, displacement: Displacement, directions: Any
              ) -> list[tuple[str, Any, Draws | None]]:
  """Splits a displacement into the draws of each parameter leaf.

  Args:
    params: The parameters.
    displacement: Keys and coefficients.
    directions: The distribution of z.

  Returns:
    A list of tuples (path, leaf, draws), one for each leaf. The draws are None
    for a leaf that the mask excludes.

  Raises:
    ValueError: If ``displacement`` is not a `Displacement` or its keys and
      coefficients do not match, or if a mask or a tree of multiplier values
      does not fit the params.
  """
  keys, coefs = _arrays(displacement)
  leaves = paths.named_leaves(params)
  used = jax.tree.leaves(directions.selected(params))
  stacks = paths.stacked(params, directions.stacked)
  shapes = {}
  for (path, x), use, is_stack in zip(leaves, used, stacks):
    if use is not False:
      shapes[path] = paths.shape_of(x), is_stack
  streams = streams_lib.of_leaves(keys, shapes)
  # Low-rank distributions may draw the factor V from keys of its own.
  columns = {}
  others = directions.of_columns(keys)
  if others is not None:
    columns = streams_lib.of_leaves(others, shapes)

  multiplier = directions.multiplier
  values = [None] * len(leaves)
  if multiplier is not None:
    values = _of_each('the values of multiplier', multiplier.values, leaves)

  out = []
  for (path, x), use, value in zip(leaves, used, values):
    draws = None
    if use is not False:
      c, shape = coefs, paths.shape_of(x)
      if isinstance(c, OrderedDict):
        c = c[paths.group_of(path, c)]
      draws = directions.of_leaf(streams[path], c, shape, columns.get(path))
      if use is not True:  # a bool array, which selects elements
        draws = draws.where(use)
      if multiplier is not None:
        # Append axes of length 1, so that the value broadcasts with the leaf.
        value = jnp.asarray(value)
        ones = (1,) * (len(shape) - value.ndim)
        draws = draws.multiplied(value.reshape(value.shape + ones))
    out.append((path, x, draws))
  return out


def _of_each(name: str, values, leaves: list) -> list:
  """Returns a list with the value of each leaf.

  Args:
    name: Name of the values, for the error.
    values: One number for all leaves, or a tree with a value for each leaf.
    leaves: The leaves.
  """
  if isinstance(values, (int, float, np.generic)):
    return [values] * len(leaves)
  values = jax.tree.leaves(values)
  for value in values:
    arguments.array(name, value)
  arguments.check(
      len(values) == len(leaves), name, 'one number, or a tree with a value '
      f'for each of the {len(leaves)} leaves of the params', values)
  return values


def _arrays(displacement) -> tuple[jax.Array, jax.Array | dict]:
  """Returns the checked keys and coefficients, both [n]."""
  if not isinstance(displacement, Displacement):
    raise ValueError(
        'displacement must be a mezo_jax.Displacement(keys, coefs), got a '
        f'{type(displacement).__name__}.')
  if type(displacement.coefs) is dict:
    raise ValueError('coefs of groups must be a collections.OrderedDict, since '
                     'the order of groups matters and JAX sorts the keys of a '
                     'plain dict.')
  keys = noise.as_keys(displacement.keys)
  n = len(keys)

  def checked(c):
    c = arguments.array('coefs of a displacement', c)
    c = c.astype(jnp.float32).reshape(-1)
    if not n or len(c) != n:
      raise ValueError(
          'a displacement needs at least one key and one coefficient for each '
          f'key, got {n} keys and {len(c)} coefficients.')
    return c
  return keys, jax.tree.map(checked, displacement.coefs)
