"""Language models as Flax modules, read from and written to files."""

from mezo_jax.models.formats.huggingface import (
           FAMILIES,
           find,
           float_dtype,
           load,
           load_config,
           load_tokenizer,
           param_shapes,
           read_config,
)
from mezo_jax.models.formats.save import save
from mezo_jax.models.generate import generate
from mezo_jax.models.known import find as find_known
from mezo_jax.models.layers import Config, Rope
from mezo_jax.models.transformer import apply, make_cache, Transformer

__all__ = ('apply', 'Config', 'FAMILIES', 'find', 'find_known', 'float_dtype',
           'generate', 'load', 'load_config', 'load_tokenizer', 'make_cache',
           'param_shapes', 'read_config', 'Rope', 'save',
           'Transformer')
