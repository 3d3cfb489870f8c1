"""Three tasks at once, in the setting of MaZO: one model for all of them.

  python train.py --config=configs/multitask.py

MaZO (Zhang et al., 2025, arXiv:2502.11513) trains Llama-2-7B and Mistral-7B on
several tasks together; its tables are out of our reach, so nothing is quoted.
SST-2, RTE and BoolQ with the paper's (MeZO's) prompts and 1,000 rows each. The
batch of a step is of one task, drawn by weight; the best step is that with the
best mean on dev rows.
"""

from mezo_jax import tasks
from mezo_jax.training.config import Also, Data, Model, Optimizer, Spsa, Train


def get_config() -> Train:
  data = lambda: Data(num_train=1000, num_dev=500, num_test=1000, batch_size=16)
  return Train(
      model=Model('meta-llama/Llama-2-7b-hf', dtype='bfloat16'),
      task=tasks.get('sst2'), data=data(),
      also=tuple(Also(name, tasks.get(name), data())
                 for name in ('rte', 'boolq')),
      optimizer=Optimizer(learning_rate=1e-6), spsa=Spsa(eps=1e-3),
      steps=20_000, eval_every=4_000, eval_batch_size=16)
