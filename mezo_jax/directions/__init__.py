"""Defines the directions z: how a key becomes random numbers.

A direction is a function of a key, a parameter's path, a layer and the index of
an element, so it can be drawn for a whole parameter or for a part of one. The
distributions are here, and `Displacement`, the vector Σ c·z(key). Nothing in
this room evaluates a loss.
"""

from mezo_jax.directions.base import Directions, Normal, Rademacher
from mezo_jax.directions.definition import z_of_leaf
from mezo_jax.directions.displacement import Displacement, Multiplier
from mezo_jax.directions.low_rank import LazyLowRank, LowRank
from mezo_jax.directions.subzero import SubZero

__all__ = ('Directions', 'Displacement', 'LazyLowRank', 'LowRank', 'Multiplier',
           'Normal', 'Rademacher', 'SubZero', 'z_of_leaf')
