"""The parameters that a config trains: added, chosen and set apart."""

import jax

from mezo_jax import _paths, models, peft, sharding
from mezo_jax import config as config_lib


def method_of(config: config_lib.Train) -> str:
  """Which parameters are trained, as a key of `mezo_jax.peft.TRAINED`."""
  return 'head' if config.method == 'head_only' else config.peft.method


def adapts(config: config_lib.Train) -> bool:
  """Whether the model is given parameters that its files do not have."""
  return config.peft.method in peft.ADAPTERS and (
      config_lib.trains(config) or bool(config.peft.adapter))


def tokens_before(config: config_lib.Train) -> int:
  """Positions that a text has less: of a soft prompt, or of a prefix if
  positions start after it.

  Raises:
    FileNotFoundError: if there is no such adapter as ``peft.adapter``.
    ValueError: if it is of another kind, or cannot be read.
  """
  p = config.peft
  if not adapts(config):
    return 0
  if p.adapter:
    kind, about = peft.describe(p.adapter)
    if kind != p.method:
      raise ValueError(f'{p.adapter} is of kind {kind!r}: set '
                       f'--config.peft.method={kind}.')
    return about.get('num_virtual_tokens', 0)
  if p.method == 'lora':
    return 0
  return p.num_tokens if p.method == 'prompt' or p.positions != 'zero' else 0


def add(config: config_lib.Train, model: models.Transformer, params: dict,
        tokenizer, mesh):
  """``model, params`` with the parameters that the method wants: adapters, a
  head of its own where it is the embedding, the last layers apart.

  Raises:
    ValueError: if the adapter of ``peft.adapter`` does not fit.
  """
  p, key = config.peft, jax.random.fold_in(jax.random.key(config.seed), 2**31)
  if config.task.kind != 'head' and (
      config.method == 'lp_mezo' or method_of(config) == 'head'):
    model, params = peft.untie(model, params)
  if p.method == 'last_layers' and config_lib.trains(config):
    return model, peft.split_layers(params, p.num_layers, take=True)
  if not adapts(config):
    return model, params
  if p.adapter:
    model, adapters, _ = peft.load(p.adapter, model)
  elif p.method == 'lora':
    adapters = peft.lora.init(params, key, rank=p.rank, alpha=p.alpha,
                              targets=p.targets, rslora=p.rslora)
  else:
    ids = tokenizer(p.text, add_special_tokens=False)['input_ids']
    init = dict(num_tokens=p.num_tokens, init=p.init, token_ids=ids)
    if p.method == 'prefix':
      model = model.clone(prefix_positions=p.positions)
      adapters = peft.prefix.init(model, params, key, **init)
    else:
      adapters = peft.prefix.init_prompt(model, params, key, **init)
  adapters = sharding.place(
      adapters, sharding.param_shardings(adapters, mesh))
  return model, peft.join(params, adapters)


def split(config: config_lib.Train, params: dict) -> tuple[dict, dict]:
  """``trainable, frozen``: what the method trains of what `add` gave, and of
  that what ``peft.mask`` selects; a task's new head is always trained.

  Raises:
    ValueError: if nothing is selected, or a group is of no parameter.
  """
  of_head = config.task.kind == 'head'
  pattern = peft.TRAINED[method_of(config)]
  if of_head and method_of(config) == 'head':
    pattern = '^classifier/'  # the vocabulary's head is not used
  chosen = _paths.selected(params, pattern)
  if config.peft.mask:
    chosen = jax.tree.map(lambda a, b: a and b, chosen,
                          _paths.selected(params, config.peft.mask))
  if of_head:
    chosen['classifier'] = _paths.selected(params['classifier'], None)
  trainable, frozen = peft.split(params, chosen)
  for group, *_ in config.optimizer.groups:
    if not any(jax.tree.leaves(_paths.matches(trainable, group))):
      raise ValueError(f'optimizer.groups: {group!r} is found in the path of '
                       'no parameter that is trained.')
  return trainable, frozen


def before_training(config: config_lib.Train, plain: dict,
                    params: dict) -> dict:
  """What zero-shot means: the model without adapters. With a soft prompt the
  rows have its tokens in them, so it is the model with the prompt that training
  starts from."""
  if method_of(config) == 'prefix' or (
      config.peft.adapter and method_of(config) == 'lora'):
    return plain
  return params


def warnings(config: config_lib.Train) -> list[str]:
  """What is legal, and most probably a mistake."""
  if not config_lib.trains(config):
    return []
  o = config.optimizer
  first_order = config.method in ('finetune', 'head_only')
  if first_order and o.name == 'sgd':
    return []
  usual = (_USUAL_BACKPROP if first_order else _USUAL).get(method_of(config))
  if not usual or usual[0] / 100 < o.learning_rate < usual[1] * 100:
    return []
  return [f'optimizer.learning_rate {o.learning_rate:g} is two orders of '
          f'magnitude or more from what is usual for '
          f'{config.peft.method or "all parameters"} with '
          f'{"backpropagation" if first_order else "MeZO"}, '
          f'{" to ".join(f"{x:g}" for x in dict.fromkeys(usual))}']


# Learning rates of the paper's searches (Tables 15 and 16); it has no soft
# prompts, for which a prefix's stand here.
_USUAL = {'': (1e-6, 1e-5), 'lora': (1e-4, 1e-4), 'prefix': (1e-2, 1e-2),
          'prompt': (1e-2, 1e-2)}
_USUAL_BACKPROP = {'': (1e-5, 1e-4), 'lora': (3e-4, 3e-4),
                   'prefix': (3e-2, 3e-2), 'prompt': (3e-2, 3e-2)}
