"""The records of a run in its working directory."""

import os
from pathlib import Path

from mezo_jax import checkpoint, loggers, methods
from mezo_jax import config as config_lib
from mezo_jax.errors import InputError, MissingError


def check(config: config_lib.Train, workdir: Path) -> None:
  """Refuses a directory in which this config cannot run, or go on.

  Raises:
    InputError: if it holds a run with other settings, or has more steps behind
      it than are wanted, or as many and the last was not evaluated.
  """
  config_file = workdir / 'config.json'
  if config_file.exists():
    config_lib.check_same_run(config, loggers.read_json(config_file))
  held = checkpoint.latest_step(workdir / 'checkpoints')
  evaluated = not held or any(
      r['kind'] == 'dev' and r['step'] == held
      for r in loggers.read(workdir / 'metrics.jsonl'))
  least = held if evaluated else held + 1
  if config.steps < least:
    raise InputError(
        f'{workdir} holds step {held}{"" if evaluated else ", not evaluated,"} '
        f'and --config.steps is {config.steps}; give {least} or more, or '
        'another --workdir.')


def read_config(workdir: Path) -> config_lib.Train:
  """The config of a run, of an earlier version of this library too.

  Raises:
    MissingError: if there was no run.
    InputError: if the config cannot be read.
  """
  if not ((workdir / 'config.json').is_file()
          and (workdir / 'checkpoints').is_dir()):
    raise MissingError(
        f'{workdir} has no config.json and checkpoints: it is not the '
        '--workdir of a run.')
  saved = loggers.read_json(workdir / 'config.json')
  try:
    config = config_lib.from_json(saved)
    methods.part_of(config), config.task.traits  # they are known
    return config
  except (AttributeError, KeyError, TypeError) as e:
    raise InputError(
        f'{workdir}/config.json is not that of a run of this version ({e}); '
        'give the --workdir of one.') from e


def read_result(workdir: str | os.PathLike) -> dict:
  """What a finished run says of itself; {} of one that is not."""
  file = Path(workdir) / 'result.json'
  return loggers.read_json(file) if file.is_file() else {}


def write(workdir: Path, config: config_lib.Train,
          result: dict | None = None) -> None:
  """Writes config.json and, if there is one, result.json."""
  loggers.write_json(workdir / 'config.json', config_lib.to_json(config))
  if result is not None:
    loggers.write_json(workdir / 'result.json', result)
