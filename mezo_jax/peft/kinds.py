"""Defines the table of the parts of a model that can be trained.

These are all parameters, newly created adapters, or some of the model's own
parameters.
"""

from collections.abc import Callable
import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
  """Describes one choice of trained parameters.

  Other modules read these flags to prepare the model, for example to add
  adapters or to separate the last layers.
  """

  # Regular expression that is searched for in the paths of parameters. It
  # selects the trained ones; '' selects all.
  pattern: str
  # Description for a model card. Names in braces are replaced by the values of
  # these fields of `config.peft`.
  words: str
  # Regular expression of all new parameters, whether they are trained or not.
  # '' if the choice adds none to the model's own.
  adapter: str = ''
  # Whether the adapter is added to weight matrices, as LoRA is. A new adapter
  # then does not change any output, and a trained one can be merged into the
  # weights.
  added: bool = False
  # Whether the adapter adds soft tokens to the input of the model.
  soft: bool = False
  # Whether the model needs a head of its own, apart from the embedding.
  own_head: bool = False
  # Whether the last layers become a stack of their own; see
  # `mezo_jax.training.methods.layers_apart`.
  last_layers: bool = False
  # Whether factors of the scales of quantised weights are trained.
  factors: bool = False
  # Fields of `config.peft` that this choice reads. A field that no choice lists
  # is read by all of them.
  reads: tuple[str, ...] = ()
  # Function from `config.peft` to the number of positions that the adapter
  # occupies. The maximum length of a text is smaller by this number.
  tokens: Callable = lambda peft: 0
  # Lowest and highest usual learning rate for MeZO, from the hyper-parameter
  # searches in Tables 15 and 16 of Malladi et al. (2023). The paper did not
  # train soft prompts; they get the rates of a prefix here. None if no rates
  # are known.
  usual: tuple[float, float] | None = None
  # The same for backpropagation.
  usual_backprop: tuple[float, float] | None = None


PARTS = {
    '': Part('', 'all', usual=(1e-6, 1e-5), usual_backprop=(1e-5, 1e-4)),
    'lora': Part(
        r'/lora_[ab]$', 'LoRA of `{targets}`, rank {rank}, alpha {alpha:g}',
        adapter=r'/lora_\w+$', added=True,
        reads=('rank', 'alpha', 'rslora', 'targets'), usual=(1e-4, 1e-4),
        usual_backprop=(3e-4, 3e-4)),
    'prefix': Part(
        r'/prefix_[kv]$', 'a prefix of {num_tokens} keys and values per layer',
        adapter=r'/prefix_[kv]$',
        reads=('num_tokens', 'init', 'text', 'positions'),
        tokens=lambda p: p.num_tokens if p.positions != 'zero' else 0,
        usual=(1e-2, 1e-2), usual_backprop=(3e-2, 3e-2)),
    'prompt': Part(
        r'^prompt/', '{num_tokens} soft tokens', adapter=r'^prompt/', soft=True,
        reads=('num_tokens', 'init', 'text'),
        tokens=lambda p: p.num_tokens, usual=(1e-2, 1e-2),
        usual_backprop=(3e-2, 3e-2)),
    'bitfit': Part(r'(^|/)bias$', 'biases'),
    'last_layers': Part(
        r'^last_layers/', 'the last {num_layers} layers', last_layers=True),
    'scales': Part(
        r'/factors$', 'the scales of quantised weights', factors=True),
    'head': Part(
        r'^(lm_head|head|classifier)/', 'the head', own_head=True),
}
