"""Evaluates functions at θ + Σ c·z without building θ + Σ c·z.

An interpreter of jaxprs adds z to a parameter just before an operation uses the
parameter. It has rules for products, for indexing and for control flow.
`perturbed` and `dequantized` call the interpreter. `displace` and `direction`
build θ + Σ c·z and Σ c·z as trees of arrays.
"""

from mezo_jax.perturb.api import dequantized, direction, displace, perturbed

__all__ = ('dequantized', 'direction', 'displace', 'perturbed')
