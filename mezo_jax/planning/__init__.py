"""Predicts the memory and time of a run on hardware that is not available.

The programs of the run are compiled for a described device. The compiler
reports the memory and the arithmetic of each program, without weights, data or
a device.
"""

from mezo_jax.core import extras

extras.require(__name__, 'absl', 'flax', 'ml_collections', 'tokenizers')

__all__ = ()
