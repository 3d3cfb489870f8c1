r"""Tokenises rows and packs tokens into batches of fixed shape.

The candidate answers :math:`a_c` of a row follow its prompt x in one sequence,
:math:`x\, a_1\, a_2 \ldots`. Each candidate attends to the prompt and itself
(``shared_prompt`` of the model). The prompt is therefore computed once per row,
candidates of any number and length need no padding between them, and the
weights are used once per batch. The last point matters to `mezo_jax.perturbed`,
which perturbs a weight each time it is used.

If every candidate is one token after the same prompt, as label words usually
are, the normaliser of the probabilities is the same for all candidates. It
cancels in the loss and in every comparison, so that the C logits at the end of
the prompt are enough.
"""

from collections.abc import Iterable, Sequence
import os
from typing import Any, NamedTuple
import unicodedata

import numpy as np

from mezo_jax.core.errors import InputError
from mezo_jax.tasks import chat
from mezo_jax.tasks.task import Task


class Kept(NamedTuple):
  """Holds cached activations of frozen layers for the tokens of R rows."""

  values: np.ndarray  # [tokens of all rows, D], the rows one after the other
  starts: np.ndarray  # integers [R], index of each row's first token


class Form(NamedTuple):
  """Holds the properties of `Encoded` on which a compiled program depends.

  It is hashable: data of equal forms share their compiled programs.
  """

  at_one: bool  # whether answers are read at one position per row
  token_ids: tuple[int, ...] | None  # [C], as in `Encoded`
  width: int  # number C of candidates or classes


class Encoded(NamedTuple):
  """Holds R tokenised rows, each with up to C candidates or classes."""

  # The rows themselves.
  rows: list[dict[str, Any]]
  # Token ids of each row's prompt.
  prompts: list[list[int]]
  # Token ids of each candidate after the prompt, [R][C]. Empty lists if answers
  # are read at one position or generated.
  candidates: list[list[list[int]]]
  # Indices of the answer tokens in each candidate, ascending, [R][C]. The other
  # tokens belong to the prompt.
  scored: list[list[Sequence[int]]]
  # Indices of the right candidates or classes of each row.
  golds: list[tuple[int, ...]]
  # Number of rows that were cut.
  truncated: int
  # Position of the answer in each prompt, int32 [R]. None if candidates are in
  # the sequence, or if answers are generated.
  read_at: np.ndarray | None = None
  # Label words that are read at `read_at`, int32 [C]. None otherwise.
  token_ids: np.ndarray | None = None
  # Token types of the prompts, or None for models without them.
  types: list[list[int]] | None = None
  # Whether the model continues the prompts, which are then padded on the left.
  generates: bool = False
  # Cached activations; see `mezo_jax.training.frozen_features`.
  hidden_states: Kept | None = None
  # Number of classes of a new head, some of which may not occur in the rows. 0
  # for other tasks.
  classes: int = 0
  # Indices of rows that were left out, since no part to train fits, and the
  # reason for each.
  left_out: tuple[tuple[int, str], ...] = ()

  @property
  def lengths(self) -> np.ndarray:
    """Returns the number of tokens of each row, int32 [R]."""
    return np.array([*map(self.row_length, range(len(self.prompts)))], np.int32)

  def row_length(self, row: int) -> int:
    """Returns the number of tokens of a row with its candidates."""
    return len(self.prompts[row]) + sum(map(len, self.candidates[row]))

  @property
  def gaps(self) -> list[list[list[int]]]:
    """Returns the tokens between answer tokens that are not scored, [R][C]."""
    return [[[*{*range(some[0], some[-1])} - {*some}] if some else []
             for some in scored] for scored in self.scored]

  @property
  def labels(self) -> np.ndarray:
    """Returns the first right candidate of each row (0 if none), int32 [R]."""
    return np.array([g[0] if g else 0 for g in self.golds], np.int32)

  @property
  def width(self) -> int:
    """Returns C, the largest number of candidates of a row or of classes."""
    if self.token_ids is not None:
      return len(self.token_ids)
    if self.classes:
      return self.classes
    return max(1, *(len(c) for c in self.candidates),
               *(1 + max(g) for g in self.golds if g))

  @property
  def form(self) -> Form:
    """Returns the properties on which a compiled program depends."""
    ids = None if self.token_ids is None else tuple(self.token_ids.tolist())
    return Form(self.read_at is not None, ids, self.width)


def encode(task: Task, rows: Sequence[dict[str, Any]], tokenizer: Any,
           max_length: int, *, gold_only: bool = False,
           prompts: Sequence[str] | None = None, write_out: bool = False,
           causal: bool = True, needs_gold: bool = True) -> Encoded:
  """Tokenises rows.

  A prompt that is too long loses its beginning, but keeps the special tokens
  that the tokenizer puts there. Texts of kind 'head' lose their end instead.

  A conversation that is too long loses turns, and is left out if no part to
  train fits; see `mezo_jax.tasks.chat.mark`.

  A tokenizer may add an end token after a text (``add_eos_token``). It is left
  out if the model continues the text or an answer follows. Masked models and
  new heads keep it, as in their pretraining.

  Args:
    task: The task.
    rows: Rows from `Task.prepare`.
    tokenizer: Tokenizer of transformers.
    max_length: Largest number of tokens of a prompt with its answers.
    gold_only: Whether only the right answer follows each prompt. Defaults to
      False.
    prompts: Prompts to use instead of the task's own. They may be empty texts.
      Defaults to None.
    write_out: Whether to put candidates in the sequence even if they are single
      tokens that could be read at one position. Defaults to False.
    causal: Whether the model is causal, not masked. Defaults to True.
    needs_gold: Whether each row must have a right answer. If not, the ``golds``
      of a row without one are (). Defaults to True.

  Returns:
    The tokenised rows.

  Raises:
    InputError: If there are no rows, a row does not fit the task, answers do
      not fit into ``max_length``, or the tokenizer gives two candidates the
      same tokens.
  """
  if not rows:
    raise InputError('there are no rows to tokenise; check config.data.')
  if task.traits.conversation:
    return _for_conversations(
        task, list(rows), tokenizer, max_length, gold_only, needs_gold)
  own, slots = prompts is None, _slots(task, tokenizer)
  rows, cut = _limited(task, rows, tokenizer)
  if task.masked:  # A mask in the data could be taken for that of the template.
    rows = [{k: v.replace(slots['mask'], ' ') if isinstance(v, str) else v
             for k, v in row.items()} for row in rows]
  prompts = ([task.prompt(r, **slots) for r in rows] if prompts is None
             else list(prompts))
  for r, text in enumerate(prompts):
    if own and not text.strip():
      raise InputError(f'row {r} gives an empty prompt; fix it or leave it '
                       f'out: {rows[r]!r}.')
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
  # Right answers of generated texts have no indices. `references` only checks
  # that they exist.
  golds_of = task.references if found.generates else task.golds
  golds = [golds_of(row) if needs_gold or task.has_gold(row) else ()
           for row in rows]
  return found if found.generates else found._replace(golds=golds)


def space_warnings(task: Task, rows: Sequence[dict[str, Any]], tokenizer: Any
                   ) -> list[str]:
  """Warns unless one space separates each answer from its prompt.

  It warns only if the tokens differ from those with exactly one space.

  Args:
    task: The task.
    rows: Rows from `Task.prepare`. The first 32 are checked.
    tokenizer: Tokenizer of transformers.

  Returns:
    A list of at most one warning.
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
        return [f'warning: {problem}; if this is not intended, change '
                f'--config.{field} or the end of task.template.']
  return []


def _answer_space(task, row, answer: str, tokens: '_Tokens') -> str:
  """Describes a problem with the space before an answer.

  Returns '' if there is none.
  """
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
    return ''  # A chat template defines what follows its special tokens.
  return f'{where} without a space'


def _mask_space(task, row, word: str, tokens: '_Tokens') -> str:
  """Describes a problem with the space of a masked model's label word.

  The token of a word within a text often includes the space before it. The
  space then belongs to the label word, even if the template has a space before
  the mask. Returns '' if there is no problem.
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
    return ''  # The space is a token of its own, before the mask.
  return (f'the label word {word!r} has no space between it and '
          f'{end[-20:]!r}, but {" " + word!r} has a token of its own')


def _wants_space(before: str, word: str) -> bool:
  """Returns whether a space between two texts is usual.

  Args:
    before: Text before, which is not empty.
    word: Text after, which is not empty.
  """
  last, first = before[-1], word[0]
  if last.isspace() or not first.isalnum() or last in _OPENING or (
      last in '"\'' and before.count(last) % 2):
    return False
  return not any(unicodedata.name(c, '').startswith(_WITHOUT_SPACES)
                 for c in (last, first))


# Characters that a word follows without a space.
_OPENING = '([{<«“‘„‚/\\-–—_@#$^~*+=|&'
# Prefixes of the Unicode names of characters in scripts without spaces between
# words, and of their punctuation.
_WITHOUT_SPACES = ('CJK', 'HIRAGANA', 'KATAKANA', 'THAI', 'LAO', 'KHMER',
                   'MYANMAR', 'TIBETAN', 'IDEOGRAPHIC', 'FULLWIDTH',
                   'HALFWIDTH', 'LEFT CORNER', 'RIGHT CORNER', 'BOPOMOFO')


def after_tokens(data: Encoded, ids: Sequence[int]) -> Encoded:
  """Puts the tokens of a soft prompt before each prompt.

  Args:
    data: The tokenised rows.
    ids: Token ids of the soft prompt. With none, ``data`` is returned.
  """
  if not ids:
    return data
  return data._replace(
      prompts=[[*ids, *prompt] for prompt in data.prompts],
      read_at=None if data.read_at is None else data.read_at + len(ids),
      types=data.types and [[*[0] * len(ids), *t] for t in data.types])


def _slots(task: Task, tokenizer) -> dict:
  """Returns the texts for {mask} and {sep} in a template.

  A NUL character marks the separator until `_for_head` splits the text there.
  """
  if task.masked and tokenizer.mask_token is None:
    raise InputError(
        f'the prompt {task.template!r} has a {{mask}}, but this tokenizer has '
        'no mask token. Use a masked language model, or change '
        '--config.task.template.')
  return dict(mask=tokenizer.mask_token or '', sep='\0')


def _limited(task: Task, rows, tokenizer) -> tuple[list[dict], set[int]]:
  """Cuts the columns in ``task.limits`` to their numbers of tokens.

  Returns:
    A pair of the rows and the set of the indices of those that were cut.
  """
  rows, cut = list(rows), set()
  for column, most in task.limits:
    for r, row in enumerate(rows):
      if column not in row:
        raise InputError(
            f'task.limits names the column {column!r}, but the data have the '
            f'columns {sorted(row)}; set --config.task.limits.')
      text = str(row[column])
      short = _first_tokens(text, most, tokenizer)
      if short != text:
        rows[r] = row | {column: short}
        cut.add(r)
  return rows, cut


def _first_tokens(text: str, most: int, tokenizer) -> str:
  """Returns the longest beginning of a text with at most ``most`` tokens."""
  exact = tokenizer.is_fast  # Other tokenizers do not report where tokens end.
  found = tokenizer(text, add_special_tokens=False, padding=False,
                    truncation=False, return_offsets_mapping=exact)
  ids = found['input_ids']
  if len(ids) <= most:
    return text
  if not exact:
    return tokenizer.decode(ids[:most], clean_up_tokenization_spaces=False)
  spans = found['offset_mapping']
  n = most
  # Do not cut between two tokens that are parts of the same character.
  while n and spans[n][0] < spans[n - 1][1]:
    n -= 1
  return text[:spans[n - 1][1]] if n else ''


def _for_candidates(task, rows, texts, tokenizer, max_length, cut, gold_only,
                    write_out):
  """Encodes rows whose candidates or right answers follow the prompt.

  A tokenizer may join the end of the prompt and the start of an answer in one
  token, so prompt and answer are tokenised together. If the prompt alone has m
  tokens and the prompt with a candidate has n tokens, the last n - m tokens (at
  least one) are the answer and are scored. `Encoded.prompts` has the tokens
  before the answers that all candidates of a row share. The other tokens before
  an answer are stored with its candidate but not scored.

  Args:
    task: The task.
    rows: Rows from `Task.prepare`.
    texts: Prompts of the rows.
    tokenizer: Tokenizer of transformers.
    max_length: Largest number of tokens of a prompt with its longest answer.
    cut: Indices of rows that were cut before. More are added.
    gold_only: Whether only the right answer follows the prompt.
    write_out: Whether to put candidates of one token in the sequence, too.
  """
  answers = [[task.gold_text(row)] if gold_only else task.candidates(row)
             for row in rows]
  texts = [text.lstrip(' ') for text in texts]
  if task.traits.generates:
    # Cut the prompt as `_for_generation` does, so that both see the same one.
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
          'tokenizer; change --config.task.label_words or task.choices.')
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
          f'the answers of row {r} alone have {max(map(len, rest))} tokens, '
          f'but at most {max_length} are allowed, prompt included; raise '
          '--config.data.max_length.')
    prompts.append(prompt)
    candidates.append(rest)
    scored.append([range(len(ids) - n, len(ids))
                   for ids, n in zip(rest, numbers)])
  golds = [()] * len(rows)  # `encode` replaces them.
  # If the candidates of all rows are the same single tokens, as label words
  # usually are, they are read at the end of the prompt.
  one = {tuple(map(tuple, some)) for some in candidates}
  if len(one) == 1 and not (write_out or gold_only) and all(
      len(ids) == 1 for ids in candidates[0]):
    return Encoded(
        rows, prompts, [[]] * len(rows), [[]] * len(rows), golds, len(cut),
        read_at=np.array([len(p) - 1 for p in prompts], np.int32),
        token_ids=np.array(one.pop(), np.int32)[:, 0])
  return Encoded(rows, prompts, candidates, scored, golds, len(cut))


def _for_generation(task, rows, texts, tokenizer, max_length, cut):
  """Encodes prompts that the model continues.

  Spaces around a prompt are removed, because a generated word usually begins
  with its own space.

  Args:
    task: The task.
    rows: Rows from `Task.prepare`.
    texts: Prompts of the rows.
    tokenizer: Tokenizer of transformers.
    max_length: Largest number of tokens of a prompt with its answer.
    cut: Indices of rows that were cut before. More are added.
  """
  most = _room(task, max_length)
  if task.chat:
    conversations = [chat.Conversation(
        [{'role': 'user', 'content': text}], [], None) for text in texts]
    prompts, _ = chat.prompts(
        conversations, chat.Template(tokenizer, task.chat_args), most)
  else:
    texts = [text.strip(' ') for text in texts]
    tokens = _Tokens.of(tokenizer, texts)
    prompts = [[*tokens.before(ids), *ids] for ids in tokens(texts)]
    cut |= {r for r, ids in enumerate(prompts) if len(ids) > most}
    prompts = [tokens.keep_end(ids, most) for ids in prompts]
  return Encoded(rows, prompts, [[]] * len(rows), [[]] * len(rows),
                 [()] * len(rows), len(cut), generates=True)


def _for_conversations(task, rows, tokenizer, max_length, gold_only,
                       needs_gold):
  """Encodes conversations.

  Args:
    task: The task.
    rows: Rows from `Task.prepare`.
    tokenizer: Tokenizer with a chat template.
    max_length: Largest number of tokens of a conversation.
    gold_only: Whether the messages to train are encoded. Otherwise the model is
      to write the last message.
    needs_gold: Whether each row must have a right last message if the model is
      to write it.
  """
  found = [*map(task.conversation, rows)]
  template = chat.Template(tokenizer, task.chat_args)
  if not gold_only:
    for row in rows if needs_gold else ():
      task.references(row)  # raises an error if there is none
    prompts, cut = chat.prompts(found, template, _room(task, max_length))
    return Encoded(rows, prompts, [[]] * len(rows), [[]] * len(rows),
                   [()] * len(rows), cut, generates=True)
  roles = ', '.join(task.train_roles)
  prompts, candidates, scored, kept, left_out = [], [], [], [], []
  marked = chat.mark(found, template, max_length)
  for r, one in enumerate(marked):
    if not one.spans:
      left_out.append((r, (
          f'needs {one.needs} tokens, more than {max_length}' if one.needs else
          f'has no message of the role {roles} with a weight and a text')))
      continue
    # A token is predicted from those before it, so one must be left.
    first = max(one.spans[0][0], 1)
    positions = [i - first for span in one.spans for i in range(*span)
                 if i >= first]
    if not positions:
      left_out.append((r, 'has no token before its answer'))
      continue
    kept.append(rows[r])
    prompts.append(one.ids[:first])
    candidates.append([one.ids[first:]])
    scored.append([positions])
  if not kept:
    raise InputError(
        f'none of {len(rows)} conversations can be trained: the first one '
        f'{left_out[0][1]}. Check the data and --config.task.train_roles, or '
        'raise --config.data.max_length.')
  return Encoded(kept, prompts, candidates, scored, [(0,)] * len(kept),
                 sum(one.cut and bool(one.spans) for one in marked),
                 left_out=tuple(left_out))


def _room(task: Task, max_length: int) -> int:
  """Returns the largest number of tokens of a prompt to continue."""
  most = max_length - task.max_new_tokens
  if most < 1:
    raise InputError(
        f'{task.max_new_tokens} new tokens leave no room for a prompt within '
        f'{max_length} tokens; lower --config.task.max_new_tokens.')
  return most


def _for_mask(task, rows, texts, tokenizer, max_length, cut):
  """Encodes prompts whose answer a masked model reads at the mask.

  Args:
    task: The task.
    rows: Rows from `Task.prepare`, without masks in their texts.
    texts: Prompts of the rows.
    tokenizer: Tokenizer of transformers.
    max_length: Largest number of tokens of a prompt.
    cut: Indices of rows that were cut before. More are added.
  """
  tokens = _Tokens.of(tokenizer, texts)
  words = tokens(task.label_words)
  if any(len(ids) != 1 for ids in words) or (
      len({ids[0] for ids in words}) < len(words)) or (
          tokenizer.unk_token_id in (ids[0] for ids in words)):
    raise InputError(
        f'the label words {tuple(task.label_words)} of a masked model must be '
        'different words of one token each for its tokenizer; change '
        '--config.task.label_words.')
  mask, prompts, at = tokenizer.mask_token_id, [], []
  for r, ids in enumerate(map(tokens.around, tokens(texts))):
    if len(ids) > max_length:
      cut.add(r)
      if max_length < len(tokens.prefix) + 1 + len(tokens.suffix):
        raise InputError(f'{max_length} tokens have no room for the mask and '
                         'special tokens; raise --config.data.max_length.')
      ids = tokens.keep_mask(ids, max_length)
    prompts.append(ids)
    at.append(ids.index(mask))
  return Encoded(
      rows, prompts, [[]] * len(rows), [[]] * len(rows),
      [()] * len(rows), len(cut), np.array(at, np.int32),
      np.array(words, np.int32)[:, 0])


def _for_head(task, rows, texts, tokenizer, max_length, causal, cut):
  """Encodes texts, or pairs of texts, whose class a new head predicts.

  Args:
    task: The task.
    rows: Rows from `Task.prepare`.
    texts: Texts of the rows, with a NUL character between those of a pair.
    tokenizer: Tokenizer of transformers.
    max_length: Largest number of tokens of a row.
    causal: Whether the model is causal, not masked.
    cut: Indices of rows that were cut before. More are added.
  """
  pairs = [text.split('\0') for text in texts]
  if len({len(pair) for pair in pairs}) > 1 or len(pairs[0]) > 2:
    raise InputError(
        f'task.template {task.template!r} may have at most one {{sep}}, and '
        'the data no NUL characters; remove them.')
  # All special tokens stay, including the end token of a causal model, because
  # transformers' classes for sequence classification read such texts.
  whole = [tokenizer(*pair, padding=False, truncation=False)['input_ids']
           for pair in pairs]
  cut |= {r for r, ids in enumerate(whole) if len(ids) > max_length}
  # The longer text of a pair loses its end, and special tokens stay. The
  # tokenizer may be shared, so its setting is restored.
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
  """Wraps a tokenizer and separates its special tokens from those of a text."""

  tokenizer: Any
  prefix: list[int]  # special tokens that the tokenizer puts before a text
  suffix: list[int]  # special tokens that the tokenizer puts after a text

  @classmethod
  def of(cls, tokenizer, texts: Sequence[str] = ()) -> '_Tokens':
    """Wraps a tokenizer and finds out which special tokens it adds.

    It compares the tokens of a short text with and without special tokens.

    Args:
      tokenizer: Tokenizer of transformers.
      texts: Texts to try if the tokenizer gives no tokens for common words.
        Defaults to none.
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
    """Tokenises texts.

    Truncation and padding are off even if they were saved in the tokenizer's
    file. So is the warning for texts longer than its ``model_max_length``,
    because `encode` cuts them afterwards.

    Args:
      texts: The texts.
      special: Whether to add special tokens. Defaults to False.

    Returns:
      The token ids of each text.
    """
    texts = list(texts)
    if not texts:
      return []
    return self.tokenizer(
        texts, add_special_tokens=special, padding=False, truncation=False,
        verbose=False)['input_ids']

  def before(self, ids: list[int]) -> list[int]:
    """Returns the tokens to put before a text.

    These are the special tokens of the tokenizer, unless the text begins with
    them. An empty text gets at least one token, so that a model has an input.

    Args:
      ids: Token ids of the text, without special tokens.
    """
    if self.prefix:
      doubled = ids[:len(self.prefix)] == self.prefix
      return [] if doubled else self.prefix
    return [] if ids else [_start(self.tokenizer)]

  def around(self, ids: list[int]) -> list[int]:
    """Returns a text with the special tokens that it does not have already."""
    n = len(self.suffix)
    after = [] if n and ids[-n:] == self.suffix else self.suffix
    before = self.before(ids) if self.prefix else []
    return [*before, *ids, *after]

  def keep_end(self, ids: list[int], most: int) -> list[int]:
    """Cuts the beginning of a prompt after its special tokens.

    Args:
      ids: Token ids of the prompt, with the special tokens before it.
      most: Largest number of tokens of the result.
    """
    if len(ids) <= most:
      return ids
    first = len(self.prefix)
    if not first and ids[0] == self.tokenizer.bos_token_id:
      first = 1  # The text has a start token of its own.
    if most <= first:
      return ids[:max(most, 0)]
    return [*ids[:first], *ids[len(ids) - most + first:]]

  def keep_mask(self, ids: list[int], most: int) -> list[int]:
    """Cuts a prompt, but not its mask and special tokens.

    The text before the mask is cut first, from its beginning. If that is not
    enough, the end of the text after the mask is cut, too.

    Args:
      ids: Token ids of the prompt, with special tokens.
      most: Largest number of tokens of the result.
    """
    over, first = len(ids) - most, len(self.prefix)
    at = ids.index(self.tokenizer.mask_token_id)
    before = min(over, max(at - first, 0))
    ids = [*ids[:first], *ids[first + before:]]
    over -= before
    end = len(ids) - len(self.suffix)
    return [*ids[:end - over], *ids[end:]]


def _start(tokenizer) -> int:
  """Returns the token to put before an empty text."""
  for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
    if token is not None:
      return token
  return 0


# --- batches ----------------------------------------------------------------


def answers_within(data: Encoded, length: int) -> int:
  """Returns the largest number of answer tokens of a row within a bucket.

  Batches of the bucket reserve that many, so that all have the same shape.

  Args:
    data: The tokenised rows.
    length: Length of the bucket. Longer rows are not considered.
  """
  if data.read_at is not None:
    return 1
  fits = data.lengths <= length
  return max([sum(map(len, scored)) for scored, fit in zip(data.scored, fits)
              if fit], default=1)


def batch_of(data: Encoded, index: np.ndarray, length: int, rows: int
             ) -> dict[str, Any]:
  """Packs rows into a batch of fixed shape, as arrays in host memory.

  Args:
    data: The tokenised rows.
    index: Indices of the rows of the batch.
    length: Number S of tokens to pad to. Padding is on the right, or on the
      left if the model continues the prompts.
    rows: Number of rows to pad to.

  Returns:
    A dict of arrays. It always has:

    * ``input_ids`` [rows, S], the tokens;
    * ``attention_mask`` [rows, S], 0 at padding, 1 for the prompt and 2, 3, ...
      for its candidates;
    * ``row`` [rows], the index of each row in ``data``;
    * ``weight`` [rows], float32, 1 for a row and 0 for padding.

    Unless answers are generated, it also has:

    * ``gold`` [rows, C], bool, which candidates are right;
    * ``label`` [rows], the first right candidate;
    * ``answer_at`` [rows, A], the positions at which answers' tokens are
      predicted.

    If candidates are in the sequence, it also has:

    * ``answer_ids`` [rows, A], the tokens of the answers;
    * ``answer_of`` [rows, A], the candidate of each token, -1 at padding.

    If ``data`` has them, there are ``token_type_ids`` [rows, S] and the cached
    cached ``hidden_states`` [rows, S, D], which are zero at padding.
  """
  most, shape = answers_within(data, length), (rows, length)
  batch = {
      'input_ids': np.zeros(shape, np.int32),
      'attention_mask': np.zeros(shape, np.int32),
      'row': np.zeros(rows, np.int32),
      'weight': np.zeros(rows, np.float32),
  }
  # Padding rows get one token, so that attention always has a token to attend
  # to.
  end = -1 if data.generates else 0
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
  if data.hidden_states is not None:
    values, starts = data.hidden_states
    batch['hidden_states'] = np.zeros((*shape, values.shape[-1]), values.dtype)
    for i, r in enumerate(index):
      n = data.row_length(r)
      batch['hidden_states'][i, :n] = values[starts[r]:starts[r] + n]
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
    for c, (ids, scored) in enumerate(zip(data.candidates[r], data.scored[r])):
      after, k = at + len(ids), len(scored)
      batch['input_ids'][i, at:after] = ids
      batch['attention_mask'][i, at:after] = c + 2
      # Each token is predicted at the position before it. The first token of a
      # candidate is predicted at the end of the prompt, position n - 1, even if
      # other candidates are between the prompt and this one in the sequence.
      before = at - 1 + np.array(scored, int)
      before[before < at] = n - 1
      batch['answer_at'][i, a:a + k] = before
      batch['answer_ids'][i, a:a + k] = [ids[s] for s in scored]
      batch['answer_of'][i, a:a + k] = c
      at, a = after, a + k
  return batch
