"""The records of a run in its working directory."""

import os
from pathlib import Path

import jax

from mezo_jax import build, checkpoint, evaluate, loggers, methods
from mezo_jax import config as config_lib
from mezo_jax.errors import InputError, MissingError, Stopped

# Advice where numbers are not finite.
TRY = ('Try a lower --config.optimizer.learning_rate, or '
       '--config.model.dtype=float32.')


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


def write_result(workdir: Path, config: config_lib.Train, built: build.Built,
                 final: dict, **more) -> dict:
  """Writes config.json and result.json, and returns the latter.

  Raises:
    Stopped: if the final report of the test rows is not finite.
  """
  if not evaluate.is_finite(final):
    raise Stopped(
        f'{config.method} has no result: test {evaluate.spell(final)}. '
        + (TRY if methods.method_of(config).steps else
           'Check the weights, or try --config.model.dtype=float32.'))
  mesh, splits = built.mesh, built.splits
  result = {
      'method': config.method, 'metric': config.task.main_metric,
      'final': final, 'steps': 0, 'forwards': 0, **more,
      'train_rows': len(splits.train.prompts),
      'truncated': splits.test.truncated, 'peak_memory': evaluate.peak_memory(),
      'devices': f'{mesh.size} x {jax.devices()[0].device_kind}'}
  write(workdir, config, result)
  return result
