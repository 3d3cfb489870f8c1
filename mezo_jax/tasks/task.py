r"""Declares tasks: how a row of data reads, and what its answers are.

A row, a dict of columns, becomes a prompt and

* candidate answers, of which the likeliest is the prediction:
  ``kind='classification'`` (the same label words for every row) and
  ``'multiple_choice'`` (the row brings its own);
* or answers to be generated: ``kind='generation'``;
* or nothing more, and a new linear layer names the class: ``kind='head'``.

A prompt with ``{mask}`` in it is one for a masked language model, which reads
the label words there. The declarations of the papers' tasks are in `opt`,
`roberta` and `glue` next to this file.
"""

import ast
from collections.abc import Callable, Sequence
import dataclasses
import functools
import re
import string
from typing import Annotated, Any

import numpy as np

from mezo_jax.core.errors import InputError

_OF_CHOICES = ('accuracy', 'macro_f1', 'matthews')
_OF_TEXTS = ('f1', 'drop_f1')
METRICS = (*_OF_CHOICES, *_OF_TEXTS)
_TRUTH = {'true': True, 'false': False}
# Pairs of names that mean true and false, too.
_LETTERS = {'t': True, 'f': False}
_ANSWERS = {'yes': True, 'no': False, 'y': True, 'n': False, 'on': True,
            'off': False}
_LONGEST = 1_000_000  # characters of a text: seconds to make tokens of


@dataclasses.dataclass(frozen=True)
class Kind:
  """Holds what the tasks of one kind have in common."""

  metrics: tuple[str, ...]  # that fit; the first is the default
  objective: str  # that is trained by default
  words: bool = False  # the answers are the task's label words
  classes: bool = False  # the same answers for every row
  generates: bool = False  # answers are written, not chosen
  new_head: bool = False  # a new linear layer names the class


KINDS = {
    'classification': Kind(
        _OF_CHOICES, 'cross_entropy', words=True, classes=True),
    'multiple_choice': Kind(_OF_CHOICES, 'lm'),
    'generation': Kind(_OF_TEXTS, 'lm', generates=True),
    'head': Kind(_OF_CHOICES, 'cross_entropy', classes=True, new_head=True)}


# Annotations by which `mezo_jax.training.config_fields` finds how a command
# line sets a field.
TextOrNone = Annotated[str | None, 'a text, or None']
RowFunction = Annotated[
    Callable[[dict[str, Any]], dict[str, Any] | None] | None,
    'set in a config file']


@dataclasses.dataclass
class Task:
  """Declares how rows of data become prompts and answers.

  docs/tasks.md explains the fields with examples.
  """

  name: str = ''  # of a task that this library declares; '' for one's own
  kind: str = 'classification'  # or 'multiple_choice', 'generation', 'head'
  template: str = ''  # the prompt, columns in braces; {mask}; {sep} for 'head'
  # Classes: answers by class, with their leading space.
  label_words: tuple[str, ...] = ()
  label_column: str = 'label'
  label_names: tuple[str, ...] = ()  # of classes; () for their label words
  # What a label is: 'name' or 'number'; '' for a name where one is the same
  # text, else a number from 0.
  label_is: str = ''
  # Multiple choice: columns of one choice each, or one column with a list.
  choices: tuple[str, ...] = ('choices',)
  answer: str = ' {choice}'  # a candidate, columns and its choice in braces
  # Generation.
  answers_column: str = 'answers'  # a text or a list of acceptable ones
  stop: str = '\n'  # ends the answer
  max_new_tokens: int = 50
  # How it is measured and trained.
  metric: str = ''  # '' for accuracy, or f1 where the answer is generated
  objective: str = ''  # '' for cross_entropy over classes, else lm
  calibration: TextOrNone = None  # prompt without content, for SFC
  limits: tuple[tuple[str, int], ...] = ()  # (column, tokens): cut its tail
  strip: bool = True  # white space around text columns
  # Changes a row before anything else; None of it leaves the row out.
  row: RowFunction = None
  # Where the data are, if the run's config names none.
  hub: str = ''
  subset: str = ''
  train_split: str = 'train'
  test_split: str = 'validation'

  @property
  def traits(self) -> Kind:
    return KINDS[self.kind]

  @property
  def masked(self) -> bool:
    return '{mask}' in self.template

  @property
  def main_metric(self) -> str:
    """The name of the first metric that compares with right answers."""
    return self.metric or self.traits.metrics[0]

  def prepare(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as the templates see them; some tasks leave some out.

    Raises:
      ValueError: if a row lacks a column that the task's ``row`` needs.
    """
    if self.row is None:
      return [dict(row) for row in rows]
    try:
      found = [self.row(dict(row)) for row in rows]
    except KeyError as e:
      raise InputError(
          f'task {self.name or self.kind!r} needs column {e}, the data have '
          f'{sorted(rows[0])}.') from None
    return [row for row in found if row is not None]

  def prompt(self, row: dict[str, Any], **more: str) -> str:
    """The prompt of a row.

    Raises:
      ValueError: if the template names a column that the row does not have.
    """
    return self._fill('template', self.template, row, **more)

  def prior(self, row: dict[str, Any]) -> str:
    """The prompt without content, for surface-form calibration."""
    assert self.calibration is not None
    return self._fill('calibration', self.calibration, row)

  def candidates(self, row: dict[str, Any]) -> list[str]:
    """The answers to choose from, as they follow the prompt."""
    if self.traits.words:
      return list(self.label_words)
    return [self._fill('answer', self.answer, row, choice=choice)
            for choice in self._choices(row)]

  def golds(self, row: dict[str, Any]) -> tuple[int, ...]:
    """The right candidates or classes: one, or several where any will do.

    Raises:
      ValueError: if the row has none.
    """
    if self.label_column not in row:
      raise InputError(
          f'the data have no column {self.label_column!r} but {sorted(row)}; '
          'set --config.task.label_column.')
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
          f'{self._choices(row)} nor the number of one; set '
          '--config.task.label_column.')
    hint = ''
    if str(value) == '-1':
      hint = ' (-1 often marks rows without a label: take another split)'
    elif not self.label_is and dataclasses.replace(
        self, label_is='number')._read_label(row, value):
      hint = (' (these names are numbers or truth values themselves, so it is '
              'not taken for the number of a class unless you set '
              '--config.task.label_is=number)')
    raise InputError(
        f'label {value!r} is neither an integer below {self.num_classes} (the '
        f'number of label words) nor one of the names {self.class_names}'
        f'{hint}; set --config.task.label_words or label_names.')

  @property
  def class_names(self) -> tuple[str, ...]:
    """The texts that a label of a class is compared with: ``label_names``, or
    where there are none the label words without white space around them."""
    names = self.label_names or [word.strip() for word in self.label_words]
    names = tuple(map(str, names))
    return names if len(set(names)) == len(names) else ()

  def reading(self, rows: Sequence[dict[str, Any]]) -> str:
    """Returns a line on how the labels of these rows are read; '' if there are
    none.

    Raises:
      InputError: if some labels can be read as names only and some as numbers
        only: one of the two is chance.
    """
    means = {}  # how labels are read: what each of them stands for
    for row in rows if not self.traits.generates else ():
      value = row.get(self.label_column)
      for v in value if isinstance(value, (list, tuple)) else [value]:
        found = self._read_label(row, v)
        if found:  # else `golds` says what is wrong, where labels are needed
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
          f'some labels in column {self.label_column!r} are {one}s and some '
          f'are {other}s: {label} is the {one} of {answer!r}, and {label_2} '
          f'can only be the {other} of {answer_2!r}'
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
    """Returns the class or choice that a label stands for, and whether the
    label is its 'name', 'number' or, of a choice, 'letter'; None if it is none
    of these."""
    names = self.class_names if self.traits.classes else self._choices(row)
    count = self.num_classes if self.traits.classes else len(names)
    if self.label_is != 'number':
      number = _find(value, names)
      if number is not None:
        return number, 'name'
    if self.label_is == 'name':
      return None
    if self.traits.classes and isinstance(value, str):  # as JSON's true is
      value = _TRUTH.get(value.strip().lower(), value)
    number, how = _integer(value), 'number'
    if number is None and not self.traits.classes:
      number, how = _letter(value), 'letter'
    if number is None or number >= count:
      return None
    if self.traits.classes and names and not (
        self.label_is or isinstance(value, ClassNumber)):
      # With names ('1', '2', '3') a label 0 is a mistake, with ('True',
      # 'False') a label 1 must not become 'False', nor true 'no' with ('yes',
      # 'no').
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
    return len(self.label_words or self.label_names)

  def has_gold(self, row: dict[str, Any]) -> bool:
    """Returns whether a row has a right answer at all."""
    column = (self.answers_column if self.traits.generates else
              self.label_column)
    value = row.get(column)
    return not (_is_nothing(value) or isinstance(value, str | list | tuple)
                and not value)

  def references(self, row: dict[str, Any]) -> list[str]:
    """Returns the acceptable texts of a generated answer; the first is trained
    on.

    Raises:
      ValueError: if the row has none.
    """
    if self.answers_column not in row:
      raise InputError(
          f'the data have no column {self.answers_column!r} but {sorted(row)}; '
          'set --config.task.answers_column.')
    value = row[self.answers_column]
    if isinstance(value, dict):  # SQuAD's and DROP's own form
      value = value.get('text', value.get('spans'))
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(
        isinstance(t, str) for t in texts):
      raise InputError(
          f'column {self.answers_column!r} of the row {_short(row)} is no text '
          'and no list of texts; set --config.task.answers_column.')
    return list(texts)

  def gold_text(self, row: dict[str, Any]) -> str:
    """The right answer as it follows the prompt."""
    if self.traits.generates:
      text = self.references(row)[0]
      return f' {text.strip() if self.strip else text}{self.stop}'
    return self.candidates(row)[self.golds(row)[0]]

  def _choices(self, row: dict) -> list[str]:
    missing = [c for c in self.choices if c not in row]
    if missing:
      raise InputError(
          f'the data have no column {missing[0]!r} but {sorted(row)}; set '
          '--config.task.choices.')
    column = self.choices[0]
    if len(self.choices) > 1:
      return [self._choice(row, c, row[c]) for c in self.choices]
    value = row[column]
    if isinstance(value, str):  # a list in a csv file
      try:
        value = ast.literal_eval(value.strip())
      except (SyntaxError, ValueError):
        value = None
    if not isinstance(value, (list, tuple)) or not value:
      raise InputError(
          f'column {column!r} of the row {_short(row)} is no list of '
          'choices; set --config.task.choices.')
    return [self._choice(row, column, v) for v in value]

  def _choice(self, row: dict, column: str, value) -> str:
    text = '' if _is_no_text(value) else str(value)
    if not text.strip():
      raise InputError(
          f'column {column!r} of the row {_short(row)} has {_kind_of(value)} '
          'where a choice is needed; fix the row or leave it out.')
    return text

  def _fill(self, field: str, template: str, row: dict, **more: str) -> str:
    texts = dict(more)
    for name in columns(field, template):
      if name in texts:
        continue
      if name not in row:
        raise InputError(
            f'the {field} {template!r} names column {name!r}, the data have '
            f'{sorted(row)}; set --config.task.{field}.')
      value = row[name]
      if _is_no_text(value):
        raise InputError(
            f'column {name!r} of the row {_short(row)} has {_kind_of(value)} '
            f'where the {field} {template!r} needs a text; fix the row or '
            'leave it out.')
      texts[name] = str(value).strip() if self.strip else str(value)
      if len(texts[name]) > _LONGEST:
        raise InputError(
            f'column {name!r} of the row {_short(row)} has '
            f'{len(texts[name]):,} characters, above {_LONGEST:,}: cut it, or '
            'leave the row out.')
    return template.format(**texts)


@functools.cache
def columns(field: str, template: str) -> tuple[str, ...]:
  """The names in braces of a template.

  Raises:
    InputError: if it has more than names in braces.
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
        f'the {field} {template!r} is malformed: in braces there may be names '
        f'of columns alone; set --config.task.{field}.')
  return tuple(names)


def check_task(task: Task) -> None:
  """Raises ValueError, in one sentence, for a task that cannot work."""
  if task.kind not in KINDS:
    raise InputError(
        f'config: task.kind {task.kind!r} is not one of '
        f'{", ".join(KINDS)}.')
  kind = task.traits
  rules = [
      (bool(task.template),
       'task.template is empty: give the prompt, with columns in braces (a '
       'task that is declared comes with a config file, --config=configs/...)'),
      (task.metric in ('', *METRICS),
       f'task.metric {task.metric!r} is not one of '
       f'{", ".join(METRICS)}'),
      (not (kind.words or task.masked) or len(task.label_words) >= 2,
       "task.label_words needs two or more, as in (' no', ' yes'), and is "
       f'{tuple(task.label_words)}'),
      (task.label_is in ('', 'name', 'number'),
       f"task.label_is {task.label_is!r} is not one of 'name' and 'number'"),
      (not kind.classes or not task.label_names
       or len(task.label_names) == task.num_classes,
       f'task.label_names {tuple(task.label_names)} has '
       f'{len(task.label_names)} names and task.label_words '
       f'{len(task.label_words)} words: give one of each for each class, as in '
       "('no', 'yes')"),
      (len({str(n) for n in task.label_names}) == len(task.label_names),
       f'task.label_names {task.label_names} has a name twice'),
      (not kind.new_head or task.num_classes >= 2,
       "kind 'head' needs two or more names in task.label_names"),
      (not task.masked or kind.words,
       "a prompt with {mask} needs task.kind 'classification'"),
      (not kind.generates or task.max_new_tokens >= 1,
       'task.max_new_tokens must be at least 1'),
      (task.main_metric in kind.metrics,
       f'task.metric {task.metric!r} does not fit kind {task.kind!r}'),
  ]
  for holds, message in rules:
    if not holds:
      raise InputError(f'config: {message}.')
  if not {*columns('template', task.template)} - {'mask'}:
    raise InputError(
        f'config: task.template {task.template!r} has no column in braces: '
        'every row would have the same prompt.')


class ClassNumber(int):
  """The number of a class in a data set that names its classes.

  Where labels are compared with names it counts as its name. Everything else
  sees the integer that the data set holds.
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
  return _is_nothing(value) or isinstance(value, (bytes, dict, list, tuple))


def _kind_of(value) -> str:
  if _is_nothing(value) or value == '':
    return 'nothing'
  return f'a {type(value).__name__}'


def _find(value, names: Sequence[str]) -> int | None:
  """Returns which of the names a label is, or None.

  It is one with the same text. If there is none, it is the only one with the
  same text but for the white space around it, for the case of its letters, or
  for the way in which an integer is written (1.0 is 1).
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
  """Returns the number that a text is; None for other texts."""
  found = re.fullmatch(r'[+-]?\d{1,9}(\.\d{1,9})?', text.strip())
  return float(text) if found else None


def _plain_number(text: str) -> float | None:
  """Returns the number that a text is; None for one with zeros before it,
  which is a code (007)."""
  return None if re.match(r'\s*[+-]?0\d', text) else _number(text)


def _letter(value) -> int | None:
  """Returns 0 for A or a, 1 for B or b, ...; None for anything else."""
  text = value.strip().upper() if isinstance(value, str) else ''
  return ord(text) - ord('A') if re.fullmatch('[A-Z]', text) else None


def _texts_of(value) -> tuple[str, ...]:
  """Returns the texts that a label may have among the declared names."""
  if isinstance(value, ClassNumber):
    return (value.name,)
  if isinstance(value, np.generic):
    value = value.item()
  if value is None:
    return ()
  if isinstance(value, bool):  # as Python and csv files, and as JSON has it
    return str(value), str(value).lower()
  if isinstance(value, float) and value.is_integer():
    return str(value), str(int(value))
  return str(value), str(value).strip()


def _integer(value) -> int | None:
  """Returns a truth value, an integer or the text of one as an integer; None
  for anything else, and above nine digits."""
  if isinstance(value, (bool, np.bool_)):
    return int(value)
  if isinstance(value, ClassNumber):
    return int(value)
  texts = _texts_of(value)
  if not texts or not re.fullmatch(r'\d{1,9}(\.0+)?', texts[-1]):
    return None
  return int(texts[-1].partition('.')[0])


def _short(row: dict) -> str:
  text = repr(row)
  return text if len(text) < 200 else text[:200] + '...'
