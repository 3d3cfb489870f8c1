"""What `config.method` and `config.peft.method` name: two tables, in which all
that the rest of the library needs to know of a name stands once."""

from collections.abc import Callable
import dataclasses

from mezo_jax.tasks import objective

# --- methods ----------------------------------------------------------------

QUANTISED = ('int8', 'int4', 'codes')  # dtypes of models


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
  other_rates: bool = False  # learning rates are not of MeZO's size
  variant: bool = False  # the name is one of `mezo_jax.variants`
  mixes: bool = True  # may have several tasks
  scores: bool = False  # weights are looked at before the first step
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


def _of_relative(config, *more) -> list:
  v = config.variant
  return [
      (not config.optimizer.groups and (
          config.spsa.fold_every == 1 or config.method == 'quzo'),
       f'method {config.method!r} takes no optimizer.groups, and '
       'spsa.fold_every of 1'),
      (v.window >= 1 and 0 <= v.b1 < 1 and 0 <= v.b2 < 1 and 0 < v.share <= 1,
       'variant.window must be at least 1, b1 and b2 from 0 to below 1, share '
       'above 0 and at most 1'),
      *more]


def _own_combine(config, *more) -> list:
  return _of_relative(config, (
      config.spsa.combine == 'two_sided',
      f'method {config.method!r} has a way of its own from losses to '
      "projected gradients: leave spsa.combine at 'two_sided'"), *more)


def _one_direction(config) -> list:
  return _own_combine(config, (
      config.spsa.num_samples == 1,
      f'method {config.method!r} needs spsa.num_samples of 1'))


def _forward_mode(config) -> list:
  return _own_combine(config, *_needs_derivative(config), (
      config.spsa.over == 'scan',
      f"method {config.method!r} needs spsa.over of 'scan'"))


def _floats(config, *more) -> list:
  return _of_relative(config, (
      config.model.dtype not in QUANTISED,
      f'method {config.method!r} is of floats: take another model.dtype'),
                      *more)


def _modified(config) -> list:
  return _floats(
      config,
      (config.variant.norm in ('grad', 'param'),
       f'variant.norm {config.variant.norm!r} is none of grad, param'),
      (config.variant.num_scores >= 1,
       'variant.num_scores must be at least 1'))


def _hizoo(config) -> list:
  return _floats(
      config,
      (0 <= config.variant.curvature_rate < 1,
       'variant.curvature_rate must be from 0 to below 1'),
      (config.spsa.combine == 'two_sided',
       "method 'hizoo' compares three losses: leave spsa.combine at "
       "'two_sided'"))


def _lozo_m(config) -> list:
  return _floats(
      config,
      (config.spsa.distribution == 'lazy_low_rank'
       and config.spsa.num_samples == 1,
       "method 'lozo_m' needs spsa.distribution of 'lazy_low_rank' and "
       'num_samples of 1'))


def _mazo(config) -> list:
  return _floats(
      config,
      (not config.optimizer.weight_decay,
       "method 'mazo' needs optimizer.weight_decay of 0: it would move weights "
       'that are left out'),
      (config.variant.num_scores >= 1,
       'variant.num_scores must be at least 1'))


def _svrg(config) -> list:
  v, o = config.variant, config.optimizer
  return _own_combine(
      config,
      (v.every >= 2 and v.anneal >= 1 and v.anneal_every >= 1,
       'variant.every must be at least 2, anneal and anneal_every at least 1'),
      (v.anchor_learning_rate > 0,
       'variant.anchor_learning_rate must be positive'),
      (not v.anchor_rows or v.anchor_rows >= config.data.batch_size,
       'variant.anchor_rows must be 0 or at least data.batch_size'),
      (v.stored_anchor or
       config.steps % v.every == config.eval_every % v.every == 0,
       'steps and eval_every must be multiples of variant.every, at which '
       'weights are where the steps lead, or variant.stored_anchor be set'),
      (o.micro_batches == 1 and not o.weight_decay,
       "method 'svrg' needs optimizer.micro_batches of 1 (a batch is one part "
       'of an anchor) and weight_decay of 0'))


def _on_grid(config) -> list:
  return _of_relative(
      config,
      (config.model.dtype in QUANTISED,
       f"method 'quzo' needs model.dtype of {', '.join(QUANTISED)}"),
      (config.spsa.distribution in ('normal', 'rademacher', 'sphere'),
       "method 'quzo' rounds each element of z: take spsa.distribution "
       "normal, rademacher or sphere, or method 'mezo'"))


def _qzo(config) -> list:
  return _of_relative(
      config,
      (config.model.dtype in QUANTISED,
       f"method 'qzo' needs model.dtype of {', '.join(QUANTISED)}"),
      (not config.peft.method, "method 'qzo' trains scales: leave peft.method "
       'out'),
      (config.variant.clip > 0, 'variant.clip must be positive'))


def _private(config) -> list:
  p, z = config.privacy, config.spsa
  return _own_combine(
      config,
      (p.epsilon > 0 and 0 < p.delta < 1 and p.clip > 0,
       'privacy.epsilon and clip must be positive, delta between 0 and 1'),
      (p.mechanism in ('gaussian', 'laplace'),
       f"privacy.mechanism {p.mechanism!r} is none of gaussian, laplace"),
      (p.mechanism != 'laplace' or z.num_samples == 1,
       "privacy.mechanism 'laplace' needs spsa.num_samples of 1"),
      (z.over == 'scan', "method 'private' needs spsa.over of 'scan'"),
      (objective.over_rows(
          config.task, objective.of(config.task, config.objective)),
       "method 'private' clips what each row adds, and the objective "
       f'{objective.of(config.task, config.objective)!r} is of a whole batch'))


METHODS = {
    'mezo': Method('MeZO (Malladi et al., 2023), forward passes only'),
    'svrg': Method(
        'MeZO-SVRG (Gautam et al., 2024), forward passes only', variant=True,
        mixes=False, rules=_svrg),
    'sparse_mezo': Method(
        'Sparse-MeZO (Liu et al., 2024), forward passes only', variant=True,
        rules=_of_relative),
    'momentum_by_history': Method(
        'MeZO with momentum of its last steps, forward passes only',
        variant=True, rules=_of_relative),
    'adam_by_history': Method(
        "MeZO with Adam's moments of its last steps, forward passes only",
        variant=True, other_rates=True, rules=_of_relative),
    'scalar_adam': Method(
        'MeZO with one second moment (MEAZO), forward passes only',
        variant=True, other_rates=True, rules=_of_relative),
    'sign': Method(
        'ZO-SGD-Sign, forward passes only', variant=True, other_rates=True,
        rules=_own_combine),
    'conservative': Method(
        'ZO-SGD-Cons, forward passes only', variant=True, rules=_of_relative),
    'one_point': Method(
        'one-point estimates by residual feedback, forward passes only',
        variant=True, other_rates=True, rules=_one_direction),
    'forward_grad': Method(
        'forward-mode directional derivatives', variant=True,
        rules=_forward_mode),
    'mazo': Method(
        'MaZO (Zhang et al., 2025), forward passes only', variant=True,
        scores=True, rules=_mazo),
    'variance_modified': Method(
        'variance-modified SPSA (Malladi et al., 2023), forward passes only',
        variant=True, scores=True, mixes=False, rules=_modified),
    'expectation_modified': Method(
        'expectation-modified SPSA (Malladi et al., 2023), forward passes only',
        variant=True, scores=True, mixes=False, other_rates=True,
        rules=_modified),
    'hizoo': Method(
        'HiZOO (Zhao et al., 2024), forward passes only', variant=True,
        rules=_hizoo),
    'lozo_m': Method(
        'LOZO-M (Chen et al., 2024), forward passes only', variant=True,
        rules=_lozo_m),
    'quzo': Method(
        'QuZO (Zhou et al., 2025), forward passes only', variant=True,
        rules=_on_grid),
    'qzo': Method(
        'QZO (Shang et al., 2025), forward passes only', variant=True,
        part='scales', other_rates=True, rules=_qzo),
    'private': Method(
        'private MeZO (Zhang et al., 2024; Tang et al., 2024), forward passes '
        'only', variant=True, mixes=False, rules=_private),
    'zero_shot': Method(
        'no training', steps=False, mixes=False,
        result=lambda ask, params, probed: ask.both(params)[1]),
    'icl': Method(
        'demonstrations in the prompt', steps=False, demonstrations=True,
        mixes=False,
        rules=_needs_prompt,
        result=lambda ask, params, probed: ask.test(params)),
    'linear_probe': Method(
        'a linear probe', steps=False, probe=True, mixes=False,
        rules=_needs_label_words,
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
        probe=True, own_head=True, part='', mixes=False, rules=lambda config: (
            _needs_label_words(config) + _says_what_is_trained(config))),
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
  factors: bool = False  # of quantised weights, which stay as they are
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
    'scales': Part(
        r'/factors$', 'the scales of quantised weights', factors=True),
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
