"""The paper's SQuAD trained on F1 itself: OPT-13B, all parameters.

  python train.py --config=configs/opt_f1.py

Reproduces the setting of (Malladi et al., 2023, Table 3, non-differentiable
objective, SQuAD): F1 78.5 with prefix tuning, against 46.2 zero-shot and 84.7
by cross-entropy. Learning rates of Table 16 for all parameters: {1e-6, 5e-6,
1e-5}. Each step generates 2 x 16 answers; dev rows are scored by F1.
"""

import dataclasses

from configs import opt
from mezo_jax.config import Train


def get_config() -> Train:
  config = opt.get_config('squad')
  return dataclasses.replace(
      config, objective='f1', select='metric',
      optimizer=dataclasses.replace(config.optimizer, learning_rate=5e-6))
