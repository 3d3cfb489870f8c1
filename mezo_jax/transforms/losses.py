r"""The forms of a loss, and the loss of a batch from those of its parts.

A ``value_fn`` returns one of

* a scalar;
* per-example losses :math:`v`, ``[B]``, whose mean is the loss of the batch;
* ``(losses, weights)``, both ``[B]``: :math:`\sum_i w_i v_i / \sum_i w_i`.

The last two tell how much each part of a batch weighs, so the mean over parts
equals the loss of the whole batch, for example a mean over tokens with rows of
unequal length. Losses are float32, or float64 if they are given so.
"""

from collections.abc import Callable
import inspect
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import dtypes, sharding


def sums(out: Any) -> tuple[jax.Array, jax.Array]:
  """Returns ``(sum of weighted losses, sum of weights)`` of a ``value_fn``'s
  result.

  Raises:
    ValueError: If the result has another form, or half precision, in which the
      losses at +eps and -eps would mostly be equal.
  """
  values, *weights = out if isinstance(out, (tuple, list)) else (out,)
  if len(weights) > 1 or not all(
      _is_number(x) for x in (values, *weights)) or jnp.ndim(values) > 1 or (
          weights and (jnp.ndim(values) != 1
                       or jnp.shape(values) != jnp.shape(weights[0]))):
    found = jax.tree.map(lambda x: getattr(x, 'shape', x), out)
    raise ValueError(
        'value_fn must return a scalar, per-example losses [B], or (losses '
        f'[B], weights [B]); it returned shape {found}. If it returns (loss, '
        'aux), drop aux: value_fn=lambda *args, **kwargs: f(*args, '
        '**kwargs)[0].')
  values = jnp.asarray(values)
  if values.dtype in (jnp.bfloat16, jnp.float16):
    raise ValueError(
        f'value_fn returned {values.dtype}, in which the losses at +eps and '
        '-eps are mostly equal and their difference 0: compute the loss from '
        'logits.astype(jnp.float32).')
  values = values.astype(dtypes.wide(values.dtype))
  if not values.ndim:
    return values, jnp.ones([], values.dtype)
  if not weights:
    return jnp.sum(values), jnp.full([], values.size, values.dtype)
  weight = jnp.asarray(weights[0]).astype(values.dtype)
  counted = jnp.where(weight != 0, values * weight, 0)  # padding may be NaN
  return jnp.sum(counted), jnp.sum(weight)


def _is_number(x) -> bool:
  try:
    return x is not None and not jnp.issubdtype(
        jnp.result_type(x), jnp.complexfloating)
  except (TypeError, ValueError):
    return False


def mean(out: Any) -> jax.Array:
  """Returns the loss of a batch, from a ``value_fn``'s result."""
  total, weight = sums(out)
  return total / weight


def check_parts(out: Any, parts: int, what: str = 'micro_batches',
                rows: int | None = None) -> None:
  """Checks that losses of parts can be averaged.

  Args:
    out: What a value_fn returned for one part.
    parts: How many parts there are.
    what: The option that asks for parts, for the error.
    rows: How many rows a part has, if it is known. One value for several rows,
      as from ``jnp.mean(..., keepdims=True)``, counts as a scalar.

  Raises:
    ValueError: If there are several parts and ``out`` is a scalar, since the
      weight of each part is then unknown.
  """
  if parts == 1 or isinstance(out, (tuple, list)):
    return
  is_one_of_many = jnp.shape(out) == (1,) and rows is not None and rows > 1
  if not jnp.ndim(out) or is_one_of_many:
    raise ValueError(
        f'{what}={parts} cannot average a scalar loss: the weight of each part '
        'is unknown (in a mean over tokens, a part weighs as much as it has '
        'tokens). Return per-example losses [B] from value_fn, or (losses, '
        'weights).')


def mean_over_parts(loss: Callable[..., Any], batch: dict[str, Any], parts: int
                    ) -> jax.Array:
  """Returns the value of a batch, evaluated in equal parts, one at a time."""
  if parts == 1:
    return mean(loss(batch))
  rows, with_rows = split_batch(batch, parts)
  count = rows_of_parts(rows)
  def of_part(rows):
    out = loss(with_rows(rows))
    check_parts(out, parts, rows=count)
    return sums(out)
  total, weight = lax.map(of_part, rows)
  return jnp.sum(total) / jnp.sum(weight)


def split_batch(batch: dict[str, Any], parts: int, what: str = 'micro_batches'
                ) -> tuple[list[Any], Callable[..., Any]]:
  """Splits the arrays of a batch along their leading axis.

  All arrays that have axes are batch arrays, and must have the same number of
  rows. Everything else (numbers, arrays without axes, strings) is passed on
  whole to each part.

  Args:
    batch: The arguments of a ``value_fn``.
    parts: How many parts of equal size there are.
    what: The option that asks for parts, for the error.

  Returns:
    The arrays as ``[parts, B / parts, ...]``, and a function that puts those of
    one part, ``[B / parts, ...]``, in the place of the batch's.

  Raises:
    ValueError: if leading axes differ, or ``parts`` does not divide them.
  """
  leaves, tree = jax.tree.flatten(batch)
  is_rows = [bool(getattr(x, 'ndim', 0)) for x in leaves]
  rows = [x for x, b in zip(leaves, is_rows) if b]
  if parts > 1:
    _check_rows(batch, parts, what)

  def with_rows(rows):
    rows = iter(rows)
    return jax.tree.unflatten(tree, [
        next(rows) if b else x for x, b in zip(leaves, is_rows)])
  return [sharding.split_rows(x, parts) for x in rows], with_rows


def rows_of_parts(rows: list[Any]) -> int | None:
  """Returns how many rows each part of `split_batch` has, if there are any."""
  return rows[0].shape[1] if rows else None


def _check_rows(batch: dict, parts: int, what: str) -> None:
  """Raises ValueError for arrays that cannot be split together."""
  lengths = {}  # of leading axes: the path of the first array that has it
  for path, x in jax.tree_util.tree_flatten_with_path(batch)[0]:
    if getattr(x, 'ndim', 0):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      lengths.setdefault(x.shape[0], f'{name!r} of shape {[*x.shape]}')
  if not lengths and what == 'micro_batches':
    raise ValueError(f'{what}={parts} found no array to split: pass the batch '
                     'to tx.update under the names of value_fn\'s arguments.')
  if len(lengths) > 1:
    found = ', '.join(lengths.values())
    raise ValueError(
        f'{what}={parts} splits every array among the arguments of value_fn '
        f'along its leading axis, and those differ: {found}. Close over arrays '
        'that do not have one entry for each row, such as class weights: '
        'value_fn=lambda params, batch: loss(params, batch, weights).')
  for length, array in lengths.items():
    if length % parts:
      raise ValueError(
          f'{what}={parts} does not divide the leading axis of {array} among '
          'the arguments of value_fn; close over arrays that are not part of a '
          'batch.')


def accepted(value_fn: Callable[..., Any], extra_args: dict[str, Any]
             ) -> dict[str, Any]:
  """Returns the extra arguments that a function takes by name."""
  try:
    taken = inspect.signature(value_fn).parameters.values()
  except (TypeError, ValueError):  # a builtin, or a compiled function
    return extra_args
  if any(p.kind is p.VAR_KEYWORD for p in taken):
    return extra_args
  named = [p.name for p in taken if p.kind is not p.POSITIONAL_ONLY]
  return {k: v for k, v in extra_args.items() if k in named}
