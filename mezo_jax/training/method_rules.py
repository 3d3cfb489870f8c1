"""What must hold of a config for its method: pairs of whether it does and what
to say if not, beside what `checks.check` asks of all."""

from mezo_jax.core.quantized import QUANTISED
from mezo_jax.tasks import objective


def none(config) -> list:
  del config
  return []


def needs_label_words(config) -> list:
  return [(config.task.traits.words,
           f'method {config.method!r} needs a task with label words; take '
           'head_only')]


def needs_derivative(config) -> list:
  name = objective.of(config.task, config.objective)
  return [(objective.differentiable(name),
           f'objective {objective.words(name)} has no derivative: take a '
           'method without backpropagation, or cross_entropy or lm')]


def needs_prompt(config) -> list:
  return [(not (config.task.masked or config.task.traits.new_head),
           f'method {config.method!r} needs a causal model and a prompt')]


def says_what_is_trained(config) -> list:
  return [(not (config.peft.method or config.peft.mask),
           f'method {config.method!r} says itself what is trained: leave '
           'peft.method and peft.mask out')]


def head_only(config) -> list:
  return needs_derivative(config) + says_what_is_trained(config)


def lp_mezo(config) -> list:
  return needs_label_words(config) + says_what_is_trained(config)


def of_relative(config, *more) -> list:
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


def own_combine(config, *more) -> list:
  return of_relative(config, (
      config.spsa.combine == 'two_sided',
      f'method {config.method!r} has a way of its own from losses to '
      "projected gradients: leave spsa.combine at 'two_sided'"), *more)


def one_direction(config) -> list:
  return own_combine(config, (
      config.spsa.num_samples == 1,
      f'method {config.method!r} needs spsa.num_samples of 1'))


def forward_mode(config) -> list:
  return own_combine(config, *needs_derivative(config), (
      config.spsa.over == 'scan',
      f"method {config.method!r} needs spsa.over of 'scan'"))


def floats(config, *more) -> list:
  return of_relative(config, (
      config.model.dtype not in QUANTISED,
      f'method {config.method!r} is of floats: take another model.dtype'),
                      *more)


def modified(config) -> list:
  return floats(
      config,
      (config.variant.norm in ('grad', 'param'),
       f'variant.norm {config.variant.norm!r} is none of grad, param'),
      (config.variant.num_scores >= 1,
       'variant.num_scores must be at least 1'))


def hizoo(config) -> list:
  return floats(
      config,
      (0 <= config.variant.curvature_rate < 1,
       'variant.curvature_rate must be from 0 to below 1'),
      (config.spsa.combine == 'two_sided',
       "method 'hizoo' compares three losses: leave spsa.combine at "
       "'two_sided'"))


def lozo_m(config) -> list:
  return floats(
      config,
      (config.spsa.distribution == 'lazy_low_rank'
       and config.spsa.num_samples == 1,
       "method 'lozo_m' needs spsa.distribution of 'lazy_low_rank' and "
       'num_samples of 1'))


def mazo(config) -> list:
  return floats(
      config,
      (not config.optimizer.weight_decay,
       "method 'mazo' needs optimizer.weight_decay of 0: it would move weights "
       'that are left out'),
      (config.variant.num_scores >= 1,
       'variant.num_scores must be at least 1'))


def svrg(config) -> list:
  v, o = config.variant, config.optimizer
  trained = objective.of(config.task, config.objective)
  return own_combine(
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
       'of an anchor) and weight_decay of 0'),
      (objective.over_rows(config.task, trained)
       or v.anchor_rows == config.data.batch_size,
       f'objective {objective.words(trained)} is of a whole batch, and an '
       "anchor of method 'svrg' is the mean of several: set "
       'variant.anchor_rows to data.batch_size'))


def needs_codes(config) -> tuple:
  return (config.model.dtype in QUANTISED,
          f'method {config.method!r} needs model.dtype of '
          f'{", ".join(QUANTISED)}')


def quzo(config) -> list:
  return of_relative(
      config,
      needs_codes(config),
      (config.spsa.distribution in ('normal', 'rademacher'),
       "method 'quzo' rounds each element of z: take spsa.distribution "
       "normal or rademacher, or method 'mezo'"))


def qzo(config) -> list:
  return of_relative(
      config,
      needs_codes(config),
      (not config.peft.method, "method 'qzo' trains scales: leave peft.method "
       'out'),
      (config.variant.clip > 0, 'variant.clip must be positive'))


def private(config) -> list:
  p, z = config.privacy, config.spsa
  trained = objective.of(config.task, config.objective)
  return own_combine(
      config,
      (p.epsilon > 0 and 0 < p.delta < 1 and p.clip > 0,
       'privacy.epsilon and clip must be positive, delta between 0 and 1'),
      (p.mechanism in ('gaussian', 'laplace'),
       f"privacy.mechanism {p.mechanism!r} is none of gaussian, laplace"),
      (p.mechanism != 'laplace' or z.num_samples == 1,
       "privacy.mechanism 'laplace' needs spsa.num_samples of 1"),
      (z.over == 'scan', "method 'private' needs spsa.over of 'scan'"),
      (objective.over_rows(config.task, trained),
       "method 'private' clips what each row adds, and the objective "
       f'{objective.words(trained)} is of a whole batch'))
