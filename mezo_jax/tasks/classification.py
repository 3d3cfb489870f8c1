r"""Sentence classification by prompt and label words.

A row becomes one prompt and C candidate answers, the label words. With
:math:`a_c` the tokens of candidate c after the prompt x, its score is the
length-normalised log-likelihood

.. math:: s_c = \frac{1}{|a_c|} \sum_t \log p(a_{c,t} \mid x, a_{c,<t})

and the loss is the cross-entropy of softmax(s) (Malladi et al., 2023, Appendix
E; its code calls it train_as_classification).

Where every candidate is one token after one and the same prompt, the usual
case, the normaliser of p is common to all C scores and cancels in the loss and
in every comparison: one forward per row then does, with C logits in all.
"""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Classification:
  """A task: how a row reads and what its labels are called.

  ``template`` names columns in braces; ``label_words[c]`` is the answer of
  class c, with its leading space. Rows hold the class, or its name in
  ``label_names``, in ``label_column``.
  """

  template: str = '{text} It was'
  label_words: tuple[str, ...] = (' terrible', ' great')
  label_column: str = 'label'
  label_names: tuple[str, ...] = ()

  def prompt(self, row: dict) -> str:
    """The prompt of a row; text columns are stripped, as in the paper's code.

    Raises:
      ValueError: if the template names a column that the row does not have.
    """
    try:
      return self.template.format(
          **{k: str(v).strip() for k, v in row.items()})
    except KeyError as e:
      raise ValueError(
          f'the template {self.template!r} names column {e}, the data have '
          f'{sorted(row)}; set --config.task.template.') from None

  def label(self, row: dict) -> int:
    """The class of a row.

    Raises:
      ValueError: if there is none, or it is none of the label words'.
    """
    if self.label_column not in row:
      raise ValueError(
          f'the data have no column {self.label_column!r} but {sorted(row)}; '
          'set --config.task.label_column.')
    value = row[self.label_column]
    if value in self.label_names:
      return self.label_names.index(value)
    if re.fullmatch(r'\d+', str(value)) and int(value) < len(self.label_words):
      return int(value)
    raise ValueError(
        f'label {value!r} is neither an integer below {len(self.label_words)} '
        f'(the number of label words) nor one of the names '
        f'{self.label_names}; set --config.task.label_words or label_names.')


class Encoded(NamedTuple):
  """Rows as tokens: R rows, C candidates each."""

  sequences: list[list[list[int]]]  # [R][C or 1] token ids
  answers: list[list[int]]  # [R][C] number of answer tokens at the end
  labels: np.ndarray  # int32 [R]
  token_ids: np.ndarray | None  # int32 [C]: one-token answers, left out above
  truncated: int  # rows that lost tokens at their beginning

  @property
  def lengths(self) -> np.ndarray:
    return np.array([max(map(len, row)) for row in self.sequences], np.int32)


def encode(task: Classification, rows: list[dict], tokenizer, max_length: int,
           pad_to_candidates: bool = False) -> Encoded:
  """Tokenises rows; over-long ones keep their end (and the BOS token).

  Args:
    task: the prompt and label words.
    rows: dicts of columns.
    tokenizer: a transformers tokenizer.
    max_length: tokens per sequence at most, answer included.
    pad_to_candidates: write every candidate out even where one forward per row
      would do.

  Raises:
    ValueError: for no rows, a row that does not fit the task, or label words
      that the tokenizer cannot tell apart.
  """
  if not rows:
    raise ValueError('there are no rows to encode.')
  prompts = [task.prompt(row) for row in rows]
  labels = np.array([task.label(row) for row in rows], np.int32)
  tokens = lambda texts: tokenizer(list(texts))['input_ids']
  bare = tokens(p.rstrip(' ') for p in prompts)
  full = [tokens(p + word for p in prompts) for word in task.label_words]
  sequences, answers, truncated = [], [], 0
  bos = tokenizer.bos_token_id
  for r, prompt in enumerate(bare):
    row = [candidate[r] for candidate in full]
    if len(prompt) == 0:
      raise ValueError(f'row {r} has an empty prompt: {rows[r]!r}.')
    if len(set(map(tuple, row))) < len(row):
      raise ValueError(
          f'two of the label words {task.label_words} are the same tokens to '
          'this tokenizer; choose others with --config.task.label_words.')
    answers.append([max(1, len(ids) - len(prompt)) for ids in row])
    truncated += max(map(len, row)) > max_length
    sequences.append([_keep_end(ids, max_length, bos) for ids in row])
  one_token = all(n == 1 for row in answers for n in row) and all(
      ids[:-1] == row[0][:-1] for row in sequences for ids in row)
  last = {tuple(ids[-1] for ids in row) for row in sequences}
  if one_token and len(last) == 1 and not pad_to_candidates:
    return Encoded([[row[0][:-1]] for row in sequences], answers, labels,
                   np.array(last.pop(), np.int32), truncated)
  return Encoded(sequences, answers, labels, None, truncated)


def _keep_end(ids: list[int], max_length: int, bos: int | None) -> list[int]:
  if len(ids) <= max_length:
    return ids
  if bos is not None and ids[0] == bos:
    return [bos, *ids[len(ids) - max_length + 1:]]
  return ids[-max_length:]


def batch_of(data: Encoded, index: np.ndarray, length: int, rows: int) -> dict:
  """Host arrays of the rows ``index``, padded right to ``length`` tokens.

  Args:
    data: the encoded rows.
    index: which rows, in order.
    length: tokens to pad to.
    rows: rows to pad to; padding has weight 0.

  Returns:
    A dict with ``input_ids`` and ``attention_mask`` [rows, K, length] (K
    sequences a row), ``answer_at``, ``answer_ids`` and ``answer_mask``
    [rows, K, A], ``label`` [rows] and ``weight`` [rows].
  """
  k = len(data.sequences[0])
  most = 1 if data.token_ids is not None else max(map(max, data.answers))
  batch = {
      'input_ids': np.zeros((rows, k, length), np.int32),
      'attention_mask': np.zeros((rows, k, length), np.int32),
      'answer_at': np.zeros((rows, k, most), np.int32),
      'answer_ids': np.zeros((rows, k, most), np.int32),
      'answer_mask': np.zeros((rows, k, most), np.float32),
      'label': np.zeros(rows, np.int32),
      'weight': np.zeros(rows, np.float32),
  }
  batch['attention_mask'][len(index):, :, 0] = 1  # no row attends to nothing
  for i, r in enumerate(index):
    batch['label'][i], batch['weight'][i] = data.labels[r], 1
    for j, ids in enumerate(data.sequences[r]):
      batch['input_ids'][i, j, :len(ids)] = ids
      batch['attention_mask'][i, j, :len(ids)] = 1
      n = data.answers[r][j]
      if data.token_ids is not None:
        batch['answer_at'][i, j, 0] = len(ids) - 1
      else:
        batch['answer_at'][i, j, :n] = range(len(ids) - n - 1, len(ids) - 1)
        batch['answer_ids'][i, j, :n] = ids[-n:]
        batch['answer_mask'][i, j, :n] = 1
  return batch


def scores(model, params, batch: dict, token_ids=None) -> jax.Array:
  """float32 scores [rows, C] of the candidates, up to a constant per row."""
  rows, k, length = batch['input_ids'].shape
  flat = lambda x: x.reshape(rows * k, *x.shape[2:])
  apply = functools.partial(
      model.apply, {'params': params}, flat(batch['input_ids']),
      flat(batch['attention_mask']), answer_at=flat(batch['answer_at']))
  if token_ids is not None:
    return apply(token_ids=token_ids)[:, 0]
  log_p = apply(targets=flat(batch['answer_ids']))
  mask = flat(batch['answer_mask'])
  total = jnp.sum(log_p * mask, -1)
  return (total / jnp.maximum(jnp.sum(mask, -1), 1)).reshape(rows, k)


def make_loss_fn(model, token_ids=None):
  """``loss_fn(params, batch)``: mean cross-entropy over the candidates."""
  def loss_fn(params, batch):
    log_p = jax.nn.log_softmax(scores(model, params, batch, token_ids))
    nll = -jnp.take_along_axis(log_p, batch['label'][:, None], -1)[:, 0]
    weight = batch['weight']
    return jnp.sum(nll * weight) / jnp.maximum(jnp.sum(weight), 1)
  return loss_fn
