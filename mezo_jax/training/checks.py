"""Rejects configs that cannot work, with a message that names the field.

Rules that belong to a single method are in `mezo_jax.training.methods`.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import re

from mezo_jax import tasks
from mezo_jax.core.errors import InputError
from mezo_jax.core.quantized import QUANTISED
from mezo_jax.directions.by_name import KINDS, options_of
from mezo_jax.directions.low_rank import LowRank
from mezo_jax.peft.kinds import PARTS
from mezo_jax.runs import trackers
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import rewards
from mezo_jax.tasks import task as task_lib
from mezo_jax.training import config as config_lib
from mezo_jax.training import config_fields, methods
from mezo_jax.transforms.combine import COMBINES


def check_config(config: config_lib.Train) -> None:
  """Checks the values of a config.

  It also checks the config of every further task in ``config.also``.

  Args:
    config: The config of a run.

  Raises:
    InputError: if a value is invalid, or does not fit the values of other
      fields. The message names the fields.
  """
  config_fields.check_types(config)
  d, o, p, z = config.data, config.optimizer, config.peft, config.spsa
  task_lib.check_task(config.task)
  of_task = config.task.traits
  named = objectives.of(config.task, config.objective)
  objectives.check_objective(config.task, named)
  if config.method not in methods.METHODS:
    raise InputError(f'config: unknown method {config.method!r}; choose one of '
                     f'{", ".join(methods.METHODS)}.')
  method, part = methods.method_of(config), methods.part_of(config)
  rate, auto = o.learning_rate, config_lib.is_auto(config)
  if isinstance(rate, str):
    if not auto:
      raise InputError(f'config: optimizer.learning_rate is {rate!r} and must '
                       "be a positive number or 'auto'.")
    rate = 1.0  # it is found later
  # Each rule is a pair (holds, message). The first one that does not hold is
  # the error.
  rules = [
      *methods.rules(config),
      (config.model.dtype not in QUANTISED or not (
          method.backprop or method.probe),
       f'method {config.method!r} cannot train weights of model.dtype '
       f'{config.model.dtype!r}; use a float model.dtype'),
      (not config.model.offload or (
          config.model.dtype not in QUANTISED and not part.last_layers
          and not methods.layers_apart(config)
          and (method.offloads or not method.steps)
          and not o.groups),
       'model.offload needs a float model.dtype, the method mezo or a '
       'baseline, no separate last layers, and no optimizer.groups; change '
       'these, or set model.offload to False'),
      (config.mesh.direction == 1 or (
          z.over != 'rows' and not method.backprop),
       'mesh.direction splits the forward passes of a step, which is not '
       "possible with backpropagation or spsa.over 'rows'; leave it at 1 and "
       'increase mesh.data instead'),
      (not config.calibration or (
          config.task.calibration is not None and not config.task.masked
          and not of_task.generates and not of_task.new_head),
       'calibration needs a causal model, a task that scores candidates, and '
       'task.calibration, a prompt without content; set them, or leave '
       'calibration empty'),
      (p.init != 'text' or bool(p.text),
       "peft.init 'text' needs a text; set peft.text"),
      (min(p.rank, p.num_tokens, p.num_layers) >= 1,
       'peft.rank, peft.num_tokens and peft.num_layers must be at least 1'),
      (not p.adapter or bool(part.adapter),
       'peft.adapter needs the kind of the adapter; set peft.method to one of '
       f'{", ".join(k for k, v in PARTS.items() if v.adapter)}'),
      (not methods.layers_apart(config) or not part.adapter or part.added,
       f'peft.mask {p.mask!r} selects the last layers of the model, which '
       f'peft.method {p.method} does not support; leave it empty, '
       '--config.peft.mask='),
      (not p.adapter or not methods.layers_apart(config)
       or 'last_layers' in p.mask,
       f'peft.targets {p.targets!r} is not used with peft.adapter; to train '
       'the last layers of the adapter, set '
       "--config.peft.mask='^last_layers/.*lora_[ab]$'"),
      (not part.adapter or not p.mask or p.method in p.mask,
       f'peft.mask {p.mask!r} does not match parameters of the adapter '
       f'{p.method}; leave it empty, --config.peft.mask='),
      (all(len(g) == 3 and all(0 < x < math.inf for x in g[1:])
           for g in o.groups),
       f'optimizer.groups {o.groups} must contain tuples (regular expression, '
       'learning_rate, eps) with positive, finite numbers'),
      (config.num_demos >= 1, 'num_demos must be at least 1'),
      (not (method.demonstrations and of_task.conversation),
       f"method {config.method!r} needs a template for its demonstrations, "
       "which task.kind 'chat' does not have; choose another method"),
      (0 <= config.seed < 2**32,
       f'seed is {config.seed} and must be from 0 to below 2**32'),
      (not auto or not method.steps or methods.finds_rate(config),
       "optimizer.learning_rate 'auto' supports only the method mezo (it is "
       f'{config.method}), without optimizer.groups, with a spsa.combine that '
       f'does not standardise losses (it is {z.combine}), and with an '
       f'objective that has a derivative (it is {objectives.words(named)}); '
       'set optimizer.learning_rate to a number'),
      (rate > 0, 'optimizer.learning_rate must be positive'),
      (z.eps > 0, 'spsa.eps must be positive'),
      (z.num_samples >= 1, 'spsa.num_samples must be at least 1'),
      (z.rank >= 1, 'spsa.rank must be at least 1'),
      (z.lazy_every >= 1, 'spsa.lazy_every must be at least 1'),
      (z.apply_every == 1 or z.apply_every > 1 and not o.groups
       and not o.weight_decay,
       'spsa.apply_every must be at least 1; if it is more than 1, '
       'optimizer.weight_decay must be 0 and optimizer.groups must be empty'),
      (z.combine != 'fzoo' or z.num_samples > 1,
       "spsa.combine 'fzoo' needs spsa.num_samples of at least 2"),
      (z.over != 'rows' or d.batch_size % max(z.num_samples, 1) == 0
       and z.num_samples % max(o.micro_batches, 1) == 0,
       "with spsa.over 'rows', data.batch_size must be a multiple of "
       'spsa.num_samples, and spsa.num_samples a multiple of '
       'optimizer.micro_batches'),
      (all(map(math.isfinite, (rate, z.eps, o.weight_decay))),
       'optimizer.learning_rate, spsa.eps and optimizer.weight_decay must be '
       'finite'),
      (0 <= o.warmup_steps < max(config.steps, 1),
       'optimizer.warmup_steps must be at least 0 and below steps'),
      (o.weight_decay >= 0, 'optimizer.weight_decay must be at least 0'),
      (list(d.buckets) == sorted(set(d.buckets)) and len(d.buckets) > 0,
       f'data.buckets {d.buckets} must be increasing and not empty'),
      (d.batch_size >= 1, 'data.batch_size must be at least 1'),
      (o.micro_batches >= 1, 'optimizer.micro_batches must be at least 1'),
      (d.batch_size % max(o.micro_batches, 1) == 0,
       'data.batch_size must be a multiple of optimizer.micro_batches'),
      *_of_rewards(config),
      (o.micro_batches == 1 and z.over != 'rows' or objectives.over_rows(
          config.task, named),
       f'objective {objectives.words(named)} is not a '
       'mean over rows, so a batch cannot be split; leave '
       "optimizer.micro_batches at 1 and spsa.over at 'scan' or 'batch'"),
      (not d.dev or not d.k_shot,
       'data.k_shot chooses dev rows among the training rows; leave data.dev '
       'empty'),
      *((n >= 1 or n == -1 or d.k_shot > 0 or (
          name == 'dev' and n == 0 and bool(d.dev)),
         f'data.num_{name} is {n} and must be at least 1, or -1 for a fraction '
         'of the rows')
        for name, n in (('train', d.num_train), ('dev', d.num_dev))),
      (d.num_test >= 1 or d.num_test == -1 or d.num_test == 0 and (
          bool(d.test) or not d.train),
       f'data.num_test is {d.num_test} and must be at least 1, or -1 for a '
       'fraction of the rows; 0, for all test rows, needs data.test'),
      (d.k_shot >= 0, f'data.k_shot is {d.k_shot} and must be at least 0'),
      *((0 <= seed < 2**32,
         f'data.{name} is {seed} and must be from 0 to below 2**32')
        for name, seed in (('seed', d.seed), ('test_seed', d.test_seed))),
      (min(config.max_skipped, config.keep_checkpoints) >= 1,
       'max_skipped and keep_checkpoints must be at least 1'),
      (0 <= config.max_rise < math.inf,
       'max_rise must be at least 0 and finite'),
      ({*config.loggers} <= {*trackers.NAMES},
       f'loggers {config.loggers} must be a tuple of '
       f'{", ".join(trackers.NAMES)}'),
      (min(config.eval_every, config.checkpoint_every, config.steps) >= 1,
       'steps, eval_every and checkpoint_every must be at least 1'),
  ]
  names = [config.task.name or 'first', *(a.name for a in config.also)]
  every = [config.task, *(a.task for a in config.also)]
  rules += [
      (not config.also or method.mixes,
       f'method {config.method!r} supports a single task; leave also empty'),
      (len(set(names)) == len(names) and all(
          re.fullmatch(r'\w+', name) for name in names) or not config.also,
       f'also: the names of the tasks, {", ".join(names)}, must be different '
       'words of letters, digits and underscores'),
      (all(a.weight > 0 and math.isfinite(a.weight) for a in config.also),
       'also: the weights must be positive and finite'),
      (not config.also or not any(task.traits.new_head for task in every),
       "also: a task of kind 'head' needs its own head and cannot share a "
       'model with other tasks; train it in a run of its own'),
      (not config.also or config.select == 'loss' or all(
          task.main_metric != task_lib.LOSS for task in every),
       'also: tasks whose metric is the loss cannot be averaged with others; '
       "set select to 'loss'"),
      (len({task.chat_template for task in every if task.in_turns}) < 2,
       'also: the tasks share a tokenizer and its chat template; give all the '
       'same task.chat_template'),
  ]
  for holds, message in rules:
    if not holds:
      raise InputError(f'config: {message}.')
  for a in config.also:
    try:
      check_config(dataclasses.replace(
          config, task=a.task, data=a.data, also=()))
    except InputError as e:
      raise InputError(f'task {a.name!r}: {e}') from e
  for name, text in (('peft.mask', p.mask), ('peft.targets', p.targets),
                     *(('optimizer.groups', group) for group, *_ in o.groups)):
    try:
      re.compile(text)
    except re.error as e:
      raise InputError(
          f'config: {name} {text!r} is not a regular expression ({e}).') from e


def _of_rewards(config: config_lib.Train) -> Iterator[tuple[bool, str]]:
  """Yields the rules of the objective 'reward', in the form of other rules."""
  method, r, o = methods.method_of(config), config.reward, config.optimizer
  z = config.spsa
  rewarded = config_lib.is_rewarded(config)
  if rewarded:
    yield (bool(r.function),
           "objective 'reward' needs a function; set reward.function to "
           'MODULE:FUNCTION or FILE.py:FUNCTION')
    if r.function:
      rewards.source_of(r.function)
    yield (method.rewards or not method.steps,
           f"method {config.method!r} cannot be used with objective 'reward'; "
           'choose one of ' + ', '.join(
               methods.names_where(lambda m: m.rewards)))
    yield not config.also, "objective 'reward' supports a single task"
  yield (rewarded or not r.function,
         "reward.function is only read by objective 'reward'; set "
         "--config.objective=reward")
  yield (math.isfinite(r.timeout) and r.timeout > 0,
         'reward.timeout must be positive and finite')
  yield (math.isfinite(r.failed) and math.isfinite(r.solved),
         'reward.failed and reward.solved must be finite')
  yield (min(r.workers, r.at_once) >= 0,
         'reward.workers and reward.at_once must be at least 0')
  yield (0 <= r.temperature < math.inf,
         'reward.temperature must be finite and at least 0')
  combine = COMBINES[z.combine]
  members = combine.evaluations(z.num_samples)
  yield (0 in combine.signs or z.combine == 'two_sided' or members > 1,
         f'spsa.combine {z.combine!r} compares the members of a population; '
         'set spsa.num_samples to at least 2')
  yield (not combine.of_rows or rewarded,
         f"spsa.combine {z.combine!r} needs objective 'reward', which gives "
         'each row a value of its own')
  yield (o.decay_to == 'zero' or not method.backprop,
         f"method {config.method!r} decays towards zero; leave "
         "optimizer.decay_to at 'zero'")
  builds = rewarded and r.build and _builds(config)
  yield (not (builds and config.model.offload),
         'reward.build would build the weights of a member on the device, '
         'which model.offload keeps in host memory; set reward.build to False')
  yield (o.decay_to == 'zero' or not config.model.offload,
         "optimizer.decay_to 'start' keeps a copy of the weights on the "
         'devices, so model.offload has no use; set one of them back')
  yield (o.decay_to == 'zero' or config.model.dtype not in QUANTISED or bool(
      methods.part_of(config).adapter),
         "optimizer.decay_to 'start' needs float weights or an adapter; choose "
         'another model.dtype or a peft.method')
  named = objectives.of(config.task, config.objective)
  yield (not config.task.chat or not (
      objectives.gold_only(named) and method.steps),
         'task.chat needs an objective that is computed from generated '
         "answers: set objective to 'reward', 'accuracy' or 'f1', or choose a "
         'method that does not train')


def _builds(config: config_lib.Train) -> bool:
  """Returns whether members may be built, as `reward.build` says."""
  low_rank = issubclass(KINDS[config.spsa.distribution], LowRank)
  return config.spsa.over == 'scan' and not low_rank


def check_given(config: config_lib.Train, given: Sequence[str]) -> None:
  """Checks that each field that a command line sets has an effect.

  Fields that a config file sets are not checked, because the same file may be
  run with several methods to compare them. For the same reason, fields that
  only training reads may be set for a method that does not train.

  Args:
    config: The config, in which the fields of the command line are set.
    given: The paths of the fields that the command line sets, from
      `mezo_jax.cli.command_line.given`.

  Raises:
    InputError: if a field has no effect.
  """
  task = config.task
  if 'task.name' in given and task.name in tasks.TASKS and (
      task.template != tasks.get(task.name).template):
    raise InputError(
        f'--config.task.name={task.name} only sets the name of the task; to '
        'use the predefined task of this name, choose a config file that '
        'contains it (docs/tasks.md lists them).')
  for name in given:
    part = re.sub(r'^also\[(-?\d+)\]\.', '', name)
    own = config
    if part != name:
      also = config.also[int(re.findall(r'-?\d+', name)[0])]
      own = dataclasses.replace(config, task=also.task, data=also.data)
    text = getattr(own.task, part.removeprefix('task.'), '')
    if part.startswith('task.') and isinstance(text, str) and (
        re.search(r'\\[nt]', text)):
      raise InputError(
          f'--config.{name} is {text!r}, which contains a backslash and a '
          'letter instead of a line break or tab. In bash, write '
          "$'...\\n...', or set the field in a config file.")
    for needs, pattern, why in _unread(own):
      if needs and re.fullmatch(pattern, part):
        raise InputError(
            f'--config.{name} has no effect {why}; leave it out.')


def _unread(config: config_lib.Train) -> Iterator[tuple[bool, str, str]]:
  """Yields the conditions under which fields are not read.

  Each is a tuple (whether the condition holds, a regular expression of the
  fields that are then not read, the reason for the error message).
  """
  method, kind = methods.method_of(config), config.task.traits
  part, p, z = methods.part_of(config), config.peft, config.spsa
  with_method = f'with method {config.method!r}'
  with_part = f'with peft.method {p.method!r}'
  if method.steps:
    how = 'by backpropagation' if method.backprop else 'by forward passes'
    yield True, method.ignores, f'{with_method}, which trains {how}'
    readers = methods.names_where(lambda m: m.private)
    yield (not method.private, r'privacy\..*',
           f'{with_method}, {_only(readers)}')
    for field, option in (('rank', 'rank'), ('lazy_every', 'every')):
      yield (option not in options_of(z.distribution), rf'spsa\.{field}',
             f'with spsa.distribution {z.distribution!r}')
    for field in dataclasses.fields(config.variant):
      readers = methods.names_where(lambda m, name=field.name: name in m.reads)
      yield (config.method not in readers, rf'variant\.{field.name}',
             f'{with_method}, {_only(readers)}')
  readers = methods.names_where(lambda m: m.demonstrations)
  yield (not method.demonstrations, 'num_demos',
         f'{with_method}, {_only(readers)}')
  if method.steps or p.adapter:
    for field in dataclasses.fields(p):
      readers = [name for name, x in PARTS.items() if field.name in x.reads]
      yield (bool(readers) and p.method not in readers,
             rf'peft\.{field.name}', f'{with_part}, {_only(readers)}')
    yield (not (part.last_layers or methods.layers_apart(config)),
           r'peft\.num_layers', 'unless the last layers are trained alone')
  with_kind = f'with task.kind {config.task.kind!r}'
  yield (not kind.generates, r'task\.(answers_column|stop|max_new_tokens)',
         with_kind)
  yield kind.conversation, r'task\.(answers_column|stop|strip)', with_kind
  yield kind.generates, r'task\.(label_column|label_names)', with_kind
  yield (not kind.words and not kind.new_head, r'task\.label_words',
         with_kind)
  yield (not config_lib.is_rewarded(config), r'reward\..*',
         "unless objective is 'reward'")
  yield (config.spsa.over != 'batch', r'reward\.at_once',
         "unless spsa.over is 'batch'")
  yield (not _builds(config), r'reward\.build',
         "unless spsa.over is 'scan' and spsa.distribution is not low-rank")
  yield (not config.optimizer.weight_decay, r'optimizer\.decay_to',
         'unless optimizer.weight_decay is positive')
  yield (config.task.kind != 'multiple_choice', r'task\.(choices|answer)',
         with_kind)
  yield (config.data.k_shot > 0, r'data\.num_(train|dev)',
         'if data.k_shot is set')
  yield (config.objective != '', r'task\.objective', 'if objective is set')


def _only(readers: Sequence[str]) -> str:
  """Returns the reason that only certain methods read a field."""
  verb = 'reads' if len(readers) == 1 else 'read'
  return f'because only {", ".join(readers)} {verb} it'
