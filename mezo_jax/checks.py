"""Configs that cannot work, each refused in one sentence."""

import dataclasses
import math
import re

from mezo_jax import config as config_lib
from mezo_jax import methods
from mezo_jax.errors import InputError
from mezo_jax.rules import QUANTISED
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import task as task_lib

DISTRIBUTIONS = (
    'normal', 'rademacher', 'sphere', 'low_rank', 'lazy_low_rank', 'subzero')
GENERATORS = ('hash32', 'threefry2x32')
OVER = ('scan', 'batch', 'rows')
COMBINES = ('two_sided', 'one_sided', 'fzoo')


def check(config: config_lib.Train) -> None:
  """Raises InputError, in one sentence, for a value that cannot work."""
  d, o, p, z = config.data, config.optimizer, config.peft, config.spsa
  task_lib.check(config.task)
  of_task = config.task.traits
  objectives.check(config.task, config_lib.objective(config))
  _one_of('method', config.method, methods.METHODS)
  _one_of('peft.method', p.method, methods.PARTS)
  method, part = methods.method_of(config), methods.part_of(config)
  _one_of('calibration', config.calibration, ('', 'sfc', 'icl_sfc'))
  _one_of('select', config.select, ('metric', 'loss'))
  _one_of('model.dtype', config.model.dtype,
          ('float32', 'bfloat16', 'float16', *QUANTISED))
  _one_of('optimizer.name', o.name, ('adam', 'sgd'))
  _one_of('optimizer.schedule', o.schedule, ('constant', 'linear', 'cosine'))
  _one_of('spsa.distribution', z.distribution, DISTRIBUTIONS)
  _one_of('spsa.generator', z.generator, GENERATORS)
  _one_of('spsa.over', z.over, OVER)
  _one_of('spsa.combine', z.combine, COMBINES)
  _one_of('peft.positions', p.positions, ('zero', 'after', 'jump'))
  _one_of('peft.init', p.init, ('tokens', 'normal', 'text'))
  rules = [
      *method.rules(config),
      (config.model.dtype not in QUANTISED or not (
          method.backprop or method.probe),
       f'model.dtype {config.model.dtype!r} is trained by forward passes: '
       f"method {config.method!r} needs floats"),
      (not config.model.offload or (
          config.model.dtype not in QUANTISED and not part.last_layers
          and not methods.layers_apart(config)
          and (config.method == 'mezo' or not method.steps)
          and not o.groups and z.distribution != 'sphere'),
       'model.offload needs floats, no layers set apart, and method mezo '
       "without optimizer.groups and spsa.distribution 'sphere'"),
      (config.mesh.direction == 1 or (
          z.over != 'rows' and not method.backprop),
       'mesh.direction shares out the points of forward passes: leave it at 1 '
       "for backpropagation and spsa.over 'rows', and split mesh.data"),
      (not config.calibration or (
          config.task.calibration is not None and not config.task.masked
          and not of_task.generates and not of_task.new_head),
       'calibration needs task.calibration, a prompt without content, and '
       'candidates that a causal model scores'),
      (config.calibration != 'icl_sfc' or method.demonstrations,
       "calibration 'icl_sfc' needs method 'icl'"),
      (p.init != 'text' or bool(p.text), "peft.init 'text' needs peft.text"),
      (min(p.rank, p.num_tokens, p.num_layers) >= 1,
       'peft.rank, num_tokens and num_layers must be at least 1'),
      (not p.adapter or bool(part.adapter),
       'peft.adapter needs peft.method, one of '
       f'{", ".join(k for k, v in methods.PARTS.items() if v.adapter)}'),
      (not methods.layers_apart(config) or p.method not in (
          'prefix', 'prompt'),
       f'peft.mask {p.mask!r} sets layers apart, which a {p.method} is not of; '
       'leave it empty, --config.peft.mask='),
      (not p.adapter or not methods.layers_apart(config)
       or 'last_layers' in p.mask,
       f'peft.targets {p.targets!r} are those of new matrices: with '
       'peft.adapter say which of its layers are trained by '
       "--config.peft.mask='^last_layers/.*lora_[ab]$'"),
      (not part.adapter or not p.mask or p.method in p.mask,
       f'peft.mask {p.mask!r} is of the model\'s own parameters, not of '
       f'{p.method}; leave it empty, --config.peft.mask='),
      (all(len(g) == 3 and all(0 < x < math.inf for x in g[1:])
           for g in o.groups),
       f'optimizer.groups {o.groups} must be of (regular expression, '
       'learning_rate, eps), both positive and finite'),
      (config.num_demos >= 1, 'num_demos must be at least 1'),
      (all(0 <= seed < 2**32 for seed in (config.seed, d.seed, d.test_seed)),
       'seed, data.seed and data.test_seed must be at least 0 and below 2**32, '
       'as NumPy needs them for the order of rows'),
      (o.learning_rate > 0, 'optimizer.learning_rate must be positive'),
      (z.eps > 0, 'spsa.eps must be positive'),
      (z.num_samples >= 1, 'spsa.num_samples must be at least 1'),
      (z.rank >= 1, 'spsa.rank must be at least 1'),
      (z.lazy_every >= 1, 'spsa.lazy_every must be at least 1'),
      (z.fold_every == 1 or z.fold_every > 1 and not o.groups
       and not o.weight_decay,
       'spsa.fold_every must be at least 1, and above it needs '
       'optimizer.weight_decay of 0 and no optimizer.groups'),
      (z.combine != 'fzoo' or z.num_samples > 1,
       "spsa.combine 'fzoo' needs spsa.num_samples of at least 2"),
      (z.over != 'rows' or d.batch_size % max(z.num_samples, 1) == 0
       and z.num_samples % max(o.micro_batches, 1) == 0,
       "with spsa.over 'rows' spsa.num_samples must divide data.batch_size, "
       'and optimizer.micro_batches spsa.num_samples'),
      (all(map(math.isfinite, (o.learning_rate, z.eps, o.weight_decay))),
       'optimizer.learning_rate, spsa.eps and optimizer.weight_decay must be '
       'finite'),
      (0 <= o.warmup_steps < max(config.steps, 1),
       'optimizer.warmup_steps must be at least 0 and below steps'),
      (o.weight_decay >= 0, 'optimizer.weight_decay must be at least 0'),
      (list(d.buckets) == sorted(set(d.buckets)) and len(d.buckets) > 0,
       f'data.buckets {d.buckets} must increase'),
      (d.batch_size >= 1, 'data.batch_size must be at least 1'),
      (o.micro_batches >= 1, 'optimizer.micro_batches must be at least 1'),
      (d.batch_size % max(o.micro_batches, 1) == 0,
       'optimizer.micro_batches must divide data.batch_size'),
      (o.micro_batches == 1 and z.over != 'rows' or objectives.over_rows(
          config.task, config_lib.objective(config)),
       f'objective {config_lib.objective(config)!r} is of a whole batch, no '
       "mean over rows: leave optimizer.micro_batches at 1 and spsa.over not "
       "'rows'"),
      (min(d.num_dev, d.num_train) >= 1,
       'data.num_train and data.num_dev must be at least 1'),
      (d.num_test >= 1 or bool(d.test) or not d.train,
       'data.num_test must be at least 1 where data.test is not set'),
      (min(config.max_skipped, config.keep_checkpoints) >= 1,
       'max_skipped and keep_checkpoints must be at least 1'),
      (config.max_still >= 0 and 0 <= config.max_rise < math.inf,
       'max_still and max_rise must be at least 0, and finite'),
      (min(config.eval_every, config.checkpoint_every, config.steps) >= 1,
       'steps, eval_every and checkpoint_every must be at least 1'),
  ]
  names = [config.task.name or 'first', *(a.name for a in config.also)]
  rules += [
      (not config.also or method.mixes,
       f'method {config.method!r} trains one task: leave also empty'),
      (len(set(names)) == len(names) and all(
          re.fullmatch(r'\w+', name) for name in names) or not config.also,
       f'also: the names of tasks, {", ".join(names)}, must be words, and each '
       'another'),
      (all(a.weight > 0 and math.isfinite(a.weight) for a in config.also),
       'also: weights must be positive'),
      (not config.also or not any(
          task.traits.new_head
          for task in (config.task, *(a.task for a in config.also))),
       'also: a task of kind \'head\' has a head of its own: train it alone'),
  ]
  for holds, message in rules:
    if not holds:
      raise InputError(f'config: {message}.')
  for a in config.also:
    try:
      check(dataclasses.replace(config, task=a.task, data=a.data, also=()))
    except InputError as e:
      raise InputError(f'task {a.name!r}: {e}') from e
  for name, text in (('peft.mask', p.mask), ('peft.targets', p.targets),
                     *(('optimizer.groups', group) for group, *_ in o.groups)):
    try:
      re.compile(text)
    except re.error as e:
      raise InputError(
          f'config: {name} {text!r} is no regular expression ({e}).') from e


def _one_of(field: str, value, known) -> None:
  if value not in known:
    raise InputError(f'config: {field} {value!r} is none of '
                     f'{", ".join(filter(None, known))}.')
