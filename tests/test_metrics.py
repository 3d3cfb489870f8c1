"""Metrics: against published examples, and sums by hand."""

import numpy as np
import pytest

from mezo_jax.tasks import metrics

# Confusion by (label, prediction): [[2, 1, 0], [0, 2, 1], [1, 0, 3]].
LABELS = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
PREDICTIONS = np.array([0, 0, 1, 1, 1, 2, 0, 2, 2, 2])


def test_three_classes_by_hand():
  # 2 TP / (2 TP + FP + FN) = 4/6, 4/6, 6/8.
  assert metrics.macro_f1(PREDICTIONS, LABELS) == pytest.approx(25 / 36)
  # c = 7, s = 10, and p = t = (3, 3, 4): (70 - 34) / (100 - 34).
  assert metrics.matthews(PREDICTIONS, LABELS) == pytest.approx(36 / 66)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('predictions, labels, macro_f1, matthews', [
    ([0, 7, 3], [0, 0, 3], (2 / 3 + 0 + 1) / 3, 3 / 24**0.5),  # 7 is no label
    ([-1, -1], [0, 1], 0, 0),  # rows without an answer
    ([1, 1, 1], [0, 1, 1], (0 + 4 / 5) / 2, 0),
    ([0, 1, 1], [1, 1, 1], (0 + 4 / 5) / 2, 0),
    ([1, 1], [1, 1], 1, 0), ([1], [1], 1, 0), ([0], [1], 0, 0),
    ([1, 0], [0, 1], 0, -1), ([0, 1, 2], [0, 1, 2], 1, 1)])
def test_classes_that_do_not_occur(predictions, labels, macro_f1, matthews):
  assert metrics.macro_f1(predictions, labels) == pytest.approx(macro_f1)
  assert metrics.matthews(predictions, labels) == pytest.approx(matthews)


@pytest.mark.parametrize('metric', [metrics.macro_f1, metrics.matthews])
@pytest.mark.parametrize('predictions, labels', [([], []), ([1, 0], [1])])
def test_no_rows_or_other_lengths(metric, predictions, labels):
  with pytest.raises(ValueError):
    metric(predictions, labels)


@pytest.mark.parametrize('text, want', [
    ('The Denver Broncos!', 'denver broncos'),
    ('  an apple,\ta\nPEAR ', 'apple pear'),
    ('Another theatre at anchor', 'another theatre at anchor'),
    ('a.m.', 'am'),  # punctuation goes before articles are sought
    ('well-known', 'wellknown'),
    ("Levi's", 'levis'),
    ('The a, an.', ''),
])
def test_normalized_answers(text, want):
  assert metrics.normalize_answer(text) == want


@pytest.mark.parametrize('prediction, answers, match, f1', [
    ('Denver Broncos', ['The Denver Broncos!'], 1, 1),
    ('Broncos', ['Denver Broncos'], 0, 2 / 3),
    ('the Broncos of Denver', ['Denver Broncos'], 0, 4 / 5),
    ('Carolina Panthers', ['Denver Broncos'], 0, 0),
    ('Broncos Denver', ['Denver Broncos'], 0, 1),
    ('very very good', ['very good'], 0, 4 / 5),  # a token counts as it occurs
    ('very good', ['very very very'], 0, 2 / 5),
    ('very very good', ['very very bad'], 0, 4 / 6),
    ('Santa Clara', ['in Santa Clara, California', 'Santa Clara'], 1, 1),
    ('Clara', ['Santa Clara, California', 'Santa Clara'], 0, 2 / 3),
    ('', ['Denver'], 0, 0),
    ('the', ['A'], 1, 0),  # the same, but no token in common
])
def test_squad(prediction, answers, match, f1):
  assert metrics.exact_match(prediction, answers) == match
  assert metrics.span_f1(prediction, answers) == pytest.approx(f1)


@pytest.mark.parametrize('prediction, answers, want', [
    ('no answer.', ['no answer'], 1),
    ('there is no answer', ['no answer'], 0),
    ('cannotanswer', ['CANNOTANSWER'], 1),
    ('twelve', ['CANNOTANSWER', 'twelve'], 0),  # only the first one counts
    ('answer', ['no answer at all', 'no answer'], 2 / 3),
])
def test_questions_without_an_answer(prediction, answers, want):
  assert metrics.span_f1(prediction, answers) == pytest.approx(want)


# Published with the script that Dua et al. (2019) evaluate with, in the form
# for its optimal matching: allennlp, tests/tools/drop_eval_test.py.
CAT = ['the', 'fat', 'cat', 'the fat', 'fat cat', 'the fat cat']
PUBLISHED = [
    (['78'], ['78.0'], 1, 1),
    (['td'], ['td', 'td'], 0, 0.5),
    ('td', ['td', 'td'], 0, 0.5),
    (['td', 'td'], ['td'], 0, 0.5),
    (['td', 'td'], 'td', 0, 0.5),
    (CAT, ['cat'], 0, 0.17),
    (['cat'], CAT, 0, 0.17),
    (CAT, ['cat', 'cat dog'], 0, 0.25),
    (['td'], ['the td'], 1, 1),
    (['the a NOT an ARTICLE the an a'], ['NOT ARTICLE'], 1, 1),
    (['John Elton'], ['Elton John'], 0, 1),
    (['50 yard'], ['yard 50'], 0, 1),
    (['Per.i.o.d....'], ['.P....e.r,,i;;;o...d,,'], 1, 1),
    (['Spa     c  e   s     '], ['    Spa c     e s'], 1, 1),
    (['78-yard'], ['78 yard'], 1, 1),
    (['78 yard'], ['78-yard'], 1, 1),
    (['78'], ['78-yard'], 0, 0.67),
    (['78-yard'], ['78'], 0, 0.67),
    (['This was a triumph'], ['tHIS Was A TRIUMPH'], 1, 1),
    (['Green bay', 'packers'], ['Green bay', 'packers'], 1, 1),
    ([''], ['army'], 0, 0),
    (['packers'], ['Green bay packers'], 0, 0.5),
    (['packers'], ['Green bay'], 0, 0),
    (['yard'], ['36 yard td'], 0, 0),
    (['23 yards'], ['43 yards'], 0, 0),
    (['56 yards'], ['56 yd'], 0, 0.5),
    (['26'], ['26 yard td'], 0, 0.5),
    (['78-yard', '56', '28', '40', '44', 'touchdown'],
     ['78-yard', '56 yard', '1 yard touchdown'], 0, 0.28),
    (['23', '23 yard'], ['23-yard', '56 yards'], 0, 0.5),
    (['John Karman', 'Joe Hardy'], ['Joe Karman', 'John Hardy'], 0, 0.5),
    (['ottoman', 'Kantakouzenous'], ['ottoman', 'army of Kantakouzenous'],
     0, 0.75),
    (['a'], ['a', 'b'], 0, 0.5),
    (['b'], ['a', 'b'], 0, 0.5),
    (['b'], ['b', 'a'], 0, 0.5),
]

BY_HAND = [
    (['New-York'], ['new york'], 1, 1),
    (['New York, N.Y.'], ['New York NY'], 1, 1),
    (['packers', 'Green Bay'], ['Green Bay', 'packers'], 1, 1),
    ([], ['army'], 0, 0),
    (['$1,500'], ['1500.0'], 1, 1),
    (['1.5'], ['15'], 0, 0),  # a number keeps its point
    (['  1.2e1 yards '], ['12 yards'], 1, 1),
    (['3 of 4'], ['4 of 5'], 0, 0.67),  # one of the numbers is enough: 4/6
    (['36 yards'], ['yards'], 0, 0.67),  # numbers of the prediction: no matter
    (['very very good'], ['very good'], 0, 1),  # sets: unlike SQuAD's F1
    # Taken in turn, 'x y' would pair with 'x y z', 4/5, and leave 'y z' none.
    (['x y z', 'x'], ['x y', 'y z'], 0, 0.73),  # (2/3 + 4/5) / 2
    # Half of 2 (1 3/5) / (1 + 3/5) is 0.37499999999999994 in float64, not 3/8.
    (['x y z'], ['x y z u v', 'w'], 0, 0.37),
]


@pytest.mark.parametrize('prediction, answer, match, f1', PUBLISHED + BY_HAND)
def test_drop(prediction, answer, match, f1):
  assert metrics.drop_metrics(prediction, [answer]) == (match, f1)


@pytest.mark.parametrize('prediction, answers, want', [
    # The first four are published, as above.
    ('1', [['1'], ['0']], (1, 1)),
    ('17 August', [['17 August '], ['August'], ['17']], (1, 1)),
    ('span1', [['span1', 'span2'], ['span2']], (0, 0.5)),
    ('answer', [['answer1'], ['answer2']], (0, 0)),
    ('b a', [['x'], ['a b'], 'b'], (1, 1)),
    ('', [[' '], ['x']], (0, 0)),
    ('', [''], (0, 0)),
])
def test_drop_takes_the_best_of_the_answers(prediction, answers, want):
  assert metrics.drop_metrics(prediction, answers) == want


@pytest.mark.parametrize(
    'metric', [metrics.exact_match, metrics.span_f1, metrics.drop_metrics])
@pytest.mark.parametrize('answers', [[], 'Denver', ''])
def test_answers_have_to_be_a_list(metric, answers):
  with pytest.raises(ValueError, match='answers .*list'):
    metric('Denver', answers)


def test_a_drop_answer_has_spans():
  with pytest.raises(ValueError, match='spans'):
    metrics.drop_metrics('Denver', [['Denver'], []])
