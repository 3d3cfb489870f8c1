"""MeZO for JAX: fine-tune language models with forward passes only."""

from mezo_jax.mezo import mezo
from mezo_jax.perturb import direction, displace, perturbed
from mezo_jax.spsa import spsa, SpsaState

__all__ = (
    'SpsaState', 'direction', 'displace', 'mezo', 'perturbed', 'spsa')
__version__ = '0.1.0'
