"""The paper's SQuAD trained on F1 itself: OPT-13B, prefix tuning.

  python train.py --config=configs/opt_f1.py

Reproduces (Malladi et al., 2023, Table 3, non-differentiable objective, SQuAD):
F1 78.5, against 46.2 zero-shot and 84.7 by cross-entropy. Learning rates of
Table 16: {1e-1, 5e-2, 1e-2} (all parameters: {1e-6, 5e-6, 1e-5}, eps 1e-3).
Each step generates 2 x 16 answers; dev rows are scored by F1.
"""

import dataclasses

from mezo_jax.configs import opt
from mezo_jax.training.config import Train


def get_config() -> Train:
  config = opt.get_config('squad,prefix')
  return dataclasses.replace(
      config, objective='f1', select='metric',
      optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-2))
