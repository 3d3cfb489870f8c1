"""Fine-tunes few parameters: LoRA, prefixes, soft prompts or last layers.

`lora` and `prefix` create adapters. `join` adds them to the parameters of a
model, which then uses them in every forward pass. `split` separates the trained
from the frozen parameters; `TRAINED` maps the name of each kind to the regular
expression that `split` takes for it. `load` and `save` read and write adapters
in the format of Hugging Face's PEFT.
"""

from mezo_jax.core import extras

extras.require(__name__, 'flax', 'safetensors')

from mezo_jax.core.trees import join
from mezo_jax.peft import lora, prefix
from mezo_jax.peft.files import describe, files_of, load, save
from mezo_jax.peft.kinds import PARTS
from mezo_jax.peft.layout import join_layers, split_layers, untie, untied
from mezo_jax.peft.parts import factors, split

TRAINED = {name: part.pattern for name, part in PARTS.items()}

__all__ = ('TRAINED', 'describe', 'factors', 'files_of', 'join',
           'join_layers', 'load', 'lora', 'prefix', 'save', 'split',
           'split_layers', 'untie', 'untied')
