"""Provides placeholders for a model's tokenizer and a task's data.

They are enough for planning, where only shapes matter.
"""

import string
from typing import Any

from tokenizers import models as parts
from tokenizers import pre_tokenizers, processors, Tokenizer

from mezo_jax.tasks import Task
from mezo_jax.tasks.data import Rows
from mezo_jax.training import config as config_lib

_COLUMNS = (  # names of columns in the tasks that this library defines
    'answer', 'context', 'first', 'hypothesis', 'paragraph', 'passage',
    'premise', 'question', 'second', 'sentence', 'sentence1', 'sentence2',
    'span1_text', 'span2_text', 'text', 'title', 'word')


def tokenizer(task: Task) -> Any:
  """Returns a tokenizer with a tiny vocabulary that contains the label words.

  Args:
    task: The task.
  """
  from transformers import PreTrainedTokenizerFast  # slow to import
  words = ('<s>', '<pad>', '</s>', '<unk>', '<mask>',
           *(w.strip() for w in task.label_words))
  raw = Tokenizer(parts.WordLevel(
      {w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token='<unk>'))
  raw.pre_tokenizer = pre_tokenizers.Whitespace()
  raw.post_processor = processors.TemplateProcessing(
      single='<s> $A </s>' if task.masked else '<s> $A',
      pair='<s> $A </s> $B </s>', special_tokens=[('<s>', 0), ('</s>', 2)])
  return PreTrainedTokenizerFast(
      tokenizer_object=raw, bos_token='<s>', eos_token='</s>',
      pad_token='<pad>', unk_token='<unk>', mask_token='<mask>',
      chat_template='{% for m in messages %}{{ m.content }} {% endfor %}')


def row(task: Task) -> dict[str, Any]:
  """Returns a row with placeholder texts, as `Task.prepare` would return it.

  It has each column that the task's templates use.

  Args:
    task: The task.
  """
  asked = [name for text in (task.template, task.answer, task.calibration or '')
           for _, name, _, _ in string.Formatter().parse(text) if name]
  many = len(task.choices) > 1
  return dict.fromkeys((*_COLUMNS, *asked), 'some words') | {
      **{name: 'this' if many else ['this', 'that one']
         for name in task.choices},
      task.answers_column: ['an answer'], 'connective': 'so',
      task.label_column: (*task.class_names, 0)[0],
      'messages': [{'role': role, 'content': 'some words'}
                   for role in dict.fromkeys(('user', *task.train_roles))]}


def rows(config: config_lib.Train) -> Rows:
  """Returns the placeholder rows that planning a config needs.

  There are as many training rows as the config asks for (at least a batch), and
  one evaluation batch of dev rows and of test rows.

  Args:
    config: Config of the run.
  """
  one = row(config.task)
  d = config.data
  train = [one] * max(
      d.num_train if not d.k_shot else d.k_shot * config.task.num_classes,
      d.batch_size)
  dev = [one] * config.eval_batch_size
  return Rows(train, dev, dev, train + dev)
