"""Prompts, answers, scores: against sums written out by hand."""

import functools

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mezo_jax import models
from mezo_jax.tasks import classification

ROWS = [{'text': 'a dull film', 'label': 0}, {'text': ' good fun ', 'label': 1},
        {'text': 'the warm story was fun', 'label': 1}]
ONE = classification.Classification()
TWO = classification.Classification(
    label_words=(' terrible', ' great fun', ' a warm film'))


@pytest.fixture(scope='module')
def loaded(tiny_dir):
  return (*models.load(tiny_dir), models.load_tokenizer(tiny_dir))


compiled = functools.cache(lambda model: jax.jit(model.apply))


def log_likelihood(model, params, tokenizer, prompt, answer):
  """Mean log-probability of the answer's tokens, one sequence, no padding."""
  ids = tokenizer(prompt + answer)['input_ids']
  n = len(ids) - len(tokenizer(prompt)['input_ids'])
  log_p = jax.nn.log_softmax(
      compiled(model)({'params': params}, np.array([ids])))
  return float(np.mean([log_p[0, i - 1, ids[i]]
                        for i in range(len(ids) - n, len(ids))]))


def reference(loaded, task):
  return np.array([[log_likelihood(*loaded, task.prompt(row), word)
                    for word in task.label_words] for row in ROWS])


def ours(loaded, task, **kwargs):
  model, params, tokenizer = loaded
  data = classification.encode(task, ROWS, tokenizer, 64, **kwargs)
  batch = classification.batch_of(data, np.arange(3), 16, 4)
  scores = classification.scores(model, params, batch, data.token_ids)
  return data, batch, np.asarray(scores)[:3]


def test_prompts():
  assert ONE.prompt(ROWS[1]) == 'good fun It was'
  pair = classification.Classification('{premise}\n{hypothesis}?')
  assert pair.prompt({'premise': 'p ', 'hypothesis': 'h'}) == 'p\nh?'


def test_one_token_answers_share_one_forward(loaded):
  data, batch, got = ours(loaded, ONE)
  assert data.token_ids is not None and batch['input_ids'].shape == (4, 1, 16)
  want = reference(loaded, ONE)
  np.testing.assert_allclose(
      got - got[:, :1], want - want[:, :1], rtol=1e-4, atol=1e-5)


def test_candidates_written_out_give_the_paper_s_scores(loaded):
  for task in (ONE, TWO):
    _, _, got = ours(loaded, task, pad_to_candidates=True)
    np.testing.assert_allclose(
        got, reference(loaded, task), rtol=1e-4, atol=1e-5)


def test_longer_answers_are_length_normalised(loaded):
  data, batch, got = ours(loaded, TWO)
  assert data.token_ids is None and batch['input_ids'].shape == (4, 3, 16)
  assert data.answers == [[1, 2, 3]] * 3
  np.testing.assert_allclose(got, reference(loaded, TWO), rtol=1e-4, atol=1e-5)


def test_the_loss_is_cross_entropy_over_candidates_without_padding(loaded):
  model, params, _ = loaded
  for task in (ONE, TWO):
    data, batch, _ = ours(loaded, task)
    loss = classification.make_loss_fn(model, data.token_ids)(params, batch)
    scores = reference(loaded, task)
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    labels = [row['label'] for row in ROWS]
    np.testing.assert_allclose(loss, -log_p[range(3), labels].mean(), rtol=1e-4)


def test_no_logits_over_all_positions(loaded):
  """Law 9: [batch, sequence, vocabulary] never exists."""
  model, params, _ = loaded
  for task in (ONE, TWO):
    data, batch, _ = ours(loaded, task)
    jaxpr = str(jax.make_jaxpr(classification.make_loss_fn(
        model, data.token_ids))(params, batch))
    rows = batch['input_ids'].shape[0] * batch['input_ids'].shape[1]
    assert f'f32[{rows},16,300]' not in jaxpr


def test_long_prompts_keep_their_end(tiny_dir):
  tokenizer = models.load_tokenizer(tiny_dir)
  rows = [{'text': ' '.join(conftest.WORDS), 'label': 1}, ROWS[0]]
  data = classification.encode(ONE, rows, tokenizer, 8)
  assert data.truncated == 1
  whole = tokenizer(ONE.prompt(rows[0]))['input_ids']
  assert data.sequences[0][0] == whole[-7:]
  assert max(data.lengths) <= 8


def test_the_bos_token_survives_truncation():
  assert classification._keep_end([1, 5, 6, 7, 8], 3, bos=1) == [1, 7, 8]
  assert classification._keep_end([4, 5, 6, 7, 8], 3, bos=1) == [6, 7, 8]


def test_label_names():
  task = classification.Classification(
      label_names=('neg', 'pos'), label_column='mood')
  assert task.label({'mood': 'pos'}) == 1
  assert task.label({'mood': '0'}) == 0


@pytest.mark.parametrize('rows,message', [
    ([{'sentence': 'a', 'label': 0}], r"names column 'text'.*sentence.*"
     'config.task.template'),
    ([{'text': 'a'}], "no column 'label' but"),
    ([{'text': 'a', 'label': 2}], 'label 2 is neither an integer below 2'),
    ([{'text': 'a', 'label': 'x'}], "label 'x' is neither"),
    ([], 'no rows')])
def test_rows_that_do_not_fit(tiny_dir, rows, message):
  with pytest.raises(ValueError, match=message):
    classification.encode(ONE, rows, models.load_tokenizer(tiny_dir), 64)


def test_label_words_that_are_the_same_tokens(tiny_dir):
  task = classification.Classification(label_words=(' no', ' yes'))
  with pytest.raises(ValueError, match='are the same tokens'):
    classification.encode(task, ROWS, models.load_tokenizer(tiny_dir), 64)


def test_weights_of_padding_are_zero(loaded):
  _, batch, _ = ours(loaded, ONE)
  assert batch['weight'].tolist() == [1, 1, 1, 0]
  model, params, _ = loaded
  loss_fn = classification.make_loss_fn(model, jnp.array([2, 3]))
  changed = {**batch, 'label': np.array([0, 1, 1, 1], np.int32)}
  assert loss_fn(params, batch) == loss_fn(params, changed)
