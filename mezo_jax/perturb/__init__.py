"""Evaluates a function at θ + Σ c·z without building θ + Σ c·z.

An interpreter of jaxprs adds z to a parameter where an operation consumes it,
by rules for products, indexing and control flow. `perturbed` is its entry;
`displace` and `direction` build what it avoids to build.
"""

from mezo_jax.perturb.api import dequantized, direction, displace, perturbed

__all__ = ('dequantized', 'direction', 'displace', 'perturbed')
