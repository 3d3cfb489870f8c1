"""Defines the directions z: how a PRNG key becomes random numbers.

An element of z is a function of a key, the path of a parameter, the number of a
layer and the index of the element. z can therefore be drawn for a whole
parameter or for any part of one. This package contains the distributions of z,
and `Displacement`, which represents the vector Σ c·z(key). No code in this
package evaluates a loss.
"""

from mezo_jax.directions.base import Directions, Normal, Rademacher
from mezo_jax.directions.definition import z_of_leaf
from mezo_jax.directions.displacement import Displacement, Multiplier
from mezo_jax.directions.low_rank import LazyLowRank, LowRank
from mezo_jax.directions.subzero import SubZero

__all__ = ('Directions', 'Displacement', 'LazyLowRank', 'LowRank', 'Multiplier',
           'Normal', 'Rademacher', 'SubZero', 'z_of_leaf')
