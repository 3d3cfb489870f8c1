"""MeZO-SVRG's four GLUE tasks without a prompt: the MeZO they compare with.

  python train.py --config=configs/glue.py:mnli

Reproduces the setting of (Gautam et al., 2024, Section 5): RoBERTa-large with a
new classification head, 512 training rows, 256 for testing, batches of 64,
sequences of 128 tokens, all parameters, 32,000 epochs of 8 steps. The paper
reports for MeZO about MNLI 43, QNLI 59, SST-2 56, CoLA 68 (accuracy, %).
"""

from mezo_jax import tasks
from mezo_jax.config import Data, Model, Optimizer, Spsa, Train

TASKS = ('mnli', 'qnli', 'sst2', 'cola')


def get_config(task: str = 'mnli') -> Train:
  return Train(
      model=Model('FacebookAI/roberta-large', dtype='float32'),
      task=tasks.get(f'glue_{task}'),
      data=Data(num_train=512, num_dev=256, num_test=256, max_length=128,
                batch_size=64),
      optimizer=Optimizer(learning_rate=1e-6), spsa=Spsa(eps=1e-3),
      steps=256_000, eval_every=8_000)
