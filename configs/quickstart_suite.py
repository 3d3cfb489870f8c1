"""A suite that compares the quickstart, on three seeds, with two alternatives.

  python benchmarks/quickstart.py
  python train.py --config=configs/quickstart_suite.py:seed1/mezo   one of them

Reproduces benchmarks/results/quickstart.md. `mezo` trains the last layer.
`whole` trains most parameters. `adam` trains the last layer by backpropagation
with Adam, for a tenth of the steps and with a learning rate that was not tuned.
The last two are run with one seed.
"""

from mezo_jax.configs import quickstart
from mezo_jax.training.config import Optimizer, Train

SEEDS = (0, 1, 2)


def _config(seed: int, method: str) -> Train:
  config = quickstart.get_config('whole' if method == 'whole' else '')
  config.seed = seed
  if method == 'adam':
    config.method, config.steps, config.eval_every = 'finetune', 2000, 400
    config.optimizer = Optimizer(learning_rate=1e-4, schedule='linear')
  return config


def get_suite() -> dict[str, Train]:
  """Returns the configs of all runs, by seedSEED/METHOD."""
  return {f'seed{seed}/{method}': _config(seed, method) for method, seeds in (
      ('mezo', SEEDS), ('whole', SEEDS[:1]), ('adam', SEEDS[:1]))
          for seed in seeds}


def get_config(name: str = 'seed0/mezo') -> Train:
  """Returns the config of one run, seedSEED/METHOD."""
  return get_suite()[name]
