"""What `config.method` and `config.peft.method` name: two tables, in which all
that the rest of the library needs to know of a name stands once."""

from collections.abc import Callable
import dataclasses

from mezo_jax.peft.kinds import Part, PARTS
from mezo_jax.training import method_rules

# --- methods ----------------------------------------------------------------

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
  other_rates: bool = False  # learning rates are not of MeZO's size
  variant: bool = False  # the name is one of `mezo_jax.variants`
  mixes: bool = True  # may have several tasks
  scores: bool = False  # weights are looked at before the first step
  private: bool = False  # nothing about the training rows may be reported
  # `rules(config)`: what must hold beside what `checks.check` asks of all,
  # pairs of whether it does and what to say if not.
  rules: Callable = method_rules.none
  # `result(ask, params, probed)` of a method without steps: the report of the
  # test rows, from `evaluate.Evaluators` and the linear probe's report, if any.
  result: Callable | None = None


METHODS = {
    'mezo': Method('MeZO (Malladi et al., 2023), forward passes only'),
    'svrg': Method(
        'MeZO-SVRG (Gautam et al., 2024), forward passes only', variant=True,
        mixes=False, rules=method_rules.svrg),
    'sparse_mezo': Method(
        'Sparse-MeZO (Liu et al., 2024), forward passes only', variant=True,
        rules=method_rules.of_relative),
    'momentum_by_history': Method(
        'MeZO with momentum of its last steps, forward passes only',
        variant=True, rules=method_rules.of_relative),
    'adam_by_history': Method(
        "MeZO with Adam's moments of its last steps, forward passes only",
        variant=True, other_rates=True, rules=method_rules.of_relative),
    'scalar_adam': Method(
        'MeZO with one second moment (MEAZO), forward passes only',
        variant=True, other_rates=True, rules=method_rules.of_relative),
    'sign': Method(
        'ZO-SGD-Sign, forward passes only', variant=True, other_rates=True,
        rules=method_rules.own_combine),
    'conservative': Method(
        'ZO-SGD-Cons, forward passes only', variant=True,
        rules=method_rules.of_relative),
    'one_point': Method(
        'one-point estimates by residual feedback, forward passes only',
        variant=True, other_rates=True, rules=method_rules.one_direction),
    'forward_grad': Method(
        'forward-mode directional derivatives', variant=True,
        rules=method_rules.forward_mode),
    'mazo': Method(
        'MaZO (Zhang et al., 2025), forward passes only', variant=True,
        scores=True, rules=method_rules.mazo),
    'variance_modified': Method(
        'variance-modified SPSA (Malladi et al., 2023), forward passes only',
        variant=True, scores=True, mixes=False, rules=method_rules.modified),
    'expectation_modified': Method(
        'expectation-modified SPSA (Malladi et al., 2023), forward passes only',
        variant=True, scores=True, mixes=False, other_rates=True,
        rules=method_rules.modified),
    'hizoo': Method(
        'HiZOO (Zhao et al., 2024), forward passes only', variant=True,
        rules=method_rules.hizoo),
    'lozo_m': Method(
        'LOZO-M (Chen et al., 2024), forward passes only', variant=True,
        rules=method_rules.lozo_m),
    'quzo': Method(
        'QuZO (Zhou et al., 2025), forward passes only', variant=True,
        rules=method_rules.quzo),
    'qzo': Method(
        'QZO (Shang et al., 2025), forward passes only', variant=True,
        part='scales', other_rates=True, rules=method_rules.qzo),
    'private': Method(
        'private MeZO (Zhang et al., 2024; Tang et al., 2024), forward passes '
        'only', variant=True, mixes=False, private=True,
        rules=method_rules.private),
    'zero_shot': Method(
        'no training', steps=False, mixes=False,
        result=lambda ask, params, probed: ask.both(params)[1]),
    'icl': Method(
        'demonstrations in the prompt', steps=False, demonstrations=True,
        mixes=False,
        rules=method_rules.needs_prompt,
        result=lambda ask, params, probed: ask.test(params)),
    'linear_probe': Method(
        'a linear probe', steps=False, probe=True, mixes=False,
        rules=method_rules.needs_label_words,
        result=lambda ask, params, probed: probed),
    'finetune': Method(
        'backpropagation ({optimizer})', backprop=True,
        rules=method_rules.needs_derivative),
    'head_only': Method(
        'backpropagation ({optimizer}) into the head alone', backprop=True,
        part='head', rules=method_rules.head_only),
    'lp_mezo': Method(
        'MeZO (Malladi et al., 2023) after a linear probe, forward passes only',
        probe=True, own_head=True, part='', mixes=False,
        rules=method_rules.lp_mezo),
}


def method_of(config) -> Method:
  return METHODS[config.method]


def forwards(config, rows: int) -> float:
  """Forward passes of a batch that a step takes, on average; one with its
  tangent counts as two. ``rows`` are there to train on."""
  if method_of(config).backprop:
    return 1
  z, v, n = config.spsa, config.variant, config.spsa.num_samples
  n = 1 if z.over == 'rows' else n  # all together see each row once a sign
  match config.method:
    case 'svrg':
      of_anchor = 2 * anchor_batches(config, rows)
      return n * (of_anchor + 4 * (v.every - 1)) / v.every
    case 'one_point':
      return 1
    case 'hizoo':
      return 2 * n + 1
    case 'conservative':
      return _of_estimate(config) + 3
    case 'forward_grad':
      return 2 * n
  return _of_estimate(config)


def selects(config) -> bool:
  """Whether dev rows choose the step that is the result; else it is the last.
  """
  return config.method != 'private' or config.privacy.public_dev


def anchor_every(config) -> int:
  """Steps from one on `anchor_batches` to the next; 0 for none."""
  return config.variant.every if config.method == 'svrg' else 0


def anchor_batches(config, rows: int) -> int:
  """Batches that an anchor's rows make, of ``rows`` for training; what is left
  over is left out."""
  return min(config.variant.anchor_rows or rows, rows) // config.data.batch_size


def _of_estimate(config) -> int:
  z = config.spsa
  if z.over == 'rows':  # all directions together see each row once a sign
    return 2
  return 2 * z.num_samples if z.combine == 'two_sided' else z.num_samples + 1


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


def made(config) -> str:
  """Names of parameters that are not of the model's files, as an expression:
  processors of other kinds make them with other last bits."""
  return '|'.join(filter(None, (part_of(config).adapter, r'^classifier/')))


def looks_first(config) -> bool:
  """Whether steps hang on what was found before the first one."""
  return method_of(config).probe or method_of(config).scores


def warnings(config) -> list[str]:
  """What is legal, and most probably a mistake."""
  method, part, o = method_of(config), part_of(config), config.optimizer
  if (not method.steps or method.other_rates
      or method.backprop and o.name == 'sgd'):
    return []
  usual = part.usual_backprop if method.backprop else part.usual
  if not usual or usual[0] / 100 < o.learning_rate < usual[1] * 100:
    return []
  return [f'optimizer.learning_rate {o.learning_rate:g} is two orders of '
          f'magnitude or more from what is usual for '
          f'{config.peft.method or "all parameters"} with '
          f'{"backpropagation" if method.backprop else "MeZO"}, '
          f'{" to ".join(f"{x:g}" for x in dict.fromkeys(usual))}']
