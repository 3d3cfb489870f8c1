r"""Reads the results of a loss function, and averages those of batch parts.

A ``value_fn`` returns one of

* a scalar, the loss of the batch,
* per-example losses ``[B]``, whose mean is the loss of the batch,
* ``(losses, weights)``, both ``[B]``, whose weighted mean
  :math:`\sum_i w_i v_i / \sum_i w_i` is the loss of the batch.

With the last two forms, the weight of each part of a batch is known. The
weighted mean over parts then equals the loss of the whole batch, even if the
loss is a mean over tokens and rows have different lengths. Losses are computed
in float32, or in float64 if ``value_fn`` returns float64.
"""

from collections.abc import Callable
import inspect
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from mezo_jax.core import dtypes, sharding


def sums(out: Any) -> tuple[jax.Array, jax.Array]:
  """Returns the sum of weighted losses and the sum of weights, both scalars.

  Args:
    out: The result of a ``value_fn``.

  Raises:
    ValueError: If the result has another form, or half precision. In half
      precision, the losses at +eps and -eps would mostly be equal.
  """
  parts = out if isinstance(out, (tuple, list)) else (out,)
  is_loss = all(map(_is_number, parts)) and len(parts) in (1, 2)
  if is_loss:
    shapes = [jnp.shape(x) for x in parts]
    # Weights go with losses [B] only.
    is_loss = shapes[0] == shapes[-1] and (
        len(shapes[0]) == 1 or shapes == [()])
  if not is_loss:
    found = jax.tree.map(lambda x: getattr(x, 'shape', x), out)
    raise ValueError(
        'value_fn must return a scalar, per-example losses [B], or (losses '
        f'[B], weights [B]); it returned shape {found}. If it returns (loss, '
        'aux), drop aux: value_fn=lambda *args, **kwargs: f(*args, '
        '**kwargs)[0].')
  values = jnp.asarray(parts[0])
  if values.dtype in (jnp.bfloat16, jnp.float16):
    raise ValueError(
        f'value_fn returned {values.dtype}. In this precision, the losses at '
        '+eps and -eps are mostly equal. Compute the loss from '
        'logits.astype(jnp.float32).')
  values = values.astype(dtypes.wide(values.dtype))
  if not values.ndim:
    return values, jnp.ones([], values.dtype)
  if len(parts) == 1:
    return jnp.sum(values), jnp.full([], values.size, values.dtype)
  weight = jnp.asarray(parts[1]).astype(values.dtype)
  # A loss with weight 0 may be NaN, such as that of a padding row.
  counted = jnp.where(weight != 0, values * weight, 0)
  return jnp.sum(counted), jnp.sum(weight)


def _is_number(x) -> bool:
  """Returns whether an object is a real number or an array of them."""
  try:
    return x is not None and not jnp.issubdtype(
        jnp.result_type(x), jnp.complexfloating)
  except (TypeError, ValueError):
    return False


def mean(out: Any) -> jax.Array:
  """Returns the loss of a batch, given the result of a ``value_fn``."""
  total, weight = sums(out)
  return total / weight


def of_rows(out: Any) -> jax.Array:
  """Returns the losses of the rows of a batch, [B].

  Args:
    out: The result of a ``value_fn``.

  Raises:
    ValueError: If it is not one value per row, or has half precision.
  """
  total, _ = sums(out)  # checks the result
  if isinstance(out, (tuple, list)) or jnp.ndim(out) != 1:
    raise ValueError(
        'this combine function compares the losses of each row, so value_fn '
        'must return one value per row, [B], without weights.')
  return jnp.asarray(out).astype(total.dtype)


def mean_over_parts(loss: Callable[..., Any], batch: dict[str, Any], parts: int
                    ) -> jax.Array:
  """Evaluates the loss of a batch in equal parts, one after the other.

  Args:
    loss: A function from a part of the batch to the result of a ``value_fn``.
    batch: Arguments of the loss, by name.
    parts: Number of parts.

  Returns:
    The loss of the whole batch, a scalar.
  """
  if parts == 1:
    return mean(loss(batch))
  rows, sums_of = in_parts(loss, batch, parts)
  total, weight = lax.map(sums_of, rows)
  return jnp.sum(total) / jnp.sum(weight)


def in_parts(loss: Callable[..., Any], batch: dict[str, Any], parts: int,
             what: str = 'micro_batches'
             ) -> tuple[list[Any], Callable[..., Any]]:
  """Splits a batch into equal parts, whose losses can be averaged.

  Args:
    loss: A function ``(part of the batch, *args) -> result of a value_fn``.
    batch: Arguments of the loss, by name.
    parts: Number of parts.
    what: Name of the option that splits the batch, for the error message.

  Returns:
    ``(rows, sums_of)``. The first are the split arrays; see `split_batch`.
    ``sums_of(rows, *args)`` returns the `sums` of one part. If there are
    several parts, it raises ValueError for a scalar loss, since the weight of
    each part is then unknown.
  """
  rows, with_rows = split_batch(batch, parts, what)
  has_many = bool(rows) and rows[0].shape[1] > 1

  def sums_of(rows, *args):
    out = loss(with_rows(rows), *args)
    shape = None if isinstance(out, (tuple, list)) else jnp.shape(out)
    # A result of shape [1] for many rows, as from ``jnp.mean(...,
    # keepdims=True)``, counts as a scalar.
    if parts > 1 and (shape == () or shape == (1,) and has_many):
      raise ValueError(
          f'{what}={parts} cannot be used with a value_fn that returns a '
          'scalar, since the weight of each part of the batch is unknown. '
          'Return per-example losses [B], or (losses, weights).')
    return sums(out)
  return rows, sums_of


def split_batch(batch: dict[str, Any], parts: int, what: str = 'micro_batches'
                ) -> tuple[list[Any], Callable[..., Any]]:
  """Splits the arrays of a batch into equal parts along their first axis.

  All arrays with axes are split, and must have the same number of rows. Each
  part gets everything else (numbers, arrays without axes, strings) unchanged.

  Args:
    batch: Arguments of a ``value_fn``, by name.
    parts: Number of parts.
    what: Name of the option that splits the batch, for the error message.

  Returns:
    ``(rows, with_rows)``. ``rows`` is a list of the split arrays, ``[parts, B /
    parts, ...]``. ``with_rows`` is a function that takes a list of the arrays
    of one part, ``[B / parts, ...]``, and returns the arguments of the loss for
    this part.

  Raises:
    ValueError: If the first axes differ, or ``parts`` does not divide them.
  """
  if parts > 1:
    _check_rows(batch, parts, what)
  leaves, tree = jax.tree.flatten(batch)
  rows = [i for i, x in enumerate(leaves) if getattr(x, 'ndim', 0)]

  def with_rows(part):
    out = [*leaves]
    for i, x in zip(rows, part):
      out[i] = x
    return tree.unflatten(out)
  return [sharding.split_rows(leaves[i], parts) for i in rows], with_rows


def _check_rows(batch: dict, parts: int, what: str) -> None:
  """Raises ValueError if the arrays of a batch cannot be split together."""
  # Maps each length of a first axis to the first array that has it.
  lengths = {}
  for path, x in jax.tree_util.tree_flatten_with_path(batch)[0]:
    if getattr(x, 'ndim', 0):
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      lengths.setdefault(x.shape[0], f'{name!r} of shape {[*x.shape]}')
  if not lengths and what == 'micro_batches':
    raise ValueError(f'{what}={parts} found no array to split. Pass the batch '
                     'to tx.update by the names of the arguments of value_fn.')
  if len(lengths) > 1:
    found = ', '.join(lengths.values())
    raise ValueError(
        f'{what}={parts} splits every array among the arguments of value_fn '
        f'along its first axis, but these axes differ: {found}. Close over '
        'arrays that do not have one entry per row, such as class weights: '
        'value_fn=lambda params, batch: loss(params, batch, weights).')
  for length, array in lengths.items():
    if length % parts:
      raise ValueError(
          f'{what}={parts} does not divide the first axis of {array} among the '
          'arguments of value_fn. Choose another number of parts, or close '
          'over arrays that are not part of the batch.')


def accepted(value_fn: Callable[..., Any], extra_args: dict[str, Any]
             ) -> dict[str, Any]:
  """Returns those extra arguments that a function can take by name.

  Returns all of them if the function has ``**kwargs`` or if its signature is
  not known.

  Args:
    value_fn: The function.
    extra_args: The arguments, by name.
  """
  try:
    taken = inspect.signature(value_fn).parameters.values()
  except (TypeError, ValueError):  # a builtin, or a compiled function
    return extra_args
  named = [p.name for p in taken if p.kind is not p.POSITIONAL_ONLY]
  if any(p.kind is p.VAR_KEYWORD for p in taken):
    return extra_args
  return {k: v for k, v in extra_args.items() if k in named}
