"""Evaluates a function at θ + Σ c·z without building θ + Σ c·z.

An interpreter of jaxprs adds z to a parameter where an operation consumes it;
it has rules for products, for indexing and for control flow. `perturbed` and
`dequantized` are its entries. `displace` and `direction` build θ + Σ c·z and
Σ c·z where they are wanted as arrays.
"""

from mezo_jax.perturb.api import dequantized, direction, displace, perturbed

__all__ = ('dequantized', 'direction', 'displace', 'perturbed')
