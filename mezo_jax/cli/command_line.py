"""Parses a command line: the flags of a command, and a config.

Flags are those of absl, and ``--config`` is a flag of ml_collections. This
module adds what they lack: configs that are found by name, default configs,
suggestions for misspelt names, and errors in one sentence.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import os
from pathlib import Path
import re
import sys
import traceback
import typing
from typing import Any, cast

from absl import flags
from ml_collections import config_flags

from mezo_jax.core.errors import InputError, MissingError
from mezo_jax.tasks import task as task_lib
from mezo_jax.training import config as config_lib
from mezo_jax.training.config_fields import literals, unknown, WHERE

# Directory of the configs that come with the package. In a clone this is a
# symbolic link to configs/ in the root of the repository.
CONFIGS = Path(__file__).parents[1] / 'configs'
# Matches an argument that overrides a field of the config.
OVERRIDE = re.compile(r'--?(?:no)?config\.([^=]*)')
_HELP = re.compile(r'-h|--?help(short|full)?')
_DEFINE = {
    bool: flags.DEFINE_bool, float: flags.DEFINE_float,
    int: flags.DEFINE_integer, list: flags.DEFINE_list,
    str: flags.DEFINE_string}


def parse(argv: Sequence[str], about: str,
          options: Mapping[str, tuple[type, str]],
          arguments: Sequence[str] = (), required: Sequence[str] = (),
          configs: Path | None = None) -> tuple[flags.FlagValues, list[str]]:
  """Parses a command line, or prints help and exits if it asks for help.

  Args:
    argv: The command line. Its first element is the name of the command.
    about: The text that --help shows above the flags.
    options: The type and the help text of each flag, by name. The value of a
      flag that is not given is None.
    arguments: The names of the positional arguments, for error messages. The
      last one may be given several times if it ends in '...'. Defaults to none.
    required: The names of flags that must be given. Defaults to none.
    configs: The directory in which --config finds a config by its name.
      Defaults to None, for a command without --config.

  Returns:
    The values of the flags (``values.config`` is the config, if the command has
    one) and the list of positional arguments.

  Raises:
    InputError: for an unknown flag or field, a value that cannot be parsed, a
      missing flag or argument, or a config file that fails.
  """
  program, values, file = argv[0], flags.FlagValues(), ''
  if configs:
    argv = _config_first(configs, argv)
    file = argv[1].partition('=')[2].partition(':')[0]
    # ml_collections reads argv here to find the config file, so that it can
    # define a flag for each field.
    config_flags.DEFINE_config_file(
        'config', None, 'The config: FILE.py, FILE.py:ARGUMENT, or the name of '
        'a config that comes with mezo_jax, such as opt:sst2. '
        '--config.FIELD=VALUE overrides a field. The default is the config own '
        'if --config.data.train or --config.task.hub is given, and the config '
        'quickstart otherwise.',
        flag_values=values, sys_argv=argv)
  for name, (kind, text) in options.items():
    _DEFINE[kind](name, None, text, flag_values=values)
  if any(_HELP.fullmatch(word) for word in argv[1:]):
    print(f'{about}\n\nFlags:')
    for name in values:
      switch = '[no]' if values[name].boolean else ''
      print(flags.text_wrap(f'--{switch}{name}: {values[name].help}',
                            indent='      ', firstline_indent='  '))
    sys.exit()
  values.append_flag_values(flags.FLAGS)  # absl's own, such as --verbosity
  values.set_gnu_getopt()  # flags may follow positional arguments
  check_names(argv)
  try:
    _, *rest = values(argv)
    flags.FLAGS.mark_as_parsed()
    if configs:
      _check_is_config(values.config)
  except InputError:
    raise
  except flags.UnrecognizedFlagError as e:
    near = difflib.get_close_matches(e.flagname, [*values], cutoff=0.7)
    meant = f'; did you mean --{" or --".join(near)}?' if near else '.'
    raise InputError(f'unknown flag --{e.flagname}{meant} See {program} '
                     '--help.') from e
  except Exception as e:
    raise InputError(failure(e, file)) from e
  for name in required:
    if values[name].value is None:
      raise InputError(f'the flag --{name} is missing. See {program} --help.')
  several = bool(arguments) and arguments[-1].endswith('...')
  if len(rest) > len(arguments) and not several:
    raise InputError(f'unknown argument {rest[len(arguments)]!r}. See '
                     f'{program} --help.')
  if len(rest) < len(arguments):
    raise InputError(f'the argument {arguments[len(rest)]} is missing. Usage: '
                     f'{program} {" ".join(arguments)}.')
  return values, rest


def without(argv: Sequence[str], names: Sequence[str]) -> list[str]:
  """Returns a command line without some flags and their values.

  Args:
    argv: The command line.
    names: The names of the flags, which have values.
  """
  kept, words = [], iter(argv)
  for word in words:
    name, assigned, _ = word.lstrip('-').partition('=')
    if not word.startswith('-') or name not in names:
      kept.append(word)
    elif not assigned:
      next(words, None)  # the value is a word of its own
  return kept


# --- a config ---------------------------------------------------------------


def read_config(file: str, overrides: Sequence[str] = ()) -> config_lib.Train:
  """Returns a config, loaded as the command line would load it.

  Args:
    file: The value of --config: ``FILE.py``, ``FILE.py:ARGUMENT``, or the name
      of a config that comes with the package.
    overrides: Arguments of the form ``--config.FIELD=VALUE``. Defaults to none.

  Raises:
    InputError: as `parse`.
  """
  argv = ['config', f'--config={file}', *overrides]
  return parse(argv, '', {}, configs=CONFIGS)[0].config


def find(name: str, what: str = 'config', configs: Path = CONFIGS) -> str:
  """Returns the path of a config file.

  Args:
    name: A path or, if no such file exists, the name of a config that comes
      with the package: ``opt``, ``opt.py`` or ``configs/opt.py``.
    what: A noun for the file in error messages. Defaults to 'config'.
    configs: The directory of the configs that come with the package.

  Raises:
    MissingError: if neither a file nor a config of the package has this name.
  """
  if os.path.exists(name) and not os.path.isdir(name):
    return name
  stem = name.removeprefix('configs/').removesuffix('.py')
  known = {path.stem: str(path) for path in sorted(configs.glob('*.py'))}
  if stem in known:
    return known[stem]
  near = difflib.get_close_matches(Path(name).stem, known)
  raise MissingError(
      f'there is no {what} {name!r}: it is neither a file nor a config that '
      'comes with mezo_jax; '
      + (f'did you mean {" or ".join(near)}?' if near else
         f'choose one of {", ".join(known)}.'))


def _config_first(configs: Path, argv: Sequence[str]) -> list[str]:
  """Moves --config=FILE to the front of a command line, with its full path.

  ml_collections needs the file before the fields that override it. Without
  --config, the default config is inserted.
  """
  chosen, rest, words = None, [], iter(argv[1:])
  for word in words:
    if word in ('--config', '-config'):
      word = f'--config={next(words, "")}'
    if re.match(r'--?config=', word):
      chosen = word.partition('=')[2]
    else:
      rest.append(word)
  if chosen is None:
    name = 'own' if _names_data(rest) else 'quickstart'
    chosen = f'{configs / name}.py'
  file, *argument = chosen.split(':', 1)
  chosen = ':'.join([find(file, configs=configs), *argument])
  return [argv[0], f'--config={chosen}', *rest]


def _names_data(argv: Sequence[str]) -> bool:
  """Returns whether a command line names a data set of the user's own."""
  for i, word in enumerate(argv):
    found = re.match(r'--?config\.(?:data\.train|task\.hub)(?:=(.*))?$', word)
    if found and (found.group(1) or ''.join(argv[i + 1:i + 2])) != 'quickstart':
      return True
  return False


def failure(error: Exception, file: str = '') -> str:
  """Returns the error message for a config that did not load.

  Args:
    error: The exception that was raised while the config was loaded or its
      fields were set.
    file: The config file. If the exception was raised in this file, the message
      names the line. Defaults to '', for none.
  """
  lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
           if file and os.path.abspath(frame.filename) == os.path.abspath(file)]
  if isinstance(error, IndexError) and not lines:
    return ('the command line sets --config.also[N] with an N for which the '
            f'config has no task. {WHERE}')
  # These exceptions carry a message for the user. For example, a config file
  # raises KeyError for an argument that it does not know.
  expected = isinstance(error, KeyError | OSError | flags.Error) or (
      isinstance(error, TypeError) and not lines)
  text = str(error.args[-1] if expected and error.args else error)
  message = ' '.join(text.split())
  found = re.search(
      r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'",
      message)
  hints: dict[str, Any] = typing.get_type_hints(config_lib.Train)
  groups = {config_lib.Train.__name__: ''} | {
      cast(type, hint).__name__: f'{name}.' for name, hint in hints.items()
      if dataclasses.is_dataclass(hint)}
  if found and found.group(1) in groups:
    return unknown(groups[found.group(1)] + found.group(2))
  if 'Traceback' in text:  # ml_collections puts it into some messages
    at = re.findall(rf'"{re.escape(file)}", line (\d+)', text)
    text = text.strip().splitlines()[-1]
    return f'the config {file}{", line " + at[-1] if at else ""} failed: {text}'
  if expected:
    return f'{message}. {WHERE if "config" in message else ""}'.rstrip()
  at = f', line {lines[-1]}' if lines else ''
  return (f'the config {file}{at} failed with {type(error).__name__}: '
          f'{message}.')


def given(argv: Sequence[str]) -> list[str]:
  """Returns the paths of the config fields that a command line sets."""
  found = [OVERRIDE.match(argument) for argument in argv[1:]]
  return [*dict.fromkeys(match.group(1) for match in found if match)]


def check_names(argv: Sequence[str]) -> None:
  """Checks the config fields that a command line sets.

  Raises:
    InputError: for a field that does not exist, a field that is a group of
      other fields, or a tuple that is given twice.
  """
  times = collections.Counter(
      match.group(1) for match in map(OVERRIDE.match, argv[1:]) if match)
  for path in given(argv):
    if f'--noconfig.{path}=' in ' '.join(argv):
      raise InputError(
          f'--noconfig.{path} sets the field to False and takes no value. '
          f'Write --config.{path}=VALUE instead.')
    if path.startswith('also.'):
      raise InputError(
          f'--config.{path} needs the index of a task: write '
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
          f'--config.{path} is a group of fields: set one of them, such as '
          f'--config.{path}.{names[0]}. The fields are {", ".join(names)}.')
    # ml_collections would concatenate the two tuples. For other types the last
    # value wins, as usual.
    if times[path] > 1 and typing.get_origin(cls) is tuple:
      raise InputError(f'--config.{path} is given {times[path]} times; give it '
                       'once.')


def _check_is_config(config) -> None:
  """Checks that the get_config of a config file returned a config.

  Raises:
    InputError: if it returned something else.
    OSError: if the file did not load.
  """
  # If the file did not load, ml_collections raises at the first attribute.
  getattr(config, 'steps', None)
  if not isinstance(config, config_lib.Train):
    raise InputError(
        'get_config() of the config file returned a '
        f'{type(config).__name__} and must return a '
        'mezo_jax.training.config.Train.')


# --- flags ------------------------------------------------------------------


class _Parser(flags.ArgumentParser):
  """Parses text from the command line with a function.

  A value that is not text comes from the config file and is returned unchanged.
  """

  def __init__(self, parse, words: str):
    self._parse, self._words = parse, words

  def parse(self, argument):
    return self._parse(argument) if isinstance(argument, str) else argument

  def flag_type(self):
    return self._words


def _none(argument: str):
  """Parses the value of a field that holds a function: only None is valid."""
  if argument not in ('', 'None'):
    raise ValueError('a Python function can be set only in a config file, with '
                     'task=Task(row=...)')


def _rate(argument: str) -> float | str:
  """Parses a learning rate."""
  return argument if argument == 'auto' else float(argument)


def _no_tasks(argument: str) -> tuple:
  """Parses the value of `also`: only the empty tuple is valid."""
  if argument.replace(' ', '') not in ('', '()'):
    raise ValueError(
        'tasks can be added only in a config file; the command line can remove '
        'them, --config.also=(), or set their fields, --config.also[0].weight=2'
        )
  return ()


# ml_collections looks up the parser of a field by its annotation. It has none
# for unions (which are therefore wrapped in `Annotated`), for functions, for
# dataclasses, or for `Literal`, so parsers for the fields with such types are
# registered here. `check_config` checks the values of literals.
for _hint, _parse, _what in (
    (config_lib.Objective, str, 'text'),
    (config_lib.RewardFunction, str, 'text'),
    (config_lib.Rate, _rate, "a number, or 'auto'"),
    (task_lib.TextOrNone, lambda text: None if text == 'None' else text,
     'text or None'),
    (task_lib.RowFunction, _none, 'None'),
    (config_lib.Tasks, _no_tasks, 'tasks')):
  config_flags.register_flag_parser_for_type(_hint, _Parser(_parse, _what))
for _hint in literals():
  config_flags.register_flag_parser_for_type(_hint, _Parser(str, 'text'))
