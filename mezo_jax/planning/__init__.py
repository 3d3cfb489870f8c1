"""Predicts the memory and time of a run on hardware that is not available.

JAX can compile a program for a device of which it has only a description. So
the programs of the run are compiled, and the compiler reports the memory and
the arithmetic of each of them, without weights, data or a device.
"""

from mezo_jax.core import extras

extras.require(__name__, 'absl', 'flax', 'ml_collections', 'tokenizers')

__all__ = ()
