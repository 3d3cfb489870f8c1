"""Maps the names of distributions that configs use to their classes."""

from mezo_jax.core import arguments
from mezo_jax.directions.base import Directions, Normal, Rademacher
from mezo_jax.directions.low_rank import LazyLowRank, LowRank
from mezo_jax.directions.subzero import SubZero

KINDS: dict[str, type[Directions]] = {
    'normal': Normal, 'rademacher': Rademacher, 'low_rank': LowRank,
    'lazy_low_rank': LazyLowRank, 'subzero': SubZero}


def options_of(name: str) -> set[str]:
  """Returns which of the fields 'rank' and 'every' a distribution has.

  Args:
    name: Name of the distribution, a key of `KINDS`.
  """
  return {field for field in ('rank', 'every') if hasattr(KINDS[name], field)}


def as_directions(directions: Directions | str) -> Directions:
  """Converts the name of a distribution to a `Directions` instance.

  Args:
    directions: A `Directions`, which is returned unchanged, or a key of
      `KINDS`, which is replaced by that distribution with default options.

  Raises:
    ValueError: If ``directions`` is neither a `Directions` nor a known name.
  """
  if isinstance(directions, str) and directions in KINDS:
    return KINDS[directions]()
  return arguments.check(
      isinstance(directions, Directions), 'directions',
      f'one of the names {tuple(KINDS)} or a mezo_jax.Directions such as '
      'mezo_jax.Normal()', directions)
