r"""Turns conversations into tokens and marks those that are trained.

A row of a task of kind 'chat' is a conversation. It has either a column
``messages``, a list of dicts with a ``role`` and a ``content``, or the columns
``prompt`` and ``completion``, each of which is a text or a list of messages.

A chat template writes a conversation as one text, for example
``<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n``.
Let T(m) be the text of the messages m, and P(m) the same with the generation
prompt (here ``<|im_start|>assistant\n``) after it. The trained part of the
assistant's message :math:`m_i` is what T(m_1 ... m_i) has after
P(m_1 ... m_{i-1}), without white space after the token that ends the turn.
This is exactly what the model has to write in a conversation: the content and
the end of the turn. It needs no marks in the template, but P(m_1 ... m_{i-1})
must be a prefix of T(m_1 ... m_i), and this one of T(m_1 ... m_n). An error
shows the texts where it is not.
"""

from collections.abc import Iterable, Iterator, Sequence
import datetime
import itertools
import json
import os
from pathlib import Path
import re
from typing import Any, NamedTuple

from mezo_jax.core.errors import first_line, InputError

# A template for models without one, which writes only the contents.
PLAIN = ("{% for message in messages %}{{ message.content }}"
         "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}"
         "{% endfor %}")
# Date that templates write when they ask for today's. It is fixed, so that a
# run that is resumed on another day trains on the same tokens.
_TODAY = datetime.datetime(2026, 1, 1)
_DATES = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
# Key of a message that the template does not get. A message with the weight 0
# is not trained.
_WEIGHT = 'weight'


class Conversation(NamedTuple):
  """Holds the messages of a row."""

  messages: list[dict[str, Any]]
  trained: list[int]  # indices of the messages that are trained, ascending
  tools: list[Any] | None  # descriptions of tools that the template is given


class Marked(NamedTuple):
  """Holds the tokens of a conversation, up to the last one that is trained."""

  ids: list[int]
  spans: list[tuple[int, int]]  # [start, end) of the tokens that are trained
  cut: bool  # whether turns were left out
  needs: int  # number of tokens up to the first trained part; 0 if none


def conversation(row: dict[str, Any], roles: Sequence[str],
                 turns: str = 'all') -> Conversation:
  """Reads the conversation of a row.

  Args:
    row: The row.
    roles: Roles of the messages that are trained. Of the messages in
      ``prompt``, none is, and neither is a first message of the assistant, for
      which nothing asks.
    turns: 'all', or 'last' to train only the last of these messages.

  Raises:
    InputError: If the row has no such columns, or a message is malformed.
  """
  parts = [_messages(row, 'messages', '')]
  if parts == [[]]:
    parts = [_messages(row, 'prompt', 'user'),
             _messages(row, 'completion', 'assistant')]
  context = len(parts[0]) if len(parts) > 1 else 0
  messages = [*itertools.chain(*parts)]
  if not messages:
    raise InputError(
        f'the row {_short(row)} has no conversation; a task of kind '
        "'chat' needs a column 'messages', or 'prompt' and 'completion'. "
        'Rename the columns, or set task.row in a config file.')
  trained = [i for i, message in enumerate(messages) if i >= context
             and message['role'] in roles and message.get(_WEIGHT, 1)
             and (i or message['role'] != 'assistant')]
  plain = [{k: v for k, v in message.items() if k != _WEIGHT}
           for message in messages]
  tools = row.get('tools') or None
  if isinstance(tools, str):
    tools = _parsed(row, 'tools', tools)
  return Conversation(plain, trained[-1:] if turns == 'last' else trained,
                      _without_none(tools))


def _messages(row: dict[str, Any], column: str, role: str
              ) -> list[dict[str, Any]]:
  """Returns the messages in a column; [] if the row does not have it.

  Args:
    row: The row.
    column: The column.
    role: Role of a text. '' if the column must have messages, which a text may
      contain as JSON.
  """
  value = row.get(column)
  if value is None:
    return []
  if isinstance(value, str):
    if role:
      return [{'role': role, 'content': value}]
    value = _parsed(row, column, value)
  if not isinstance(value, list | tuple):
    raise InputError(
        f'column {column!r} of the row {_short(row)} is neither a list of '
        'messages nor a text; fix the row.')
  return [_message(row, column, message) for message in value]


def _parsed(row, column: str, text: str) -> Any:
  """Returns the JSON value in a cell, such as a list in a csv file."""
  try:
    return json.loads(text)
  except ValueError as e:
    raise InputError(f'column {column!r} of the row {_short(row)} is a text '
                     f'that is not JSON ({e}); fix the row.') from None


def _message(row, column: str, message: Any) -> dict[str, Any]:
  """Checks a message and returns it, without keys that have no value."""
  def error(what: str) -> InputError:
    return InputError(f'column {column!r} of the row {_short(row)} has '
                      f'{what}; fix the row.')
  if not isinstance(message, dict):
    raise error(f'the message {message!r:.80}, which is not an object with a '
                'role and a content')
  found = _without_none(message)
  role, content = found.get('role'), found.get('content')
  if not isinstance(role, str) or not role:
    raise error(f'a message without a role, {message!r:.80}')
  if isinstance(content, list | tuple):  # parts, of which some may be images
    texts = [part.get('text') if isinstance(part, dict) else part
             for part in content]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(texts):
      raise error(f'a message of {role!r} with a part that is not a text')
    found['content'] = content = ''.join(known)
  if found.get(_WEIGHT, 1) not in (0, 1):
    raise error(f'a message with the weight {found[_WEIGHT]!r}, which is '
                'neither 0 nor 1')
  said = {k for k, v in found.items() if v} - {'role', 'name', _WEIGHT}
  if isinstance(content, str) or content is None and said:
    return found  # The second may be a call of a tool.
  raise error(f'a message of {role!r} without a text as its content')


def _without_none(value: Any) -> Any:
  """Returns a value without the entries of dicts that are None.

  A parquet file has None for the keys that other rows have.
  """
  if isinstance(value, dict):
    return {k: _without_none(v) for k, v in value.items() if v is not None}
  if isinstance(value, list | tuple):
    return [_without_none(v) for v in value]
  return value


def text_of(messages: Sequence[dict[str, Any]]) -> str:
  """Returns messages as a text for people: ``user: Hi``, a line for each."""
  return '\n'.join(f'{m["role"]}: {m.get("content", "")}' for m in messages)


def context(found: Conversation) -> list[dict[str, Any]]:
  """Returns the messages before the answer, which the model is to continue.

  If the last message is not one of the assistant, these are all messages.
  """
  answered = found.messages[-1]['role'] == 'assistant'
  return found.messages[:-1] if answered else found.messages


def answer(found: Conversation) -> str | None:
  """Returns the last message if it is one of the assistant, else None."""
  last = found.messages[-1]
  return last.get('content', '') if last['role'] == 'assistant' else None


def read_template(name: str | os.PathLike[str], tokenizer: Any) -> str:
  """Returns the text of a chat template.

  Args:
    name: 'plain' for `PLAIN`, or the name of a file.
    tokenizer: The tokenizer. If it puts a start token before texts, so does the
      plain template.

  Raises:
    InputError: If the file cannot be read.
  """
  if name == 'plain':
    start = tokenizer.bos_token_id
    adds = start is not None and tokenizer('a')['input_ids'][:1] == [start]
    return ('{{ bos_token }}' if adds else '') + PLAIN
  try:
    return Path(name).expanduser().read_text('utf-8')
  except (OSError, UnicodeError) as e:
    raise InputError(
        f'task.chat_template: {os.fspath(name)} cannot be read '
        f"({first_line(e)}); give a file with a Jinja template, or 'plain'."
    ) from e


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
  """Returns the special tokens of a tokenizer, as texts."""
  return (*tokenizer.all_special_tokens, *(
      token.content for token in tokenizer.added_tokens_decoder.values()
      if token.special))


def _date(call: re.Match) -> str:
  """Returns the date that replaces a call of ``strftime_now``."""
  return repr(_TODAY.strftime(call[2]))


class Template:
  """Writes conversations as texts with the chat template of a tokenizer."""

  def __init__(self, tokenizer: Any, args: Sequence[tuple[str, Any]] = ()):
    """Prepares the chat template of a tokenizer.

    Args:
      tokenizer: Tokenizer of transformers.
      args: Pairs of the name of a variable of the template and its value, such
        as ``('enable_thinking', False)``. Defaults to ().

    Raises:
      InputError: If it has no chat template.
    """
    if not tokenizer.chat_template:
      raise InputError(
          'the tokenizer of this model has no chat template. Give one with '
          "--config.task.chat_template=FILE, or 'plain', which writes only the "
          'contents of messages; or use an instruction-tuned model.')
    self._tokenizer, self._args = tokenizer, dict(args)
    self._special = special_tokens(tokenizer)

  def __call__(self, messages: Sequence[dict[str, Any]],
               tools: list[Any] | None = None, prompt: bool = False) -> str:
    """Returns the text of messages.

    Args:
      messages: The messages.
      tools: Descriptions of tools. Defaults to None.
      prompt: Whether the generation prompt follows, the beginning of a message
        of the assistant. Defaults to False.

    Raises:
      InputError: If the template does not accept the messages.
    """
    try:
      template = self._tokenizer.get_chat_template(tools=tools)
      return self._tokenizer.apply_chat_template(
          list(messages), tools=tools, tokenize=False,
          chat_template=_DATES.sub(_date, template),
          add_generation_prompt=prompt, **self._args)
    except Exception as e:  # Templates raise errors of many types.
      raise InputError(
          'the chat template does not accept the conversation '
          f'{_short(text_of(messages))} ({first_line(e)}); change the row, or '
          'give another template with --config.task.chat_template.') from e

  def tokens(self, texts: Iterable[str]) -> list[list[int]]:
    """Tokenises texts of the template, which have their special tokens."""
    texts = list(texts)
    return self._tokenizer(
        texts, add_special_tokens=False, padding=False, truncation=False,
        verbose=False)['input_ids'] if texts else []

  def spans(self, found: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """Returns a conversation as a text, and its trained parts.

    Args:
      found: The conversation.

    Returns:
      A pair of the text and a list of [start, end), in characters.

    Raises:
      InputError: If the template does not write a conversation as a prefix of
        a longer one.
    """
    messages, out = found.messages, []
    last = found.trained[-1] + 1 if found.trained else len(messages)
    whole = self(messages[:last], found.tools)
    for i in found.trained:
      asks = messages[i]['role'] == 'assistant'
      before = self(messages[:i], found.tools, asks) if i else ''
      after = self(messages[:i + 1], found.tools)
      _check_prefix(before, after, f'the prompt of message {i + 1}',
                    'with the message')
      _check_prefix(after, whole, f'the conversation up to message {i + 1}',
                    'with all messages')
      turn = after[len(before):].rstrip()
      # White space after the token that ends a turn is never generated.
      out.append((len(before), len(before) + len(turn) if turn.endswith(
          self._special) else len(after)))
    return whole, out


def _check_prefix(short: str, long: str, what: str, other: str) -> None:
  """Raises InputError unless a text is a prefix of another.

  Args:
    short: The text that should be the prefix.
    long: The other text.
    what: Description of the first text.
    other: What the second text has in addition.
  """
  if long.startswith(short):
    return
  at = len(os.path.commonprefix([short, long]))
  around = lambda text: repr(text[max(at - 40, 0):at + 60])
  raise InputError(
      'the trained part of a conversation cannot be found, since the chat '
      f'template writes {what} as ...{around(short)}, but {other} as '
      f'...{around(long)}. If the template changes earlier turns, set '
      "--config.task.train_turns=last; otherwise set its variables with "
      'task.chat_args, or give another template with task.chat_template.')


def mark(conversations: Sequence[Conversation], template: Template, most: int
         ) -> list[Marked]:
  """Returns the tokens of conversations and which of them are trained.

  A conversation that is too long loses turns: the last ones, or, if only one
  message is trained, the first ones except for messages of the system. No
  message is cut.

  Args:
    conversations: The conversations.
    template: Their template.
    most: Largest number of tokens of a conversation.

  Returns:
    The tokens of each conversation, with no spans if no trained part fits.
  """
  return [_fit(found, _mark(found, template), template, most)
          for found in conversations]


def _fit(found: Conversation, marked: Marked, template: Template, most: int
         ) -> Marked:
  """Leaves out turns of a conversation until it fits."""
  if len(marked.ids) <= most:
    return marked
  if len(found.trained) == 1:
    shorter = (_mark(x, template) for x in _shorter(found))
    fits = next((x for x in shorter if len(x.ids) <= most), None)
    return (fits or marked._replace(spans=[]))._replace(
        cut=True, needs=marked.needs)
  spans = [span for span in marked.spans if span[1] <= most]
  ids = marked.ids[:spans[-1][1]] if spans else []
  return marked._replace(ids=ids, spans=spans, cut=True)


def _shorter(found: Conversation) -> Iterator[Conversation]:
  """Yields conversations that begin with later messages of the user."""
  last, messages = found.trained[0], found.messages
  system = [*itertools.takewhile(
      lambda m: m['role'] in ('system', 'developer'), messages)]
  for i in range(len(system) + 1, last + 1):
    if messages[i]['role'] == 'user':
      kept = [*system, *messages[i:last + 1]]
      yield found._replace(messages=kept, trained=[len(kept) - 1])


def _mark(found: Conversation, template: Template) -> Marked:
  """Returns the tokens of a whole conversation, up to the last trained one."""
  text, spans = template.spans(found)
  ids, *before = template.tokens(
      [text, *(text[:at] for span in spans for at in span)])
  # A token may contain both sides of an edge. It is trained if this is the
  # beginning of the trained part, and not if it is the end.
  edges = [len(os.path.commonprefix([ids, other])) for other in before]
  kept = [(start, end) for start, end in zip(edges[::2], edges[1::2])
          if start < end]
  last = kept[-1][1] if kept else 0
  return Marked(ids[:last], kept, False, kept[0][1] if kept else 0)


def prompts(conversations: Sequence[Conversation], template: Template,
            most: int) -> tuple[list[list[int]], int]:
  """Returns the tokens of conversations that the model is to continue.

  They end with the generation prompt. A conversation that is too long loses
  its first turns, except for messages of the system.

  Args:
    conversations: The conversations; see `context`.
    template: Their template.
    most: Largest number of tokens of a conversation.

  Returns:
    The tokens of each conversation, and the number of those that were cut.

  Raises:
    InputError: If there is nothing before the answer, or the last turn alone is
      too long.
  """
  out, cut = [], 0
  for row, found in enumerate(conversations):
    before = context(found)
    if not before:
      raise InputError(f'the conversation of row {row} has no message before '
                       'the answer; add one, or leave the row out.')
    whole = found._replace(messages=before, trained=[len(before) - 1])
    for tried in (whole, *_shorter(whole)):
      (ids,) = template.tokens(
          [template(tried.messages, tried.tools, prompt=True)])
      if len(ids) <= most:
        break
    else:
      raise InputError(
          f'the last turn of the conversation of row {row} has {len(ids)} '
          f'tokens, but at most {most} are allowed before the answer; shorten '
          'the row, lower --config.task.max_new_tokens, or raise '
          'data.max_length.')
    out.append(ids)
    cut += tried is not whole
  return out, cut


def shown(ids: Sequence[int], positions: Sequence[int], tokenizer: Any) -> str:
  """Returns a conversation as a text in which trained parts are marked.

  Args:
    ids: Tokens of the conversation.
    positions: Indices of the tokens that are trained.
    tokenizer: Its tokenizer.
  """
  trained, out = set(positions), []
  for of_trained, group in itertools.groupby(
      range(len(ids)), lambda i: i in trained):
    text = tokenizer.decode([ids[i] for i in group],
                            clean_up_tokenization_spaces=False)
    out.append(f'[[{text}]]' if of_trained else text)
  return ''.join(out)


def _short(value: Any) -> str:
  """Returns a value as text for an error message, cut to 200 characters."""
  text = repr(value)
  return text if len(text) < 200 else text[:200] + '...'
