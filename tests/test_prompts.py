"""Prompts, answers and tokens of every task: against texts written by hand."""

import json

import numpy as np
import pytest
from texts import (
  BOS,
  byte_level,
  GOOD,
  MASK,
  NLI,
  of_kind,
  PAIR,
  PLAIN,
  spelled,
  TREC,
  X,
)

from mezo_jax import tasks
from mezo_jax.tasks import data as data_lib
from mezo_jax.tasks import objective as objectives
from mezo_jax.tasks import task as task_lib
from mezo_jax.tasks.encode import batch_of, encode

YES_NO, NO_YES = ['Yes', 'No'], ['No', 'Yes']
BIRDS = dict(premise=' Birds fly.', hypothesis='Some fly', label=1)
SNLI = dict(premise='A man sleeps.', hypothesis='The man rests.', label=2)
SAM = dict(question='Who ran? ', sentence='Sam ran.', label=0)
COPA = dict(choice1='The Sun was up.', choice2="I'm in", label=0)
BROKE = dict(premise='I pushed the door.', choice1='It opened.',
             choice2='I fell.', question='effect', label=1)
RECORD = dict(
    passage='Rain fell.\n@highlight\nWet Oslo\n@highlight\nDry Rome',
    query='In @placeholder it rained, says @placeholder.',
    entities=['Rome', 'Oslo', 'Bonn'], answers=['Bonn', 'Rome'])

# Task, row, prompt, candidates, numbers of the right ones.
CHOSEN = [
    ('sst2', dict(sentence=' a warm film ', label=1),
     'a warm film It was', [' terrible', ' great'], (1,)),
    ('rte', BIRDS, ' Birds fly.\nDoes this mean that "Some fly" is true? '
     'Yes or No?\n', YES_NO, (1,)),
    ('cb', BIRDS | {'label': 2}, 'Suppose  Birds fly. Can we infer that '
     '"Some fly"? Yes, No, or Maybe?\n', ['Yes', 'No', 'Maybe'], (2,)),
    ('boolq', dict(passage='Rain. ', question='is Rain wet', answer=True),
     'Rain.  Is Rain wet?\n', YES_NO, (0,)),
    ('boolq', dict(passage='{p}', question='Is rain dry?', answer=False),
     '{p} Is rain dry?\n', YES_NO, (1,)),
    ('wsc', dict(text='Mark told Pete that He lied.', span1_text='Mark',
                 span2_text='He', label=1),
     'Mark told Pete that He lied.\nIn the previous sentence, does the pronoun '
     '"he" refer to Mark? Yes or No?\n', NO_YES, (1,)),
    ('wic', dict(word='bank', sentence1='A bank.', sentence2='B. ', label=0),
     'Does the word "bank" have the same meaning in these two sentences? Yes, '
     'No?\nA bank.\nB. \n', NO_YES, (0,)),
    ('multirc', SAM | dict(paragraph='Sam ran.', answer='Sam', label=1),
     'Sam ran.\nQuestion: Who ran? \nI found this answer "Sam". Is that '
     'correct? Yes or No?\n', NO_YES, (1,)),
    ('copa', COPA | dict(premise='My body cast a shadow. ', question='cause'),
     'My body cast a shadow because', [' the Sun was up.', " i'm in"], (0,)),
    ('copa', COPA | dict(premise='Who knocked?', question='effect'),
     'Who knocked? so', [' the Sun was up.', " i'm in"], (0,)),
    ('copa', BROKE, 'I pushed the door so', [' it opened.', ' I fell.'], (1,)),
    ('record', RECORD, 'Rain fell.\n- Wet Oslo\n- Dry Rome\n-', [
        ' In Rome it rained, says Rome.', ' In Oslo it rained, says Oslo.',
        ' In Bonn it rained, says Bonn.'], (2, 0)),
    ('roberta_sst2', dict(sentence='a warm film ', label=0),
     'a warm film It was<mask>.', [' terrible', ' great'], (0,)),
    ('roberta_sst5', dict(text='A warm film .', label=3, label_text='positive'),
     'A warm film . It was<mask>.', GOOD, (3,)),
    ('roberta_snli', SNLI, 'A man sleeps?<mask>, the man rests.', NLI, (2,)),
    ('roberta_mnli', SNLI, 'A man sleeps?<mask>, the man rests.', NLI, (2,)),
    ('roberta_rte', dict(sentence1='Oslo is WET!', sentence2='OSLO.', label=1),
     'Oslo is WET?<mask>, oSLO.', [' Yes', ' No'], (1,)),
    ('roberta_trec', dict(text='Who ?', label=0, label_coarse_original='HUM'),
     '<mask>: Who ?', TREC, (3,)),
    ('glue_mnli', SNLI, 'A man sleeps.\0The man rests.', [], (2,)),
    ('glue_qnli', SAM, 'Who ran?\0Sam ran.', [], (0,)),
    ('glue_sst2', dict(sentence='a film ', label=1), 'a film', [], (1,)),
    ('glue_cola', SAM, 'Sam ran.', [], (0,))]
# Task, row, prompt, acceptable answers.
GENERATED = [
    ('squad', dict(
        title='Super_Bowl_50', context=' Denver won. ', question='  Who won? ',
        answers={'text': ['Denver', 'Broncos'], 'answer_start': [0, 7]}),
     'Title: Super_Bowl_50\nContext:  Denver won. \nQuestion: Who won?\n'
     'Answer:', ['Denver', 'Broncos']),
    ('drop', dict(
        passage='Denver led 7-0. ', question=' Who led?\n', answers_spans={
            'spans': ['Denver', '7 points'], 'types': ['span', 'span']}),
     'Passage: Denver led 7-0. \nQuestion: Who led?\nAnswer:',
     ['Denver', '7 points'])]


@pytest.mark.parametrize('name,row,prompt,candidates,golds', CHOSEN)
def test_declared_tasks_with_candidates(name, row, prompt, candidates, golds):
  task, before = tasks.get(name), json.dumps(row)
  (ready,) = task.prepare([row])
  assert task.prompt(ready, mask='<mask>', sep='\0') == prompt
  assert task.golds(ready) == golds
  if task.kind != 'head':
    assert task.candidates(ready) == candidates
    assert task.gold_text(ready) == candidates[golds[0]]
  assert json.dumps(row) == before
  assert task.main_metric == (
      'matthews' if name == 'glue_cola' else 'accuracy')
  assert objectives.of(task) == (
      'lm' if name in ('copa', 'record') else 'cross_entropy')


@pytest.mark.parametrize('name,row,prompt,references', GENERATED)
def test_declared_tasks_with_generated_answers(name, row, prompt, references):
  task = tasks.get(name)
  (ready,) = task.prepare([row])
  assert task.prompt(ready) == prompt
  assert task.references(ready) == references
  assert task.gold_text(ready) == ' Denver\n'
  assert (task.main_metric, task.max_new_tokens, task.stop) == ('f1', 50, '\n')
  assert objectives.of(task) == 'lm'
  assert task.calibration is None
  (text,) = data_lib.demonstrations(task, [ready] * 2, 2, 1)
  assert text == f'{prompt} Denver\n\n' * 2


def test_every_declared_task_is_sound_and_written_out_above():
  assert {case[0] for case in CHOSEN + GENERATED} == set(tasks.TASKS)
  for task in tasks.TASKS.values():
    task_lib.check_task(task)
  assert tasks.get('sst2', metric='macro_f1').main_metric == 'macro_f1'
  assert tasks.get('sst2').metric == ''
  with pytest.raises(ValueError, match="'sst3'.*sst2"):
    tasks.get('sst3')


def test_labels_in_the_order_of_the_data():
  for name, column, labels in (
      ('roberta_trec', 'label_coarse_original',
       ['DESC', 'ENTY', 'ABBR', 'HUM', 'LOC', 'NUM']),
      ('roberta_sst5', 'label', [0, 1, 2, 3, 4]),
      ('glue_mnli', 'label', ['entailment', 'neutral', 'contradiction'])):
    assert [tasks.get(name).golds({column: l}) for l in labels] == [
        (c,) for c in range(len(labels))]


def test_rows_that_snli_s_annotators_did_not_agree_on_are_left_out():
  rows = [SNLI | {'label': label} for label in (-1, 0, '-1', 2)]
  ready = tasks.get('roberta_snli').prepare(rows)
  assert [row['label'] for row in ready] == [0, 2]


def test_prompts_without_content_for_calibration():
  for name, row, *_ in CHOSEN[:12]:
    task = tasks.get(name)
    want = {'sst2': ' It was', 'record': '-'}.get(name, '')
    if name == 'copa':
      want = {'effect': 'so', 'cause': 'because'}[row['question']]
    assert task.prior(task.prepare([row])[0]) == want


def test_demonstrations():
  pool = [dict(sentence=f' film {i} ', label=i % 2) for i in range(9)]
  task, gold = tasks.get('sst2'), (' terrible', ' great')
  want = []
  for seed in np.random.RandomState(0).randint(0, 10000, 4):
    order = np.random.RandomState(seed).permutation(9)[:3]
    want.append('\n\n'.join(
        f'film {i} It was{gold[i % 2]}' for i in order) + '\n\n')
  assert data_lib.demonstrations(task, pool, 3, 4) == want
  assert len(set(want)) == 4
  with pytest.raises(ValueError, match='9 .* 10 .*--config.num_demos'):
    data_lib.demonstrations(task, pool, 10, 1)


# --- tokens -----------------------------------------------------------------


def encoded(name, rows, tokenizer, most=128, **kwargs):
  task = tasks.get(name)
  return encode(task, task.prepare(rows), tokenizer, most, **kwargs)


MASKED = [
    ('roberta_sst2', dict(sentence='abcd', label=1),
     '<s> a b c d ĠIt Ġwas <mask> . </s>', 8, '<s> c d ĠIt Ġwas <mask> . </s>'),
    ('roberta_sst5', dict(text='a  b', label=1),
     '<s> a Ġ Ġb ĠIt Ġwas <mask> . </s>', 4, '<s> <mask> . </s>'),
    ('roberta_snli', dict(premise='Abc.', hypothesis='De', label=2),
     '<s> A b c ? <mask> , Ġ d e </s>', 9, '<s> c ? <mask> , Ġ d e </s>'),
    ('roberta_mnli', dict(premise='Abc.', hypothesis='De', label=2),
     '<s> A b c ? <mask> , Ġ d e </s>', 5, '<s> <mask> , Ġ </s>'),
    ('roberta_trec', dict(text='abcd?', label_coarse_original='NUM'),
     '<s> <mask> : Ġ a b c d ? </s>', 6, '<s> <mask> : Ġ a </s>')]


@pytest.mark.parametrize('name,row,whole,most,cut', MASKED)
def test_masked_prompts_and_their_masks(name, row, whole, most, cut):
  for length, want in ((128, whole), (most, cut)):
    data = encoded(name, [row], MASK, length, causal=False)
    assert spelled(MASK, data.prompts[0]) == want
    assert data.read_at.tolist() == [want.split().index('<mask>')]
    assert data.truncated == (want != whole)
    assert spelled(MASK, data.token_ids) == ' '.join(
        'Ġ' + w.strip() for w in tasks.get(name).label_words)
    assert data.width == len(tasks.get(name).label_words)


@pytest.mark.parametrize('name,most,columns', [
    ('roberta_sst5', 110, ('text', None)),
    ('roberta_trec', 110, ('text', None)),
    ('roberta_mnli', 240, ('premise', 'hypothesis')),
    ('roberta_rte', 240, ('sentence1', 'sentence2'))])
def test_the_first_text_is_cut_to_its_limit(name, most, columns):
  """The mark at its end is not part of it; the second text is not cut."""
  mark = '.' if columns[1] else ''
  rows = [{columns[0]: 'z' * n + mark, columns[1]: 'b' * 300, 'label': 0,
           'label_coarse_original': 'LOC'} for n in (
               most - 1, most, most + 1, most + 50)]
  data = encoded(name, rows, MASK, 1000, causal=False)
  z = MASK.convert_tokens_to_ids('z')
  assert [p.count(z) for p in data.prompts] == [most - 1, most, most, most]
  assert np.diff(data.lengths).tolist() == [1, 0, 0]
  assert data.truncated == 2
  # A row that loses tokens twice is one row.
  assert encoded(name, rows, MASK, 50, causal=False).truncated == 4


FILMS = [dict(sentence='abcdefgh', label=1), dict(sentence='xy', label=0)]


@pytest.mark.parametrize('tokenizer,start', [
    (PLAIN, 'd e f g h'), (BOS, '<s> e f g h')])
def test_long_prompts_keep_their_end_and_bos_token(tokenizer, start):
  for write_out in (False, True):
    data = encoded('sst2', FILMS, tokenizer, 8, write_out=write_out)
    assert spelled(tokenizer, data.prompts[0]) == f'{start} ĠIt Ġwas'
    assert spelled(tokenizer, data.prompts[1]).endswith('x y ĠIt Ġwas')
    assert data.truncated == 1
  words = tokenizer.convert_tokens_to_ids(['Ġterrible', 'Ġgreat'])
  assert data.candidates == [[[w] for w in words]] * 2
  data = encoded('sst2', FILMS, tokenizer, 8, gold_only=True)
  assert data.candidates == [[words[1:]], [words[:1]]]
  assert data.golds == [(0,), (0,)] and data.truncated == 1


@pytest.mark.parametrize('template,words,prompt,candidates', [
    ('{s} It was', (' great', ' bad'), 'a ĠIt Ġwas', ['Ġgreat', 'Ġbad']),
    # A space at the prompt's end goes to the answer.
    ('{s} It ', ('great bad', 'bad'), 'a ĠIt', ['Ġgreat Ġbad', 'Ġbad']),
    ('{s}\n', ('Yes', 'No'), 'a Ċ', ['Y e s', 'N o']),
    # What the two share is read once, and yet scored for both.
    ('{s}', (' bad', ' bad bad'), 'a', ['Ġbad', 'Ġbad Ġbad']),
    # The end of the prompt becomes one token with one answer.
    ('{s} I', ('t', ' bad'), 'a', ['ĠIt', 'ĠI | Ġbad'])])
def test_where_an_answer_begins(template, words, prompt, candidates):
  rows = [dict(s='a', label=0, answers='x')]
  data = encode(tasks.Task(template=template, label_words=words), rows, BOS, 64,
                write_out=True)
  assert spelled(BOS, data.prompts[0]) == f'<s> {prompt}'
  assert [spelled(BOS, c) for c in data.candidates[0]] == [
      c.replace('| ', '') for c in candidates]
  assert [len(scored) for scored in data.scored[0]] == [
      len(c.split('|')[-1].split()) for c in candidates]
  data = encode(of_kind('generation', template=template), rows, BOS, 64)
  assert spelled(BOS, data.prompts[0]) == f'<s> {prompt}' + (
      ' ĠI' if template == '{s} I' else '')


def test_prompts_without_content_have_a_token_to_start_from():
  for tokenizer, token in ((PLAIN, '</s>'), (BOS, '<s>'), (
      byte_level(bos_token='<s>', eos_token='</s>'), '<s>')):
    data = encode(of_kind(), [X], tokenizer, 64, prompts=[''])
    assert spelled(tokenizer, data.prompts[0]) == token
    assert spelled(tokenizer, data.token_ids) == 'Ġbad Ġgood'


def test_prompts_to_be_continued():
  task = of_kind('generation', template='{sentence}', max_new_tokens=5)
  data = encode(task, [f | {'answers': 'a'} for f in FILMS], BOS, 10)
  short, long = data.prompts[::-1]
  assert (spelled(BOS, long), spelled(BOS, short)) == ('<s> e f g h', '<s> x y')
  assert data.generates and data.truncated == 1
  batch = batch_of(data, np.array([1, 0]), 6, 3)
  assert batch['input_ids'].tolist() == [
      [0, 0, 0, *short], [0, *long], [0] * 6]
  assert batch['attention_mask'].tolist() == [
      [0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]
  assert batch['row'].tolist()[:2] == [1, 0]
  assert batch['weight'].tolist() == [1, 1, 0]


def test_texts_for_a_head():
  row = dict(question='abc', sentence='defg', label=1)
  whole = '<s> a b c </s> d e f g </s>'
  for most, want in ((64, whole), (8, '<s> a b </s> d e f </s>')):
    data = encoded('glue_qnli', [row], PAIR, most, causal=False)
    assert spelled(PAIR, data.prompts[0]) == want
    first = len(want.split('</s>')[0].split()) + 1
    assert data.types == [[0] * first + [1] * (len(want.split()) - first)]
    assert data.truncated == (want != whole)
  assert (data.read_at.tolist(), data.width, data.golds) == ([0], 2, [(1,)])
  data = encoded('glue_sst2', FILMS[1:], BOS)
  assert spelled(BOS, data.prompts[0]) == '<s> x y'
  assert data.read_at.tolist() == [2] and data.types is None
