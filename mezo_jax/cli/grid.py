"""Makes the configs of a sweep from a grid of values."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import itertools
import re
from typing import Any

from ml_collections.config_flags import config_path

from mezo_jax.cli import command_line, processes
from mezo_jax.cli.command_line import CONFIGS
from mezo_jax.core.errors import InputError
from mezo_jax.tasks import objective as objectives
from mezo_jax.training import checks, methods
from mezo_jax.training import config as config_lib

_GRID = re.compile(r'--?grid\.([^=]*)(=?)(.*)', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Point:
  """Describes a point of the grid.

  Attributes:
    values: Value of each field of the grid, by the path of the field.
    arguments: Arguments of ``mezo-jax train`` that set these fields.
    runs: The runs of all seeds, by name.
  """

  values: dict[str, Any]
  arguments: tuple[str, ...]
  runs: dict[str, processes.Run]


def take_grid(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
  """Separates ``--grid.FIELD=V1,V2`` from the rest of a command line.

  Args:
    argv: The command line.

  Returns:
    The other words, and the values of each field as they were written.

  Raises:
    InputError: for a flag without values.
  """
  rest, grid = [], {}
  for word in argv:
    found = _GRID.fullmatch(word)
    if not found:
      rest.append(word)
      continue
    field, assigned, text = found.groups()
    if not assigned:
      raise InputError(f'--grid.{field} has no values; write '
                       f'--grid.{field}=V1,V2.')
    grid.setdefault(field, []).extend(_split(text))
  return rest, grid


def _split(text: str) -> list[str]:
  """Splits text at commas that are not in brackets or in a quoted value."""
  parts, depth, quote = [''], 0, ''
  for c in text:
    if quote:
      quote = '' if c == quote else quote
    elif c in '"\'' and (depth or not parts[-1]):
      quote = c
    else:
      depth += (c in '([{') - (c in ')]}')
    if c == ',' and not depth and not quote:
      parts.append('')
    else:
      parts[-1] += c
  return [part[1:-1] if re.fullmatch(r'"[^"]*"|\'[^\']*\'', part) else part
          for part in parts]


def points_of(words: Sequence[str], grid: Mapping[str, Sequence[str]],
              seeds: int) -> list[Point]:
  """Returns the points of a grid.

  Values that are equal as numbers are one point, however they are written.

  Args:
    words: ``--config`` and ``--config.FIELD=VALUE``, as for `train`.
    grid: The values of each field as they were written.
    seeds: Number of seeds, counted from that of the config.

  Raises:
    InputError: for an unknown field, a value that it cannot have, a config that
      cannot run, or one that cannot be compared with the others.
  """
  def read(*more):
    return command_line.parse(
        ['sweep', *words, *more], '', {}, configs=CONFIGS)[0].config

  if not grid:
    raise InputError('the grid is missing; write --grid.FIELD=V1,V2, such as '
                     '--grid.optimizer.learning_rate=1e-4,1e-3.')
  base, given = read(), command_line.given(['', *words])
  axes = []
  for field in sorted(grid):  # names do not depend on the order of the flags
    if field in given or field == 'seed':
      raise InputError(
          f'--grid.{field} and --config.{field} set the same field; leave one '
          'out.' if field in given else
          '--grid.seed would choose a seed; write --seeds=N instead.')
    values = {}
    for text in grid[field]:
      argument = f'--config.{field}={text}'
      value = config_path.get_value(field, read(argument))
      values.setdefault(spell(value), (value, argument))
    axes.append([(field, name, *found) for name, found in values.items()])
  points = []
  for chosen in itertools.product(*axes):
    arguments = tuple(argument for *_, argument in chosen)
    name = ','.join(f'{field}={_as_name(text)}' for field, text, *_ in chosen)
    runs = {}
    for seed in range(base.seed, base.seed + seeds):
      more = *arguments, f'--config.seed={seed}'
      runs[f'{name},seed={seed}'] = processes.Run(read(*more), (*words, *more))
    points.append(Point({field: value for field, _, value, _ in chosen},
                        arguments, runs))
  _check(points, [*given, *grid])
  return points


def _check(points: Sequence[Point], given: Sequence[str]) -> None:
  """Checks that all runs of a sweep can work, and that they are comparable."""
  kinds = set()
  for point in points:
    for name, run in point.runs.items():
      config = run.config
      try:
        checks.check_config(config)
        checks.check_given(config, given)
      except InputError as e:
        raise InputError(f'{name.rpartition(",")[0]}: {e}') from e
      if not methods.method_of(config).steps or not methods.selects(config):
        raise InputError(
            f'{name}: method {config.method!r} does not choose a step on the '
            'dev rows, by which a sweep compares; '
            + ('set --config.privacy.public_dev if they are public.'
               if methods.method_of(config).private else
               'use mezo-jax evaluate for baselines.'))
      trained = objectives.of(config.task, config.objective)
      kinds.add(f'the loss of {objectives.words(trained)}' if (
          config.select == 'loss') else config_lib.metric(config))
  if len(kinds) > 1:
    raise InputError(
        'the points of the grid cannot be compared, because their best steps '
        f'are chosen by {" and by ".join(sorted(kinds))}; set the fields '
        'select and task.metric, or make a sweep of each.')


def spell(value: Any) -> str:
  """Returns a value as text, in which 1e-4 and 0.0001 are the same."""
  return repr(value) if isinstance(value, float) else str(value)


def short_names(fields: Sequence[str]) -> dict[str, str]:
  """Returns the last part of the path of each field, if no two share it."""
  short = {field: field.rpartition('.')[2] for field in fields}
  if len({*short.values()}) < len(short):
    return {field: field for field in fields}
  return short


def _as_name(text: str) -> str:
  """Returns text as a part of a file name, unique for each text."""
  name = re.sub(r'[^\w.+-]+', '_', text)[:40]
  if name == text:
    return name
  return f'{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}'
