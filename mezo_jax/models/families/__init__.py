"""Describes each family of models in one module.

A module has two functions. ``config_from_hf`` maps the fields of a
``config.json`` to a `mezo_jax.models.layers.Config`. ``table`` returns a row
for each parameter, with the name and layout of its tensor in a checkpoint.
Nothing in this package reads files. To support another family, add a module
here, and list it in ``FAMILIES`` and ``ARCHITECTURES`` of
`mezo_jax.models.formats.huggingface`.

A module also has two constants. ``RENAMES`` has pairs of a pattern and a
replacement. They turn other spellings of tensors' names into those of the
table. ``IGNORED`` is a pattern of names: files may contain these tensors
although the table does not.
"""

__all__ = ()
