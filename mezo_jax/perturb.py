r"""Evaluate at θ + Σ c·z(key) without building θ + Σ c·z(key).

A *displacement* is a list of pairs ``(key, coefficient)``: the vector
:math:`\sum_j c_j z(key_j)`, as large as the model and never stored.

* `perturbed` is a function transformation in the family of `jax.jvp`: it traces
  ``value_fn`` to a jaxpr and evaluates that with every parameter leaf as a
  `Lazy` value, which turns into ``w + c*z`` where an operation consumes it. A
  `lax.scan` over stacked layers hands its body one layer and that layer's key,
  so one layer's perturbed weights are alive at a time; a lookup of embedding
  rows draws noise for those rows alone. The model needs no change.
* `displace` is the eager twin: it builds the displaced tree.
* `direction` builds the displacement itself: an optax ``updates`` tree.

The clean weights are never changed, so nothing has to be restored and no
rounding error can accumulate (Malladi et al., 2023, Algorithm 1, adds +ε, -2ε
and +ε in place).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools

import jax
from jax import lax
from jax.extend import core
import jax.numpy as jnp

from mezo_jax import masks, noise

Displacement = Sequence[tuple[jax.Array, jax.typing.ArrayLike]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('w', 'stream'),
    meta_fields=('casts', 'group'),
)
@dataclasses.dataclass(frozen=True)
class Lazy:
  """Weights ``w`` that are to be displaced where they are consumed."""

  w: jax.Array  # [*lead, *inner]
  stream: noise.Stream  # of the same block
  casts: tuple = ()  # dtypes that the program has cast the weights to since
  group: str | None = None  # of the scales

  def rows(self, w: jax.Array, index: jax.Array) -> 'Lazy':
    """These weights, ``w``, being the rows ``index`` of this block."""
    inner = self.w.shape[self.stream.lo.ndim:]
    return dataclasses.replace(
        self, w=w, stream=noise.rows(self.stream, inner, index))


def _keys_and_coefs(displacement):
  if not displacement:
    raise ValueError('a displacement needs at least one (key, coefficient).')
  keys, coefs = zip(*displacement)
  keys = jnp.stack([noise.as_key(k) for k in keys])
  return keys, jnp.stack([jnp.asarray(c, jnp.float32) for c in coefs])


def _map_selected(fn, params, mask, other):
  """Maps ``fn(path, leaf)`` over the selected leaves, ``other`` over others."""
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf, use: fn(noise.path_str(path), leaf) if use
      else other(leaf), params, masks.selected(params, mask))


def _scaled(coefs, scales: Mapping | None, group: str | None):
  """The coefficients of the leaves of a group."""
  return coefs if group is None else coefs * scales[group]


def _group(path: str, scales: Mapping | None) -> str | None:
  return None if scales is None else masks.group_of(path, scales)


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
    mask: see `mezo_jax.masks.selected`; other leaves are returned as they are.
    scales: z of a leaf is multiplied by the number of its group, `{regular
      expression: number}`; None for 1.
    distribution: 'normal' or 'rademacher'.
    generator: 'threefry2x32' or 'hash32'.
  """
  keys, coefs = _keys_and_coefs(displacement)
  def one(path, w):
    w = jnp.asarray(w)
    return noise.add(
        w, _scaled(coefs, scales, _group(path, scales)),
        noise.stream(keys, path, w.shape), distribution=distribution,
        generator=generator).astype(w.dtype)
  return _map_selected(one, params, mask, lambda w: w)


def direction(
    params, displacement: Displacement, *, mask=None, dtype=None,
    scales: Mapping | None = None, distribution: str = 'normal',
    generator: str = 'hash32',
):
  r"""Builds :math:`\sum_j c_j z(key_j)`; zero where the mask is False.

  Args:
    params: a tree that gives paths, shapes and dtypes.
    displacement: pairs (key, coefficient).
    mask: see `mezo_jax.masks.selected`.
    dtype: of the result; None for the parameters' own.
    scales: as for `displace`.
    distribution: 'normal' or 'rademacher'.
    generator: 'threefry2x32' or 'hash32'.
  """
  keys, coefs = _keys_and_coefs(displacement)
  def one(path, w):
    w = jnp.asarray(w)
    return noise.combination(
        w, _scaled(coefs, scales, _group(path, scales)),
        noise.stream(keys, path, w.shape), distribution=distribution,
        generator=generator).astype(dtype or w.dtype)
  return _map_selected(one, params, mask, jnp.zeros_like)


def norm(
    params, key: jax.Array, *, mask=None, distribution: str = 'normal',
    generator: str = 'hash32',
) -> tuple[jax.Array, int]:
  """(‖z(key)‖ in float32, number of elements) over the selected leaves."""
  squares, sizes = [], []
  def one(path, w):
    w = jnp.asarray(w)
    z = noise.combination(
        w, jnp.ones(1), noise.stream(key[None], path, w.shape),
        distribution=distribution, generator=generator)
    squares.append(jnp.sum(jnp.square(z)))
    sizes.append(w.size)
  _map_selected(one, params, mask, lambda w: w)
  return jnp.sqrt(sum(squares)), sum(sizes)


# --- perturbed evaluation ---------------------------------------------------


def perturbed(
    value_fn: Callable, *, mask=None, scales: Mapping | None = None,
    distribution: str = 'normal', generator: str = 'hash32',
) -> Callable:
  r"""Transforms ``value_fn`` to evaluate it at displaced parameters.

  ``perturbed(f)(params, displacement, *args)`` is
  ``f(displace(params, displacement), *args)`` up to float32 rounding, at the
  memory of ``f(params, *args)`` plus one layer.

  Args:
    value_fn: a traceable function ``(params, *args, **kwargs) -> tree``.
    mask: see `mezo_jax.masks.selected`; other leaves are not perturbed.
    scales: as for `displace`.
    distribution: 'normal' or 'rademacher'.
    generator: 'threefry2x32' or 'hash32'.

  Returns:
    A function ``(params, displacement, *args, **kwargs)``. ``params`` may be
    any tree (a Linen dict, an NNX state).

  Example:
    >>> import jax, jax.numpy as jnp
    >>> f = lambda w, x: jnp.sum((w * x) ** 2)
    >>> w, x, key = jnp.ones(3), jnp.arange(3.), jax.random.key(0)
    >>> near = perturbed(f)(w, [(key, 1e-3)], x)
    >>> bool(jnp.allclose(near, f(displace(w, [(key, 1e-3)]), x)))
    True
  """

  def perturbed_fn(params, displacement, *args, **kwargs):
    keys, coefs = _keys_and_coefs(displacement)

    def build(x):
      if not isinstance(x, Lazy):
        return x
      w = noise.add(x.w, _scaled(coefs, scales, x.group), x.stream,
                    distribution=distribution,
                    generator=generator).astype(x.w.dtype)
      for dtype in x.casts:
        w = w.astype(dtype)
      # A TPU would make z anew for each tile of rows that it multiplies by w.
      return lax.optimization_barrier(w) if distribution == 'normal' else w

    def lazy(path, w):
      w = jnp.asarray(w)
      return Lazy(w, noise.stream(keys, path, w.shape),
                  group=_group(path, scales))

    closed, out = jax.make_jaxpr(
        lambda p: value_fn(p, *args, **kwargs), return_shape=True)(params)
    leaves = jax.tree.leaves(
        _map_selected(lazy, params, mask, lambda w: w),
        is_leaf=lambda x: isinstance(x, Lazy))
    outs = _evaluate(closed.jaxpr, closed.consts, leaves, build)
    return jax.tree.unflatten(jax.tree.structure(out), map(build, outs))

  return perturbed_fn


def _evaluate(jaxpr: core.Jaxpr, consts, args, build) -> list:
  """Evaluates a jaxpr. Inputs may be `Lazy`, and then so may outputs be."""
  env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
  read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
  for eqn in jaxpr.eqns:
    ins = [read(v) for v in eqn.invars]
    rule = _bind
    if any(isinstance(x, Lazy) for x in ins):
      rule = _RULES.get(eqn.primitive.name, _bind)
    env.update(zip(eqn.outvars, rule(eqn, ins, build)))
  return [read(v) for v in jaxpr.outvars]


def _bind(eqn, ins, build):
  """The operation itself, on weights that are built here."""
  known = {v: build(x) for v, x in zip(eqn.invars, ins)
           if not isinstance(v, core.Literal)}
  alone = core.Jaxpr((), [*known], eqn.outvars, [eqn], eqn.effects)
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*known.values())


def _same_block(eqn, ins, build):
  """Operations that copy or place weights and leave elements where they are."""
  x = ins[0]
  (w,) = _bind(eqn, [x.w, *ins[1:]], build)
  return [dataclasses.replace(x, w=w)]


def _cast(eqn, ins, build):
  x, dtype = ins[0], eqn.params['new_dtype']
  if not jnp.issubdtype(dtype, jnp.floating):
    return _bind(eqn, ins, build)
  return [dataclasses.replace(x, casts=(*x.casts, dtype))]


def _reshape(eqn, ins, build):
  """Row-major reshapes that split or merge keyed and unkeyed axes apart."""
  x, new = ins[0], eqn.outvars[0].aval.shape
  lead = x.stream.lo.shape
  inner = x.w.shape[len(lead):]
  at = len(new) - len(inner)
  if new[:len(lead)] == lead:
    stream = x.stream
  elif at >= 0 and new[at:] == inner:
    stream = jax.tree.map(
        lambda a: a.reshape(new[:at] + a.shape[len(lead):]), x.stream)
  else:
    return _bind(eqn, ins, build)
  (w,) = _bind(eqn, [x.w], build)
  return [dataclasses.replace(x, w=w, stream=stream)]


def _gather(eqn, ins, build):
  """Whole rows by index: noise for these rows alone."""
  x, index = ins
  if isinstance(x, Lazy) and _takes_rows(eqn):
    (w,) = _bind(eqn, [x.w, index], build)
    return [x.rows(w, jnp.clip(index[..., 0], 0, x.w.shape[0] - 1))]
  return _bind(eqn, ins, build)


def _slice(eqn, ins, build):
  """A run of whole rows: static (slice) or dynamic start."""
  x, *start = ins
  if not isinstance(x, Lazy) or not _takes_rows(eqn):
    return _bind(eqn, ins, build)
  (w,) = _bind(eqn, [x.w, *start], build)
  rows = jnp.arange(w.shape[0])
  if start:
    first = jnp.clip(start[0], 0, x.w.shape[0] - w.shape[0])
  else:
    first = eqn.params['start_indices'][0]
  return [x.rows(w, first + rows)]


def _takes_rows(eqn) -> bool:
  """Whether a gather or slice takes whole rows of axis 0, in their order."""
  p, (shape, out) = eqn.params, (
      v.aval.shape for v in (eqn.invars[0], eqn.outvars[0]))
  if eqn.primitive.name != 'gather':
    return (bool(shape) and out[1:] == shape[1:]
            and p.get('strides') in (None, (1,) * len(shape)))
  d, batch = p['dimension_numbers'], len(out) - len(shape) + 1
  return (d.start_index_map == d.collapsed_slice_dims == (0,)
          and not d.operand_batching_dims
          and p['slice_sizes'] == (1, *shape[1:])
          and d.offset_dims == tuple(range(batch, len(out))))


def _call(eqn, ins, build):
  """A nested function (jit, remat, custom_jvp, ...), evaluated in line."""
  jaxpr, consts = _nested(eqn)
  return _evaluate(jaxpr, consts, ins, build)


def _nested(eqn):
  p = eqn.params
  inner = p.get('jaxpr', p.get('call_jaxpr', p.get('fun_jaxpr')))
  return getattr(inner, 'jaxpr', inner), getattr(inner, 'consts', ())


def _scan(eqn, ins, build):
  """Stacked weights among ``xs`` become one layer and its key per iteration."""
  p, body = eqn.params, eqn.params['jaxpr']
  n, m = p['num_consts'], p['num_consts'] + p['num_carry']
  consts = _loop_consts(body.jaxpr, body.jaxpr.invars[:n], ins[:n], build)
  xs = [x.rows(x.w, jnp.arange(p['length'])) if isinstance(x, Lazy) else x
        for x in ins[m:]]

  def step(carry, x):
    outs = _evaluate(body.jaxpr, body.consts, [*consts, *carry, *x], build)
    outs = [*map(build, outs)]
    return outs[:m - n], outs[m - n:]

  carry, ys = lax.scan(
      step, [*map(build, ins[n:m])], xs, p['length'], p['reverse'],
      p['unroll'])
  return [*carry, *ys]


def _while(eqn, ins, build):
  p = eqn.params
  cond, body = p['cond_jaxpr'], p['body_jaxpr']
  n, m = p['cond_nconsts'], p['cond_nconsts'] + p['body_nconsts']
  in_cond = _loop_consts(cond.jaxpr, cond.jaxpr.invars[:n], ins[:n], build)
  in_body = _loop_consts(body.jaxpr, body.jaxpr.invars[:m - n], ins[n:m], build)

  def run(closed, consts, carry):
    outs = _evaluate(closed.jaxpr, closed.consts, [*consts, *carry], build)
    return [*map(build, outs)]

  return lax.while_loop(
      lambda carry: run(cond, in_cond, carry)[0],
      lambda carry: run(body, in_body, carry), [*map(build, ins[m:])])


def _cond(eqn, ins, build):
  index, *operands = ins
  def branch(closed):
    def run(*args):
      return [*map(build, _evaluate(closed.jaxpr, closed.consts, args, build))]
    return run
  branches = [branch(b) for b in eqn.params['branches']]
  return lax.switch(index.astype(jnp.int32), branches, *operands)


def _loop_consts(jaxpr, variables, values, build):
  """Keeps a loop's constant weights lazy only where each iteration consumes a
  part of them (a layer, some rows): else noise would be made anew each time."""
  return [x if isinstance(x, Lazy) and _consumed_by_parts(jaxpr, v)
          else build(x) for v, x in zip(variables, values)]


def _consumed_by_parts(jaxpr, var) -> bool:
  if any(v is var for v in jaxpr.outvars):
    return False
  for eqn in jaxpr.eqns:
    for i, v in enumerate(eqn.invars):
      if v is var and not _eqn_consumes_by_parts(eqn, i):
        return False
      if v is var and eqn.primitive.name in _PASSING:
        if not _consumed_by_parts(jaxpr, eqn.outvars[0]):
          return False
  return True


def _eqn_consumes_by_parts(eqn, i: int) -> bool:
  """Whether operand ``i`` is passed on, or taken apart by layers or rows."""
  name, p = eqn.primitive.name, eqn.params
  if name in _PASSING:
    return True
  if name in ('gather', 'slice', 'dynamic_slice'):
    return i == 0 and _takes_rows(eqn)
  if name == 'scan':
    if i >= p['num_consts']:
      return i >= p['num_consts'] + p['num_carry']
    return _consumed_by_parts(p['jaxpr'].jaxpr, p['jaxpr'].jaxpr.invars[i])
  if name == 'while':
    n, m = p['cond_nconsts'], p['cond_nconsts'] + p['body_nconsts']
    jaxpr = (p['cond_jaxpr'] if i < n else p['body_jaxpr']).jaxpr
    return i < m and _consumed_by_parts(
        jaxpr, jaxpr.invars[i if i < n else i - n])
  if name == 'cond':
    return i > 0 and all(_consumed_by_parts(b.jaxpr, b.jaxpr.invars[i - 1])
                         for b in p['branches'])
  if _RULES.get(name) is _call:
    inner, _ = _nested(eqn)
    return _consumed_by_parts(inner, inner.invars[i])
  return False


_PASSING = ('convert_element_type', 'reshape', 'squeeze', 'copy', 'copy_p',
            'sharding_constraint')
_RULES = {
    'convert_element_type': _cast,
    'copy': _same_block,
    'copy_p': _same_block,
    'sharding_constraint': _same_block,
    'reshape': _reshape,
    'squeeze': _reshape,
    'gather': _gather,
    'slice': _slice,
    'dynamic_slice': _slice,
    'scan': _scan,
    'while': _while,
    'cond': _cond,
} | dict.fromkeys(
    ('jit', 'pjit', 'closed_call', 'core_call', 'remat', 'remat2', 'checkpoint',
     'custom_jvp_call', 'custom_vjp_call', 'custom_vjp_call_jaxpr'), _call)
