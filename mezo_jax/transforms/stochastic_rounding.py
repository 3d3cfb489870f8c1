"""Stochastic rounding, by which half-precision weights move as float32 ones."""

from typing import Any, cast, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax.core import paths, sharding, xla
from mezo_jax.core.quantized import is_codes
from mezo_jax.directions import noise
from mezo_jax.directions import streams as streams_lib
from mezo_jax.perturb.api import zeros

_U32 = jnp.uint32
_SAMPLE = 2**31  # no direction has this number


class RoundingState(NamedTuple):
  """State of `round_stochastically`."""

  count: jax.Array  # shape=(), dtype=int32: steps made
  key: jax.Array  # shape=(), dtype=key<fry>: of the whole run


def round_stochastically(key: Any, mask: Any = None
                         ) -> optax.GradientTransformation:
  r"""Rounds bfloat16, float16 and quantised weights stochastically.

  The expectation of :math:`\theta + u` is then exact.

  At a usual :math:`\eta g`, rounding to nearest moves almost no half-precision
  weight (97 % of an update of 1e-6 is lost). It is the last link of a chain::

    chain(spsa(1e-3, key=key), sgd(1e-6), round_stochastically(key))

  Args:
    key: A `jax.random.key` or an integer seed. It may be the key of `spsa`: the
      bits are independent of its directions. Each step has bits of its own.
    mask: The leaves that are rounded stochastically, as `Directions.mask`.
      Updates of other leaves are rounded to nearest.

  Returns:
    An `optax.GradientTransformation` that needs ``params``. Its updates have
    the dtypes of the params.

  References:
    Connolly, Higham and Mary, 2021, "Stochastic rounding and its probabilistic
    backward error analysis".
  """
  noise.check_key(key)

  def init_fn(params):
    return sharding.beside(RoundingState(
        jnp.zeros([], jnp.int32), noise.state_key(key)), params)

  def update_fn(updates, state, params=None):
    if params is None:
      raise ValueError('round_stochastically needs params: tx.update(updates, '
                       'state, params).')
    params = sharding.fetched(params)
    used = paths.resolved(params, mask)
    half = {path: (paths.shape_of(p), is_stack)
            for (path, p), use, is_stack in zip(
                paths.named_leaves(params), used, paths.stacked(params))
            if use is not False
            and (is_codes(p) or jnp.result_type(p) in (
                jnp.bfloat16, jnp.float16))}
    key_ = noise.direction_key(state.key, state.count, _SAMPLE)[None]
    streams = streams_lib.of_leaves(key_, half)

    def finish(path, p, update):
      if path not in half:
        return _cast(p, update)
      if is_codes(p):
        bits = noise.words(streams[path], 0, update, 'rounding')
        return p.moved_by(p.steps(update, bits))
      bits = noise.words(streams[path], 0, p, 'rounding')
      update = xla.rounded(update, state.count)
      moved = stochastic_round(
          p.astype(jnp.float32) + update.astype(jnp.float32), p.dtype, bits)
      return (moved.astype(jnp.float32) - p.astype(jnp.float32)).astype(p.dtype)

    return paths.map_named(finish, params, updates), RoundingState(
        cast(jax.Array, optax.safe_increment(state.count)), state.key)

  return optax.GradientTransformation(init_fn, update_fn)


def to_nearest() -> optax.GradientTransformation:
  """Returns a transform that rounds updates to the dtypes of the params."""
  return optax.stateless(lambda updates, params: paths.map_named(
      lambda path, p, update: _cast(p, update), params, updates))


def _cast(p, update):
  if is_codes(p):
    return p.moved_by(p.steps(update, None))
  if noise.is_typed(p):
    return zeros(p)
  return update.astype(jnp.result_type(p))


def stochastic_round(x: jax.Array, dtype: jax.typing.DTypeLike, bits: jax.Array
                     ) -> jax.Array:
  """Rounds float32 to a narrower float so that the expectation is ``x``.

  It rounds up with probability (x - lower) / (upper - lower), where lower and
  upper are the neighbours of ``x`` (Connolly, Higham and Mary, 2021).

  Args:
    x: A float32 array.
    dtype: bfloat16, with exact probabilities, or float16, with probabilities of
      24 bits.
    bits: uint32 words of the shape of ``x``, uniform and independent of it.
  """
  if dtype == jnp.bfloat16:  # the cut part carries with that probability
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
