"""Reads a command line: the flags of a command, and a config whose fields they
override."""

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
from mezo_jax.training.config_fields import unknown, WHERE

# The configs that come with the package. In a clone this is a link to the
# folder configs/ at its top.
CONFIGS = Path(__file__).parents[1] / 'configs'
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
    options: The type and the help of each flag, by name. The value of a flag
      that is not given is None.
    arguments: The names of the arguments that are not flags.
    required: The names of flags that must be given.
    configs: The directory in which --config finds a config by its name. Without
      it the command has no --config.

  Returns:
    The values of the flags, ``values.config`` among them, and the arguments
    that are not flags.

  Raises:
    InputError: for an unknown flag or field, a value that cannot be parsed, a
      missing flag or argument, or a config that does not load.
  """
  program, values, file = argv[0], flags.FlagValues(), ''
  if configs:
    argv = _config_first(configs, argv)
    file = argv[1].partition('=')[2].partition(':')[0]
    config_flags.DEFINE_config_file(
        'config', None, 'The config: FILE.py or FILE.py:ARGUMENT, or the name '
        'of one that comes with mezo_jax, such as opt:sst2. '
        '--config.FIELD=VALUE overrides a field. Defaults to quickstart, or to '
        'own if --config.data.train or --config.task.hub names data.',
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
  values.append_flag_values(flags.FLAGS)  # --verbosity and others of absl
  values.set_gnu_getopt()  # flags may follow arguments
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
    raise InputError(f'there is no flag --{e.flagname}{meant} See {program} '
                     '--help.') from e
  except Exception as e:
    raise InputError(failure(e, file)) from e
  for name in required:
    if values[name].value is None:
      raise InputError(f'--{name} is missing. See {program} --help.')
  if len(rest) > len(arguments):
    raise InputError(f'unknown argument {rest[len(arguments)]!r}. See '
                     f'{program} --help.')
  if len(rest) < len(arguments):
    raise InputError(f'{arguments[len(rest)]} is missing: write {program} '
                     f'{" ".join(arguments)}.')
  return values, rest


# --- a config ---------------------------------------------------------------


def read_config(file: str, overrides: Sequence[str] = ()) -> config_lib.Train:
  """Reads a config as the command line names it, with overrides of its fields,
  ``--config.FIELD=VALUE``."""
  argv = ['config', f'--config={file}', *overrides]
  return parse(argv, '', {}, configs=CONFIGS)[0].config


def find(name: str, what: str = 'config', configs: Path = CONFIGS) -> str:
  """Returns the path of a config's file.

  Args:
    name: A path; or, where there is no such file, a config that comes with the
      package: ``opt``, ``opt.py`` or ``configs/opt.py``.
    what: What the file is called in an error.
    configs: The directory of the configs that come with the package.

  Raises:
    MissingError: if there is neither.
  """
  if os.path.exists(name) and not os.path.isdir(name):
    return name
  stem = name.removeprefix('configs/').removesuffix('.py')
  known = {path.stem: str(path) for path in sorted(configs.glob('*.py'))}
  if stem in known:
    return known[stem]
  near = difflib.get_close_matches(Path(name).stem, known)
  raise MissingError(
      f'there is no {what} {name!r}, neither a file nor one that comes '
      'with mezo_jax; ' + (f'did you mean {" or ".join(near)}?' if near else
                           f'those are {", ".join(known)}.'))


def _config_first(configs: Path, argv: Sequence[str]) -> list[str]:
  """Returns a command line that begins with --config=FILE, which must be known
  before the fields that change it, or with the default."""
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
  """Returns whether a command line names data that are not the quickstart's."""
  for i, word in enumerate(argv):
    found = re.match(r'--?config\.(?:data\.train|task\.hub)(?:=(.*))?$', word)
    if found and (found.group(1) or ''.join(argv[i + 1:i + 2])) != 'quickstart':
      return True
  return False


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
            f'config does not have. {WHERE}')
  # A config's file raises KeyError for a variant that it does not have.
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
  if 'Traceback' in text:  # config_flags writes one into some errors
    at = re.findall(rf'"{re.escape(file)}", line (\d+)', text)
    text = text.strip().splitlines()[-1]
    return f'the config {file}{", line " + at[-1] if at else ""} failed: {text}'
  if expected:
    return f'{message}. {WHERE if "config" in message else ""}'.rstrip()
  at = f', line {lines[-1]}' if lines else ''
  return (f'the config {file}{at} failed with {type(error).__name__}: '
          f'{message}.')


def given(argv: Sequence[str]) -> list[str]:
  """Returns the paths of the fields that a command line sets."""
  found = [OVERRIDE.match(argument) for argument in argv[1:]]
  return [*dict.fromkeys(match.group(1) for match in found if match)]


def check_names(argv: Sequence[str]) -> None:
  """Raises InputError for a field of the command line that does not exist,
  that holds other fields, or that is a tuple and given twice."""
  times = collections.Counter(
      match.group(1) for match in map(OVERRIDE.match, argv[1:]) if match)
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


def _check_is_config(config) -> None:
  """Raises InputError for what the get_config of a file returned, if it is not
  a config, and OSError if the file did not load."""
  getattr(config, 'steps', None)  # of a file that did not load it raises
  if not isinstance(config, config_lib.Train):
    raise InputError(
        f'get_config of the config file returned a {type(config).__name__} and '
        'must return a mezo_jax.training.config.Train.')


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
