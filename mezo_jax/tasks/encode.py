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

from collections.abc import Iterable, Sequence
import os
from typing import Any, NamedTuple
import unicodedata

import numpy as np

from mezo_jax.core.errors import InputError
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

  rows: list[dict[str, Any]]  # what they came from
  prompts: list[list[int]]  # [R] token ids
  candidates: list[list[list[int]]]  # [R][C] token ids after the prompt
  scored: list[list[int]]  # [R][C] number of answer tokens at their end
  golds: list[tuple[int, ...]]  # [R] the right candidates, or classes
  truncated: int  # rows that lost tokens
  read_at: np.ndarray | None = None  # int32 [R], where label words are read
  token_ids: np.ndarray | None = None  # int32 [C], label words of one token
  types: list[list[int]] | None = None  # [R] token types of the prompts
  generates: bool = False  # prompts to be continued: padded on the left
  trunk: Kept | None = None  # see `mezo_jax.training.frozen_features`
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


def encode(task: Task, rows: Sequence[dict[str, Any]], tokenizer: Any,
           max_length: int, *, gold_only: bool = False,
           prompts: Sequence[str] | None = None, write_out: bool = False,
           causal: bool = True, needs_gold: bool = True) -> Encoded:
  """Tokenises rows; over-long prompts keep their end and what the tokenizer
  puts before it.

  What a tokenizer adds after a text (an end token, where one was saved with
  ``add_eos_token``) is left out where a model is to continue the text or an
  answer follows it; masked models and new heads read it, as they were trained.

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
  prompts = ([task.prompt(r, **slots) for r in rows] if prompts is None
             else list(prompts))
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


def space_warnings(task: Task, rows: Sequence[dict[str, Any]], tokenizer: Any
                   ) -> list[str]:
  """Returns warnings of answers that follow their prompt without a space, or
  after two, where the tokenizer tells the difference.

  Args:
    task: how a row reads.
    rows: of which the first few are looked at.
    tokenizer: a transformers tokenizer.
  """
  if task.traits.new_head or task.traits.generates:
    return []
  find = _mask_space if task.masked else _answer_space
  tokens = _Tokens.of(tokenizer)
  for row in rows[:32]:
    for answer in task.candidates(row):
      problem = find(task, row, answer, tokens)
      if problem:
        field = 'task.label_words' if task.traits.words else 'task.answer'
        return [f'warning: {problem}; if that is not meant, change '
                f'--config.{field} or the end of task.template.']
  return []


def _answer_space(task, row, answer: str, tokens: '_Tokens') -> str:
  """Returns what is wrong with the space before an answer; '' for nothing."""
  prompt = task.prompt(row).lstrip(' ')
  before, word = prompt.rstrip(' '), answer.lstrip(' ')
  if not before or not word:
    return ''
  spaces = len(prompt) - len(before) + len(answer) - len(word)
  right, = tokens([f'{before} {word}'])
  if tokens([prompt + answer]) == [right]:
    return ''
  where = f'the answer {answer!r} follows the prompt\'s end {prompt[-20:]!r}'
  if spaces > 1:
    return f'{where} after {spaces} spaces'
  if spaces or not _wants_space(before, word):
    return ''
  ids, = tokens([before])
  if ids and ids[-1] in tokens.tokenizer.all_special_ids:
    return ''  # a chat template decides what follows its tokens
  return f'{where} without a space'


def _mask_space(task, row, word: str, tokens: '_Tokens') -> str:
  """Returns what is wrong with the space of a masked model's label word.

  The token of a word in a text often begins with its space, which therefore
  belongs to the word even where the template has a space before the mask.
  """
  mask = tokens.tokenizer.mask_token
  before = task.prompt(row, mask='\0').partition('\0')[0]
  end = before.rstrip(' ')
  bare, spaced = tokens([word, f' {word}'])
  if not end or not word or bare == spaced or len(spaced) != 1 or (
      not _wants_space(end, word)):
    return ''
  with_space, without = tokens([f'{end} {mask}', f'{end}{mask}'])
  if end != before and with_space != without:
    return ''  # the space is read before the mask, as a token of its own
  return (f'the label word {word!r} is read without a space after {end[-20:]!r}'
          f', and {" " + word!r} is another token')


def _wants_space(before: str, word: str) -> bool:
  """Returns whether a writer would put a space between the two."""
  last, first = before[-1], word[0]
  if last.isspace() or not first.isalnum() or last in _OPENING or (
      last in '"\'' and before.count(last) % 2):
    return False
  return not any(unicodedata.name(c, '').startswith(_WITHOUT_SPACES)
                 for c in (last, first))


# After these characters a word follows at once.
_OPENING = '([{<«“‘„‚/\\-–—_@#$^~*+=|&'
# Beginnings of the names of characters of scripts that write no spaces, and of
# their punctuation.
_WITHOUT_SPACES = ('CJK', 'HIRAGANA', 'KATAKANA', 'THAI', 'LAO', 'KHMER',
                   'MYANMAR', 'TIBETAN', 'IDEOGRAPHIC', 'FULLWIDTH',
                   'HALFWIDTH', 'LEFT CORNER', 'RIGHT CORNER', 'BOPOMOFO')


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
      text = str(row[column])
      short = _first_tokens(text, most, tokenizer)
      if short != text:
        rows[r] = row | {column: short}
        cut.add(r)
  return rows, cut


def _first_tokens(text: str, most: int, tokenizer) -> str:
  """Returns the longest beginning of a text that has ``most`` tokens at most.
  """
  exact = tokenizer.is_fast  # others do not know where a token ends
  found = tokenizer(text, add_special_tokens=False, padding=False,
                    truncation=False, return_offsets_mapping=exact)
  ids = found['input_ids']
  if len(ids) <= most:
    return text
  if not exact:
    return tokenizer.decode(ids[:most], clean_up_tokenization_spaces=False)
  spans = found['offset_mapping']
  n = most
  while n and spans[n][0] < spans[n - 1][1]:  # both are of one character
    n -= 1
  return text[:spans[n - 1][1]] if n else ''


def _for_candidates(task, rows, texts, tokenizer, max_length, cut, gold_only,
                    write_out):
  answers = [[task.gold_text(row)] if gold_only else task.candidates(row)
             for row in rows]
  texts = [text.lstrip(' ') for text in texts]
  if task.traits.generates:  # as where the answer is generated
    max_length -= task.max_new_tokens
    texts = [text.rstrip(' ') for text in texts]
  tokens = _Tokens.of(tokenizer, texts)
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
    start = tokens.before(bare[r])
    full = [[*start, *ids] for ids in full]
    prompt = list(os.path.commonprefix(
        [ids[:len(ids) - n] for ids, n in zip(full, numbers)]))
    over = max(map(len, full)) - max_length
    rest = [ids[len(prompt):] for ids in full]
    if over > 0:
      cut.add(r)
      prompt = tokens.keep_end(prompt, len(prompt) - over)
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
  texts = [text.strip(' ') for text in texts]
  tokens = _Tokens.of(tokenizer, texts)
  prompts = [[*tokens.before(ids), *ids] for ids in tokens(texts)]
  cut |= {r for r, ids in enumerate(prompts) if len(ids) > most}
  prompts = [tokens.keep_end(ids, most) for ids in prompts]
  return Encoded(rows, prompts, [[]] * len(rows), [[]] * len(rows),
                 [()] * len(rows), len(cut), generates=True)


def _for_mask(task, rows, texts, tokenizer, max_length, cut):
  tokens = _Tokens.of(tokenizer, texts)
  words = tokens(task.label_words)
  if any(len(ids) != 1 for ids in words) or (
      len({ids[0] for ids in words}) < len(words)) or (
          tokenizer.unk_token_id in (ids[0] for ids in words)):
    raise InputError(
        f'the label words {tuple(task.label_words)} are not one token each, '
        'all different, to this tokenizer, as a masked model needs; choose '
        'others with --config.task.label_words.')
  mask, prompts, at = tokenizer.mask_token_id, [], []
  for r, ids in enumerate(map(tokens.around, tokens(texts))):
    if len(ids) > max_length:
      cut.add(r)
      if max_length < len(tokens.prefix) + 1 + len(tokens.suffix):
        raise InputError(f'{max_length} tokens have no room for a text and its '
                         'mask; raise --config.data.max_length.')
      ids = tokens.keep_mask(ids, max_length)
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
  # All that the tokenizer adds stays: transformers' classes for sequence
  # classification read such texts, an end token of a causal model included.
  whole = [tokenizer(*pair, padding=False, truncation=False)['input_ids']
           for pair in pairs]
  cut |= {r for r, ids in enumerate(whole) if len(ids) > max_length}
  # The longer text loses its end; special tokens stay.
  side, tokenizer.truncation_side = tokenizer.truncation_side, 'right'
  try:
    found = [tokenizer(*pair, padding=False, truncation='longest_first',
                       max_length=max_length, return_token_type_ids=not causal)
             for pair in pairs]
  finally:
    tokenizer.truncation_side = side
  prompts = [list(f['input_ids']) for f in found]
  at = [len(ids) - 1 if causal else 0 for ids in prompts]
  types = None if causal else [list(f['token_type_ids']) for f in found]
  return Encoded(
      rows, prompts, [[]] * len(rows), [[]] * len(rows),
      [()] * len(rows), len(cut), np.array(at, np.int32), types=types,
      classes=task.num_classes)


class _Tokens(NamedTuple):
  """A tokenizer that adds nothing by itself, and what it would have added."""

  tokenizer: Any
  prefix: list[int]  # that it puts before a text
  suffix: list[int]  # that it puts after a text

  @classmethod
  def of(cls, tokenizer, texts: Sequence[str] = ()) -> '_Tokens':
    """Finds out what a tokenizer adds, by its answer to a short text.

    Args:
      tokenizer: a transformers tokenizer.
      texts: tried too, if the tokenizer makes nothing of common words.
    """
    bare = cls(tokenizer, [], [])
    for text in ('a', 'the', '0', '.', *texts):
      ids, = bare([text])
      if not ids:
        continue
      whole, = bare([text], special=True)
      for at in range(len(whole) - len(ids) + 1):
        if whole[at:at + len(ids)] == ids:
          return cls(tokenizer, whole[:at], whole[at + len(ids):])
    return bare

  def __call__(self, texts: Iterable[str],
               special: bool = False) -> list[list[int]]:
    """Returns the token ids of each text, without what the tokenizer adds.

    Truncation and padding that were saved in the tokenizer's file are off, and
    so is the warning for texts above its ``model_max_length``: `encode` cuts.
    """
    texts = list(texts)
    if not texts:
      return []
    return self.tokenizer(
        texts, add_special_tokens=special, padding=False, truncation=False,
        verbose=False)['input_ids']

  def before(self, ids: list[int]) -> list[int]:
    """Returns what stands before a text: what the tokenizer adds, unless the
    text begins with it, and for an empty text one token in any case."""
    if self.prefix:
      doubled = ids[:len(self.prefix)] == self.prefix
      return [] if doubled else self.prefix
    return [] if ids else [_start(self.tokenizer)]

  def around(self, ids: list[int]) -> list[int]:
    """Returns a text with all that the tokenizer adds, but nothing twice."""
    n = len(self.suffix)
    after = [] if n and ids[-n:] == self.suffix else self.suffix
    before = self.before(ids) if self.prefix else []
    return [*before, *ids, *after]

  def keep_end(self, ids: list[int], most: int) -> list[int]:
    """Cuts a prompt to ``most`` tokens: its beginning is lost, but not what the
    tokenizer puts there."""
    if len(ids) <= most:
      return ids
    first = len(self.prefix)
    if not first and ids[0] == self.tokenizer.bos_token_id:
      first = 1  # the text's own
    if most <= first:
      return ids[:max(most, 0)]
    return [*ids[:first], *ids[len(ids) - most + first:]]

  def keep_mask(self, ids: list[int], most: int) -> list[int]:
    """Cuts the text before the mask, as far as that will do, else after it."""
    over, first = len(ids) - most, len(self.prefix)
    at = ids.index(self.tokenizer.mask_token_id)
    before = min(over, max(at - first, 0))
    ids = [*ids[:first], *ids[first + before:]]
    over -= before
    end = len(ids) - len(self.suffix)
    return [*ids[:end - over], *ids[end:]]


def _start(tokenizer) -> int:
  """Returns what stands before a text that has nothing before it."""
  for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
    if token is not None:
      return token
  return 0


# --- batches ----------------------------------------------------------------


def answers_within(data: Encoded, length: int) -> int:
  """Answer tokens of a row of at most ``length`` tokens, at most: one shape
  for each bucket of lengths."""
  if data.read_at is not None:
    return 1
  fits = data.lengths <= length
  return max([sum(n) for n, fit in zip(data.scored, fits) if fit], default=1)


def batch_of(data: Encoded, index: np.ndarray, length: int, rows: int
             ) -> dict[str, Any]:
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
      assert data.read_at is not None
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
