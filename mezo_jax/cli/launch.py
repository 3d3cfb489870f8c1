"""The command line of train.py: its flags, the config that they name, and the
hosts and replicas that a run is one of."""

from collections.abc import Callable
import functools
from pathlib import Path
import re
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from mezo_jax.core.errors import Again, in_one_sentence, InputError, local
from mezo_jax.distributed import hosts, replicas
from mezo_jax.training import checks, fields

_CONFIG = config_flags.DEFINE_config_file(
    'config', None,
    'Configuration file; override fields with --config.FIELD=VALUE. Default: '
    'configs/quickstart.py, or configs/own.py where --config.data.train or '
    '--config.task.hub names data.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the run; default: runs/<config name>.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'Run on several hosts: start this on every one.')
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, if nothing else reports it.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Likewise.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Likewise; from 0.')
_REPLICAS = flags.DEFINE_integer(
    'replicas', None, 'Experimental: machines with weights of their own that '
    'share out the directions of a step (docs/replicas.md).')
_REPLICA = flags.DEFINE_integer('replica', None, 'Which one this is, from 0.')
_EXCHANGE = flags.DEFINE_string(
    'exchange', None, 'Directory that all replicas see (experimental).')
_TIMEOUT = flags.DEFINE_float(
    'exchange_timeout', 1800.0, 'Seconds to wait for another replica.')


def main(run: Callable, configs: Path) -> None:
  """Does what the command line says, and exits.

  Args:
    run: ``run(config, workdir, place, source)``, with a
      `mezo_jax.distributed.replicas.Place` or None, and the name of the
      config's file.
    configs: The directory of the configs quickstart.py and own.py, which are
      the defaults.
  """
  app.run(functools.partial(_start, run),
          flags_parser=functools.partial(_parse, configs))


def _parse(configs: Path, argv: list[str]) -> list[str]:
  """Parses flags as absl does; a config that does not load or fit ends the
  program with one sentence."""
  argv = _config_first(configs, argv)
  sys.argv = argv  # config_flags looks there for --config.FIELD
  try:
    fields.check_names(argv)
    rest = app.parse_flags_with_usage(argv)
    fields.check_is_config(_CONFIG.value)
    return rest
  except InputError as e:
    sys.exit(f'train.py: {e}')
  except Exception as e:
    file = argv[1].partition('=')[2].partition(':')[0]
    sys.exit(f'train.py: {fields.failure(e, file)}')


def _config_first(configs: Path, argv: list[str]) -> list[str]:
  """Returns a command line that begins with --config=FILE, which must be known
  before the fields that change it, or with the default."""
  chosen, rest, words = [], [], iter(argv[1:])
  for word in words:
    if word in ('--config', '-config'):
      word = f'--config={next(words, "")}'
    if re.match(r'--?config=', word):
      chosen.append(word)
    else:
      rest.append(word)
  if not chosen:
    name = 'own' if _names_data(rest) else 'quickstart'
    chosen = [f'--config={configs / name}.py']
  return [argv[0], chosen[-1], *rest]


def _names_data(argv: list[str]) -> bool:
  """Returns whether a command line names data that are not the quickstart's."""
  for i, word in enumerate(argv):
    found = re.match(r'--?config\.(?:data\.train|task\.hub)(?:=(.*))?$', word)
    if found and (found.group(1) or ''.join(argv[i + 1:i + 2])) != 'quickstart':
      return True
  return False


def _start(run: Callable, argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}.')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax is talkative
  file = config_flags.get_config_filename(flags.FLAGS['config'])
  with in_one_sentence('train.py'):
    workdir = local(_WORKDIR.value or f'runs/{Path(file).stem}')
  process = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if _DISTRIBUTED.value or process != (None, None, None):
    with in_one_sentence('train.py'):
      hosts.join(*process)
  with in_one_sentence('train.py'):
    hosts.check_devices()
  with hosts.watch('train.py'), in_one_sentence('train.py'):
    checks.check(_CONFIG.value)
    checks.check_given(_CONFIG.value, fields.given(sys.argv))
    try:
      run(_CONFIG.value, workdir, replicas.place(
          _REPLICAS.value, _REPLICA.value, _EXCHANGE.value, _TIMEOUT.value),
          source=file)
    except KeyboardInterrupt:
      raise Again(f'interrupted; run it again to resume from {workdir}.'
                  ) from None
