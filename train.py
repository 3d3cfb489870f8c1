"""Fine-tunes a language model with forward passes only (MeZO), or evaluates
what that is compared with (--config.method).

  python train.py                                   the quickstart
  python train.py --config=configs/NAME.py --config.FIELD=VALUE --workdir=DIR

Run the same command again to resume a run that was stopped.
"""

import functools
from pathlib import Path
import signal
import sys
import time

if __name__ == '__main__':  # Ctrl-C while importing needs no traceback
  ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import app, flags, logging
import jax
from ml_collections import config_flags
import numpy as np
import optax
from tqdm import tqdm

from mezo_jax import (
  _paths,
  baselines,
  build,
  checks,
  evaluate,
  fingerprint,
  guards,
  hosts,
  loggers,
  methods,
  mixture,
  peft,
  preemption,
  privacy,
  resume,
  scoring,
  trainable,
)
from mezo_jax import config as config_lib
from mezo_jax import replicas as replicas_lib
from mezo_jax import workdir as workdir_lib
from mezo_jax.errors import Again, in_one_sentence
from mezo_jax.step import make_step, pends

_CONFIG = config_flags.DEFINE_config_file(
    'config', None,
    'Configuration file; override fields with --config.FIELD=VALUE.')
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Directory of the run; default: runs/<config name>.')
_DISTRIBUTED = flags.DEFINE_bool(
    'distributed', False, 'Run on several hosts: start this on every one.')
_COORDINATOR = flags.DEFINE_string(
    'coordinator', None, 'HOST:PORT of process 0, where nothing else tells it.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Likewise.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Likewise; from 0.')
_REPLICAS = flags.DEFINE_integer(
    'replicas', None, 'Machines with weights of their own that share out the '
    'directions of a step (docs/replicas.md).')
_REPLICA = flags.DEFINE_integer('replica', None, 'Which one this is, from 0.')
_EXCHANGE = flags.DEFINE_string(
    'exchange', None, 'HOST:PORT of replica 0, or a directory that all see.')
_TIMEOUT = flags.DEFINE_float(
    'exchange_timeout', 1800.0, 'Seconds to wait for another replica.')


def say(text: str) -> None:
  if text and jax.process_index() == 0:
    tqdm.write(text)


# -------------------------------------------------------------------- run ---


def run(config: config_lib.Train, workdir: Path,
        place: replicas_lib.Place | None = None) -> dict:
  """One run from start, or from where it was stopped, to its result; of a
  replica, with its place among them."""
  with workdir_lib.alone(workdir):
    hosts.share(workdir)
    return run_alone(config, workdir, place)


def run_alone(config: config_lib.Train, workdir: Path, place) -> dict:
  # Config.
  began = time.time()
  checks.check(config)
  replicas_lib.check(config, place)
  hosts.agree('the version of mezo_jax or jax', fingerprint.of_code,
              'install the same on every host')
  hosts.agree('the config', lambda: fingerprint.of(config_lib.to_json(config)),
              'start the same command on every host')
  workdir_lib.check(config, workdir)
  method = methods.method_of(config)

  # Build.
  built = build.build(config, say=say)
  params, opt_state, mesh = built.params, built.opt_state, built.mesh
  weights = fingerprint.of_weights(
      peft.join(params, built.frozen), methods.made(config))
  name = Path(build.model_name(config)).name
  total = _paths.size_of(params) + _paths.size_of(built.frozen)
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
    params, probed = baselines.probe(config, built, params, ask.sizes)
  if not method.steps:
    final = method.result(ask, params, probed)
    result = finish(final)
    say(f'{config.method}: test {evaluate.spell(final)}; see '
        f'{workdir / "result.json"}')
    return result
  say(f'training {_paths.size_of(params):,} of {total:,} parameters')
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
  workdir_lib.check_inputs(workdir, config, weights, tasks.splits, secret)
  workdir_lib.write(workdir, config)
  log = workdir_lib.open_log(workdir, config, weights, opt_state, start, say)
  others = place and replicas_lib.join(
      place, config, workdir, weights, tasks.splits, log, say)
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
          others)
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
      trained=_paths.size_of(params), compilations=len(step_fn.compiled),
      metric=metric,
      **(dict(privacy=privacy.account(plan, config.steps)) if plan else {}),
      **(dict(zero_shot=zero_shot) if zero_shot else {}))
  if plan:
    say(privacy.spell(plan, config.steps))
  say(tasks.table(zero_shot, final))
  why = 'best on dev' if methods.selects(config) else 'the last'
  was = f', zero-shot {evaluate.spell(zero_shot)}' if zero_shot else ''
  say(f'final (step {step}, {why}): test {evaluate.spell(final)}{was}; '
      f'{config.steps} steps; see {workdir}/result.json, curves.png')
  return result


def loop(config, state, step_fn, frozen_of, batches, evaluate_dev, metric,
         checkpoints, metrics, log, progress, start, plan, stop_wanted, others):
  """The training loop. The host reads step n-1 while the device does n; steps
  of an earlier process, which the log has, are made again without losses. A
  replica waits in each step for what the others found."""
  waiting, pending = None, pends(state[1])
  watch = guards.make(config, metrics.of('train'), log, start, say)

  def read(step, tokens, values):
    values = jax.device_get(values)
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


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unknown argument {argv[1]!r}.')
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # orbax is talkative
  config = _CONFIG.value
  name = Path(config_flags.get_config_filename(flags.FLAGS['config'])).stem
  workdir = Path(_WORKDIR.value or f'runs/{name}')
  told = _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
  if _DISTRIBUTED.value or told != (None, None, None):
    with in_one_sentence('train.py'):
      hosts.join(*told)
  with hosts.watch('train.py'), in_one_sentence('train.py'):
    try:
      run(config, workdir, replicas_lib.place(
          _REPLICAS.value, _REPLICA.value, _EXCHANGE.value, _TIMEOUT.value))
    except KeyboardInterrupt:
      raise Again(f'interrupted; run it again to resume from {workdir}.'
                  ) from None


if __name__ == '__main__':
  signal.signal(signal.SIGINT, ctrl_c)
  app.run(main, flags_parser=parse)
