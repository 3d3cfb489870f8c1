"""The fields of a config: their names, their types, and how a command line
sets them (``--config.FIELD=VALUE``)."""

import collections
import collections.abc
from collections.abc import Iterator, Sequence
import dataclasses
import difflib
import numbers
import os
import re
import traceback
import types
import typing

from absl import flags
from ml_collections import config_flags
import numpy as np

from mezo_jax.core.errors import InputError
from mezo_jax.tasks import task as task_lib
from mezo_jax.training import config as config_lib

_WHERE = ('The fields of a config and their types are in '
          'mezo_jax/training/config.py.')
_FLAG = re.compile(r'--?(?:no)?config\.([^=]*)')


# --- names ------------------------------------------------------------------


def leaves(cls=config_lib.Train, before: str = '') -> Iterator[str]:
  """Yields the paths of all fields that hold a value, ``optimizer.name``."""
  for name, hint in typing.get_type_hints(cls).items():
    if dataclasses.is_dataclass(hint):
      yield from leaves(hint, f'{before}{name}.')
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
              f'{" or ".join(found)}? {_WHERE}')
  return f'config has no field {path!r}. {_WHERE}'


def failure(error: Exception, file: str = '') -> str:
  """Returns a sentence about a config that did not load.

  Args:
    error: What was raised.
    file: The config's file; what fails there for reasons of its own is reported
      with its line.
  """
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if file and os.path.abspath(frame.filename) == os.path.abspath(file)]
  if isinstance(error, IndexError) and not lines:
    return ('the command line changes a task, --config.also[N], that the '
            f'config does not have. {_WHERE}')
  # A config's file raises KeyError for a variant that it does not have.
  expected = isinstance(error, KeyError | OSError | flags.Error) or (
      isinstance(error, TypeError) and not lines)
  text = str(error.args[-1] if expected and error.args else error)
  message = ' '.join(text.split())
  found = re.search(
      r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'",
      message)
  groups = {config_lib.Train.__name__: ''} | {
      hint.__name__: f'{name}.' for name, hint in typing.get_type_hints(
          config_lib.Train).items() if dataclasses.is_dataclass(hint)}
  if found and found.group(1) in groups:
    return unknown(groups[found.group(1)] + found.group(2))
  if 'Traceback' in text:  # config_flags writes one into some errors
    at = re.findall(rf'"{re.escape(file)}", line (\d+)', text)
    text = text.strip().splitlines()[-1]
    return f'the config {file}{", line " + at[-1] if at else ""} failed: {text}'
  if expected:
    return f'{message}. {_WHERE}'
  at = f', line {lines[-1]}' if lines else ''
  return (f'the config {file}{at} failed with {type(error).__name__}: '
          f'{message}.')


def given(argv: Sequence[str]) -> list[str]:
  """Returns the paths of the fields that a command line sets."""
  found = [_FLAG.match(argument) for argument in argv[1:]]
  return [*dict.fromkeys(match.group(1) for match in found if match)]


def check_names(argv: Sequence[str]) -> None:
  """Raises InputError for a field of the command line that does not exist,
  that holds other fields, or that is a tuple and given twice."""
  times = collections.Counter(
      match.group(1) for match in map(_FLAG.match, argv[1:]) if match)
  for path in given(argv):
    if f'--noconfig.{path}=' in ' '.join(argv):
      raise InputError(
          f'--noconfig.{path} takes no value: it sets a field to False. Write '
          f'--config.{path}=VALUE.')
    if path.startswith('also.'):
      raise InputError(
          f'--config.{path} does not say which task: write '
          f'--config.also[0].{path.removeprefix("also.")} for the first one.')
    cls = config_lib.Train
    for name in re.sub(r'\[-?\d+\]', '', path).split('.'):
      holds_fields = dataclasses.is_dataclass(cls)
      hints = typing.get_type_hints(cls) if holds_fields else {}
      if name not in hints:
        raise InputError(unknown(path))
      cls = config_lib.Also if name == 'also' and path != 'also' else (
          hints[name])
    if dataclasses.is_dataclass(cls):
      names = [f.name for f in dataclasses.fields(cls)]
      raise InputError(
          f'--config.{path} has no value of its own: set one of its fields, '
          f'--config.{path}.{names[0]} for example; it has '
          f'{", ".join(names)}.')
    # config_flags would join the two; of other fields the last one counts.
    if times[path] > 1 and typing.get_origin(cls) is tuple:
      raise InputError(
          f'--config.{path} is given {times[path]} times: give it once.')


def check_is_config(config) -> None:
  """Raises InputError for what the get_config of a file returned, if it is not
  a config, and OSError if the file did not load."""
  getattr(config, 'steps', None)  # of a file that did not load it raises
  if not isinstance(config, config_lib.Train):
    raise InputError(
        f'get_config of the config file returned a {type(config).__name__} and '
        'must return a mezo_jax.training.config.Train.')


# --- values -----------------------------------------------------------------


def check(config, before: str = '') -> None:
  """Raises InputError for an attribute that is no field of a config, or a
  value that is not of its field's type."""
  hints = typing.get_type_hints(type(config))
  for name in vars(config):
    if name not in hints:
      raise InputError(unknown(before + name))
  for name, hint in hints.items():
    value, path = getattr(config, name), before + name
    if dataclasses.is_dataclass(hint) and isinstance(value, hint):
      check(value, f'{path}.')
    elif not _is_of(value, hint):
      raise InputError(
          f'config: {path} is {value!r} and must be {_words(hint)}.')
    elif name == 'also':
      for i, also in enumerate(value):
        check(also, f'also[{i}].')


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


# --- flags ------------------------------------------------------------------


class _Parser(flags.ArgumentParser):
  """Parses the values of a field by a function, and takes what a config's
  file gave the field as it is."""

  def __init__(self, parse, words: str):
    self._parse, self._words = parse, words

  def parse(self, argument):
    return self._parse(argument) if isinstance(argument, str) else argument

  def flag_type(self):
    return self._words


def _none(argument: str):
  if argument not in ('', 'None'):
    raise ValueError('a Python function can be set in a config file only, with '
                     'task=Task(row=...)')


def _no_tasks(argument: str) -> tuple:
  if argument.replace(' ', '') not in ('', '()'):
    raise ValueError(
        'more tasks can be given in a config file only; the command line can '
        'leave them out, --config.also=(), or change their fields, '
        '--config.also[0].weight=2')
  return ()


# config_flags finds a parser by the annotation of a field. It has none for
# unions, whose annotations are therefore wrapped in `Annotated`, nor for
# functions and dataclasses.
for _hint, _parse, _what in (
    (config_lib.Objective, str, 'text'),
    (task_lib.TextOrNone, lambda text: None if text == 'None' else text,
     'text or None'),
    (task_lib.RowFunction, _none, 'None'),
    (config_lib.Tasks, _no_tasks, 'tasks')):
  config_flags.register_flag_parser_for_type(_hint, _Parser(_parse, _what))
