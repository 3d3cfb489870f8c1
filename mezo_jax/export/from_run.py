"""A run's working directory to what transformers and PEFT load."""

from collections.abc import Callable
import os
from pathlib import Path
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp

from mezo_jax import models, peft
from mezo_jax.core import fingerprint, paths, reports, sharding
from mezo_jax.core.errors import InputError, local, MissingError
from mezo_jax.directions.by_name import options_of
from mezo_jax.models.formats.save import check_new
from mezo_jax.runs import checkpoint, replay
from mezo_jax.runs import workdir as workdir_lib
from mezo_jax.tasks import evaluate
from mezo_jax.training import build, methods, optimizer, run_files, trainable
from mezo_jax.training import config as config_lib
from mezo_jax.transforms.step import make_step

_QUICKSTART = 'HuggingFaceTB/SmolLM2-135M-Instruct'  # the file is made of it


def export(workdir: str | os.PathLike[str], directory: str | os.PathLike[str],
           step: int | None = None, merged: bool = False, log: bool = False,
           base: str | os.PathLike[str] | None = None,
           say: Callable[[str], None] = print) -> Path:
  """Writes the model of a checkpoint, its tokenizer and a model card.

  Args:
    workdir: The working directory of a run of ``train.py``.
    directory: The directory to make. It must not hold anything yet.
    step: The step of the checkpoint. Defaults to the one that is best on dev
      rows, of a private run to the last.
    merged: Adds LoRA to the weights and writes a whole model.
    log: Writes the steps and the card alone, 4 bytes a step and direction, from
      which `rebuild` makes the weights.
    base: Where the base model is now, a directory or a hub id. Defaults to
      where it was during the run.
    say: Reports what the user should know of the files.

  Returns:
    The directory, which ``transformers`` and `mezo_jax.models.load` load. It
    has the class for sequence classification if the run trained a
    classification head. Of LoRA or a prefix it has the adapters alone:
    ``peft`` loads them on the base model, and so does `mezo_jax.peft.load`.

  Raises:
    FileNotFoundError: if the run, or a checkpoint of that step, is not there.
    FileExistsError: if ``directory`` is not empty.
    ValueError: if the run's config or the checkpoint cannot be read, the base
      model changed since the run began, or a parameter is not finite.
  """
  workdir, directory = local(workdir), local(directory)
  run = run_files.read_config(workdir)
  if base is not None:
    run.model.name, run.model.revision = str(base), ''
  check_new(directory)
  # The run may not have ended yet, so nothing in its directory is changed.
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints', clean=False)
  if log:
    step = _chosen(run, checkpoints) if step is None else step
    checkpoints.close()
    if step is None:
      raise MissingError(f'{workdir} has no checkpoint yet.')
    return share(workdir, directory, run, step)
  _check_merged(run, merged)
  whole = not (methods.part_of(run).pattern or run.peft.mask)
  try:
    model, tokenizer, shapes, frozen, tx, mesh = _parts(run, abstract=whole)
  except MissingError as e:
    raise MissingError(
        f'{e} If the base model was moved, --base says where it is.') from e
  _check_base(run, model, tokenizer, None if whole else (shapes, frozen),
              workdir_lib.read_inputs(workdir), workdir)
  opt_state = build.init_state(tx, shapes, mesh, abstract=True)
  if step is None:
    step = _chosen(run, checkpoints)
  if step not in checkpoints.steps():
    raise MissingError(
        f'{workdir} has no checkpoint of step {step} but of '
        f'{", ".join(map(str, checkpoints.steps())) or "none"}.')
  params, opt_state = checkpoints.load(step, (shapes, opt_state))
  params, _ = make_step(tx, None, mesh=mesh).flush(params, opt_state)
  checkpoints.close()
  return _write(directory, run, model, peft.join(params, frozen), tokenizer,
                step, workdir_lib.read_result(workdir), merged, say)


def rebuild(base: str | os.PathLike[str], log: str | os.PathLike[str],
            directory: str | os.PathLike[str], until: int | None = None,
            merged: bool = False, say: Callable[[str], None] = print,
            adapter: str | os.PathLike[str] | None = None) -> Path:
  """Replays the steps of a log, and writes the model that they give.

  Neither data nor forward passes are needed, but the weights that the run began
  with.

  Args:
    base: The base model, a directory or a hub id.
    log: The log of a run, or one that `share` wrote.
    directory: The directory to make. It must not hold anything yet.
    until: The last step to replay. Defaults to the last of the log.
    merged: Adds LoRA to the weights and writes a whole model.
    say: Reports what is found.
    adapter: The directory of the adapter that the run began with, if it began
      with one. Defaults to the one that the log names.

  Raises:
    InputError: if the log is not whole, if ``base`` is not what the run began
      with, or if more than the log is needed.
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
  _check_base(run, model, tokenizer, (params, frozen), recorded.header, log)
  steps, began = steps.until(until or steps.last), time.time()
  step = make_step(tx, None, mesh=mesh)
  params, state = step.flush(*replay.rebuild(
      step, params, build.init_state(tx, params, mesh), steps))
  jax.block_until_ready(params)
  say(f'made {steps.last} steps again in {time.time() - began:.1f} s')
  return _write(directory, run, model, peft.join(params, frozen), tokenizer,
                steps.last, {}, merged, say)


def _config_of(log: Path, header: dict) -> config_lib.Train:
  try:
    run = config_lib.from_json(header['config'])
    # Names that are not known raise.
    methods.part_of(run)
    _ = run.task.traits
    return run
  except (AttributeError, KeyError, TypeError) as e:
    raise InputError(f'the header of {log} has no config of a run of this '
                     f'version ({e}): it is not a log of train.py.') from e


def _check_base(run: config_lib.Train, model, tokenizer, params,
                recorded: dict, source: Path) -> None:
  """Raises InputError if the base model is not the one that a run began with.

  Args:
    run: The config of the run, with the base model of now.
    model: The base model of now.
    tokenizer: Its tokenizer.
    params: Two trees that together are its parameters, or None where nothing of
      its weights is used.
    recorded: What the run recorded of its inputs.
    source: Where that was recorded.
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
        f'{run.model.dtype}): say with --base where that is.')


def share(workdir: Path, directory: Path, run: config_lib.Train,
          step: int) -> Path:
  """Writes the log of a run up to ``step`` and a model card: all that there is
  to share of a fine-tuned model with anyone who has the base model. Neither has
  losses or local paths.

  Raises:
    InputError: if the log does not have all that is needed.
  """
  recorded = replay.read(workdir / workdir_lib.LOG)
  steps = recorded.steps.until(step)
  if steps.first != 1 or steps.last != step or methods.looks_first(run):
    raise InputError(
        f'the log of {workdir} alone does not give step {step}; export the '
        'weights, without --log.')
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
      'These are not the weights, but the steps that made them. With the base '
      'model:', '', '```', f'python -m mezo_jax replay --base {base} --log '
      f'{workdir_lib.LOG}{more} --out DIR', '```', '']))
  return directory


def _check_merged(run: config_lib.Train, merged: bool) -> None:
  if merged and not methods.part_of(run).added:
    raise InputError('only LoRA can be merged into the weights; leave --merged '
                     'out.')


def _chosen(run: config_lib.Train, checkpoints: checkpoint.Checkpoints
            ) -> int | None:
  return (checkpoints.best_step if methods.selects(run)
          else checkpoints.latest_step)()


def _parts(run: config_lib.Train, abstract: bool = False):
  """Returns ``model, tokenizer, trained params, frozen, tx, mesh`` as they were
  before training."""
  run.model.offload = False  # all that is written passes through here
  tokenizer, mesh = build.read_tokenizer(run), sharding.make_mesh()
  model, params = build.load(run, build.read_config(run), mesh, abstract)
  model, params = build.add(run, model, params, tokenizer, mesh)
  params, frozen = trainable.split(run, params)
  tx = optimizer.make_optimizer(run, jax.eval_shape(lambda x: x, params))
  return model, tokenizer, params, frozen, tx, mesh


def _write(directory: Path, run: config_lib.Train, model, params, tokenizer,
           step: int, result: dict, merged: bool,
           say: Callable[[str], None]) -> Path:
  """Writes the files of a model, or of its adapters."""
  about: dict[str, Any] = dict(
      tokenizer=tokenizer, card=card(run, step, result))
  _check_finite(params, step)
  if methods.adapts(run) and not merged:
    base = run.model.name
    if run.model.name == 'quickstart':
      base = _QUICKSTART
    elif _is_gguf(run):
      base = ''  # PEFT loads no GGUF files
      say('note: PEFT cannot load the GGUF file that these adapters are of; '
          f'{directory}/README.md has the lines that make a base of it.')
    elif Path(base).expanduser().exists():
      base = str(Path(base).expanduser().resolve())
      say(f'note: {directory}/adapter_config.json names the base model by its '
          f'path, {base}, for PEFT to find it. Put the id of a hub there '
          'before you share the directory.')
    about['card'] += _usage(run, model.config)
    return peft.save(directory, model, params, base=base, **about)
  params = peft.join_layers(peft.lora.merge(params), take=True)
  _check_finite(params, step)
  models.save(directory, model, params, labels=_labels(run), **about)
  generation = models.find(
      build.model_name(run), run.model.revision or None, weights=False
  ) / 'generation_config.json'
  if (generation.is_file() and jax.process_index() == 0
      and not run.task.traits.new_head):
    shutil.copy(generation, directory)
  return directory


def _labels(run: config_lib.Train) -> list[str]:
  """Returns the names of a task's classes."""
  task = run.task
  if len(task.label_names) == task.num_classes:
    return [*task.label_names]
  return [word.strip() for word in task.label_words]


def _is_gguf(run: config_lib.Train) -> bool:
  return run.model.name.endswith('.gguf')


def _usage(run: config_lib.Train, config: models.Config) -> str:
  """Returns the Markdown of a card that says how PEFT loads these adapters."""
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
  """Raises ValueError for the first parameter that is not finite."""
  for path, x in paths.named_leaves(params):
    if not all(jnp.isfinite(a).all() for a in jax.tree.leaves(x)):
      raise InputError(
          f'{path} of step {step} is not finite: such a model '
          'computes nothing. Choose an earlier --step, if one was kept.')


def card(run: config_lib.Train, step: int, result: dict[str, Any]) -> str:
  """README.md of an exported model: base model, method, result."""
  base, note = _base(run)
  hub_id = base.count('/') == 1
  o, metric = run.optimizer, result.get('metric', run.task.main_metric)
  method, z = methods.method_of(run), run.spsa
  mezo, how = not method.backprop, method.words.format(optimizer=o.name)
  kind = z.distribution
  if 'rank' in options_of(kind):
    kind = f'{kind} {z.rank}'
  rows = ' (of rows of their own)' if z.over == 'rows' else ''
  settings = {
      'data': _data(run),
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
  """Returns the base model's name without a local path, and a note on it."""
  if run.model.name == 'quickstart':
    return _QUICKSTART, ' (its weights as a Q4_1 GGUF file has them)'
  return build.plain_name(run), ''


def _data(run: config_lib.Train) -> str:
  """Returns what a card says of the data: the id of a hub, or no name."""
  train = run.data.train
  if not train:
    return run.task.hub
  local_file = Path(train).suffix or Path(train).expanduser().exists()
  return 'a local file' if local_file or train.count('/') > 1 else train


def _trained(run: config_lib.Train) -> str:
  p = run.peft
  if p.adapter:
    return f'{p.method}, from an adapter'
  what = methods.part_of(run).words.format(**{
      k: _cell(v) if isinstance(v, str) else v for k, v in vars(p).items()})
  return f'{what}: `{_cell(p.mask)}`' if p.mask else what


def _cell(text: str) -> str:
  """Text that a table's cell can hold: line breaks and bars are escaped."""
  return repr(text)[1:-1].replace('|', r'\|')
