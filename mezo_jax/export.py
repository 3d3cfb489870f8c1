"""A run's working directory to what transformers and PEFT load."""

import os
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp

from mezo_jax import (
  _paths,
  build,
  checkpoint,
  loggers,
  methods,
  models,
  optimizer,
  peft,
  sharding,
  trainable,
)
from mezo_jax import config as config_lib
from mezo_jax import workdir as workdir_lib
from mezo_jax.errors import ExistsError, InputError, MissingError
from mezo_jax.step import make_step


def export(workdir: str | os.PathLike, directory: str | os.PathLike,
           step: int | None = None, merged: bool = False) -> Path:
  """Writes the model of a checkpoint, its tokenizer and a model card.

  Args:
    workdir: of a run of ``train.py``.
    directory: to make; it must not hold anything yet.
    step: of the checkpoint; None for the one that is best on dev rows, of a
      private run the last.
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
  run = workdir_lib.read_config(workdir)
  if directory.exists() and any(directory.iterdir()):
    raise ExistsError(
        f'{directory} is there already and not empty; give another directory.')
  if run.task.traits.new_head:
    raise InputError(
        f'{workdir} trained a classification head, which a language model has '
        'no place for; its checkpoints hold it, under `classifier`.')
  part, adapts = methods.part_of(run), methods.adapts(run)
  if merged and not part.added:
    raise InputError('only LoRA can be merged into the weights; leave --merged '
                     'out.')
  tokenizer = build.read_tokenizer(run)

  # What the checkpoint holds; what it does not is the base model's.
  mesh, whole = sharding.make_mesh(), not (part.pattern or run.peft.mask)
  model, params = build.load(
      run, build.read_config(run), mesh, abstract=whole)
  model, params = build.add(run, model, params, tokenizer, mesh)
  shapes, frozen = trainable.split(run, params)
  tx = optimizer.make_optimizer(run, jax.eval_shape(lambda x: x, shapes))
  opt_state = build.init_state(tx, shapes, mesh, abstract=True)
  # The run may still be at it: nothing of its directory is touched.
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', clean=False)
  if step is None:
    step = (checkpoints.best_step if methods.selects(run)
            else checkpoints.latest_step)()
  if step not in checkpoints.steps():
    raise MissingError(
        f'{workdir} has no checkpoint of step {step} but of '
        f'{", ".join(map(str, checkpoints.steps())) or "none"}.')
  params, opt_state = build.restore(checkpoints, step, shapes, opt_state)
  params, _ = make_step(tx, None, mesh=mesh).flush(params, opt_state)
  params = peft.join(params, frozen)
  checkpoints.close()

  about = dict(tokenizer=tokenizer, card=card(
      run, step, workdir_lib.read_result(workdir)))
  if adapts and not merged:
    _check_finite(params, step)
    return peft.save(directory, model, params, base=_base(run)[0], **about)
  params = peft.join_layers(peft.lora.merge(params), take=True)
  _check_finite(params, step)
  models.save(directory, model, params, **about)
  generation = models.find(
      build.model_name(run), run.model.revision or None, weights=False
  ) / 'generation_config.json'
  if generation.is_file() and jax.process_index() == 0:
    shutil.copy(generation, directory)
  return directory


def _check_finite(params: dict, step: int) -> None:
  """Raises ValueError for the first parameter that is not finite."""
  for path, x in _paths.named_leaves(params):
    if not all(jnp.isfinite(a).all() for a in jax.tree.leaves(x)):
      raise InputError(
          f'{path} of step {step} is not finite: such a model '
          'computes nothing. Choose an earlier --step, if one was kept.')


def card(run: config_lib.Train, step: int, result: dict) -> str:
  """README.md of an exported model: base model, method, result."""
  base, note = _base(run)
  hub_id = base.count('/') == 1 and not Path(base).exists()
  o, metric = run.optimizer, run.task.main_metric
  method, z = methods.method_of(run), run.spsa
  mezo, how = not method.backprop, method.words.format(optimizer=o.name)
  kind = f'{z.distribution} {z.rank}' if z.distribution in (
      'low_rank', 'lazy_low_rank', 'subzero') else z.distribution
  rows = ' (of rows of their own)' if z.over == 'rows' else ''
  settings = {
      'data': run.data.train or run.task.hub,
      'prompt': f'`{_cell(run.task.template)}`',
      **({'label words': ', '.join(
          f'`{_cell(w)}`' for w in run.task.label_words)} if (
              run.task.label_words) else {}),
      'objective': config_lib.objective(run),
      'learning rate': f'{o.learning_rate:g}, {o.schedule}',
      **{f'learning rate, eps of `{_cell(g)}`': f'{rate:g}, {eps:g}'
         for g, rate, eps in o.groups},
      **({'eps': f'{z.eps:g}', 'directions a step':
          f'{z.num_samples}{rows}, {z.combine}, {kind}'} if mezo else {}),
      'parameters trained': _trained(run), 'batch size': run.data.batch_size,
      'dtype': run.model.dtype, 'seed': run.seed}
  lines = [
      '---',
      *([f'base_model: {base}'] if hub_id else []),
      f'library_name: {"peft" if methods.adapts(run) else "transformers"}',
      *(['tags:', '- mezo', '- zeroth-order'] if mezo else []), '---', '',
      f'# {Path(base).name}, fine-tuned{" with MeZO" if mezo else ""}', '',
      f'`{base}`{note} after {step} of {run.steps} steps of {how}, by '
      'mezo_jax.', '',
      loggers.markdown_table([{'setting': name, 'value': value}
                              for name, value in settings.items()]), '']
  final, zero = result.get('final'), result.get('zero_shot', {})
  if final and final.get('step') == step:
    rows, value = f'{final["count"]} test rows', metric.replace('_', ' ')
    lines += [loggers.markdown_table([
        {rows: what, value: f'{report[key]:.1%}'} for what, report, key in (
            ('zero-shot', zero, metric),
            ('zero-shot, calibrated', zero, f'calibrated_{metric}'),
            ('this model', final, metric)) if key in report]), '']
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
  what = methods.part_of(run).words.format(**{
      k: _cell(v) if isinstance(v, str) else v for k, v in vars(p).items()})
  return f'{what}: `{_cell(p.mask)}`' if p.mask else what


def _cell(text: str) -> str:
  """Text that a table's cell can hold: line breaks and bars are escaped."""
  return repr(text)[1:-1].replace('|', r'\|')
