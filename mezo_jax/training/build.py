"""Builds the data, the model, the parameters and the optimizer of a config.

`build` does this in an order in which mistakes in the data are found before the
weights are loaded. Evaluation, export and planning use its parts.
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
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import evaluate, head, quickstart_data, score
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks.encode import batch_of, Encoded
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods, optimizer, privacy
from mezo_jax.training import trainable as trainable_lib


class Built(NamedTuple):
  """The parts of a run. An abstract one has shapes in the place of arrays.

  Attributes:
    mesh: Devices of the run.
    tokenizer: Tokenizer of the model.
    splits: Rows of the first task.
    model: The model.
    params: Parameters that are trained; all parameters of a method that does
      not train.
    frozen: The other parameters.
    loss_fn: ``loss_fn(params, batch)`` of all parameters. It and the following
      are None for a method that does not train.
    tx: The optimizer.
    opt_state: State of the optimizer before the first step.
    host: Calls Python functions for ``loss_fn``.
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
    """Returns the same parts without arrays, which others own."""
    return self._replace(params=None, frozen=None, opt_state=None)


def build(config: config_lib.Train, *, abstract: bool = False,
          model_config: models.Config | None = None, tokenizer: Any = None,
          rows: data_lib.Rows | None = None,
          mesh: jax.sharding.Mesh | None = None,
          say: Callable[[str], None] = print) -> Built:
  """Builds everything that a run needs before its first step.

  Args:
    config: Config of the run, which `mezo_jax.training.checks.check_config`
      has checked.
    abstract: Whether parameters and state are `jax.ShapeDtypeStruct` with
      shardings. Then no weights are read. Defaults to False.
    model_config: Config of the model, for ``abstract``. Defaults to that of its
      files.
    tokenizer: Tokenizer of the model. Defaults to that of its files.
    rows: Rows of all splits. Defaults to those of the config.
    mesh: Mesh, for example of described devices. Defaults to the config's.
    say: Reports what is found.

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
  loss_fn = score.make_loss_fn(
      model, splits.train, config.task, config_lib.objective(config), tokenizer,
      _host_is_silent if abstract else host)
  tx = optimizer.make_optimizer(
      config, params, privacy_plan(config, splits, mesh))
  return Built(mesh, tokenizer, splits, model, params, frozen, loss_fn, tx,
               init_state(tx, params, mesh), host)


def _host_is_silent(fn, shape, found, *args):
  """Takes the place of a call to the host, which described devices lack."""
  del fn, args
  return jnp.zeros(shape.shape, shape.dtype) + 0 * jnp.sum(found)


# --- mesh, model and data ---------------------------------------------------


def make_mesh(config: config_lib.Train, devices: Any = None
              ) -> jax.sharding.Mesh:
  """Returns the config's mesh over some devices, or over all.

  Raises:
    InputError: if the mesh, or a batch, does not fit the devices.
  """
  sizes = config.mesh
  mesh = sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor,
                            sizes.direction, devices)
  for rows in (config.data.batch_size,
               *(a.data.batch_size for a in config.also)):
    if rows % sharding.row_groups(mesh):
      raise InputError(
          f'data.batch_size {rows} does not divide over '
          f'{sharding.row_groups(mesh)} groups of devices; make it a multiple '
          'of that.')
  return mesh


def model_name(config: config_lib.Train) -> str | os.PathLike[str]:
  """Returns the model to load. That of the quickstart is fetched if necessary.
  """
  name = config.model.name
  if name == 'quickstart':
    name = quickstart_data.model_path()
  assert name is not None  # it is fetched, or an error says why it is not
  return name


def plain_name(config: config_lib.Train) -> str:
  """Returns the model's name as others may see it: the id of a hub's model, or
  the last part of a local path."""
  name = config.model.name
  local = Path(name).expanduser()
  hub_id = re.fullmatch(r'[\w-][\w.-]*(/[\w.-]+)?', name)
  return name if hub_id and not local.exists() else local.resolve().name


def read_config(config: config_lib.Train) -> models.Config:
  """Reads the config of the model."""
  return models.load_config(model_name(config), config.model.revision or None)


def read_tokenizer(config: config_lib.Train) -> Any:
  """Reads the tokenizer of the model."""
  return models.load_tokenizer(
      model_name(config), config.model.revision or None,
      config.model.bos_token or None)


def encode_rows(config: config_lib.Train, rows: data_lib.Rows,
                model_config: models.Config, tokenizer: Any,
                say: Callable[[str], None]) -> data_lib.Splits:
  """Encodes rows in the form that objective and evaluation need.

  Reports how many rows there are, and what looks wrong in them.

  Raises:
    InputError: if data, task and model do not fit each other.
  """
  task, method = config.task, methods.method_of(config)
  before = trainable_lib.tokens_before(config)
  if not task.traits.new_head and not model_config.head:
    raise InputError(
        f'the files of {config.model.name} are of a base class, without the '
        f'head that a task of kind {task.kind!r} needs; take a model that was '
        'saved with its head, or --config.task.kind=head with '
        'task.label_names.')
  if task.traits.new_head:
    _check_head(config, model_config)
  if not task.traits.new_head and task.masked == model_config.causal:
    raise InputError(
        f'the prompt {task.template!r} is for a '
        f'{"masked" if task.masked else "causal"} model and '
        f'{config.model.name} is none; choose another --config.task.template '
        '({mask} is where a masked model reads the label words).')
  objective = config_lib.objective(config)
  needs_gold = (objectives.needs_gold(objective) or method.probe
                or method.demonstrations)
  say(split_words(config, rows))
  if method.steps and not method.private and (
      len(rows.train) < config.data.batch_size):
    raise InputError(
        f'{len(rows.train)} training rows do not fill a batch of '
        f'{config.data.batch_size}; lower --config.data.batch_size.')
  gold_only = {
      'train': objectives.gold_only(objective),
      # With demonstrations the dev rows are not used: the cheapest form.
      'dev': method.demonstrations or (
          config.select == 'loss' and task.traits.generates
          and objectives.gold_only(objective))}
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
      # Without steps nothing is trained, and answers alone are generated.
      lm_loss=objectives.gold_only(objective) and (
          method.steps or not task.traits.generates),
      needs_gold=needs_gold, say=say)
  most = max((token for split in (splits.train, splits.dev, splits.test,
                                  *splits.gold.values())
              for part in (*split.prompts, *(
                  answer for row in split.candidates for answer in row))
              for token in part), default=0)
  if most >= first + before:
    raise InputError(
        f'the tokenizer of {config.model.name} gave token {most} for these '
        f'rows, and the model has {first}: they are not of one model.')
  for text in data_warnings(config, rows):
    say(f'warning: {text}.')
  agreement.agree(
      'the rows', lambda: fingerprint.of_rows(
          splits.train, splits.dev, splits.test),
      'bring the same data to every host')
  return splits


def eval_sizes(config: config_lib.Train, splits: data_lib.Splits
               ) -> dict[str, evaluate.Sizes]:
  """Returns the shapes of the evaluation batches of each split."""
  return evaluate.sizes_of(
      splits, config.eval_batch_size, config.eval_batch_tokens)


def make_evaluators(config: config_lib.Train, model: models.Transformer,
                    splits: data_lib.Splits, tokenizer: Any,
                    mesh: jax.sharding.Mesh) -> evaluate.Evaluators:
  """Returns functions that evaluate the dev and test rows of a run."""
  return evaluate.make_evaluators(
      model, config.task, config.objective, splits, tokenizer, mesh,
      eval_sizes(config, splits))


def split_words(config: config_lib.Train, rows: data_lib.Rows) -> str:
  """Returns a line about the rows of each split.

  For example ``data: 230 rows of x.csv: 138 train, 46 dev, 46 test``.
  """
  d, task = config.data, config.task
  source = d.train or task.hub
  held_out = d.test or ('' if d.train else task.hub)
  train, dev, test = (len(part) for part in (rows.train, rows.dev, rows.test))
  total = len(rows.pool) + (0 if held_out else test)
  unused = total - train - dev - (0 if held_out else test)
  parts = [f'{train} train', f'{dev} dev', f'{test} test']
  if held_out:
    parts[2] += f' (of {held_out})'
  if unused:
    parts.append(f'{unused} unused')
  return f'data: {total} rows of {source}: {", ".join(parts)}'


def data_warnings(config: config_lib.Train,
                  rows: data_lib.Rows) -> list[str]:
  """Returns what looks like a mistake in the rows of a run.

  Private training rows are left out.
  """
  task, out = config.task, []
  read = {'dev': rows.dev, 'test': rows.test}
  if not methods.method_of(config).private:
    read = {'train': rows.train} | read
  for name, some in read.items():
    bare = sum(not task.has_gold(row) for row in some)
    if bare and name != 'train':
      column = (task.answers_column if task.traits.generates
                else task.label_column)
      out.append(f'{bare} of {len(some)} {name} rows have no right answer in '
                 f'column {column!r}: {task.main_metric} is not measured on '
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
    text = task.prompt(row, mask='', sep='')
    choices = [] if task.traits.classes or task.traits.generates else (
        task.candidates(row))
    return (text, *choices)
  seen = {*map(key, rows.train)}
  for name in ('dev', 'test'):
    again = sum(key(row) in seen for row in read[name])
    if again:
      out.append(f'{again} of {len(read[name])} {name} rows have the prompt of '
                 'a train row, so results on them say little about new rows')
  return out


def _check_head(config: config_lib.Train, model_config: models.Config) -> None:
  """Raises InputError for a classification head that could not be exported."""
  classifier.check_head(model_config)
  if methods.adapts(config) and not methods.part_of(config).added:
    raise InputError(
        f"a task of kind 'head' with peft.method {config.peft.method!r} has no "
        'equal in PEFT and could not be exported: take '
        "--config.peft.method=lora, or a task with label words.")


def batch_shapes(data: Encoded, length: int, rows: int,
                 mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Returns an abstract training batch of ``rows`` rows of ``length`` tokens.
  """
  batch = batch_of(data, np.arange(rows), length, rows)
  place = jax.NamedSharding(mesh, jax.P(sharding.ROWS))
  return jax.tree.map(lambda x: _shape(x, place), batch)


# --- parameters -------------------------------------------------------------


def load(config: config_lib.Train, model_config: models.Config,
         mesh: jax.sharding.Mesh, abstract: bool = False) -> Any:
  """Returns the model and its parameters, or the shapes of these."""
  if abstract and config.model.dtype != 'codes':
    model = models.Transformer(model_config)
    params = models.param_shapes(
        model_config, mesh, config.model.dtype, config.model.offload)
  else:
    model, params = models.load(
        model_name(config), mesh, config.model.dtype,
        revision=config.model.revision or None, offload=config.model.offload)
    if abstract:  # only the file has the kinds of quantised weights
      params = jax.tree.map(lambda x: _shape(x, x.sharding), params)
  return model.clone(remat=config.model.remat), params


def add(config: config_lib.Train, model: models.Transformer,
        params: dict[str, Any], tokenizer: Any, mesh: jax.sharding.Mesh
        ) -> Any:
  """Returns the model and its parameters with what task and method add.

  They are laid out as the method needs.

  Args:
    config: Config of the run.
    model: The model from `load`.
    params: Arrays or shapes from `load`; layers may be taken out of this dict.
    tokenizer: Tokenizer of the model.
    mesh: Mesh that parameters are on.

  Raises:
    InputError: if what is added does not fit the model.
  """
  abstract, given = _is_abstract(params), dict(paths.named_leaves(params))
  if config.task.traits.new_head:
    make = lambda: head.init(
        jax.random.key(config.seed), model.config, config.task.num_classes)
    params = params | {'classifier': _made(
        lambda tree: sharding.replicated(mesh), abstract, make)}
  made = []  # models, which a traced function cannot return

  def laid_out(params):
    found, params = trainable_lib.lay_out(config, model, params)
    made.append(found)
    return params
  if abstract:
    params = _as_before(jax.eval_shape(laid_out, params), given, mesh)
  else:
    params = laid_out(params)

  def adapters(params):
    found, leaves = trainable_lib.adapters(config, made[-1], params, tokenizer)
    made.append(found)
    return leaves
  leaves = _made(lambda tree: sharding.param_shardings(tree, mesh), abstract,
                 adapters, params)
  return made[-1], peft.join(params, leaves)


def _made(place: Callable, abstract: bool, make: Callable, *args):
  """Returns ``make(*args)``, laid out by ``place(tree)``, or its shapes."""
  if not abstract:
    tree = make(*args)
    return sharding.place(tree, place(tree)) if tree else tree
  tree = jax.eval_shape(make, *args)
  return jax.tree.map(_shape, tree, jax.tree.broadcast(place(tree), tree))


def _as_before(shapes: dict, given: dict, mesh) -> dict:
  """Returns shapes of parameters with the shardings that they had before."""
  def place(path, x):
    for old in (path, path.removeprefix('last_'),
                path.replace('lm_head/', 'embed/')):
      if old in given:  # codes have several arrays
        return jax.tree.map(
            lambda x, old: _shape(x, old.sharding), x, given[old])
    return _shape(x, sharding.replicated(mesh))  # a task's new head
  return paths.map_named(place, shapes)


def _shape(x, place) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _is_abstract(params) -> bool:
  return isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)


# --- optimizer state --------------------------------------------------------


def privacy_plan(config: config_lib.Train, splits: data_lib.Splits,
                 mesh: jax.sharding.Mesh) -> privacy.Plan | None:
  """Returns the budget of a private run's training rows, else None."""
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

  What mirrors a parameter has its sharding; the rest is replicated.

  Args:
    tx: The optimizer.
    params: Arrays or shapes of the parameters that it trains.
    mesh: Mesh that they are on.
    abstract: Whether to return shapes. Defaults to whether ``params`` are
      shapes.
  """
  everywhere = sharding.replicated(mesh)
  if not (_is_abstract(params) if abstract is None else abstract):
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, jax.NamedSharding) else
        sharding.place(x, everywhere), tx.init(params))
  known = dict(paths.named_leaves(params))

  def place(path, x):
    parts = path.split('/')
    for i in range(len(parts)):
      like = known.get('/'.join(parts[i:]))
      if like is not None and like.shape == x.shape:
        return _shape(x, like.sharding)
    return _shape(x, everywhere)
  return paths.map_named(place, jax.eval_shape(tx.init, params))
