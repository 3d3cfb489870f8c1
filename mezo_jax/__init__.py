"""MeZO for JAX: fine-tune language models with forward passes only."""

import importlib

from mezo_jax._codes import Codes, dequantize, quantize
from mezo_jax._directions import Directions, Normal, Rademacher, Sphere
from mezo_jax._displacement import Displacement
from mezo_jax._estimate import (
  Combine,
  estimate,
  fzoo,
  one_sided,
  two_sided,
)
from mezo_jax._lowrank import LazyLowRank, LowRank
from mezo_jax._mezo import mezo
from mezo_jax._perturb import dequantized, direction, displace, perturbed
from mezo_jax._rounding import round_stochastically
from mezo_jax._skip import skip_not_finite
from mezo_jax._spsa import spsa, SpsaState
from mezo_jax._subzero import SubZero

__all__ = (
    'Codes', 'Combine', 'Directions', 'Displacement', 'LazyLowRank', 'LowRank',
    'Normal', 'Rademacher', 'Sphere', 'SpsaState', 'SubZero', 'dequantize',
    'dequantized', 'direction', 'displace', 'estimate', 'fzoo', 'make_step',
    'mezo', 'one_sided', 'perturbed', 'quantize', 'round_stochastically',
    'skip_not_finite', 'spsa', 'two_sided')
__version__ = '0.1.0'


def __getattr__(name):  # the mathematics needs no flax, the rest does
  if name in ('models', 'variants'):
    return importlib.import_module(f'mezo_jax.{name}')
  if name == 'make_step':
    return importlib.import_module('mezo_jax.step').make_step
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
