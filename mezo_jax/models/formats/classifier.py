"""Maps models with a classification head to files for transformers.

transformers loads such files with its class for sequence classification, such
as ``LlamaForSequenceClassification``.
"""

import contextlib
import copy
from pathlib import Path
from typing import Any

from flax.traverse_util import unflatten_dict
import numpy as np

from mezo_jax.core.errors import InputError
from mezo_jax.models.families import table as t
from mezo_jax.models.formats import huggingface, weights
from mezo_jax.models.layers import Config


def check_head(config: Config) -> None:
  """Checks that a classification head can be written for transformers.

  Raises:
    InputError: If transformers has no class for it, or one that applies its
      head to other features than this library does.
  """
  if config.family in ('granite', 'olmoe'):
    raise InputError(
        f'transformers has no class for a {config.family} with a '
        'classification head. Choose another model, or a task with label '
        'words.')
  if config.family == 'opt' and config.embed_width:
    raise InputError(
        'a classification head for this OPT cannot be written for '
        'transformers, whose class applies the head after the projection to '
        'the embedding width (as in OPT-350M). Choose another model, or a '
        'task with label words.')


def architecture(config: Config) -> str:
  """Returns the name of transformers' class for sequence classification."""
  base = huggingface.ARCHITECTURES[config.family][1]
  return f'{base.removesuffix("Model")}ForSequenceClassification'


def head(config: Config, num_classes: int) -> list[t.Row]:
  """Returns the rows of a classification head's parameters.

  The parameters are those of `mezo_jax.tasks.head`.
  """
  width, hidden = ('d', config.width), ('e', config.width)
  classes = ('c', num_classes)
  if config.causal:
    return t.linear('classifier/out', 'score', width, classes, False)
  dense, out = {
      'bert': ('bert.pooler.dense', 'classifier'),
      'roberta': ('classifier.dense', 'classifier.out_proj'),
  }[config.family]
  return [*t.linear('classifier/dense', dense, width, hidden, True),
          *t.linear('classifier/out', out, width, classes, True)]


def table(config: Config, num_classes: int) -> list[t.Row]:
  """Returns the rows of a model with a classification head.

  They are those of the body and of the classification head, without those of
  the language model's head.

  Raises:
    InputError: If transformers cannot load such a model (see `check_head`).
  """
  check_head(config)
  unused = {row.path for row in huggingface.head_of(config)}
  body = [row for row in huggingface.FAMILIES[config.family].table(config)
          if row.path not in unused]
  return [*body, *head(config, num_classes)]


def load(path: Path, config: Config, num_classes: int) -> dict[str, Any]:
  """Reads the classification head in a model's files.

  Args:
    path: Directory of the model.
    config: Config of the model.
    num_classes: Number of classes.

  Returns:
    The parameters of `mezo_jax.tasks.head`, float32 arrays in host memory.

  Raises:
    InputError: If the files have no head with this number of classes.
  """
  out = {}
  with contextlib.ExitStack() as stack:
    tensors = dict(weights.open_files(path, stack))
    for row in head(config, num_classes):
      tensor = tensors.get(row.name)
      if tensor is None or tuple(tensor.get_shape()) != row.source_shape():
        raise InputError(
            f'{path} has no classification head of {num_classes} classes '
            f'(tensor {row.name}); export the run again.')
      everything = tuple(slice(0, n) for n in row.shape)
      out[row.path] = np.asarray(row.read(tensor, everything), np.float32)
  return unflatten_dict(out, sep='/')['classifier']


def fields(hf: dict[str, Any], config: Config, labels: list[str], tokenizer: Any
           ) -> tuple[dict[str, Any], object]:
  """Returns the config and the tokenizer of a model with a classification head.

  With them transformers computes the same logits as this library. For a causal
  model, its class applies the head to the last token that is not
  ``pad_token_id``. Therefore ``pad_token_id`` must be the token with which the
  tokenizer pads.

  Args:
    hf: Contents of config.json.
    config: The `Config` of the model.
    labels: Names of the classes.
    tokenizer: The model's tokenizer, or None. It is copied, not changed.

  Returns:
    ``hf, tokenizer``: the contents of config.json, and a tokenizer or None.
  """
  hf = {k: v for k, v in hf.items()
        if k not in ('num_labels', '_num_labels', 'problem_type')}
  hf |= {'architectures': [architecture(config)],
         'id2label': {str(i): name for i, name in enumerate(labels)},
         'label2id': {name: i for i, name in enumerate(labels)}}
  if not config.causal or tokenizer is None:
    return hf, tokenizer
  tokenizer = copy.deepcopy(tokenizer)
  tokenizer.padding_side = 'right'
  if tokenizer.pad_token is None:
    tokenizer.pad_token = _padding(tokenizer)
  pad = tokenizer.pad_token_id
  if pad is not None and pad < config.vocab_size:
    hf['pad_token_id'] = pad
  return hf, tokenizer


def _padding(tokenizer) -> str | None:
  """Returns a special token to pad with, or None if there is no suitable one.

  It must differ from the token that the tokenizer puts at the end of a text.
  Otherwise transformers' class would skip that token as padding.
  """
  last = tokenizer('a')['input_ids'][-1:]
  for token in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
    if token and tokenizer.convert_tokens_to_ids(token) not in last:
      return token
  return None
