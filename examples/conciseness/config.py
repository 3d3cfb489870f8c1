"""Teaches a chat model to answer briefly, by evolution strategies.

  python train.py --config=examples/conciseness/config.py

The experiment of Evolution strategies at scale (Qiu et al., 2025), at the size
of a laptop. The reward of an answer falls from 1, if it is as long as a
reference, to 0, if its length differs by 200 characters or more. It has no
derivative. Two prompts are trained on, and eight others are held out. A step
takes the memory of inference.

`anchored` decays the weights towards those before training, so that the model
forgets less.
"""

from pathlib import Path

from mezo_jax.tasks import Task
from mezo_jax.training.config import Data, Optimizer, Reward, Spsa, Train

HERE = Path(__file__).parent
WORST = 200  # difference in characters that has the reward 0


def reward(text, row):
  """Returns 1 for an answer as long as the reference, 0 for a much longer one.
  """
  return 1 - min(abs(len(text) - len(row['answer'])) / WORST, 1)


def get_config(variant=''):
  """Returns the config; the variant is '' or 'anchored'."""
  if variant not in ('', 'anchored'):
    raise KeyError(f'there is no variant {variant!r}: use anchored')
  config = Train(
      objective='reward', reward=Reward(function=reward, kl=True),
      task=Task(kind='generation', template='{prompt}', chat=True, stop='',
                answers_column='answer', max_new_tokens=32),
      # Each step uses both training prompts. The prompts that are held out show
      # progress; with so few, there are no others for testing.
      data=Data(train=str(HERE / 'train.jsonl'), num_train=2, batch_size=2,
                dev=str(HERE / 'held_out.jsonl'), num_dev=0,
                test=str(HERE / 'held_out.jsonl'), num_test=0),
      # With the paper's eps, 1e-3, 53 to 97 % of the members of this small
      # model answer alike. The learning rate is half of eps, as in the paper.
      optimizer=Optimizer(learning_rate=1.5e-3),
      spsa=Spsa(eps=3e-3, num_samples=30, combine='z_score',
                distribution='low_rank', rank=1, over='batch'),
      steps=40, eval_every=10, checkpoint_every=10)
  if variant == 'anchored':
    config.optimizer.weight_decay = 10.0
    config.optimizer.decay_to = 'start'
  return config
