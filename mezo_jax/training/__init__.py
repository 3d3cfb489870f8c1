"""A config becomes a run: the config's fields, the table of methods, what is
built from them, the batches, and the training loop.

`mezo_jax.training.config` has every field of a run. `build` makes the model,
its data and its optimizer of a config.
"""

from mezo_jax.core import extras

extras.require(__name__, 'absl', 'flax', 'ml_collections', 'tqdm')

__all__ = ()
