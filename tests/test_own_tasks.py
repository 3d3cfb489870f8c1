"""Tasks of one's own: classes, choices, answers, and what cannot work."""

import numpy as np
import pytest
from texts import MASK, of_kind, PLAIN, X

from mezo_jax import tasks
from mezo_jax.tasks import task as task_lib
from mezo_jax.tasks.encode import encode


@pytest.mark.parametrize('value,gold', [
    ('pos', 1), ('neg', 0), (1, 1), ('0', 0), (True, 1), (np.int64(1), 1)])
def test_one_s_own_classes(value, gold):
  task = of_kind(label_names=('neg', 'pos'), label_column='mood')
  row = dict(text=' a {b} ', mood=value)
  assert task.prepare([row]) == [row]
  assert task.prompt(row) == 'a {b}'
  assert of_kind(strip=False).prompt(row) == ' a {b} '
  assert task.golds(row) == (gold,)
  assert task.gold_text(row) == (' bad', ' good')[gold]


@pytest.mark.parametrize('choices,columns', [
    ('abc', dict(a='x', b='y z', c=3)),
    (['choices'], dict(choices=['x', 'y z', 3])),
    (['choices'], dict(choices=('x', 'y z', '3'))),
    (['of'], dict(of=' ["x", "y z", 3]'))])
def test_one_s_own_multiple_choice(choices, columns):
  task = of_kind('multiple_choice', choices=choices, label_column='right')
  for right, golds in ((1, (1,)), ('1', (1,)), ('y z', (1,)), ([2, 0], (2, 0)),
                       (['3'], (2,))):
    row = dict(text='t', right=right, **columns)
    assert task.candidates(row) == [' x', ' y z', ' 3']
    assert task.golds(row) == golds
  task.answer = '\n{text}: {choice}.'
  assert task.candidates(row)[1] == '\nt: y z.'


def test_one_s_own_answers():
  task = of_kind('generation', answers_column='said', stop='.', metric='f1')
  for said, references in (
      ('one', ['one']), (['one', 'two'], ['one', 'two']),
      ({'text': ['one'], 'answer_start': [3]}, ['one'])):
    row = dict(text='t', said=said)
    assert task.references(row) == references
    assert task.gold_text(row) == ' one.'


def test_white_space_around_answers():
  row = dict(text='t', answers=' one ')
  task = of_kind('generation', stop='.')
  assert task.gold_text(row) == ' one.'
  task.strip = False
  assert task.gold_text(row) == '  one .'


MC = dict(kind='multiple_choice')
GEN = dict(kind='generation', max_new_tokens=1)
AB = X | {'choices': ['bad', 'good']}


@pytest.mark.parametrize('changes,row,message', [
    (dict(template='{film}'), X, "'{film}' .*'film'.*task.template"),
    (dict(template='{}'), X, "'{}' .*task.template"),
    (dict(template='{text'), X, "'{text' .*task.template"),
    (MC | dict(answer='{x}'), AB,
     "'{x}' .*column 'x'.*task.answer"),
    ({}, dict(text='a'), "column 'label' .*task.label_column"),
    *(({}, X | {'label': l}, f'label {l!r} .*task.label_words')
      for l in (2, -1, 'x', None, 0.5)),
    *((MC, AB | {'label': l}, "'bad', 'good'.*task.label_column")
      for l in (2, -1, 'x', [0, 2], [])),
    (MC | dict(choices=('a', 'b')), X | {'a': 'x'}, "'b' .*task.choices"),
    *((MC, X | {'choices': v}, "column 'choices' .*task.choices")
      for v in ('x', [], None, '"x"')),
    *((GEN, X | {'answers': v}, "column 'answers' .*task.answers_column")
      for v in (None, [], [1])),
    (GEN, dict(text='a' * 999, answers=5), r"{'text': 'a{190}\.\.\. "),
    (GEN, dict(text='a'), "column 'answers' .*task.answers_column"),
    ({}, dict(text=' ', label=0), 'row 0 .*prompt.*label'),
    (dict(template='{text}{mask}'), X, '{mask}.*--config.task.template'),
    (dict(label_words=(' a', ' a')), X, r"\[' a', ' a'\] .*task.label_words"),
    (dict(label_words=(' good', ' good bad bad')), X,
     'row 0 .* 3 tokens.*data.max_length'),
    (GEN | dict(max_new_tokens=3), X, 'task.max_new_tokens'),
    (dict(kind='head', template='{text}{sep}a{sep}b', label_names='ab'), X,
     '{text}{sep}a{sep}b')])
def test_rows_that_do_not_fit_their_task(changes, row, message):
  with pytest.raises(ValueError, match=message):
    encode(of_kind(**changes), [row], PLAIN, 3)


@pytest.mark.parametrize('changes,row,message', [
    (GEN, X | {'answers': {'value': 'a'}}, "column 'answers'"),
    (MC, X | {'choices': "a', 'b"}, "column 'choices'"),
    (dict(limits=(('film', 9),), template='{film}'), X, "'film'.*task.limits"),
    (dict(template='{text.x}'), X, "'{text.x}' .*task.template")])
def test_more_rows_that_do_not_fit_their_task(changes, row, message):
  with pytest.raises(ValueError, match=message):
    encode(of_kind(**changes), [row], PLAIN, 3)


def test_lists_as_files_spell_them():
  for text in ('["a", "b"]', "['a', 'b']", " ['a', 'b']"):
    assert of_kind(**MC).candidates(X | {'choices': text}) == [' a', ' b']
  for answers in ({'text': ['a']}, {'spans': ['a'], 'types': ['span']}, 'a'):
    assert of_kind(**GEN).references({'answers': answers}) == ['a']


def test_a_mask_in_the_data_is_not_the_prompt_s():
  task = of_kind(template='{text} was{mask}', label_words=(' great', ' bad'))
  one, two = (encode(task, [X | {'text': text}], MASK, 64)
              for text in ('a<mask>film', 'a film'))
  assert one.prompts == two.prompts and (one.read_at == two.read_at).all()
  with pytest.raises(ValueError, match='2 tokens .*data.max_length'):
    encode(task, [X | {'text': 'a film'}], MASK, 2)


@pytest.mark.parametrize('word', [' great', ' greatest', '', '<unk>'])
def test_label_words_that_a_masked_model_cannot_say(word):
  task = of_kind(template='{text}{mask}', label_words=(' great', word))
  with pytest.raises(ValueError, match='label words .*task.label_words'):
    encode(task, [X], MASK, 64)


def test_other_errors_of_rows():
  with pytest.raises(ValueError, match='no rows'):
    encode(of_kind(), [], PLAIN, 64)
  with pytest.raises(ValueError, match="'boolq' .*'question'.*'passage'"):
    tasks.get('boolq').prepare([dict(passage='a')])
  with pytest.raises(ValueError, match="'{x}' .*--config.task.calibration"):
    of_kind(calibration='{x}').prior(X)


@pytest.mark.parametrize('changes,message', [
    (dict(kind='choice'), "task.kind 'choice'"),
    (dict(template=''), 'task.template'),
    (dict(metric='bleu'), "task.metric 'bleu'"),
    (dict(label_words=(' a',)), 'task.label_words'),
    (dict(kind='head'), 'task.label_names'),
    (MC | dict(template='{mask}', label_words=(' a', ' b')),
     '{mask} .*task.kind'),
    (GEN | dict(max_new_tokens=0), 'task.max_new_tokens'),
    (GEN | dict(metric='accuracy'), "task.metric 'accuracy' .*'generation'"),
    (dict(metric='drop_f1'), "task.metric 'drop_f1' .*'classification'")])
def test_tasks_that_cannot_work(changes, message):
  with pytest.raises(ValueError, match=f'config: .*{message}'):
    task_lib.check_task(of_kind(**changes))
  for kind in ('classification', 'multiple_choice', 'generation'):
    task_lib.check_task(of_kind(kind))
