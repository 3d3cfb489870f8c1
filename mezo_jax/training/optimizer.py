"""Builds the optimizer that a config describes."""

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

# Learning-rate schedules after the warmup, as functions of (learning_rate,
# steps). The keys are the values of `config.optimizer.schedule`.
SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    'constant': lambda rate, steps: optax.constant_schedule(rate),
    'linear': lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    'cosine': optax.cosine_decay_schedule}


def make_optimizer(config: config_lib.Train, params: Any,
                   plan: privacy.Plan | None = None,
                   learning_rate: jax.Array | None = None
                   ) -> optax.GradientTransformationExtraArgs:
  """Returns the optax transform that a config describes.

  Args:
    config: The config of the run. Its method must be one that trains.
    params: The trained parameters before training, or their shapes.
    plan: The plan of a private run. Defaults to None, for another method or a
      transform that only replays recorded steps.
    learning_rate: Learning rate of all steps, for a config without
      ``optimizer.groups``. Defaults to None, for the learning rate and the
      schedule of the config.
  """
  o, z = config.optimizer, config.spsa
  assert learning_rate is None or not o.groups
  rates, eps = learning_rate, z.eps
  if rates is None:
    rates = schedule(config, config_lib.learning_rate(config))
  if o.groups:
    rest = ('', config_lib.learning_rate(config), z.eps)
    groups = {g: (rate, e) for g, rate, e in (rest, *o.groups)}
    # The first expression that matches a path applies, and '' matches every
    # path. So move it to the end.
    groups[''] = groups.pop('')
    rates = {g: schedule(config, rate) for g, (rate, _) in groups.items()}
    eps = {g: e for g, (_, e) in groups.items()}
  options = dict(
      key=jax.random.key(config.seed), directions=directions(config),
      combine=COMBINES[z.combine], num_samples=z.num_samples, over=z.over,
      micro_batches=o.micro_batches)
  finish = dict(weight_decay=o.weight_decay, decay_to=o.decay_to,
                decay=paths.decayed if o.decay_to == 'zero' else None,
                stochastic_rounding=z.stochastic_rounding)
  method = methods.method_of(config)
  return optax.with_extra_args_support(method.transform(methods.Setup(
      config, params, plan, rates, eps,
      lambda rate: schedule(config, rate), options, finish)))


def directions(config: config_lib.Train) -> Directions:
  """Returns the distribution of z that a config describes."""
  z = config.spsa
  values: dict[str, Any] = {'rank': z.rank, 'every': z.lazy_every}
  return KINDS[z.distribution](
      z.generator,
      **{name: values[name] for name in options_of(z.distribution)})


def schedule(config: config_lib.Train, learning_rate: float) -> optax.Schedule:
  """Returns a learning rate as a function of the step number.

  Args:
    config: The config of the run, which sets the kind of the schedule, the
      warmup and the number of steps.
    learning_rate: The learning rate at the end of the warmup.
  """
  o = config.optimizer
  after = max(config.steps - o.warmup_steps, 1)
  main = SCHEDULES[o.schedule](learning_rate, after)
  if not o.warmup_steps:
    return main
  warmup = optax.linear_schedule(0.0, learning_rate, o.warmup_steps)
  return optax.join_schedules([warmup, main], [o.warmup_steps])
