"""Lists the fields of a config, suggests corrections, and checks types."""

import collections.abc
from collections.abc import Iterator, Sequence
import dataclasses
import difflib
import numbers
import types
import typing
from typing import Any, cast

import numpy as np

from mezo_jax.core.errors import InputError
from mezo_jax.training import config as config_lib

# The sentence that ends errors about fields.
WHERE = ('The fields of a config and their types are in '
         'mezo_jax/training/config.py.')


# --- names ------------------------------------------------------------------


def leaves(cls: type = config_lib.Train, before: str = '') -> Iterator[str]:
  """Yields the paths of all fields that hold a value, like ``optimizer.name``.

  Args:
    cls: The dataclass whose fields are listed. Defaults to the whole config.
    before: Prefix of each path. Defaults to ''.
  """
  hints: dict[str, Any] = typing.get_type_hints(cls)
  for name, hint in hints.items():
    if dataclasses.is_dataclass(hint):
      yield from leaves(cast(type, hint), f'{before}{name}.')
    else:
      yield before + name


def literals(cls: type = config_lib.Train) -> set[Any]:
  """Returns the `typing.Literal` types of the fields that have one.

  Args:
    cls: The dataclass whose fields are examined, together with those of the
      dataclasses in it. Defaults to the whole config.
  """
  found = set()
  for hint in typing.get_type_hints(cls).values():
    if dataclasses.is_dataclass(hint):
      found |= literals(cast(type, hint))
    elif typing.get_origin(hint) is typing.Literal:
      found.add(hint)
  return found


def unknown(path: str, known: Sequence[str] = ()) -> str:
  """Returns the error message for a field that does not exist.

  The message suggests up to three fields that were probably meant.

  Args:
    path: The path that the user gave, such as ``optimizer.lr``.
    known: The paths that may be suggested. Defaults to all fields of a config.
  """
  if path in config_lib.RENAMED:
    parent = path.rpartition('.')[0]
    now = f'{parent}.{config_lib.RENAMED[path]}'.lstrip('.')
    return f'config: {path} is now called {now}; use the new name.'
  known = known or [*leaves()]
  wanted = path.rpartition('.')[2]
  last = {p: p.rpartition('.')[2] for p in known}
  initials = lambda name: ''.join(word[:1] for word in name.split('_'))
  close = difflib.get_close_matches(wanted, {*last.values()}, cutoff=0.7)
  # Try the most reliable criterion first: the same name in another group, the
  # initials of a name ('lr'), a similar spelling, and a word in common.
  for meant in (lambda name: name == wanted,
                lambda name: initials(name) == wanted,
                lambda name: name in close,
                lambda name: name in wanted.split('_')
                or wanted in name.split('_')):
    found = [p for p in known if meant(last[p])]
    found = sorted(found, key=lambda p: p.count('.') != path.count('.'))[:3]
    if found:
      return (f'config has no field {path!r}; did you mean '
              f'{" or ".join(found)}? {WHERE}')
  return f'config has no field {path!r}. {WHERE}'


# --- values -----------------------------------------------------------------


def check_types(config: Any, before: str = '') -> None:
  """Checks that a config has only known fields, with values of their types.

  Args:
    config: A `mezo_jax.training.config.Train`, or one of the dataclasses in it.
    before: Prefix of the paths in error messages. Defaults to ''.

  Raises:
    InputError: for an attribute that is not a field, or a value of the wrong
      type.
  """
  hints: dict[str, Any] = typing.get_type_hints(type(config))
  for name in vars(config):
    if name not in hints:
      raise InputError(unknown(before + name))
  for name, hint in hints.items():
    value, path = getattr(config, name), before + name
    if dataclasses.is_dataclass(hint) and isinstance(value, cast(type, hint)):
      check_types(value, f'{path}.')
    elif typing.get_origin(hint) is typing.Literal:
      known = typing.get_args(hint)
      if not isinstance(value, str) or value not in known:
        raise InputError(f'config: unknown {path} {value!r}; choose one of '
                         f'{", ".join(filter(None, known))}.')
    elif not _is_of(value, hint):
      raise InputError(
          f'config: {path} is {value!r} but must be {_words(hint)}.')
    elif name == 'also':
      for i, also in enumerate(value):
        check_types(also, f'also[{i}].')


def _is_of(value, hint) -> bool:
  """Returns whether a value has the type of an annotation.

  A list is accepted as a tuple, and an int as a float. A bool is not accepted
  as a number, although it is an int in Python.
  """
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return any(_is_of(value, each) for each in args)
  if origin is tuple:
    if not isinstance(value, tuple | list):
      return False
    if args[-1] is Ellipsis:
      return all(_is_of(each, args[0]) for each in value)
    return len(value) == len(args) and all(map(_is_of, value, args))
  if collections.abc.Callable in (hint, origin):
    return callable(value)
  is_bool = isinstance(value, bool | np.bool_)
  if hint is float:
    return isinstance(value, numbers.Real) and not is_bool
  if hint is int:
    return isinstance(value, numbers.Integral) and not is_bool
  if hint is bool:
    return is_bool
  return isinstance(value, hint)


def _words(hint) -> str:
  """Returns the description of a type for an error message."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(map(_words, args))
  if origin is tuple and args[-1] is Ellipsis:
    if args[0] is str:
      return "a tuple of strings, ('a', 'b')"
    return f'a tuple, each element {_words(args[0])}'
  if origin is tuple:
    return f'({", ".join(map(_words, args))})'
  if collections.abc.Callable in (hint, origin):
    return 'a function'
  names = {str: 'a string', int: 'an integer', float: 'a number',
           bool: 'True or False', type(None): 'None'}
  return names.get(hint, getattr(hint, '__name__', str(hint)))
