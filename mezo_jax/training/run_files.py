"""Records in a working directory that are made of a run's config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import mezo_jax
from mezo_jax import models, peft
from mezo_jax.core import fingerprint
from mezo_jax.core.errors import InputError, MissingError, Stopped
from mezo_jax.runs import guards, loggers
from mezo_jax.runs import workdir as workdir_lib
from mezo_jax.tasks import data, evaluate
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods


def check_workdir(config: config_lib.Train, workdir: Path) -> None:
  """Raises InputError for a directory in which a config cannot run.

  That is one that holds a run with other settings, or with more steps than the
  config has, or with as many if the last was not evaluated.
  """
  config_file = workdir / 'config.json'
  if config_file.exists():
    saved = loggers.read_json(config_file)
    config_lib.check_same_run(config, saved)
    name = saved.get('model', {}).get('name')
    if name != config.model.name and (
        'weights' not in workdir_lib.read_inputs(workdir)):
      raise InputError(
          f'model.name was {name!r} and is now {config.model.name!r}, and '
          f'{workdir} has no record of the weights by which to tell that they '
          'are the same; choose another --workdir.')
  held, final = workdir_lib.last_step(workdir)
  least = held if final else held + 1
  if config.steps < least:
    raise InputError(
        f'{workdir} holds step {held}{"" if final else ", not evaluated,"} '
        f'and --config.steps is {config.steps}; give {least} or more, or '
        'another --workdir.')


def inputs_of(config: config_lib.Train, model: models.Config, tokenizer: Any
              ) -> dict[str, Any]:
  """Returns fingerprints of the files that a run begins with, except for its
  weights and rows.

  Args:
    config: Config of the run.
    model: Config of the model, after `mezo_jax.training.build.add`.
    tokenizer: Tokenizer of the model.
  """
  found = {'model': fingerprint.of_model(model),
           'tokenizer': fingerprint.of_tokenizer(tokenizer)}
  if config.peft.adapter and methods.adapts(config):
    found['adapter'] = fingerprint.of_files(
        *peft.files_of(config.peft.adapter))
  return found


def check_inputs(config: config_lib.Train, workdir: Path,
                 model: models.Config, tokenizer: Any, weights: str,
                 splits: Sequence[data.Splits], secret: bytes | None) -> None:
  """Records the inputs of a run, or compares them with those recorded before.

  Args:
    config: Config of the run.
    workdir: Directory of the run.
    model: Config of the model, after `mezo_jax.training.build.add`.
    tokenizer: Tokenizer of the model.
    weights: `mezo_jax.core.fingerprint.of_weights` before training.
    splits: Rows of each task.
    secret: Secret of a private run, without which nobody can tell its rows by
      their fingerprint; None of another run.

  Raises:
    InputError: if the model, the tokenizer, an adapter or the rows have changed
      since the run began.
  """
  rows = [rows for s in splits for rows in (s.train, s.dev, s.test)]
  now = inputs_of(config, model, tokenizer) | {
      'weights': weights,
      'rows': fingerprint.of_rows(*rows, key=secret or b'')}
  workdir_lib.check_inputs(
      workdir, now, config.model.name, config.peft.adapter)


def log_header(config: config_lib.Train, workdir: Path, weights: str
               ) -> dict[str, Any]:
  """Returns the header of a new log: what a replay of its steps depends on.

  Args:
    config: Config of the run.
    workdir: Directory of the run, which has the inputs on record.
    weights: `mezo_jax.core.fingerprint.of_weights` before training.
  """
  inputs = workdir_lib.read_inputs(workdir)
  return {
      'mezo_jax': mezo_jax.__version__, 'jax': jax.__version__,
      'device': jax.devices()[0].device_kind, 'weights': weights,
      **{name: inputs[name] for name in ('model', 'tokenizer', 'adapter')
         if name in inputs},
      'config': config_lib.to_json(config)}


def read_config(workdir: Path) -> config_lib.Train:
  """Returns the config of a run, also of an earlier version of this library.

  Raises:
    MissingError: if the directory holds no run.
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
    # Names that are not known raise.
    methods.part_of(config)
    _ = config.task.traits
    return config
  except (AttributeError, KeyError, TypeError) as e:
    raise InputError(
        f'{workdir}/config.json is not that of a run of this version ({e}); '
        'give the --workdir of one.') from e


def write_config(config: config_lib.Train, workdir: Path) -> None:
  """Writes config.json."""
  loggers.write_json(workdir / 'config.json', config_lib.to_json(config))


def write_result(config: config_lib.Train, workdir: Path, splits: data.Splits,
                 mesh: jax.sharding.Mesh, final: dict[str, Any], **more: Any
                 ) -> dict[str, Any]:
  """Writes config.json and result.json, and returns the latter.

  Args:
    config: Config of the run.
    workdir: Directory of the run.
    splits: Rows of the first task.
    mesh: Devices that the run was on.
    final: Report of the test rows.
    **more: Further entries of the result.

  Raises:
    Stopped: if the report of the test rows is not finite.
  """
  if not evaluate.is_finite(final):
    advice = guards.TRY if methods.method_of(config).steps else (
        'Check the weights, or try --config.model.dtype=float32.')
    raise Stopped(f'{config.method} has no result: test '
                  f'{evaluate.spell(final)}. {advice}')
  result = {
      'method': config.method, 'metric': config_lib.metric(config),
      'final': final, 'steps': 0, 'forwards': 0, **more,
      'train_rows': len(splits.train.prompts),
      'truncated': splits.test.truncated, 'peak_memory': evaluate.peak_memory(),
      'devices': f'{mesh.size} x {jax.devices()[0].device_kind}'}
  write_config(config, workdir)
  loggers.write_json(workdir / 'result.json', result)
  return result
