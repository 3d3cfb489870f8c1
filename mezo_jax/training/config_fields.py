"""The names and types of a config's fields, and a check of their values."""

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

WHERE = ('The fields of a config and their types are in '
         'mezo_jax/training/config.py.')


# --- names ------------------------------------------------------------------


def leaves(cls: type = config_lib.Train, before: str = '') -> Iterator[str]:
  """Yields the paths of all fields that hold a value, ``optimizer.name``."""
  hints: dict[str, Any] = typing.get_type_hints(cls)
  for name, hint in hints.items():
    if dataclasses.is_dataclass(hint):
      yield from leaves(cast(type, hint), f'{before}{name}.')
    else:
      yield before + name


def unknown(path: str, known: Sequence[str] = ()) -> str:
  """Returns a sentence about a field that does not exist, and what was
  probably meant.

  Args:
    path: As it was given, ``optimizer.lr``.
    known: The paths to choose from; all fields of a config if empty.
  """
  known = known or [*leaves()]
  wanted = path.rpartition('.')[2]
  last = {p: p.rpartition('.')[2] for p in known}
  initials = lambda name: ''.join(word[:1] for word in name.split('_'))
  close = difflib.get_close_matches(wanted, {*last.values()}, cutoff=0.7)
  # From the surest to the least sure sign.
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
  """Raises InputError for an attribute that is no field of a config, or a
  value that is not of its field's type."""
  hints: dict[str, Any] = typing.get_type_hints(type(config))
  for name in vars(config):
    if name not in hints:
      raise InputError(unknown(before + name))
  for name, hint in hints.items():
    value, path = getattr(config, name), before + name
    if dataclasses.is_dataclass(hint) and isinstance(value, cast(type, hint)):
      check_types(value, f'{path}.')
    elif not _is_of(value, hint):
      raise InputError(
          f'config: {path} is {value!r} and must be {_words(hint)}.')
    elif name == 'also':
      for i, also in enumerate(value):
        check_types(also, f'also[{i}].')


def _is_of(value, hint) -> bool:
  """Returns whether a value is of an annotation's type. A list counts as a
  tuple and an int as a float; a bool counts as no number."""
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
  """Returns the name of a type for an error message."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin in (typing.Union, types.UnionType):
    return ' or '.join(map(_words, args))
  if origin is tuple and args[-1] is Ellipsis:
    if args[0] is str:
      return "a tuple of texts, ('a', 'b')"
    return f'a tuple, each element {_words(args[0])}'
  if origin is tuple:
    return f'({", ".join(map(_words, args))})'
  if collections.abc.Callable in (hint, origin):
    return 'a function'
  names = {str: 'a text', int: 'an integer', float: 'a number',
           bool: 'True or False', type(None): 'None'}
  return names.get(hint, getattr(hint, '__name__', str(hint)))
