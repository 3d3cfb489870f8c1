r"""Evaluate at θ + Σ c·z(key) without building θ + Σ c·z(key).

* `perturbed` is a function transformation in the family of `jax.jvp`: it traces
  ``value_fn`` to a jaxpr and evaluates that with every parameter leaf as a lazy
  `Block`, which turns into ``w + c*z`` where an operation consumes it, except
  for the smallest leaves, which are built first
  (`mezo_jax.perturb.interpreter`). A `lax.scan` over stacked layers hands its
  body one layer and that layer's key, an unrolled model consumes its layers one
  by one: either way one layer's perturbed weights are alive at a time; a lookup
  of embedding rows draws noise for those rows alone. The model needs no change.
* `displace` builds the displaced tree.
* `direction` builds the displacement itself: an optax ``updates`` tree.

The clean weights are never changed, so nothing has to be restored and no
rounding error can accumulate (Malladi et al., 2023, Algorithm 1, adds +ε, -2ε
and +ε in place).
"""

from collections.abc import Callable
from typing import Any
import warnings

import jax
from jax.core import Tracer
import jax.numpy as jnp

from mezo_jax.core import arguments, jax_versions, paths, xla
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions import noise, streams
from mezo_jax.directions.base import Directions, Normal, Rademacher
from mezo_jax.directions.by_name import as_directions
from mezo_jax.directions.displacement import Displacement, of_leaves, stack
from mezo_jax.perturb import rules_dot  # noqa: F401  registers its rule
from mezo_jax.perturb.interpreter import Block, Context, SMALL
from mezo_jax.perturb.rules_control_flow import evaluate


def _blocks(params, displacement: Displacement,
            directions: Directions) -> list:
  """Returns the leaves of a tree; those that have a z are blocks."""
  leaves = of_leaves(params, displacement, directions)
  _check_shards([(path, x) for path, x, draws in leaves if draws is not None])
  return [x if draws is None else Block(
      x if is_codes(x) else jnp.asarray(x), draws, leaf=path)
          for path, x, draws in leaves]


def _still(path: str, x) -> Block:
  """Returns quantised weights without a z as a block."""
  keys = jax.random.split(jax.random.key(0, impl='threefry2x32'), 0)
  return Block(x, Rademacher().of_leaf(
      streams.of_leaf(keys, path, x.shape), jnp.zeros(0), x.shape), leaf=path)


def _check_shards(leaves: list[tuple[str, jax.Array]]) -> None:
  """Checks that no leaf is sharded inside `jax.shard_map`, where each shard
  would draw the same z.

  Raises:
    ValueError: If a leaf differs between devices there.
  """
  manual = jax.sharding.get_abstract_mesh().manual_axes
  if not manual:
    return
  varies = lambda x: jax_versions.manual_axis_type(x).varying
  if not varies(jax.lax.axis_index(manual[0])):
    warnings.warn(
        'inside pmap, or shard_map with check_vma=False, sharded weights '
        'cannot be told from replicated ones: if they are sharded, each shard '
        'draws the same z, which is wrong.', stacklevel=4)
  for path, x in leaves:
    if not is_codes(x) and varies(x):
      raise ValueError(
          f'parameter {path!r} is sharded over {sorted(varies(x))} inside '
          'shard_map, where each shard would draw the same z: call the '
          'optimizer outside it, with shard_map inside value_fn if need be.')


def _small(blocks: list[Block]) -> set[int]:
  """Returns indices of the smallest leaves that are not stacked, together at
  most 2 % of all elements.

  Building them together keeps the programs of unrolled models short.
  """
  order = sorted(range(len(blocks)), key=lambda i: blocks[i].w.size)
  left, found = sum(x.w.size for x in blocks) // 50, set()
  for i in order:
    left -= blocks[i].w.size
    if left < 0 or blocks[i].w.size >= SMALL:
      break
    if not (blocks[i].draws.is_stack() or is_codes(blocks[i].w)):
      found.add(i)
  return found


def _each(fn: Callable, blocks: list[Block], small: set[int]) -> list:
  """Applies ``fn(w, draws)`` to blocks, at once to small ones of one shape."""
  alike = {}
  for i, x in enumerate(blocks):
    key = (x.w.shape, x.w.dtype, jax.tree.structure(x.draws)) if (
        i in small) else i
    alike.setdefault(key, []).append(i)
  if any(isinstance(x.w, Tracer) for x in blocks):
    fn = jax.jit(fn)  # so that leaves of one shape share a program's lines
  out = [None] * len(blocks)
  for members in alike.values():
    one = [blocks[i] for i in members]
    if len(members) == 1:
      out[members[0]] = fn(one[0].w, one[0].draws)
      continue
    together = xla.apart_on_cpu(
        fn, jnp.stack([x.w for x in one]), stack([x.draws for x in one]))
    for i, x in zip(members, xla.entries(
        together, range(len(members)))):
      out[i] = x
  return out


def _map_blocks(fn: Callable, leaves: list, other: Callable) -> list:
  """Applies ``fn(w, draws)`` to blocks, and ``other`` to the other leaves."""
  blocks = [x for x in leaves if isinstance(x, Block)]
  done = iter(_each(fn, blocks, _small(blocks)))
  return [next(done) if isinstance(x, Block) else other(x) for x in leaves]


def _build(w, draws):
  return draws.add(w).astype(w.dtype)


# --- whole trees ------------------------------------------------------------


def displace(params: Any, displacement: Displacement,
             directions: Directions | str = Normal()) -> Any:
  r"""Builds :math:`\theta + \sum_j c_j z(key_j)`.

  The sum is elementwise, so under `jax.jit` with donated params it is in place.
  It is taken in float32 (float64 for float64 leaves) and rounded once to each
  leaf's dtype.

  Args:
    params: a tree of arrays.
    displacement: Keys and coefficients [n].
    directions: What z is, or its name; leaves without z are returned as they
      are.

  Raises:
    ValueError: for something that is not a displacement, or directions whose
      mask does not fit.
  """
  directions = as_directions(directions)
  return jax.tree.unflatten(paths.structure(params), _map_blocks(
      _build, _blocks(params, displacement, directions), lambda x: x))


def direction(params: Any, displacement: Displacement,
              directions: Directions | str = Normal(), *,
              dtype: jax.typing.DTypeLike | None = None) -> Any:
  r"""Builds :math:`\sum_j c_j z(key_j)`, zero where there is no z.

  Args:
    params: A tree that gives paths, shapes and dtypes.
    displacement: Keys and coefficients [n].
    directions: What z is, or its name.
    dtype: A floating-point dtype of the result; None for the parameters' own,
      and then PRNG keys among the params have `Unmoved`.

  Raises:
    ValueError: as for `displace`.
  """
  return mapped(lambda w, draws: draws.built(w), params, displacement,
                as_directions(directions),
                dtype=arguments.floating('dtype', dtype))


def mapped(fn: Callable[..., Any], params: Any, displacement: Displacement,
           directions: Directions, *, dtype: jax.typing.DTypeLike | None = None
           ) -> Any:
  """Maps ``fn(w, draws)`` over leaves that have a z; others become zeros."""
  return jax.tree.unflatten(paths.structure(params), _map_blocks(
      lambda w, draws: fn(w, draws).astype(dtype or w.dtype),
      _blocks(params, displacement, directions),
      lambda x: zeros(x) if dtype is None else (
          jnp.zeros(paths.shape_of(x), dtype))))


@jax.tree_util.register_pytree_node_class
class Unmoved:
  """The update of a PRNG key, to which nothing can be added.

  It is a tree without leaves, so whatever maps over updates passes it by, and
  ``key + Unmoved()`` is the key, so `optax.apply_updates` can be used on params
  that have keys among them, such as the whole state of an NNX model.
  """

  def __radd__(self, key: Any) -> Any:
    return key if isinstance(key, Tracer) else _Sum(key)

  def tree_flatten(self) -> tuple[tuple[()], None]:
    return (), None

  @classmethod
  def tree_unflatten(cls, aux: Any, children: Any) -> 'Unmoved':
    del aux, children
    return cls()


class _Sum(jax.Array):
  """A key that can be cast to its own dtype.

  `optax.apply_updates` casts every sum, for which concrete keys, unlike traced
  ones, have no method.
  """

  def __init__(self, key):
    self._key = key

  aval = property(lambda self: self._key.aval)
  dtype = property(lambda self: self._key.dtype)
  shape = property(lambda self: self._key.shape)
  ndim = property(lambda self: self._key.ndim)
  weak_type = property(lambda self: False)

  def astype(self, dtype):
    del dtype
    return self._key


def zeros(x: Any) -> Any:
  """Returns the update of a leaf that is not trained."""
  if is_codes(x):
    return jnp.zeros(x.shape, x.dtype)
  if noise.is_typed(x):
    return Unmoved()
  return jnp.zeros_like(x)


# --- perturbed evaluation ---------------------------------------------------


def perturbed(value_fn: Callable[..., Any],
              directions: Directions | str = Normal()) -> Callable[..., Any]:
  r"""Transforms ``value_fn`` to evaluate it at displaced parameters.

  ``perturbed(f)(params, displacement, *args)`` is
  ``f(displace(params, displacement), *args)`` up to float32 rounding, at the
  memory of ``f(params, *args)`` plus one layer. Where that cannot be, because a
  program uses a large weight whole, a warning names the weight and the reason.

  Args:
    value_fn: A traceable function ``(params, *args, **kwargs) -> tree``.
    directions: What z is, or its name; leaves without z are not perturbed.

  Returns:
    A function ``(params, displacement, *args, **kwargs)``. ``params`` may be
    any tree (a Linen dict, an NNX state, an Equinox module).

  Raises:
    ValueError: for something that is not a displacement, or directions whose
      mask does not fit.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> f = lambda w, x: jnp.sum((w * x) ** 2)
    >>> w, x, d = jnp.ones(3), jnp.arange(3.), Displacement(
    ...     jax.random.key(0), 1e-3)
    >>> bool(jnp.allclose(perturbed(f)(w, d, x), f(displace(w, d), x)))
    True
  """

  arguments.function('value_fn', value_fn)
  directions = as_directions(directions)

  def perturbed_fn(params, displacement, /, *args, **kwargs):
    return _evaluated(lambda p: value_fn(p, *args, **kwargs), params,
                      _blocks(params, displacement, directions))

  return perturbed_fn


def dequantized(fn: Callable) -> Callable:
  r"""Transforms ``fn`` to evaluate it at params with `Codes` in them.

  Weights are dequantised where ``fn`` consumes them, so that one layer of them
  is alive at a time, and nothing else changes. Without `Codes` it is ``fn``.

  Args:
    fn: A traceable function ``(params, *args, **kwargs) -> tree``.
  """
  arguments.function('fn', fn)

  def dequantized_fn(params, /, *args, **kwargs):
    named = paths.named_leaves(params)
    if not any(is_codes(x) for _, x in named):
      return fn(params, *args, **kwargs)
    return _evaluated(lambda p: fn(p, *args, **kwargs), params,
                      [x for _, x in named])

  return dequantized_fn


def _evaluated(fn: Callable, params, leaves: list):
  """Evaluates ``fn(params)`` with lazy leaves."""
  as_read = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if (
      is_codes(x)) else x
  closed, out = jax.make_jaxpr(fn, return_shape=True)(
      jax.tree.map(as_read, params, is_leaf=is_codes))
  leaves = [_still(path, x) if is_codes(x) else x for x, (path, _) in zip(
      leaves, paths.named_leaves(params))]
  blocks = [x for x in leaves if isinstance(x, Block)]
  context = Context(sum(x.w.size for x in blocks))
  small = sorted(_small(blocks))
  built = dict(zip([blocks[i].leaf for i in small], _each(
      _build, [blocks[i] for i in small], {*range(len(small))})))
  leaves = [built.get(x.leaf, x) if isinstance(x, Block) else x
            for x in leaves]
  outs = evaluate(closed.jaxpr, closed.consts, leaves, context)
  for x in outs:
    context.note(x, 'it is returned')
  outs = [*map(context.force, outs)]
  if context.built:
    warnings.warn(
        'these weights are built whole, in addition to the stored ones: '
        + '; '.join(f'{leaf} ({why})' for leaf, why in context.built.items())
        + '.', stacklevel=3)
  return jax.tree.unflatten(jax.tree.structure(out), outs)
