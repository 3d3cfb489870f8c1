"""Compares zero-shot, a linear probe and MeZO on the tickets.

  mezo-jax evaluate --suite=suite.py
"""

from pathlib import Path
import runpy

HERE = Path(__file__).parent
METHODS = ('zero_shot', 'linear_probe', 'mezo')


def _config(method):
  config = runpy.run_path(str(HERE / 'mine.py'))['get_config']()
  config.method = method
  config.data.train = str(HERE / 'tickets.csv')
  if method != 'mezo':
    config.peft.method = ''  # these train nothing of the model
  return config


def get_suite():
  return {f'tickets/{method}': _config(method) for method in METHODS}


def get_config(name='tickets/mezo'):
  return get_suite()[name]
