"""Scores of candidates and objectives: against torch, one text at a time."""

import copy
import dataclasses
import functools
import re

from conftest import WORDS
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')

import families  # noqa: E402
from families import torch_sums  # noqa: E402
import transformers  # noqa: E402

import mezo_jax  # noqa: E402
from mezo_jax import models  # noqa: E402
from mezo_jax.directions import noise  # noqa: E402
from mezo_jax.tasks import evaluate, metrics, score, Task  # noqa: E402
from mezo_jax.tasks.encode import batch_of, encode  # noqa: E402
from mezo_jax.transforms import losses  # noqa: E402

pytestmark = pytest.mark.torch


def make_rows(count):
  """Texts of 5 to 9 words; 2 to 4 choices of 1 to 5 words, two that start
  alike."""
  rng, rows = np.random.RandomState(1), []
  say = lambda n: ' '.join(rng.choice(WORDS, n))
  for i in range(count):
    choices = [say(rng.randint(1, 5)) for _ in range(rng.randint(1, 4))]
    choices.append(choices[0] + ' fun')
    rows.append(dict(
        text=say(rng.randint(5, 10)), other=say(3), label=i % 3,
        choices=choices, right=[len(choices) - 1, 0], answers=[say(2)]))
  return rows


ROWS = make_rows(6)
ONE = Task(template='{text} It was',
           label_words=(' terrible', ' great', ' good', ' plot'))
SEVERAL = Task(template='{text} It was',
               label_words=(' terrible', ' great', ' a warm film'))
CHOICE = Task(kind='multiple_choice', template='{text} It was',
              label_column='right')
ANSWER = Task(kind='generation', template='{text} It was', stop=' plot',
              max_new_tokens=6)


@pytest.fixture(scope='session')
def tokenizer(tiny_dir):
  tokenizer = models.load_tokenizer(tiny_dir)
  tokenizer.add_special_tokens({'mask_token': '<mask>'})
  return tokenizer


@pytest.fixture(scope='session')
def both(tmp_path_factory):
  """``both(family, switch) -> (torch model, ours, its params)``, each once."""
  @functools.cache
  def get(family, switch='as released'):
    reference = families.torch_model(family, switch)
    directory = tmp_path_factory.mktemp('scored') / family
    reference.save_pretrained(directory)
    return reference, *models.load(directory, progress=False)
  return get


def torch_scores(reference, tokenizer, task, rows=ROWS):
  """Of each row, the length-normalised scores of its candidates."""
  return [np.divide(*torch_sums(reference, tokenizer, task.prompt(row),
                                task.candidates(row))) for row in rows]


def batched(task, tokenizer, rows=ROWS, pad_to=None, **kwargs):
  data = encode(task, rows, tokenizer, 60, **kwargs)
  length = int(data.lengths.max()) + 3
  return data, batch_of(
      data, np.arange(len(rows)), length, pad_to or len(rows))


def our_scores(model, params, data, batch):
  likely = helpers.quick_jit(lambda params, batch: score.log_likelihoods(
      model, params, batch, data.form))
  sums, counts = map(np.asarray, likely(params, batch))
  return sums, counts, np.asarray(score.scores(sums, counts))


# --- scores -----------------------------------------------------------------


@pytest.mark.exhaustive_except(family=['gpt2', 'gemma3_text'])
@pytest.mark.parametrize('family,switch,task', [
    ('gpt2', 'as released', ONE), ('gpt2', 'as released', SEVERAL),
    ('opt', '350M', CHOICE), ('mistral', 'window', CHOICE),
    ('gemma3_text', 'caps', CHOICE)])
def test_candidates_laid_out(family, switch, task, both, tokenizer):
  """Also with a window of 5 tokens, which candidates lie outside of, and in a
  row of more tokens than the model's 64 positions."""
  reference, model, params = both(family, switch)
  long = dict(ROWS[0], text='the film ' * 19, choices=[
      f'a {word} plot ' * 4 for word in ('fun', 'dull', 'bad')])
  rows = [*ROWS, long]
  data, batch = batched(task, tokenizer, rows, write_out=True)
  assert task is not CHOICE or data.lengths[-1] > 64
  sums, counts, scores = our_scores(model, params, data, batch)
  for r, row in enumerate(rows):
    want, tokens = torch_sums(
        reference, tokenizer, task.prompt(row), task.candidates(row))
    n = len(want)
    assert counts[r].tolist() == tokens.tolist() + [0] * (data.width - n)
    np.testing.assert_allclose(sums[r, :n], want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        scores[r, :n], want / tokens, rtol=1e-4, atol=1e-4)
    assert (scores[r, n:] < -1e20).all()  # never chosen


@pytest.mark.parametrize('family', ['roberta', 'bert'])
def test_label_words_at_a_mask(family, both, tokenizer):
  reference, model, params = both(family)
  task = Task(template='{text} It was {mask} the', label_words=ONE.label_words)
  data, batch = batched(task, tokenizer, causal=False)
  sums, _, _ = our_scores(model, params, data, batch)
  words = tokenizer.convert_tokens_to_ids(['terrible', 'great', 'good', 'plot'])
  for r, row in enumerate(ROWS):
    ids = tokenizer(f'{row["text"]} It was <mask> the')['input_ids']
    with torch.no_grad():
      logits = reference(torch.tensor([ids])).logits[0, -2].numpy()
    np.testing.assert_allclose(sums[r], logits[words], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('family,base,dense,out', [
    ('roberta', 'roberta', 'classifier.dense', 'classifier.out_proj'),
    ('bert', 'bert', 'bert.pooler.dense', 'classifier'),
    ('gpt2', 'transformer', '', 'score'), ('opt', 'model', '', 'score')])
def test_heads_are_those_of_transformers(
    family, base, dense, out, both, tokenizer):
  reference, model, params = both(family)
  reference.config.num_labels = 3
  theirs = transformers.AutoModelForSequenceClassification.from_config(
      reference.config).eval()
  getattr(theirs, base).load_state_dict(
      getattr(reference, base).state_dict(), strict=False)
  classifier = {}
  for ours, name in (('dense', dense), ('out', out)):
    if name:
      layer = theirs.get_submodule(name)
      with torch.no_grad():
        for x in layer.parameters():
          x.copy_(torch.randn_like(x))
      classifier[ours] = {k: v.detach().numpy().T for k, v in (
          ('kernel', layer.weight), ('bias', layer.bias)) if v is not None}
  texts = lambda row: [row['text']]
  task = Task(kind='head', template='{text}', label_names=('a', 'b', 'c'))
  if family == 'bert':  # which tells the texts of a pair apart
    tokenizer = copy.copy(tokenizer)
    tokenizer.model_input_names = ['input_ids', 'token_type_ids']
    texts = lambda row: [row['text'], row['other']]
    task.template = '{text}{sep}{other}'
  data, batch = batched(task, tokenizer, causal=model.config.causal)
  got, _, _ = our_scores(
      model, params | {'classifier': classifier}, data, batch)
  for r, row in enumerate(ROWS):
    with torch.no_grad():
      want = theirs(**tokenizer(*texts(row), return_tensors='pt')).logits[0]
    np.testing.assert_allclose(got[r], want, rtol=1e-4, atol=1e-4)
  if family == 'bert':
    assert batch['token_type_ids'].sum() == 3 * len(ROWS)


def test_a_cache_of_the_prompt_changes_nothing(both, tokenizer):
  """Each option after a prompt that ran once, against all of them packed."""
  _, model, params = both('mistral', 'window')
  data = encode(CHOICE, ROWS, tokenizer, 60)
  data = data._replace(scored=[  # as if first tokens were the prompt's
      [range(min(1, len(ids) - 1), len(ids)) for ids in some]
      for some in data.candidates])
  batch = batch_of(data, np.arange(6), int(data.lengths.max()), 6)
  sums, counts, _ = our_scores(model, params, data, batch)
  (prompt, *_), (options, *_) = data.prompts, data.candidates
  c, n, k = len(options), len(prompt), max(map(len, options))
  apply = helpers.quick_jit(model.apply)
  cache = models.make_cache(model.config, c, n + k, jnp.float32)
  first, cache = apply(
      {'params': params}, np.array([prompt] * c), cache=cache)
  padded = np.array([ids + [0] * (k - len(ids)) for ids in options])
  then, _ = apply({'params': params}, padded, cache=cache)
  log_p = jax.nn.log_softmax(jnp.concatenate([first[:, -1:], then], 1))
  want = [sum([log_p[i, j, t] for j, t in enumerate(ids)][-int(scored):])
          for i, (ids, scored) in enumerate(zip(options, counts[0]))]
  np.testing.assert_allclose(sums[0, :c], want, rtol=1e-4, atol=1e-4)


# --- what is computed -------------------------------------------------------


def test_a_prompt_occurs_once(tokenizer):
  for task, kwargs in ((CHOICE, {}), (SEVERAL, {}), (ONE, {}),
                       (CHOICE, dict(gold_only=True))):
    data, batch = batched(task, tokenizer, pad_to=8, **kwargs)
    for r, row in enumerate(ROWS):
      prompt = tokenizer(task.prompt(row))['input_ids']
      answers = [] if task is ONE else [task.gold_text(row)] if (
          kwargs) else task.candidates(row)
      want = prompt + [t for a in answers for t in tokenizer(a)['input_ids']]
      texts = [1] * len(prompt) + [
          c + 2 for c, a in enumerate(answers) for _ in a.split()]
      n = len(want)
      assert batch['input_ids'][r, :n].tolist() == want
      assert batch['attention_mask'][r, :n].tolist() == texts
      assert not batch['attention_mask'][r, n:].any()
    assert batch['input_ids'].shape == (8, data.lengths.max() + 3)
    assert batch['weight'].tolist() == [1] * 6 + [0] * 2


@pytest.mark.parametrize('task,objective', [
    (ONE, 'cross_entropy'), (SEVERAL, 'cross_entropy'), (CHOICE, 'lm'),
    (CHOICE, 'accuracy'), (ONE, lambda predictions, rows: 0)])
def test_no_logits_over_all_positions(task, objective, both, tokenizer):
  """[batch, sequence, vocabulary] never exists, in float or otherwise."""
  _, model, params = both('gpt2')
  data, batch = batched(task, tokenizer, gold_only=objective == 'lm')
  b, s = batch['input_ids'].shape
  assert data.width != s != batch['answer_at'].shape[1]
  def arrays(fn):
    found = re.findall(
        r'\w+\[([\d,]+)\]', str(jax.make_jaxpr(fn)(params, batch)))
    return [tuple(map(int, shape.split(','))) for shape in found]
  seen = arrays(score.make_loss_fn(model, data, task, objective))
  assert not [x for x in seen if np.prod(x) >= b * s * 320]
  whole = lambda params, batch: model.apply(
      {'params': params}, batch['input_ids'])
  assert (b, s, 320) in arrays(whole)


# --- objectives -------------------------------------------------------------


def values_of(model, params, data, batch, task, objectives, tokenizer=None):
  fns = [score.make_loss_fn(model, data, task, o, tokenizer)
         for o in objectives]
  return helpers.quick_jit(
      lambda params, batch: [losses.mean(fn(params, batch)) for fn in fns])(
          params, batch)


@pytest.mark.parametrize('task,write_out', [
    (ONE, False), (ONE, True), (CHOICE, False)])
def test_objectives_over_candidates(task, write_out, both, tokenizer):
  """Some rows in another order, and padding full of rubbish after them."""
  reference, *ours = both('gpt2')
  calls, order = [], np.array([4, 1, 5, 3, 0])
  def objective(predictions, examples):
    calls.append((predictions, examples))
    return 12.5
  data = encode(task, ROWS, tokenizer, 60, write_out=write_out)
  batch = batch_of(data, order, int(data.lengths.max()), 8)
  batch['input_ids'][5:] = 5
  batch['label'][5:] = 1
  batch['gold'][5:] = True
  rows = [ROWS[i] for i in order]
  scores = torch_scores(reference, tokenizer, task, rows)
  golds = [task.golds(row) for row in rows]
  said, labels = [int(s.argmax()) for s in scores], [g[0] for g in golds]
  right = [p in g for p, g in zip(said, golds)]
  nll = [np.log(np.exp(s).sum()) - s[label]
         for s, label in zip(scores, labels)]
  macro = metrics.macro_f1(said, labels)
  assert 0 < np.mean(right) < 1 and 0 < macro < 1
  assert task is CHOICE or len({*said, *labels}) < data.width
  got = values_of(*ours, data, batch, task, (
      'cross_entropy', 'accuracy', 'f1', objective))
  assert {(x.dtype.name, x.shape) for x in got} == {('float32', ())}
  np.testing.assert_allclose(
      got, [np.mean(nll), -np.mean(right), -macro, -12.5], rtol=1e-4)
  ((predictions, examples),) = calls
  assert predictions == said and examples == rows
  assert all(isinstance(p, int) for p in predictions)


def test_the_lm_objective_is_a_mean_over_tokens(both, tokenizer):
  """Of right answers, with their stop if they are to be generated."""
  reference, *ours = both('gpt2')
  for task in (CHOICE, ANSWER):
    data, batch = batched(task, tokenizer, pad_to=8, gold_only=True)
    pairs = [torch_sums(reference, tokenizer, task.prompt(row),
                        [task.gold_text(row)]) for row in ROWS]
    sums, counts = (np.concatenate(x) for x in zip(*pairs))
    want = -sums.sum() / counts.sum()
    (got,) = values_of(*ours, data, batch, task, ['lm'])
    np.testing.assert_allclose(got, want, rtol=1e-4)
    if task is CHOICE:  # whose answers are not all of one length
      assert abs(want + np.mean(sums / counts)) > 1e-2
  report, scores = evaluate.make_evaluator(
      ours[0], task, data, tokenizer, evaluate.Sizes((60,)),
      helpers.mesh_of(1, 1))(ours[1])
  assert report == {'loss': pytest.approx(want, rel=1e-4), 'count': 6}
  assert scores is None


def test_a_function_of_predictions_in_a_step(both, tokenizer):
  """Each of the two evaluations sees what displaced weights would predict."""
  _, model, params = both('gpt2')
  data, batch = batched(SEVERAL, tokenizer, pad_to=8)
  calls, eps, mask = [], 0.3, 'embed/|mlp/up/kernel'
  def objective(predictions, examples):
    calls.append((predictions, examples))
    return sum((i + 1) * p for i, p in enumerate(predictions))
  loss_fn = score.make_loss_fn(model, data, SEVERAL, objective)
  directions = mezo_jax.Normal(mask=mask)
  tx = mezo_jax.mezo(1e-3, eps, key=3, directions=directions)
  state = tx.init(params)
  step = helpers.quick_jit(lambda state, params, batch: tx.update(
      None, state, params, value_fn=loss_fn, batch=batch)[1])
  spsa = jax.block_until_ready(step(state, params, batch))[0]
  key, wanted = noise.direction_key(state[0].key, 0, 0), []
  def predict(params, batch, c):
    moved = mezo_jax.displace(
        params, mezo_jax.Displacement(key, c), directions)
    return score.scores(*score.log_likelihoods(
        model, moved, batch, data.form)).argmax(-1)[:6]
  predict = helpers.quick_jit(predict)
  for sign, (predictions, examples) in zip((1, -1), calls, strict=True):
    assert predictions == predict(params, batch, sign * eps).tolist()
    assert examples == ROWS
    wanted.append(-sum((i + 1) * p for i, p in enumerate(predictions)))
  assert wanted[0] != wanted[1]
  assert spsa.value == np.mean(wanted)
  np.testing.assert_allclose(
      spsa.projected_grad, (wanted[0] - wanted[1]) / (2 * eps), rtol=1e-6)


def test_objectives_over_generated_text(both, tokenizer):
  """Greedy answers of transformers, a prompt at a time, up to the stop."""
  reference, *ours = both('gpt2')
  tokenizer = copy.deepcopy(tokenizer)  # with a word for every token
  tokenizer.add_tokens([f'w{i}' for i in range(len(tokenizer), 320)])
  answers = []
  for row in ROWS:
    ids = tokenizer(ANSWER.prompt(row), return_tensors='pt')['input_ids']
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False,
        max_new_tokens=6, pad_token_id=0, eos_token_id=319)[0, ids.shape[1]:]
    answers.append(tokenizer.convert_ids_to_tokens(out.tolist()))
  stop = answers[1][4]
  answers = [a[:a.index(stop)] if stop in a else a for a in answers]
  assert {4, 6} <= {*map(len, answers)}
  rows = [row | {'answers': ['none', ' '.join(a[:r] + a[2 * r:])]}
          for r, (row, a) in enumerate(zip(ROWS, answers))]
  task = dataclasses.replace(ANSWER, stop=f' {stop}')
  texts = [' '.join(a) for a in answers]
  f1 = np.mean([metrics.span_f1(t, r['answers']) for t, r in zip(texts, rows)])
  match = np.mean([t == r['answers'][1] for t, r in zip(texts, rows)])
  assert 0 < match < f1 < 1
  data, batch = batched(task, tokenizer, rows, pad_to=8)
  calls = []
  objective = lambda *args: calls.append(args) or 3
  got = values_of(*ours, data, batch, task, ('f1', 'accuracy', objective),
                  tokenizer)
  np.testing.assert_allclose(got, [-f1, -match, -3], rtol=1e-6)
  assert calls == [(texts, rows)]
  report, said = evaluate.make_evaluator(
      ours[0], task, data, tokenizer, evaluate.Sizes((30,), rows=4),
      helpers.mesh_of(1, 1))(ours[1])
  assert (report['f1'], report['count'], said) == (pytest.approx(f1), 6, texts)
  assert report['exact_match'] == pytest.approx(match)


# --- evaluation -------------------------------------------------------------


def test_surface_form_calibration_subtracts_sums(both, tokenizer):
  reference, model, params = both('gpt2')
  task = dataclasses.replace(CHOICE, calibration='{prior}')
  rows = [row | {'prior': 'It was' if i % 2 else ''}
          for i, row in enumerate(ROWS)]
  data = encode(task, rows, tokenizer, 60)
  prior = encode(task, rows, tokenizer, 60,
                 prompts=[task.prior(r) for r in rows])
  report, scores = evaluate.make_evaluator(
      model, task, data, tokenizer, evaluate.Sizes((60,)),
      helpers.mesh_of(1, 1), prior)(params)
  want = []
  for row in rows:  # this tokenizer's token to start from is its first
    sums = [torch_sums(reference, tokenizer, prompt, task.candidates(row))[0]
            for prompt in (task.prompt(row), row['prior'] or '<unk>')]
    want.append(sums[0] - sums[1])
  for got, row in zip(scores, want):
    np.testing.assert_allclose(got[:len(row)], row, rtol=1e-4, atol=1e-3)
    assert (got[len(row):] < -1e20).all()
  right = [s.argmax() in task.golds(row) for s, row in zip(want, rows)]
  assert 0 < report['accuracy'] == np.mean(right) < 1
