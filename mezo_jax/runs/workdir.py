"""The records of a run in its working directory."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import fcntl
import os
from pathlib import Path

import jax
from jax.experimental import multihost_utils
import numpy as np

import mezo_jax
from mezo_jax import models, peft
from mezo_jax.core import fingerprint
from mezo_jax.core.errors import InputError, local, MissingError, Stopped
from mezo_jax.runs import checkpoint, guards, loggers, replay
from mezo_jax.tasks import data, evaluate
from mezo_jax.training import build, methods
from mezo_jax.training import config as config_lib
from mezo_jax.transforms.step import field

LOG = 'steps.log'


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
  """Holds a directory, which is made, for one run; the system lets go of it
  however the run ends. One that stays empty is removed.

  Raises:
    InputError: if another run is at work there, or if it cannot be written to.
  """
  local(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  if not os.access(workdir, os.W_OK | os.X_OK):
    raise InputError(f'{workdir} cannot be written to; give another --workdir.')
  held = os.open(workdir, os.O_RDONLY)
  try:
    if jax.process_index() == 0:
      try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as e:
        raise InputError(f'another run is at work in {workdir}: wait for its '
                         'end, or give another --workdir.') from e
      except OSError:  # a file system that knows no locks
        pass
    yield
  finally:
    os.close(held)
    with contextlib.suppress(OSError):
      workdir.rmdir()


def check(config: config_lib.Train, workdir: Path) -> None:
  """Refuses a directory in which this config cannot run, or go on.

  Raises:
    InputError: if it holds a run with other settings, or has more steps behind
      it than are wanted, or as many and the last was not evaluated.
  """
  config_file = workdir / 'config.json'
  if config_file.exists():
    saved = loggers.read_json(config_file)
    config_lib.check_same_run(config, saved)
    name = saved.get('model', {}).get('name')
    if name != config.model.name and 'weights' not in read_inputs(workdir):
      raise InputError(
          f'model.name was {name!r} and is now {config.model.name!r}, and '
          f'{workdir} has no record of the weights by which to tell that they '
          'are the same; choose another --workdir.')
  held = saved = checkpoint.latest_step(workdir / 'checkpoints')
  if (workdir / LOG).is_file():
    with contextlib.suppress(replay.Damaged):  # said when it is opened
      held = max(held, replay.read(workdir / LOG).steps.last)
  evaluated = not held or held > saved or any(
      r['kind'] == 'dev' and r['step'] == held
      for r in loggers.read(workdir / 'metrics.jsonl'))
  least = held if evaluated else held + 1
  if config.steps < least:
    raise InputError(
        f'{workdir} holds step {held}{"" if evaluated else ", not evaluated,"} '
        f'and --config.steps is {config.steps}; give {least} or more, or '
        'another --workdir.')


def inputs_of(config: config_lib.Train, model: models.Config,
              tokenizer) -> dict:
  """Returns fingerprints of the files that a run begins with, its weights and
  rows excepted.

  Args:
    config: The config of the run.
    model: The model's, after `mezo_jax.training.build.add`.
    tokenizer: The model's tokenizer.
  """
  found = {'model': fingerprint.of_model(model),
           'tokenizer': fingerprint.of_tokenizer(tokenizer)}
  if config.peft.adapter and methods.adapts(config):
    found['adapter'] = fingerprint.of_files(
        *peft.files_of(config.peft.adapter))
  return found


def changed(then: dict, now: dict, config: config_lib.Train) -> str:
  """Returns what differs between two sets of inputs, as 'the weights of X
  differ'; '' if nothing does. What one of them lacks, as of an earlier version,
  is not compared."""
  name = config.model.name
  words = {
      'weights': f'the weights of {name} differ',
      'model': f'the config of {name} differs',
      'tokenizer': f'the tokenizer of {name} differs',
      'adapter': f'the adapter {config.peft.adapter} differs',
      'rows': 'the rows, or their labels, differ'}
  for key, what in words.items():
    old, new = then.get(key), now.get(key)
    if None in (old, new) or old == new:
      continue
    if key != 'model':
      return what
    fields = [f'{field} was {old[field]!r} and is now {value!r}'
              for field, value in new.items()
              if field in old and old[field] != value]
    if fields:
      return f'{what} ({"; ".join(fields)})'
  return ''


def read_inputs(workdir: Path) -> dict:
  """Returns what a run recorded of its inputs; {} if it recorded nothing."""
  file = workdir / 'inputs.json'
  return loggers.read_json(file) if file.is_file() else {}


def check_inputs(workdir: Path, config: config_lib.Train, weights: str,
                 built: build.Built, splits: Sequence[data.Splits],
                 secret: bytes | None) -> None:
  """Notes what a run begins with; refuses to go on with something else.

  Args:
    workdir: The directory of the run.
    config: The config of the run.
    weights: `fingerprint.of_weights` before training.
    built: What the run is made of.
    splits: Its rows, of each task.
    secret: The secret of a private run, whose rows must not become known.

  Raises:
    InputError: if the model, the tokenizer, an adapter or the rows have changed
      since.
  """
  now = inputs_of(config, built.model.config, built.tokenizer) | dict(
      weights=weights, rows=fingerprint.of_rows(
          *(rows for s in splits for rows in (s.train, s.dev, s.test)),
          key=secret or b''))
  then = read_inputs(workdir)
  what = changed(then, now, config)
  if what:
    raise InputError(
        f'{what} from what the run in {workdir} began with: bring that back '
        '(--config.model.name says where the model is now), or choose another '
        '--workdir.')
  if now.keys() - then.keys():
    loggers.write_json(workdir / 'inputs.json', now | then)


def lost_best(workdir: Path, config: config_lib.Train, metric: str,
              kept: Sequence[int]) -> int | None:
  """The best step on dev rows, if no checkpoint is of one as good (it may have
  been on its way to the disk, or be damaged) and the log has it."""
  if not (methods.selects(config) and (workdir / LOG).is_file()):
    return None
  try:
    steps = replay.read(workdir / LOG).steps
  except replay.Damaged:
    return None
  ranks = {r['step']: checkpoint.order(evaluate.rank(
      {k: np.nan if v is None else v for k, v in r.items()
       if k not in ('kind', 'step')}, metric, config.select))
           for r in loggers.read(workdir / 'metrics.jsonl')
           if r['kind'] == 'dev' and 0 < r['step'] <= steps.last}
  best = max(ranks.values(), default=None)
  found = [step for step, rank in ranks.items() if rank == best]
  if (not found or best == checkpoint.order(None) or {*found} & {*kept}
      or max((s for s in kept if s < found[0]), default=0) < steps.first - 1):
    return None
  return found[0]


def open_log(workdir: Path, config: config_lib.Train, weights: str, opt_state,
             start: int, say: Callable[[str], None]) -> replay.Log:
  """The log of a run's steps; of backpropagation one that stays empty.

  Args:
    workdir: of the run.
    config: of the run.
    weights: `fingerprint.of_weights` before training.
    opt_state: of the optimizer.
    start: the step of the checkpoint that the run goes on from.
    say: reports what was wrong.
  """
  numbers, log = field(opt_state, 'projected_grad'), None
  if numbers is not None and jax.process_index() == 0:
    log, said = replay.open_log(workdir / LOG, {
        'mezo_jax': mezo_jax.__version__, 'jax': jax.__version__,
        'device': jax.devices()[0].device_kind, 'weights': weights,
        **{k: v for k, v in read_inputs(workdir).items() if k in (
            'model', 'tokenizer', 'adapter')},
        'config': config_lib.to_json(config)}, numbers.size, start,
        compare=False)  # `resume` has compared what may not change
    if said:
      say(f'warning: {said}.')
  n = 0 if numbers is None else numbers.size
  steps = log.steps if log else replay.no_steps(n, start)
  if n and jax.process_count() > 1:  # process 0 has the file
    first, t = multihost_utils.broadcast_one_to_all(
        np.array([steps.first, len(steps.values)])).tolist()
    blank = (np.zeros(t, np.float32), np.zeros((t, n), np.float32),
             np.zeros(t, bool))
    added = [step in steps.added for step in range(first, first + t)]
    values, grads, added = multihost_utils.broadcast_one_to_all(
        (steps.values, steps.projected_grads, np.array(added, bool))
        if log else blank)
    steps = replay.Steps(first, np.asarray(values), np.asarray(grads),
                         frozenset((first + np.flatnonzero(added)).tolist()))
  return log or replay.Log(None, {}, steps)


def read_config(workdir: Path) -> config_lib.Train:
  """The config of a run, of an earlier version of this library too.

  Raises:
    MissingError: if there was no run.
    InputError: if the config cannot be read.
  """
  if not ((workdir / 'config.json').is_file()
          and (workdir / 'checkpoints').is_dir()):
    raise MissingError(
        f'{workdir} has no config.json and checkpoints: it is not the '
        '--workdir of a run.')
  saved = loggers.read_json(workdir / 'config.json')
  try:
    config = config_lib.from_json(saved)
    methods.part_of(config), config.task.traits  # they are known
    return config
  except (AttributeError, KeyError, TypeError) as e:
    raise InputError(
        f'{workdir}/config.json is not that of a run of this version ({e}); '
        'give the --workdir of one.') from e


def read_result(workdir: str | os.PathLike) -> dict:
  """What a finished run says of itself; {} of one that is not."""
  file = Path(workdir) / 'result.json'
  return loggers.read_json(file) if file.is_file() else {}


def write(workdir: Path, config: config_lib.Train,
          result: dict | None = None) -> None:
  """Writes config.json and, if there is one, result.json."""
  loggers.write_json(workdir / 'config.json', config_lib.to_json(config))
  if result is not None:
    loggers.write_json(workdir / 'result.json', result)


def write_result(workdir: Path, config: config_lib.Train, built: build.Built,
                 final: dict, **more) -> dict:
  """Writes config.json and result.json, and returns the latter.

  Raises:
    Stopped: if the final report of the test rows is not finite.
  """
  if not evaluate.is_finite(final):
    raise Stopped(
        f'{config.method} has no result: test {evaluate.spell(final)}. '
        + (guards.TRY if methods.method_of(config).steps else
           'Check the weights, or try --config.model.dtype=float32.'))
  mesh, splits = built.mesh, built.splits
  result = {
      'method': config.method, 'metric': config_lib.metric(config),
      'final': final, 'steps': 0, 'forwards': 0, **more,
      'train_rows': len(splits.train.prompts),
      'truncated': splits.test.truncated, 'peak_memory': evaluate.peak_memory(),
      'devices': f'{mesh.size} x {jax.devices()[0].device_kind}'}
  write(workdir, config, result)
  return result
