"""A config's optimizer: the transform of its method."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from mezo_jax.core import paths
from mezo_jax.directions.base import Directions
from mezo_jax.directions.by_name import KINDS, options_of
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods, privacy
from mezo_jax.transforms.combine import COMBINES

# ``schedule(learning_rate, steps)`` after the warmup, by the names in configs.
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    'constant': lambda rate, steps: optax.constant_schedule(rate),
    'linear': lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    'cosine': optax.cosine_decay_schedule}


def make_optimizer(config: config_lib.Train, params: Any,
                   plan: privacy.Plan | None = None
                   ) -> optax.GradientTransformationExtraArgs:
  """Returns the optax transform that a config describes.

  Args:
    config: The config of the run. Its method must be one that trains.
    params: The trained parameters before training, or their shapes.
    plan: The budget of a private run; None where no losses are evaluated.
  """
  o, z = config.optimizer, config.spsa
  rates, eps = schedule(config, o.learning_rate), z.eps
  if o.groups:
    rest = ('', o.learning_rate, z.eps)
    groups = {g: (rate, e) for g, rate, e in (rest, *o.groups)}
    groups[''] = groups.pop('')  # last, as it matches what no other one does
    rates = {g: schedule(config, rate) for g, (rate, _) in groups.items()}
    eps = {g: e for g, (_, e) in groups.items()}
  options = dict(
      key=jax.random.key(config.seed), directions=directions(config),
      combine=COMBINES[z.combine], num_samples=z.num_samples, over=z.over,
      micro_batches=o.micro_batches)
  finish = dict(weight_decay=o.weight_decay, decay=paths.decayed,
                stochastic_rounding=z.stochastic_rounding)
  method = methods.method_of(config)
  return optax.with_extra_args_support(method.transform(methods.Setup(
      config, params, plan, rates, eps,
      lambda rate: schedule(config, rate), options, finish)))


def directions(config: config_lib.Train) -> Directions:
  """Returns the distribution of z."""
  z = config.spsa
  values: dict[str, Any] = {'rank': z.rank, 'every': z.lazy_every}
  return KINDS[z.distribution](
      z.generator,
      **{name: values[name] for name in options_of(z.distribution)})


def schedule(config: config_lib.Train, learning_rate: float) -> optax.Schedule:
  """Returns a learning rate as a function of the step number."""
  o = config.optimizer
  after = max(config.steps - o.warmup_steps, 1)
  main = SCHEDULES[o.schedule](learning_rate, after)
  if not o.warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, learning_rate, o.warmup_steps)
  return optax.join_schedules([warmup, main], [o.warmup_steps])
