"""Fine-tunes a language model with forward passes only (MeZO), or evaluates
what that is compared with (--config.method).

  python train.py                                   the quickstart
  python train.py --config.data.train=FILE ...      data of your own
  python train.py --config=configs/NAME.py --config.FIELD=VALUE --workdir=DIR

Run the same command again to resume a run that was stopped. The run itself is
`mezo_jax.training.run`.
"""

from pathlib import Path
import signal

if __name__ == '__main__':  # Ctrl-C while importing needs no traceback
  ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

from mezo_jax.cli import train_command
from mezo_jax.training import run

if __name__ == '__main__':
  signal.signal(signal.SIGINT, ctrl_c)
  train_command.main(run, Path(__file__).parent / 'configs')
