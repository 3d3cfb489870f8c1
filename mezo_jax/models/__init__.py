"""Language models as Flax modules, read from Hugging Face files."""

from mezo_jax.models.hub import load, load_tokenizer
from mezo_jax.models.transformer import Config, Transformer

__all__ = ('Config', 'Transformer', 'load', 'load_tokenizer')
