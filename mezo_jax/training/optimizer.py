"""A config's optimizer: MeZO, one of its relatives, or backpropagation."""

from typing import Any

import jax
import optax

from mezo_jax import Directions, skip_not_finite, variants
from mezo_jax.core import paths
from mezo_jax.directions.by_name import KINDS
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods, privacy
from mezo_jax.transforms.backprop import backprop
from mezo_jax.transforms.evaluate_points import COMBINES
from mezo_jax.transforms.mezo import by_group, mezo


def make_optimizer(config: config_lib.Train, params,
                   plan: privacy.Plan | None = None
                   ) -> optax.GradientTransformationExtraArgs:
  """The optax transform that a config describes, for these parameters before
  training, or their shapes.

  Args:
    config: of the run.
    params: that it trains.
    plan: of a private run; None where no losses are to be taken.
  """
  o, z = config.optimizer, config.spsa
  rates, eps = schedule(config, o.learning_rate), z.eps
  if o.groups:
    rest = ('', o.learning_rate, z.eps)
    groups = {g: (rate, e) for g, rate, e in (rest, *o.groups)}
    groups[''] = groups.pop('')  # the last: what no other one matches
    rates = {g: schedule(config, rate) for g, (rate, _) in groups.items()}
    eps = {g: e for g, (_, e) in groups.items()}
  if methods.method_of(config).backprop:
    def inner(rate):
      if o.name == 'adam':
        return optax.adamw(rate, weight_decay=o.weight_decay)
      return optax.chain(optax.add_decayed_weights(o.weight_decay),
                         optax.sgd(rate))
    return skip_not_finite(optax.chain(
        backprop(micro_batches=o.micro_batches), by_group(inner, rates)))
  if methods.method_of(config).variant:
    return relative(config, rates, eps, params, plan)
  return mezo(
      rates, eps, key=jax.random.key(config.seed), weight_decay=o.weight_decay,
      stochastic_rounding=z.stochastic_rounding, num_samples=z.num_samples,
      directions=directions(config), decay=paths.decayed,
      combine=COMBINES[z.combine], over=z.over,
      micro_batches=o.micro_batches, fold_every=z.fold_every)


def relative(config: config_lib.Train, rate, eps, params,
             plan: privacy.Plan | None) -> (
                 optax.GradientTransformationExtraArgs):
  """The transform of one of `mezo_jax.variants`."""
  name, v, z = config.method, config.variant, config.spsa
  make = getattr(variants, name)
  more: dict[str, Any] = dict(
      key=jax.random.key(config.seed), directions=directions(config),
      num_samples=z.num_samples, over=z.over,
      stochastic_rounding=z.stochastic_rounding)
  if name == 'svrg':
    return make(rate, eps, every=v.every, anneal=v.anneal,
                anneal_every=v.anneal_every, stored_anchor=v.stored_anchor,
                rows=config.data.batch_size,
                anchor_learning_rate=schedule(config, v.anchor_learning_rate),
                **more)
  more |= dict(micro_batches=config.optimizer.micro_batches,
               weight_decay=config.optimizer.weight_decay, decay=paths.decayed)
  if name not in ('forward_grad', 'hizoo', 'one_point', 'private', 'sign'):
    more['combine'] = COMBINES[z.combine]
  match name:
    case 'forward_grad':
      del more['over']
      return make(rate, **more)
    case 'private':
      del more['over']
      return make(
          rate, eps, clip=config.privacy.clip,
          mechanism=config.privacy.mechanism,
          batch_size=config.data.batch_size,
          noise_multiplier=plan.noise_multiplier if plan else 0.0, **more)
    case 'one_point':
      del more['num_samples']
    case 'mazo':
      del more['weight_decay'], more['decay']
      more['mask'] = variants.no_scores(params, more['directions'])
    case 'variance_modified' | 'expectation_modified':
      more['norms'] = variants.no_norms(params, more['directions'])
    case 'hizoo':
      more['alpha'] = v.curvature_rate
    case 'quzo':
      more['fold_every'] = z.fold_every
    case 'qzo':
      more['clip'] = v.clip
    case 'lozo_m':
      del more['num_samples']
      more['beta'] = v.b1
    case 'momentum_by_history':
      more |= dict(beta=v.b1, window=v.window)
    case 'adam_by_history':
      more |= dict(b1=v.b1, b2=v.b2, window=v.window)
    case 'sparse_mezo':
      more['limits'] = variants.smallest(params, v.share)
    case 'scalar_adam':
      more['b2'] = v.b2
  return make(rate, eps, **more)


def directions(config: config_lib.Train) -> Directions:
  """What z is."""
  z = config.spsa
  lazy = z.distribution in ('lazy_low_rank', 'subzero')
  more: dict[str, Any] = dict(rank=z.rank) if lazy or z.distribution == 'low_rank' else {}
  if lazy:
    more['every'] = z.lazy_every
  return KINDS[z.distribution](z.generator, **more)


def schedule(config: config_lib.Train, learning_rate: float) -> optax.Schedule:
  """A learning rate as a function of the step number."""
  o = config.optimizer
  after = max(config.steps - o.warmup_steps, 1)
  if o.schedule == 'linear':
    main = optax.linear_schedule(learning_rate, 0.0, after)
  elif o.schedule == 'cosine':
    main = optax.cosine_decay_schedule(learning_rate, after)
  else:
    main = optax.constant_schedule(learning_rate)
  if not o.warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, learning_rate, o.warmup_steps)
  return optax.join_schedules([warmup, main], [o.warmup_steps])
