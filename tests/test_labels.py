"""Labels: names first, as texts; numbers where no name is the same."""

import copy

import numpy as np
import pytest
from texts import byte_level, of_kind

from mezo_jax import tasks
from mezo_jax.core.errors import InputError
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import task as task_lib
from mezo_jax.tasks.task import ClassNumber

AB = (' bad', ' good')
WORDS = (' one', ' two', ' three')


def gold(value, names=(), words=AB, **changes):
  task = of_kind(label_words=words[:max(len(names), 2)], label_names=names,
                 **changes)
  return task.golds({'text': 'a', 'label': value})[0]


@pytest.mark.parametrize('suffix,text,names', [
    ('csv', 'text,fraud\npay,True\nsee,False\n', ('True', 'False')),
    ('tsv', 'text\tfraud\npay\ttrue\nsee\tfalse\n', ('true', 'false')),
    ('csv', 'text,fraud\npay,1\nsee,2\n', ('1', '2')),
    ('csv', 'text,fraud\npay,1\nsee,2\n', (1, 2)),
    ('csv', 'text,fraud\npay,01\nsee,10\n', ('01', '10')),
    ('csv', 'text,fraud\npay,1.0\nsee,0.0\n', ('1.0', '0.0')),
    ('csv', 'text,fraud\npay,-1\nsee,1\n', ('-1', '1')),
    ('csv', 'text,fraud\npay,NA\nsee,nan\n', ('NA', 'nan')),
    ('csv', 'text,fraud\npay,2024-01-02\nsee,1e3\n', ('2024-01-02', '1e3')),
    *(('jsonl', '{"text": "pay", "fraud": true}\n'
       '{"text": "see", "fraud": false}', names)
      for names in (('True', 'False'), ('true', 'false'), (True, False))),
    ('jsonl', '{"text": "pay", "fraud": 2}\n{"text": "see", "fraud": 1}',
     ('2', '1')),
    ('jsonl', '{"text": "pay", "fraud": 2.0}\n{"text": "see", "fraud": 1.0}',
     ('2', '1'))])
def test_names_come_first(tmp_path, suffix, text, names):
  path = tmp_path / f'x.{suffix}'
  path.write_text(text)
  rows = data_lib.load_rows(str(path))
  task = of_kind(label_column='fraud', label_words=(' Yes', ' No'),
                 label_names=names)
  assert [task.gold_text(row) for row in rows] == [' Yes', ' No']
  assert 'read as names' in task.reading(rows)
  head = of_kind('head', label_column='fraud', label_names=names)
  assert [head.golds(row) for row in rows] == [(0,), (1,)]


def test_numbers_where_no_name_is_the_same():
  for value in (1, '1', ' 1', True, np.int64(1), np.bool_(True), 1.0, 'true',
                'True'):
    assert gold(value, ('neg', 'pos')) == gold(value) == 1
  assert gold(1, ('False', 'True')) == gold(True, ('False', 'True')) == 1
  assert gold(True, ('no', 'yes')) == 1
  assert gold(0, (), (' Yes', ' No')) == 0  # as SuperGLUE has it


def test_label_words_are_the_names_where_there_are_no_others():
  assert gold('good') == 1
  assert gold(True, (), (' True', ' False')) == 0
  assert gold('2', (), (' 1', ' 2')) == 1
  assert gold('1', ('0', '1'), (' 1', ' 2')) == 1  # declared names come first


@pytest.mark.parametrize('value,names,words', [
    (0, ('1', '2', '3'), WORDS), (1, ('True', 'False'), AB),
    (True, (), (' Yes', ' No')), ('True', ('yes', 'no'), AB),
    (0, (), (' 1', ' 2')), ('good', ('neg', 'pos'), AB), (1, ('01', '02'), AB),
    ('9' * 5000, (), AB), (float('nan'), (), AB), (None, ('None', 'x'), AB),
    ('', (), AB), (0, ('-1', '1'), AB), (0, ('1.0', '2.0'), AB),
    (7, ('007', '08'), AB), (0, ('1.5', '2.5'), AB), ('1.5', (), AB),
    (True, (' Yes', ' No'), AB), (True, ('Y', 'N'), AB), (1, ('T', 'F'), AB),
    (True, ('on', 'off'), AB), ('yEs', ('Yes', 'YES'), AB)])
def test_numbers_that_contradict_the_names(value, names, words):
  with pytest.raises(InputError, match='label .*task.label_'):
    gold(value, names, words)


@pytest.mark.parametrize('value,names,number', [
    ('yes', ('No', 'Yes'), 1), ('YES', ('yes', 'no'), 0),
    (' positive ', ('negative', 'Positive'), 1), ('Yes', (' No', ' Yes'), 1),
    ('TRUE', ('true', 'false'), 0), (True, ('TRUE', 'FALSE'), 0),
    ('a', ('A', 'a'), 1), ('ham', ('ham ', 'ham'), 1),
    ('1.0', ('1', '2'), 0), (1, ('1.0', '2.0'), 0), ('2', (1.0, 2.0), 1),
    (1, ('-1', '+1'), 1), (-1.0, ('1', '-1'), 1), ('1.0', ('neg', 'pos'), 1),
    ('spammy', ('spam', 'spammy'), 1)])
def test_names_in_another_form(value, names, number):
  assert gold(value, names) == number


def test_what_a_label_is_can_be_set():
  names = ('1', '2')
  assert [gold(v, names, label_is='number') for v in (0, 1)] == [0, 1]
  assert gold('2', names, label_is='name') == 1
  with pytest.raises(InputError):
    gold(1, ('a', 'b'), label_is='name')
  with pytest.raises(InputError, match='label -1 .*task.label_words'):
    gold(-1)


CHOICE = tasks.Task(kind='multiple_choice', template='{q}')


@pytest.mark.parametrize('label,choices,golds', [
    (True, ['True', 'False'], (0,)), (False, [True, False], (1,)),
    ('true', ['True', 'true'], (1,)), (2, ['1', '2', '3'], (1,)),
    ('2', [3, 2, 1], (1,)), (4, ['3', '4', '5'], (1,)), (1, ['a', 'b'], (1,)),
    ([True, 'b'], ['True', 'b'], (0, 1)), ('00501', ['501', '00501'], (1,)),
    ('B', ['x', 'y', 'z'], (1,)), ('c', ['x', 'y', 'z'], (2,)),
    ('A', ['B', 'A'], (1,)), (1, ['1.0', '2.0'], (0,)), ('a', ['a', 'a'], (0,)),
    (2.0, ['1', '2'], (1,)), (1, ['10', '20'], (1,))])
def test_choices_by_their_text(label, choices, golds):
  row = dict(q='Is water wet?', choices=choices, label=label)
  assert CHOICE.golds(row) == golds
  columns = tasks.Task(kind='multiple_choice', template='{q}', choices=tuple(
      map(str, range(len(choices)))))
  cells = {str(i): choice for i, choice in enumerate(choices)}
  assert columns.golds(row | cells) == golds


def test_numbers_of_classes_that_the_data_name():
  names = ['entailment', 'neutral', 'contradiction']
  labels = [ClassNumber(i, name) for i, name in enumerate(names)]
  assert labels == [0, 1, 2] and [*map(str, labels)] == ['0', '1', '2']
  assert copy.deepcopy(labels[1]).name == 'neutral'
  turned = ('neutral', 'entailment', 'contradiction')
  assert [gold(l, turned, WORDS) for l in labels] == [1, 0, 2]
  assert [gold(l, ('1', '2', '3'), WORDS) for l in labels] == [0, 1, 2]
  # The number of a choice, not its text.
  row = dict(q='1 + 1', choices=['2', '1', '0'], label=ClassNumber(0, 'A'))
  assert CHOICE.golds(row) == (0,)


def test_labels_of_two_kinds():
  task = of_kind(label_names=('1', 'x'))
  rows = [dict(text='a', label=label) for label in ('1', '1', 'x')]
  assert task.reading(rows).endswith("names: '1' is ' bad', 'x' is ' good'")
  with pytest.raises(InputError, match="column 'label' .*'x' .*task.label_is"):
    of_kind(label_names=('x', 'y')).reading(
        [dict(text='a', label=label) for label in ('x', '1')])
  choices = [dict(q='', choices=['4', '2', '1'], label=1),
             dict(q='', choices=['a', 'b', 'c'], label=2)]
  with pytest.raises(InputError, match='label_is'):
    CHOICE.reading(choices)
  with pytest.raises(InputError, match="column 'label' .*'A' .*task.label_is"):
    CHOICE.reading([dict(q='', choices=['x', 'y'], label=l) for l in 'Ax'])
  letters = [dict(q='', choices=['x', 'y'], label=label) for label in 'AB']
  assert 'the letter of a choice' in CHOICE.reading(letters)
  by_number = tasks.Task(
      kind='multiple_choice', template='{q}', label_is='number')
  assert 'the number of a choice' in by_number.reading(choices)
  assert [by_number.golds(row) for row in choices] == [(1,), (2,)]


def test_a_run_says_how_labels_are_read():
  rows = [dict(text='a', label=label) for label in (True, False)]
  said = []
  for names, untold in ((('True', 'False'), ()), (('x', 'y'), ('train',))):
    data_lib.encode_rows(
        data_lib.Rows(rows, rows[:1], rows[:1], rows),
        of_kind(label_names=names), byte_level(eos_token='</s>'), causal=True,
        limit=64, buckets=(64,), untold=untold, say=said.append)
  labels = [text for text in said if text.startswith('labels: ')]
  assert labels == [
      "labels: column 'label' is read as names: True is ' bad', False is "
      "' good'", "labels: column 'label' is read as numbers, counted from 0: "
      "True is ' good'"]


@pytest.mark.parametrize('changes', [
    dict(label_is='index'), dict(label_names=('a', 'b', 'c')),
    dict(label_names=('1', 1))])
def test_names_that_cannot_be(changes):
  with pytest.raises(InputError, match='task.label_'):
    task_lib.check_task(of_kind(**changes))


@pytest.mark.parametrize('value', [None, float('nan'), '', ['x'], {'x': 1}])
def test_choices_that_are_no_text(value):
  row = dict(q='q', label=0, a='x', b=value)
  for task in (CHOICE, tasks.Task(kind='multiple_choice', template='{q}',
                                  choices=('a', 'b'))):
    with pytest.raises(InputError, match="column '(choices|b)'"):
      task.candidates(row | {'choices': ['x', value]})


def test_nan_is_no_text_and_no_label():
  row = dict(text=float('nan'), label=np.float32('nan'))
  assert not of_kind().has_gold(row)
  with pytest.raises(InputError, match="column 'text'"):
    of_kind().prompt(row)


def test_a_csv_of_boolq():
  row = dict(passage='Rain.', question='is rain wet')
  for answer, label in ((True, 0), ('True', 0), ('false', 1), ('0', 1)):
    ready, = tasks.get('boolq').prepare([row | {'answer': answer}])
    assert ready['label'] == label
  for name, row in (('boolq', row | {'answer': 'x'}),
                    ('record', dict(entities="['a']", answers=['a'])),
                    ('drop', dict(answers_spans="{'spans': []}"))):
    with pytest.raises(InputError, match=f"task '{name}'"):
      tasks.get(name).prepare([row])
