"""Implements the command `train`, including runs on several hosts or replicas.

``train.py`` and ``mezo-jax train`` both call `main`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mezo_jax.cli import command_line
from mezo_jax.core.errors import Again, in_one_sentence, InputError, local
from mezo_jax.distributed import hosts, replicas
from mezo_jax.training import checks

_ABOUT = '''
Fine-tunes a language model with forward passes only (MeZO), or evaluates a
baseline (--config.method).

  {0}                                 runs the quickstart
  {0} --config.data.train=FILE ...    trains on your own data
  {0} --config=FILE.py --config.FIELD=VALUE --workdir=DIR

Run the same command again to resume a run that was stopped.'''.strip()
_OPTIONS = {
    'workdir': (str, 'Directory of the run. Defaults to runs/<config name>.'),
    'profile': (
        str, 'FROM:TO writes a trace of these steps to the folder profile of '
        'the working directory, for Perfetto and xprof.'),
    'distributed': (bool, 'Run on several hosts. Start the same command on '
                    'each of them.'),
    'coordinator': (
        str, 'HOST:PORT of process 0. Defaults to what the cluster reports.'),
    'num_processes': (
        int, 'Number of processes. Defaults to what the cluster reports.'),
    'process_id': (
        int, 'Index of this process, from 0. Defaults to what the cluster '
        'reports.'),
    'replicas': (
        int, 'Number of replicas (experimental): machines that each hold the '
        'weights and evaluate a part of the directions of a step '
        '(docs/log.md).'),
    'replica': (int, 'Index of this replica, from 0.'),
    'exchange': (str, 'Directory that all replicas can access.'),
    'exchange_timeout': (
        float, 'Seconds to wait for another replica. Defaults to 1800.')}


def main(run: Callable, configs: Path = command_line.CONFIGS,
         program: str = 'train.py', argv: Sequence[str] | None = None) -> None:
  """Parses the command line, executes the run, and exits.

  Args:
    run: The function `mezo_jax.training.run`.
    configs: The directory in which --config finds a config by its name.
      Defaults to the configs of the package.
    program: The name of the command in help and errors.
    argv: The arguments of the command. Defaults to those of the process.
  """
  argv = [program, *(sys.argv[1:] if argv is None else argv)]

  def parse(argv):
    with in_one_sentence(program):
      return command_line.parse(
          argv, _ABOUT.format(program), _OPTIONS, configs=configs)[0]

  def start(values):
    _start(run, program, values, command_line.given(argv))

  app.run(start, argv, flags_parser=parse)  # it implements --pdb and others


def _start(run: Callable, program: str, values: flags.FlagValues,
           given: Sequence[str]) -> None:
  """Joins the other hosts, checks the config, and executes the run.

  Args:
    run: As for `main`.
    program: As for `main`.
    values: The values of the flags.
    given: The paths of the config fields that the command line sets.
  """
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax logs a lot
  file = config_flags.get_config_filename(values['config'])
  with in_one_sentence(program):
    workdir = local(values.workdir or f'runs/{Path(file).stem}')
    process = values.coordinator, values.num_processes, values.process_id
    if values.distributed or process != (None, None, None):
      hosts.join(*process)
    hosts.check_devices()
  with hosts.watch(program), in_one_sentence(program):
    checks.check_config(values.config)
    checks.check_given(values.config, given)
    profile = _steps(values.profile)
    timeout = values.exchange_timeout
    try:
      run(values.config, workdir, replicas.place(
          values.replicas, values.replica, values.exchange,
          1800.0 if timeout is None else timeout), source=file, profile=profile)
    except KeyboardInterrupt:
      raise Again('interrupted. Run the same command again to resume from '
                  f'{workdir}.') from None


def _steps(text: str | None) -> range:
  """Returns the steps of --profile=FROM:TO, or none without it.

  Raises:
    InputError: if the text is not two numbers of this form.
  """
  if text is None:
    return range(0)
  found = re.fullmatch(r'(\d+):(\d+)', text)
  if not found or int(found[1]) > int(found[2]):
    raise InputError(
        f'--profile={text} must be FROM:TO, the first and the last step to '
        'trace, such as --profile=101:110.')
  return range(int(found[1]), int(found[2]) + 1)
