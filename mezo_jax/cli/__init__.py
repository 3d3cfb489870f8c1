"""The commands, their arguments and their help.

Each command checks its arguments and calls one function of another room. Only
this room knows flags.
"""

__all__ = ()
