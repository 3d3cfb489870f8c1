"""Data of your own: what `python train.py` starts from where no --config is
given and --config.data.train names your data.

  python train.py --config.data.train=FILE.jsonl --config.model.name=MODEL
      --config.task.template='{sentence} It was'
      --config.task.label_words="(' terrible', ' great')"
  python train.py --config=configs/own.py:last_layer ...     or lora

The settings are the paper's (Malladi et al., 2023) for all parameters: they are
a start for any model and were searched for on none of your data. Try learning
rates first. The learning rate is constant, so you may change `steps` when you
run the same command again, and go on.

* `last_layer` trains the last layer alone. The layers below are computed once
  for each row, so that a step is a hundred times cheaper: the choice for a CPU.
* `lora` trains a LoRA of the queries and values.

60 % of the rows are for training, 20 % (at most 500) choose the best step and
20 % (at most 1,000) are for testing, unless you give numbers (`data.num_train`,
`num_dev`, `num_test`) or a test file (`data.test`). All other fields are in
mezo_jax/training/config.py; put those that you change often into a file like
this one.
"""

from mezo_jax.training.config import Data, Optimizer, Peft, Spsa, Train

VARIANTS = ('', 'last_layer', 'lora')


def get_config(variant: str = '') -> Train:
  if variant not in VARIANTS:
    raise KeyError(f'configs/own.py has no variant {variant!r}: leave it out, '
                   'or take last_layer or lora')
  config = Train(
      data=Data(num_train=-1, num_dev=-1, num_test=-1, batch_size=16),
      optimizer=Optimizer(learning_rate=1e-6, schedule='constant'),
      spsa=Spsa(eps=1e-3),
      steps=20_000, eval_every=1_000, checkpoint_every=1_000)
  if variant == 'last_layer':
    config.peft = Peft(method='last_layers', num_layers=1)
    config.optimizer.learning_rate = 2e-4
  if variant == 'lora':
    config.peft = Peft(method='lora', rank=8, alpha=16)
    config.optimizer.learning_rate, config.spsa.eps = 1e-4, 1e-2
  return config
