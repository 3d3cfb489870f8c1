"""Provides language models as Flax modules, and reads and writes their files.

`load` reads a Hugging Face directory, a model of the hub or a GGUF file into a
`Transformer` and its parameters; `save` writes them. `generate` continues
prompts. The package `families` describes the supported families of models, one
per module, and `formats` contains all code that depends on the layout of files.
"""

from mezo_jax.core import extras

extras.require(__name__, 'flax', 'gguf', 'safetensors', 'tqdm')

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
