"""A run that is one of several replicas; see
`mezo_jax.distributed.exchange`."""

from collections.abc import Callable, Sequence
from pathlib import Path
import re
from typing import NamedTuple

import jax

from mezo_jax.core import fingerprint
from mezo_jax.core.errors import InputError, local
from mezo_jax.distributed import exchange, mirror
from mezo_jax.runs.replay import Log
from mezo_jax.tasks.data import Splits
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods
from mezo_jax.transforms.evaluate_points import COMBINES


class Place(NamedTuple):
  """Where a run stands among its replicas."""

  replica: int
  replicas: int
  through: str  # HOST:PORT of replica 0, or a directory
  timeout: float

  @property
  def part(self) -> tuple[int, int]:
    return self.replica, self.replicas


def place(replicas: int | None, replica: int | None, through: str | None,
          timeout: float) -> Place | None:
  """Of flags; None where none is given.

  Raises:
    InputError: if some are missing, or out of range.
  """
  if (replicas, replica, through) == (None, None, None):
    return None
  if None in (replicas, replica, through):
    raise InputError('replicas: --replicas, --replica and --exchange must be '
                     'given together.')
  if not 0 <= replica < replicas:
    raise InputError(f'--replica is {replica} and must be at least 0 and below '
                     f'--replicas, {replicas}.')
  if not timeout > 0:
    raise InputError(f'--exchange_timeout is {timeout} and must be positive.')
  return Place(replica, replicas, through, timeout)


def check(config: config_lib.Train, place: Place | None) -> None:
  """Raises InputError for a config whose directions cannot be shared out."""
  if place is None:
    return
  z, n = config.spsa, place.replicas
  for holds, why in (
      (methods.method_of(config).replicated,
       f'method {config.method!r}; choose one of '
       f'{", ".join(methods.names_where(lambda m: m.replicated))}'),
      (COMBINES[z.combine].by_direction,
       f'spsa.combine {z.combine!r}, which needs all losses'),
      (z.num_samples % n == 0,
       f'spsa.num_samples {z.num_samples}: make it a multiple of {n}'),
      (jax.process_count() == 1, '--distributed: a replica is one process')):
    if not holds:
      raise InputError(f'{n} replicas cannot share out {why}.')


def join(place: Place, config: config_lib.Train, workdir: Path, weights: str,
         splits: Sequence[Splits], log: Log, say: Callable[[str], None]
         ) -> exchange.Exchange | None:
  """The exchange of a run, whose log gets the steps that it missed; None where
  it has all, and needs nobody.

  Args:
    place: of the run.
    config: of the run.
    workdir: of the run.
    weights: `mezo_jax.core.fingerprint.of_weights` before training.
    splits: the rows of each task.
    log: of the run.
    say: reports what is waited for.
  """
  if log.end >= config.steps:
    return None
  folds = config.spsa.fold_every > 1  # else evaluations change no weight
  ends = (config.eval_every, config.steps) if folds else ()
  told = config_lib.bound(config)
  for part in (told, *told['also']):  # machines may have their own paths
    for field in ('train', 'test'):
      part['data'].pop(field)
  run = fingerprint.of(dict(
      config=told, weights=weights, ends=ends, code=fingerprint.of_code(),
      rows=fingerprint.of_rows(*(s.train for s in splits))))
  if re.fullmatch(r'.+:\d+', place.through) and not (
      Path(place.through).is_dir()):
    say(f'replica {place.replica} of {place.replicas}: looking for the others '
        f'at {place.through}')
    found = mirror.over_sockets(
        place.through, workdir / 'exchange', run, *place.part,
        config.spsa.num_samples, place.timeout)
  else:
    found = exchange.over_files(
        local(place.through), run, *place.part, config.spsa.num_samples,
        place.timeout)
  before = log.end
  found.catch_up(log, lambda step: folds and (
      step % config.eval_every == 0 or step == config.steps))
  if log.end > before:
    say(f'steps {before + 1} to {log.end} are taken from the other replicas')
  return found
