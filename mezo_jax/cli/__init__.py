"""Defines the commands, their arguments and their help.

Each command checks its arguments and calls one function of another room. Only
this room knows flags.
"""

from mezo_jax.core import extras

extras.require(__name__, 'absl', 'flax', 'ml_collections')

__all__ = ()
