"""Checks arguments. Each error names the argument and its allowed values.

Numbers may be Python or NumPy numbers, JAX arrays, or tracers, as
`optax.inject_hyperparams` and `jax.vmap` pass them. Only the dtypes and shapes
of JAX arrays are checked: reading a value would wait for the device.
"""

from collections.abc import Callable, Mapping
import functools
import inspect
import math
import numbers
import re
from typing import Any, cast, TypeVar
import warnings

import jax
import jax.numpy as jnp
import numpy as np

F = TypeVar('F', bound=Callable)


def whole(name: str, value: Any, least: int = 1) -> int:
  """Returns an argument that must be a Python or NumPy integer.

  JAX arrays are refused, because the value must be known at trace time.

  Args:
    name: Name of the argument, for the error.
    value: The argument.
    least: Smallest allowed value. Defaults to 1.

  Raises:
    ValueError: If the value is not such an integer or is below ``least``.
  """
  is_integer = isinstance(value, (int, np.integer)) and not isinstance(
      value, (bool, np.bool_))
  if not is_integer or value < least:
    raise ValueError(
        f'{name} must be a Python integer of at least {least}, got {value!r}; '
        'with optax.inject_hyperparams, list it in static_args.')
  return int(value)


def number(name: str, value: Any, *, above: float | None = None,
           least: float | None = None, below: float | None = None,
           most: float | None = None) -> Any:
  """Returns an argument that must be a finite real number, unchanged.

  For a JAX array or tracer, only the shape and the dtype are checked.

  Args:
    name: Name of the argument, for the error.
    value: The argument.
    above: Exclusive lower bound. Defaults to None, for no such bound.
    least: Inclusive lower bound. Defaults to None, for no such bound.
    below: Exclusive upper bound. Defaults to None, for no such bound.
    most: Inclusive upper bound. Defaults to None, for no such bound.

  Raises:
    ValueError: If the value is not a number, not finite, or out of bounds.
  """
  if isinstance(value, jax.Array):  # tracers are instances of jax.Array, too
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
  elif most is not None and real > most:
    wanted = f'at most {most}'
  else:
    return value
  raise ValueError(f'{name} must be {wanted}, got {value!r}.')


def _is_real(dtype) -> bool:
  """Returns whether a dtype is an integer or a floating-point dtype."""
  return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(
      dtype, jnp.integer)


def boolean(name: str, value: Any) -> bool:
  """Returns an argument that must be a Python or NumPy bool.

  Args:
    name: Name of the argument, for the error.
    value: The argument.

  Raises:
    ValueError: If the value is something else, such as a JAX array.
  """
  if not isinstance(value, (bool, np.bool_)):
    raise ValueError(f'{name} must be True or False, got {value!r}.')
  return bool(value)


def function(name: str, value: Any) -> Callable[..., Any]:
  """Returns an argument that must be callable.

  Args:
    name: Name of the argument, for the error.
    value: The argument.

  Raises:
    ValueError: If the value cannot be called.
  """
  if not callable(value):
    raise ValueError(f'{name} must be a function, got {value!r}.')
  return value


def floating(name: str, dtype: Any) -> Any:
  """Returns an argument that must be a floating-point dtype or None.

  Args:
    name: Name of the argument, for the error.
    dtype: The argument.

  Raises:
    ValueError: If the argument is a dtype of another kind, or not a dtype.
  """
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
  """Returns an argument that must be a tree of arrays.

  Args:
    name: Name of the argument, for the error.
    value: The argument.

  Raises:
    ValueError: If the value is None.
  """
  if value is None:
    raise ValueError(f'{name} must be a tree of arrays, got None.')
  return value


def rate(name: str, value: Any, *, above: float | None = None,
         groups: bool = True) -> Any:
  """Returns a checked hyperparameter: a number, a schedule, or groups of them.

  A schedule is returned as a function that checks each value when it is called.

  Args:
    name: Name of the argument, for the error.
    value: A number, a schedule (a function of the step number), or groups
      ``{regular expression: number or schedule}``.
    above: Exclusive lower bound. Defaults to None, for no bound.
    groups: Whether groups are allowed. Defaults to True.

  Raises:
    ValueError: If the value is something else, such as None.
  """
  if isinstance(value, Mapping):
    if not groups:
      raise ValueError(f'{name} must be one number or schedule, not groups.')
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
  """Returns the value of a number or schedule at step ``count``."""
  return value(count) if callable(value) else value


def expression(name: str, pattern: Any) -> re.Pattern[str]:
  """Returns an argument, which must be a regular expression, compiled.

  Args:
    name: Name of the argument, for the error.
    pattern: The regular expression as a string.

  Raises:
    ValueError: If ``pattern`` is not a string or cannot be compiled.
  """
  if not isinstance(pattern, str):
    raise ValueError(
        f'{name} must be a regular expression, got {pattern!r}.')
  try:
    return re.compile(pattern)
  except re.error as e:
    raise ValueError(
        f'{name} is {pattern!r}, which is not a valid regular expression: {e}.'
    ) from e


def check_names(value_fn: Callable[..., Any], **given: Any) -> None:
  """Checks that ``value_fn`` has no parameter that ``tx.update`` consumes.

  Args:
    value_fn: The loss function.
    **given: Arguments that ``tx.update`` uses itself and does not pass on to
      ``value_fn``. None means that the caller did not pass the argument.

  Raises:
    ValueError: If ``value_fn`` has a parameter with the name of an argument
      that was passed.
  """
  try:
    taken = inspect.signature(value_fn).parameters
  except (TypeError, ValueError):  # builtins may have no signature to read
    return
  for name, value in given.items():
    if value is not None and name in taken and taken[name].kind in (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY):
      raise ValueError(
          f'value_fn has an argument {name!r}, which tx.update uses itself and '
          'does not pass on; rename it, for example with value_fn=lambda '
          f'params, other: loss(params, {name}=other).')


def array(name: str, value: Any) -> jax.Array:
  """Returns an argument that must be an array of real numbers, as a JAX array.

  Args:
    name: Name of the argument, for the error.
    value: A value that `jnp.asarray` accepts.

  Raises:
    ValueError: If the value cannot be converted to an array, or the array does
      not contain integers or floats.
  """
  try:
    out = jnp.asarray(value)
  except (TypeError, ValueError):
    out = None
  if out is None or not _is_real(out.dtype):
    raise ValueError(f'{name} must be an array of numbers, got {value!r}.')
  return out


def warn_renamed(old: str, new: str) -> None:
  """Warns that a public name has changed.

  The warning points to the line of the user's program that uses the old name.

  Args:
    old: The old name.
    new: The new name.
  """
  warnings.warn(
      f'mezo_jax: {old} is now called {new}. The old name will stop working in '
      'version 0.3.', DeprecationWarning, stacklevel=3)


def renamed(**names: str) -> Callable[[F], F]:
  """Returns a decorator that accepts renamed arguments by their old names, too.

  An argument that is passed by its old name causes a deprecation warning.

  Args:
    **names: One ``old='new'`` for each renamed argument.
  """
  def decorate(fn: F) -> F:
    @functools.wraps(fn)
    def wrapper(*args, **kwargs):
      for old, new in names.items():
        if old in kwargs:
          if new in kwargs:
            raise TypeError(f'{old} is the old name of {new}; pass only {new}.')
          warn_renamed(old, new)
          kwargs[new] = kwargs.pop(old)
      return fn(*args, **kwargs)
    return cast(F, wrapper)
  return decorate
