"""MeZO for JAX: fine-tune language models with forward passes only."""

import importlib

from mezo_jax._directions import (
  Directions,
  Displacement,
  Normal,
  Rademacher,
  Sphere,
)
from mezo_jax._mezo import mezo
from mezo_jax._perturb import direction, displace, perturbed
from mezo_jax._rounding import round_stochastically
from mezo_jax._skip import skip_not_finite
from mezo_jax._spsa import (
  Combine,
  estimate,
  one_sided,
  spsa,
  SpsaState,
  two_sided,
)

__all__ = (
    'Combine', 'Directions', 'Displacement', 'Normal', 'Rademacher', 'Sphere',
    'SpsaState', 'direction', 'displace', 'estimate', 'make_step', 'mezo',
    'one_sided', 'perturbed', 'round_stochastically', 'skip_not_finite', 'spsa',
    'two_sided')
__version__ = '0.1.0'


def __getattr__(name):  # the mathematics needs no flax, the rest does
  if name == 'models':
    return importlib.import_module('mezo_jax.models')
  if name == 'make_step':
    return importlib.import_module('mezo_jax.step').make_step
  raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
