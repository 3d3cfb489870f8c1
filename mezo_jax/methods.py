"""What `config.method` and `config.peft.method` name: two tables, in which all
that the rest of the library needs to know of a name stands once."""

from collections.abc import Callable
import dataclasses

from mezo_jax.tasks import objective

# --- methods ----------------------------------------------------------------


def _no_rules(config) -> list:
  del config
  return []


@dataclasses.dataclass(frozen=True)
class Method:
  """A way to train, or what training is compared with."""

  words: str  # of a model card; {optimizer} is its name
  steps: bool = True  # whether it trains
  backprop: bool = False  # or else by forward passes alone
  probe: bool = False  # begins with a linear probe
  demonstrations: bool = False  # rows with answers stand before each prompt
  own_head: bool = False  # a head apart from the embedding is made
  part: str | None = None  # what is trained, where peft.method does not say
  # `rules(config)`: what must hold beside what `config.check` asks of all,
  # pairs of whether it does and what to say if not.
  rules: Callable = _no_rules
  # `result(ask, params, probed)` of a method without steps: the report of the
  # test rows, from `evaluate.Evaluators` and the linear probe's report, if any.
  result: Callable | None = None


def _needs_label_words(config) -> list:
  return [(config.task.traits.words,
           f'method {config.method!r} needs a task with label words; take '
           'head_only')]


def _needs_derivative(config) -> list:
  name = objective.of(config.task, config.objective)
  return [(objective.differentiable(name),
           f'objective {name!r} has no derivative: take a method without '
           'backpropagation, or cross_entropy or lm')]


def _needs_prompt(config) -> list:
  return [(not (config.task.masked or config.task.traits.new_head),
           f'method {config.method!r} needs a causal model and a prompt')]


def _says_what_is_trained(config) -> list:
  return [(not (config.peft.method or config.peft.mask),
           f'method {config.method!r} says itself what is trained: leave '
           'peft.method and peft.mask out')]


METHODS = {
    'mezo': Method('MeZO (Malladi et al., 2023), forward passes only'),
    'zero_shot': Method(
        'no training', steps=False,
        result=lambda ask, params, probed: ask.both(params)[1]),
    'icl': Method(
        'demonstrations in the prompt', steps=False, demonstrations=True,
        rules=_needs_prompt,
        result=lambda ask, params, probed: ask.test(params)),
    'linear_probe': Method(
        'a linear probe', steps=False, probe=True, rules=_needs_label_words,
        result=lambda ask, params, probed: probed),
    'finetune': Method(
        'backpropagation ({optimizer})', backprop=True,
        rules=_needs_derivative),
    'head_only': Method(
        'backpropagation ({optimizer}) into the head alone', backprop=True,
        part='head', rules=lambda config: (
            _needs_derivative(config) + _says_what_is_trained(config))),
    'lp_mezo': Method(
        'MeZO (Malladi et al., 2023) after a linear probe, forward passes only',
        probe=True, own_head=True, part='', rules=lambda config: (
            _needs_label_words(config) + _says_what_is_trained(config))),
}


def method_of(config) -> Method:
  return METHODS[config.method]


def forwards(config) -> int:
  """Forward passes of a batch that a step takes."""
  if method_of(config).backprop:
    return 1
  z = config.spsa
  if z.over == 'rows':  # all directions together see each row once a sign
    return 2
  return 2 * z.num_samples if z.combine == 'two_sided' else z.num_samples + 1


# --- parts of the parameters ------------------------------------------------


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
        adapter=r'/lora_\w+$', added=True, usual=(1e-4, 1e-4),
        usual_backprop=(3e-4, 3e-4)),
    'prefix': Part(
        r'/prefix_[kv]$', 'a prefix of {num_tokens} keys and values a layer',
        adapter=r'/prefix_[kv]$',
        tokens=lambda p: p.num_tokens if p.positions != 'zero' else 0,
        usual=(1e-2, 1e-2), usual_backprop=(3e-2, 3e-2)),
    'prompt': Part(
        r'^prompt/', '{num_tokens} soft tokens', adapter=r'^prompt/', soft=True,
        tokens=lambda p: p.num_tokens, usual=(1e-2, 1e-2),
        usual_backprop=(3e-2, 3e-2)),
    'bitfit': Part(r'(^|/)bias$', 'biases'),
    'last_layers': Part(
        r'^last_layers/', 'the last {num_layers} layers', last_layers=True),
    'head': Part(
        r'^(lm_head|head|classifier)/', 'the head', own_head=True),
}


def part_of(config) -> Part:
  part = method_of(config).part
  return PARTS[config.peft.method if part is None else part]


def adapts(config) -> bool:
  """Whether the model is given parameters that its files do not have."""
  return bool(part_of(config).adapter) and (
      method_of(config).steps or bool(config.peft.adapter))


def layers_apart(config) -> bool:
  """Whether the last ``peft.num_layers`` layers are parameters of their own,
  ``last_layers/...``: to be trained alone, in whole or in part."""
  part, p = part_of(config), config.peft
  names = p.mask, p.targets if part.added else ''
  return method_of(config).steps and (
      part.last_layers or any('last_layers' in name for name in names))


def warnings(config) -> list[str]:
  """What is legal, and most probably a mistake."""
  method, part, o = method_of(config), part_of(config), config.optimizer
  if not method.steps or method.backprop and o.name == 'sgd':
    return []
  usual = part.usual_backprop if method.backprop else part.usual
  if not usual or usual[0] / 100 < o.learning_rate < usual[1] * 100:
    return []
  return [f'optimizer.learning_rate {o.learning_rate:g} is two orders of '
          f'magnitude or more from what is usual for '
          f'{config.peft.method or "all parameters"} with '
          f'{"backpropagation" if method.backprop else "MeZO"}, '
          f'{" to ".join(f"{x:g}" for x in dict.fromkeys(usual))}']
