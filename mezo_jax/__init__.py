"""Fine-tunes language models with forward passes only: MeZO for JAX.

This module exports the optimizer and its parts, which need only jax, numpy and
optax. The packages `models`, `peft`, `tasks`, `training` and `variants` and the
modules `sharding` and `replay` are imported on first use. Some of them need the
packages of ``mezo_jax[train]``.
"""

import importlib
from typing import Any, TYPE_CHECKING

from mezo_jax.core import arguments
from mezo_jax.core.quantized import dequantize, quantize, QuantizedArray
from mezo_jax.directions.base import Directions, Normal, Rademacher
from mezo_jax.directions.displacement import Displacement, Multiplier
from mezo_jax.directions.low_rank import LazyLowRank, LowRank
from mezo_jax.directions.subzero import SubZero
from mezo_jax.perturb.api import dequantized, direction, displace, perturbed
from mezo_jax.transforms.anchored import anchored
from mezo_jax.transforms.combine import (
  antithetic_centered_rank,
  antithetic_per_prompt,
  antithetic_z_score,
  centered_rank,
  Combine,
  fzoo,
  one_sided,
  per_prompt,
  two_sided,
  z_score,
)
from mezo_jax.transforms.estimator import Estimator, Numbers, SpsaState
from mezo_jax.transforms.evaluate_points import estimate
from mezo_jax.transforms.mezo import mezo
from mezo_jax.transforms.not_finite import skip_not_finite
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.step import make_step
from mezo_jax.transforms.stochastic_rounding import round_stochastically
from mezo_jax.transforms.types import ZerothOrderTransformation

if TYPE_CHECKING:  # at run time, __getattr__ imports these on first use
  from mezo_jax import models as models
  from mezo_jax import peft as peft
  from mezo_jax import tasks as tasks
  from mezo_jax import training as training
  from mezo_jax import variants as variants
  from mezo_jax.core import sharding as sharding
  from mezo_jax.runs import replay as replay

__all__ = (
    'QuantizedArray', 'Combine', 'Directions', 'Displacement', 'Estimator',
    'LazyLowRank', 'LowRank', 'Multiplier', 'Normal', 'Numbers', 'Rademacher',
    'SpsaState', 'SubZero', 'anchored', 'antithetic_centered_rank',
    'antithetic_per_prompt', 'antithetic_z_score', 'centered_rank',
    'dequantize', 'dequantized', 'direction', 'displace', 'estimate', 'fzoo',
    'make_step', 'mezo', 'one_sided', 'per_prompt', 'perturbed', 'quantize',
    'round_stochastically', 'skip_not_finite', 'spsa', 'two_sided', 'z_score',
    'ZerothOrderTransformation')
__version__ = '0.2.0'

_IMPORTED_WHEN_USED = {
    'models': 'mezo_jax.models',
    'peft': 'mezo_jax.peft',
    'replay': 'mezo_jax.runs.replay',
    'sharding': 'mezo_jax.core.sharding',
    'tasks': 'mezo_jax.tasks',
    'training': 'mezo_jax.training',
    'variants': 'mezo_jax.variants',
}


def __getattr__(name: str) -> Any:
  """Imports a package or module on first use (PEP 562)."""
  if name in _IMPORTED_WHEN_USED:
    return importlib.import_module(_IMPORTED_WHEN_USED[name])
  if name == 'Codes':
    arguments.warn_renamed('Codes', 'QuantizedArray')
    return QuantizedArray
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
  """Returns all names, including those that are not imported yet."""
  return sorted({*globals(), *_IMPORTED_WHEN_USED})
