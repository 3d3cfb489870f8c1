"""A run's working directory to what transformers and PEFT load."""

import json
import os
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp

from mezo_jax import _paths, checkpoint, models, peft, sharding, trainable
from mezo_jax import config as config_lib


def export(workdir: str | os.PathLike, directory: str | os.PathLike,
           step: int | None = None, merged: bool = False) -> Path:
  """Writes the model of a checkpoint, its tokenizer and a model card.

  Args:
    workdir: of a run of ``train.py``.
    directory: to make; it must not hold anything yet.
    step: of the checkpoint; None for the one that is best on dev rows.
    merged: add LoRA to the weights and write a whole model.

  Returns:
    The directory: ``transformers`` loads it, and `mezo_jax.models.load`. Of
    LoRA, a prefix or a soft prompt the adapters alone: ``peft`` loads them on
    the base model, and `mezo_jax.peft.load`.

  Raises:
    FileNotFoundError: if the run, or a checkpoint of that step, is not there.
    FileExistsError: if ``directory`` is not empty.
    ValueError: if the run's config or the checkpoint cannot be read, or a
      parameter is not finite.
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
  adapts = trainable.adapts(run)
  if merged and run.peft.method != 'lora':
    raise ValueError('only LoRA can be merged into the weights; leave --merged '
                     'out.')
  name, revision = config_lib.model_name(run), run.model.revision or None
  model = models.Transformer(models.load_config(name, revision))
  tokenizer = models.load_tokenizer(
      name, revision, run.model.bos_token or None)

  # What the checkpoint holds; what it does not is the base model's.
  mesh = sharding.make_mesh()
  shapes, frozen = models.param_shapes(model.config, mesh, run.model.dtype), {}
  if run.method == 'lp_mezo':
    model = model.clone(config=peft.untied(model.config))
    shapes = models.param_shapes(model.config, mesh, run.model.dtype)
  elif trainable.method_of(run) or run.peft.mask:
    model, params = models.load(name, mesh, run.model.dtype, revision=revision)
    model, params = trainable.add(run, model, params, tokenizer, mesh)
    shapes, frozen = trainable.split(run, params)
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
  params = peft.join(params, frozen)
  checkpoints.close()

  result_file = workdir / 'result.json'
  result = (json.loads(result_file.read_text()) if result_file.is_file()
            else {})
  about = dict(tokenizer=tokenizer, card=card(run, step, result))
  if adapts and not merged:
    _check_finite(params, step)
    return peft.save(directory, model, params, base=_base(run)[0], **about)
  params = peft.join_layers(peft.lora.merge(params), take=True)
  _check_finite(params, step)
  models.save(directory, model, params, **about)
  generation = models.find(name, revision, weights=False) / (
      'generation_config.json')
  if generation.is_file() and jax.process_index() == 0:
    shutil.copy(generation, directory)
  return directory


def _check_finite(params: dict, step: int) -> None:
  """Raises ValueError for the first parameter that is not finite."""
  for path, x in _paths.named_leaves(params):
    if not jnp.isfinite(x).all():
      raise ValueError(
          f'{path} of step {step} is not finite: such a model '
          'computes nothing. Choose an earlier --step, if one was kept.')


def card(run: config_lib.Train, step: int, result: dict) -> str:
  """README.md of an exported model: base model, method, result."""
  base, note = _base(run)
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
      f'library_name: {"peft" if trainable.adapts(run) else "transformers"}',
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
      *(f'| learning rate, eps of `{_cell(g)}` | {rate:g}, {eps:g} |'
        for g, rate, eps in o.groups),
      *([f'| eps | {o.eps:g} |',
         f'| directions a step | {o.num_samples}, {signs}, '
         f'{o.distribution} |'] if mezo else []),
      f'| parameters trained | {_trained(run)} |',
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


def _base(run: config_lib.Train) -> tuple[str, str]:
  """The base model's name, and a note on it."""
  if run.model.name == 'quickstart':
    return ('HuggingFaceTB/SmolLM2-135M-Instruct',
            ' (its weights as a Q4_1 GGUF file has them)')
  return run.model.name, ''


def _trained(run: config_lib.Train) -> str:
  p = run.peft
  if p.adapter:
    return f'{p.method}, from `{_cell(p.adapter)}`'
  what = {'lora': f'LoRA of `{_cell(p.targets)}`, rank {p.rank}, alpha '
                  f'{p.alpha:g}',
          'prefix': f'a prefix of {p.num_tokens} keys and values a layer',
          'prompt': f'{p.num_tokens} soft tokens', 'bitfit': 'biases',
          'last_layers': f'the last {p.num_layers} layers',
          'head': 'the head', '': 'all'}[trainable.method_of(run)]
  return f'{what}: `{_cell(p.mask)}`' if p.mask else what


def _cell(text: str) -> str:
  """Text that a table's cell can hold: line breaks and bars are escaped."""
  return repr(text)[1:-1].replace('|', r'\|')
