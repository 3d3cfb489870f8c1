"""A run's working directory to what transformers and PEFT load."""

from collections.abc import Callable
import os
from pathlib import Path
import shutil
import time

import jax
import jax.numpy as jnp

from mezo_jax import (
  _paths,
  build,
  checkpoint,
  evaluate,
  fingerprint,
  loggers,
  methods,
  models,
  optimizer,
  peft,
  replay,
  resume,
  sharding,
  trainable,
)
from mezo_jax import config as config_lib
from mezo_jax import workdir as workdir_lib
from mezo_jax.errors import ExistsError, InputError, MissingError
from mezo_jax.step import make_step


def export(workdir: str | os.PathLike, directory: str | os.PathLike,
           step: int | None = None, merged: bool = False,
           log: bool = False) -> Path:
  """Writes the model of a checkpoint, its tokenizer and a model card.

  Args:
    workdir: of a run of ``train.py``.
    directory: to make; it must not hold anything yet.
    step: of the checkpoint; None for the one that is best on dev rows, of a
      private run the last.
    merged: add LoRA to the weights and write a whole model.
    log: write the steps and the card alone, 4 bytes a step and direction, from
      which `rebuild` makes the weights.

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
  _check_new(directory)
  # The run may still be at it: nothing of its directory is touched.
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', clean=False)
  if log:
    step = _chosen(run, checkpoints) if step is None else step
    checkpoints.close()
    return share(workdir, directory, run, step)
  _check_exportable(run, workdir, merged)
  whole = not (methods.part_of(run).pattern or run.peft.mask)
  model, tokenizer, shapes, frozen, tx, mesh = _parts(run, abstract=whole)
  opt_state = build.init_state(tx, shapes, mesh, abstract=True)
  if step is None:
    step = _chosen(run, checkpoints)
  if step not in checkpoints.steps():
    raise MissingError(
        f'{workdir} has no checkpoint of step {step} but of '
        f'{", ".join(map(str, checkpoints.steps())) or "none"}.')
  params, opt_state = resume.load(checkpoints, step, shapes, opt_state)
  params, _ = make_step(tx, None, mesh=mesh).flush(params, opt_state)
  checkpoints.close()
  return _write(directory, run, model, peft.join(params, frozen), tokenizer,
                step, workdir_lib.read_result(workdir), merged)


def rebuild(base: str | os.PathLike, log: str | os.PathLike,
            directory: str | os.PathLike, until: int | None = None,
            merged: bool = False,
            say: Callable[[str], None] = print) -> Path:
  """Makes the steps of a log again, and writes the model that they give.

  Neither data nor forward passes are needed, but the weights that the run began
  with.

  Args:
    base: the model, a directory or a hub id.
    log: of a run, or as `share` wrote it.
    directory: to make; it must not hold anything yet.
    until: the last step to make; None for all.
    merged: add LoRA to the weights and write a whole model.
    say: reports what is found.

  Raises:
    InputError: if the log is not a whole one, if ``base`` is not what the run
      began with, or if more than the log is needed.
  """
  log, directory = Path(log), Path(directory)
  _check_new(directory)
  recorded = replay.read(log)
  run = _config_of(log, recorded.header)
  run.model.name, run.model.revision = str(base), ''
  _check_exportable(run, log, merged)
  steps = recorded.steps
  if steps.first != 1:
    raise InputError(
        f'{log} begins with step {steps.first}: what was before it, a '
        'checkpoint alone has. Export that, with python -m mezo_jax export.')
  if methods.looks_first(run):
    raise InputError(
        f'--config.method={run.method} looked at its rows and weights before '
        'the first step, and the log has not what it found; export a '
        'checkpoint of the run.')
  if until is not None and not 1 <= until <= steps.last:
    raise InputError(f'{log} has the steps 1 to {steps.last}, and --until is '
                     f'{until}.')
  if recorded.damaged and until is None:
    say(f'warning: the last {recorded.damaged} bytes of {log} are damaged: it '
        f'is whole up to step {steps.last}.')
  model, tokenizer, params, frozen, tx, mesh = _parts(run)
  found = fingerprint.of_weights(
      peft.join(params, frozen), methods.made(run))
  if found != recorded.header['weights']:
    raise InputError(
        f'{base} in {run.model.dtype} is not what the run of {log} began with '
        f'({found}, not {recorded.header["weights"]}): give the model that its '
        'model card names.')
  steps, began = steps.until(until or steps.last), time.time()
  step = make_step(tx, None, mesh=mesh)
  params, state = step.flush(*replay.rebuild(
      step, params, build.init_state(tx, params, mesh), steps))
  jax.block_until_ready(params)
  say(f'made {steps.last} steps again in {time.time() - began:.1f} s')
  return _write(directory, run, model, peft.join(params, frozen), tokenizer,
                steps.last, {}, merged)


def _config_of(log: Path, header: dict) -> config_lib.Train:
  try:
    run = config_lib.from_json(header['config'])
    methods.part_of(run), run.task.traits  # they are known
    return run
  except (AttributeError, KeyError, TypeError) as e:
    raise InputError(f'the header of {log} has no config of a run of this '
                     f'version ({e}): it is not a log of train.py.') from e


def share(workdir: Path, directory: Path, run: config_lib.Train,
          step: int) -> Path:
  """Writes the log of a run up to ``step`` and a model card: all that there is
  to share of a fine-tuned model with who has the base model.

  Raises:
    InputError: if the log does not tell all.
  """
  recorded = replay.read(workdir / workdir_lib.LOG)
  steps = recorded.steps.until(step)
  if steps.first != 1 or steps.last != step or methods.looks_first(run):
    raise InputError(
        f'the log of {workdir} alone does not give step {step}; export the '
        'weights, without --log.')
  header = dict(recorded.header)
  config = header['config']
  for data in (config['data'], *(a['data'] for a in config.get('also', ()))):
    data.update(train='', test='')  # nobody else's business
  directory.mkdir(parents=True, exist_ok=True)
  replay.write_shared(directory / workdir_lib.LOG, header, steps)
  (directory / 'README.md').write_text('\n'.join([
      card(run, step, workdir_lib.read_result(workdir)),
      'This is no weights, but the steps that made them. With the base model:',
      '', '```', f'python -m mezo_jax replay --base {run.model.name} --log '
      f'{workdir_lib.LOG} --out DIR', '```', '']))
  return directory


def _check_new(directory: Path) -> None:
  if directory.exists() and any(directory.iterdir()):
    raise ExistsError(
        f'{directory} is there already and not empty; give another directory.')


def _check_exportable(run: config_lib.Train, source: Path,
                      merged: bool) -> None:
  if run.task.traits.new_head:
    raise InputError(
        f'{source} trained a classification head, which a language model has '
        'no place for; its checkpoints hold it, under `classifier`.')
  if merged and not methods.part_of(run).added:
    raise InputError('only LoRA can be merged into the weights; leave --merged '
                     'out.')


def _chosen(run: config_lib.Train, checkpoints: checkpoint.Checkpoints) -> int:
  return (checkpoints.best_step if methods.selects(run)
          else checkpoints.latest_step)()


def _parts(run: config_lib.Train, abstract: bool = False):
  """``model, tokenizer, trained params, frozen, tx, mesh`` before training."""
  run.model.offload = False  # what is written goes through here whole
  tokenizer, mesh = build.read_tokenizer(run), sharding.make_mesh()
  model, params = build.load(run, build.read_config(run), mesh, abstract)
  model, params = build.add(run, model, params, tokenizer, mesh)
  params, frozen = trainable.split(run, params)
  tx = optimizer.make_optimizer(run, jax.eval_shape(lambda x: x, params))
  return model, tokenizer, params, frozen, tx, mesh


def _write(directory: Path, run: config_lib.Train, model, params, tokenizer,
           step: int, result: dict, merged: bool) -> Path:
  """The files of a model, or of its adapters."""
  about = dict(tokenizer=tokenizer, card=card(run, step, result))
  if methods.adapts(run) and not merged:
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
  o, metric = run.optimizer, result.get('metric', run.task.main_metric)
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
        {rows: what, value: evaluate.spell_number(key, report)}
        for what, report, key in (
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
