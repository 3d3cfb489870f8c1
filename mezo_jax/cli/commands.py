"""The commands of mezo-jax. Each checks its arguments and calls a function of
another room."""

from collections.abc import Callable, Sequence
import contextlib
import difflib
import inspect
import math
from pathlib import Path
import re
import sys
from typing import Any

from absl import logging
import jax

from mezo_jax.cli import command_line, suite, train_command
from mezo_jax.cli.command_line import parse
from mezo_jax.core.errors import in_one_sentence, InputError
from mezo_jax.distributed import hosts
from mezo_jax.export import from_run
from mezo_jax.planning import alternatives, machines
from mezo_jax.planning import plan as planning

DOES_NOT_FIT = 3  # the exit status of a plan that does not fit

_MERGED = (bool, 'Add LoRA to the weights and write a whole model.')


def _doc(command: Callable[..., Any]) -> str:
  """Returns the docstring of a command, which is its help."""
  return inspect.getdoc(command) or ''


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command that a command line names.

  Args:
    argv: The command and its arguments. Defaults to those of the process.
  """
  name, *argv = (sys.argv[1:] if argv is None else argv) or ['--help']
  if name in ('-h', '--help', 'help'):
    print('Fine-tunes language models with forward passes only (MeZO).\n')
    for command in _COMMANDS.values():
      about = _doc(command).splitlines()[0]
      print(f'  mezo-jax {command.__name__:10}{about}')
    print('\nmezo-jax COMMAND --help describes the flags of a command.')
    sys.exit()
  if name not in _COMMANDS:
    near = difflib.get_close_matches(name, _COMMANDS)
    sys.exit(f'mezo-jax: there is no command {name!r}; ' + (
        f'did you mean {near[0]}?' if near else
        f'the commands are {", ".join(_COMMANDS)}.'))
  program = f'mezo-jax {name}'
  logging.set_verbosity(logging.WARNING)  # orbax logs a lot
  with in_one_sentence(program):
    try:
      status = _COMMANDS[name]([program, *argv])
    except KeyboardInterrupt:
      sys.exit(f'{program}: interrupted.')
  if status:
    sys.exit(status)


def train(argv: Sequence[str]) -> None:
  """Fine-tunes a model, or evaluates a baseline."""
  from mezo_jax.training import run  # imports what only training needs
  train_command.main(run, program=argv[0], argv=argv[1:])


def export(argv: Sequence[str]) -> None:
  """Writes the model of a run as a Hugging Face directory.

    mezo-jax export WORKDIR DIRECTORY

  WORKDIR is the working directory of the run, such as runs/quickstart. The
  command creates DIRECTORY.
  """
  values, (workdir, directory) = parse(argv, _doc(export), {
      'step': (int, 'The step to export. Defaults to the best on dev rows, or '
               'to the last of a private run.'),
      'merged': _MERGED,
      'log': (bool, 'Write no weights but the log of steps, from which '
              '`mezo-jax replay` rebuilds them.'),
      'base': (str, 'Where the base model is now. Defaults to where it was '
               'during the run.'),
  }, arguments=('WORKDIR', 'DIRECTORY'))
  hosts.check_devices()
  found = from_run.export(workdir, directory, values.step, bool(values.merged),
                          bool(values.log), values.base)
  print(f'wrote {found}')


def replay(argv: Sequence[str]) -> None:
  """Rebuilds the model of a log from its base model.

    mezo-jax replay --base=MODEL --log=RUN/steps.log --out=DIRECTORY

  It needs neither data nor forward passes.
  """
  values, _ = parse(argv, _doc(replay), {
      'base': (str, 'The base model: a directory or a hub id.'),
      'log': (str, 'The log of steps, such as RUN/steps.log.'),
      'out': (str, 'The directory to create.'),
      'adapter': (str, 'The directory of the adapter that the run began with, '
                  'if it began with one.'),
      'until': (int, 'The last step. Defaults to the last of the log.'),
      'merged': _MERGED,
  }, required=('base', 'log', 'out'))
  hosts.check_devices()
  found = from_run.rebuild(values.base, values.log, values.out, values.until,
                           bool(values.merged), adapter=values.adapter)
  print(f'wrote {found}')


def evaluate(argv: Sequence[str]) -> None:
  """Runs many configs and writes one table of their results.

    mezo-jax evaluate --suite=cpu_suite --config.FIELD=VALUE

  Each run is a process of its own. A run that was stopped is resumed, and the
  result of one that is finished is read. --config.FIELD=VALUE overrides a field
  of all runs.
  """
  is_override = command_line.OVERRIDE.match
  own = [word for word in argv if not is_override(word)]
  values, _ = parse(own, _doc(evaluate), {
      'suite': (str, 'The suite: a file, or the name of one that comes with '
                'mezo_jax, such as cpu_suite.'),
      'workdir': (str, 'The directory of the table and of the runs. Defaults '
                  'to runs/<suite>.'),
      'tasks': (list, 'The tasks to run, a,b. Defaults to all.'),
      'methods': (list, 'The methods to run, a,b. Defaults to all.'),
  }, required=('suite',))
  table, failed = suite.run(
      values.suite, values.workdir or f'runs/{Path(values.suite).stem}',
      values.tasks or (), values.methods or (),
      [word for word in argv if is_override(word)])
  if table.is_file():
    print(f'{table.read_text()}wrote {table}')
  if failed:
    raise InputError(f'{", ".join(failed)} failed; run the same command again '
                     'to go on.')


def plan(argv: Sequence[str]) -> int:
  """Reports memory and time on hardware that is not here.

    mezo-jax plan --config=opt:sst2 --topology=v5e:4x4 --config.FIELD=VALUE

  The command exits with status 3 if the run does not fit.
  """
  jax.config.update('jax_platforms', 'cpu')  # a device here is not needed
  values, _ = parse(argv, _doc(plan), {
      'topology': (str, 'The devices: v5e:4x4, v5p:2x2x1, v6e:2x4, v4:2x2x2 '
                   '(chips), h100:8, a100:8 or cpu:8.'),
      'mesh': (str, 'The sizes of axes, fsdp=4,tensor=2. Defaults to the mesh '
               'of the config, or to one that splits all that is large.'),
      'tokens': (int, 'The tokens of a row. Defaults to the most that the '
                 'config allows.'),
  }, required=('topology',), configs=command_line.CONFIGS)
  n = machines.size(values.topology)
  if values.topology.startswith('cpu'):
    with contextlib.suppress(RuntimeError):  # devices are counted already
      jax.config.update('jax_num_cpu_devices', n)
  found = planning.plan(
      values.config, values.topology, tokens=values.tokens,
      sizes=read_mesh(values.mesh, n) if values.mesh else None)
  print(planning.spell(found))
  if found.fits:
    print('It fits.')
    return 0
  print(f'It does not fit into {found.limit / planning.GIB:g} GiB.')
  other = alternatives.what_fits(found)
  if other is None:
    print('Nothing that was tried fits.')
  else:
    change, found = other
    print(f'What fits: {change.words} ({planning.gib(found.peak())} of '
          f'{found.limit / planning.GIB:g} GiB a device).')
  return DOES_NOT_FIT


def read_mesh(text: str, n: int) -> dict[str, int]:
  """Returns the sizes of a mesh, 'fsdp=4,tensor=2', of n devices; one axis may
  be -1, the rest."""
  sizes = dict(data=1, fsdp=1, tensor=1, direction=1)
  for part in text.split(','):
    name, _, value = part.partition('=')
    if name not in sizes or not re.fullmatch(r'-1|[1-9]\d*', value):
      raise InputError(
          f'--mesh={text!r}: {part!r} is no axis and size, such as fsdp=4; the '
          f'axes are {", ".join(sizes)}.')
    sizes[name] = int(value)
  if math.prod(sizes.values()) != n and -1 not in sizes.values():
    raise InputError(f'--mesh={text}: the product is not the number of devices '
                     f'of the topology, {n}.')
  return sizes


_COMMANDS = {'train': train, 'export': export, 'replay': replay,
             'evaluate': evaluate, 'plan': plan}
