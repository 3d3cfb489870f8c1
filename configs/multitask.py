"""Llama-2-7B trained on three tasks together: the setting of MaZO.

  python train.py --config=configs/multitask.py

MaZO (Zhang et al., 2025, arXiv:2502.11513) trains Llama-2-7B and Mistral-7B on
several tasks together. The tables of the paper were not available to us, so no
results are quoted. The tasks are SST-2, RTE and BoolQ, with the prompts of the
MeZO paper and 1,000 training rows each. The batch of a step belongs to one
task, which is drawn by weight. The best step is the one with the best mean of
the metrics on the dev rows.
"""

from mezo_jax import tasks
from mezo_jax.training.config import Also, Data, Model, Optimizer, Spsa, Train


def get_config() -> Train:
  """Returns the config of the three tasks."""
  data = lambda: Data(num_train=1000, num_dev=500, num_test=1000, batch_size=16)
  return Train(
      model=Model('meta-llama/Llama-2-7b-hf', dtype='bfloat16'),
      task=tasks.get('sst2'), data=data(),
      also=tuple(Also(name, tasks.get(name), data())
                 for name in ('rte', 'boolq')),
      optimizer=Optimizer(learning_rate=1e-6), spsa=Spsa(eps=1e-3),
      steps=20_000, eval_every=4_000, eval_batch_size=16)
