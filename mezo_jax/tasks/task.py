r"""Declares how a row of data becomes a prompt and what its answers are.

A row is a dict of columns. There are five kinds of tasks:

* ``kind='classification'``: a row becomes a prompt and candidate answers, of
  which the likeliest is the prediction. The candidates are the same label words
  for every row.
* ``kind='multiple_choice'``: the same, but every row has its own candidates.
* ``kind='generation'``: a row becomes a prompt that the model continues.
* ``kind='chat'``: a row is a conversation, and the model learns the messages
  of the assistant.
* ``kind='head'``: a row becomes a text, and a new linear layer on the model
  predicts its class.

A prompt with ``{mask}`` is for a masked language model, which predicts the
label word at that position. The tasks of the papers are declared in
`opt_tasks`, `roberta_tasks` and `glue_tasks`.
"""

import ast
from collections.abc import Callable, Sequence
import dataclasses
import functools
import re
import string
from typing import Annotated, Any, Literal

import numpy as np

from mezo_jax.core.errors import InputError
from mezo_jax.tasks import chat as chat_lib

_OF_CHOICES = ('accuracy', 'macro_f1', 'matthews')
_OF_TEXTS = ('f1', 'drop_f1')
# The loss on dev or test rows as the main number, which is lower for better
# models. Other metrics are higher.
LOSS = 'loss'
METRICS = (*_OF_CHOICES, *_OF_TEXTS, LOSS)
# Names of classes that mean true or false. Names in `_LETTERS` and `_ANSWERS`
# have this meaning only if all class names of the task are in the same dict.
# For example, 'f' means false next to 't', but female next to 'm'.
_TRUTH = {'true': True, 'false': False}
_LETTERS = {'t': True, 'f': False}
_ANSWERS = {'yes': True, 'no': False, 'y': True, 'n': False, 'on': True,
            'off': False}
# Longest text of a column, in characters. Tokenising it takes seconds.
_LONGEST = 1_000_000


@dataclasses.dataclass(frozen=True)
class Kind:
  """Holds the properties that the tasks of one kind share."""

  metrics: tuple[str, ...]  # metrics that fit; the first is the default
  objective: str  # objective that is trained by default
  words: bool = False  # whether the answers are the task's label words
  classes: bool = False  # whether every row has the same answers
  generates: bool = False  # whether answers are generated, not chosen
  conversation: bool = False  # whether a row is a conversation
  new_head: bool = False  # whether a new linear layer predicts the class


KINDS = {
    'classification': Kind(
        _OF_CHOICES, 'cross_entropy', words=True, classes=True),
    'multiple_choice': Kind(_OF_CHOICES, 'lm'),
    'generation': Kind(_OF_TEXTS, 'lm', generates=True),
    'chat': Kind(
        (LOSS, *_OF_TEXTS), 'lm', generates=True, conversation=True),
    'head': Kind(_OF_CHOICES, 'cross_entropy', classes=True, new_head=True)}


# `mezo_jax.cli.command_line` recognises fields with these annotations and
# parses their values accordingly.
TextOrNone = Annotated[str | None, 'a text, or None']
RowFunction = Annotated[
    Callable[[dict[str, Any]], dict[str, Any] | None] | None,
    'set in a config file']


@dataclasses.dataclass
class Task:
  """Declares how rows of data become prompts and answers.

  docs/tasks.md explains the fields with examples.
  """

  # Name of a task that this library declares. '' for other tasks.
  name: str = ''
  # 'head' classifies with a new linear layer instead of label words.
  kind: Literal['classification', 'multiple_choice', 'generation', 'chat',
                'head'] = 'classification'
  # Prompt with columns in braces. {mask} is the position of the label word for
  # a masked model, {sep} the separator of the two texts of kind 'head'.
  template: str = ''

  # --- classes ---

  # Answer of each class, with its leading space.
  label_words: tuple[str, ...] = ()
  # Column of the right class or choice.
  label_column: str = 'label'
  # Name of each class in the data. () for the label words without white space.
  label_names: tuple[str, ...] = ()
  # How labels are read: as a 'name' or as a 'number', counted from 0. With '',
  # a label is read as a name if a class has this name, and otherwise as a
  # number.
  label_is: Literal['', 'name', 'number'] = ''

  # --- multiple choice ---

  # Columns of one choice each, or one column with a list of choices.
  choices: tuple[str, ...] = ('choices',)
  # A candidate as it follows the prompt, with columns and {choice} in braces.
  answer: str = ' {choice}'

  # --- generation ---

  # Column with a text, or with a list of acceptable texts.
  answers_column: str = 'answers'
  # Text that ends the answer. A turn of a chat ends as its template says.
  stop: str = '\n'
  # Largest number of tokens of an answer.
  max_new_tokens: int = 50
  # Whether the prompt is the message of a user, which the chat template of the
  # tokenizer puts into a conversation.
  chat: bool = False

  # --- chat ---

  # File with a chat template, 'plain' for the contents of messages only, or ''
  # for the template of the tokenizer.
  chat_template: str = ''
  # Values of variables of the template, as in (('enable_thinking', False),).
  chat_args: tuple[tuple[str, bool | int | str], ...] = ()
  # Roles whose messages are trained.
  train_roles: tuple[str, ...] = ('assistant',)
  # 'all' trains all messages of these roles, 'last' only the last one of each
  # conversation.
  train_turns: Literal['all', 'last'] = 'all'

  # --- evaluation and training ---

  # Main metric, one of `METRICS`. '' for accuracy, for f1 if answers are
  # generated, or for the loss of conversations.
  metric: str = ''
  # One of `mezo_jax.tasks.objective.OBJECTIVES`. '' for cross_entropy over
  # classes and lm for the other kinds.
  objective: str = ''
  # Prompt without content, for surface-form calibration. None if there is none.
  calibration: TextOrNone = None
  # Pairs (column, maximum number of tokens). Longer texts of the column are
  # truncated at their end.
  limits: tuple[tuple[str, int], ...] = ()
  # Whether to remove the white space around the texts of columns.
  strip: bool = True
  # Function that changes a row before anything else, or returns None to leave
  # the row out. None for no change.
  row: RowFunction = None

  # --- data, if the config of a run names none ---

  # Id of a data set on the Hugging Face hub.
  hub: str = ''
  # Configuration of the data set.
  subset: str = ''
  # Split for train and dev rows.
  train_split: str = 'train'
  # Split for test rows.
  test_split: str = 'validation'

  @property
  def traits(self) -> Kind:
    """Returns the properties of the task's kind."""
    return KINDS[self.kind]

  @property
  def masked(self) -> bool:
    """Returns whether the task is for a masked language model."""
    return '{mask}' in self.template

  @property
  def main_metric(self) -> str:
    """Returns the name of the metric that compares predictions with answers."""
    return self.metric or self.traits.metrics[0]

  def prepare(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Applies the function ``row`` to rows and drops those it leaves out.

    Args:
      rows: Rows of the data, which are not changed.

    Returns:
      The rows that the templates are filled with.

    Raises:
      InputError: If a row lacks a column that ``row`` needs.
    """
    return [row for _, row in self.numbered(rows)]

  def numbered(self, rows: Sequence[dict[str, Any]]
               ) -> list[tuple[int, dict[str, Any]]]:
    """Returns the rows of `prepare`, each with its index in the data.

    Args:
      rows: Rows of the data, which are not changed.

    Raises:
      InputError: If a row lacks a column that ``row`` needs.
    """
    change = self.row
    if change is None:
      change = lambda row: row
    try:
      found = [change(dict(row)) for row in rows]
    except KeyError as e:
      raise InputError(
          f'task {self.name or self.kind!r} needs the column {e}, but the data '
          f'have the columns {sorted(rows[0])}.') from None
    return [(i, row) for i, row in enumerate(found) if row is not None]

  @property
  def in_turns(self) -> bool:
    """Returns whether the model answers with a turn of a chat template."""
    return self.chat or self.traits.conversation

  @property
  def end(self) -> str:
    """Returns the text that ends an answer; '' if only a token does."""
    return '' if self.traits.conversation else self.stop

  def conversation(self, row: dict[str, Any]) -> chat_lib.Conversation:
    """Returns the conversation of a row of kind 'chat'.

    Raises:
      InputError: If the row has none, or a malformed one.
    """
    return chat_lib.conversation(row, self.train_roles, self.train_turns)

  def prompt(self, row: dict[str, Any], **more: str) -> str:
    """Returns the prompt of a row.

    For kind 'chat' it is a text for people, without a template.

    Args:
      row: Row from `prepare`.
      **more: Texts for other names in the template, such as ``mask``.

    Raises:
      InputError: If a column that the template names is missing or has no text.
    """
    if self.traits.conversation:
      return chat_lib.text_of(chat_lib.context(self.conversation(row)))
    return self._fill('template', self.template, row, **more)

  def prior(self, row: dict[str, Any]) -> str:
    """Returns the prompt without content, for surface-form calibration."""
    assert self.calibration is not None
    return self._fill('calibration', self.calibration, row)

  def candidates(self, row: dict[str, Any]) -> list[str]:
    """Returns the answers to choose from, as they follow the prompt."""
    if self.traits.words:
      return list(self.label_words)
    return [self._fill('answer', self.answer, row, choice=choice)
            for choice in self._choices(row)]

  def answers(self, row: dict[str, Any]) -> list[str]:
    """Returns the candidates of a row; for kind 'head', the names of classes.
    """
    if self.traits.new_head:
      return [*map(str, self.label_names or self.label_words)]
    return self.candidates(row)

  def golds(self, row: dict[str, Any]) -> tuple[int, ...]:
    """Returns the indices of the right candidates or classes of a row.

    Multiple-choice rows may have several, any of which is right.

    Args:
      row: Row from `prepare`.

    Raises:
      InputError: If the label is missing, or is not a class or a choice.
    """
    if self.label_column not in row:
      raise InputError(
          f'no column {self.label_column!r} among the columns {sorted(row)} of '
          'the data; set --config.task.label_column.')
    value = row[self.label_column]
    several = value if isinstance(value, (list, tuple)) and not (
        self.traits.classes) else [value]
    found = [self._read_label(row, v) for v in several]
    numbers = [number for number, _ in filter(None, found)]
    if numbers and len(numbers) == len(found):
      return tuple(numbers)
    if not self.traits.classes:
      raise InputError(
          f'{self.label_column} {value!r} is neither one of the choices '
          f'{self._choices(row)} nor the number or letter of one; set '
          '--config.task.label_column.')
    hint = ''
    if str(value) == '-1':
      hint = ' (-1 often marks rows without a label; use another split)'
    elif not self.label_is and dataclasses.replace(
        self, label_is='number')._read_label(row, value):
      hint = (' (the names are numbers or truth values themselves; to read '
              'labels as the numbers of classes, set '
              '--config.task.label_is=number)')
    raise InputError(
        f'label {value!r} is neither an integer below {self.num_classes} (the '
        f'number of label words) nor one of the names {self.class_names}'
        f'{hint}; set --config.task.label_words or label_names.')

  @property
  def class_names(self) -> tuple[str, ...]:
    """Returns the names that labels are compared with.

    These are ``label_names`` if given, and otherwise the label words without
    the white space around them. If two names are equal, the result is (), and
    labels can only be numbers.
    """
    names = self.label_names or [word.strip() for word in self.label_words]
    names = tuple(map(str, names))
    return names if len(set(names)) == len(names) else ()

  def reading(self, rows: Sequence[dict[str, Any]]) -> str:
    """Returns a log line that describes how the labels of rows are read.

    Args:
      rows: Rows from `prepare`.

    Returns:
      One line, or '' if the rows have no labels.

    Raises:
      InputError: If labels are names in some rows and numbers in others, since
        one of the two probably matches by accident.
    """
    # Maps each way of reading ('name', 'number', 'letter') to a dict from the
    # labels that are read so to their answers.
    means = {}
    for row in rows if not self.traits.generates else ():
      value = row.get(self.label_column)
      for v in value if isinstance(value, (list, tuple)) else [value]:
        found = self._read_label(row, v)
        if found:  # `golds` reports other labels when they are needed.
          number, how = found
          label = repr(
              v.name if isinstance(v, ClassNumber) and how == 'name' else v)
          answers = (self.label_words or self.class_names) if (
              self.traits.classes) else self._choices(row)
          means.setdefault(how, {}).setdefault(label, answers[number])
    if not means:
      return ''
    if len(means) > 1:
      one, other, *_ = sorted(means)
      (label, answer), *_ = means[one].items()
      (label_2, answer_2), *_ = means[other].items()
      raise InputError(
          f'labels in column {self.label_column!r} are {one}s in some rows and '
          f'{other}s in others: {label} is the {one} of {answer!r}, but '
          f'{label_2} can only be the {other} of {answer_2!r}'
          f'{", counted from 0" if other == "number" else ""}; set '
          '--config.task.label_is=name or number, or task.label_names.')
    how, shown = means.popitem()
    if not self.traits.classes:
      what = {'name': 'the text of a choice',
              'number': 'the number of a choice, counted from 0',
              'letter': 'the letter of a choice, A for the first'}[how]
      return f'labels: column {self.label_column!r} is read as {what}'
    pairs = [f'{label} is {word!r}' for label, word in [*shown.items()][:8]]
    return (f'labels: column {self.label_column!r} is read as '
            f'{"names" if how == "name" else "numbers, counted from 0"}: '
            f'{", ".join(pairs)}{", ..." if len(shown) > 8 else ""}')

  def _read_label(self, row: dict, value) -> tuple[int, str] | None:
    """Finds the class or choice that a label refers to.

    Args:
      row: Row of the label. It has the choices, if there are any.
      value: The label.

    Returns:
      A pair of the index of the class or choice, and 'name', 'number' or (for
      choices only) 'letter', according to how the label refers to it. None if
      the label refers to no class or choice.
    """
    names = self.class_names if self.traits.classes else self._choices(row)
    count = self.num_classes if self.traits.classes else len(names)
    if self.label_is != 'number':
      number = _find(value, names)
      if number is not None:
        return number, 'name'
    if self.label_is == 'name':
      return None
    if self.traits.classes and isinstance(value, str):
      # The text 'true' of a csv file is read like the value true of JSON.
      value = _TRUTH.get(value.strip().lower(), value)
    number, how = _integer(value), 'number'
    if number is None and not self.traits.classes:
      number, how = _letter(value), 'letter'
    if number is None or number >= count:
      return None
    if self.traits.classes and names and not (
        self.label_is or isinstance(value, ClassNumber)):
      # A name that is itself a number or a truth value must not contradict the
      # label. With the names ('1', '2', '3') a label 0 is a mistake. With
      # ('True', 'False') the label 1 must not become 'False', and with ('yes',
      # 'no') the label true must not become 'no'.
      lower = [name.strip().lower() for name in names]
      known = dict(_TRUTH)
      if _LETTERS.keys() >= {*lower}:
        known |= _LETTERS
      if isinstance(value, (bool, np.bool_)) and _ANSWERS.keys() >= {*lower}:
        known |= _ANSWERS
      meant = known.get(lower[number], _number(lower[number]))
      if meant is not None and meant != number:
        return None
    return number, how

  @property
  def num_classes(self) -> int:
    """Returns the number of classes."""
    return len(self.label_words or self.label_names)

  def has_gold(self, row: dict[str, Any]) -> bool:
    """Returns whether a row has any right answer, without checking it."""
    if self.traits.conversation:
      return chat_lib.answer(self.conversation(row)) is not None
    column = (self.answers_column if self.traits.generates else
              self.label_column)
    value = row.get(column)
    return not (_is_nothing(value) or isinstance(value, str | list | tuple)
                and not value)

  def references(self, row: dict[str, Any]) -> list[str]:
    """Returns the acceptable texts of a generated answer.

    Training uses the first one.

    Args:
      row: Row from `prepare`.

    Raises:
      InputError: If the row has no such texts.
    """
    if self.traits.conversation:
      text = chat_lib.answer(self.conversation(row))
      if text is None:
        raise InputError(f'the conversation of the row {_short(row)} does not '
                         'end with an answer of the assistant; add it.')
      return [text]
    if self.answers_column not in row:
      raise InputError(
          f'no column {self.answers_column!r} among the columns {sorted(row)} '
          'of the data; set --config.task.answers_column.')
    value = row[self.answers_column]
    if isinstance(value, dict):  # the formats of SQuAD ('text') and DROP
      value = value.get('text', value.get('spans'))
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(
        isinstance(t, str) for t in texts):
      raise InputError(
          f'column {self.answers_column!r} of the row {_short(row)} is neither '
          'a text nor a list of texts; set --config.task.answers_column.')
    return list(texts)

  def gold_text(self, row: dict[str, Any]) -> str:
    """Returns the right answer as it follows the prompt."""
    if self.traits.generates:
      text = self.references(row)[0]
      return f' {text.strip() if self.strip else text}{self.stop}'
    return self.candidates(row)[self.golds(row)[0]]

  def _choices(self, row: dict) -> list[str]:
    """Returns the choices of a multiple-choice row."""
    missing = [c for c in self.choices if c not in row]
    if missing:
      raise InputError(
          f'no column {missing[0]!r} among the columns {sorted(row)} of the '
          'data; set --config.task.choices.')
    column = self.choices[0]
    if len(self.choices) > 1:
      return [self._choice(row, c, row[c]) for c in self.choices]
    value = row[column]
    if isinstance(value, str):  # a list as a cell of a csv file
      try:
        value = ast.literal_eval(value.strip())
      except (SyntaxError, ValueError):
        value = None
    if not isinstance(value, (list, tuple)) or not value:
      raise InputError(
          f'column {column!r} of the row {_short(row)} is not a list of '
          'choices; set --config.task.choices.')
    return [self._choice(row, column, v) for v in value]

  def _choice(self, row: dict, column: str, value) -> str:
    """Returns a choice as text; raises InputError if it has no text."""
    text = '' if _is_no_text(value) else str(value)
    if not text.strip():
      raise InputError(
          f'column {column!r} of the row {_short(row)} has {_kind_of(value)} '
          'instead of a choice; fix the row or leave it out.')
    return text

  def _fill(self, field: str, template: str, row: dict, **more: str) -> str:
    """Fills a template with the columns of a row.

    Args:
      field: Field of `Task` that the template is from, for error messages.
      template: Text with names in braces.
      row: Row from `prepare`.
      **more: Texts for names that are not columns.

    Raises:
      InputError: If the template is malformed, or if a column is missing, has
        no text or has a text that is too long.
    """
    texts = dict(more)
    for name in columns(field, template):
      if name in texts:
        continue
      if name not in row:
        raise InputError(
            f'the {field} {template!r} names the column {name!r}, but the data '
            f'have the columns {sorted(row)}; set --config.task.{field}.')
      value = row[name]
      if _is_no_text(value):
        raise InputError(
            f'column {name!r} of the row {_short(row)} has {_kind_of(value)}, '
            f'but the {field} {template!r} needs a text; fix the row or leave '
            'it out.')
      texts[name] = str(value).strip() if self.strip else str(value)
      if len(texts[name]) > _LONGEST:
        raise InputError(
            f'column {name!r} of the row {_short(row)} has '
            f'{len(texts[name]):,} characters, more than {_LONGEST:,}; shorten '
            'the text or leave the row out.')
    return template.format(**texts)


@functools.cache
def columns(field: str, template: str) -> tuple[str, ...]:
  """Returns the names in braces in a template.

  Args:
    field: Field of `Task` that the template is from, for error messages.
    template: Text with names in braces.

  Raises:
    InputError: If braces are malformed or contain anything but a name.
  """
  try:
    parts = [*string.Formatter().parse(template)]
  except ValueError as e:
    raise InputError(f'the {field} {template!r} is malformed ({e}); set '
                     f'--config.task.{field}.') from None
  names = [name for _, name, _, _ in parts if name is not None]
  if any(spec or conversion for _, _, spec, conversion in parts) or any(
      re.search(r'[.\[]|^\d*$', name) for name in names):
    raise InputError(
        f'the {field} {template!r} is malformed: braces may contain only names '
        f'of columns; set --config.task.{field}.')
  return tuple(names)


def check_task(task: Task) -> None:
  """Checks that the fields of a task are valid and fit each other.

  Args:
    task: The task.

  Raises:
    InputError: If they are not. The message names the field.
  """
  if task.kind not in KINDS:
    raise InputError(
        f'config: task.kind {task.kind!r} is not one of '
        f'{", ".join(KINDS)}.')
  kind = task.traits
  of_chat = {name for name in ('chat_template', 'chat_args', 'train_roles',
                               'train_turns')
             if getattr(task, name) != getattr(Task, name)}
  rules = [
      (bool(task.template) or kind.conversation,
       'task.template is empty; give the prompt with columns in braces, or use '
       'the config file of a declared task, --config=configs/...'),
      (not (kind.conversation and (task.template or task.limits)),
       "task.kind 'chat' takes its messages from the data; leave task.template "
       'and task.limits empty'),
      (kind.conversation or not of_chat - {'chat_template', 'chat_args'},
       f"task.{' and '.join(sorted(of_chat))} needs task.kind 'chat'"),
      (task.in_turns or not of_chat,
       f"task.{' and '.join(sorted(of_chat))} needs task.kind 'chat' or "
       'task.chat'),
      (bool(task.train_roles),
       "task.train_roles is empty; give the roles to train, ('assistant',)"),
      (task.metric in ('', *METRICS),
       f'task.metric {task.metric!r} is not one of '
       f'{", ".join(METRICS)}'),
      (not (kind.words or task.masked) or len(task.label_words) >= 2,
       "task.label_words needs two or more words, as in (' no', ' yes'), but "
       f'is {tuple(task.label_words)}'),
      (task.label_is in ('', 'name', 'number'),
       f"task.label_is {task.label_is!r} is not one of 'name' and 'number'"),
      (not kind.classes or not task.label_names
       or len(task.label_names) == task.num_classes,
       f'task.label_names {tuple(task.label_names)} has '
       f'{len(task.label_names)} names, but task.label_words has '
       f'{len(task.label_words)} words; give one of each per class, as in '
       "('no', 'yes')"),
      (len({str(n) for n in task.label_names}) == len(task.label_names),
       f'task.label_names {task.label_names} contains a name twice; give each '
       'class its own name'),
      (not kind.new_head or task.num_classes >= 2,
       "task.kind 'head' needs two or more names in task.label_names"),
      (not task.masked or kind.words,
       "task.template with {mask} needs task.kind 'classification'"),
      (not task.chat or kind.generates and not kind.conversation,
       "task.chat needs task.kind 'generation'"),
      (not kind.generates or task.max_new_tokens >= 1,
       'task.max_new_tokens must be at least 1'),
      (task.main_metric in kind.metrics,
       f'task.metric {task.metric!r} does not fit task.kind {task.kind!r}'),
  ]
  for holds, message in rules:
    if not holds:
      raise InputError(f'config: {message}.')
  if not (kind.conversation or {*columns('template', task.template)} - {
      'mask'}):
    raise InputError(
        f'config: task.template {task.template!r} has no column in braces, so '
        'every row would have the same prompt; add one, as in {text}.')


class ClassNumber(int):
  """Represents a class of a data set that names its classes.

  It is the integer in the data set, with the name as an attribute. Comparisons
  of labels with the names of classes use the name.
  """

  name: str

  def __new__(cls, number: int, name: str = '') -> 'ClassNumber':
    self = super().__new__(cls, number)
    self.name = name
    return self


def _is_nothing(value) -> bool:
  """Returns whether a value is missing: None, or NaN as tables write it."""
  return value is None or isinstance(
      value, float | np.floating) and bool(np.isnan(value))


def _is_no_text(value) -> bool:
  """Returns whether a value is missing or cannot be written as a text."""
  return _is_nothing(value) or isinstance(value, (bytes, dict, list, tuple))


def _kind_of(value) -> str:
  """Describes a value that is not a text, for an error message."""
  if _is_nothing(value) or value == '':
    return 'nothing'
  return f'a {type(value).__name__}'


def _find(value, names: Sequence[str]) -> int | None:
  """Finds the name that a label matches.

  An exact match is tried first. If there is none, these are tried in order: a
  match without surrounding white space, a match that also ignores case, and a
  match as numbers (1.0 matches 1). The first of them that matches decides. If
  it matches several different names, the result is None.

  Args:
    value: The label.
    names: Names of classes, or choices.

  Returns:
    The index of the name, or None.
  """
  texts = _texts_of(value)
  for text in texts:
    if text in names:
      return names.index(text)
  for form in (str.strip, lambda text: text.strip().casefold(),
               _plain_number):
    wanted = {form(text) for text in texts} - {None}
    found = [i for i, name in enumerate(names) if form(name) in wanted]
    if len({names[i] for i in found}) == 1:
      return found[0]
    if found:
      return None
  return None


def _number(text: str) -> float | None:
  """Converts the text of a number, such as '-1' or '2.5', to a float.

  Returns None for other texts.
  """
  found = re.fullmatch(r'[+-]?\d{1,9}(\.\d{1,9})?', text.strip())
  return float(text) if found else None


def _plain_number(text: str) -> float | None:
  """Converts the text of a number to a float, unless it has leading zeros.

  '007' is taken for a code, not for the number 7. Returns None for it and for
  other texts.
  """
  return None if re.match(r'\s*[+-]?0\d', text) else _number(text)


def _letter(value) -> int | None:
  """Returns 0 for A or a, 1 for B or b, ...; None for anything else."""
  text = value.strip().upper() if isinstance(value, str) else ''
  return ord(text) - ord('A') if re.fullmatch('[A-Z]', text) else None


def _texts_of(value) -> tuple[str, ...]:
  """Returns the spellings of a label that may be among the declared names.

  For example, the label True may be declared as 'True' or 'true', and 1.0 as
  '1.0' or '1'.
  """
  if isinstance(value, ClassNumber):
    return (value.name,)
  if isinstance(value, np.generic):
    value = value.item()
  if value is None:
    return ()
  if isinstance(value, bool):  # 'True' in Python and csv files, 'true' in JSON
    return str(value), str(value).lower()
  if isinstance(value, float) and value.is_integer():
    return str(value), str(int(value))
  return str(value), str(value).strip()


def _integer(value) -> int | None:
  """Converts a bool, or a whole number of at most nine digits, to an int.

  The number may be an int, a float or a string. Returns None for anything else,
  including negative numbers.
  """
  if isinstance(value, (bool, np.bool_)):
    return int(value)
  if isinstance(value, ClassNumber):
    return int(value)
  texts = _texts_of(value)
  if not texts or not re.fullmatch(r'\d{1,9}(\.0+)?', texts[-1]):
    return None
  return int(texts[-1].partition('.')[0])


def _short(row: dict) -> str:
  """Returns a row as text for an error message, cut to 200 characters."""
  text = repr(row)
  return text if len(text) < 200 else text[:200] + '...'
