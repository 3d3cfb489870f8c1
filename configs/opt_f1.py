"""OPT-13B on SQuAD, trained on F1 itself, with prefix tuning.

  python train.py --config=configs/opt_f1.py

Reproduces Table 3 of Malladi et al. (2023), non-differentiable objectives,
SQuAD: F1 78.5, compared with 46.2 zero-shot and 84.7 with cross-entropy. The
paper searched over the learning rates of Table 16, 1e-1, 5e-2 and 1e-2 (for all
parameters 1e-6, 5e-6 and 1e-5, with eps 1e-3). Each step generates 2 x 16
answers, and the dev rows are scored by F1.
"""

import dataclasses

from mezo_jax.configs import opt
from mezo_jax.training.config import Train


def get_config() -> Train:
  """Returns the config of prefix tuning on SQuAD, with the objective F1."""
  config = opt.get_config('squad,prefix')
  return dataclasses.replace(
      config, objective='f1', select='metric',
      optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-2))
