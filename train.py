"""Fine-tunes a language model with forward passes only (MeZO), or evaluates
what that is compared with (--config.method).

  python train.py                                   the quickstart
  python train.py --config.data.train=FILE ...      data of your own
  python train.py --config=configs/NAME.py --config.FIELD=VALUE --workdir=DIR

Run the same command again to resume a run that was stopped.
"""

import functools
from pathlib import Path
import signal
import time

if __name__ == '__main__':  # Ctrl-C while importing needs no traceback
  ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import flags
import jax
import numpy as np
import optax
from tqdm import tqdm

from mezo_jax import peft
from mezo_jax.cli import launch
from mezo_jax.core import fingerprint, multihost, paths
from mezo_jax.distributed import replicas as replicas_lib
from mezo_jax.runs import guards, loggers, preemption, resume
from mezo_jax.runs import workdir as workdir_lib
from mezo_jax.tasks import evaluate
from mezo_jax.training import (
  build,
  checks,
  linear_probe,
  methods,
  mixture,
  privacy,
  scoring,
  trainable,
)
from mezo_jax.training import config as config_lib
from mezo_jax.transforms.step import make_step, pends

flags.adopt_module_key_flags(launch)  # for --help


def say(text: str) -> None:
  if text and jax.process_index() == 0:
    tqdm.write(text)


def run(config: config_lib.Train, workdir: Path,
        place: replicas_lib.Place | None = None, source: str = '') -> dict:
  """Runs a config from start, or from where it was stopped, to its result.

  Args:
    config: The config of the run.
    workdir: The working directory of the run.
    place: The place of a replica among the others; None for a run alone.
    source: The name of the config's file, to be reported.
  """
  with workdir_lib.alone(workdir):
    multihost.share(workdir)
    return run_alone(config, workdir, place, source)


def run_alone(config: config_lib.Train, workdir: Path, place,
              source: str = '') -> dict:
  # Config.
  began = time.time()
  checks.check(config)
  file = f'{source}, ' if source else ''
  say(f'config: {file}{config_lib.in_words(config)}')
  replicas_lib.check(place, config.method, ('mezo',), config.spsa.combine,
                     config.spsa.num_samples)
  multihost.agree('the version of mezo_jax or jax', fingerprint.of_code,
              'install the same on every host')
  multihost.agree_on('the config', config_lib.to_json(config),
                 'start the same command on every host')
  workdir_lib.check(config, workdir)
  method = methods.method_of(config)

  # Build.
  built = build.build(config, say=say)
  params, opt_state, mesh = built.params, built.opt_state, built.mesh
  weights = fingerprint.of_weights(
      peft.join(params, built.frozen), methods.made(config))
  name = Path(build.model_name(config)).name
  total = paths.size_of(params) + paths.size_of(built.frozen)
  say(f'model: {name}, {total:,} parameters in {config.model.dtype} on '
      f'{mesh.size} {jax.devices()[0].platform} device(s)')
  tasks = mixture.make(config, built, workdir / 'trunk', say)
  ask, metric = tasks.ask(), tasks.metric
  # The tasks have what is still read of the weights.
  built = built._replace(params=None, frozen=None, opt_state=None)
  finish = lambda final, **more: workdir_lib.write_result(
      workdir, config, built, final, **more, model=name,
      seconds=time.time() - began)
  probed = None
  if method.probe:
    params, probed = linear_probe.begin(config, built, params, ask.sizes)
  if not method.steps:
    final = method.result(ask, params, probed)
    result = finish(final)
    say(f'{config.method}: test {evaluate.spell(final)}; see '
        f'{workdir / "result.json"}')
    return result
  say(f'training {paths.size_of(params):,} of {total:,} parameters')
  for text in methods.warnings(config):
    say(f'warning: {text}.')
  plan = build.privacy_plan(config, built.splits, mesh)
  if plan:
    say(privacy.spell(plan))
  step_fn = make_step(
      built.tx, tasks.value_fn, mesh=mesh, part=place and place.part,
      on_compile=lambda *about: say(loggers.spell_program(*about)))
  say('steps compile once per length: '
      f'{", ".join(tasks.lengths(plan))} tokens')

  # Restore: the latest checkpoint of this directory, else the model itself, and
  # the log's steps after it.
  untrained = functools.partial(trainable.before_training, config)
  before = untrained(params)
  checkpoints, start, params, opt_state = resume.newest(
      workdir, config, metric, params, opt_state, say)
  if method.scores and not start:
    opt_state = optax.tree.set(opt_state, memory=scoring.score_weights(
        config, tasks, params, mesh, say))
  secret = plan and privacy.secret(
      workdir, new=not (workdir / 'config.json').exists())
  workdir_lib.check_inputs(
      workdir, config, weights, built, tasks.splits, secret)
  workdir_lib.write(workdir, config)
  log = workdir_lib.open_log(workdir, config, weights, opt_state, start, say)
  others = place and replicas_lib.join(
      place, config_lib.bound(config) | {'code': fingerprint.of_code()},
      weights, tasks.splits,
      config.spsa.num_samples, config.steps,
      config.eval_every if config.spsa.fold_every > 1 else None, log, say)
  if log.end:
    since = f'checkpoint {start}' if start else 'the beginning'
    say(f'resumed from step {log.end} of {workdir}' + (
        f'; the steps since {since} are made again from the log'
        if start < log.end else ''))
  metrics = loggers.Metrics(workdir, log.end)

  # Zero-shot: what fine-tuning is compared with.
  if config.zero_shot and not metrics.of('zero_shot'):
    on_dev, on_test = tasks.ask(untrained).both(before)
    metrics.write('dev', 0, **on_dev)
    metrics.write('zero_shot', 0, **on_test)
  zero_shot = metrics.at('zero_shot', 0) or {}
  if zero_shot:
    say(f'zero-shot: test {evaluate.spell(zero_shot)}')
  del before  # before the first step donates what it shares

  # Loop.
  batches = tasks.feed(config, mesh, log.end, plan, secret)
  progress = loggers.Progress(metrics, config.steps, start, loss=not plan)
  try:
    with preemption.watched(log) as stop_wanted:
      params, opt_state = loop(
          config, (params, opt_state), step_fn, tasks.frozen, batches, ask.dev,
          metric, checkpoints, metrics, log, progress, start, plan, stop_wanted,
          others, built.host)
    if others:
      others.close()
  finally:
    progress.close()
    log.close()
    checkpoints.wait()  # the last one is whole, however the loop ended

  # Report.
  step, params = resume.best(config, checkpoints, params, opt_state)
  _, final = ask.both(params)
  checkpoints.close()
  metrics.close()
  loggers.draw_curves(workdir / 'curves.png', metrics, metric,
                      f'{config.method}, {name}')
  result = finish(
      final | {'step': step}, steps=config.steps,
      forwards=round(config.steps * methods.forwards(
          config, len(built.splits.train.prompts))),
      trained=paths.size_of(params), compilations=len(step_fn.compiled),
      metric=metric,
      **(dict(privacy=privacy.account(plan, config.steps)) if plan else {}),
      **(dict(zero_shot=zero_shot) if zero_shot else {}))
  if plan:
    say(privacy.spell(plan, config.steps))
  say(tasks.table(zero_shot, final))
  by = 'loss' if config.select == 'loss' else metric
  why = f'best on dev by {by}' if methods.selects(config) else 'the last'
  was = f', zero-shot {evaluate.spell(zero_shot)}' if zero_shot else ''
  say(f'final (step {step}, {why}): test {evaluate.spell(final)}{was}; '
      f'{config.steps} steps; see {workdir}/result.json, curves.png')
  return result


def loop(config, state, step_fn, frozen_of, batches, evaluate_dev, metric,
         checkpoints, metrics, log, progress, start, plan, stop_wanted, others,
         host):
  """The training loop. The host reads step n-1 while the device does n; steps
  of an earlier process, which the log has, are made again without losses. A
  replica waits in each step for what the others found."""
  waiting, pending = None, pends(state[1])
  watch = guards.make(config, metrics.of('train'), log, start, say)

  def read(step, tokens, values):
    values = jax.device_get(values)
    host.check()
    if plan:  # of private rows the losses are not told
      values['loss'] = np.nan
    progress.read(step, tokens, values)
    if step > log.end:
      log.append(step, values.get('projected_grad', ()), values['loss'])
    watch(step, values)

  for step in range(start + 1, config.steps + 1):
    made = step <= log.steps.last
    if made:
      tokens = None
      *state, values = step_fn.update(*state, *log.steps.at(step))
    else:
      tokens, batch, more = next(batches)
      args = *state, batch, frozen_of(batch)
      if others:
        found = () if others.has(step) else step_fn.losses(*args, **more)
        *state, values = step_fn.update(*state, *others.swap(step, *found))
      else:
        *state, values = step_fn(*args, **more)
      del args
    if waiting:
      read(*waiting)
    waiting, stopping = (step, tokens, values), stop_wanted(step)
    evaluates = step % config.eval_every == 0 or step == config.steps
    if pending and (step < log.steps.last or step in log.steps.added):
      evaluates = step in log.steps.added  # for updates are rounded there
    if not (evaluates or stopping or step % config.checkpoint_every == 0):
      continue
    read(*waiting)
    waiting, report = None, None
    if stopping and evaluates and log.records:  # the evaluation can wait
      log.sync()
      raise preemption.told(log.end)
    if evaluates:
      if pending:
        state = step_fn.flush(*state)
        log.added(step)
      if others:
        others.mark(step, fingerprint.checksum(state[0]))
      report = metrics.at('dev', step)
      if not report:
        report = evaluate_dev(state[0])
        spent = {'epsilon': plan.spent(step)} if plan else {}
        metrics.write('dev', step, **report, **spent)
        say(f'step {step}: dev {evaluate.spell(report)}' + (
            f'; spent epsilon {spent["epsilon"]:.3f}' if plan else ''))
    log.sync()
    if step not in checkpoints.steps() and (
        evaluates or step > (checkpoints.latest_step() or 0)):
      checkpoints.save(step, tuple(state), evaluate.rank(
          report, metric, config.select) if (
              report and methods.selects(config)) else None)
    if stopping:
      raise preemption.told(max(step, log.end))
    progress.restart()
  return state


if __name__ == '__main__':
  signal.signal(signal.SIGINT, ctrl_c)
  launch.main(run, Path(__file__).parent / 'configs')
