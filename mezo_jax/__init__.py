"""MeZO for JAX: fine-tune language models with forward passes only."""

import importlib

from mezo_jax._mezo import mezo
from mezo_jax._perturb import direction, displace, perturbed
from mezo_jax._spsa import spsa, SpsaState

__all__ = (
    'SpsaState', 'direction', 'displace', 'mezo', 'perturbed', 'spsa')
__version__ = '0.1.0'


def __getattr__(name):  # the mathematics needs no flax, the models do
  if name == 'models':
    return importlib.import_module('mezo_jax.models')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
