"""Defines the command line: the commands, their flags and their help.

Each command checks its arguments and calls one function of another package of
mezo_jax. No other package reads flags.
"""

from mezo_jax.core import extras

extras.require(__name__, 'absl', 'flax', 'ml_collections')

__all__ = ()
