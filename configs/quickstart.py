"""The quickstart: SmolLM2-135M on movie reviews, with no hub and no account.

  python train.py
  python train.py --config=configs/quickstart.py:whole      all layers

Short, strongly worded snippets (at most 15 words, |mean score| >= 2) and a
question that the model answers badly as it is, so that there is something to
learn. (With the paper's "It was" it stands at 82 % of the dev rows as soon as
its prior is corrected.)

The last layer is trained, 3.5 of 135 million parameters, so the other 29 are
computed once for each row and a step takes a hundredth of a second: 20,000
steps, as many as in the paper. Prompt, layers (of 1 and 3), learning rate (of
4e-4, 5e-4, 7e-4, 1e-3 and 2e-3) and number of steps were chosen on dev rows,
never on test rows.

`whole` trains the embedding and the q, k, o, gate and up matrices of all
layers, 105 million parameters (noise along v, down and the norms costs more
than they give in so few steps): what MeZO is without anything frozen.
"""

from mezo_jax.tasks import Task
from mezo_jax.training.config import Data, Optimizer, Peft, Spsa, Train


def get_config(variant: str = '') -> Train:
  if variant not in ('', 'whole'):
    raise KeyError(f'configs/quickstart.py has no variant {variant!r}: leave '
                   'it out, or take whole')
  config = Train(
      task=Task(template='{text} Recommended:', label_words=(' no', ' yes')),
      data=Data(train='quickstart', num_train=600, num_dev=300, num_test=400,
                max_length=64, buckets=(16, 24, 32, 64), batch_size=16),
      optimizer=Optimizer(learning_rate=5e-4, schedule='linear'),
      spsa=Spsa(eps=1e-3, distribution='rademacher'),
      peft=Peft(method='last_layers', num_layers=1),
      steps=20_000, eval_every=4_000, checkpoint_every=2_000)
  if variant == 'whole':
    config.peft = Peft(mask='embed|attn/(q|k|o)|mlp/(gate|up)')
    config.optimizer.learning_rate = 1.5e-4
    config.steps, config.eval_every, config.checkpoint_every = 200, 50, 50
  return config
