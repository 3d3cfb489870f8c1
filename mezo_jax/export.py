"""A run's working directory to a model in Hugging Face's format."""

import json
import os
from pathlib import Path
import shutil

import jax

from mezo_jax import baselines, checkpoint, models, sharding
from mezo_jax import config as config_lib


def export(workdir: str | os.PathLike, directory: str | os.PathLike,
           step: int | None = None) -> Path:
  """Writes the model of a checkpoint, its tokenizer and a model card.

  Args:
    workdir: of a run of ``train.py``.
    directory: to make; it must not hold anything yet.
    step: of the checkpoint; None for the one that is best on dev rows.

  Returns:
    The directory: ``transformers`` loads it, and `mezo_jax.models.load`.

  Raises:
    FileNotFoundError: if the run, or a checkpoint of that step, is not there.
    FileExistsError: if ``directory`` is not empty.
    ValueError: if the run's config or the checkpoint cannot be read.
  """
  workdir, directory = Path(workdir), Path(directory)
  if not ((workdir / 'config.json').is_file()
          and (workdir / 'checkpoints').is_dir()):
    raise FileNotFoundError(
        f'{workdir} has no config.json and checkpoints: it is not the '
        '--workdir of a run.')
  if directory.exists() and any(directory.iterdir()):
    raise FileExistsError(
        f'{directory} is there already and not empty; give another directory.')
  try:
    run = config_lib.from_json(
        json.loads((workdir / 'config.json').read_text()))
  except (KeyError, TypeError, ValueError) as e:
    raise ValueError(
        f'{workdir}/config.json is not that of a run of this version ({e}); '
        'give the --workdir of one.') from e
  if run.task.kind == 'head':
    raise ValueError(
        f'{workdir} trained a classification head, which a language model has '
        'no place for; its checkpoints hold it, under `classifier`.')
  name, revision = config_lib.model_name(run), run.model.revision or None
  model_config = models.load_config(name, revision)
  if run.method in config_lib.UNTIES:
    model_config = baselines.untied(model_config)
  model = models.Transformer(model_config)
  tokenizer = models.load_tokenizer(
      name, revision, run.model.bos_token or None)

  mesh = sharding.make_mesh()
  shapes = models.param_shapes(model.config, mesh, run.model.dtype)
  opt_state = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=sharding.replicated(mesh)),
      jax.eval_shape(config_lib.make_optimizer(run).init, shapes))
  # The run may still be at it: nothing of its directory is touched.
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', clean=False)
  step = checkpoints.best_step() if step is None else step
  if step not in checkpoints.steps():
    raise FileNotFoundError(
        f'{workdir} has no checkpoint of step {step} but of '
        f'{", ".join(map(str, checkpoints.steps())) or "none"}.')
  params, _ = checkpoints.load(step, (shapes, opt_state))
  checkpoints.close()

  result_file = workdir / 'result.json'
  result = (json.loads(result_file.read_text()) if result_file.is_file()
            else {})
  models.save(directory, model, params, tokenizer=tokenizer,
              card=card(run, step, result))
  generation = models.find(name, revision, weights=False) / (
      'generation_config.json')
  if generation.is_file() and jax.process_index() == 0:
    shutil.copy(generation, directory)
  return directory


def card(run: config_lib.Train, step: int, result: dict) -> str:
  """README.md of an exported model: base model, method, result."""
  base = run.model.name
  note = ''
  if base == 'quickstart':
    base = 'HuggingFaceTB/SmolLM2-135M-Instruct'
    note = ' (its weights as a Q4_1 GGUF file has them)'
  hub_id = base.count('/') == 1 and not Path(base).exists()
  o, metric = run.optimizer, run.task.main_metric
  mezo = run.method in ('mezo', 'lp_mezo')
  how = {'mezo': 'MeZO (Malladi et al., 2023), forward passes only',
         'lp_mezo': 'MeZO (Malladi et al., 2023) after a linear probe, forward '
                    'passes only',
         'head_only': f'backpropagation ({o.name}) into the head alone',
         'finetune': f'backpropagation ({o.name})'}[run.method]
  signs = 'one-sided' if o.one_sided else 'two-sided'
  lines = [
      '---',
      *([f'base_model: {base}'] if hub_id else []),
      'library_name: transformers',
      *(['tags:', '- mezo', '- zeroth-order'] if mezo else []), '---', '',
      f'# {Path(base).name}, fine-tuned{" with MeZO" if mezo else ""}', '',
      f'`{base}`{note} after {step} of {run.steps} steps of {how}, by '
      'mezo_jax.', '',
      '| | |', '|---|---|',
      f'| data | {run.data.train or run.task.hub} |',
      f'| prompt | `{_cell(run.task.template)}` |',
      *([f'| label words | '
         f'{", ".join(f"`{_cell(w)}`" for w in run.task.label_words)} |'] if (
             run.task.label_words) else []),
      f'| objective | {config_lib.objective(run)} |',
      f'| learning rate | {o.learning_rate:g}, {o.schedule} |',
      *([f'| eps | {o.eps:g} |',
         f'| directions a step | {o.num_samples}, {signs}, '
         f'{o.distribution} |'] if mezo else []),
      f'| parameters trained | '
      f'{f"`{_cell(o.mask)}`" if o.mask else "all"} |',
      f'| batch size | {run.data.batch_size} |',
      f'| dtype | {run.model.dtype} |',
      f'| seed | {run.seed} |', '']
  final, zero = result.get('final'), result.get('zero_shot', {})
  if final and final.get('step') == step:
    calibrated = f'calibrated_{metric}'
    lines += [f'| {final["count"]} test rows | {metric.replace("_", " ")} |',
              '|---|---|']
    lines += [f'| {what} | {report[key]:.1%} |' for what, report, key in (
        ('zero-shot', zero, metric),
        ('zero-shot, calibrated', zero, calibrated),
        ('this model', final, metric)) if key in report] + ['']
  else:
    lines += ['No result on test rows was recorded for this step.', '']
  return '\n'.join(lines)


def _cell(text: str) -> str:
  """Text that a table's cell can hold: line breaks and bars are escaped."""
  return repr(text)[1:-1].replace('|', r'\|')
