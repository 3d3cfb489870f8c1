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
    (dict(template='{film}'), X, r"the template '{film}' names column 'film', "
     r"the data have \['label', 'text'\]; set --config.task.template"),
    (dict(template='{}'), X, "the template '{}' is malformed"),
    (dict(template='{text'), X, "the template '{text' is malformed"),
    (MC | dict(answer='{x}'), AB,
     "the answer '{x}' names column 'x'.*set --config.task.answer"),
    ({}, dict(text='a'), r"no column 'label' but \['text'\]; set "
     '--config.task.label_column'),
    *(({}, X | {'label': l}, f'label {l!r} is neither an integer below 2 .*'
       r"nor one of the names \('bad', 'good'\).*; set --config.task.label_w")
      for l in (2, -1, 'x', None, 0.5)),
    *((MC, AB | {'label': l}, r"is neither one of the choices \['bad', 'good'"
       r'\] nor the number of one; set --config.task.label_column')
      for l in (2, -1, 'x', [0, 2], [])),
    (MC | dict(choices=('a', 'b')), X | {'a': 'x'}, r"no column 'b' but "
     r"\['a', 'label', 'text'\]; set --config.task.choices"),
    *((MC, X | {'choices': v}, "column 'choices' of the row .* is no list of "
       'choices; set --config.task.choices')
      for v in ('x', [], None, '"x"')),
    *((GEN, X | {'answers': v}, "column 'answers' of the row .* is no text and "
       'no list of texts; set --config.task.answers_column')
      for v in (None, [], [1])),
    (GEN, dict(text='a' * 999, answers=5), r"row {'text': 'a{190}\.\.\. is"),
    (GEN, dict(text='a'), r"no column 'answers' but \['text'\]; set --config"),
    ({}, dict(text=' ', label=0), 'row 0 has an empty prompt: .*label'),
    (dict(template='{text}{mask}'), X, 'has a {mask}, and this tokenizer no '
     'mask token.*--config.task.template or model'),
    (dict(label_words=(' a', ' a')), X, r"candidates \[' a', ' a'\] are "
     'the same tokens to this tokenizer.*label_words or choices'),
    (dict(label_words=(' good', ' good bad bad')), X, 'the answers of row 0 '
     'alone are 3 tokens, and at most 3 are wanted; raise --config.data'),
    (GEN | dict(max_new_tokens=3), X, '3 new tokens leave no room for a prompt '
     'in 3; lower --config.task.max_new_tokens'),
    (dict(kind='head', template='{text}{sep}a{sep}b', label_names='ab'), X,
     'must have one {sep} at most')])
def test_rows_that_do_not_fit_their_task(changes, row, message):
  with pytest.raises(ValueError, match=message):
    encode(of_kind(**changes), [row], PLAIN, 3)


@pytest.mark.parametrize('changes,row,message', [
    (GEN, X | {'answers': {'value': 'a'}}, 'is no text and no list of texts'),
    (MC, X | {'choices': "a', 'b"}, 'is no list of choices'),
    (dict(limits=(('film', 9),), template='{film}'), X, "names column 'film'"),
    (dict(template='{text.x}'), X, "the template '{text.x}' is malformed")])
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
  with pytest.raises(ValueError, match='no room for a text and its mask'):
    encode(task, [X | {'text': 'a film'}], MASK, 2)


@pytest.mark.parametrize('word', [' great', ' greatest', '', '<unk>'])
def test_label_words_that_a_masked_model_cannot_say(word):
  task = of_kind(template='{text}{mask}', label_words=(' great', word))
  with pytest.raises(ValueError, match='are not one token each, all different, '
                     'to this tokenizer.*--config.task.label_words'):
    encode(task, [X], MASK, 64)


def test_other_errors_of_rows():
  with pytest.raises(ValueError, match='there are no rows to encode'):
    encode(of_kind(), [], PLAIN, 64)
  with pytest.raises(ValueError, match="task 'boolq' needs column 'question', "
                     r"the data have \['passage'\]"):
    tasks.get('boolq').prepare([dict(passage='a')])
  with pytest.raises(ValueError, match="the calibration '{x}' names column 'x'"
                     '.*--config.task.calibration'):
    of_kind(calibration='{x}').prior(X)


@pytest.mark.parametrize('changes,message', [
    (dict(kind='choice'), "task.kind 'choice' is not one of classification, "),
    (dict(template=''), 'task.template is empty: give the prompt'),
    (dict(metric='bleu'), "task.metric 'bleu' is not one of accuracy, "),
    (dict(label_words=(' a',)), 'task.label_words needs two or more'),
    (dict(kind='head'), "kind 'head' needs two or more names in"),
    (MC | dict(template='{mask}', label_words=(' a', ' b')),
     "a prompt with {mask} needs task.kind 'classification'"),
    (GEN | dict(max_new_tokens=0), 'task.max_new_tokens must be at least 1'),
    (GEN | dict(metric='accuracy'), "metric 'accuracy' does not fit kind 'gen"),
    (dict(metric='drop_f1'), "metric 'drop_f1' does not fit kind 'classi")])
def test_tasks_that_cannot_work(changes, message):
  with pytest.raises(ValueError, match=f'config: .*{message}'):
    task_lib.check(of_kind(**changes))
  for kind in ('classification', 'multiple_choice', 'generation'):
    task_lib.check(of_kind(kind))
