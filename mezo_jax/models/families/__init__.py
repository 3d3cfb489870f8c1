"""One table for each family of models: its Hugging Face names and config.

A table says how the fields of a ``config.json`` choose among the layers of
`mezo_jax.models.layers`, and which tensor of a checkpoint each parameter is.
Nothing here reads a file.
"""

__all__ = ()
