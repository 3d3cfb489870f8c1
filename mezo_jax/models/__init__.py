"""Language models as Flax modules, read from Hugging Face files."""

from mezo_jax.models.hub import FAMILIES, load, load_tokenizer, param_shapes
from mezo_jax.models.transformer import Config, Transformer

__all__ = ('Config', 'FAMILIES', 'Transformer', 'load', 'load_tokenizer',
           'param_shapes')
