"""Executes one run, from its config to its result.

`run` holds the lock of the working directory; `_run` does the work. It reads
from top to bottom in chapters: check, build, baselines, step, inputs,
zero-shot, restore, train, report.
"""

import contextlib
import functools
from pathlib import Path
import time
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import mezo_jax
from mezo_jax import peft
from mezo_jax.core import fingerprint, paths
from mezo_jax.core.errors import InputError, local
from mezo_jax.distributed import agreement
from mezo_jax.distributed import replicas as replicas_lib
from mezo_jax.runs import guards, loggers, preemption, resume, trackers
from mezo_jax.runs import workdir as workdir_lib
from mezo_jax.tasks import evaluate
from mezo_jax.training import (
  answers,
  build,
  checks,
  learning_rates,
  linear_probe,
  methods,
  mixture,
  optimizer,
  privacy,
  rewarded,
  run_files,
  scoring_pass,
  trainable,
)
from mezo_jax.training import config as config_lib
from mezo_jax.training import loop as loop_lib
from mezo_jax.transforms.step import field, make_step, pends


def run(config: config_lib.Train, workdir: Path,
        place: replicas_lib.Place | None = None, source: str = '',
        profile: range = range(0)) -> dict[str, Any]:
  """Trains a model, or evaluates a baseline, as a config describes.

  If the run was stopped, the same call resumes it. The parameters are then
  bitwise equal to those of a run that was not stopped. SIGTERM, SIGHUP and
  Ctrl-C stop a run.

  Args:
    config: The config of the run.
    workdir: Directory of the run's log, metrics, checkpoints and result. It is
      created if it does not exist.
    place: The place of this process among several replicas (docs/log.md).
      Defaults to None, for a run without replicas.
    source: Name of the config file, for the log. Defaults to '', for none.
    profile: Numbers of the steps of which a trace is written to ``profile`` in
      the working directory. Defaults to none.

  Returns:
    The result, which is also written to ``result.json``: a dict of JSON values,
    in which 'final' holds the metrics of the test rows.

  Raises:
    InputError: if the config, its files, the devices and the working directory
      do not fit each other.
    Stopped: if the run cannot finish, for example because its losses are not
      finite.
    Again: if a signal stopped the run. Calling `run` again resumes it.
  """
  workdir = local(workdir)
  with workdir_lib.alone(workdir):
    agreement.check_shared(workdir)
    checks.check_config(config)
    with contextlib.closing(trackers.Mirror(config.loggers, _say)) as mirror:
      return _run(config, workdir, place, source, profile, mirror)


def _run(config: config_lib.Train, workdir: Path, place, source: str,
         profile: range, mirror: trackers.Mirror) -> dict:
  """Executes a run in a working directory that this process has locked."""
  # Check: reject configs and directories that cannot work before anything is
  # loaded.
  began = time.time()
  if profile and not 1 <= profile[0] <= profile[-1] <= config.steps:
    raise InputError(
        f'--profile={profile[0]}:{profile[-1]} must be steps of the run, from '
        f'1 to {config.steps} (--config.steps).')
  file = f'{source}, ' if source else ''
  _say(f'config: {file}{config_lib.in_words(config)}')
  replicas_lib.check_replicas(
      place, config.method, methods.names_where(lambda m: m.replicated),
      config.spsa.combine, config.spsa.num_samples)
  versions = {'mezo_jax': mezo_jax.__version__, 'jax': jax.__version__}
  # All processes of a run must execute the same programs, so their versions and
  # configs are compared first.
  agreement.agree_on('the versions', versions,
                     'install the same versions on every host')
  agreement.agree_on('the config', config_lib.to_json(config),
                     'start the same command on every host')
  if methods.method_of(config).steps:
    if place and config_lib.is_auto(config):
      raise InputError("--config.optimizer.learning_rate 'auto' does not "
                       'support replicas; set it to a number.')
    config = learning_rates.resolved(config, workdir, _say)
  run_files.check_workdir(config, workdir)
  method = methods.method_of(config)

  # Build: data, model, parameters and optimizer.
  built = build.build(config, say=_say)
  mesh, splits = built.mesh, built.splits
  state = resume.TrainState(built.params, built.opt_state)
  weights = fingerprint.of_weights(
      peft.join(built.params, built.frozen), methods.made(config))
  model_name = Path(build.model_name(config)).name
  total = paths.size_of(built.params) + paths.size_of(built.frozen)
  _say(f'model: {model_name}, {total:,} parameters in {config.model.dtype} on '
       f'{mesh.size} {jax.devices()[0].platform} device(s)')
  tasks = mixture.make(config, built, workdir / 'hidden_states', _say)
  ask, metric = tasks.ask(), tasks.metric
  # From here on only `state` refers to the trained parameters, which steps
  # donate, and only `tasks` to the frozen ones. All other arrays are freed.
  built = built.without_weights()
  finish = functools.partial(run_files.write_result, config, workdir, tasks,
                             mesh, model=model_name)

  # Baselines: a method without training steps is finished here.
  probed = None
  if method.probe:
    probe, *found = linear_probe.linear_probe(
        built.model, state.params, splits, ask.sizes, mesh, config.task,
        config_lib.objective(config))
    probed = None, found[0], found[1:]
    if method.steps:  # lp_mezo: training starts from the probe in the head
      assert splits.train.token_ids is not None  # label words were checked
      state = state._replace(params=linear_probe.write_probe(
          state.params, probe, splits.train.token_ids))
  if not method.steps:
    assert method.result is not None
    on_dev, final, said = method.result(ask, state.params, probed)
    result = finish(on_dev, final, said, seconds=time.time() - began)
    _say(f'{config.method}: test {evaluate.spell(final)}; see '
         f'{workdir / "result.json"}')
    return result

  # Step: create the training step. It is compiled at the first batch of each
  # length.
  trained = paths.size_of(state.params)
  _say(f'training {trained:,} of {total:,} parameters')
  for text in methods.warnings(config):
    _say(f'warning: {text}.')
  plan = build.privacy_plan(config, splits, mesh)
  if plan:
    _say(privacy.spell(plan))
  assert built.tx is not None and built.host is not None  # the method trains
  rewards = None
  if config_lib.is_rewarded(config):
    if place:
      raise InputError("objective 'reward' does not support replicas; use a "
                       'mesh with an axis direction instead, '
                       '--config.mesh.direction.')
    rewards = rewarded.make(
        config, built, tasks, state.params, workdir, _say)
  clock = loggers.Clock()

  def on_compile(batch, compiled, seconds):
    """Reports a program, and leaves its seconds out of those of steps."""
    clock.skip(seconds)
    _say(loggers.spell_program(batch, compiled, seconds))

  step_fn = make_step(
      built.tx, tasks.value_fn, mesh=mesh, part=place.part if place else None,
      on_compile=on_compile, **(rewards.step_options if rewards else {}))
  _say('the training step is compiled once per sequence length: '
       f'{", ".join(tasks.lengths(plan))} tokens')

  # Inputs: a resumed run must start from the same weights, tokenizer and rows
  # as before. A new private run creates its secret here, from which its samples
  # of rows and its noise are derived.
  secret = None
  if plan:
    secret = privacy.secret(
        workdir, new=not (workdir / 'config.json').exists())
  run_files.check_inputs(config, workdir, built.model.config, built.tokenizer,
                       weights, tasks.splits, secret)
  run_files.write_config(config, workdir)

  # Zero-shot: evaluate the untrained model, for comparison with the result.
  # This must happen before a checkpoint replaces the weights.
  zero_shot, earlier = None, loggers.read(workdir / 'metrics.jsonl')
  if config.zero_shot and not any(r['kind'] == 'zero_shot' for r in earlier):
    untrained = functools.partial(trainable.before_training, config)
    zero_shot = tasks.ask(untrained).both(state.params)

  # Restore: load the newest checkpoint. The steps after it are replayed from
  # the log.
  checkpoints, start, state = resume.newest(
      workdir / 'checkpoints', config.keep_checkpoints, state, _say)
  if method.scores and not start:
    state = state._replace(opt_state=optax.tree.set(
        state.opt_state, memory=scoring_pass.score_weights(
            config, tasks, state.params, mesh, _say)))
  projected_grad = field(state.opt_state, 'projected_grad')
  log = workdir_lib.open_log(
      workdir, run_files.log_header(config, workdir, weights),
      0 if projected_grad is None else projected_grad.size, start, _say)
  others = None
  if place:
    # If updates accumulate, all replicas must apply them at the same steps.
    applied_every = config.eval_every if config.spsa.apply_every > 1 else None
    others = replicas_lib.join(
        place, config_lib.bound(config) | {'versions': versions}, weights,
        tasks.splits, config.spsa.num_samples, config.steps, applied_every, log,
        _say)
  if log.end:
    since = f'checkpoint {start}' if start else 'the beginning'
    again = (f'; replaying the steps since {since} from the log'
             if start < log.end else '')
    _say(f'resumed from step {log.end} of {workdir}{again}')
  metrics = loggers.Metrics(workdir, log.end, mirror.log)
  mirror.start(None if plan else config_lib.to_json(config), workdir, log.end,
               metrics.records, len(earlier))
  # The answers to private rows, or to rows next to them, are not written.
  write_answers = (lambda step: []) if plan else functools.partial(
      answers.write, config, tasks, workdir / 'answers.jsonl')
  if zero_shot:
    on_dev, on_test, _ = zero_shot
    lines = write_answers(0)
    metrics.write('dev', 0, **on_dev)
    metrics.write('zero_shot', 0, **on_test)
    for line in (f'step 0: dev {evaluate.spell(on_dev)}', *lines):
      _say(line)
  zero_shot = metrics.at('zero_shot', 0) or {}
  if zero_shot:
    _say(f'zero-shot: test {evaluate.spell(zero_shot)}')

  # Train: dispatch steps, record them, evaluate and save.
  selects = methods.selects(config)
  accumulates = pends(state.opt_state)
  evaluates = loop_lib.evaluated_steps(
      config.steps, config.eval_every, log, accumulates)
  batches = tasks.feed(mesh, log.end, config.steps, plan=plan, secret=secret)
  if others:
    made = loop_lib.from_replicas(step_fn, batches, tasks.frozen, others)
  else:
    made = loop_lib.from_batches(step_fn, batches, tasks.frozen)
  steps = loop_lib.steps(state, range(start + 1, config.steps + 1), step_fn,
                         log, made, evaluates)
  if profile:
    steps = loop_lib.traced(steps, start + 1, profile, workdir / 'profile')
    if profile[-1] <= start:
      _say('warning: an earlier process made the steps of --profile, so no '
           'trace is written; choose later steps.')
  rank = None
  if selects:
    rank = functools.partial(
        evaluate.rank, metric=metric, select=config.select)
  shown = 'loss' if config.select == 'loss' else metric
  rates = np.broadcast_to(optimizer.schedule(
      config, config_lib.learning_rate(config))(np.arange(config.steps)),
                          config.steps)
  progress = loggers.Progress(
      metrics, config.steps, start, clock, rates=rates,
      dev=functools.partial(loggers.spell_dev, metrics, rank, shown),
      eval_every=config.eval_every, loss=not plan)
  try:
    watch = guards.make(
        metrics.of('train'), log, start, _say, max_skipped=config.max_skipped,
        max_rise=config.max_rise,
        rates=rates if methods.lowers_by_square(config) else None)
    record = loop_lib.Recorder(
        log=log, metrics=metrics, progress=progress, checkpoints=checkpoints,
        watch=watch, host=built.host, plan=plan, rank=rank,
        answers=write_answers, others=others, accumulates=accumulates, say=_say)
    with preemption.watched(log) as stop_wanted:
      state = loop_lib.loop(
          state, steps, record, evaluates=evaluates,
          checkpoint_every=config.checkpoint_every,
          evaluate_dev=rewards.evaluate if rewards else ask.dev,
          stop_wanted=stop_wanted)
    if others:
      others.close()
  finally:
    steps.close()  # ends a trace
    progress.close()
    log.close()
    # Saving is asynchronous. Wait, so that the last checkpoint is complete even
    # if the loop ended with an exception.
    checkpoints.wait()

  # Report: evaluate the best step on the dev rows, or the last step, on the
  # test rows.
  step, params = config.steps, state.params
  if selects:
    step, params = resume.best(
        checkpoints, state, config.steps,
        replays=log.records and log.steps.first == 1)
  on_dev, final, said = ask.both(params)
  checkpoints.close()
  metrics.close()
  loggers.draw_curves(workdir / 'curves.png', metrics, metric,
                      f'{config.method}, {model_name}')
  more = {}
  if plan:
    more['privacy'] = privacy.account(plan, config.steps)
  if zero_shot:
    more['zero_shot'] = zero_shot
  forwards = config.steps * methods.forwards(
      config, len(splits.train.prompts))
  result = finish(
      on_dev, final | {'step': step}, said, seconds=time.time() - began,
      steps=config.steps, forwards=round(forwards), trained=trained,
      compilations=len(step_fn.compiled), metric=metric,
      learning_rate=config_lib.learning_rate(config), **more)
  mirror.finish({} if plan else result['final'])
  if plan:
    _say(privacy.spell(plan, config.steps))
  _say(tasks.table(zero_shot, final))
  by = 'loss' if config.select == 'loss' else metric
  why = f'best on dev by {by}' if selects else 'the last'
  was = f', zero-shot {evaluate.spell(zero_shot)}' if zero_shot else ''
  _say(f'final (step {step}, {why}): test {evaluate.spell(final)}{was}; '
       f'{config.steps} steps; see {workdir}/result.json, curves.png')
  return result


def _say(text: str) -> None:
  """Prints a line on process 0 without disturbing the progress bar."""
  if text and jax.process_index() == 0:
    tqdm.write(text)
