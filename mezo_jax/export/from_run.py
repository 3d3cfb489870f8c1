"""Exports a run as files that transformers and PEFT can load."""

from collections.abc import Callable
import json
import os
from pathlib import Path
import re
import time
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax import models, peft
from mezo_jax.core import paths, reports
from mezo_jax.core.errors import InputError, local, MissingError
from mezo_jax.directions.by_name import options_of
from mezo_jax.models.formats.save import check_new
from mezo_jax.runs import checkpoint, loggers, replay
from mezo_jax.runs import workdir as workdir_lib
from mezo_jax.tasks import evaluate, predictions, score
from mezo_jax.tasks import objective as objectives
from mezo_jax.training import build, methods, run_files, saved
from mezo_jax.training import config as config_lib
from mezo_jax.transforms.step import make_step

# The model from which the quickstart's GGUF file was converted.
_QUICKSTART = 'HuggingFaceTB/SmolLM2-135M-Instruct'


def export(workdir: str | os.PathLike[str], directory: str | os.PathLike[str],
           step: int | None = None, merged: bool = False, log: bool = False,
           base: str | os.PathLike[str] | None = None,
           say: Callable[[str], None] = print) -> Path:
  """Writes the model of a checkpoint, its tokenizer and a model card.

  Args:
    workdir: Working directory of a run of ``train.py``. The run may still be in
      progress; its files are not changed.
    directory: The directory to create. If it exists, it must be empty.
    step: Step of the checkpoint. Defaults to None, for the best step on the dev
      rows, or the last step of a private run.
    merged: Whether to merge LoRA factors into the weights and write a whole
      model. Defaults to False.
    log: Whether to write only the log of steps and the card, from which
      `rebuild` reconstructs the weights. The log takes 4 bytes per step and
      direction. Defaults to False.
    base: Directory or hub id of the base model, if it was moved after the run.
      Defaults to None, for the model that the run's config names.
    say: Reports notes about the files to the user. Defaults to `print`.

  Returns:
    The directory. It contains a model that ``transformers`` and
    `mezo_jax.models.load` can load. If the run trained a classification head,
    that is a model for sequence classification. If the run trained LoRA, a
    prefix or a soft prompt, the directory contains only the adapter, which
    ``peft`` and `mezo_jax.peft.load` can load, unless ``merged`` is set.

  Raises:
    FileNotFoundError: If there is no such run, or no checkpoint of the step.
    FileExistsError: If ``directory`` is not empty.
    ValueError: If the run's config or the checkpoint cannot be read, if the
      base model has changed since the run began, or if a parameter is not
      finite.
  """
  workdir, directory = local(workdir), local(directory)
  run = run_files.read_config(workdir)
  if base is not None:
    run.model.name, run.model.revision = str(base), ''
  check_new(directory)
  if log:
    if step is None:
      checkpoints = checkpoint.Checkpoints(
          workdir / 'checkpoints', clean=False)
      step = saved.chosen(run, checkpoints)
      checkpoints.close()
    if step is None:
      raise MissingError(f'{workdir} has no checkpoint yet.')
    return share(workdir, directory, run, step)
  _check_merged(run, merged)
  found = saved.load_step(workdir, run, step)
  return _write(directory, run, found.model, found.params, found.tokenizer,
                found.step, workdir_lib.read_result(workdir), merged, say)


def rebuild(base: str | os.PathLike[str], log: str | os.PathLike[str],
            directory: str | os.PathLike[str], until: int | None = None,
            merged: bool = False, say: Callable[[str], None] = print,
            adapter: str | os.PathLike[str] | None = None) -> Path:
  """Replays the steps of a log and writes the resulting model.

  This needs the weights with which the run began, but neither data nor forward
  passes.

  Args:
    base: Directory or hub id of the base model.
    log: File of a run's log, or of one that `share` wrote.
    directory: The directory to create. If it exists, it must be empty.
    until: The last step to replay. Defaults to None, for the last step of the
      log.
    merged: Whether to merge LoRA factors into the weights and write a whole
      model. Defaults to False.
    say: Reports a line to the user. Defaults to `print`.
    adapter: Directory of the adapter with which the run began. Defaults to
      None, for the one that the log names, if any.

  Returns:
    The directory; see `export`.

  Raises:
    InputError: If the log cannot be read, does not begin with step 1 or does
      not contain ``until``, if ``base`` is not the model with which the run
      began, or if the run's method needs more than the log.
  """
  log, directory = local(log), local(directory)
  check_new(directory)
  recorded = replay.read(log)
  run = _config_of(log, recorded.header)
  run.model.name, run.model.revision = str(base), ''
  if adapter is not None:
    run.peft.adapter = str(adapter)
  _check_merged(run, merged)
  steps = recorded.steps
  if steps.first != 1:
    raise InputError(
        f'{log} begins with step {steps.first}, so the steps before it cannot '
        'be replayed. Export a checkpoint with python -m mezo_jax export.')
  if methods.looks_first(run):
    raise InputError(
        f'a log of --config.method={run.method} cannot be replayed, since it '
        'lacks the result of the linear probe or scoring pass before the first '
        'step. Export a checkpoint of the run instead.')
  if until is not None and not 1 <= until <= steps.last:
    raise InputError(f'{log} has the steps 1 to {steps.last}, but --until is '
                     f'{until}.')
  if recorded.damaged and until is None:
    say(f'warning: the last {recorded.damaged} bytes of {log} are damaged; '
        f'replaying up to step {steps.last}.')
  model, tokenizer, params, frozen, tx, mesh = saved.parts(run)
  saved.check_base(
      run, model, tokenizer, (params, frozen), recorded.header, log)
  steps, began = steps.until(until or steps.last), time.time()
  step = make_step(tx, None, mesh=mesh)
  params, state = step.apply_accumulated(*replay.rebuild(
      step, params, build.init_state(tx, params, mesh), steps))
  jax.block_until_ready(params)
  say(f'replayed {steps.last} steps in {time.time() - began:.1f} s')
  return _write(directory, run, model, peft.join(params, frozen), tokenizer,
                steps.last, {}, merged, say)


def _config_of(log: Path, header: dict) -> config_lib.Train:
  """Returns the config in the header of a log.

  Raises:
    InputError: If there is none, or none that this version can read.
  """
  try:
    run = config_lib.from_json(header['config'])
    # These look-ups raise if the config has an unknown name.
    methods.part_of(run)
    _ = run.task.traits
    return run
  except (AttributeError, KeyError, TypeError) as e:
    raise InputError(f'the header of {log} has no config that this version can '
                     f'read ({e}); pass the log of a run of train.py.') from e


def share(workdir: Path, directory: Path, run: config_lib.Train,
          step: int) -> Path:
  """Writes the log of a run, up to a step, and a model card.

  Anyone with the base model can rebuild the fine-tuned weights from them. The
  log contains no losses, and neither file contains local paths.

  Args:
    workdir: Working directory of the run.
    directory: The directory to write to.
    run: Config of the run.
    step: The last step.

  Returns:
    The directory.

  Raises:
    InputError: If the log alone is not enough to rebuild the weights.
  """
  recorded = replay.read(workdir / workdir_lib.LOG)
  steps = recorded.steps.until(step)
  if steps.first != 1 or steps.last != step or methods.looks_first(run):
    raise InputError(
        f'the log of {workdir} is not enough to rebuild step {step}; export '
        'the weights, without --log.')
  header = dict(recorded.header)
  config = header['config']
  for data in (config['data'], *(a['data'] for a in config['also'])):
    data.update(train='', test='')
  base = build.plain_name(run)
  config['model'].update(name=base, revision='')
  adapter = config['peft']['adapter']
  if adapter:
    config['peft']['adapter'] = local(adapter).resolve().name
  directory.mkdir(parents=True, exist_ok=True)
  replay.write_shared(directory / workdir_lib.LOG, header, steps)
  more = ' --adapter ADAPTER' if adapter else ''
  (directory / 'README.md').write_text('\n'.join([
      card(run, step, workdir_lib.read_result(workdir)),
      'This directory contains a log of the training steps instead of weights. '
      'To rebuild the weights from the base model:', '', '```',
      f'python -m mezo_jax replay --base {base} --log '
      f'{workdir_lib.LOG}{more} --out DIR', '```', '']))
  return directory


def _check_merged(run: config_lib.Train, merged: bool) -> None:
  """Raises InputError if ``merged`` is set for a run without LoRA."""
  if merged and not methods.part_of(run).added:
    raise InputError('--merged: only LoRA can be merged into the weights; omit '
                     'the flag.')


def _write(directory: Path, run: config_lib.Train, model, params, tokenizer,
           step: int, result: dict, merged: bool,
           say: Callable[[str], None]) -> Path:
  """Writes the files of a model, or of its adapters.

  Args:
    directory: The directory to create.
    run: Config of the run.
    model: The model.
    params: All parameters, trained and frozen ones.
    tokenizer: The tokenizer.
    step: The step after which the model has these parameters, for the card.
    result: Result of the run, for the card; {} if it has none.
    merged: Whether to merge LoRA factors into the weights.
    say: Reports a line to the user.

  Returns:
    The directory.
  """
  adapter = methods.adapts(run) and not merged
  try:
    base_dir = models.find(
        build.model_name(run), run.model.revision or None, weights=False)
  except MissingError:  # all weights are in the checkpoint
    base_dir = Path(os.devnull)
  about: dict[str, Any] = dict(
      tokenizer=tokenizer, card=card(run, step, result), files={
          saved.FILE: _json(saved.describe(run, adapter)),
          **_licence(base_dir)})
  _check_finite(params, step)
  if adapter:
    base = run.model.name
    if run.model.name == 'quickstart':
      base = _QUICKSTART
    elif _is_gguf(run):
      base = ''  # PEFT cannot load GGUF files
      say('note: PEFT cannot load the GGUF file of the base model; '
          f'{directory}/README.md shows how to convert it.')
    elif Path(base).expanduser().exists():
      base = str(Path(base).expanduser().resolve())
      say(f'note: {directory}/adapter_config.json contains the path of the '
          f'base model, {base}. Replace it by a hub id before you share the '
          'directory.')
    about['card'] += _usage(run, model.config)
    return peft.save(directory, model, params, base=base, **about)
  params = peft.join_layers(peft.lora.merge(params), take=True)
  _check_finite(params, step)
  names = []
  if run.task.traits.new_head:
    names = predictions.class_names(run.task)
  elif model.config.causal and model.config.head:
    about['files']['generation_config.json'] = _json(
        _generation(run, base_dir, tokenizer))
  return models.save(directory, model, params, labels=names, **about)


def _json(value: dict[str, Any]) -> bytes:
  """Returns the contents of a JSON file."""
  return (json.dumps(value, indent=2, ensure_ascii=False) + '\n').encode()


def _licence(base: Path) -> dict[str, bytes]:
  """Returns the files of a base model's directory that state its licence."""
  if not base.is_dir():
    return {}
  return {file.name: file.read_bytes() for file in sorted(base.iterdir())
          if file.is_file() and re.match('(?i)licen[cs]e|notice', file.name)}


def _generation(run: config_lib.Train, base: Path, tokenizer
                ) -> dict[str, Any]:
  """Returns the contents of generation_config.json.

  These are those of the base model, with all tokens that end an answer: its
  own, the tokenizer's end token and, if the task generates answers, the end of
  a turn of the chat template.
  """
  file = base / 'generation_config.json'
  out = loggers.read_json(file) if file.is_file() else {}
  # With this field transformers would create the config anew.
  out.pop('_from_model_config', None)
  ends = out.get('eos_token_id')
  ends = ends if isinstance(ends, list) else [ends]
  ends = [*ends, tokenizer.eos_token_id]
  if run.task.traits.generates and tokenizer.chat_template:
    ends += sorted(score.ends_of_turn(tokenizer))
  ends = [*dict.fromkeys(end for end in ends if end is not None)]
  if ends:
    out['eos_token_id'] = ends[0] if len(ends) == 1 else ends
  pad = out.get('pad_token_id')
  for other in (tokenizer.pad_token_id, *ends):
    pad = other if pad is None else pad
  return out | ({} if pad is None else {'pad_token_id': pad})


def _is_gguf(run: config_lib.Train) -> bool:
  """Returns whether the base model is a GGUF file."""
  return run.model.name.endswith('.gguf')


def _usage(run: config_lib.Train, config: models.Config) -> str:
  """Returns Markdown for a card that shows how to load the adapters with PEFT.

  Args:
    run: Config of the run.
    config: Config of the model.
  """
  name, classes = build.plain_name(run), run.task.traits.new_head
  if classes:
    auto = 'AutoModelForSequenceClassification'
  elif not config.head:
    auto = 'AutoModel'
  else:
    auto = 'AutoModelForCausalLM' if config.causal else 'AutoModelForMaskedLM'
  base = repr(name) if run.model.name != 'quickstart' else repr(_QUICKSTART)
  lines = ['To load them:', '', '```python', 'import peft, transformers']
  if _is_gguf(run):
    lines += ['from mezo_jax import models',
              f'models.save(\'base\', *models.load({name!r}),',
              f'            tokenizer=models.load_tokenizer({name!r}))']
    base = "'base'"
  more = f', num_labels={run.task.num_classes}' if classes else ''
  lines += [f'base = transformers.{auto}.from_pretrained({base}{more})']
  if classes and config.causal:
    lines += ["tokenizer = transformers.AutoTokenizer.from_pretrained('DIR')",
              'base.config.pad_token_id = tokenizer.pad_token_id']
  lines += ["model = peft.PeftModel.from_pretrained(base, 'DIR')", '```', '']
  return '\n'.join(lines)


def _check_finite(params: dict, step: int) -> None:
  """Raises InputError for the first parameter that is not finite."""
  for path, x in paths.named_leaves(params):
    if not all(jnp.isfinite(a).all() for a in jax.tree.leaves(x)):
      raise InputError(
          f'{path} of step {step} is not finite, so the model is unusable. '
          'Choose an earlier --step, if its checkpoint was kept.')


def card(run: config_lib.Train, step: int, result: dict[str, Any]) -> str:
  """Returns the README.md of an exported model: base model, settings, result.

  Args:
    run: Config of the run.
    step: The exported step.
    result: Result of the run; see `mezo_jax.runs.workdir.read_result`. It is
      reported if it belongs to this step.
  """
  base, note = _base(run)
  hub_id = base.count('/') == 1
  o, metric = run.optimizer, result.get('metric', run.task.main_metric)
  method, z = methods.method_of(run), run.spsa
  mezo, how = not method.backprop, method.words.format(optimizer=o.name)
  kind = z.distribution
  if 'rank' in options_of(kind):
    kind = f'{kind} {z.rank}'
  rows = ' (each on its own rows)' if z.over == 'rows' else ''
  settings = {
      'data': _data(run),
      **({'prompt': f'`{reports.cell(run.task.template)}`'} if (
          run.task.template) else {'task': run.task.kind}),
      **({'label words': ', '.join(
          f'`{reports.cell(w)}`' for w in run.task.label_words)} if (
              run.task.label_words) else {}),
      'objective': objectives.of(run.task, run.objective),
      'learning rate': f'{config_lib.learning_rate(run):g}, {o.schedule}',
      **{f'learning rate, eps of `{reports.cell(g)}`': f'{rate:g}, {eps:g}'
         for g, rate, eps in o.groups},
      **({'eps': f'{z.eps:g}', 'directions per step':
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
      reports.markdown_table([{'setting': name, 'value': value}
                              for name, value in settings.items()]), '']
  final, zero = result.get('final'), result.get('zero_shot', {})
  if final and final.get('step') == step:
    rows, value = f'{final["count"]} test rows', metric.replace('_', ' ')
    lines += [reports.markdown_table([
        {rows: what, value: evaluate.spell_number(key, report)}
        for what, report, key in (
            ('zero-shot', zero, metric),
            ('zero-shot, calibrated', zero, f'calibrated_{metric}'),
            ('this model', final, metric)) if key in report]), '']
  else:
    lines += ['No result on test rows was recorded for this step.', '']
  return '\n'.join(lines)


def _base(run: config_lib.Train) -> tuple[str, str]:
  """Returns the base model's name without a local path, and a note about it."""
  if run.model.name == 'quickstart':
    return _QUICKSTART, ' (with the weights of a Q4_1 GGUF file)'
  return build.plain_name(run), ''


def _data(run: config_lib.Train) -> str:
  """Returns the name of the training data for a card, without local paths."""
  train = run.data.train
  if not train:
    return run.task.hub
  local_file = Path(train).suffix or Path(train).expanduser().exists()
  return 'a local file' if local_file or train.count('/') > 1 else train


def _trained(run: config_lib.Train) -> str:
  """Returns a description of the trained parameters for a card."""
  p = run.peft
  if p.adapter:
    return f'{p.method}, from an adapter'
  what = methods.part_of(run).words.format(**{
      k: reports.cell(v) if isinstance(v, str) else v
      for k, v in vars(p).items()})
  return f'{what}: `{reports.cell(p.mask)}`' if p.mask else what
