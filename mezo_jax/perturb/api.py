r"""Evaluates functions at θ + Σ c·z(key) without building that vector.

* `perturbed` is a function transformation, like `jax.jvp`. It traces
  ``value_fn`` to a jaxpr and evaluates the jaxpr with lazy params. A param is a
  `Block` until an operation uses it, and ``w + c*z`` is built only for this
  operation (see `mezo_jax.perturb.interpreter`). The smallest leaves are an
  exception: they are built at the start. A `lax.scan` over stacked layers
  passes one layer and its key to each iteration, and an unrolled model uses its
  layers one by one. In both cases, one layer of perturbed weights is in memory
  at a time. A lookup of embedding rows draws z for these rows only. The model
  itself needs no change.
* `dequantized` does the same for quantised weights, without a displacement.
* `displace` builds the displaced params.
* `direction` builds the displacement itself, as an optax ``updates`` tree.

The clean (unperturbed) weights are never changed. In contrast, Algorithm 1 of
Malladi et al., 2023, adds +ε z, -2ε z and +ε z in place, so that rounding
errors accumulate in the weights.
"""

from collections.abc import Callable
import dataclasses
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
  """Returns the leaves of a tree, with a `Block` for each leaf that has a z."""
  leaves = []
  for path, x, draws in of_leaves(params, displacement, directions):
    if draws is not None:
      x = Block(x if is_codes(x) else jnp.asarray(x), draws, leaf=path)
    leaves.append(x)
  _check_shards(leaves)
  return leaves


def _still(path: str, x) -> Block:
  """Returns quantised weights as a block without directions.

  The interpreter then dequantises the weights only where they are used.
  """
  no_keys = jax.random.split(jax.random.key(0, impl='threefry2x32'), 0)
  stream = streams.of_leaf(no_keys, path, x.shape)
  draws = Rademacher().of_leaf(stream, jnp.zeros(0), x.shape)
  return Block(x, draws, leaf=path)


def _check_shards(leaves: list) -> None:
  """Checks that no block is sharded over a manual axis of `jax.shard_map`.

  Inside `jax.shard_map`, a device cannot distinguish its shard from a whole
  leaf, so all shards would draw the same z.

  Raises:
    ValueError: If a leaf varies over a manual mesh axis.
  """
  manual = jax.sharding.get_abstract_mesh().manual_axes
  if not manual:
    return
  varies = lambda x: jax_versions.manual_axis_type(x).varying
  # An axis index always varies over its axis. If its type does not show that,
  # JAX does not track over which axes values vary.
  if not varies(jax.lax.axis_index(manual[0])):
    warnings.warn(
        'params: inside pmap, or shard_map with check_vma=False, sharded '
        'weights cannot be distinguished from replicated ones. If these are '
        'sharded, each shard draws the same z, which is wrong; call the '
        'optimizer outside of pmap or shard_map.', stacklevel=4)
  for x in leaves:
    if isinstance(x, Block) and not is_codes(x.w) and varies(x.w):
      raise ValueError(
          f'parameter {x.leaf!r} is sharded over {sorted(varies(x.w))} inside '
          'shard_map, where each shard would draw the same z. Call the '
          'optimizer outside of shard_map; value_fn may use shard_map.')


def _small(leaves: list) -> set[int]:
  """Returns the indices of small blocks, which are built at the start.

  These are the smallest blocks that are neither stacked nor quantised. Together
  they have at most 2 % of all elements. An unrolled model has many norms and
  biases of equal shapes. Building all leaves of a shape in one operation keeps
  the program short and takes little memory.
  """
  sizes = {i: x.w.size for i, x in enumerate(leaves) if isinstance(x, Block)}
  left, found = sum(sizes.values()) // 50, set()
  for i in sorted(sizes, key=lambda i: sizes[i]):
    left -= sizes[i]
    if left < 0 or sizes[i] >= SMALL:
      break
    if not leaves[i].draws.is_stack() and not is_codes(leaves[i].w):
      found.add(i)
  return found


def _applied(fn: Callable, leaves: list, only_small: bool = False) -> list:
  """Replaces blocks by ``fn(w, draws)``.

  Small blocks of the same shape are stacked, and ``fn`` is applied to the
  stack.

  Args:
    fn: An elementwise function.
    leaves: Blocks and other leaves. The latter are returned unchanged.
    only_small: Whether to keep all blocks that are not small.
  """
  small = _small(leaves)
  alike = {}
  for i, x in enumerate(leaves):
    if i in small:
      kind = x.w.shape, x.w.dtype, jax.tree.structure(x.draws)
      alike.setdefault(kind, []).append(i)
    elif isinstance(x, Block) and not only_small:
      alike[i] = [i]
  out = [*leaves]
  if any(isinstance(x, Block) and isinstance(x.w, Tracer) for x in leaves):
    # Leaves of one shape then share one function in the lowered program.
    fn = jax.jit(fn)
  for members in alike.values():
    weights = [leaves[i].w for i in members]
    draws = [leaves[i].draws for i in members]
    if len(members) == 1:
      out[members[0]] = fn(*weights, *draws)
      continue
    together = xla.apart_on_cpu(fn, jnp.stack(weights), stack(draws))
    entries = xla.entries(together, range(len(members)))
    for i, x in zip(members, entries):
      out[i] = x
  return out


def _build(w, draws):
  """Returns the displaced weights in the dtype of the clean ones."""
  return draws.add(w).astype(w.dtype)


# --- whole trees ------------------------------------------------------------


def displace(params: Any, displacement: Displacement,
             directions: Directions | str = Normal()) -> Any:
  r"""Adds a displacement to the params.

  .. math:: \theta + \sum_{j=1}^n c_j z(key_j)

  The sum is elementwise. Under `jax.jit` with donated params, XLA computes it
  in place. It is computed in float32 (float64 for float64 leaves) and rounded
  once to the dtype of each leaf.

  Args:
    params: The params :math:`\theta`, any pytree of arrays.
    displacement: A `Displacement` of n keys and coefficients.
    directions: Distribution of z, or its name. Leaves that its mask excludes
      are returned unchanged. Defaults to ``Normal()``.

  Returns:
    A tree with the structure, shapes and dtypes of ``params``.

  Raises:
    ValueError: If ``displacement`` is not a `Displacement`, or if a mask of
      ``directions`` does not fit the params.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1, ``PerturbParameters``.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax
    >>> params = {'w': jnp.ones((2, 3)), 'b': jnp.zeros(3)}
    >>> step = mezo_jax.Displacement(jax.random.key(0), 1e-3)
    >>> moved = mezo_jax.displace(params, step)
    >>> bool(jnp.max(jnp.abs(moved['w'] - params['w'])) < 0.01)
    True
  """
  directions = as_directions(directions)
  leaves = _blocks(params, displacement, directions)
  return paths.structure(params).unflatten(_applied(_build, leaves))


def direction(params: Any, displacement: Displacement,
              directions: Directions | str = Normal(), *,
              dtype: jax.typing.DTypeLike | None = None) -> Any:
  r"""Returns a displacement as a tree of optax updates.

  .. math:: \sum_{j=1}^n c_j z(key_j)

  Args:
    params: The params, any pytree of arrays. Their paths and shapes determine
      z. Their values matter only to a `Multiplier` with ``keeps``.
    displacement: A `Displacement` of n keys and coefficients.
    directions: Distribution of z, or its name. Leaves that its mask excludes
      have zeros in the result. Defaults to ``Normal()``.
    dtype: A floating-point dtype for the result. Defaults to None, which takes
      the dtype of each param. With this default, the params may contain PRNG
      keys, which `optax.apply_updates` then leaves unchanged.

  Returns:
    A tree with the structure and the shapes of ``params``.

  Raises:
    ValueError: If ``displacement`` is not a `Displacement`, if a mask of
      ``directions`` does not fit the params, or if ``dtype`` is not a
      floating-point dtype.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax, optax
    >>> params = {'w': jnp.ones((2, 3)), 'b': jnp.zeros(3)}
    >>> step = mezo_jax.Displacement(jax.random.key(0), 1e-3)
    >>> updates = mezo_jax.direction(params, step)
    >>> moved = optax.apply_updates(params, updates)
    >>> bool(jnp.allclose(moved['w'], mezo_jax.displace(params, step)['w']))
    True
  """
  arguments.floating('dtype', dtype)
  return mapped(lambda w, draws: draws.built(w), params, displacement,
                as_directions(directions), dtype=dtype)


def mapped(fn: Callable[..., Any], params: Any, displacement: Displacement,
           directions: Directions, *, dtype: jax.typing.DTypeLike | None = None
           ) -> Any:
  """Applies a function to the leaves that have a z; other leaves become zeros.

  Args:
    fn: An elementwise function ``(w, draws) -> array`` of the weights and the
      `Draws` of a leaf.
    params: The params.
    displacement: Keys and coefficients.
    directions: Distribution of z.
    dtype: Dtype of the result. Defaults to None, for that of each param.

  Returns:
    A tree with the structure of ``params``.
  """
  leaves = _blocks(params, displacement, directions)
  out = _applied(
      lambda w, draws: fn(w, draws).astype(dtype or w.dtype), leaves)
  for i, x in enumerate(leaves):
    if isinstance(x, Block):
      continue
    if dtype is None:
      out[i] = zeros(x)
    else:
      out[i] = jnp.zeros(paths.shape_of(x), dtype)
  return paths.structure(params).unflatten(out)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Unmoved:
  """Serves as the update of a PRNG key, to which no number can be added.

  With it, `optax.apply_updates` works on params that contain keys, such as the
  whole state of an NNX model: ``key + Unmoved()`` is the key. This class is a
  pytree without leaves, so functions that map over updates skip it.
  """

  def __radd__(self, key: Any) -> Any:
    """Returns the key in a form that `optax.apply_updates` can cast."""
    return key if isinstance(key, Tracer) else _Sum(key)


class _Sum(jax.Array):
  """Wraps a key so that it can be cast to its own dtype.

  `optax.apply_updates` calls ``jnp.asarray(param + update).astype(dtype)``.
  Concrete keys have no ``astype``, unlike traced ones.
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
  """Returns an update that leaves a param unchanged.

  Args:
    x: A param: an array, `QuantizedArray` or a typed PRNG key.
  """
  if is_codes(x):
    return jnp.zeros(x.shape, x.dtype)
  if noise.is_typed(x):
    return Unmoved()
  return jnp.zeros_like(x)


# --- perturbed evaluation ---------------------------------------------------


def perturbed(value_fn: Callable[..., Any],
              directions: Directions | str = Normal()) -> Callable[..., Any]:
  r"""Transforms a function so that it is evaluated at displaced params.

  ``perturbed(f)(params, displacement, *args)`` returns

  .. math:: f\Bigl(\theta + \sum_{j=1}^n c_j z(key_j), \ldots\Bigr)

  and equals ``f(displace(params, displacement), *args)`` up to float32
  rounding. It takes the memory of ``f(params, *args)`` plus that of one layer
  of weights. If ``f`` uses a large weight in a way that requires more memory, a
  warning names the weight and the reason.

  Args:
    value_fn: A function ``(params, *args, **kwargs) -> tree`` that JAX can
      trace.
    directions: Distribution of z, or its name. Leaves that its mask excludes
      are not perturbed. Defaults to ``Normal()``.

  Returns:
    A function ``(params, displacement, *args, **kwargs) -> tree``. Its
    ``params`` may be any pytree, such as a Linen dict, an NNX state or an
    Equinox module.

  Raises:
    ValueError: If ``value_fn`` is not callable. The returned function raises
      it if ``displacement`` is not a `Displacement`, or if a mask of
      ``directions`` does not fit the params.

  References:
    Malladi et al., 2023, `Fine-Tuning Language Models with Just Forward Passes
    <https://arxiv.org/abs/2305.17333>`_, Algorithm 1, which perturbs the
    weights in place instead.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax
    >>> f = lambda w, x: jnp.sum((w * x) ** 2)
    >>> w, x = jnp.ones(3), jnp.arange(3.0)
    >>> step = mezo_jax.Displacement(jax.random.key(0), 1e-3)
    >>> lazy = mezo_jax.perturbed(f)(w, step, x)
    >>> bool(jnp.allclose(lazy, f(mezo_jax.displace(w, step), x)))
    True
  """
  arguments.function('value_fn', value_fn)
  directions = as_directions(directions)

  def perturbed_fn(params, displacement, /, *args, **kwargs):
    leaves = _blocks(params, displacement, directions)
    return _evaluated(lambda p: value_fn(p, *args, **kwargs), params, leaves)

  return perturbed_fn


def dequantized(fn: Callable) -> Callable:
  r"""Transforms a function so that it accepts quantised params.

  ``dequantized(f)(params, *args)`` equals ``f(dequantize(params), *args)`` up
  to float32 rounding. A quantised weight :math:`s q + o` (`QuantizedArray`) is
  dequantised only where ``f`` consumes it, so that one layer of dequantised
  weights is alive at a time. Params without `QuantizedArray` are passed to
  ``f`` unchanged.

  Args:
    fn: A function ``(params, *args, **kwargs) -> tree`` that JAX can trace.

  Returns:
    A function with the arguments and the results of ``fn``.

  Raises:
    ValueError: If ``fn`` is not callable.

  References:
    Zhou et al., 2025, `QuZO <https://arxiv.org/abs/2502.12346>`_, trains such
    weights.

  Example:
    >>> import jax, jax.numpy as jnp, mezo_jax
    >>> w = jax.random.normal(jax.random.key(0), (64, 8))
    >>> f = lambda params, x: x @ params['w']
    >>> codes = {'w': mezo_jax.quantize(w)}
    >>> mezo_jax.dequantized(f)(codes, jnp.ones((1, 64))).shape
    (1, 8)
  """
  arguments.function('fn', fn)

  def dequantized_fn(params, /, *args, **kwargs):
    leaves = [x for _, x in paths.named_leaves(params)]
    if not any(map(is_codes, leaves)):
      return fn(params, *args, **kwargs)
    return _evaluated(lambda p: fn(p, *args, **kwargs), params, leaves)

  return dequantized_fn


def _evaluated(fn: Callable, params, leaves: list):
  """Evaluates ``fn(params)`` with lazy leaves.

  Args:
    fn: A function of the params.
    params: The params, which are only used for tracing.
    leaves: The leaves of the params, with a `Block` for each lazy one.
  """
  def as_read(x):
    """Describes a quantised leaf by the array that ``fn`` gets."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_codes(x) else x
  closed, out = jax.make_jaxpr(fn, return_shape=True)(
      jax.tree.map(as_read, params, is_leaf=is_codes))
  # Quantised leaves without a z become blocks, too, so that they are
  # dequantised only where they are used.
  leaves = [
      _still(path, x) if is_codes(x) else x
      for x, (path, _) in zip(leaves, paths.named_leaves(params))]
  context = Context(sum(x.w.size for x in leaves if isinstance(x, Block)))
  leaves = _applied(_build, leaves, only_small=True)
  outs = evaluate(closed.jaxpr, closed.consts, leaves, context)
  for x in outs:
    context.note(x, 'the function returns it')
  outs = [context.force(x) for x in outs]
  if context.built:
    built = [f'{leaf} ({why})' for leaf, why in context.built.items()]
    warnings.warn(
        'these weights are built in full, which takes memory in addition to '
        f'the stored weights: {"; ".join(built)}.', stacklevel=3)
  return jax.tree.structure(out).unflatten(outs)
