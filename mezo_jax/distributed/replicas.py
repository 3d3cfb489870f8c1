"""A run that is one of several replicas (experimental); see
`mezo_jax.distributed.exchange`."""

from collections.abc import Callable, Sequence
import copy
from pathlib import Path
import re
from typing import Any, NamedTuple

import jax

from mezo_jax.core import fingerprint
from mezo_jax.core.errors import InputError, local
from mezo_jax.distributed.exchange import Exchange
from mezo_jax.runs.replay import Log
from mezo_jax.tasks.data import Splits
from mezo_jax.transforms.combine import COMBINES


class Place(NamedTuple):
  """The place of a run among its replicas.

  Attributes:
    replica: Number of this replica, from 0.
    replicas: Number of replicas.
    directory: Directory that all replicas see.
    timeout: Seconds to wait for another replica.
  """

  replica: int
  replicas: int
  directory: Path
  timeout: float

  @property
  def part(self) -> tuple[int, int]:
    return self.replica, self.replicas


def place(replicas: int | None, replica: int | None, directory: str | None,
          timeout: float) -> Place | None:
  """Returns the place that flags name; None where none is given.

  Raises:
    InputError: If some are missing, or out of range.
  """
  if replicas is None and replica is None and directory is None:
    return None
  if replicas is None or replica is None or directory is None:
    raise InputError('replicas: --replicas, --replica and --exchange must be '
                     'given together.')
  if not 0 <= replica < replicas:
    raise InputError(f'--replica is {replica} and must be at least 0 and below '
                     f'--replicas, {replicas}.')
  if not timeout > 0:
    raise InputError(f'--exchange_timeout is {timeout} and must be positive.')
  path = local(directory)
  if re.fullmatch(r'[^/]+:\d+', directory) and not path.is_dir():
    raise InputError(
        f'--exchange is {directory!r}, but replicas no longer exchange over '
        'the network: give the path of a directory that all of them see.')
  return Place(replica, replicas, path, timeout)


def check_replicas(place: Place | None, method: str, methods: Sequence[str],
          combine: str, num_samples: int) -> None:
  """Raises InputError for a run whose directions cannot be shared out.

  Args:
    place: Place of the run; None for a run alone, which is always right.
    method: Name of the method of the run.
    methods: Names of the methods whose directions replicas can share out.
    combine: Name of the combine function, `spsa.combine` of the config.
    num_samples: Number of directions of a step.
  """
  if place is None:
    return
  n = place.replicas
  for holds, why in (
      (method in methods,
       f'method {method!r}; choose one of {", ".join(methods)}'),
      (not COMBINES[combine].needs_all,
       f'spsa.combine {combine!r}, which needs all losses'),
      (num_samples % n == 0,
       f'spsa.num_samples {num_samples}: make it a multiple of {n}'),
      (jax.process_count() == 1, '--distributed: a replica is one process')):
    if not holds:
      raise InputError(f'{n} replicas cannot share out {why}.')


def join(place: Place, settings: dict[str, Any], weights: str,
         splits: Sequence[Splits], num_samples: int, steps: int,
         applied_every: int | None, log: Log, say: Callable[[str], None]
         ) -> Exchange | None:
  """Opens the exchange of a run, and gives its log the steps that it missed.

  Args:
    place: Place of the run among its replicas.
    settings: What all replicas must share, as JSON values: the fields of the
      config, of which paths of data may differ, and what else the caller adds.
    weights: `mezo_jax.core.fingerprint.of_weights` before training.
    splits: The rows of each task.
    num_samples: Number of directions of a step.
    steps: Number of steps of the run.
    applied_every: Number of steps after which accumulated updates are applied
      to be evaluated; None where none accumulate.
    log: Log of the run.
    say: Reports a line to the user.

  Returns:
    The exchange, or None where the log has all steps.

  Raises:
    InputError: If another replica runs something else.
  """
  if log.end >= steps:
    return None
  settings = copy.deepcopy(settings)
  for task in (settings, *settings['also']):
    for field in ('train', 'test'):
      task['data'].pop(field)
  run = fingerprint.of(dict(
      config=settings, weights=weights, applied_every=applied_every,
      steps=applied_every and steps,
      rows=fingerprint.of_rows(*(s.train for s in splits))))
  others = Exchange(place.directory, run, *place.part, num_samples,
                    place.timeout)
  before = log.end
  others.catch_up(log, lambda step: applied_every is not None and (
      step % applied_every == 0 or step == steps))
  if log.end > before:
    say(f'steps {before + 1} to {log.end} are taken from the other replicas')
  return others
