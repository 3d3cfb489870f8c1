"""Fine-tunes a language model with forward passes only (MeZO), or evaluates
what that is compared with (--config.method).

  python train.py                                   the quickstart
  python train.py --config=configs/NAME.py --config.FIELD=VALUE --workdir=DIR

Run the same command again to resume a run that was stopped.
"""

import functools
import json
from pathlib import Path
import sys
import time

from absl import app, flags, logging
import jax
from ml_collections import config_flags
import numpy as np
import optax
from tqdm import tqdm

from mezo_jax import (
  baselines,
  checkpoint,
  evaluate,
  loggers,
  models,
  peft,
  sharding,
  trainable,
)
from mezo_jax import config as config_lib
from mezo_jax import data as data_lib
from mezo_jax.tasks import encode, head, score

_CONFIG = config_flags.DEFINE_config_file(
    'config', None,
    'Configuration file; override fields with --config.FIELD=VALUE.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the run; default: runs/<config name>.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'Run on several hosts: start this on every one.')

_TRY = ('Try a lower --config.optimizer.learning_rate, or '
        '--config.model.dtype=float32.')  # where numbers are not finite


class Stopped(RuntimeError):
  """The run cannot go on; nothing that was saved is lost."""


def say(text: str) -> None:
  if jax.process_index() == 0:
    tqdm.write(text)


# ------------------------------------------------------------------- step ---


def make_step(tx, loss_fn, state, frozen, mesh):
  """The training step, two forwards and one update in place, and its compiled
  forms by length: one a bucket, made when first needed, never again. What is
  not trained is never donated."""
  placed = jax.tree.map(lambda x: x.sharding, state)
  value_fn = peft.on_trainable(loss_fn)
  @functools.partial(jax.jit, donate_argnums=(0, 1),
                     out_shardings=(*placed, sharding.replicated(mesh)))
  def step(params, opt_state, frozen, batch):
    updates, opt_state = tx.update(
        None, opt_state, params, value_fn=value_fn, frozen=frozen, batch=batch)
    first = opt_state[0]
    name = next(name for name in ('projected_grad', 'grad_norm')
                if hasattr(first, name))
    metrics = {
        'loss': first.value,
        name: getattr(first, name),
        'skipped': first.total_notfinite,
        'skipped_in_a_row': first.notfinite_count,
    }
    return optax.apply_updates(params, updates), opt_state, metrics

  compiled = {}
  def step_fn(params, opt_state, batch):
    length = batch['input_ids'].shape[-1]
    if length not in compiled:
      began = time.time()
      with jax.set_mesh(mesh):
        compiled[length] = step.lower(
            params, opt_state, frozen, batch).compile()
      extra = compiled[length].memory_analysis().temp_size_in_bytes
      say(f'compiled the step for {length} tokens in '
          f'{time.time() - began:.0f} s; it needs {extra / 2**20:.0f} MiB a '
          'device beside weights and batch')
    return compiled[length](params, opt_state, frozen, batch)

  return step_fn, compiled


# -------------------------------------------------------------------- run ---


def run(config: config_lib.Train, workdir: Path) -> dict:
  """One run from start, or from where it was stopped, to its result."""
  began = time.time()
  config_lib.check(config)
  result_file, config_file = workdir / 'result.json', workdir / 'config.json'
  if config_file.exists():
    config_lib.check_same_run(config, json.loads(config_file.read_text()))
  check_steps(config, workdir)

  # Mesh.
  mesh = sharding.make_mesh(
      config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
  if config.data.batch_size % sharding.row_groups(mesh):
    raise ValueError(
        f'data.batch_size {config.data.batch_size} does not divide over '
        f'{sharding.row_groups(mesh)} groups of devices; make it a multiple of '
        'that.')

  # Model.
  name = config_lib.model_name(config)
  revision = config.model.revision or None
  model_config = models.load_config(name, revision)
  tokenizer = models.load_tokenizer(
      name, revision, config.model.bos_token or None)

  # Data: before the weights, so that a wrong column costs no waiting.
  task = config.task
  splits = data_lib.read_splits(config, tokenizer, model_config, say)
  train, buckets = splits.train, splits.buckets['train']

  # Weights, and parameters that the task or the method adds.
  model, plain = models.load(
      name, mesh, config.model.dtype, revision=revision)
  model = model.clone(remat=config.model.remat)
  if task.kind == 'head':
    plain['classifier'] = sharding.place(
        head.init(jax.random.key(config.seed), model.config, task.num_classes),
        sharding.replicated(mesh))
  model, params = trainable.add(config, model, plain, tokenizer, mesh)
  say(f'model: {Path(name).name}, {size_of(params):,} parameters in '
      f'{config.model.dtype} on {mesh.size} {jax.devices()[0].platform} '
      'device(s)')
  ask = evaluate.make_evaluators(config, model, splits, tokenizer, mesh)

  def finish(final, **more) -> dict:
    """Writes config.json and result.json."""
    if not evaluate.is_finite(final):
      raise Stopped(
          f'{config.method} has no result: test {evaluate.spell(final)}. '
          + (_TRY if config_lib.trains(config) else
             'Check the weights, or try --config.model.dtype=float32.'))
    result = {
        'method': config.method, 'metric': task.main_metric, 'final': final,
        'steps': 0, 'forwards': 0, **more, 'train_rows': len(train.prompts),
        'truncated': splits.test.truncated, 'seconds': time.time() - began,
        'peak_memory': evaluate.peak_memory(), 'model': Path(name).name,
        'devices': f'{mesh.size} x {jax.devices()[0].device_kind}'}
    loggers.write_json(config_file, config_lib.to_json(config))
    loggers.write_json(result_file, result)
    return result

  # Linear probe: a baseline, or where MeZO starts.
  if config.method in ('linear_probe', 'lp_mezo'):
    probe, scores = baselines.linear_probe(
        model, params, splits, ask.sizes, mesh)
    final = evaluate.report(scores, splits.test.golds, metric=task.main_metric)
    if config.method == 'lp_mezo':
      params = baselines.write_probe(params, probe, train.token_ids)

  # Baselines that make no step.
  if not config_lib.trains(config):
    if config.method == 'icl':
      final = ask.test(params)
    elif config.method == 'zero_shot':
      _, final = ask.both(params)
    result = finish(final)
    say(f'{config.method}: test {evaluate.spell(final)}; see {result_file}')
    return result

  # Optimizer, of what is trained alone.
  before = trainable.before_training(config, plain, params)
  del plain  # its layers may have been laid out anew
  params, frozen = trainable.split(config, params)
  whole = lambda: peft.join(params, frozen)
  say(f'training {size_of(params):,} of {size_of(whole()):,} parameters')
  for text in trainable.warnings(config):
    say(f'warning: {text}.')
  tx = config_lib.make_optimizer(config)
  loss_fn = score.make_loss_fn(
      model, train, task, config_lib.objective(config), tokenizer)
  opt_state = jax.tree.map(
      lambda x: x if isinstance(x.sharding, jax.NamedSharding) else
      sharding.place(x, sharding.replicated(mesh)), tx.init(params))
  step_fn, compiled = make_step(
      tx, loss_fn, (params, opt_state), frozen, mesh)
  in_use = data_lib.used_buckets(
      train.lengths, buckets, config.data.batch_size)
  say(f'steps compile once per length: {", ".join(map(str, in_use))} tokens')

  # Restore: the latest checkpoint of this directory, else the model itself.
  workdir.mkdir(parents=True, exist_ok=True)
  checkpoints = checkpoint.Checkpoints(workdir / 'checkpoints')
  start = checkpoints.latest_step() or 0
  if start:
    params, opt_state = checkpoints.load(start, (params, opt_state))
    say(f'resumed from step {start} of {workdir}')
  loggers.write_json(config_file, config_lib.to_json(config))
  metrics = loggers.Metrics(workdir, start)

  # Zero-shot: what fine-tuning is compared with.
  if config.zero_shot and not metrics.of('zero_shot'):
    on_dev, on_test = ask.both(before)
    metrics.write('dev', 0, **on_dev)
    metrics.write('zero_shot', 0, **on_test)
  zero_shot = [{k: v for k, v in r.items() if k not in ('kind', 'step')}
               for r in metrics.of('zero_shot')]
  for found in zero_shot:
    say(f'zero-shot: test {evaluate.spell(found)}')

  del before  # before the first step donates what it shares

  # Loop.
  batches = feed(config, train, buckets, mesh, start)
  try:
    params, opt_state = loop(config, (params, opt_state), step_fn, batches,
                             lambda p: ask.dev(peft.join(p, frozen)),
                             checkpoints, metrics, start)
  finally:
    checkpoints.wait()  # the last one is whole, however the loop ended

  # Report.
  if opt_state[0].total_notfinite >= config.steps:
    raise Stopped(
        f'each of the {config.steps} steps gave a loss that is not finite and '
        f'was skipped: nothing was trained. {_TRY}')
  best = find_best(checkpoints)
  if best != config.steps:
    params, _ = checkpoints.load(best, (params, opt_state))
  _, final = ask.both(whole())
  checkpoints.close()
  metrics.close()
  if jax.process_index() == 0:
    loggers.draw_curves(workdir / 'curves.png', metrics, task.main_metric,
                        f'{config.method}, {Path(name).name}')
  result = finish(
      final | {'step': best}, **({'zero_shot': zero_shot[0]} if zero_shot
                                 else {}), steps=config.steps,
      forwards=config.steps * config_lib.forwards(config),
      trained=size_of(params),
      compilations=len(compiled))
  was = ''.join(f', zero-shot {evaluate.spell(found)}' for found in zero_shot)
  say(f'final (step {best}, best on dev): test {evaluate.spell(final)}{was}; '
      f'{config.steps} steps; see {workdir}/result.json, curves.png')
  return result


def check_steps(config: config_lib.Train, workdir: Path) -> None:
  """Raises ValueError if the run has more steps behind it than it should make,
  or has as many and the last was not evaluated."""
  held = checkpoint.latest_step(workdir / 'checkpoints')
  evaluated = not held or any(
      r['kind'] == 'dev' and r['step'] == held
      for r in loggers.read(workdir / 'metrics.jsonl'))
  least = held if evaluated else held + 1
  if config.steps < least:
    raise ValueError(
        f'{workdir} holds step {held}{"" if evaluated else ", not evaluated,"} '
        f'and --config.steps is {config.steps}; give {least} or more, or '
        'another --workdir.')


def find_best(checkpoints: checkpoint.Checkpoints) -> int:
  """The step that is best on dev rows; raises Stopped where none is."""
  try:
    return checkpoints.best_step()
  except FileNotFoundError as e:
    raise Stopped(f'{e} {_TRY}') from e


def size_of(params) -> int:
  return sum(x.size for x in jax.tree.leaves(params))


def feed(config, train, buckets, mesh, start):
  """Yields (tokens, batch on the mesh) from batch number ``start`` on."""
  rows = config.data.batch_size
  for length, index in data_lib.batches(
      train.lengths, buckets, rows, config.seed, start):
    batch = encode.batch_of(train, index, length, rows)
    yield int(batch['attention_mask'].sum()), sharding.put_batch(batch, mesh)


def loop(config, state, step_fn, batches, evaluate_dev, checkpoints, metrics,
         start):
  """The training loop. The host reads step n-1 while the device does n."""
  bar = tqdm(total=config.steps, initial=start, unit='step', dynamic_ncols=True,
             disable=jax.process_index() > 0)
  clock, waiting, stop_wanted = time.time(), None, checkpoint.preemption()

  def read(step, tokens, values):
    nonlocal clock
    values = jax.device_get(values)
    seconds, clock = time.time() - clock, time.time()
    metrics.write(
        'train', step, **{k: v for k, v in values.items()
                          if not k.startswith('skipped')},
        tokens=tokens, seconds=seconds, skipped=int(values['skipped']))
    size = values.get('projected_grad', values.get('grad_norm'))
    bar.set_postfix_str(
        f'loss {values["loss"]:.3f}, |g| {np.abs(size).mean():.1f}, '
        f'{tokens / max(seconds, 1e-9):.0f} tokens/s', refresh=False)
    bar.update()
    if values['skipped_in_a_row'] >= config.max_skipped:
      raise Stopped(
          f'the last {config.max_skipped} steps, up to {step}, gave a loss '
          'that is not finite and were skipped; the parameters are as before '
          f'them. {_TRY}')

  for step in range(start + 1, config.steps + 1):
    tokens, batch = next(batches)
    *state, values = step_fn(*state, batch)
    if waiting:
      read(*waiting)
    waiting, stopping = (step, tokens, values), stop_wanted(step)
    evaluates = step % config.eval_every == 0 or step == config.steps
    if not (evaluates or stopping or step % config.checkpoint_every == 0):
      continue
    read(*waiting)
    waiting, report = None, None
    if evaluates:
      report = evaluate_dev(state[0])
      metrics.write('dev', step, **report)
      say(f'step {step}: dev {evaluate.spell(report)}')
    checkpoints.save(step, tuple(state), report and evaluate.rank(
        report, config.task.main_metric, config.select))
    if stopping and step < config.steps:
      raise Stopped(f'told to stop; step {step} is saved. Run the same command '
                    'again to resume.')
    clock = time.time()
  bar.close()
  return state


# ------------------------------------------------------------------- main ---


def parse(argv):
  """absl's parser; a config that does not load or fit gets one sentence."""
  chosen = [a for a in argv if a.startswith('--config=')] or [
      f'--config={Path(__file__).parent / "configs" / "quickstart.py"}']
  argv = [argv[0], *chosen, *(a for a in argv[1:] if a not in chosen)]
  sys.argv = argv  # config_flags looks there for --config.FIELD
  try:
    rest = app.parse_flags_with_usage(argv)
    _CONFIG.value.steps  # a file that did not load raises here
    return rest
  except (KeyError, OSError, TypeError) as e:
    what = ' '.join(str(e.args[-1]).split())
    sys.exit(f'train.py: {what}. The fields of a config and their types are in '
             'mezo_jax/config.py.')


def join_processes() -> None:
  """Joins the other hosts' processes; exits where none are to be found."""
  try:
    jax.distributed.initialize()
  except (RuntimeError, ValueError) as e:
    sys.exit(f'train.py: --distributed finds no other processes: {e} Start it '
             'on each host with srun or mpirun, or leave it out on one host.')


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}.')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax is talkative
  config = _CONFIG.value
  if _DISTRIBUTED.value:
    join_processes()
  name = Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem
  workdir = Path(_WORKDIR.value or f'runs/{name}')
  try:
    run(config, workdir)
  except (Stopped, ValueError, FileNotFoundError, RuntimeError) as e:
    logging.debug('stopped by', exc_info=True)
    sys.exit(f'train.py: {e}')
  except KeyboardInterrupt:
    sys.exit(f'train.py: interrupted; run it again to resume from {workdir}.')


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
