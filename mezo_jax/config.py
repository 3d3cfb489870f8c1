"""The configuration of a run: typed dataclasses with a comment a field."""

from collections.abc import Callable
import dataclasses
import json
import math
import os

import jax
import optax

from mezo_jax import (
  _paths,
  one_sided,
  peft,
  quickstart,
  skip_not_finite,
  two_sided,
)
from mezo_jax._directions import KINDS
from mezo_jax._mezo import by_group, mezo
from mezo_jax.backprop import backprop
from mezo_jax.tasks import score, Task
from mezo_jax.tasks import task as task_lib

METHODS = ('mezo', 'zero_shot', 'icl', 'linear_probe', 'finetune', 'head_only',
           'lp_mezo')


@dataclasses.dataclass
class Model:
  name: str = 'quickstart'  # directory, .gguf file, hub id, or 'quickstart'
  dtype: str = 'float32'  # of the weights: 'float32', 'bfloat16', 'float16'
  revision: str = ''  # branch, tag or commit of a hub id
  bos_token: str = ''  # put first; '' for the tokenizer's own. OPT: '<s>'
  remat: bool = False  # backpropagation keeps no more than layers' inputs


@dataclasses.dataclass
class Data:
  train: str = ''  # .jsonl, .csv, .tsv, .parquet, hub id; '' for the task's
  train_split: str = ''  # of a hub data set; '' for the task's
  test: str = ''  # like `train`; '' takes test rows out of training data given
  test_split: str = ''  # of a hub data set; '' for the task's
  subset: str = ''  # configuration of a hub data set
  num_train: int = 1000  # as the paper
  num_dev: int = 500
  num_test: int = 1000  # at most; 0 for all
  k_shot: int = 0  # > 0: k rows of each label for train, as many for dev
  seed: int = 0  # of the choice of train and dev rows
  test_seed: int = 0  # of the choice of test rows
  max_length: int = 2048  # tokens; longer prompts keep their end
  buckets: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)  # padding
  batch_size: int = 16


@dataclasses.dataclass
class Optimizer:
  name: str = 'adam'  # or 'sgd', where there is backpropagation
  learning_rate: float = 1e-6
  schedule: str = 'constant'  # or 'linear' or 'cosine' decay to 0
  warmup_steps: int = 0  # linear, from 0
  eps: float = 1e-3
  num_samples: int = 1  # directions a step (n-SPSA)
  distribution: str = 'normal'  # or 'rademacher' or 'sphere'
  generator: str = 'hash32'  # or 'threefry2x32', jax.random's
  one_sided: bool = False
  micro_batches: int = 1  # parts a batch is evaluated in
  weight_decay: float = 0.0
  # Parameters with values of their own, by the first expression that is found
  # in their paths: (regular expression, learning_rate, eps), ...
  groups: tuple[tuple[str, float, float], ...] = ()
  stochastic_rounding: bool = True  # of half-precision weights


@dataclasses.dataclass
class Peft:
  """Which parameters are trained; all if nothing is set."""

  # 'lora'; 'prefix' (keys and values of every layer); 'prompt' (soft tokens);
  # 'bitfit' (biases); 'last_layers'; 'head'; '' for the model's own parameters.
  method: str = ''
  mask: str = ''  # regular expression of those of them to train; '' for all
  adapter: str = ''  # directory of PEFT's to start from, or to evaluate
  rank: int = 8  # of LoRA
  alpha: float = 16.0  # LoRA is scaled by alpha / rank
  rslora: bool = False  # by alpha / sqrt(rank) instead
  targets: str = 'attn/(q|v)$'  # regular expression of LoRA's matrices
  num_tokens: int = 5  # of a prefix or a soft prompt
  init: str = 'tokens'  # random ones, 'text' or 'normal'
  text: str = ''  # to start from, repeated or cut to num_tokens
  # Of the tokens after a prefix: 'zero', as without it (the paper); 'after' it
  # (PEFT); 'jump', tokens that are generated stand num_tokens too far on (the
  # paper's code).
  positions: str = 'zero'
  num_layers: int = 2  # at the end, of last_layers


@dataclasses.dataclass
class Mesh:
  data: int = 1  # copies of the parameters
  fsdp: int = -1  # devices that share a copy, rows split; -1 for the rest
  tensor: int = 1  # devices that share a copy and each row's arithmetic


@dataclasses.dataclass
class Train:
  """Everything that `train.py` needs to know."""

  # 'mezo'; the baselines 'zero_shot', 'icl' (demonstrations in the prompt),
  # 'linear_probe', 'finetune' (backpropagation) and 'head_only' (the same, of
  # the head alone); 'lp_mezo', MeZO from the linear probe on.
  method: str = 'mezo'
  # 'cross_entropy', 'lm', 'accuracy', 'f1', in a config file also a function
  # of (predictions, examples) to be maximised; '' for the task's own.
  objective: str | Callable = ''
  calibration: str = ''  # 'sfc', or 'icl_sfc' with the demonstrations in it
  num_demos: int = 32  # demonstrations of in-context learning
  model: Model = dataclasses.field(default_factory=Model)
  task: Task = dataclasses.field(default_factory=Task)
  data: Data = dataclasses.field(default_factory=Data)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  peft: Peft = dataclasses.field(default_factory=Peft)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  seed: int = 0  # of the directions and of the order of the data
  select: str = 'metric'  # what dev rows choose the best step by, or 'loss'
  zero_shot: bool = True  # evaluate before training, to compare with
  steps: int = 20_000
  eval_every: int = 4_000  # steps; also checkpoints
  checkpoint_every: int = 1_000  # steps; a killed run loses no more than these
  eval_batch_size: int = 32  # rows, at most
  eval_batch_tokens: int = 16_384  # padding included, at most
  max_skipped: int = 10  # steps in a row with a loss that is not finite


# Fields that may differ between the runs that share a working directory.
_FREE = ('steps', 'eval_every', 'checkpoint_every', 'eval_batch_size',
         'eval_batch_tokens', 'mesh', 'max_skipped')


def check(config: Train) -> None:
  """Raises ValueError, in one sentence, for a value that cannot work."""
  d, o, p = config.data, config.optimizer, config.peft
  task_lib.check(config.task)
  score.form(config.task, objective(config))
  by_words = config.task.kind == 'classification'
  rules = [
      (config.method in METHODS,
       f'method {config.method!r} is none of {", ".join(METHODS)}'),
      (config.method not in ('linear_probe', 'lp_mezo') or by_words,
       f'method {config.method!r} needs a task with label words; take '
       'head_only'),
      (config.method not in ('finetune', 'head_only')
       or objective(config) in ('cross_entropy', 'lm'),
       f'objective {objective(config)!r} has no derivative: take a method '
       'without backpropagation, or cross_entropy or lm'),
      (config.calibration in ('', 'sfc', 'icl_sfc'),
       f'calibration {config.calibration!r} is none of sfc, icl_sfc'),
      (not config.calibration or (
          config.task.calibration is not None and not config.task.masked
          and config.task.kind in ('classification', 'multiple_choice')),
       'calibration needs task.calibration, a prompt without content, and '
       'candidates that a causal model scores'),
      (config.calibration != 'icl_sfc' or config.method == 'icl',
       "calibration 'icl_sfc' needs method 'icl'"),
      (config.select in ('metric', 'loss'),
       f"select {config.select!r} is neither 'metric' nor 'loss'"),
      (o.name in ('adam', 'sgd'),
       f"optimizer.name {o.name!r} is neither 'adam' nor 'sgd'"),
      (p.method in peft.TRAINED,
       f'peft.method {p.method!r} is none of '
       f'{", ".join(filter(None, peft.TRAINED))}'),
      (p.positions in ('zero', 'after', 'jump'),
       f'peft.positions {p.positions!r} is none of zero, after, jump'),
      (p.init in peft.prefix.INITS,
       f'peft.init {p.init!r} is none of {", ".join(peft.prefix.INITS)}'),
      (p.init != 'text' or bool(p.text), "peft.init 'text' needs peft.text"),
      (min(p.rank, p.num_tokens, p.num_layers) >= 1,
       'peft.rank, num_tokens and num_layers must be at least 1'),
      (not p.adapter or p.method in peft.ADAPTERS,
       'peft.adapter needs peft.method, one of '
       f'{", ".join(peft.ADAPTERS)}'),
      (p.method not in peft.ADAPTERS or not p.mask or p.method in p.mask,
       f'peft.mask {p.mask!r} is of the model\'s own parameters, not of '
       f'{p.method}; leave it empty, --config.peft.mask='),
      (config.method not in ('head_only', 'lp_mezo')
       or not (p.method or p.mask),
       f'method {config.method!r} says itself what is trained: leave '
       'peft.method and peft.mask out'),
      (all(len(g) == 3 and min(g[1:]) > 0 for g in o.groups),
       f'optimizer.groups {o.groups} must be of (regular expression, '
       'learning_rate, eps), both positive'),
      (config.num_demos >= 1, 'num_demos must be at least 1'),
      (config.method != 'icl' or not (
          config.task.masked or config.task.kind == 'head'),
       "method 'icl' needs a causal model and a prompt"),
      (config.model.dtype in ('float32', 'bfloat16', 'float16'),
       f'model.dtype {config.model.dtype!r} is none of float32, bfloat16, '
       'float16'),
      (o.schedule in ('constant', 'linear', 'cosine'),
       f'optimizer.schedule {o.schedule!r} is none of constant, linear, '
       'cosine'),
      (o.learning_rate > 0, 'optimizer.learning_rate must be positive'),
      (all(map(math.isfinite, (o.learning_rate, o.eps, o.weight_decay))),
       'optimizer.learning_rate, eps and weight_decay must be finite'),
      (o.warmup_steps < max(config.steps, 1),
       'optimizer.warmup_steps must be below steps'),
      (list(d.buckets) == sorted(set(d.buckets)) and len(d.buckets) > 0,
       f'data.buckets {d.buckets} must increase'),
      (d.batch_size >= 1, 'data.batch_size must be at least 1'),
      (d.batch_size % max(o.micro_batches, 1) == 0,
       'optimizer.micro_batches must divide data.batch_size'),
      (o.micro_batches == 1 or score.over_rows(config.task, objective(config)),
       f'objective {objective(config)!r} is of a whole batch, no mean over '
       'rows: leave optimizer.micro_batches at 1'),
      (min(d.num_dev, d.num_train) >= 1,
       'data.num_train and data.num_dev must be at least 1'),
      (d.num_test >= 1 or bool(d.test) or not d.train,
       'data.num_test must be at least 1 where data.test is not set'),
      (min(config.eval_every, config.checkpoint_every, config.steps) >= 1,
       'steps, eval_every and checkpoint_every must be at least 1'),
  ]
  for holds, message in rules:
    if not holds:
      raise ValueError(f'config: {message}.')


def schedule(config: Train, learning_rate: float) -> optax.Schedule:
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


def objective(config: Train) -> str | Callable:
  """What is trained: the config's, or the task's own."""
  return config.objective or score.default_objective(config.task)


def trains(config: Train) -> bool:
  """Whether the method makes steps."""
  return config.method in ('mezo', 'lp_mezo', 'finetune', 'head_only')


def forwards(config: Train) -> int:
  """Forward passes of a batch that a step takes."""
  if config.method in ('finetune', 'head_only'):
    return 1
  n = config.optimizer.num_samples
  return n + 1 if config.optimizer.one_sided else 2 * n


def make_optimizer(config: Train) -> optax.GradientTransformationExtraArgs:
  """The optax transform that a config describes; the state's first entry has
  the loss and the counts of skipped steps."""
  o = config.optimizer
  rates, eps = schedule(config, o.learning_rate), o.eps
  if o.groups:
    rest = ('', o.learning_rate, o.eps)
    groups = {g: (rate, e) for g, rate, e in (rest, *o.groups)}
    groups[''] = groups.pop('')  # the last: what no other one matches
    rates = {g: schedule(config, rate) for g, (rate, _) in groups.items()}
    eps = {g: e for g, (_, e) in groups.items()}
  if config.method in ('finetune', 'head_only'):
    def inner(rate):
      if o.name == 'adam':
        return optax.adamw(rate, weight_decay=o.weight_decay)
      return optax.chain(optax.add_decayed_weights(o.weight_decay),
                         optax.sgd(rate))
    return skip_not_finite(optax.chain(
        backprop(micro_batches=o.micro_batches), by_group(inner, rates)))
  return mezo(
      rates, eps, key=jax.random.key(config.seed), weight_decay=o.weight_decay,
      stochastic_rounding=o.stochastic_rounding, num_samples=o.num_samples,
      directions=KINDS[o.distribution](o.generator), decay=_paths.decayed,
      combine=one_sided if o.one_sided else two_sided,
      micro_batches=o.micro_batches)


def model_name(config: Train) -> str | os.PathLike:
  """The model to load; the quickstart's is fetched where it is missing."""
  name = config.model.name
  return quickstart.model_path() if name == 'quickstart' else name


def to_json(config: Train) -> dict:
  """The config as plain JSON values; a function is its name."""
  name = lambda f: f'{f.__module__}.{f.__qualname__}'
  return json.loads(json.dumps(dataclasses.asdict(config), default=name))


def from_json(saved: dict) -> Train:
  """The inverse of `to_json`; fields that it lacks have their defaults."""
  def plain(v):
    return tuple(map(plain, v)) if isinstance(v, list) else v
  def build(cls, values):
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    return cls(**{
        name: build(fields[name], v) if isinstance(v, dict) else plain(v)
        for name, v in values.items()})
  return build(Train, saved)


def check_same_run(config: Train, saved: dict) -> None:
  """Raises ValueError if a saved run's settings differ where they may not.

  Step counts, the mesh and how often to evaluate may; but with a decaying
  learning rate the number of steps shapes every update.
  """
  free = _FREE
  if config.optimizer.schedule != 'constant':
    free = tuple(f for f in free if f != 'steps')
  changed = []

  def compare(new, old, path):
    if path in free:
      return
    if isinstance(new, dict):
      for name in (n for n in new if n in old):  # others are of a new version
        compare(new[name], old[name], f'{path}.{name}'.lstrip('.'))
    elif new != old:
      changed.append(f'{path} was {old!r} and is now {new!r}')

  compare(to_json(config), saved, '')
  if changed:
    raise ValueError(
        'the working directory holds a run with other settings: '
        f'{"; ".join(changed)}. Choose another --workdir, or delete this one.')
