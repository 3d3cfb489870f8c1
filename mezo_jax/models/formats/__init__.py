"""Reads and writes the files of models.

Hugging Face directories with safetensors or PyTorch files, and GGUF files are
supported. Readers return tensors whose data are read only when they are sliced,
so that each device loads only its own part. No reader needs torch or runs code
from a file.
"""

from mezo_jax.models.formats.huggingface import load, load_config
from mezo_jax.models.formats.save import save

__all__ = ('load', 'load_config', 'save')
