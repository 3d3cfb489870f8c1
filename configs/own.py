"""A config for your own data. `python train.py` uses it by default if
--config.data.train names your data.

  python train.py --config.data.train=FILE.jsonl --config.model.name=MODEL
      --config.task.template='{sentence} It was'
      --config.task.label_words="(' terrible', ' great')"
  python train.py --config=configs/own.py:last_layer ...     or lora

The settings are those of Malladi et al. (2023) for all parameters. They are a
starting point for any model and were not tuned for your data; search over the
learning rate first. The learning rate is constant, so you may increase `steps`
and run the same command again to continue.

* `last_layer` trains only the last layer. The activations of the layers below
  are computed once for each row, which makes a step about a hundred times
  cheaper. Choose it on a CPU.
* `lora` trains LoRA on the queries and values.

Of your rows, 60 % are for training, 20 % (at most 500) select the best step,
and 20 % (at most 1,000) are for testing, unless you set the numbers
(`data.num_train`, `num_dev`, `num_test`) or a test file (`data.test`). All
other fields are in mezo_jax/training/config.py. Put those that you set often
into a file like this one.
"""

from mezo_jax.training.config import Data, Optimizer, Peft, Spsa, Train

VARIANTS = ('', 'last_layer', 'lora')


def get_config(variant: str = '') -> Train:
  """Returns the config of a variant; '' trains all parameters."""
  if variant not in VARIANTS:
    raise KeyError(f'configs/own.py has no variant {variant!r}: use own.py, '
                   'own.py:last_layer or own.py:lora')
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
