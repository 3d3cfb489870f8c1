"""Fine-tuning with few parameters: LoRA, prefixes, soft prompts, last layers.

Each function returns leaves to `mezo_jax.peft.join` to a model's parameters,
which then has them wherever it is applied; `TRAINED` says which of all leaves
are trained, for `mezo_jax.peft.split`.
"""

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
