"""The quickstart: SmolLM2-135M on movie reviews, with no hub and no account.

  python train.py

Short, strongly worded snippets (at most 15 words, |mean score| >= 2) and a
question that the model answers badly as it is, so that there is something to
learn. (With the paper's "It was" it stands at 82 % of the dev rows as soon as
its prior is corrected, and 200 steps add nothing to that.) Trained are the
embedding and the q, k, o, gate and up matrices, 105 of 135 million parameters:
noise along v, down and the norms costs more than they give in so few steps.
Prompt, parameters, learning rate and number of steps were chosen on dev rows,
never on test rows.
"""

from mezo_jax.config import Data, Optimizer, Peft, Spsa, Train
from mezo_jax.tasks import Task


def get_config() -> Train:
  return Train(
      task=Task(template='{text} Recommended:', label_words=(' no', ' yes')),
      data=Data(train='quickstart', num_train=600, num_dev=300, num_test=400,
                max_length=64, buckets=(16, 24, 32, 64), batch_size=16),
      optimizer=Optimizer(learning_rate=1.5e-4, schedule='linear'),
      spsa=Spsa(eps=1e-3, distribution='rademacher'),
      peft=Peft(mask='embed|attn/(q|k|o)|mlp/(gate|up)'),
      steps=200, eval_every=50, checkpoint_every=50)
