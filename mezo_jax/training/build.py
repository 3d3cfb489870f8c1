"""Builds the data, the model, the parameters and the optimizer of a config.

`build` does all of it, and reads the data first, so that mistakes in the data
are found before the weights are loaded. Evaluation, export and planning use the
other functions of this module.
"""

from collections.abc import Callable
import os
from pathlib import Path
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mezo_jax import models, peft
from mezo_jax.core import fingerprint, paths, sharding
from mezo_jax.core.errors import InputError
from mezo_jax.distributed import agreement
from mezo_jax.models.formats import classifier
from mezo_jax.tasks import chat, evaluate, head, quickstart_data, score
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks.encode import batch_of, Encoded
from mezo_jax.tasks.task import LOSS
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods, optimizer, privacy
from mezo_jax.training import trainable as trainable_lib


class Built(NamedTuple):
  """Holds the parts of a run.

  An abstract `Built` has `jax.ShapeDtypeStruct` in place of arrays. The last
  four attributes are None for a method that does not train.

  Attributes:
    mesh: Mesh of the run's devices.
    tokenizer: Tokenizer of the model.
    splits: Encoded rows of the first task.
    model: The model.
    params: The trained parameters, or all parameters if the method does not
      train.
    frozen: The other parameters.
    loss_fn: ``loss_fn(params, batch)``, where ``params`` are all parameters.
      For the objective 'reward', it returns rollouts instead of losses.
    tx: The optimizer.
    opt_state: State of the optimizer before the first step.
    host: Calls the Python functions that ``loss_fn`` needs.
  """

  mesh: jax.sharding.Mesh
  tokenizer: Any
  splits: data_lib.Splits
  model: models.Transformer
  params: dict[str, Any]
  frozen: dict[str, Any]
  loss_fn: Callable | None = None
  tx: optax.GradientTransformation | None = None
  opt_state: Any = None
  host: score.Host | None = None

  def without_weights(self) -> 'Built':
    """Returns the same parts with None in place of all arrays.

    A step donates its parameters, so no second reference to them may be used
    or keep their memory.
    """
    return self._replace(params=None, frozen=None, opt_state=None)


def build(config: config_lib.Train, *, abstract: bool = False,
          model_config: models.Config | None = None, tokenizer: Any = None,
          rows: data_lib.Rows | None = None,
          mesh: jax.sharding.Mesh | None = None,
          say: Callable[[str], None] = print) -> Built:
  """Builds everything that a run needs before its first step.

  Args:
    config: Config of the run. `mezo_jax.training.checks.check_config` must have
      checked it.
    abstract: Whether to build `jax.ShapeDtypeStruct` with shardings instead of
      parameters and optimizer state. Then no weights are read. Defaults to
      False.
    model_config: Config of the model. Defaults to None, which reads it from the
      model's files.
    tokenizer: Tokenizer of the model. Defaults to None, which reads it from the
      model's files.
    rows: Rows of all splits. Defaults to None, which reads the data that the
      config names.
    mesh: Mesh of the run. For planning it may consist of devices that are not
      available; see `mezo_jax.planning.machines`. Defaults to None, for the
      mesh of the config.
    say: A function that reports a line to the user. Defaults to `print`.

  Returns:
    The parts of the run.

  Raises:
    InputError: if the config, its files and the devices do not fit each other.
  """
  mesh = make_mesh(config) if mesh is None else mesh
  if model_config is None:
    model_config = read_config(config)
  if tokenizer is None:
    tokenizer = read_tokenizer(config)
  rows = data_lib.read_rows(config.data, config.task) if rows is None else rows
  splits = encode_rows(config, rows, model_config, tokenizer, say)
  model, params = load(config, model_config, mesh, abstract)
  model, params = add(config, model, params, tokenizer, mesh)
  if not methods.method_of(config).steps:
    return Built(mesh, tokenizer, splits, model, params, {})
  params, frozen = trainable_lib.split(config, params)
  host = score.Host()
  loss_fn = make_loss_fn(config, model, splits.train, tokenizer,
                         _host_is_silent if abstract else host)
  tx = optimizer.make_optimizer(
      config, params, privacy_plan(config, splits, mesh))
  return Built(mesh, tokenizer, splits, model, params, frozen, loss_fn, tx,
               init_state(tx, params, mesh), host)


def make_loss_fn(config: config_lib.Train, model: models.Transformer,
                 train: Encoded, tokenizer: Any, host: Callable[..., Any]
                 ) -> Callable[..., Any]:
  """Returns the loss, or for the objective 'reward' the function of rollouts.

  Args:
    config: Config of the run.
    model: The model.
    train: The encoded training rows.
    tokenizer: Tokenizer of the model.
    host: Calls the Python functions that the loss needs.
  """
  if config_lib.is_rewarded(config):
    return score.make_rollout_fn(
        model, config.task, tokenizer, config.reward.temperature, config.seed)
  return score.make_loss_fn(model, train, config.task,
                            config_lib.objective(config), tokenizer, host)


def _host_is_silent(fn, shape, found, *args):
  """Stands in for `score.Host` when a run is only compiled, not executed.

  It returns zeros that formally depend on the predictions ``found``. Otherwise
  the compiler would remove the computation of the predictions.
  """
  del fn, args
  return jnp.zeros(shape.shape, shape.dtype) + 0 * jnp.sum(found)


# --- mesh, model and data ---------------------------------------------------


def make_mesh(config: config_lib.Train, devices: Any = None
              ) -> jax.sharding.Mesh:
  """Returns the mesh that a config describes.

  Args:
    config: Config of the run.
    devices: Devices of the mesh. Defaults to None, for all devices of JAX.

  Raises:
    InputError: if the sizes of the mesh do not fit the number of devices, or if
      a batch cannot be split evenly.
  """
  sizes = config.mesh
  mesh = sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor,
                            sizes.direction, devices)
  for rows in (config.data.batch_size,
               *(a.data.batch_size for a in config.also)):
    if rows % sharding.row_groups(mesh):
      raise InputError(
          f'data.batch_size {rows} cannot be split evenly over the '
          f'{sharding.row_groups(mesh)} groups of devices of mesh.data and '
          'mesh.fsdp; make it a multiple of that number.')
  return mesh


def model_name(config: config_lib.Train) -> str | os.PathLike[str]:
  """Returns the path or hub id of the model to load.

  For 'quickstart' it downloads the model if it is not cached.
  """
  name = config.model.name
  if name == 'quickstart':
    name = quickstart_data.model_path()
  assert name is not None  # model_path raises if the download fails
  return name


def plain_name(config: config_lib.Train) -> str:
  """Returns the name of the model for use in published files.

  That is the id of a hub model, or the last component of a local path, so that
  the directories of this machine are not published.
  """
  name = config.model.name
  local = Path(name).expanduser()
  hub_id = re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', name)
  return name if hub_id and not local.exists() else local.resolve().name


def read_config(config: config_lib.Train) -> models.Config:
  """Reads the config of the model."""
  return models.load_config(model_name(config), config.model.revision or None)


def read_tokenizer(config: config_lib.Train) -> Any:
  """Reads the tokenizer of the model, with the chat template of the task."""
  tokenizer = models.load_tokenizer(
      model_name(config), config.model.revision or None,
      config.model.bos_token or None)
  for task in (config.task, *(also.task for also in config.also)):
    if task.chat_template:
      tokenizer.chat_template = chat.read_template(
          task.chat_template, tokenizer)
  return tokenizer


def encode_rows(config: config_lib.Train, rows: data_lib.Rows,
                model_config: models.Config, tokenizer: Any,
                say: Callable[[str], None]) -> data_lib.Splits:
  """Encodes rows as tokens, in the form that objective and evaluation need.

  It also reports the number of rows, and warns about rows that look wrong.

  Args:
    config: Config of the run.
    rows: Rows of all splits, from `mezo_jax.tasks.data.read_rows`.
    model_config: Config of the model.
    tokenizer: Tokenizer of the model.
    say: A function that reports a line to the user.

  Returns:
    The encoded rows of all splits.

  Raises:
    InputError: if data, task and model do not fit each other.
  """
  task, method = config.task, methods.method_of(config)
  before = trainable_lib.tokens_before(config)
  if not task.traits.new_head and not model_config.head:
    raise InputError(
        f'the files of model.name {config.model.name} are those of a base '
        f'class, without the head that a task of kind {task.kind!r} needs; '
        'use a model that was saved with its head, or set '
        '--config.task.kind=head and task.label_names.')
  if task.traits.new_head:
    _check_head(config, model_config)
  if not task.traits.new_head and task.masked == model_config.causal:
    raise InputError(
        f'the prompt {task.template!r} is for a '
        f'{"masked" if task.masked else "causal"} model, which '
        f'{config.model.name} is not; choose another --config.task.template '
        '(with {mask} at the position of the label words for a masked model, '
        'and without it for a causal one).')
  objective = config_lib.objective(config)
  needs_gold = (objectives.needs_gold(objective) or method.probe
                or method.demonstrations)
  say(split_words(config, rows))
  if method.steps and not method.private and (
      len(rows.train) < config.data.batch_size):
    raise InputError(
        f'{len(rows.train)} training rows are fewer than a batch of '
        f'{config.data.batch_size}; lower --config.data.batch_size.')
  # The loss of conversations needs no generated answers.
  only_loss = config_lib.metric(config) == LOSS
  gold_only = {
      'train': objectives.gold_only(objective),
      # In-context learning does not evaluate the dev rows, so their cheapest
      # form is enough.
      'dev': method.demonstrations or only_loss or (
          config.select == 'loss' and task.traits.generates
          and objectives.gold_only(objective)),
      'test': only_loss}
  first = model_config.vocab_size
  soft = range(first, first + (before if methods.part_of(config).soft else 0))
  splits = data_lib.encode_rows(
      rows, task, tokenizer, causal=model_config.causal,
      limit=min(config.data.max_length, model_config.max_length - before),
      buckets=config.data.buckets,
      gold_only=[name for name, only in gold_only.items() if only],
      num_demos=config.num_demos if method.demonstrations else 0,
      prior=bool(config.calibration), soft_ids=soft,
      untold=('train',) if method.private else (),
      # A baseline that generates answers has no use for the LM loss.
      lm_loss=objectives.gold_only(objective) and (
          method.steps or not task.traits.generates),
      # The chat template of a prompt has no place for a right answer.
      gold_loss=method.steps and not task.chat, needs_gold=needs_gold, say=say)
  most = max((token for split in (splits.train, splits.dev, splits.test,
                                  *splits.gold.values())
              for part in (*split.prompts, *(
                  answer for row in split.candidates for answer in row))
              for token in part), default=0)
  if most >= first + before:
    raise InputError(
        f'the tokenizer of {config.model.name} gives token id {most} for these '
        f'rows, but the vocabulary of the model has {first} tokens; use the '
        'tokenizer that belongs to the model.')
  for text in data_warnings(config, rows):
    say(f'warning: {text}.')
  agreement.agree(
      'the rows', lambda: fingerprint.of_rows(
          splits.train, splits.dev, splits.test),
      'copy the same data to every host')
  return splits


def eval_sizes(config: config_lib.Train, splits: data_lib.Splits
               ) -> dict[str, evaluate.Sizes]:
  """Returns the sizes of the evaluation batches of each split.

  Args:
    config: Config of the run, which limits the rows and tokens of a batch.
    splits: The encoded rows.
  """
  return evaluate.sizes_of(
      splits, config.eval_batch_size, config.eval_batch_tokens)


def make_evaluators(config: config_lib.Train, model: models.Transformer,
                    splits: data_lib.Splits, tokenizer: Any,
                    mesh: jax.sharding.Mesh) -> evaluate.Evaluators:
  """Returns functions that evaluate the dev and test rows of a run.

  Args:
    config: Config of the run.
    model: The model.
    splits: The encoded rows.
    tokenizer: Tokenizer of the model.
    mesh: Mesh that the parameters are on.
  """
  return evaluate.make_evaluators(
      model, config.task, config_lib.objective(config), splits, tokenizer, mesh,
      eval_sizes(config, splits))


def split_words(config: config_lib.Train, rows: data_lib.Rows) -> str:
  """Returns a log line with the number of rows of each split.

  For example ``data: 230 rows of x.csv: 138 train, 46 dev, 46 test``.

  Args:
    config: Config of the run, which names the sources of the rows.
    rows: Rows of all splits.
  """
  d, task = config.data, config.task
  source = d.train or task.hub
  held_out = d.test or ('' if d.train else task.hub)
  train, dev, test = (len(part) for part in (rows.train, rows.dev, rows.test))
  total = len(rows.pool) + (0 if held_out else test)
  unused = total - train - (0 if d.dev else dev) - (0 if held_out else test)
  parts = [f'{train} train', f'{dev} dev', f'{test} test']
  if d.dev:
    parts[1] += f' (of {d.dev})'
  if held_out:
    parts[2] += f' (of {held_out})'
  if unused:
    parts.append(f'{unused} unused')
  return f'data: {total} rows of {source}: {", ".join(parts)}'


def data_warnings(config: config_lib.Train,
                  rows: data_lib.Rows) -> list[str]:
  """Returns warnings about rows that look like a mistake.

  It warns about rows without right answers, labels that no training row has,
  and dev or test rows that are training rows, too. In a private run nothing
  may be reported about the training rows, so they are not examined.

  Args:
    config: Config of the run.
    rows: Rows of all splits.

  Returns:
    A list of sentences without a final period.
  """
  task, out = config.task, []
  read = {'dev': rows.dev, 'test': rows.test}
  if not methods.method_of(config).private:
    read = {'train': rows.train} | read
  for name, some in read.items():
    bare = sum(not task.has_gold(row) for row in some)
    if bare and name != 'train' and not (
        config_lib.is_rewarded(config) or task.traits.conversation):
      column = (task.answers_column if task.traits.generates
                else task.label_column)
      out.append(f'{bare} of {len(some)} {name} rows have no right answer in '
                 f'column {column!r}, so {task.main_metric} is not measured on '
                 f'{name} rows')
    if name == 'train' and task.traits.classes and not bare:
      found = {task.golds(row)[0] for row in some}
      absent = sorted({*range(task.num_classes)} - found)
      if absent:
        words = task.label_words or task.label_names
        out.append('no train row has the label ' + ', '.join(
            f'{c} ({words[c]!r})' for c in absent))
  if 'train' not in read:
    return out

  def key(row):
    """Returns the prompt of a row, with its choices if the row has its own."""
    text = task.prompt(row, mask='', sep='')
    choices = [] if task.traits.classes or task.traits.generates else (
        task.candidates(row))
    return (text, *choices)
  seen = {*map(key, rows.train)}
  for name in ('dev', 'test'):
    again = sum(key(row) in seen for row in read[name])
    if again:
      out.append(f'{again} of {len(read[name])} {name} rows have the prompt of '
                 'a train row, so their results say little about new rows')
  return out


def _check_head(config: config_lib.Train, model_config: models.Config) -> None:
  """Checks that a model with a new classification head can be exported.

  Raises:
    InputError: if it cannot.
  """
  classifier.check_head(model_config)
  if methods.adapts(config) and not methods.part_of(config).added:
    raise InputError(
        f"a task of kind 'head' with peft.method {config.peft.method!r} cannot "
        'be exported, because PEFT has no equivalent; use '
        '--config.peft.method=lora, or a task with label words.')


def batch_shapes(data: Encoded, length: int, rows: int,
                 mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Returns the shapes of a training batch, as `jax.ShapeDtypeStruct`.

  Args:
    data: The encoded training rows.
    length: Number of tokens that rows are padded to.
    rows: Number of rows.
    mesh: Mesh over which the batch is split.
  """
  batch = batch_of(data, np.arange(rows), length, rows)
  place = jax.NamedSharding(mesh, jax.P(sharding.ROWS))
  return jax.tree.map(lambda x: _shape(x, place), batch)


# --- parameters -------------------------------------------------------------


def load(config: config_lib.Train, model_config: models.Config,
         mesh: jax.sharding.Mesh, abstract: bool = False) -> Any:
  """Loads the model and its pretrained parameters.

  Args:
    config: Config of the run.
    model_config: Config of the model.
    mesh: Mesh to place the parameters on.
    abstract: Whether to return shapes instead of loading the weights. Defaults
      to False.

  Returns:
    The model, and its parameters or their shapes.
  """
  if abstract and config.model.dtype != 'codes':
    model = models.Transformer(model_config)
    params = models.param_shapes(
        model_config, mesh, config.model.dtype, config.model.offload)
  else:
    model, params = models.load(
        model_name(config), mesh, config.model.dtype,
        revision=config.model.revision or None, offload=config.model.offload)
    # With dtype 'codes' the shapes depend on how the GGUF file quantises each
    # tensor, so even an abstract run loads it.
    if abstract:
      params = jax.tree.map(lambda x: _shape(x, x.sharding), params)
  return model.clone(remat=config.model.remat), params


def add(config: config_lib.Train, model: models.Transformer,
        params: dict[str, Any], tokenizer: Any, mesh: jax.sharding.Mesh
        ) -> Any:
  """Adds a classification head and adapters to a model, as its config needs.

  It also separates parameters that are trained on their own: a head that is
  tied to the embedding, and the last layers.

  Args:
    config: Config of the run.
    model: The model from `load`.
    params: Parameters or shapes from `load`. The last layers may be moved out
      of this dict.
    tokenizer: Tokenizer of the model.
    mesh: Mesh that the parameters are on.

  Returns:
    The model and all its parameters, or their shapes.

  Raises:
    InputError: if the head or the adapters do not fit the model.
  """
  abstract, given = _is_abstract(params), dict(paths.named_leaves(params))
  if config.task.traits.new_head:
    make = lambda: head.init(
        jax.random.key(config.seed), model.config, config.task.num_classes)
    params = params | {'classifier': _made(
        lambda tree: sharding.replicated(mesh), abstract, make)}
  # The functions below also return a model, which is not an array and cannot be
  # the output of a function that `jax.eval_shape` traces. They append it here.
  made = []

  def laid_out(params):
    """Returns the parameters in the layout that the config needs."""
    found, params = trainable_lib.lay_out(config, model, params)
    made.append(found)
    return params
  if abstract:
    params = _as_before(jax.eval_shape(laid_out, params), given, mesh)
  else:
    params = laid_out(params)

  def adapters(params):
    """Returns the parameters of the adapters."""
    found, leaves = trainable_lib.adapters(config, made[-1], params, tokenizer)
    made.append(found)
    return leaves
  leaves = _made(lambda tree: sharding.param_shardings(tree, mesh), abstract,
                 adapters, params)
  return made[-1], peft.join(params, leaves)


def _made(place: Callable, abstract: bool, make: Callable, *args):
  """Returns the tree ``make(*args)`` with the shardings ``place(tree)``.

  If ``abstract``, it returns shapes with these shardings.
  """
  if not abstract:
    tree = make(*args)
    return sharding.place(tree, place(tree)) if tree else tree
  tree = jax.eval_shape(make, *args)
  return jax.tree.map(_shape, tree, jax.tree.broadcast(place(tree), tree))


def _as_before(shapes: dict, given: dict, mesh) -> dict:
  """Returns shapes of parameters with the shardings that they had before.

  `jax.eval_shape` drops shardings. They are found again by the path that a
  parameter had before: ``layers/...`` for the last layers, and ``embed/...``
  for a head that was tied to the embedding.
  """
  def place(path, x):
    """Returns the shape of a parameter with the sharding that it had."""
    for old in (path, path.removeprefix('last_'),
                path.replace('lm_head/', 'embed/')):
      if old in given:  # a quantised weight is a tree of several arrays
        return jax.tree.map(
            lambda x, old: _shape(x, old.sharding), x, given[old])
    return _shape(x, sharding.replicated(mesh))  # a new classification head
  return paths.map_named(place, shapes)


def _shape(x, place) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of an array with the sharding ``place``."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _is_abstract(params) -> bool:
  """Returns whether a tree consists of shapes instead of arrays."""
  return isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)


# --- optimizer state --------------------------------------------------------


def privacy_plan(config: config_lib.Train, splits: data_lib.Splits,
                 mesh: jax.sharding.Mesh) -> privacy.Plan | None:
  """Returns the privacy plan of a private run, or None for another method.

  Args:
    config: Config of the run.
    splits: The encoded rows.
    mesh: Mesh of the run. The capacity of a batch is a multiple of its groups
      of devices.
  """
  if not methods.method_of(config).private:
    return None
  p = config.privacy
  return privacy.plan(
      p.epsilon, p.delta, p.mechanism, config.steps, len(splits.train.prompts),
      config.data.batch_size,
      config.optimizer.micro_batches * sharding.row_groups(mesh))


def init_state(tx: optax.GradientTransformation, params: dict[str, Any],
               mesh: jax.sharding.Mesh, abstract: bool | None = None
               ) -> Any:
  """Returns the state of the optimizer before the first step.

  Arrays that mirror a parameter, such as Adam's moments, have the sharding of
  the parameter. All others are replicated.

  Args:
    tx: The optimizer.
    params: The trained parameters, or their shapes.
    mesh: Mesh that they are on.
    abstract: Whether to return shapes. Defaults to None, which returns shapes
      if ``params`` are shapes.
  """
  everywhere = sharding.replicated(mesh)
  if not (_is_abstract(params) if abstract is None else abstract):
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, jax.NamedSharding) else
        sharding.place(x, everywhere), tx.init(params))
  known = dict(paths.named_leaves(params))

  def place(path, x):
    """Returns the shape of a state's array with its sharding."""
    # The path of a moment ends with the path of its parameter.
    parts = path.split('/')
    for i in range(len(parts)):
      like = known.get('/'.join(parts[i:]))
      if like is not None and like.shape == x.shape:
        return _shape(x, like.sharding)
    return _shape(x, everywhere)
  return paths.map_named(place, jax.eval_shape(tx.init, params))
