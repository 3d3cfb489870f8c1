"""Sets up a run as one of several replicas (experimental).

See `mezo_jax.distributed.exchange`.
"""

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
  """Holds the flags that make a run one of several replicas.

  Attributes:
    replica: Number of this replica, from 0.
    replicas: Number of replicas.
    directory: Directory that all replicas see, for the exchange.
    timeout: Seconds to wait for another replica.
  """

  replica: int
  replicas: int
  directory: Path
  timeout: float

  @property
  def part(self) -> tuple[int, int]:
    """Returns the argument `part` of `mezo_jax.make_step`."""
    return self.replica, self.replicas


def place(replicas: int | None, replica: int | None, directory: str | None,
          timeout: float) -> Place | None:
  """Checks the flags about replicas.

  Args:
    replicas: Value of --replicas, the number of replicas.
    replica: Value of --replica, the number of this replica from 0.
    directory: Value of --exchange, a directory that all replicas see.
    timeout: Value of --exchange_timeout, in seconds.

  Returns:
    The place of the run, or None if the first three are None.

  Raises:
    InputError: If some flags are missing or invalid.
  """
  if replicas is None and replica is None and directory is None:
    return None
  if replicas is None or replica is None or directory is None:
    raise InputError('--replicas, --replica and --exchange must be given '
                     'together.')
  if not 0 <= replica < replicas:
    raise InputError(f'--replica is {replica}, but must be at least 0 and '
                     f'below --replicas ({replicas}).')
  if not timeout > 0:
    raise InputError(f'--exchange_timeout is {timeout}, but must be positive.')
  path = local(directory)
  if re.fullmatch(r'[^/]+:\d+', directory) and not path.is_dir():
    raise InputError(
        f'--exchange is {directory!r}, but replicas no longer exchange steps '
        'over the network; pass the path of a directory that all of them see.')
  return Place(replica, replicas, path, timeout)


def check_replicas(place: Place | None, method: str, methods: Sequence[str],
          combine: str, num_samples: int) -> None:
  """Checks that replicas can divide the directions of a run among them.

  Args:
    place: Place of the run; None for a run without replicas, which passes.
    method: Name of the run's method.
    methods: Names of the methods whose directions replicas can divide.
    combine: Name of the combine function, `spsa.combine` of the config.
    num_samples: Number of directions of a step.

  Raises:
    InputError: If the directions cannot be divided. The message names the
      setting.
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
      raise InputError(f'{n} replicas are not possible with {why}.')


def join(place: Place, settings: dict[str, Any], weights: str,
         splits: Sequence[Splits], num_samples: int, steps: int,
         applied_every: int | None, log: Log, say: Callable[[str], None]
         ) -> Exchange | None:
  """Opens the exchange of a run, and adds to its log the steps that it missed.

  Args:
    place: Place of the run among its replicas.
    settings: Settings that must be the same for all replicas, as JSON values:
      the fields of the config and any that the caller adds. Paths of data may
      differ.
    weights: Fingerprint of the weights before training; see
      `mezo_jax.core.fingerprint.of_weights`.
    splits: The rows of each task.
    num_samples: Number of directions of a step.
    steps: Number of steps of the run.
    applied_every: Number of steps after which accumulated updates are applied
      for an evaluation. None if updates do not accumulate.
    log: Log of the run.
    say: Reports a line to the user.

  Returns:
    The exchange, or None if the log has all steps.

  Raises:
    InputError: If another replica belongs to another run.
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
    say(f'received steps {before + 1} to {log.end} from the other replicas')
  return others
