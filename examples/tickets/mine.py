"""Finds the team that a customer's message is for: billing, delivery or repair.

  python make_tickets.py
  mezo-jax train --config=mine.py --workdir=runs/tickets
  mezo-jax predict runs/tickets --data=new.csv
"""

from mezo_jax.tasks import Task
from mezo_jax.training.config import (
  Data,
  Model,
  Optimizer,
  Peft,
  Spsa,
  Train,
)


def get_config() -> Train:
  return Train(
      model=Model('quickstart'),  # or a directory, a hub id, FILE.gguf
      task=Task(
          template='{text}\nThis message is about',
          label_column='team',
          label_names=('billing', 'delivery', 'repair'),
          label_words=(' payment', ' delivery', ' repair')),
      data=Data(
          train='tickets.csv',
          num_train=-1, num_dev=-1, num_test=-1,  # 60, 20 and 20 %
          max_length=64, batch_size=16),
      peft=Peft(method='last_layers', num_layers=1),
      optimizer=Optimizer(learning_rate=5e-4),
      spsa=Spsa(eps=1e-3, distribution='rademacher'),
      steps=2_000, eval_every=500, checkpoint_every=500)
