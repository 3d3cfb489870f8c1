"""Compiles the programs of a run for hardware that is not here.

The compiler reports the memory and the arithmetic of each program; no weights,
no data and no device are needed. `plan` answers what a run will hold and how
long a step will take.
"""

from mezo_jax.core import extras

extras.require(__name__, 'absl', 'flax', 'ml_collections', 'tokenizers')

__all__ = ()
