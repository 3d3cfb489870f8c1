"""The configuration of a run: typed dataclasses with a comment for each field.

The options of single methods, `Variant`, are in `mezo_jax.training.methods`
with the table of methods.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
from typing import Annotated, Any

from mezo_jax.core.errors import InputError
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import Task
from mezo_jax.training import methods
from mezo_jax.training.methods import Variant


@dataclasses.dataclass
class Model:
  # A directory, a .gguf file, the id of a model on the hub, or 'quickstart'.
  name: str = 'quickstart'
  # Dtype of the weights: 'float32', 'bfloat16' or 'float16'. 'int8' and 'int4'
  # quantise matrices; 'codes' keeps them as they are in a GGUF file.
  dtype: str = 'float32'
  revision: str = ''  # branch, tag or commit of a model on the hub
  # Token at the beginning of each text; '' for the tokenizer's. OPT has '<s>'.
  bos_token: str = ''
  remat: bool = False  # recompute activations during backpropagation
  # Keep layers in the host's memory, and one at a time on the devices.
  offload: bool = False


@dataclasses.dataclass
class Data:
  # A .jsonl, .csv, .tsv or .parquet file, or the id of a data set on the hub;
  # '' for the task's own.
  train: str = ''
  train_split: str = ''  # split of a data set on the hub; '' for the task's
  # Like `train`; with '' test rows are taken from the training data given.
  test: str = ''
  test_split: str = ''  # split of a data set on the hub; '' for the task's
  subset: str = ''  # configuration of a data set on the hub
  # Rows of each split. -1 takes a share of the rows that the others leave (see
  # `mezo_jax.tasks.data.share_out`): train 60 %, dev 20 % and at most 500, test
  # 20 % and at most 1,000.
  num_train: int = 1000  # as in the paper
  num_dev: int = 500
  num_test: int = 1000  # of a test file or split: at most; 0 or -1 for all
  # If positive, train and dev have this many rows of each label.
  k_shot: int = 0
  seed: int = 0  # seed of the choice of train and dev rows
  test_seed: int = 0  # seed of the choice of test rows
  max_length: int = 2048  # tokens; the end of a longer prompt is kept
  buckets: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)  # padding
  batch_size: int = 16


@dataclasses.dataclass
class Optimizer:
  """How a gradient, or MeZO's estimate of it, becomes an update."""

  name: str = 'adam'  # or 'sgd'; read by methods with backpropagation
  learning_rate: float = 1e-6
  schedule: str = 'constant'  # or 'linear' or 'cosine' decay to 0
  warmup_steps: int = 0  # steps of a linear increase from 0
  weight_decay: float = 0.0
  # Values for groups of parameters: (regular expression, learning_rate, eps),
  # ... The first expression that is found in a parameter's path applies.
  groups: tuple[tuple[str, float, float], ...] = ()
  micro_batches: int = 1  # number of parts in which a batch is evaluated


@dataclasses.dataclass
class Spsa:
  """How MeZO estimates a gradient. Backpropagation does not read it."""

  eps: float = 1e-3  # perturbation scale along z
  num_samples: int = 1  # directions per step (n-SPSA)
  # How directions are evaluated: 'scan', one after the other; 'batch', all in
  # one pass; 'rows', all in one pass, each on its own part of the rows.
  over: str = 'scan'
  # Distribution of z: 'normal', 'rademacher', 'low_rank', 'lazy_low_rank'
  # (LOZO) or 'subzero'.
  distribution: str = 'normal'
  rank: int = 16  # rank, for the low-rank distributions
  # Steps for which lazy_low_rank keeps its columns, and subzero its bases.
  lazy_every: int = 50
  # Generator of random bits; or 'threefry2x32', that of jax.random.
  generator: str = 'hash32'
  # Or 'one_sided', which compares with the loss at the weights instead of that
  # at -eps; or 'fzoo'.
  combine: str = 'two_sided'
  stochastic_rounding: bool = True  # of half-precision weights
  # Steps between updates of the weights. In between, losses are evaluated at
  # the weights plus the accumulated updates.
  fold_every: int = 1


@dataclasses.dataclass
class Privacy:
  """Options of method 'private': (epsilon, delta)-differential privacy of each
  training row. `mezo_jax.training.privacy` says what that does not cover."""

  epsilon: float = 6.0  # budget of all steps together
  delta: float = 1e-5
  clip: float = 10.0  # largest difference of a row's losses, over 2 eps
  mechanism: str = 'gaussian'  # or 'laplace'
  # Whether dev rows, which have no privacy, choose the step that is the result.
  # Otherwise it is the last step.
  public_dev: bool = False


@dataclasses.dataclass
class Peft:
  """Which parameters are trained; all if nothing is set."""

  # 'lora'; 'prefix' (keys and values of every layer); 'prompt' (soft tokens);
  # 'bitfit' (biases); 'last_layers'; 'head'; 'scales' (of quantised weights);
  # '' for the model's own parameters.
  method: str = ''
  # Regular expression of those of them that are trained; '' for all.
  mask: str = ''
  # Directory of a PEFT adapter to start from, or to evaluate.
  adapter: str = ''
  rank: int = 8  # rank of LoRA
  alpha: float = 16.0  # LoRA is scaled by alpha / rank
  rslora: bool = False  # scale LoRA by alpha / sqrt(rank) instead
  targets: str = 'attn/(q|v)$'  # regular expression of LoRA's matrices
  num_tokens: int = 5  # length of a prefix or a soft prompt
  init: str = 'tokens'  # random tokens; or 'text' or 'normal'
  text: str = ''  # for init 'text'; repeated or cut to num_tokens
  # Positions of the tokens after a prefix: 'zero', as without it (the paper),
  # or 'after' it (PEFT).
  positions: str = 'zero'
  # Number of layers that are set apart as `last_layers/...`: with method
  # 'last_layers', and where mask or targets name them
  # ('^last_layers/attn/(q|v)$').
  num_layers: int = 2


@dataclasses.dataclass
class Also:
  """A further task of a run; see `mezo_jax.training.mixture`."""

  name: str  # in the table and the metrics
  task: Task
  data: Data
  weight: float = 1.0  # weight of its loss; the first task's is 1


@dataclasses.dataclass
class Mesh:
  data: int = 1  # copies of the parameters
  # Devices that share a copy of the parameters and split the rows; -1 for all
  # that are left.
  fsdp: int = -1
  tensor: int = 1  # devices that share a copy and the arithmetic of each row
  direction: int = 1  # copies that share a step's directions and signs


# Annotations by which `mezo_jax.training.config_fields` finds how a command
# line sets a field.
Objective = Annotated[str | Callable, 'a name, or in a config file a function']
Tasks = tuple[Also, ...]


@dataclasses.dataclass
class Train:
  """Everything that `train.py` needs to know."""

  # How the model is trained, or a baseline: a name in the table of
  # mezo_jax/training/methods.py; see docs/variants.md and docs/tasks.md.
  method: str = 'mezo'
  # 'cross_entropy', 'lm', 'accuracy', 'f1', or in a config file a function of
  # (predictions, examples) that is maximised; '' for the task's own.
  objective: Objective = ''
  calibration: str = ''  # or 'sfc'
  num_demos: int = 32  # demonstrations of in-context learning
  model: Model = dataclasses.field(default_factory=Model)
  task: Task = dataclasses.field(default_factory=Task)
  data: Data = dataclasses.field(default_factory=Data)
  also: Tasks = ()  # further tasks of the same run
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  spsa: Spsa = dataclasses.field(default_factory=Spsa)
  variant: Variant = dataclasses.field(default_factory=Variant)
  privacy: Privacy = dataclasses.field(default_factory=Privacy)
  peft: Peft = dataclasses.field(default_factory=Peft)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  seed: int = 0  # seed of the directions and of the order of the data
  # What chooses the best step on dev rows: 'metric', the result's main number
  # (see `metric` below; an objective that is a function is one), or 'loss', the
  # objective's value.
  select: str = 'metric'
  zero_shot: bool = True  # evaluate before training, for comparison
  steps: int = 20_000
  eval_every: int = 4_000  # steps; a checkpoint is saved then, too
  # Steps. When a killed run resumes, later ones are replayed from the log.
  # Backpropagation has no log and loses them.
  checkpoint_every: int = 1_000
  keep_checkpoints: int = 1  # newest ones, in addition to the best
  # If only the last layers or a head are trained, the activations of the frozen
  # layers are cached for each row (docs/one_gpu.md): in memory up to
  # `trunk_memory` GiB, and otherwise in files of the working directory.
  keep_trunk: bool = True
  trunk_memory: float = 4.0
  eval_batch_size: int = 32  # rows, at most
  eval_batch_tokens: int = 16_384  # at most, including padding
  max_skipped: int = 10  # consecutive steps with a loss that is not finite
  # A run has diverged if the mean loss of 100 steps is above that of the first
  # 100 by this many standard deviations of a step's loss; 0 for no limit.
  max_rise: float = 10.0


# Fields that may differ between the runs that share a working directory. A
# model may have been moved: its files are compared instead of its name.
_FREE = (
    'model.name', 'model.revision', 'model.offload', 'steps', 'eval_every',
    'checkpoint_every', 'keep_checkpoints', 'eval_batch_size',
    'eval_batch_tokens', 'mesh', 'max_skipped', 'max_rise', 'trunk_memory')

# Fields that earlier versions had. Each has the value that means what is now
# the only behaviour, or `_ANY` if its value changes no result.
_ANY = object()
_REMOVED = {
    'max_still': 100,
    'variant.stored_anchor': False,
    'variant.anneal': 1.0,
    'variant.anneal_every': _ANY,
    'variant.norm': 'grad'}
# Values that earlier versions had of fields that are still there.
_REMOVED_VALUES = {'spsa.distribution': 'sphere',
                   'peft.positions': 'jump', 'calibration': 'icl_sfc'}


def bound(config: Train) -> dict[str, Any]:
  """Returns the fields, as JSON values, that may not differ between the runs
  that share a working directory."""
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


def to_json(config: Train) -> dict[str, Any]:
  """Returns the config as plain JSON values; a function is its name."""
  return json.loads(json.dumps(
      dataclasses.asdict(config), default=_name_of_function))


def _name_of_function(f: Callable) -> str:
  """Returns the module and name of a function, also of a method, a partial or
  an object that can be called."""
  f = getattr(f, 'func', f)
  named = f if hasattr(f, '__qualname__') else type(f)
  return f'{named.__module__}.{named.__qualname__}'


def from_json(saved: dict[str, Any]) -> Train:
  """Returns the config that `to_json` saved, also in an earlier version. Fields
  that are missing have their defaults.

  Raises:
    InputError: if a field had a value that this version does not support.
  """
  def plain(v):
    return tuple(map(plain, v)) if isinstance(v, list) else v
  def build(cls, values):
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    return cls(**{
        name: build(fields[name], v) if isinstance(v, dict) else plain(v)
        for name, v in values.items()})
  config = build(Train, _without_removed(saved))
  config.also = tuple(build(Also, a) for a in saved.get('also', ()))
  return config


def _without_removed(saved: dict) -> dict:
  """Returns a saved config without the fields of `_REMOVED`.

  Raises:
    InputError: if one of them, or a field of `_REMOVED_VALUES`, had a value
      that this version does not support.
  """
  out = dict(saved)
  for path, neutral in _REMOVED.items():
    parent, _, name = path.rpartition('.')
    holder = dict(out.get(parent, {})) if parent else out
    if name not in holder:
      continue
    value = holder.pop(name)
    if neutral is not _ANY and value != neutral:
      raise InputError(_unsupported(path, value))
    if parent:
      out[parent] = holder
  for path, unsupported in _REMOVED_VALUES.items():
    parent, _, name = path.rpartition('.')
    holder = out.get(parent, {}) if parent else out
    if holder.get(name) == unsupported:
      raise InputError(_unsupported(path, unsupported))
  return out


def _unsupported(path: str, value) -> str:
  return (f'the saved config has {path} of {value!r}, which this version of '
          'mezo_jax does not support; use the version that made the run, or '
          'choose another --workdir.')


def check_same_run(config: Train, saved: dict[str, Any]) -> None:
  """Checks that a config may continue a saved run.

  The number of steps, the mesh and how often to evaluate may differ. But with a
  decaying learning rate the number of steps shapes every update. In private
  training more steps would spend more than the noise of each was chosen for,
  and steps that are replayed on another mesh would differ in rounding alone,
  which no noise hides.

  Raises:
    InputError: if a setting differs that may not; it names each such field with
      both values.
  """
  private = methods.method_of(config).private
  bound = {'steps', 'mesh'} if private else set()
  if config.optimizer.schedule != 'constant':
    bound.add('steps')
  free = [f for f in _FREE if f not in bound]
  changed = []

  def compare(new, old, path):
    if path in free:
      return
    if isinstance(new, dict):
      for name in (n for n in new if n in old):  # others are new fields
        compare(new[name], old[name], f'{path}.{name}'.lstrip('.'))
    elif path == 'also' and isinstance(old, list) and len(new) == len(old):
      for i, (task, before) in enumerate(zip(new, old)):
        compare(task, before, f'also[{i}]')
    elif new != old:
      changed.append(f'{path} was {old!r} and is now {new!r}')

  compare(to_json(config), _without_removed(saved), '')
  if private and any(c.startswith('steps') for c in changed):
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
