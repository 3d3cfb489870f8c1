"""Fine-tunes a language model with forward passes only (MeZO), or evaluates a
baseline (--config.method).

  python train.py                                   runs the quickstart
  python train.py --config.data.train=FILE ...      trains on your own data
  python train.py --config=configs/NAME.py --config.FIELD=VALUE --workdir=DIR

Run the same command again to resume a run that was stopped. The function
`mezo_jax.training.run` does the work; this file only parses the command line.
"""

from pathlib import Path
import signal

if __name__ == '__main__':
  # The imports below take seconds. Ctrl-C should end them without a traceback.
  ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

from mezo_jax.cli import train_command
from mezo_jax.training import run

if __name__ == '__main__':
  signal.signal(signal.SIGINT, ctrl_c)
  train_command.main(run, Path(__file__).parent / 'configs')
