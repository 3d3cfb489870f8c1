"""The directions z: how a key becomes random numbers, and their distributions.

A direction is a function of a key, a parameter's path, a layer and the index of
an element. This room draws it, for a whole parameter or for a part of one; it
never evaluates a loss.
"""

from mezo_jax.directions.base import Directions, Normal, Rademacher
from mezo_jax.directions.displacement import Displacement
from mezo_jax.directions.low_rank import LazyLowRank, LowRank
from mezo_jax.directions.subzero import SubZero

__all__ = ('Directions', 'Displacement', 'LazyLowRank', 'LowRank', 'Normal',
           'Rademacher', 'SubZero')
