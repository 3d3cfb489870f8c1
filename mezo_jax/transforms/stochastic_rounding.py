"""Provides stochastic rounding of updates to half-precision weights."""

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
# Number that is folded into the key of a step, in place of the number of a
# direction. No direction has it, so the bits are independent of all directions.
_SAMPLE = 2**31


class RoundingState(NamedTuple):
  """Holds the state of `round_stochastically`.

  Attributes:
    count: Number of steps so far, int32 [].
    key: Key of the whole run, a typed threefry2x32 key [].
  """

  count: jax.Array
  key: jax.Array


def round_stochastically(key: Any, mask: Any = None
                         ) -> optax.GradientTransformation:
  r"""Rounds updated weights stochastically to their dtype.

  Let a and b be the neighbours of :math:`\theta + u` in the dtype of
  :math:`\theta`, with a <= b. The updated weight is

  .. math:: \theta' = \begin{cases} b & \text{with probability }
            (\theta + u - a) / (b - a) \\ a & \text{otherwise} \end{cases},
            \qquad \text{so that } E[\theta'] = \theta + u.

  This applies to bfloat16, float16 and quantised weights. With a typical
  learning rate, rounding to nearest would leave almost all half-precision
  weights where they are: 97 % of an update of 1e-6 would be lost. Use this
  transform as the last link of a chain::

    chain(spsa(1e-3, key=key), sgd(1e-6), round_stochastically(key))

  Args:
    key: A `jax.random.key` or an integer seed. It may be the key of `spsa`,
      since the random bits are independent of the directions. Each step has new
      bits.
    mask: The leaves that are rounded stochastically, in the forms of
      `Directions.mask`. The updates of other leaves are rounded to nearest.
      Defaults to None, for all leaves.

  Returns:
    An `optax.GradientTransformation` whose ``update`` needs ``params``. Its
    updates have the dtypes of the params, and its state is a `RoundingState`.

  Raises:
    ValueError: If ``key`` is neither a key nor a seed. ``update`` raises it if
      ``params`` are missing or ``mask`` does not fit them.

  References:
    Connolly, Higham and Mary, 2021, "Stochastic rounding and its probabilistic
    backward error analysis".

  Example:
    >>> import jax.numpy as jnp, mezo_jax, optax
    >>> tx = optax.chain(mezo_jax.spsa(1e-3, key=0), optax.sgd(1e-6),
    ...                  mezo_jax.round_stochastically(0))
    >>> params = jnp.ones(3, jnp.bfloat16)
    >>> updates, state = tx.update(None, tx.init(params), params,
    ...                            value_fn=lambda params: jnp.float32(1))
    >>> updates.dtype.name
    'bfloat16'
  """
  noise.check_key(key)

  def init_fn(params):
    return sharding.beside(RoundingState(
        jnp.zeros([], jnp.int32), noise.state_key(key)), params)

  def update_fn(updates, state, params=None):
    if params is None:
      raise ValueError('round_stochastically needs params: call '
                       'tx.update(updates, state, params).')
    params = sharding.fetched(params)
    used = paths.resolved(params, mask)
    half = {}
    for (path, p), use, is_stack in zip(
        paths.named_leaves(params), used, paths.stacked(params)):
      if use is not False and _is_coarse(p):
        half[path] = paths.shape_of(p), is_stack
    key_ = noise.direction_key(state.key, state.count, _SAMPLE)[None]
    streams = streams_lib.of_leaves(key_, half)

    def finish(path, p, update):
      """Returns the rounded update of one leaf."""
      if path not in half:
        return _cast(p, update)
      if is_codes(p):
        bits = noise.words(streams[path], 0, update, 'rounding')
        return p.moved_by(p.steps(update, bits))
      bits = noise.words(streams[path], 0, p, 'rounding')
      update = xla.rounded(update, state.count)
      old = p.astype(jnp.float32)
      moved = stochastic_round(old + update.astype(jnp.float32), p.dtype, bits)
      return (moved.astype(jnp.float32) - old).astype(p.dtype)

    updates = paths.map_named(finish, params, updates)
    count = cast(jax.Array, optax.safe_increment(state.count))
    return updates, RoundingState(count, state.key)

  return optax.GradientTransformation(init_fn, update_fn)


def _is_coarse(p) -> bool:
  """Returns whether a param is quantised or has half precision."""
  return is_codes(p) or jnp.result_type(p) in (jnp.bfloat16, jnp.float16)


def to_nearest() -> optax.GradientTransformation:
  """Returns a transform that rounds updates to the dtypes of the params."""
  return optax.stateless(lambda updates, params: paths.map_named(
      lambda path, p, update: _cast(p, update), params, updates))


def _cast(p, update):
  """Returns an update rounded to nearest, in the dtype of its param."""
  if is_codes(p):
    return p.moved_by(p.steps(update, None))
  if noise.is_typed(p):
    return zeros(p)
  return update.astype(jnp.result_type(p))


def stochastic_round(x: jax.Array, dtype: jax.typing.DTypeLike, bits: jax.Array
                     ) -> jax.Array:
  """Rounds float32 numbers to a narrower dtype, so that the expectation is x.

  A number is rounded up with probability (x - lower) / (upper - lower), where
  lower and upper are its neighbours in the narrower dtype (Connolly, Higham and
  Mary, 2021).

  Args:
    x: A float32 array.
    dtype: bfloat16 or float16. The probability of rounding up is exact for
      bfloat16, and is rounded to 24 bits for float16.
    bits: Uniform random uint32 words, independent of ``x``, of its shape.

  Returns:
    An array of the shape of ``x`` with this dtype.
  """
  if dtype == jnp.bfloat16:
    # bfloat16 is the upper half of float32. Adding 16 random bits to the lower
    # half carries into the upper half with exactly the right probability.
    word = lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 16)
    cut = lax.bitcast_convert_type(word & _U32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), cut, x).astype(dtype)
  # Choose between the nearest number and the neighbour on the other side of x.
  near = x.astype(dtype)
  error = x - near.astype(jnp.float32)
  toward = jnp.where(error > 0, jnp.inf, -jnp.inf).astype(dtype)
  far = lax.nextafter(near, toward)
  gap = jnp.abs(far.astype(jnp.float32) - near.astype(jnp.float32))
  unit = (bits >> 8).astype(jnp.float32) * np.float32(2**-24)
  use_far = (unit * gap < jnp.abs(error)) & jnp.isfinite(far)
  return jnp.where(use_far, far, near)
