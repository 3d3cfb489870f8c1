"""Backpropagation, linear probing, demonstrations, objectives, suites: through
train.py, and against what they are by definition."""

import json
import os
import subprocess
import sys

import conftest
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import small_config

from mezo_jax import backprop, baselines, models, peft
from mezo_jax import config as config_lib
from mezo_jax.export import export
from mezo_jax.tasks import Task
import train

PARAMS = {'a': jnp.array([1.0, 2.0]), 'b': {'c': jnp.array([3.0])}}


def quadratic(params, x):
  a, c = params['a'], params['b']['c']
  return jnp.mean(jnp.sum((a - x) ** 2, -1) + jnp.sum(c * a[:1]) * x[:, 0])


X = jnp.arange(8.0).reshape(4, 2)


# --- backprop ---------------------------------------------------------------


@pytest.mark.parametrize('parts', [1, 2, 4])
def test_backprop_is_the_optimizer_on_the_gradient(parts):
  inner = optax.adam(1e-2)
  tx = optax.chain(
      backprop.backprop(micro_batches=parts, equal_parts=True), inner)
  params, theirs = PARAMS, PARAMS
  state, other = tx.init(params), inner.init(theirs)
  for _ in range(3):
    updates, state = tx.update(None, state, params, value_fn=quadratic, x=X)
    value, grads = jax.value_and_grad(quadratic)(theirs, X)
    steps, other = inner.update(grads, other, theirs)
    np.testing.assert_allclose(state[0].value, value, rtol=1e-6)
    np.testing.assert_allclose(
        state[0].grad_norm, optax.global_norm(grads), rtol=1e-6)
    params = optax.apply_updates(params, updates)
    theirs = optax.apply_updates(theirs, steps)
  helpers.assert_close(params, theirs)
  assert state[0].count == 3


def test_backprop_trains_what_the_mask_selects_and_keeps_no_state_of_others():
  tx = optax.chain(backprop.backprop(), optax.adam(1e-2))
  trainable, frozen = peft.split(PARAMS, '^b/')
  state = tx.init(trainable)
  sizes = [x.size for x in jax.tree.leaves(state[1]) if x.ndim]
  assert sizes == [1, 1]
  updates, _ = tx.update(
      None, state, trainable, x=X,
      value_fn=lambda p, x: quadratic(peft.join(p, frozen), x))
  assert updates.keys() == {'b'} and updates['b']['c'].all()


def test_backprop_refuses_updates_of_others():
  tx = backprop.backprop()
  with pytest.raises(ValueError, match='makes its own updates'):
    tx.update(PARAMS, tx.init(PARAMS), PARAMS, value_fn=quadratic, x=X)


# --- linear probe -----------------------------------------------------------


@pytest.mark.parametrize('classes,bias', [(2, False), (2, True), (3, True)])
def test_a_probe_written_into_the_head_scores_as_the_probe(classes, bias):
  rng = np.random.RandomState(0)
  labels = np.arange(60) % classes
  x = (rng.randn(60, 8) + 2 * np.eye(8)[labels]).astype(np.float32)
  probe = baselines.fit_probe(x, labels, bias)
  scores = baselines.probe_scores(probe, x, classes)
  np.testing.assert_array_equal(scores.argmax(1), probe.predict(x))
  log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
  np.testing.assert_allclose(np.exp(log_p), probe.predict_proba(x), rtol=1e-5)
  ids = np.array([7, 2, 5])[:classes]
  params = baselines.write_probe(
      {'lm_head': {'embedding': jnp.zeros((9, 8))},
       'head': {'bias': jnp.zeros(9)}}, probe, ids)
  logits = x @ params['lm_head']['embedding'][ids].T + params['head']['bias'][
      ids]
  np.testing.assert_allclose(logits, scores, rtol=1e-4, atol=1e-5)


def test_an_untied_model_is_the_same_model(tiny_dir, tmp_path):
  model, params = models.load(tiny_dir, progress=False)
  ids = np.arange(12).reshape(2, 6)
  free, separate = peft.untie(model, params)
  assert not free.config.tied_head and model.config.tied_head
  np.testing.assert_array_equal(
      jax.jit(model.apply)({'params': params}, ids),
      jax.jit(free.apply)({'params': separate}, ids))
  models.save(tmp_path / 'm', free, separate, progress=False)
  again, loaded = models.load(tmp_path / 'm', progress=False)
  assert not again.config.tied_head
  helpers.assert_bitwise(loaded, separate)


# --- methods, through train.py ----------------------------------------------


def moved(tiny_dir, workdir, untied=False):
  """The paths of the leaves that training changed."""
  model, before = models.load(tiny_dir, progress=False)
  if untied:
    model, before = peft.untie(model, before)
  export(workdir, workdir / 'export')
  _, after = models.load(workdir / 'export', progress=False)
  flat = lambda t: {jax.tree_util.keystr(p, simple=True, separator='/'): x
                    for p, x in jax.tree_util.tree_flatten_with_path(t)[0]}
  before, after = flat(before), flat(after)
  assert before.keys() == after.keys()
  return {p for p in before if (before[p] != after[p]).any()}


def train_losses(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line)['loss'] for line in lines if '"train"' in line]


def test_finetune_learns(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, method='finetune', steps=40,
                        eval_every=20, optimizer__learning_rate=3e-3,
                        model__remat=True, optimizer__micro_batches=1)
  result = train.run(config, tmp_path)
  assert result['forwards'] == 40
  losses = train_losses(tmp_path)
  assert len(losses) == 40 and np.mean(losses[-10:]) < 0.4 < losses[0]
  assert len(moved(tiny_dir, tmp_path)) > 10


def test_a_finetuning_run_resumes(tiny_dir, reviews_file, tmp_path):
  settings = dict(method='finetune', optimizer__learning_rate=1e-3)
  for steps, where in ((3, 'a'), (6, 'a'), (6, 'b')):
    config = small_config(tiny_dir, reviews_file, steps=steps, **settings)
    train.run(config, tmp_path / where)
  one, two = ((tmp_path / w / 'result.json').read_text() for w in 'ab')
  assert json.loads(one)['final'] == json.loads(two)['final']


def test_head_only_trains_a_head_of_its_own(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, method='head_only',
                        optimizer__learning_rate=1e-2)
  train.run(config, tmp_path)
  assert moved(tiny_dir, tmp_path, untied=True) == {'lm_head/embedding'}


def test_mezo_from_the_linear_probe_on(tiny_dir, reviews_file, tmp_path):
  settings = dict(data__num_train=40)
  probe = train.run(small_config(
      tiny_dir, reviews_file, method='linear_probe', **settings),
                    tmp_path / 'lp')
  config = small_config(tiny_dir, reviews_file, method='lp_mezo', **settings)
  result = train.run(config, tmp_path / 'mezo')
  # It starts where the probe ends.
  assert result['zero_shot']['accuracy'] == probe['final']['accuracy']
  assert probe['steps'] == probe['forwards'] == 0


@pytest.mark.parametrize('method,calibration', [
    ('zero_shot', ''), ('zero_shot', 'sfc'), ('icl', ''), ('icl', 'icl_sfc')])
def test_methods_without_a_step(tiny_dir, reviews_file, tmp_path, method,
                                calibration):
  config = small_config(tiny_dir, reviews_file, method=method, num_demos=3,
                        calibration=calibration, task__calibration='It was')
  result = train.run(config, tmp_path)
  assert result['final']['count'] == 40 and result['steps'] == 0
  assert ('calibrated_accuracy' in result['final']) == (method == 'zero_shot')
  assert result['peak_memory'] > 1e8 and result['seconds'] > 0


@pytest.mark.parametrize('objective', [
    'lm', 'accuracy', 'f1', lambda predictions, examples: float(np.mean(
        [p == e['label'] for p, e in zip(predictions, examples)]))])
def test_objectives_run(tiny_dir, reviews_file, tmp_path, objective):
  config = small_config(tiny_dir, reviews_file, objective=objective,
                        optimizer__eps=1e-1)
  result = train.run(config, tmp_path)
  assert result['final']['count'] == 40
  assert config_lib.to_json(config)['objective']


def test_generation_is_trained_and_measured(tiny_dir, tmp_path):
  rows = [{'question': f'{a} {b}', 'answers': [b, f'the {b}']}
          for a in conftest.WORDS[:8] for b in conftest.WORDS[8:]]
  data = tmp_path / 'qa.jsonl'
  data.write_text('\n'.join(map(json.dumps, rows)))
  task = Task(kind='generation', template='{question} It was', stop='the',
              max_new_tokens=3)
  for objective, select in (('lm', 'loss'), ('f1', 'metric')):
    config = small_config(tiny_dir, data, data__num_train=32, data__num_dev=8,
                          data__num_test=16, objective=objective, select=select,
                          steps=2, eval_every=1)
    config.task = task
    result = train.run(config, tmp_path / objective)
    assert {'f1', 'exact_match', 'drop_f1'} <= result['final'].keys()
  assert all(-1 <= loss <= 0 for loss in train_losses(tmp_path / 'f1'))


def test_a_head_for_classes_without_a_prompt(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, method='finetune', steps=40,
                        eval_every=40, optimizer__learning_rate=3e-3)
  config.task = Task(kind='head', template='{text}',
                     label_names=('bad', 'good'), metric='matthews')
  result = train.run(config, tmp_path)
  assert -1 <= result['final']['matthews'] <= 1
  assert np.mean(train_losses(tmp_path)[-10:]) < 0.4
  with pytest.raises(ValueError, match='classification head'):
    export(tmp_path, tmp_path / 'export')


@pytest.mark.parametrize('changes,message', [
    (dict(method='magic'), "method 'magic' is none of"),
    (dict(objective='accuracy', method='finetune'), 'has no derivative'),
    (dict(objective='bleu'), "objective 'bleu' does not fit"),
    (dict(calibration='sfc'), 'needs task.calibration'),
    (dict(calibration='sfc', task__calibration='', task__template='{text}{mask}'
          ), 'that a causal model scores'),
    (dict(calibration='icl_sfc', task__calibration=''), "needs method 'icl'"),
    (dict(select='best'), "select 'best' is neither"),
    (dict(optimizer__name='lion'), "optimizer.name 'lion'"),
    (dict(num_demos=0), 'num_demos must be'),
    (dict(method='icl', task__template='{text}{mask}'), 'needs a causal model'),
    (dict(method='icl', num_demos=4000), 'lower --config.num_demos'),
    (dict(task__kind='essay'), "task.kind 'essay'"),
    (dict(task__template=''), 'task.template is empty'),
    (dict(task__template='{text}{mask}'), 'no mask token|is for a masked'),
    (dict(data__train=''), 'nothing to train on')])
def test_bad_settings(tiny_dir, reviews_file, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    train.run(small_config(tiny_dir, reviews_file, **changes), tmp_path)


# --- suites -----------------------------------------------------------------


def test_a_suite_makes_one_table(tiny_dir, reviews_file, tmp_path):
  suite = tmp_path / 'suite.py'
  suite.write_text(f'''
from mezo_jax.config import Data, Model, Train
from mezo_jax.tasks import Task
def get_suite():
  return {{f'reviews/{{m}}': Train(
      method=m, model=Model({str(tiny_dir)!r}), steps=4, eval_every=4,
      task=Task(template='{{text}} It was', label_words=(' bad', ' good')),
      data=Data(train={str(reviews_file)!r}, num_dev=20, num_test=40,
                num_train=4000 if m == 'icl' else 40, batch_size=8))
          for m in ('zero_shot', 'mezo', 'icl')}}
get_config = lambda name: get_suite()[name]
''')
  command = [sys.executable, '-m', 'mezo_jax', 'evaluate', '--suite',
             str(suite), '--workdir', str(tmp_path / 'w')]
  def run(*more):
    done = subprocess.run(
        [*command, *more], text=True, capture_output=True, cwd=conftest.ROOT,
        env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    return done.stdout + done.stderr, done.returncode
  output, code = run()
  assert code == 1 and 'reviews/icl failed' in output, output
  assert 'lower --config.data.num_train' in output  # the run's own message
  rows = json.loads((tmp_path / 'w/table.json').read_text())
  assert [r['method'] for r in rows] == ['zero_shot', 'mezo']
  assert rows[1]['training forwards'] == 4 * 2 * 8
  assert all(float(r['GiB']) > 0.05 and r['examples'] == 40 for r in rows)
  output, code = run('--methods', 'mezo')
  assert code == 0 and 'running' not in output
  assert json.loads((tmp_path / 'w/table.json').read_text()) == rows
  for more, message in ((['--tasks', 'x'], 'has no such runs'), (
      ['--suite', str(reviews_file) + 'x'], 'there is no suite')):
    output, code = run(*more)
    assert code == 1 and message in output and 'Traceback' not in output
