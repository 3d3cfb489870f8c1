"""The configuration of a run: typed dataclasses with a comment a field."""

from collections.abc import Callable
import dataclasses
import functools
import json
from typing import Annotated

from mezo_jax.core.errors import InputError
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import Task


@dataclasses.dataclass
class Model:
  name: str = 'quickstart'  # directory, .gguf file, hub id, or 'quickstart'
  # Of the weights: 'float32', 'bfloat16', 'float16'; matrices quantised to
  # 'int8' or 'int4', or as a GGUF file has them, 'codes'.
  dtype: str = 'float32'
  revision: str = ''  # branch, tag or commit of a hub id
  bos_token: str = ''  # put first; '' for the tokenizer's own. OPT: '<s>'
  remat: bool = False  # backpropagation keeps no more than layers' inputs
  offload: bool = False  # layers in the host's memory, one on devices at a time


@dataclasses.dataclass
class Data:
  train: str = ''  # .jsonl, .csv, .tsv, .parquet, hub id; '' for the task's
  train_split: str = ''  # of a hub data set; '' for the task's
  test: str = ''  # like `train`; '' takes test rows out of training data given
  test_split: str = ''  # of a hub data set; '' for the task's
  subset: str = ''  # configuration of a hub data set
  # Rows of each split. -1 takes a share of the rows that the others leave (see
  # `mezo_jax.tasks.data.share_out`): train 60 %, dev 20 % and at most 500, test
  # 20 % and at most 1,000.
  num_train: int = 1000  # as the paper
  num_dev: int = 500
  num_test: int = 1000  # of a test file or split: at most; 0 or -1 for all
  k_shot: int = 0  # > 0: k rows of each label for train, as many for dev
  seed: int = 0  # of the choice of train and dev rows
  test_seed: int = 0  # of the choice of test rows
  max_length: int = 2048  # tokens; longer prompts keep their end
  buckets: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)  # padding
  batch_size: int = 16


@dataclasses.dataclass
class Optimizer:
  """What is done with a gradient, or with MeZO's estimate of one."""

  name: str = 'adam'  # or 'sgd', where there is backpropagation
  learning_rate: float = 1e-6
  schedule: str = 'constant'  # or 'linear' or 'cosine' decay to 0
  warmup_steps: int = 0  # linear, from 0
  weight_decay: float = 0.0
  # Parameters with values of their own, by the first expression that is found
  # in their paths: (regular expression, learning_rate, eps), ...
  groups: tuple[tuple[str, float, float], ...] = ()
  micro_batches: int = 1  # parts a batch is evaluated in


@dataclasses.dataclass
class Spsa:
  """How MeZO estimates; unused where there is backpropagation."""

  eps: float = 1e-3  # how far along z the losses are taken
  num_samples: int = 1  # directions a step (n-SPSA)
  # All in one pass, each of the whole 'batch', or each of 'rows' of its own;
  # 'scan': one after the other.
  over: str = 'scan'
  # Of z; or 'rademacher', 'low_rank', 'lazy_low_rank' (LOZO's), 'subzero'.
  distribution: str = 'normal'
  rank: int = 16  # of the last three
  # Steps that lazy_low_rank's columns, or subzero's bases, are the same for.
  lazy_every: int = 50
  generator: str = 'hash32'  # of z; or 'threefry2x32', jax.random's
  # Or 'one_sided': compare with the clean loss, not with -eps; or 'fzoo'.
  combine: str = 'two_sided'
  stochastic_rounding: bool = True  # of half-precision weights
  fold_every: int = 1  # steps; until then updates are evaluated, not added


@dataclasses.dataclass
class Variant:
  """Of MeZO's relatives; each says in `mezo_jax.variants` what they are."""

  every: int = 2  # svrg: steps from anchor to anchor
  anchor_learning_rate: float = 1e-3  # svrg: of an anchor's step
  anchor_rows: int = 0  # svrg: training rows of an anchor; 0 for all
  # svrg: keep a copy of the anchor; weights then move every step.
  stored_anchor: bool = False
  anneal: float = 1.0  # svrg: what rates are divided by if losses rise
  anneal_every: int = 100  # svrg: steps from look to look
  window: int = 8  # ..._by_history: steps that are remembered
  b1: float = 0.9  # ..._by_history, lozo_m: weight of the step before
  b2: float = 0.99  # adam_by_history, scalar_adam: of its square
  # sparse_mezo: of weights, the smallest, to train; mazo: of each row.
  share: float = 0.25
  num_scores: int = 16  # mazo, ..._modified: directions of the first look
  alpha: float = 1.0  # mazo: of what a step gains by a weight
  beta: float = 0.0  # mazo: of a weight's size
  norm: str = 'grad'  # ..._modified: of each layer's gradient; or 'param'
  clip: float = 100.0  # qzo: of projected gradients
  curvature_rate: float = 1e-8  # hizoo: weight of a step's curvature


@dataclasses.dataclass
class Privacy:
  """Of method 'private': (epsilon, delta)-differential privacy of each training
  row; see `mezo_jax.training.privacy` for what that does not cover."""

  epsilon: float = 6.0  # what all steps together may spend
  delta: float = 1e-5
  clip: float = 10.0  # of a row's difference of losses over 2 eps
  mechanism: str = 'gaussian'  # or 'laplace'
  # Whether dev rows, which have no privacy, choose the step that is the result;
  # else it is the last.
  public_dev: bool = False


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
  # At the end, `last_layers/...`, which are apart from `layers/...` with that
  # method, and where mask or targets name them ('^last_layers/attn/(q|v)$').
  num_layers: int = 2


@dataclasses.dataclass
class Also:
  """A task that is trained beside the first one; see
  `mezo_jax.training.mixture`."""

  name: str  # in the table and the metrics
  task: Task
  data: Data
  weight: float = 1.0  # of its loss; the first task's is 1


@dataclasses.dataclass
class Mesh:
  data: int = 1  # copies of the parameters
  fsdp: int = -1  # devices that share a copy, rows split; -1 for the rest
  tensor: int = 1  # devices that share a copy and each row's arithmetic
  direction: int = 1  # copies that share out a step's directions and signs


# Annotations by which `mezo_jax.training.fields` finds how a command line sets
# a field.
Objective = Annotated[str | Callable, 'a name, or in a config file a function']
Tasks = tuple[Also, ...]


@dataclasses.dataclass
class Train:
  """Everything that `train.py` needs to know."""

  # 'mezo'; its relatives 'svrg', 'sparse_mezo', 'momentum_by_history',
  # 'adam_by_history', 'scalar_adam', 'sign', 'conservative', 'one_point',
  # 'forward_grad', 'quzo', 'mazo', 'private' (docs/relatives.md); the baselines
  # 'zero_shot', 'icl' (demonstrations in the prompt), 'linear_probe',
  # 'finetune' (backpropagation) and 'head_only' (the same, of the head alone);
  # 'lp_mezo', MeZO from the linear probe on.
  method: str = 'mezo'
  # 'cross_entropy', 'lm', 'accuracy', 'f1', in a config file also a function
  # of (predictions, examples) to be maximised; '' for the task's own.
  objective: Objective = ''
  calibration: str = ''  # 'sfc', or 'icl_sfc' with the demonstrations in it
  num_demos: int = 32  # demonstrations of in-context learning
  model: Model = dataclasses.field(default_factory=Model)
  task: Task = dataclasses.field(default_factory=Task)
  data: Data = dataclasses.field(default_factory=Data)
  also: Tasks = ()  # more tasks in the same run
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  spsa: Spsa = dataclasses.field(default_factory=Spsa)
  variant: Variant = dataclasses.field(default_factory=Variant)
  privacy: Privacy = dataclasses.field(default_factory=Privacy)
  peft: Peft = dataclasses.field(default_factory=Peft)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  seed: int = 0  # of the directions and of the order of the data
  # What dev rows choose the best step by: 'metric', the result's main number
  # (`metric` below: an objective that is a function chooses), or 'loss', the
  # objective's value.
  select: str = 'metric'
  zero_shot: bool = True  # evaluate before training, to compare with
  steps: int = 20_000
  eval_every: int = 4_000  # steps; also checkpoints
  # Steps; those since the last are made again from the log when a killed run
  # goes on. Backpropagation has no log and loses them.
  checkpoint_every: int = 1_000
  keep_checkpoints: int = 1  # newest ones, beside the best
  # Where all that is trained comes last, as layers or a head, what is before is
  # computed once for each row (docs/peft.md): in memory up to so many GiB,
  # beyond in files of the working directory.
  keep_trunk: bool = True
  trunk_memory: float = 4.0
  eval_batch_size: int = 32  # rows, at most
  eval_batch_tokens: int = 16_384  # padding included, at most
  max_skipped: int = 10  # steps in a row with a loss that is not finite
  max_still: int = 100  # whose projected gradients are 0; 0 for any number
  # Standard deviations of a step's loss by which the mean of 100 steps may be
  # above that of the first 100, or the run has diverged; 0 for any number.
  max_rise: float = 10.0


# Fields that may differ between the runs that share a working directory. A
# model may have been moved: its files are compared instead of its name.
_FREE = (
    'model.name', 'model.revision', 'model.offload', 'steps', 'eval_every',
    'checkpoint_every', 'keep_checkpoints', 'eval_batch_size',
    'eval_batch_tokens', 'mesh', 'max_skipped', 'max_still', 'max_rise',
    'trunk_memory')


def bound(config: Train) -> dict:
  """The fields, as JSON values, that runs of one kind have in common."""
  out = to_json(config)
  for path in _FREE:
    *parents, name = path.split('.')
    functools.reduce(dict.__getitem__, parents, out).pop(name)
  return out


def objective(config: Train) -> str | Callable:
  """Returns the objective: the config's, or the task's own."""
  return objectives.of(config.task, config.objective)


def metric(config: Train) -> str:
  """Returns the name of the number that stands for a result, by which steps
  and runs are compared."""
  return objectives.metric(config.task, objective(config))


def in_words(config: Train) -> str:
  """Returns the settings that shape a run most, for its first line."""
  o, p = config.optimizer, config.peft
  what = p.method or 'all parameters'
  if p.mask:
    what = f'{what} that match {p.mask!r}'
  named = objective(config)
  trained = objectives.name(named) if callable(named) else named
  chosen = 'loss' if config.select == 'loss' else metric(config)
  return (f'method {config.method}, objective {trained}, {what}, learning rate '
          f'{o.learning_rate:g} ({o.schedule}), {config.steps:,} steps of '
          f'{config.data.batch_size} rows, best step by {chosen}')


def to_json(config: Train) -> dict:
  """Returns the config as plain JSON values; a function is its name."""
  return json.loads(json.dumps(
      dataclasses.asdict(config), default=_name_of_function))


def _name_of_function(f: Callable) -> str:
  """Returns the module and name of a function, also of a method, a partial or
  an object that can be called."""
  f = getattr(f, 'func', f)
  named = f if hasattr(f, '__qualname__') else type(f)
  return f'{named.__module__}.{named.__qualname__}'


def from_json(saved: dict) -> Train:
  """The inverse of `to_json`; fields that it lacks have their defaults.

  Also of the configs of earlier versions.
  """
  def plain(v):
    return tuple(map(plain, v)) if isinstance(v, list) else v
  def build(cls, values):
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    return cls(**{
        name: build(fields[name], v) if isinstance(v, dict) else plain(v)
        for name, v in values.items()})
  config = build(Train, _of_this_version(saved))
  config.also = tuple(build(Also, a) for a in saved.get('also', ()))
  return config


def _of_this_version(saved: dict) -> dict:
  """A saved config with the fields of `Spsa` taken from `Optimizer`, where
  earlier versions had them, and ``combine`` for what was ``one_sided``."""
  moved = {f.name for f in dataclasses.fields(Spsa)} | {'one_sided'}
  old = saved.get('optimizer', {})
  spsa = {k: v for k, v in old.items() if k in moved} | saved.get('spsa', {})
  if 'one_sided' in spsa:
    one_sided = spsa.pop('one_sided')
    spsa = {'combine': 'one_sided' if one_sided else 'two_sided'} | spsa
  return saved | {
      'optimizer': {k: v for k, v in old.items() if k not in moved},
      'spsa': spsa}


def check_same_run(config: Train, saved: dict) -> None:
  """Raises InputError if a saved run's settings differ where they may not; it
  names each field with its value then and now.

  Step counts, the mesh and how often to evaluate may; but with a decaying
  learning rate the number of steps shapes every update, and in private training
  more of them would spend more than the noise of each was made for (and steps
  that are made again on another mesh would differ in rounding alone, which no
  noise hides).
  """
  bound = {'steps', 'mesh'} if config.method == 'private' else set()
  if config.optimizer.schedule != 'constant':
    bound.add('steps')
  free = [f for f in _FREE if f not in bound]
  changed = []

  def compare(new, old, path):
    if path in free:
      return
    if isinstance(new, dict):
      for name in (n for n in new if n in old):  # others are of a new version
        compare(new[name], old[name], f'{path}.{name}'.lstrip('.'))
    elif path == 'also' and isinstance(old, list) and len(new) == len(old):
      for i, (task, before) in enumerate(zip(new, old)):
        compare(task, before, f'also[{i}]')
    elif new != old:
      changed.append(f'{path} was {old!r} and is now {new!r}')

  compare(to_json(config), _of_this_version(saved), '')
  if config.method == 'private' and any(c.startswith('steps') for c in changed):
    raise InputError(
        f'the budget of this private run, epsilon {config.privacy.epsilon:g}, '
        f'is spent by its {saved["steps"]} steps, and steps is now '
        f'{config.steps}: its noise was made for that number, so keep it, or '
        'choose another --workdir.')
  if changed:
    why = ''
    if 'steps' in bound and any(c.startswith('steps ') for c in changed):
      why = (' (steps may change only with optimizer.schedule '
             f"'constant': {config.optimizer.schedule!r} ends with the last "
             'step, so their number shapes every update)')
    raise InputError(
        'the working directory holds a run with other settings: '
        f'{"; ".join(changed)}{why}. Choose another --workdir, or delete this '
        'one.')
