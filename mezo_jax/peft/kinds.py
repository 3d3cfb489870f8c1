"""The table of what can be trained: all parameters, adapters, or a few of
them."""

from collections.abc import Callable
import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
  """Which parameters are trained."""

  pattern: str  # regular expression of their paths
  words: str  # of a model card, with the fields of `config.peft` in braces
  adapter: str = ''  # the same of all that is not the model's own
  added: bool = False  # to matrices: new ones change nothing; can be merged
  soft: bool = False  # tokens that are put into the rows themselves
  own_head: bool = False  # a head apart from the embedding is made
  last_layers: bool = False  # layers are set apart; see `layers_apart`
  factors: bool = False  # of quantised weights, which stay as they are
  reads: tuple[str, ...] = ()  # fields of `config.peft` that it alone reads
  # `tokens(config.peft)`: positions that a text has less.
  tokens: Callable = lambda peft: 0
  # Learning rates of the paper's searches (Tables 15 and 16); it has no soft
  # prompts, for which a prefix's stand here.
  usual: tuple[float, float] | None = None
  usual_backprop: tuple[float, float] | None = None


PARTS = {
    '': Part('', 'all', usual=(1e-6, 1e-5), usual_backprop=(1e-5, 1e-4)),
    'lora': Part(
        r'/lora_[ab]$', 'LoRA of `{targets}`, rank {rank}, alpha {alpha:g}',
        adapter=r'/lora_\w+$', added=True,
        reads=('rank', 'alpha', 'rslora', 'targets'), usual=(1e-4, 1e-4),
        usual_backprop=(3e-4, 3e-4)),
    'prefix': Part(
        r'/prefix_[kv]$', 'a prefix of {num_tokens} keys and values a layer',
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
