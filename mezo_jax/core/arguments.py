"""Checks of arguments. Each error names the argument and says what it may be.

Numbers may be Python's or NumPy's, JAX arrays or tracers, as they come from
`optax.inject_hyperparams` and `jax.vmap`. The values of JAX arrays are not
looked at, since that would wait for the device.
"""

from collections.abc import Callable, Mapping
import inspect
import math
import numbers
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def whole(name: str, value: Any, least: int = 1) -> int:
  """Returns an integer that is known while programs are traced.

  Raises:
    ValueError: if it is not one, or below ``least``.
  """
  is_integer = isinstance(value, (int, np.integer)) and not isinstance(
      value, (bool, np.bool_))
  if not is_integer or value < least:
    raise ValueError(
        f'{name} must be a Python integer of at least {least}, got {value!r}; '
        'under optax.inject_hyperparams name it in static_args.')
  return int(value)


def number(name: str, value: Any, *, above: float | None = None,
           least: float | None = None, below: float | None = None) -> Any:
  """Returns a real number, whose bounds are checked where it is known.

  Raises:
    ValueError: if it is not a number, not finite, or out of bounds.
  """
  if isinstance(value, jax.Array):  # a tracer too
    if value.shape or not _is_real(value.dtype):
      raise ValueError(f'{name} must be a number, got an array '
                       f'{value.dtype}{list(value.shape)}.')
    return value
  known = isinstance(value, np.ndarray) and not value.shape
  if not known and not isinstance(value, (numbers.Real, np.generic)) or (
      isinstance(value, bool) or not _is_real(np.asarray(value).dtype)):
    raise ValueError(f'{name} must be a number, got {value!r}.')
  real = np.asarray(value).item()
  if not math.isfinite(real):
    wanted = 'finite'
  elif above is not None and not real > above:
    wanted = f'above {above}' if above else 'positive'
  elif least is not None and real < least:
    wanted = f'at least {least}'
  elif below is not None and real >= below:
    wanted = f'below {below}'
  else:
    return value
  raise ValueError(f'{name} must be {wanted}, got {value!r}.')


def _is_real(dtype) -> bool:
  return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(
      dtype, jnp.integer)


def boolean(name: str, value: Any) -> bool:
  """Returns a bool that is known while programs are traced."""
  if not isinstance(value, (bool, np.bool_)):
    raise ValueError(f'{name} must be True or False, got {value!r}.')
  return bool(value)


def function(name: str, value: Any) -> Callable[..., Any]:
  """Returns something that can be called."""
  if not callable(value):
    raise ValueError(f'{name} must be a function, got {value!r}.')
  return value


def floating(name: str, dtype: Any) -> Any:
  """Returns a dtype of real floating-point numbers; None stays None."""
  if dtype is None:
    return None
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found is None or not jnp.issubdtype(found, jnp.floating):
    raise ValueError(f'{name} must be a floating-point dtype, got {dtype!r}.')
  return dtype


def tree(name: str, value: Any) -> Any:
  """Returns a tree, which may not be None."""
  if value is None:
    raise ValueError(f'{name} must be a tree of arrays, got None.')
  return value


def rate(name: str, value: Any, *, above: float | None = None,
         groups: bool = True) -> Any:
  """Returns a number, a schedule, or groups ``{regular expression: either}``.

  What a schedule returns is checked when it is called.

  Raises:
    ValueError: if it is something else, such as None.
  """
  if isinstance(value, Mapping):
    if not groups:
      raise ValueError(f'{name} must be one number or schedule, no groups.')
    if not value:
      raise ValueError(f'{name} has no groups: give a number, or at least one '
                       'regular expression with its number.')
    for pattern in value:
      expression(f'a group of {name}', pattern)
    return {pattern: rate(f'{name}[{pattern!r}]', v, above=above, groups=False)
            for pattern, v in value.items()}
  if isinstance(value, type) or not callable(value):
    try:
      return number(name, value, above=above)
    except ValueError as e:
      if isinstance(value, (numbers.Real, jax.Array, np.ndarray)):
        raise
      raise ValueError(
          f'{name} must be a number or a schedule (a function of the step '
          f'number){", or groups of them" if groups else ""}, got {value!r}.'
      ) from e
  return lambda count: number(
      f'{name}(step)', value(count), above=above)


def at(value: Any, count: jax.Array | int) -> Any:
  """Returns the value of a rate at a step; a schedule is called."""
  return value(count) if callable(value) else value


def expression(name: str, pattern: Any) -> re.Pattern[str]:
  """Returns a compiled regular expression.

  Raises:
    ValueError: if it is not one.
  """
  if not isinstance(pattern, str):
    raise ValueError(
        f'{name} must be a regular expression, got {pattern!r}.')
  try:
    return re.compile(pattern)
  except re.error as e:
    raise ValueError(
        f'{name} is {pattern!r}, which is not a regular expression: {e}.'
    ) from e


def check_names(value_fn: Callable[..., Any], **given: Any) -> None:
  """Checks that ``value_fn`` needs no argument that ``tx.update`` consumes.

  Args:
    value_fn: The loss.
    **given: Arguments of ``tx.update`` that it does not pass on; None for those
      that were not given.

  Raises:
    ValueError: If ``value_fn`` has an argument of the name of one of them.
  """
  try:
    taken = inspect.signature(value_fn).parameters
  except (TypeError, ValueError):  # a builtin, or a compiled function
    return
  for name, value in given.items():
    if value is not None and name in taken and taken[name].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY):
      raise ValueError(
          f'value_fn has an argument {name!r}, which tx.update takes itself '
          'and does not pass on: give it another name, as in value_fn=lambda '
          f'params, other: loss(params, {name}=other).')


def array(name: str, value: Any) -> jax.Array:
  """Returns an array of real numbers.

  Raises:
    ValueError: if it is not one.
  """
  try:
    out = jnp.asarray(value)
  except (TypeError, ValueError):
    out = None
  if out is None or not _is_real(out.dtype):
    raise ValueError(f'{name} must be an array of numbers, got {value!r}.')
  return out
