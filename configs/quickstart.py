"""The quickstart: SmolLM2-135M on movie reviews, with no hub and no account.

  python train.py
"""

from mezo_jax.config import Data, Optimizer, Task, Train


def get_config() -> Train:
  return Train(
      task=Task(template='{text} It was', label_words=(' terrible', ' great')),
      data=Data(num_train=1000, num_dev=200, num_test=400, max_length=128,
                buckets=(24, 32, 48, 96, 128), batch_size=16),
      optimizer=Optimizer(
          learning_rate=1e-4, schedule='linear', eps=1e-3,
          distribution='rademacher', generator='hash32'),
      steps=150, eval_every=50, checkpoint_every=50)
