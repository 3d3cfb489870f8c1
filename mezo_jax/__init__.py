"""MeZO for JAX: fine-tune language models with forward passes only."""

import importlib

from mezo_jax.core.quantized import Codes, dequantize, quantize
from mezo_jax.directions.base import Directions, Normal, Rademacher
from mezo_jax.directions.displacement import Displacement
from mezo_jax.directions.low_rank import LazyLowRank, LowRank
from mezo_jax.directions.subzero import SubZero
from mezo_jax.perturb.api import dequantized, direction, displace, perturbed
from mezo_jax.transforms.evaluate_points import (
  Combine,
  estimate,
  fzoo,
  one_sided,
  two_sided,
)
from mezo_jax.transforms.mezo import mezo
from mezo_jax.transforms.not_finite import skip_not_finite
from mezo_jax.transforms.spsa import spsa, SpsaState
from mezo_jax.transforms.step import make_step
from mezo_jax.transforms.stochastic_rounding import round_stochastically

__all__ = (
    'Codes', 'Combine', 'Directions', 'Displacement', 'LazyLowRank', 'LowRank',
    'Normal', 'Rademacher', 'SpsaState', 'SubZero', 'dequantize',
    'dequantized', 'direction', 'displace', 'estimate', 'fzoo', 'make_step',
    'mezo', 'one_sided', 'perturbed', 'quantize', 'round_stochastically',
    'skip_not_finite', 'spsa', 'two_sided')
__version__ = '0.1.0'


def __getattr__(name):  # the mathematics needs no flax, the rest does
  if name in ('models', 'peft', 'tasks', 'variants'):
    return importlib.import_module(f'mezo_jax.{name}')
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
