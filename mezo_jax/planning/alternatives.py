"""Searches for a change that makes a plan fit into the devices' memory.

It tries changes of the config, of the mesh and of the devices.
"""

from collections.abc import Callable, Iterator
import dataclasses
import math
from typing import NamedTuple

from mezo_jax.core.errors import InputError
from mezo_jax.planning import machines
from mezo_jax.planning.plan import good_mesh, Plan, plan, spell_mesh
from mezo_jax.training import checks, methods
from mezo_jax.training import config as config_lib


class Change(NamedTuple):
  """Describes a change that may reduce the memory per device.

  Attributes:
    words: Description of the change for the user.
    topology: The devices; see `mezo_jax.planning.machines`.
    sizes: Sizes of the mesh axes, by name.
    config: The changed config of the run.
  """

  words: str
  topology: str
  sizes: dict[str, int]
  config: config_lib.Train


def changes(found: Plan) -> Iterator[Change]:
  """Yields changes that may make a plan fit.

  First come changes that cost nothing (another mesh), then changes that cost
  time (smaller batches), and last changes that cost money (more devices).

  Args:
    found: The plan that does not fit.
  """
  config, sizes = found.config, dataclasses.asdict(found.config.mesh)
  name, n = found.topology, machines.size(found.topology)
  at = lambda words, **fields: Change(
      words, name, sizes, dataclasses.replace(config, **fields))
  for tensor in (t for t in range(1, n + 1) if n % t == 0):
    other = dict(direction=1, data=1, fsdp=n // tensor, tensor=tensor)
    if other != sizes and config.data.batch_size % other['fsdp'] == 0:
      yield Change(f'the mesh {spell_mesh(other)}', name, other, config)
  if methods.method_of(config).backprop:
    if not config.model.remat:
      yield at('model.remat=True', model=dataclasses.replace(
          config.model, remat=True))
    yield at("method='mezo'", method='mezo')
  elif config.spsa.over == 'batch':
    yield at("spsa.over='scan'", spsa=dataclasses.replace(
        config.spsa, over='scan'))
  if found.peak('evaluation') >= found.peak():
    for rows in _halves(config.eval_batch_size):
      yield at(f'eval_batch_size={rows}', eval_batch_size=rows)
  else:
    groups = sizes['data'] * sizes['fsdp']
    for parts in range(2, config.data.batch_size // groups + 1):
      if config.data.batch_size % (parts * groups) == 0:
        yield at(f'optimizer.micro_batches={parts}',
                 optimizer=dataclasses.replace(
                     config.optimizer, micro_batches=parts))
    for rows in _halves(config.data.batch_size):
      if rows % groups == 0:
        yield at(f'data.batch_size={rows}', data=dataclasses.replace(
            config.data, batch_size=rows))
  away = at('model.offload=True, slower because it copies layers from the host',
            model=dataclasses.replace(config.model, offload=True))
  if not (config.model.offload or machines.is_card(name)) and _is_allowed(
      away.config):
    yield away
  for other in machines.larger(name):
    mesh = good_mesh(config, found.model, other)
    yield Change(f'{other}, with the mesh {spell_mesh(mesh)}', other, mesh,
                 config)


def _is_allowed(config: config_lib.Train) -> bool:
  """Returns whether a config passes the checks of every run."""
  try:
    checks.check_config(config)
    return True
  except InputError:
    return False


def _halves(n: int) -> Iterator[int]:
  """Yields n / 2, n / 4, ..., 1, rounded down."""
  while n > 1:
    n //= 2
    yield n


def what_fits(found: Plan, say: Callable[[str], None] = print
              ) -> tuple[Change, Plan] | None:
  """Returns the first of `changes` that fits, and its plan.

  Args:
    found: The plan that does not fit.
    say: Reports each change that is tried. Defaults to `print`.

  Returns:
    The change and its plan, or None if no change fits.
  """
  def may(change):
    """Returns whether weights and optimizer state alone would fit.

    This needs no compilation, so it saves the time for hopeless changes.
    """
    if change.config.model.offload:
      return True
    share = math.prod(change.sizes[a] for a in ('fsdp', 'tensor'))
    before = math.prod(getattr(found.config.mesh, a) for a in (
        'fsdp', 'tensor'))
    # The optimizer's state is counted only if the method stays the same.
    same = change.config.method == found.config.method
    resident = found.resident['weights'] + same * found.resident['state']
    return resident * before / share < found.limit
  for change in filter(may, changes(found)):
    say(f'trying {change.words}')
    try:
      other = plan(change.config, change.topology, sizes=change.sizes,
                   tokens=found.tokens, model_config=found.model)
    except InputError:  # for example, the mesh does not divide the batch
      continue
    if other.fits:
      return change, other
  return None
