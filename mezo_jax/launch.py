"""The command line of train.py: its flags, the config that they name, and the
hosts and replicas that a run is one of."""

from collections.abc import Callable
import functools
from pathlib import Path
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mezo_jax import hosts, replicas
from mezo_jax.errors import Again, in_one_sentence, local

_CONFIG = config_flags.DEFINE_config_file(
    'config', None,
    'Configuration file; override fields with --config.FIELD=VALUE.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the run; default: runs/<config name>.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'Run on several hosts: start this on every one.')
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, where nothing else tells it.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Likewise.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Likewise; from 0.')
_REPLICAS = flags.DEFINE_integer(
    'replicas', None, 'Machines with weights of their own that share out the '
    'directions of a step (docs/replicas.md).')
_REPLICA = flags.DEFINE_integer('replica', None, 'Which one this is, from 0.')
_EXCHANGE = flags.DEFINE_string(
    'exchange', None, 'HOST:PORT of replica 0, or a directory that all see.')
_TIMEOUT = flags.DEFINE_float(
    'exchange_timeout', 1800.0, 'Seconds to wait for another replica.')


def main(run: Callable, configs: Path) -> None:
  """Does what the command line says, and exits.

  Args:
    run: ``run(config, workdir, place)``, with a `mezo_jax.replicas.Place` or
      None.
    configs: the directory of configs, of which quickstart.py is the default.
  """
  app.run(functools.partial(_start, run),
          flags_parser=functools.partial(_parse, configs / 'quickstart.py'))


def _parse(default: Path, argv: list[str]) -> list[str]:
  """absl's parser; a config that does not load or fit gets one sentence."""
  chosen = [a for a in argv if a.startswith('--config=')] or [
      f'--config={default}']
  argv = [argv[0], *chosen, *(a for a in argv[1:] if a not in chosen)]
  sys.argv = argv  # config_flags looks there for --config.FIELD
  try:
    rest = app.parse_flags_with_usage(argv)
    _CONFIG.value.steps  # a file that did not load raises here
    return rest
  except (KeyError, OSError, TypeError) as e:
    what = ' '.join(str(e.args[-1]).split())
    sys.exit(f'train.py: {what}. The fields of a config and their types are in '
             'mezo_jax/config.py.')


def _start(run: Callable, argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}.')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax is talkative
  name = Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem
  with in_one_sentence('train.py'):
    workdir = local(_WORKDIR.value or f'runs/{name}')
  told = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if _DISTRIBUTED.value or told != (None, None, None):
    with in_one_sentence('train.py'):
      hosts.join(*told)
  with in_one_sentence('train.py'):
    hosts.check_devices()
  with hosts.watch('train.py'), in_one_sentence('train.py'):
    try:
      run(_CONFIG.value, workdir, replicas.place(
          _REPLICAS.value, _REPLICA.value, _EXCHANGE.value, _TIMEOUT.value))
    except KeyboardInterrupt:
      raise Again(f'interrupted; run it again to resume from {workdir}.'
                  ) from None
