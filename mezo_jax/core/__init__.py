"""Provides the basics that all other packages of this library build on.

These are parameter paths and masks, quantised weights, meshes and shardings,
argument checks, errors, fingerprints and workarounds for the compiler. Nothing
here evaluates a loss or draws a random number, and this package imports none of
the others.
"""

from mezo_jax.core.errors import InputError
from mezo_jax.core.quantized import dequantize, quantize, QuantizedArray
from mezo_jax.core.sharding import make_mesh, on_host, param_shardings

__all__ = ('QuantizedArray', 'dequantize', 'InputError', 'make_mesh', 'on_host',
           'param_shardings', 'quantize')
