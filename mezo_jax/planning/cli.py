"""The command `plan`, and what would fit where a plan does not."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import math
import re
from typing import NamedTuple

from absl import flags
import jax
from ml_collections import config_flags

from mezo_jax.core.errors import InputError
from mezo_jax.planning import machines
from mezo_jax.planning.plan import (
  GIB,
  gib,
  good_mesh,
  Plan,
  plan,
  spell,
  spell_mesh,
)
from mezo_jax.training import checks, fields, methods
from mezo_jax.training import config as config_lib

DOES_NOT_FIT = 3  # an exit status


# --- what would fit ---------------------------------------------------------


class Change(NamedTuple):
  """A way to need less."""

  words: str
  topology: str
  sizes: dict[str, int]
  config: config_lib.Train


def changes(found: Plan) -> Iterator[Change]:
  """What may make a plan fit that does not: from what costs nothing, another
  mesh, by what costs time to what costs money, more devices."""
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
  away = at('model.offload=True, slower by what crosses to the host',
            model=dataclasses.replace(config.model, offload=True))
  if not (config.model.offload or machines.is_card(name)) and _is_allowed(
      away.config):
    yield away
  for other in machines.larger(name):
    mesh = good_mesh(config, found.model, other)
    yield Change(f'{other}, with the mesh {spell_mesh(mesh)}', other, mesh,
                 config)


def _is_allowed(config: config_lib.Train) -> bool:
  try:
    checks.check(config)
    return True
  except InputError:
    return False


def _halves(n: int) -> Iterator[int]:
  while n > 1:
    n //= 2
    yield n


def what_fits(found: Plan, say: Callable[[str], None] = print
              ) -> tuple[Change, Plan] | None:
  """The first of `changes` that fits, and its plan."""
  def may(change):
    """Whether the weights alone leave room; that costs no compilation."""
    if change.config.model.offload:
      return True
    share = math.prod(change.sizes[a] for a in ('fsdp', 'tensor'))
    before = math.prod(getattr(found.config.mesh, a) for a in (
        'fsdp', 'tensor'))
    same = change.config.method == found.config.method
    resident = found.resident['weights'] + same * found.resident['state']
    return resident * before / share < found.limit
  for change in filter(may, changes(found)):
    say(f'trying {change.words}')
    try:
      other = plan(change.config, change.topology, sizes=change.sizes,
                   tokens=found.tokens, model_config=found.model)
    except InputError:  # batch and mesh, say, do not divide
      continue
    if other.fits:
      return change, other
  return None


# --- command line -----------------------------------------------------------


def main(file: str, topology: str, mesh: str | None, tokens: int | None,
         more: Sequence[str] = ()) -> int:
  """Prints a plan and, where it does not fit, the first change that would.

  Returns:
    The exit status: 0 if it fits, else `DOES_NOT_FIT`.
  """
  n = machines.size(topology)
  jax.config.update('jax_platforms', 'cpu')  # a device here is not asked
  if topology.startswith('cpu'):
    with contextlib.suppress(RuntimeError):  # devices are counted already
      jax.config.update('jax_num_cpu_devices', n)
  config = read_config(file, more)
  found = plan(config, topology, sizes=read_mesh(mesh, n) if mesh else None,
               tokens=tokens)
  print(spell(found))
  if found.fits:
    print('It fits.')
    return 0
  print(f'It does not fit into {found.limit / GIB:g} GiB.')
  other = what_fits(found)
  if other is None:
    print('Nothing that was tried fits.')
  else:
    change, found = other
    print(f'What fits: {change.words} ({gib(found.peak())} of '
          f'{found.limit / GIB:g} GiB a device).')
  return DOES_NOT_FIT


def read_config(file: str, more: Sequence[str] = ()) -> config_lib.Train:
  """Reads a config's file as train.py takes it, with ``--config.FIELD=VALUE``.
  """
  values = flags.FlagValues()
  argv = ['plan', f'--config={file}', *more]
  config_flags.DEFINE_config_file(
      'config', None, '', flag_values=values, sys_argv=argv)
  fields.check_names(argv)
  try:
    values(argv)
    fields.check_is_config(values.config)
    return values.config
  except InputError:
    raise
  except Exception as e:
    raise InputError(fields.failure(e, file.partition(':')[0])) from e


def read_mesh(text: str, n: int) -> dict[str, int]:
  """'fsdp=4,tensor=2' over n devices; one axis may be -1, the rest."""
  sizes = dict(data=1, fsdp=1, tensor=1, direction=1)
  for part in text.split(','):
    name, _, value = part.partition('=')
    if name not in sizes or not re.fullmatch(r'-1|[1-9]\d*', value):
      raise InputError(
          f'--mesh={text!r}: {part!r} is no axis and size, such as fsdp=4; the '
          f'axes are {", ".join(sizes)}.')
    sizes[name] = int(value)
  if math.prod(sizes.values()) != n and -1 not in sizes.values():
    raise InputError(f'--mesh={text}: the product is not the number of devices '
                     f'of the topology, {n}.')
  return sizes
