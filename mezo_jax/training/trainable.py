"""Adds, selects and sets apart the parameters that a config trains."""
from typing import Any

import jax

from mezo_jax import models, peft
from mezo_jax.core import paths as paths_lib
from mezo_jax.core.errors import InputError
from mezo_jax.training import config as config_lib
from mezo_jax.training import methods


def tokens_before(config: config_lib.Train) -> int:
  """Returns the number of positions that a text loses.

  A soft prompt takes positions, and so does a prefix if positions start after
  it.

  Raises:
    MissingError: if there is no such adapter as ``peft.adapter``.
    InputError: if it is of another kind, or cannot be read.
  """
  p = config.peft
  if not methods.adapts(config):
    return 0
  if p.adapter:
    kind, about = peft.describe(p.adapter)
    if kind != p.method:
      raise InputError(f'{p.adapter} is of kind {kind!r}: set '
                       f'--config.peft.method={kind}.')
    return about.get('num_virtual_tokens', 0)
  return methods.part_of(config).tokens(p)


def lay_out(config: config_lib.Train, model: models.Transformer,
            params: dict[str, Any]) -> Any:
  """Returns the model and its parameters with what is trained set apart.

  That is a head which was tied to the embedding, or the last layers, which are
  taken out of ``params``.
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
  """Returns the model and its adapters, {} if the config has none.

  The adapters are new ones of the config's kind, or those of ``peft.adapter``.

  Raises:
    InputError: if they do not fit the model.
  """
  p = config.peft
  if not methods.adapts(config):
    return model, {}
  if p.adapter:
    model, found, _ = peft.load(p.adapter, model)
    return model, (peft.split_layers(found, p.num_layers) if (
        methods.layers_apart(config)) else found)
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

  Trained are those of the method that ``peft.mask`` selects. The new head of a
  task is always trained.

  Raises:
    InputError: if nothing is selected, or a group is of no parameter.
  """
  part, mask = methods.part_of(config), config.peft.mask
  if part.factors:
    return _factors(config, params)
  new_head = config.task.traits.new_head
  # The vocabulary's head is not used where there is a new one.
  pattern = '^classifier/' if new_head and part.own_head else part.pattern
  both = lambda *trees: jax.tree.map(lambda *x: all(x), *trees)
  chosen = both(*(paths_lib.matches(params, p) for p in (pattern, mask)))
  if new_head:
    chosen['classifier'] = paths_lib.matches(params['classifier'], '')
  if not any(jax.tree.leaves(chosen)):
    what = f'mask {mask!r}' if mask else f'method {config.peft.method!r}'
    paths = [path for path, _ in paths_lib.named_leaves(params)]
    raise InputError(
        f'peft.{what} selects no floating-point parameter; the paths are '
        f'{", ".join(paths[:5])}{", ..." if len(paths) > 5 else ""}.')
  return _grouped(config, *peft.split(params, chosen))


def _factors(config: config_lib.Train, params: dict) -> tuple[dict, dict]:
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
  for group, *_ in config.optimizer.groups:
    if not any(jax.tree.leaves(paths_lib.matches(trained, group))):
      raise InputError(f'optimizer.groups: {group!r} is found in the path of '
                       'no parameter that is trained.')
  return trained, frozen


def before_training(config: config_lib.Train, params: dict[str, Any]
                    ) -> dict[str, Any]:
  """Returns the parameters of the untrained model: those without adapters.

  Two kinds of adapters stay. With a soft prompt, rows contain its tokens, so
  zero-shot means the prompt that training starts from. New adapters that change
  nothing need not be removed.
  """
  part = methods.part_of(config)
  if not part.adapter or part.soft or (
      part.added and not config.peft.adapter) or not any(
          jax.tree.leaves(paths_lib.matches(params, part.adapter))):
    return params
  return peft.split(params, part.adapter)[1]
