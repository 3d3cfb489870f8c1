"""Fine-tunes with few parameters: LoRA, prefixes, soft prompts, last layers.

`lora` and `prefix` create parameters that `join` adds to those of a model, and
the model then uses them wherever it is applied. `TRAINED` maps the name of each
kind to an expression for the paths of the parameters that it trains, which
`split` takes. `load` and `save` read and write adapters as PEFT does.
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
