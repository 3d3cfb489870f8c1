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
_NUMBERS = (numbers.Real, np.generic, np.ndarray, jax.Array)


def check(ok: Any, name: str, wanted: str, value: Any) -> Any:
  """Returns an argument if it is valid.

  Args:
    ok: Whether the argument is valid.
    name: Name of the argument, for the error.
    wanted: Describes the allowed values, for the error.
    value: The argument.

  Raises:
    ValueError: If ``ok`` is false.
  """
  if not ok:
    raise ValueError(f'{name} must be {wanted}, got {value!r}.')
  return value


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
  is_integer = isinstance(value, (int, np.integer)) and value is not True
  return int(check(
      is_integer and value is not False and value >= least, name,
      f'a Python integer of at least {least} (with optax.inject_hyperparams, '
      'list it in static_args)', value))


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
  is_jax = isinstance(value, jax.Array)  # so are tracers
  check(isinstance(value, _NUMBERS), name, 'a number', value)
  array = value if is_jax else np.asarray(value)
  check(not array.shape and _is_real(array.dtype), name, 'a number', value)
  if is_jax:
    return value
  real = array.item()
  check(math.isfinite(real), name, 'finite', value)
  check(above is None or real > above, name,
        f'above {above}' if above else 'positive', value)
  check(least is None or real >= least, name, f'at least {least}', value)
  check(below is None or real < below, name, f'below {below}', value)
  check(most is None or real <= most, name, f'at most {most}', value)
  return value


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
  return bool(check(
      isinstance(value, (bool, np.bool_)), name, 'True or False', value))


def function(name: str, value: Any) -> Callable[..., Any]:
  """Returns an argument that must be callable.

  Args:
    name: Name of the argument, for the error.
    value: The argument.

  Raises:
    ValueError: If the value cannot be called.
  """
  return check(callable(value), name, 'a function', value)


def floating(name: str, dtype: Any) -> Any:
  """Returns an argument that must be a floating-point dtype or None.

  Args:
    name: Name of the argument, for the error.
    dtype: The argument.

  Raises:
    ValueError: If the argument is a dtype of another kind, or not a dtype.
  """
  try:
    ok = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
  except TypeError:  # not a dtype
    ok = False
  return check(ok, name, 'a floating-point dtype', dtype)


def tree(name: str, value: Any) -> Any:
  """Returns an argument that must be a tree of arrays.

  Args:
    name: Name of the argument, for the error.
    value: The argument.

  Raises:
    ValueError: If the value is None.
  """
  return check(value is not None, name, 'a tree of arrays', value)


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
    check(groups, name, 'one number or schedule, not groups', value)
    check(value, name, 'a number, or at least one regular expression with its '
          'number', value)
    out = {}
    for pattern, one in value.items():
      expression(f'a group of {name}', pattern)
      label = f'{name}[{pattern!r}]'
      out[pattern] = rate(label, one, above=above, groups=False)
    return out
  if callable(value) and not isinstance(value, type):
    return lambda count: number(f'{name}(step)', value(count), above=above)
  wanted = 'a number or a schedule (a function of the step number)'
  if groups:
    wanted += ', or groups of them'
  check(isinstance(value, _NUMBERS), name, wanted, value)
  return number(name, value, above=above)


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
  check(isinstance(pattern, str), name, 'a regular expression', pattern)
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
  by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD,
             inspect.Parameter.KEYWORD_ONLY)
  for name, value in given.items():
    if value is None or name not in taken:
      continue
    if taken[name].kind in by_name:
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
    ok = _is_real(out.dtype)
  except (TypeError, ValueError):
    out, ok = value, False
  check(ok, name, 'an array of numbers', value)
  return cast(jax.Array, out)


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
