"""The command `train`: the hosts and replicas that a run is one of."""

from collections.abc import Callable, Sequence
from pathlib import Path
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mezo_jax.cli import command_line
from mezo_jax.core.errors import Again, in_one_sentence, local
from mezo_jax.distributed import hosts, replicas
from mezo_jax.training import checks

_ABOUT = '''
Fine-tunes a language model with forward passes only (MeZO), or evaluates what
that is compared with (--config.method).

  {0}                                 the quickstart
  {0} --config.data.train=FILE ...    data of your own
  {0} --config=FILE.py --config.FIELD=VALUE --workdir=DIR

Run the same command again to resume a run that was stopped.'''.strip()
_OPTIONS = {
    'workdir': (str, 'Directory of the run. Defaults to runs/<config name>.'),
    'distributed': (bool, 'Run on several hosts: start this on every one.'),
    'coordinator': (
        str, 'HOST:PORT of process 0, if nothing else reports it.'),
    'num_processes': (
        int, 'Number of processes, if nothing else reports it.'),
    'process_id': (
        int, 'Number of this process, from 0, if nothing else reports it.'),
    'replicas': (
        int, 'Experimental: machines with weights of their own that share out '
        'the directions of a step (docs/log.md).'),
    'replica': (int, 'Which one this is, from 0.'),
    'exchange': (str, 'Directory that all replicas see (experimental).'),
    'exchange_timeout': (
        float, 'Seconds to wait for another replica. Defaults to 1800.')}


def main(run: Callable, configs: Path = command_line.CONFIGS,
         program: str = 'train.py', argv: Sequence[str] | None = None) -> None:
  """Does what the command line says, and exits.

  Args:
    run: ``run(config, workdir, place, source)``, with a
      `mezo_jax.distributed.replicas.Place` or None, and the name of the
      config's file.
    configs: The directory in which a config is found by its name.
    program: The name of the command, for help and errors.
    argv: The arguments of the command. Defaults to those of the process.
  """
  argv = [program, *(sys.argv[1:] if argv is None else argv)]

  def parse(argv):
    with in_one_sentence(program):
      return command_line.parse(
          argv, _ABOUT.format(program), _OPTIONS, configs=configs)[0]

  def start(values):
    _start(run, program, values, command_line.given(argv))

  app.run(start, argv, flags_parser=parse)  # app has --pdb and the like


def _start(run: Callable, program: str, values: flags.FlagValues,
           given: Sequence[str]) -> None:
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
    timeout = values.exchange_timeout
    try:
      run(values.config, workdir, replicas.place(
          values.replicas, values.replica, values.exchange,
          1800.0 if timeout is None else timeout), source=file)
    except KeyboardInterrupt:
      raise Again(f'interrupted; run it again to resume from {workdir}.'
                  ) from None
