"""Reads and writes the files of models.

Hugging Face directories, safetensors, GGUF files and the files of torch are
supported. Each reader returns arrays that are read when they are sliced, so
each device loads only its own part. No reader needs torch, and none runs code
from a file.
"""

from mezo_jax.models.formats.huggingface import load, load_config
from mezo_jax.models.formats.save import save

__all__ = ('load', 'load_config', 'save')
