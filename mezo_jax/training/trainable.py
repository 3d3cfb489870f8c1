"""Creates, separates and selects the parameters that a config trains.

In the order of a run: `lay_out` separates the head or the last layers from the
other parameters, `adapters` creates or loads adapters, and `split` divides the
parameters into trained and frozen ones.
"""

from typing import Any

import jax

from mezo_jax import models, peft
from mezo_jax.core import paths as paths_lib
from mezo_jax.core.errors import InputError
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods


def tokens_before(config: config_lib.Train) -> int:
  """Returns the number of positions that adapters take before the text.

  A soft prompt takes one position per token. A prefix does so only if the
  positions of the text start after it. The maximum length of a text is shorter
  by this number.

  Args:
    config: Config of the run.

  Raises:
    MissingError: if the adapter ``peft.adapter`` does not exist.
    InputError: if the adapter is of another kind, or cannot be read.
  """
  p = config.peft
  if not methods.adapts(config):
    return 0
  if p.adapter:
    kind, about = peft.describe(p.adapter)
    if kind != p.method:
      raise InputError(f'the adapter {p.adapter} is of kind {kind!r}; set '
                       f'--config.peft.method={kind}.')
    return about.get('num_virtual_tokens', 0)
  return methods.part_of(config).tokens(p)


def lay_out(config: config_lib.Train, model: models.Transformer,
            params: dict[str, Any]) -> Any:
  """Separates a tied head, or the last layers, from the other parameters.

  Args:
    config: Config of the run.
    model: The model.
    params: Its parameters. The last layers are moved out of this dict.

  Returns:
    The model and its parameters in the new layout.
  """
  method, part = methods.method_of(config), methods.part_of(config)
  if not config.task.traits.new_head and (method.own_head or part.own_head):
    model, params = peft.untie(model, params)
  if methods.layers_apart(config):
    params = peft.split_layers(params, config.peft.num_layers, take=True)
  return model, params


def adapters(config: config_lib.Train, model: models.Transformer,
             params: dict[str, Any], tokenizer: Any
             ) -> tuple[models.Transformer, dict[str, Any]]:
  """Creates new adapters, or loads those of ``peft.adapter``.

  Args:
    config: Config of the run.
    model: The model.
    params: Its parameters.
    tokenizer: Tokenizer of the model, for adapters that start from a text.

  Returns:
    The model and the parameters of the adapters; {} if the config has none.

  Raises:
    InputError: if the adapters do not fit the model.
  """
  p = config.peft
  if not methods.adapts(config):
    return model, {}
  if p.adapter:
    model, found, _ = peft.load(p.adapter, model)
    return model, (peft.split_layers(found, p.num_layers) if (
        methods.layers_apart(config)) else found)
  # Fold in a constant, so that the initial values of adapters do not repeat the
  # random numbers of the directions.
  key = jax.random.fold_in(jax.random.key(config.seed), 2**31)
  if methods.part_of(config).added:
    return model, peft.lora.init(
        params, key, rank=p.rank, alpha=p.alpha, targets=p.targets,
        rslora=p.rslora)
  ids = tokenizer(p.text, add_special_tokens=False)['input_ids']
  start: dict[str, Any] = dict(
      num_tokens=p.num_tokens, init=p.init, token_ids=ids)
  if methods.part_of(config).soft:
    return model, peft.prefix.init_prompt(model, params, key, **start)
  model = model.clone(prefix_positions=p.positions)
  return model, peft.prefix.init(model, params, key, **start)


def split(config: config_lib.Train, params: dict[str, Any]
          ) -> tuple[dict[str, Any], dict[str, Any]]:
  """Splits parameters into trained and frozen ones.

  The trained ones are those that ``peft.method`` selects and whose path
  ``peft.mask`` matches. A new classification head is always trained.

  Args:
    config: Config of the run.
    params: All parameters, or their shapes.

  Returns:
    The trained and the frozen parameters.

  Raises:
    InputError: if no parameter is selected, or if an expression of
      ``optimizer.groups`` matches no trained parameter.
  """
  part, mask = methods.part_of(config), config.peft.mask
  if part.factors:
    return _factors(config, params)
  new_head = config.task.traits.new_head
  # With a new classification head, the head over the vocabulary is not used.
  pattern = '^classifier/' if new_head and part.own_head else part.pattern
  both = lambda *trees: jax.tree.map(lambda *x: all(x), *trees)
  chosen = both(*(paths_lib.matches(params, p) for p in (pattern, mask)))
  if new_head:
    chosen['classifier'] = paths_lib.matches(params['classifier'], '')
  if not any(jax.tree.leaves(chosen)):
    what = f'mask {mask!r}' if mask else f'method {config.peft.method!r}'
    paths = [path for path, _ in paths_lib.named_leaves(params)]
    raise InputError(
        f'config: peft.{what} selects no floating-point parameter; the paths '
        f'are {", ".join(paths[:5])}{", ..." if len(paths) > 5 else ""}.')
  return _grouped(config, *peft.split(params, chosen))


def _factors(config: config_lib.Train, params: dict) -> tuple[dict, dict]:
  """Splits off the scale factors of quantised weights, which are trained."""
  try:
    trained = peft.factors(params)
    if config.peft.mask:
      trained, _ = peft.split(trained, config.peft.mask)
  except ValueError as e:
    raise InputError(f'--config.peft: {e}') from e
  frozen = dict(params)
  if config.task.traits.new_head:
    trained = trained | {'classifier': frozen.pop('classifier')}
  return _grouped(config, trained, frozen)


def _grouped(config, trained: dict, frozen: dict) -> tuple[dict, dict]:
  """Returns both trees after a check of ``optimizer.groups``."""
  for group, *_ in config.optimizer.groups:
    if not any(jax.tree.leaves(paths_lib.matches(trained, group))):
      raise InputError(f'config: optimizer.groups: {group!r} does not match '
                       'the path of any trained parameter; remove or correct '
                       'it.')
  return trained, frozen


def before_training(config: config_lib.Train, params: dict[str, Any]
                    ) -> dict[str, Any]:
  """Returns the parameters of the untrained model, for zero-shot evaluation.

  Adapters are removed, except in two cases. With a soft prompt the encoded rows
  contain its tokens, so the untrained model is the one with the initial prompt.
  New LoRA adapters do not change the model yet and need not be removed.

  Args:
    config: Config of the run.
    params: All parameters, or a part of them.
  """
  part = methods.part_of(config)
  if not part.adapter or part.soft or (
      part.added and not config.peft.adapter) or not any(
          jax.tree.leaves(paths_lib.matches(params, part.adapter))):
    return params
  return peft.split(params, part.adapter)[1]
