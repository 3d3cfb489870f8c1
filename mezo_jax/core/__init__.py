"""Holds what every other room builds on.

Parameter paths and masks, quantised weights, meshes and shardings, checks of
arguments, errors, fingerprints and workarounds for the compiler are here.
Nothing in this room evaluates a loss or draws a random number, and it imports
no other room.
"""

from mezo_jax.core.errors import InputError
from mezo_jax.core.quantized import Codes, dequantize, quantize
from mezo_jax.core.sharding import make_mesh, on_host, param_shardings

__all__ = ('Codes', 'dequantize', 'InputError', 'make_mesh', 'on_host',
           'param_shardings', 'quantize')
