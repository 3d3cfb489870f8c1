r"""Evaluate at θ + Σ c·z(key) without building θ + Σ c·z(key).

A *displacement* is a list of pairs ``(key, coefficient)``: the vector
:math:`\sum_j c_j z(key_j)`, as large as the model and never stored.

* `perturbed` is a function transformation in the family of `jax.jvp`: it traces
  ``value_fn`` to a jaxpr and evaluates that with every parameter leaf as a lazy
  `Block`, which turns into ``w + c*z`` where an operation consumes it
  (`mezo_jax._lazy`). A `lax.scan` over stacked layers hands its body one layer
  and that layer's key, an unrolled model consumes its layers one by one: either
  way one layer's perturbed weights are alive at a time; a lookup of embedding
  rows draws noise for those rows alone. The model needs no change.
* `displace` is the eager twin: it builds the displaced tree.
* `direction` builds the displacement itself: an optax ``updates`` tree.

The clean weights are never changed, so nothing has to be restored and no
rounding error can accumulate (Malladi et al., 2023, Algorithm 1, adds +ε, -2ε
and +ε in place).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from mezo_jax import _noise, _paths, _streams
from mezo_jax._control import evaluate
from mezo_jax._lazy import Block, Context, SMALL

Displacement = Sequence[tuple[jax.Array, jax.typing.ArrayLike]]


def _blocks(params, displacement: Displacement, mask,
            scales: Mapping | None) -> list:
  """The leaves of a tree; selected ones as blocks that are to be displaced."""
  if not displacement:
    raise ValueError('a displacement needs at least one (key, coefficient).')
  keys, coefs = zip(*displacement)
  keys = jnp.stack([_noise.as_key(k) for k in keys])
  coefs = jnp.stack([jnp.asarray(c, jnp.float32) for c in coefs])
  leaves = _paths.named_leaves(params)
  used = jax.tree.leaves(_paths.selected(params, mask))
  _check_shards([leaf for leaf, use in zip(leaves, used) if use])
  of = _streams.of_leaves(keys, {
      path: jnp.shape(x) for (path, x), use in zip(leaves, used) if use})

  def block(path, x):
    scale = 1.0 if scales is None else scales[_paths.group_of(path, scales)]
    return Block(jnp.asarray(x), of[path], coefs * scale, leaf=path)

  return [block(path, x) if use else x
          for (path, x), use in zip(leaves, used)]


def _check_shards(leaves: list[tuple[str, jax.Array]]) -> None:
  """Within `jax.shard_map` a shard knows not which part of a leaf it is.

  Raises:
    ValueError: if a leaf differs between devices there.
  """
  manual = jax.sharding.get_abstract_mesh().manual_axes
  if not manual:
    return
  varies = lambda x: jax.typeof(x).mat.varying
  if not varies(jax.lax.axis_index(manual[0])):
    warnings.warn(
        'inside pmap, or shard_map with check_vma=False, sharded weights '
        'cannot be told from replicated ones: if they are sharded, each shard '
        'draws the same z, which is wrong.', stacklevel=4)
  for path, x in leaves:
    if varies(x):
      raise ValueError(
          f'parameter {path!r} is sharded over {sorted(varies(x))} inside '
          'shard_map, where each shard would draw the same z: call the '
          'optimizer outside it, with shard_map inside value_fn if need be.')


def _small(blocks: list[Block]) -> set[int]:
  """The smallest leaves, together 2 % of all; none of them large or stacked.

  They are most of the leaves of a model whose layers are not stacked, and one
  by one they would be most of its program.
  """
  order = sorted(range(len(blocks)), key=lambda i: blocks[i].w.size)
  left, found = sum(x.w.size for x in blocks) // 50, set()
  for i in order:
    left -= blocks[i].w.size
    if left < 0 or blocks[i].w.size >= SMALL:
      break
    if not _paths.locate(blocks[i].leaf)[2]:
      found.add(i)
  return found


def _each(fn: Callable, blocks: list[Block], small: set[int]) -> list:
  """``fn(w, coefs, stream)`` of blocks; `_small` ones of one shape at once."""
  alike = {}
  for i, x in enumerate(blocks):
    key = (x.w.shape, x.w.dtype) if i in small else i
    alike.setdefault(key, []).append(i)
  if any(isinstance(x.w, jax.core.Tracer) for x in blocks):
    fn = jax.jit(fn)  # so that leaves of one shape share a program's lines
  out = [None] * len(blocks)
  for members in alike.values():
    one = [blocks[i] for i in members]
    if len(members) == 1:
      out[members[0]] = fn(one[0].w, one[0].coefs, one[0].stream)
      continue
    w, coefs, stream = jax.tree.map(
        lambda *x: jnp.stack(x), *((x.w, x.coefs, x.stream) for x in one))
    stream = dataclasses.replace(stream, strides=(0, *stream.strides))
    coefs = coefs.T.reshape(coefs.shape[::-1] + (1,) * (w.ndim - 1))
    for i, x in zip(members, fn(w, coefs, stream)):
      out[i] = x
  return out


def _map_blocks(fn: Callable, leaves: list, other: Callable) -> list:
  """``fn(w, coefs, stream)`` of the blocks, ``other`` of the other leaves."""
  blocks = [x for x in leaves if isinstance(x, Block)]
  done = iter(_each(fn, blocks, _small(blocks)))
  return [next(done) if isinstance(x, Block) else other(x) for x in leaves]


# --- the eager twins --------------------------------------------------------


def displace(
    params, displacement: Displacement, *, mask=None,
    scales: Mapping | None = None, distribution: str = 'normal',
    generator: str = 'hash32',
):
  r"""Builds :math:`\theta + \sum_j c_j z(key_j)`.

  Elementwise, so that under `jax.jit` with donated params it is in place. The
  arithmetic is float32, rounded once to each leaf's dtype.

  Args:
    params: a tree of arrays.
    displacement: pairs (key, coefficient).
    mask: see `mezo_jax._paths.selected`; other leaves are returned as they are.
    scales: z of a leaf is multiplied by the number of its group, `{regular
      expression: number}`; None for 1.
    distribution: 'normal' or 'rademacher'.
    generator: 'threefry2x32' or 'hash32'.

  Raises:
    ValueError: for an unknown distribution or generator, a mask that does not
      fit, or a displacement without pairs.
  """
  _noise.check_names(distribution, generator)
  return jax.tree.unflatten(jax.tree.structure(params), _map_blocks(
      lambda w, coefs, stream: _noise.add(
          w, coefs, stream, distribution=distribution,
          generator=generator).astype(w.dtype),
      _blocks(params, displacement, mask, scales), lambda x: x))


def direction(
    params, displacement: Displacement, *, mask=None, dtype=None,
    scales: Mapping | None = None, distribution: str = 'normal',
    generator: str = 'hash32',
):
  r"""Builds :math:`\sum_j c_j z(key_j)`; zero where the mask is False.

  Args:
    params: a tree that gives paths, shapes and dtypes.
    displacement: pairs (key, coefficient).
    mask: see `mezo_jax._paths.selected`.
    dtype: of the result; None for the parameters' own, which of PRNG keys is
      `jax.dtypes.float0`.
    scales: as for `displace`.
    distribution: 'normal' or 'rademacher'.
    generator: 'threefry2x32' or 'hash32'.

  Raises:
    ValueError: as for `displace`.
  """
  _noise.check_names(distribution, generator)
  return jax.tree.unflatten(jax.tree.structure(params), _map_blocks(
      lambda w, coefs, stream: _noise.combination(
          w, coefs, stream, distribution=distribution,
          generator=generator).astype(dtype or w.dtype),
      _blocks(params, displacement, mask, scales),
      lambda x: zeros(x) if dtype is None else jnp.zeros(jnp.shape(x), dtype)))


def zeros(x) -> jax.Array:
  """The update of a leaf that is not trained."""
  if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
    return np.zeros(jnp.shape(x), jax.dtypes.float0)
  return jnp.zeros_like(x)


def norm(
    params, key: jax.Array, *, mask=None, distribution: str = 'normal',
    generator: str = 'hash32',
) -> tuple[jax.Array, int]:
  """(‖z(key)‖ in float32, number of elements) over the selected leaves."""
  _noise.check_names(distribution, generator)
  blocks = [x for x in _blocks(params, [(key, 1.0)], mask, None)
            if isinstance(x, Block)]
  squares = [jnp.sum(jnp.square(_noise.combination(
      x.w, x.coefs, x.stream, distribution=distribution, generator=generator)))
             for x in blocks]
  return jnp.sqrt(sum(squares)), sum(x.w.size for x in blocks)


# --- perturbed evaluation ---------------------------------------------------


def perturbed(
    value_fn: Callable, *, mask=None, scales: Mapping | None = None,
    distribution: str = 'normal', generator: str = 'hash32',
) -> Callable:
  r"""Transforms ``value_fn`` to evaluate it at displaced parameters.

  ``perturbed(f)(params, displacement, *args)`` is
  ``f(displace(params, displacement), *args)`` up to float32 rounding, at the
  memory of ``f(params, *args)`` plus one layer. Where that cannot be, because a
  program uses a large weight whole, a warning names the weight and the reason.

  Args:
    value_fn: a traceable function ``(params, *args, **kwargs) -> tree``.
    mask: see `mezo_jax._paths.selected`; other leaves are not perturbed.
    scales: as for `displace`.
    distribution: 'normal' or 'rademacher'.
    generator: 'threefry2x32' or 'hash32'.

  Returns:
    A function ``(params, displacement, *args, **kwargs)``. ``params`` may be
    any tree (a Linen dict, an NNX state, an Equinox module).

  Raises:
    ValueError: for an unknown distribution or generator, a mask that does not
      fit, or a displacement without pairs.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> f = lambda w, x: jnp.sum((w * x) ** 2)
    >>> w, x, key = jnp.ones(3), jnp.arange(3.), jax.random.key(0)
    >>> near = perturbed(f)(w, [(key, 1e-3)], x)
    >>> bool(jnp.allclose(near, f(displace(w, [(key, 1e-3)]), x)))
    True
  """
  _noise.check_names(distribution, generator)

  def perturbed_fn(params, displacement, /, *args, **kwargs):
    leaves = _blocks(params, displacement, mask, scales)
    closed, out = jax.make_jaxpr(
        lambda p: value_fn(p, *args, **kwargs), return_shape=True)(params)
    blocks = [x for x in leaves if isinstance(x, Block)]
    context = Context(distribution, generator, sum(x.w.size for x in blocks))
    small = _small(blocks)
    built = iter(_each(
        lambda w, coefs, stream: _noise.add(
            w, coefs, stream, distribution=distribution,
            generator=generator).astype(w.dtype),
        [blocks[i] for i in sorted(small)], {*range(len(small))}))
    built = {blocks[i].leaf: next(built) for i in sorted(small)}
    leaves = [built.get(x.leaf, x) if isinstance(x, Block) else x
              for x in leaves]
    outs = evaluate(closed.jaxpr, closed.consts, leaves, context)
    for x in outs:
      context.note(x, 'value_fn returns it')
    outs = [*map(context.force, outs)]
    if context.built:
      warnings.warn(
          'perturbed weights of this size are built whole, beside the weights '
          'themselves: ' + '; '.join(
              f'{leaf} ({why})' for leaf, why in context.built.items()) + '.',
          stacklevel=2)
    return jax.tree.unflatten(jax.tree.structure(out), outs)

  return perturbed_fn
