"""Turns a config into a run.

`run` trains a model as a config says, or resumes that, and returns the result.
`config` has the fields of a config, `methods` the table of methods, `build`
makes data, model and optimizer, and `loop` is the training loop.
"""

from mezo_jax.core import extras

extras.require(__name__, 'absl', 'flax', 'ml_collections', 'tqdm')

from mezo_jax.training.train import run

__all__ = ('run',)
