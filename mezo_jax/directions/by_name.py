"""The distributions of z, by the names that configs have for them."""

import dataclasses

from mezo_jax.directions.base import Directions, Normal, Rademacher
from mezo_jax.directions.low_rank import LazyLowRank, LowRank
from mezo_jax.directions.subzero import SubZero

KINDS: dict[str, type[Directions]] = {
    'normal': Normal, 'rademacher': Rademacher, 'low_rank': LowRank,
    'lazy_low_rank': LazyLowRank, 'subzero': SubZero}


def options_of(name: str) -> set[str]:
  """Returns which of the options 'rank' and 'every' a distribution has."""
  fields = {field.name for field in dataclasses.fields(KINDS[name])}
  return fields & {'rank', 'every'}


def as_directions(directions: Directions | str) -> Directions:
  """Returns directions, which may be given by name.

  Raises:
    ValueError: for an unknown name, or something else.
  """
  if isinstance(directions, Directions):
    return directions
  if not isinstance(directions, str) or directions not in KINDS:
    raise ValueError(f'directions must be one of {tuple(KINDS)}, or such as '
                     f'mezo_jax.Normal(), got {directions!r}.')
  return KINDS[directions]()
