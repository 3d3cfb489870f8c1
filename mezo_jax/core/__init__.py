"""What every other room stands on: parameter paths, quantised weights, meshes,
errors, and workarounds for the compiler.

Nothing in this room evaluates a loss or draws a random number. It imports no
other room.
"""

from mezo_jax.core.errors import InputError
from mezo_jax.core.quantized import Codes, dequantize, quantize
from mezo_jax.core.sharding import make_mesh, on_host, param_shardings

__all__ = ('Codes', 'dequantize', 'InputError', 'make_mesh', 'on_host',
           'param_shardings', 'quantize')
