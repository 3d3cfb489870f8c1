"""Configs that cannot work, each refused in one sentence."""

from collections.abc import Iterator, Sequence
import dataclasses
import math
import re

from mezo_jax import tasks
from mezo_jax.core.errors import InputError
from mezo_jax.core.quantized import QUANTISED
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import task as task_lib
from mezo_jax.training import config as config_lib
from mezo_jax.training import fields, methods

DISTRIBUTIONS = (
    'normal', 'rademacher', 'low_rank', 'lazy_low_rank', 'subzero')
GENERATORS = ('hash32', 'threefry2x32')
OVER = ('scan', 'batch', 'rows')
COMBINES = ('two_sided', 'one_sided', 'fzoo')


def check(config: config_lib.Train) -> None:
  """Raises InputError, in one sentence, for a value that cannot work."""
  fields.check(config)
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
          and (config.method == 'mezo' or not method.steps) and not o.groups),
       'model.offload needs floats, no layers set apart, and method mezo '
       'without optimizer.groups'),
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
      (0 <= config.seed < 2**32,
       f'seed is {config.seed} and must be from 0 to below 2**32'),
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
       f'objective {objectives.words(config_lib.objective(config))} is of a '
       'whole batch, no mean over rows: leave optimizer.micro_batches at 1 and '
       "spsa.over not 'rows'"),
      *((n >= 1 or n == -1 or d.k_shot > 0,
         f'data.num_{name} is {n} and must be at least 1, or -1 for a share of '
         'the rows')
        for name, n in (('train', d.num_train), ('dev', d.num_dev))),
      (d.num_test >= 1 or d.num_test == -1 or d.num_test == 0 and (
          bool(d.test) or not d.train),
       f'data.num_test is {d.num_test} and must be at least 1, or -1 for a '
       'share of the rows (0, for all, needs data.test)'),
      (d.k_shot >= 0, f'data.k_shot is {d.k_shot} and must be at least 0'),
      *((0 <= seed < 2**32,
         f'data.{name} is {seed} and must be from 0 to below 2**32')
        for name, seed in (('seed', d.seed), ('test_seed', d.test_seed))),
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


def check_given(config: config_lib.Train, given: Sequence[str]) -> None:
  """Raises InputError for a field of the command line that changes nothing.

  What a config's file sets is not looked at: the same file may be run with
  another method, to compare. For the same reason methods without steps may be
  given what only training reads.

  Args:
    config: As the command line has made it.
    given: The fields that the command line sets, from `fields.given`.
  """
  task = config.task
  if 'task.name' in given and task.name in tasks.TASKS and (
      task.template != tasks.get(task.name).template):
    raise InputError(
        f'--config.task.name={task.name} gives this task a name and nothing '
        'else; the task that is declared under it comes with a config file '
        '(docs/tasks.md lists them).')
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
          f'--config.{name} is {text!r}, with a backslash and a letter where a '
          "line break or tab is probably meant: in bash write $'...\\n...', or "
          'set it in a config file.')
    for needs, pattern, why in _unread(own):
      if needs and re.fullmatch(pattern, part):
        raise InputError(
            f'--config.{name} changes nothing {why}; leave it out.')


def _unread(config: config_lib.Train) -> Iterator[tuple[bool, str, str]]:
  """Yields (whether they are unread, a pattern of fields, why)."""
  method, kind = methods.method_of(config), config.task.traits
  p, z, name = config.peft, config.spsa, config.method
  if method.steps:
    yield (method.backprop, r'spsa\..*',
           f'with method {name!r}, which trains by backpropagation')
    yield (not method.backprop, r'optimizer\.name|model\.remat',
           f'with method {name!r}, which has no backpropagation')
    yield (name != 'private', r'privacy\..*',
           f"with method {name!r}: it is of method 'private'")
    yield (z.distribution not in ('low_rank', 'lazy_low_rank', 'subzero'),
           r'spsa\.rank', f'with spsa.distribution {z.distribution!r}')
    yield (z.distribution not in ('lazy_low_rank', 'subzero'),
           r'spsa\.lazy_every', f'with spsa.distribution {z.distribution!r}')
    yield (name == 'forward_grad', r'spsa\.eps',
           f'with method {name!r}, which takes derivatives')
    for field, readers in _VARIANT_READERS.items():
      yield (name not in readers, rf'variant\.{field}',
             f'with method {name!r}: it is of {", ".join(readers)}')
  yield (not method.demonstrations, 'num_demos',
         f"with method {name!r}: it is of method 'icl'")
  if method.steps or p.adapter:
    yield (p.method != 'lora', r'peft\.(rank|alpha|rslora|targets)',
           f'with peft.method {p.method!r}: it is of lora')
    yield (p.method not in ('prefix', 'prompt'),
           r'peft\.(num_tokens|init|text)',
           f'with peft.method {p.method!r}: it is of prefix and prompt')
    yield (not (p.method == 'last_layers' or methods.layers_apart(config)),
           r'peft\.num_layers', 'where no last layers are set apart')
    yield (p.method != 'prefix', r'peft\.positions',
           f'with peft.method {p.method!r}: it is of prefix')
  of = f'with task.kind {config.task.kind!r}'
  yield (not kind.generates, r'task\.(answers_column|stop|max_new_tokens)', of)
  yield (kind.generates, r'task\.(label_column|label_names)', of)
  yield (not kind.words and not kind.new_head, r'task\.label_words', of)
  yield (config.task.kind != 'multiple_choice', r'task\.(choices|answer)', of)
  yield (config.data.k_shot > 0, r'data\.num_(train|dev)',
         'where data.k_shot is set')
  yield (config.objective != '', r'task\.objective', 'where objective is set')


# Which methods read a field of `config.Variant`.
_VARIANT_READERS = {
    'every|anchor_learning_rate|anchor_rows|stored_anchor|anneal|anneal_every':
        ('svrg',),
    'window': ('momentum_by_history', 'adam_by_history'),
    'b1': ('momentum_by_history', 'adam_by_history', 'lozo_m'),
    'b2': ('adam_by_history', 'scalar_adam'),
    'share': ('sparse_mezo', 'mazo'),
    'num_scores': ('mazo', 'variance_modified', 'expectation_modified'),
    'alpha|beta': ('mazo',),
    'norm': ('variance_modified', 'expectation_modified'),
    'clip': ('qzo',),
    'curvature_rate': ('hizoo',)}


def _one_of(field: str, value, known) -> None:
  if value not in known:
    raise InputError(f'config: {field} {value!r} is none of '
                     f'{", ".join(filter(None, known))}.')
