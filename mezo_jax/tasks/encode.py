r"""Rows to tokens, and tokens to batches of fixed shape.

Candidate answers :math:`a_c` of a row share its prompt x: they are laid out in
one sequence, :math:`x\, a_1\, a_2 \ldots`, in which each candidate sees the
prompt and itself (``shared_prompt`` of the model). So the prompt is computed
once, candidates of any length and number lie side by side without padding, and
one pass through the weights does it all, which is what `mezo_jax.perturbed`
wants: weights perturbed once.

Where every candidate is one token after one and the same prompt, the usual
case of label words, the normaliser of p is common to all and cancels in the
loss and in every comparison: C logits at the end of the prompt then do.
"""

from collections.abc import Sequence
import os
from typing import NamedTuple

import numpy as np

from mezo_jax.errors import InputError
from mezo_jax.tasks.task import Task


class Kept(NamedTuple):
  """What layers that are not trained give for the tokens of R rows."""

  values: np.ndarray  # [tokens of all rows, D]
  starts: np.ndarray  # [R], the first token of each


class Form(NamedTuple):
  """What a program has to know of `Encoded`: for equal ones it is the same."""

  at_one: bool  # whether label words are read at one position
  token_ids: tuple[int, ...] | None  # [C], as `Encoded` has them
  width: int  # C


class Encoded(NamedTuple):
  """Rows as tokens: R rows, C of each row's candidates."""

  rows: list[dict]  # what they came from
  prompts: list[list[int]]  # [R] token ids
  candidates: list[list[list[int]]]  # [R][C] token ids after the prompt
  scored: list[list[int]]  # [R][C] number of answer tokens at their end
  golds: list[tuple[int, ...]]  # [R] the right candidates, or classes
  truncated: int  # rows that lost tokens
  read_at: np.ndarray | None = None  # int32 [R], where label words are read
  token_ids: np.ndarray | None = None  # int32 [C], label words of one token
  types: list[list[int]] | None = None  # [R] token types of the prompts
  generates: bool = False  # prompts to be continued: padded on the left
  trunk: Kept | None = None  # see `mezo_jax.trunk`
  classes: int = 0  # C of a new head, which names more than occur in rows

  @property
  def lengths(self) -> np.ndarray:
    return np.array([*map(self.row_length, range(len(self.prompts)))], np.int32)

  def row_length(self, row: int) -> int:
    """Tokens of a row, its candidates included."""
    return len(self.prompts[row]) + sum(map(len, self.candidates[row]))

  @property
  def labels(self) -> np.ndarray:
    """int32 [R], the first right candidate."""
    return np.array([g[0] if g else 0 for g in self.golds], np.int32)

  @property
  def width(self) -> int:
    """C, candidates of a row at most."""
    if self.token_ids is not None:
      return len(self.token_ids)
    if self.classes:
      return self.classes
    return max(1, *(len(c) for c in self.candidates),
               *(1 + max(g) for g in self.golds if g))

  @property
  def form(self) -> Form:
    ids = None if self.token_ids is None else tuple(self.token_ids.tolist())
    return Form(self.read_at is not None, ids, self.width)


def encode(task: Task, rows: Sequence[dict], tokenizer, max_length: int, *,
           gold_only: bool = False, prompts: Sequence[str] | None = None,
           write_out: bool = False, causal: bool = True,
           needs_gold: bool = True) -> Encoded:
  """Tokenises rows; over-long prompts keep their end (and the BOS token).

  Args:
    task: how a row reads.
    rows: dicts of columns, as `Task.prepare` gives them.
    tokenizer: a transformers tokenizer.
    max_length: tokens of a prompt with its answer at most.
    gold_only: the right answer alone follows each prompt, to train on.
    prompts: used instead of the task's own; may be empty texts.
    write_out: lay candidates out even where label words of one token would do.
    causal: whether the model reads from left to right.
    needs_gold: Whether each row must have a right answer. If not, one without
      has ``golds`` of ().

  Raises:
    ValueError: for no rows, a row that does not fit the task, answers that do
      not fit ``max_length``, or candidates that the tokenizer cannot tell
      apart.
  """
  if not rows:
    raise InputError('there are no rows to encode.')
  own, slots = prompts is None, _slots(task, tokenizer)
  rows, cut = _limited(task, rows, tokenizer)
  if task.masked:  # a mask in the data would be read in the prompt's place
    rows = [{k: v.replace(slots['mask'], ' ') if isinstance(v, str) else v
             for k, v in row.items()} for row in rows]
  prompts = [task.prompt(r, **slots) for r in rows] if own else list(prompts)
  for r, text in enumerate(prompts):
    if own and not text.strip():
      raise InputError(f'row {r} has an empty prompt: {rows[r]!r}.')
  if task.traits.new_head:
    found = _for_head(task, rows, prompts, tokenizer, max_length, causal, cut)
  elif task.masked:
    found = _for_mask(task, rows, prompts, tokenizer, max_length, cut)
  elif task.traits.generates and not gold_only:
    found = _for_generation(task, rows, prompts, tokenizer, max_length, cut)
  else:
    found = _for_candidates(task, rows, prompts, tokenizer, max_length, cut,
                            gold_only, write_out)
  if gold_only and found.read_at is None:
    return found._replace(golds=[(0,)] * len(rows))
  # Right answers of generated texts are not numbers, but must be there.
  golds_of = task.references if found.generates else task.golds
  golds = [golds_of(row) if needs_gold or task.has_gold(row) else ()
           for row in rows]
  return found if found.generates else found._replace(golds=golds)


def after_tokens(data: Encoded, ids: Sequence[int]) -> Encoded:
  """The same rows with these tokens, of a soft prompt, before each prompt."""
  if not ids:
    return data
  return data._replace(
      prompts=[[*ids, *prompt] for prompt in data.prompts],
      read_at=None if data.read_at is None else data.read_at + len(ids),
      types=data.types and [[*[0] * len(ids), *t] for t in data.types])


def _slots(task: Task, tokenizer) -> dict:
  if task.masked and tokenizer.mask_token is None:
    raise InputError(
        f'the prompt {task.template!r} has a {{mask}}, and this tokenizer no '
        'mask token: it is not that of a masked language model. Give another '
        '--config.task.template or model.')
  return dict(mask=tokenizer.mask_token or '', sep='\0')


def _limited(task: Task, rows, tokenizer) -> tuple[list[dict], set[int]]:
  """Rows with columns cut to ``task.limits`` tokens; which ones were."""
  rows, cut = list(rows), set()
  for column, most in task.limits:
    for r, row in enumerate(rows):
      if column not in row:
        raise InputError(
            f'task.limits names column {column!r}, the data have '
            f'{sorted(row)}; set --config.task.limits.')
      ids = tokenizer(row[column], add_special_tokens=False)['input_ids']
      if len(ids) > most:
        rows[r] = row | {column: tokenizer.decode(ids[:most])}
        cut.add(r)
  return rows, cut


def _for_candidates(task, rows, texts, tokenizer, max_length, cut, gold_only,
                    write_out):
  tokens = _tokenise(tokenizer)
  answers = [[task.gold_text(row)] if gold_only else task.candidates(row)
             for row in rows]
  if task.traits.generates:  # as where the answer is generated
    max_length -= task.max_new_tokens
  texts = [text.lstrip(' ') for text in texts]
  bare = tokens(text.rstrip(' ') for text in texts)
  flat = iter(tokens(text + a for text, some in zip(texts, answers)
                     for a in some))
  prompts, candidates, scored = [], [], []
  for r, some in enumerate(answers):
    full = [next(flat) for _ in some]
    if len(set(map(tuple, full))) < len(full):
      raise InputError(
          f'two of the candidates {some} are the same tokens to this '
          'tokenizer; choose others with --config.task.label_words or choices.')
    numbers = [max(1, len(ids) - len(bare[r])) for ids in full]
    if not bare[r]:  # nothing to condition the first token on
      full = [[_start(tokenizer), *ids] for ids in full]
    prompt = os.path.commonprefix(
        [ids[:len(ids) - n] for ids, n in zip(full, numbers)])
    over = max(map(len, full)) - max_length
    rest = [ids[len(prompt):] for ids in full]
    if over > 0:
      cut.add(r)
      prompt = _keep_end(prompt, len(prompt) - over, tokenizer.bos_token_id)
    if not prompt:
      raise InputError(
          f'the answers of row {r} alone are {max(map(len, rest))} tokens, and '
          f'at most {max_length} are wanted; raise --config.data.max_length.')
    prompts.append(prompt)
    candidates.append(rest)
    scored.append(numbers)
  golds = [()] * len(rows)  # `encode` knows them
  one = {tuple(map(tuple, some)) for some in candidates}
  if len(one) == 1 and not (write_out or gold_only) and all(
      len(ids) == 1 for ids in candidates[0]):
    return Encoded(
        rows, prompts, [[]] * len(rows), [[]] * len(rows), golds, len(cut),
        read_at=np.array([len(p) - 1 for p in prompts], np.int32),
        token_ids=np.array(one.pop(), np.int32)[:, 0])
  return Encoded(rows, prompts, candidates, scored, golds, len(cut))


def _for_generation(task, rows, texts, tokenizer, max_length, cut):
  most = max_length - task.max_new_tokens
  if most < 1:
    raise InputError(
        f'{task.max_new_tokens} new tokens leave no room for a prompt in '
        f'{max_length}; lower --config.task.max_new_tokens.')
  prompts = _tokenise(tokenizer)(text.strip(' ') for text in texts)
  cut |= {r for r, ids in enumerate(prompts) if len(ids) > most}
  prompts = [_keep_end(ids, most, tokenizer.bos_token_id) for ids in prompts]
  return Encoded(rows, prompts, [[]] * len(rows), [[]] * len(rows),
                 [()] * len(rows), len(cut), generates=True)


def _for_mask(task, rows, texts, tokenizer, max_length, cut):
  words = _tokenise(tokenizer, special=False)(task.label_words)
  if any(len(ids) != 1 for ids in words) or (
      len({ids[0] for ids in words}) < len(words)) or (
          tokenizer.unk_token_id in (ids[0] for ids in words)):
    raise InputError(
        f'the label words {tuple(task.label_words)} are not one token each, '
        'all different, to this tokenizer, as a masked model needs; choose '
        'others with --config.task.label_words.')
  mask, prompts, at = tokenizer.mask_token_id, [], []
  for r, ids in enumerate(_tokenise(tokenizer)(texts)):
    if len(ids) > max_length:
      cut.add(r)
      if max_length < 3:
        raise InputError(f'{max_length} tokens have no room for a text and its '
                         'mask; raise --config.data.max_length.')
      ids = _keep_mask(ids, max_length, mask)
    prompts.append(ids)
    at.append(ids.index(mask))
  return Encoded(
      rows, prompts, [[]] * len(rows), [[]] * len(rows),
      [()] * len(rows), len(cut), np.array(at, np.int32),
      np.array(words, np.int32)[:, 0])


def _for_head(task, rows, texts, tokenizer, max_length, causal, cut):
  pairs = [text.split('\0') for text in texts]
  if len({len(pair) for pair in pairs}) > 1 or len(pairs[0]) > 2:
    raise InputError(
        f'the template {task.template!r} must have one {{sep}} at most, and '
        'the data no NUL characters.')
  found = [tokenizer(*pair) for pair in pairs]
  cut |= {r for r, f in enumerate(found) if len(f['input_ids']) > max_length}
  # The longer text loses its end; special tokens stay.
  found = [tokenizer(*pair, truncation='longest_first', max_length=max_length,
                     return_token_type_ids=not causal) for pair in pairs]
  prompts = [list(f['input_ids']) for f in found]
  at = [len(ids) - 1 if causal else 0 for ids in prompts]
  types = None if causal else [list(f['token_type_ids']) for f in found]
  return Encoded(
      rows, prompts, [[]] * len(rows), [[]] * len(rows),
      [()] * len(rows), len(cut), np.array(at, np.int32), types=types,
      classes=task.num_classes)


def _tokenise(tokenizer, special=True):
  def tokens(texts):
    texts = list(texts)
    return tokenizer(texts, add_special_tokens=special)['input_ids'] if (
        texts) else []
  return tokens


def _start(tokenizer) -> int:
  """What stands before a text that has nothing before it."""
  for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
    if token is not None:
      return token
  return 0


def _keep_end(ids: list[int], most: int, bos: int | None) -> list[int]:
  if len(ids) <= most:
    return ids
  if bos is not None and ids[0] == bos and most > 0:
    return [bos, *ids[len(ids) - most + 1:]]
  return ids[len(ids) - most:] if most > 0 else []


def _keep_mask(ids: list[int], most: int, mask: int) -> list[int]:
  """Cuts the text before the mask, as far as that will do, else after it."""
  over, at = len(ids) - most, ids.index(mask)
  before = min(over, max(at - 1, 0))  # the first token is special
  ids = [ids[0], *ids[1 + before:]]
  over -= before
  return ids if not over else [*ids[:len(ids) - 1 - over], ids[-1]]


# --- batches ----------------------------------------------------------------


def answers_within(data: Encoded, length: int) -> int:
  """Answer tokens of a row of at most ``length`` tokens, at most: one shape
  for each bucket of lengths."""
  if data.read_at is not None:
    return 1
  fits = data.lengths <= length
  return max([sum(n) for n, fit in zip(data.scored, fits) if fit], default=1)


def batch_of(data: Encoded, index: np.ndarray, length: int, rows: int) -> dict:
  """Host arrays of the rows ``index``, padded to ``length`` tokens.

  Args:
    data: the encoded rows.
    index: which rows, in order.
    length: tokens S to pad to: on the right, or on the left where the model is
      to continue.
    rows: rows to pad to; padding has weight 0.

  Returns:
    A dict with ``input_ids`` and ``attention_mask`` [rows, S] (1 for a prompt,
    2, 3, ... for its candidates), ``row`` [rows] (the index), ``weight``
    [rows] and, but for prompts to be continued, ``gold`` [rows, C] (which
    candidates are right), ``label`` [rows] (the first of these),
    ``answer_at`` [rows, A] (where an answer's token is predicted) and, where
    candidates are laid out, ``answer_ids`` and ``answer_of`` [rows, A] (the
    token, and its candidate or -1); with token types ``token_type_ids``; with
    a kept trunk ``trunk`` [rows, S, D], zero at padding.
  """
  most, shape = answers_within(data, length), (rows, length)
  batch = {
      'input_ids': np.zeros(shape, np.int32),
      'attention_mask': np.zeros(shape, np.int32),
      'row': np.zeros(rows, np.int32),
      'weight': np.zeros(rows, np.float32),
  }
  end = -1 if data.generates else 0  # no row attends to nothing
  batch['attention_mask'][len(index):, end] = 1
  laid_out = data.read_at is None and not data.generates
  if not data.generates:
    batch |= {'gold': np.zeros((rows, data.width), bool),
              'label': np.zeros(rows, np.int32),
              'answer_at': np.zeros((rows, most), np.int32)}
  if laid_out:
    batch |= {'answer_ids': np.zeros((rows, most), np.int32),
              'answer_of': np.full((rows, most), -1, np.int32)}
  if data.types is not None:
    batch['token_type_ids'] = np.zeros(shape, np.int32)
  if data.trunk is not None:
    values, starts = data.trunk
    batch['trunk'] = np.zeros((*shape, values.shape[-1]), values.dtype)
    for i, r in enumerate(index):
      n = data.row_length(r)
      batch['trunk'][i, :n] = values[starts[r]:starts[r] + n]
  for i, r in enumerate(index):
    prompt, n = data.prompts[r], len(data.prompts[r])
    batch['row'][i], batch['weight'][i] = r, 1
    here = slice(length - n, length) if data.generates else slice(n)
    batch['input_ids'][i, here] = prompt
    batch['attention_mask'][i, here] = 1
    if data.generates:
      continue
    if data.golds[r]:
      batch['gold'][i, list(data.golds[r])] = True
      batch['label'][i] = data.golds[r][0]
    if data.types is not None:
      batch['token_type_ids'][i, :n] = data.types[r]
    if not laid_out:
      batch['answer_at'][i, 0] = data.read_at[r]
      continue
    at, a = n, 0
    for c, (ids, k) in enumerate(zip(data.candidates[r], data.scored[r])):
      after = at + len(ids)
      batch['input_ids'][i, at:after] = ids
      batch['attention_mask'][i, at:after] = c + 2
      before = np.arange(after - k - 1, after - 1)
      before[before < at] = n - 1  # the first token follows the prompt
      batch['answer_at'][i, a:a + k] = before
      batch['answer_ids'][i, a:a + k] = ids[len(ids) - k:]
      batch['answer_of'][i, a:a + k] = c
      at, a = after, a + k
  return batch
