"""Provides optax transforms: SPSA, MeZO, and others that compose with them.

`spsa` evaluates losses at a few displacements and turns them into updates.
`mezo` is the whole optimizer. Other transforms accumulate updates, round them
to half precision, or skip steps whose loss is not finite. `make_step` compiles
a chain of transforms into a training step.
"""

from mezo_jax.transforms.combine import Combine, fzoo, one_sided, two_sided
from mezo_jax.transforms.estimator import (
    Estimator,
    Numbers,
    Spsa,
    SpsaOptions,
    SpsaState,
    unless_skipped,
)
from mezo_jax.transforms.evaluate_points import estimate
from mezo_jax.transforms.mezo import mezo
from mezo_jax.transforms.not_finite import skip_not_finite
from mezo_jax.transforms.spsa import spsa
from mezo_jax.transforms.step import make_step
from mezo_jax.transforms.stochastic_rounding import round_stochastically
from mezo_jax.transforms.types import ZerothOrderTransformation

__all__ = ('Combine', 'estimate', 'Estimator', 'fzoo', 'make_step', 'mezo',
           'Numbers', 'one_sided', 'round_stochastically', 'skip_not_finite',
           'Spsa', 'spsa', 'SpsaOptions', 'SpsaState', 'two_sided',
           'unless_skipped', 'ZerothOrderTransformation')
