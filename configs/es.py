"""Evolution strategies on rewards of generated answers.

  python train.py --config=configs/es.py --config.data.train=PROMPTS.jsonl
      --config.reward.function=my_rewards.py:reward --config.model.name=MODEL
  python train.py --config=configs/es.py:eggroll ...

Each row of PROMPTS.jsonl has a column `prompt` and whatever the reward needs.
`reward(text, row)` returns a number, or a dict of named numbers that are added
up. `task.chat` puts the prompt into the chat template of the tokenizer; set it
to False for a base model, and `task.template` for other columns.

* `es.py` has the settings of Evolution strategies at scale (Qiu et al., 2025,
  Table 4): 30 members, one after the other, that all answer the same 200
  prompts greedily, z-scores of their mean rewards, sigma (`spsa.eps`) 1e-3, and
  alpha (`optimizer.learning_rate`), which contains 1 / sigma, 5e-4.
* `es.py:eggroll` has those of EGGROLL (Sarkar et al., 2025): 1,024 members, 512
  directions of rank 1 and their mirror images, that share each product with
  the weights and answer 16 prompts together, and the score of a member on a
  prompt minus the prompt's mean. The rates are those of a replication.

If you change the number of members n, scale alpha with sqrt(n). docs/rewards.md
says what to watch.
"""

from mezo_jax.tasks import Task
from mezo_jax.training.config import Data, Optimizer, Spsa, Train

VARIANTS = ('', 'eggroll')


def get_config(variant: str = '') -> Train:
  """Returns the config of a variant; '' is Evolution strategies at scale."""
  if variant not in VARIANTS:
    raise KeyError(f'configs/es.py has no variant {variant!r}: use es.py or '
                   'es.py:eggroll')
  config = Train(
      objective='reward',
      task=Task(kind='generation', template='{prompt}', chat=True, stop='',
                max_new_tokens=512),
      data=Data(num_train=200, num_dev=-1, num_test=-1, batch_size=200),
      optimizer=Optimizer(learning_rate=5e-4),
      spsa=Spsa(eps=1e-3, num_samples=30, combine='z_score'),
      steps=500, eval_every=50, checkpoint_every=10)
  if variant == 'eggroll':
    config.data.batch_size = 16
    config.optimizer.learning_rate = 2e-4
    config.spsa = Spsa(
        eps=1e-3, num_samples=512, combine='antithetic_per_prompt',
        distribution='low_rank', rank=1, over='batch')
  return config
