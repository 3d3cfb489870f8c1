"""Reads and writes the files of a working directory that describe a run.

These are ``config.json`` (the config), ``inputs.json`` (fingerprints of model,
tokenizer, adapter and rows), the header of the log of steps,
``predictions.jsonl`` and ``result.json``.
"""

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
from mezo_jax.tasks import data, evaluate, predictions
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods, mixture

RATE = 'learning_rate.json'  # what a range test found


def with_found_rate(config: config_lib.Train, workdir: Path
                    ) -> config_lib.Train:
  """Returns a config with the learning rate that its range test found.

  A test of other settings does not count, unless the run has begun: then
  `check_workdir` compares the settings.

  Args:
    config: Config of the run.
    workdir: Directory of the run.

  Returns:
    The config. It is unchanged if its learning rate is a number, or if the test
    was not made yet.
  """
  if not config_lib.is_auto(config) or not (workdir / RATE).is_file():
    return config
  found = loggers.read_json(workdir / RATE)
  if (found['config'] != config_lib.bound(config)
      and not (workdir / 'config.json').exists()):
    return config
  return config_lib.with_learning_rate(config, found['learning_rate'])


def check_workdir(config: config_lib.Train, workdir: Path) -> None:
  """Checks that a config can run, or continue a run, in a directory.

  Args:
    config: Config of the run.
    workdir: Directory of the run. It may be empty or missing.

  Raises:
    InputError: if the directory contains a run with other settings, a run with
      more steps than the config, or a run with as many steps as the config
      whose last step was not evaluated.
  """
  config = with_found_rate(config, workdir)
  config_file = workdir / 'config.json'
  if config_file.exists():
    saved = loggers.read_json(config_file)
    config_lib.check_same_run(config, saved)
    name = saved.get('model', {}).get('name')
    if name != config.model.name and (
        'weights' not in workdir_lib.read_inputs(workdir)):
      raise InputError(
          f'model.name was {name!r} and is now {config.model.name!r}, but '
          f'{workdir} has no fingerprint of the weights to check that the two '
          'models are the same; choose another --workdir.')
  held, final = workdir_lib.last_step(workdir)
  least = held if final else held + 1
  if config.steps < least:
    raise InputError(
        f'{workdir} contains step {held}'
        f'{"" if final else ", which was not evaluated,"} but --config.steps '
        f'is {config.steps}; set it to {least} or more, or choose another '
        '--workdir.')


def inputs_of(config: config_lib.Train, model: models.Config, tokenizer: Any
              ) -> dict[str, Any]:
  """Returns fingerprints of the model's config, the tokenizer and the adapter.

  Weights and rows are not included.

  Args:
    config: Config of the run.
    model: Config of the model, as `mezo_jax.training.build.add` returns it.
    tokenizer: Tokenizer of the model.

  Returns:
    A dict with the keys 'model', 'tokenizer' and, if the run starts from an
    adapter, 'adapter'.
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
  """Records fingerprints of a run's inputs, or compares them with earlier ones.

  Args:
    config: Config of the run.
    workdir: Directory of the run.
    model: Config of the model, as `mezo_jax.training.build.add` returns it.
    tokenizer: Tokenizer of the model.
    weights: Fingerprint of the weights before training, from
      `mezo_jax.core.fingerprint.of_weights`.
    splits: Encoded rows of each task.
    secret: Secret of a private run, or None for another run. The fingerprint of
      the rows is a keyed hash with the secret as its key. Without the secret,
      nobody can test from the fingerprint whether they guessed the rows.

  Raises:
    InputError: if the weights, the model, the tokenizer, the adapter or the
      rows have changed since the run began.
  """
  rows = [rows for s in splits for rows in (s.train, s.dev, s.test)]
  now = inputs_of(config, model, tokenizer) | {
      'weights': weights,
      'rows': fingerprint.of_rows(*rows, key=secret or b'')}
  workdir_lib.check_inputs(
      workdir, now, config.model.name, config.peft.adapter)


def log_header(config: config_lib.Train, workdir: Path, weights: str
               ) -> dict[str, Any]:
  """Returns the header of a new log of steps.

  It contains everything that a replay depends on, except for the steps: the
  versions, the kind of device, fingerprints of the inputs, and the config.

  Args:
    config: Config of the run.
    workdir: Directory of the run, in which `check_inputs` has recorded the
      inputs.
    weights: Fingerprint of the weights before training, from
      `mezo_jax.core.fingerprint.of_weights`.
  """
  inputs = workdir_lib.read_inputs(workdir)
  return {
      'mezo_jax': mezo_jax.__version__, 'jax': jax.__version__,
      'device': jax.devices()[0].device_kind, 'weights': weights,
      **{name: inputs[name] for name in ('model', 'tokenizer', 'adapter')
         if name in inputs},
      'config': config_lib.to_json(config)}


def read_config(workdir: Path, is_trained: bool = True) -> config_lib.Train:
  """Returns the config of a run of this or an earlier version of mezo_jax.

  Args:
    workdir: Directory of the run.
    is_trained: Whether the directory must have checkpoints. Defaults to True.

  Raises:
    MissingError: if the directory does not contain a run.
    InputError: if the config cannot be read.
  """
  if not ((workdir / 'config.json').is_file()
          and ((workdir / 'checkpoints').is_dir() or not is_trained)):
    raise MissingError(
        f'{workdir} lacks config.json{" or checkpoints" * is_trained}; give '
        'the --workdir of a run.')
  saved = loggers.read_json(workdir / 'config.json')
  try:
    config = config_lib.from_json(saved)
    # These lookups raise if the method, its part or the kind of task is
    # unknown.
    methods.part_of(config)
    _ = config.task.traits
    return config
  except (AttributeError, KeyError, TypeError) as e:
    raise InputError(
        f'{workdir}/config.json cannot be read by this version of mezo_jax '
        f'({e}); give the --workdir of a run of this version.') from e


def write_config(config: config_lib.Train, workdir: Path) -> None:
  """Writes ``config.json``.

  Args:
    config: Config of the run.
    workdir: Directory of the run.
  """
  loggers.write_json(workdir / 'config.json', config_lib.to_json(config))


def write_result(config: config_lib.Train, workdir: Path,
                 tasks: mixture.Mixture, mesh: jax.sharding.Mesh,
                 on_dev: dict[str, Any] | None, final: dict[str, Any],
                 answers: Sequence[Any], **more: Any) -> dict[str, Any]:
  """Writes the files of a finished run, and returns the result.

  These are ``config.json``, ``predictions.jsonl`` and ``result.json``. A
  private run has no ``predictions.jsonl``. Test rows are often taken from the
  same file as the private rows, and its working directory contains nothing
  about single rows.

  Args:
    config: Config of the run.
    workdir: Directory of the run.
    tasks: Tasks of the run.
    mesh: Mesh of the run's devices.
    on_dev: Report on the dev rows, or None if they were not evaluated.
    final: Report on the test rows.
    answers: Answers of the test rows of each task.
    **more: Further entries of the result.

  Returns:
    The content of ``result.json``.

  Raises:
    Stopped: if the report on the test rows has values that are not finite.
  """
  if not evaluate.is_finite(final):
    advice = guards.TRY if methods.method_of(config).steps else (
        'Check the weights, or try --config.model.dtype=float32.')
    raise Stopped(f'{config.method} has no result: test '
                  f'{evaluate.spell(final)}. {advice}')
  rows = tasks.predictions(answers)
  private = methods.method_of(config).private
  if rows and not private and jax.process_index() == 0:
    predictions.write(workdir / predictions.FILE, rows)
  classes = tasks.classes(rows)
  splits = tasks.splits[0]
  result = {
      'method': config.method, 'metric': config_lib.metric(config),
      'final': final, **({'dev': on_dev} if on_dev else {}),
      **({'classes': classes} if classes else {}), 'seed': config.seed,
      'steps': 0, 'forwards': 0, **more,
      'train_rows': len(splits.train.prompts),
      'truncated': splits.test.truncated, 'peak_memory': evaluate.peak_memory(),
      'devices': f'{mesh.size} x {jax.devices()[0].device_kind}'}
  write_config(config, workdir)
  loggers.write_json(workdir / 'result.json', result)
  return result
