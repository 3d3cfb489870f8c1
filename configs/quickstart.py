"""The quickstart: SmolLM2-135M on movie reviews, without a hub account.

  python train.py
  python train.py --config=configs/quickstart.py:whole      most parameters

The data are short, strongly worded snippets of reviews (at most 15 words, |mean
score| >= 2). The untrained model answers the prompt badly, so that there is
something to learn. (With the prompt "It was" of the MeZO paper, it reaches 82 %
of the dev rows as soon as the prior of its answers is corrected.)

The default trains the last layer, 3.5 of 135 million parameters. The
activations of the other 29 layers are computed once for each row, so a step
takes a hundredth of a second, and 20,000 steps are affordable, as many as in
the paper. The prompt, the number of layers (of 1 and 3), the learning rate (of
4e-4, 5e-4, 7e-4, 1e-3 and 2e-3) and the number of steps were chosen on dev
rows, never on test rows.

`whole` shows MeZO without frozen layers. It trains the embedding and the q, k,
o, gate and up matrices of all layers, 105 million parameters. The matrices v
and down and the norms are not trained: in so few steps, their noise costs more
than they contribute.
"""

from mezo_jax.tasks import Task
from mezo_jax.training.config import Data, Optimizer, Peft, Spsa, Train


def get_config(variant: str = '') -> Train:
  """Returns the config of the last layer, '', or of most parameters, 'whole'.
  """
  if variant not in ('', 'whole'):
    raise KeyError(f'configs/quickstart.py has no variant {variant!r}: use '
                   'quickstart.py or quickstart.py:whole')
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
