"""Describes each family of models by one table.

A table says how the fields of a ``config.json`` choose among the layers of
`mezo_jax.models.layers`, and which tensor of a checkpoint holds each parameter.
To add a family, add a table. Nothing in this room reads a file.
"""

__all__ = ()
