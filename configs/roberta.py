"""The paper's RoBERTa-large rows: six tasks, k labelled rows of each class.

  python train.py --config=configs/roberta.py:sst2,512,13     task, k, seed

Reproduces (Malladi et al., 2023, Table 18, MeZO, mean (std) of the seeds 13,
21, 42, 87 and 100; hyper-parameters of Table 15):

             SST-2       SST-5       SNLI        MNLI        RTE         TREC
  zero-shot  79.0        35.5        50.2        48.8        51.4        32.0
  k = 16     90.5 (1.2)  45.5 (2.0)  68.5 (3.9)  58.7 (2.5)  64.0 (3.3)  76.9
                                                                        (2.7)
  k = 512    93.3 (0.7)  53.2 (1.4)  83.0 (1.0)  78.3 (0.5)  78.6 (2.0)  94.3
                                                                        (1.3)

The paper searched learning rates {1e-7, 1e-6, 1e-5}. Other rows are the same
file with another method: zero_shot, linear_probe, lp_mezo, or

  --config.method=finetune --config.optimizer.learning_rate=1e-5
    --config.data.batch_size=8 --config.steps=1000 --config.eval_every=100
    --config.optimizer.schedule=linear

Accuracy itself as the objective (Table 3, k = 512: SST-2 92.7, SST-5 48.9,
SNLI 82.7, TREC 68.6) is --config.objective=accuracy.
"""

from mezo_jax import tasks
from mezo_jax.config import Data, Model, Optimizer, Train

TASKS = ('sst2', 'sst5', 'snli', 'mnli', 'rte', 'trec')


def get_config(spec: str = 'sst2,16,13') -> Train:
  task, k, seed = spec.split(',')
  pair = task in ('snli', 'mnli', 'rte')
  return Train(
      model=Model('FacebookAI/roberta-large', dtype='float32'),
      task=tasks.get(f'roberta_{task}'),
      data=Data(k_shot=int(k), seed=int(seed), num_test=1000, test_seed=42,
                max_length=256 if pair else 128, batch_size=64),
      optimizer=Optimizer(learning_rate=1e-6, eps=1e-3),
      seed=int(seed), steps=100_000, eval_every=10_000, eval_batch_size=64)
