"""Reads and writes models: Hugging Face directories, safetensors, GGUF files
and files of torch.

Each reader gives arrays that are read when they are sliced, so that each
device loads its part alone. No reader needs torch or runs code of a file.
"""

from mezo_jax.models.formats.huggingface import load, load_config
from mezo_jax.models.formats.save import save

__all__ = ('load', 'load_config', 'save')
