"""Loads what a run has trained, from its checkpoints or from an export.

An exported directory contains ``mezo_jax.json``, which says how rows become
prompts and answers.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax

import mezo_jax
from mezo_jax import models, peft
from mezo_jax.core import fingerprint, sharding
from mezo_jax.core.errors import InputError, MissingError
from mezo_jax.core.quantized import QUANTISED
from mezo_jax.models.formats import classifier
from mezo_jax.runs import checkpoint, loggers
from mezo_jax.runs import workdir as workdir_lib
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import predictions
from mezo_jax.training import build, methods, optimizer, run_files, trainable
from mezo_jax.training import config as config_lib
from mezo_jax.transforms.step import make_step

FILE = 'mezo_jax.json'  # name of the file in an exported directory
TEMPLATE = 'chat_template.jinja'  # the same, as transformers writes it


class Trained(NamedTuple):
  """Holds a trained model.

  Attributes:
    model: The model.
    params: All its parameters, trained and frozen ones.
    tokenizer: Its tokenizer.
    mesh: Mesh that the parameters are on.
    step: The step after which the model has these parameters; 0 if that is
      unknown.
  """

  model: models.Transformer
  params: dict[str, Any]
  tokenizer: Any
  mesh: jax.sharding.Mesh
  step: int = 0


def load_step(workdir: Path, run: config_lib.Train, step: int | None = None
              ) -> Trained:
  """Loads the model of a checkpoint.

  Args:
    workdir: Working directory of the run, which may still be in progress.
    run: Config of the run.
    step: Step of the checkpoint. Defaults to None, for the best step on the dev
      rows, or the last step of a private run.

  Raises:
    MissingError: If there is no checkpoint of the step, or no base model.
    InputError: If the checkpoint cannot be read, or if the base model has
      changed since the run began.
  """
  checkpoints, step = find_step(workdir, run, step)
  # If all parameters are trained, the checkpoint contains them all, and the
  # weights of the base model need not be read.
  whole = not (methods.part_of(run).pattern or run.peft.mask)
  try:
    model, tokenizer, shapes, frozen, tx, mesh = parts(run, abstract=whole)
  except MissingError as e:
    raise MissingError(f'{e} If the base model was moved, export the run with '
                       'its location as --base.') from e
  check_base(run, model, tokenizer, None if whole else (shapes, frozen),
             workdir_lib.read_inputs(workdir), workdir)
  opt_state = build.init_state(tx, shapes, mesh, abstract=True)
  params, opt_state = checkpoints.load(step, (shapes, opt_state))
  step_fn = make_step(tx, None, mesh=mesh)
  params, _ = step_fn.apply_accumulated(params, opt_state)
  checkpoints.close()
  return Trained(model, peft.join(params, frozen), tokenizer, mesh, step)


def find_step(workdir: Path, run: config_lib.Train, step: int | None = None
              ) -> tuple[checkpoint.Checkpoints, int]:
  """Returns the checkpoints of a run, and the step of one of them.

  The arguments and errors are those of `load_step`.
  """
  # The run may still be writing checkpoints, so do not delete incomplete ones.
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', clean=False)
  if step is None:
    step = chosen(run, checkpoints)
  if step is None:
    raise MissingError(f'{workdir} has no checkpoint yet.')
  if step not in checkpoints.steps():
    raise MissingError(
        f'{workdir} has no checkpoint of step {step}; the steps with one are: '
        f'{", ".join(map(str, checkpoints.steps())) or "none"}.')
  return checkpoints, step


def chosen(run: config_lib.Train, checkpoints: checkpoint.Checkpoints
           ) -> int | None:
  """Returns the best step on the dev rows, or the last step.

  The last step is returned for a run whose dev rows do not select a step.
  """
  return (checkpoints.best_step if methods.selects(run)
          else checkpoints.latest_step)()


def parts(run: config_lib.Train, abstract: bool = False):
  """Builds the model, the parameters and the optimizer of a run's first step.

  Args:
    run: Config of the run.
    abstract: Whether to return shapes instead of reading the weights. Defaults
      to False.

  Returns:
    ``model, tokenizer, trained params, frozen params, tx, mesh``.
  """
  model, params, tokenizer, mesh, _ = untrained(run, abstract)
  params, frozen = trainable.split(run, params)
  tx = optimizer.make_optimizer(run, jax.eval_shape(lambda x: x, params))
  return model, tokenizer, params, frozen, tx, mesh


def untrained(run: config_lib.Train, abstract: bool = False) -> Trained:
  """Builds the model of a run before its first step.

  Args:
    run: Config of the run.
    abstract: Whether to return shapes instead of reading the weights. Defaults
      to False.
  """
  # Offloading layers to the host is for training; here weights are only read.
  run.model.offload = False
  tokenizer, mesh = build.read_tokenizer(run), sharding.make_mesh()
  model, params = build.load(run, build.read_config(run), mesh, abstract)
  model, params = build.add(run, model, params, tokenizer, mesh)
  return Trained(model, params, tokenizer, mesh)


def check_base(run: config_lib.Train, model, tokenizer, params,
               recorded: dict, source: Path) -> None:
  """Checks that the base model is the one with which a run began.

  Args:
    run: Config of the run, with the current location of the base model.
    model: The current base model.
    tokenizer: Its tokenizer.
    params: Two trees that together contain its parameters. None if the weights
      are not used, which skips their check.
    recorded: Fingerprints of the inputs that the run recorded.
    source: Directory or file in which they were recorded, for the error.

  Raises:
    InputError: If it is another model.
  """
  now = run_files.inputs_of(run, model.config, tokenizer)
  if params is not None:
    now['weights'] = fingerprint.of_weights(
        peft.join(*params), methods.made(run))
  what = workdir_lib.changed(
      recorded, now, run.model.name, run.peft.adapter)
  if what:
    raise InputError(
        f'{what} from what the run of {source} began with (in '
        f'{run.model.dtype}). Pass the original base model as --base of export '
        'or replay.')


# --- exports ----------------------------------------------------------------


def describe(run: config_lib.Train, adapter: bool) -> dict[str, Any]:
  """Returns the contents of ``mezo_jax.json``.

  These are the part of the run's config that predictions depend on and, for
  readers without this library, the classes with their label words.

  Args:
    run: Config of the run.
    adapter: Whether the directory contains an adapter, not a whole model.
  """
  config = config_lib.to_json(run)
  named = objectives.of(run.task, run.objective)
  # The file has no local paths. An adapter names its base model itself, except
  # for the quickstart.
  quickstart = adapter and run.model.name == 'quickstart'
  whole_dtype = 'float32' if run.model.dtype in QUANTISED else run.model.dtype
  kept = {
      'model': {'name': 'quickstart' if quickstart else '',
                'revision': run.model.revision if adapter else '',
                'dtype': run.model.dtype if adapter else whole_dtype,
                'bos_token': run.model.bos_token},
      # The tokenizer of a whole model has the chat template.
      'task': config['task'] | {
          'chat_template': TEMPLATE if adapter and run.task.chat_template
          else ''},
      'data': {name: config['data'][name] for name in ('max_length',
                                                       'buckets')},
      'peft': {'method': run.peft.method if adapter else ''},
      'objective': named if named in objectives.OBJECTIVES else '',
      'calibration': run.calibration,
      'eval_batch_size': run.eval_batch_size,
      'eval_batch_tokens': run.eval_batch_tokens}
  out: dict[str, Any] = {'mezo_jax': mezo_jax.__version__, 'config': kept}
  if run.task.traits.classes:
    words = run.task.label_words or [None] * run.task.num_classes
    out['classes'] = [{'name': name, 'word': word} for name, word in zip(
        predictions.class_names(run.task), words)]
  return out


def read_export(directory: Path) -> config_lib.Train:
  """Returns a config whose zero-shot evaluation is that of an exported model.

  Args:
    directory: Directory that ``mezo-jax export`` wrote.

  Raises:
    MissingError: If it contains an adapter whose base model is unknown.
    InputError: If a file cannot be read.
  """
  about = loggers.read_json(directory / FILE)
  try:
    run = config_lib.from_json(about['config'])
    _ = run.task.traits
  except (AttributeError, KeyError, TypeError) as e:
    raise InputError(
        f'{directory / FILE} cannot be read by this version of mezo_jax '
        f'({e}); export the run again.') from e
  run.method = 'zero_shot'
  if not run.peft.method:
    run.model.name = str(directory)
    return run
  if run.task.traits.new_head:
    raise InputError(
        f'{directory} contains an adapter and a classification head, which are '
        'not predicted with; export the run with --merged, or give its working '
        'directory.')
  run.peft.adapter = str(directory)
  if run.task.chat_template:
    run.task.chat_template = str(directory / run.task.chat_template)
  if not run.model.name:
    run.model.name = peft.describe(directory)[1].get(
        'base_model_name_or_path') or ''
  if not run.model.name:
    raise MissingError(
        f'{directory}/adapter_config.json names no base model; set '
        'base_model_name_or_path in it to its directory or hub id.')
  return run


def load_export(directory: Path, run: config_lib.Train) -> Trained:
  """Loads the model of a directory that ``mezo-jax export`` wrote.

  Args:
    directory: The directory.
    run: Its config, from `read_export`.

  Raises:
    InputError: If a file is missing or cannot be read.
  """
  found = untrained(run)
  if not run.task.traits.new_head:
    return found
  head = classifier.load(directory, found.model.config, run.task.num_classes)
  place = sharding.replicated(found.mesh)
  return found._replace(params=found.params | {'classifier': jax.tree.map(
      lambda x: jax.device_put(x, place), head)})
