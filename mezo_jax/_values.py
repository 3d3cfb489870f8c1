r"""What a ``value_fn`` returns, and a batch's value from those of its parts.

A loss is one of

* a scalar;
* the rows' values :math:`v`, ``[B]``, of which the batch's is the mean;
* ``(values, weights)``, both ``[B]``: :math:`\sum_i w_i v_i / \sum_i w_i`.

The last two say what each part of a batch weighs, so that the mean over parts
is that of the whole batch exactly: a mean over tokens, say, of rows of unequal
length. Values are float32, or float64 where they are given so.
"""

from collections.abc import Callable
import inspect

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax import sharding


def sums(out) -> tuple[jax.Array, jax.Array]:
  """``(sum of weighted values, sum of weights)`` of what a value_fn returned.

  Raises:
    ValueError: if it is none of the three, or in half precision, of which a
      difference of two losses at ±eps would leave nothing.
  """
  values, *weights = out if isinstance(out, (tuple, list)) else (out,)
  if len(weights) > 1 or not all(
      _is_number(x) for x in (values, *weights)) or jnp.ndim(values) > 1 or (
          weights and (jnp.ndim(values) != 1
                       or jnp.shape(values) != jnp.shape(weights[0]))):
    found = jax.tree.map(lambda x: getattr(x, 'shape', x), out)
    raise ValueError(
        'value_fn must return a scalar, the rows\' values [B], or (values [B], '
        f'weights [B]); it returned shape {found}. Of (loss, aux) return the '
        'loss alone: value_fn=lambda *args, **kwargs: f(*args, **kwargs)[0].')
  values = jnp.asarray(values)
  if values.dtype in (jnp.bfloat16, jnp.float16):
    raise ValueError(
        f'value_fn returned {values.dtype}, in which the losses at +eps and '
        '-eps are mostly equal and their difference 0: compute the loss from '
        'logits.astype(jnp.float32).')
  values = values.astype(jnp.promote_types(jnp.float32, values.dtype))
  if not values.ndim:
    return values, jnp.ones([], values.dtype)
  if not weights:
    return jnp.sum(values), jnp.full([], values.size, values.dtype)
  weight = weights[0].astype(values.dtype)
  counted = jnp.where(weight != 0, values * weight, 0)  # padding may be NaN
  return jnp.sum(counted), jnp.sum(weight)


def _is_number(x) -> bool:
  try:
    return x is not None and not jnp.issubdtype(
        jnp.result_type(x), jnp.complexfloating)
  except (TypeError, ValueError):
    return False


def mean(out) -> jax.Array:
  """The value of a batch, from what a value_fn returned."""
  total, weight = sums(out)
  return total / weight


def check_parts(out, parts: int, equal_parts: bool,
                what: str = 'micro_batches') -> None:
  """Refuses the mean of scalars of parts, unless that is what is wanted.

  Raises:
    ValueError: if they are not known to weigh the same.
  """
  if parts > 1 and not equal_parts and not isinstance(
      out, (tuple, list)) and not jnp.ndim(out):
    raise ValueError(
        f'{what}={parts} cannot average a scalar loss: how much each '
        'part weighs is not known (of a mean over tokens, parts weigh as they '
        'have tokens). Let value_fn return the rows\' values [B] or (values, '
        'weights); or say equal_parts=True where the plain mean is right, as '
        'for a mean over rows.')


def mean_over_parts(loss: Callable, batch: dict, parts: int,
                    equal_parts: bool) -> jax.Array:
  """The value of a batch, evaluated in equal parts, one at a time."""
  if parts == 1:
    return mean(loss(batch))
  def of_part(part):
    out = loss(part)
    check_parts(out, parts, equal_parts)
    return sums(out)
  total, weight = lax.map(of_part, split_batch(batch, parts))
  return jnp.sum(total) / jnp.sum(weight)


def split_batch(batch: dict, parts: int, what: str = 'micro_batches') -> dict:
  """Every array [B, ...] as [parts, B / parts, ...].

  Raises:
    ValueError: if ``parts`` does not divide B.
  """
  def split(x):
    if not jnp.ndim(x) or x.shape[0] % parts:
      raise ValueError(
          f'{what}={parts} does not divide the leading axis of an array of '
          f'shape {jnp.shape(x)} among the arguments of value_fn; close '
          'over what is no part of a batch.')
    return sharding.split_rows(x, parts)
  return jax.tree.map(split, batch)


def accepted(value_fn: Callable, extra_args: dict) -> dict:
  """Those of the extra arguments that ``value_fn`` takes by name."""
  try:
    taken = inspect.signature(value_fn).parameters.values()
  except (TypeError, ValueError):  # a builtin, or a compiled function
    return extra_args
  if any(p.kind is p.VAR_KEYWORD for p in taken):
    return extra_args
  named = [p.name for p in taken if p.kind is not p.POSITIONAL_ONLY]
  return {k: v for k, v in extra_args.items() if k in named}
