"""Trains a model, or evaluates a baseline, as a config describes.

`run` executes a config, or resumes a run that was stopped, and returns the
result. `predict` answers new rows with a trained model, and `diagnose` measures
what decides the learning rate of a loss; `range_test` finds a rate by a short
training. To read this room, start with:

* `config`: the fields of a config.
* `methods`: the table of methods.
* `train`: a run from beginning to end.
* `build`: data, model, parameters and optimizer of a config.
* `loop`: the training loop.
* `inference`: the predictions of new rows.
* `diagnosis`: learning rates, noise, eps, rounding and curvature.
* `learning_rates`: the range test, which suggests a learning rate.
"""

from mezo_jax.core import extras

extras.require(__name__, 'absl', 'flax', 'ml_collections', 'tqdm')

from mezo_jax.training.diagnosis import diagnose
from mezo_jax.training.inference import predict
from mezo_jax.training.learning_rates import range_test
from mezo_jax.training.train import run

__all__ = ('diagnose', 'predict', 'range_test', 'run')
