"""Every method and objective, through train.py."""

import ast
import contextlib
import json

import conftest
import helpers
import jax
import numpy as np
import pytest
from runs import changed, saved, small_config, train_losses

import mezo_jax
from mezo_jax import models, peft
from mezo_jax.core.errors import InputError, Stopped
from mezo_jax.export.from_run import export
from mezo_jax.runs import preemption
from mezo_jax.tasks import Task
from mezo_jax.training import checks, methods
from mezo_jax.training import config as config_lib
import train


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


@pytest.mark.slow
def test_finetune_learns(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, method='finetune', steps=40,
                        eval_every=20, checkpoint_every=40,
                        optimizer__learning_rate=3e-3,
                        model__remat=True, optimizer__micro_batches=1)
  result = train.run(config, tmp_path)
  assert result['forwards'] == 40
  losses = train_losses(tmp_path)
  assert len(losses) == 40 and np.mean(losses[-10:]) < 0.4 < losses[0]
  assert len(moved(tiny_dir, tmp_path)) > 10


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_finetuning_run_resumes(tiny_dir, reviews_file, tmp_path):
  settings = dict(method='finetune', optimizer__learning_rate=1e-3)
  for steps, where in ((3, 'a'), (6, 'a'), (6, 'b')):
    config = small_config(tiny_dir, reviews_file, steps=steps, **settings)
    train.run(config, tmp_path / where)
  one, two = ((tmp_path / w / 'result.json').read_text() for w in 'ab')
  assert json.loads(one)['final'] == json.loads(two)['final']


@pytest.mark.slow
def test_head_only_trains_a_head_of_its_own(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, method='head_only',
                        optimizer__learning_rate=1e-2)
  train.run(config, tmp_path)
  assert moved(tiny_dir, tmp_path, untied=True) == {'lm_head/embedding'}


@pytest.mark.slow
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
    ('zero_shot', ''), ('zero_shot', 'sfc'), ('icl', ''), ('icl', 'sfc')])
def test_methods_without_a_step(tiny_dir, reviews_file, tmp_path, method,
                                calibration):
  config = small_config(tiny_dir, reviews_file, method=method, num_demos=3,
                        calibration=calibration, task__calibration='It was')
  result = train.run(config, tmp_path)
  assert result['final']['count'] == 40 and result['steps'] == 0
  assert ('calibrated_accuracy' in result['final']) == (method == 'zero_shot')
  assert result['peak_memory'] > 1e8 and result['seconds'] > 0


@pytest.mark.slow
@pytest.mark.exhaustive_except(objective=['f1'])
@pytest.mark.parametrize('objective', [
    'lm', 'accuracy', 'f1', lambda predictions, examples: float(np.mean(
        [p == e['label'] for p, e in zip(predictions, examples)]))])
def test_objectives_run(tiny_dir, reviews_file, tmp_path, objective):
  config = small_config(tiny_dir, reviews_file, objective=objective,
                        spsa__eps=1e-1)
  result = train.run(config, tmp_path)
  assert result['final']['count'] == 40
  assert config_lib.to_json(config)['objective']


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_head_for_classes_without_a_prompt(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, method='finetune', steps=40,
                        eval_every=40, optimizer__learning_rate=3e-3)
  config.task = Task(kind='head', template='{text}',
                     label_names=('bad', 'good'), metric='matthews')
  result = train.run(config, tmp_path)
  assert -1 <= result['final']['matthews'] <= 1
  assert np.mean(train_losses(tmp_path)[-10:]) < 0.4
  out = export(tmp_path, tmp_path / 'export')
  assert 'LlamaForSequenceClassification' in (out / 'config.json').read_text()


@pytest.mark.parametrize('changes,warns', [
    (dict(), False), (dict(optimizer__learning_rate=2e-3), True),
    (dict(peft__method='lora'), True),
    (dict(peft__method='lora', optimizer__learning_rate=1e-4), False),
    (dict(peft__method='lora', optimizer__learning_rate=1e-2), True),
    (dict(peft__method='prefix', optimizer__learning_rate=1e-4), True),
    (dict(peft__method='prefix', optimizer__learning_rate=1e-1), False),
    (dict(method='finetune', peft__method='lora'), True),
    (dict(method='finetune', optimizer__name='sgd',
          optimizer__learning_rate=1e-2), False),
    (dict(method='zero_shot', peft__method='lora'), False)])
def test_a_learning_rate_of_another_method_is_noticed(changes, warns):
  found = methods.warnings(changed(config_lib.Train(), **changes))
  assert bool(found) == warns
  assert all('two orders of magnitude' in text for text in found)


def test_the_documentation_names_them_all():
  text = (conftest.ROOT / 'docs' / 'variants.md').read_text()
  rows = text.split('| name |')[1].split('\n\n')[0].splitlines()[2:]
  of_variants = {row.split('|')[1].strip(' `') for row in rows} - {'mezo'}
  assert of_variants <= methods.METHODS.keys()
  for file, title, table in (
      ('tasks.md', '| `method` | |', methods.METHODS),
      ('few_parameters.md', '| `--config.peft.method=` |', methods.PARTS)):
    text = (conftest.ROOT / 'docs' / file).read_text().split(title)[1]
    rows = text.split('\n\n')[0].splitlines()[2:]
    names = [row.split('|')[1].strip(' `').replace('(empty)', '')
             for row in rows]
    assert names == [name for name in table if name not in of_variants]


def test_a_method_is_an_entry_of_the_table_and_nothing_else(
    tiny_dir, reviews_file, tmp_path, monkeypatch):
  """A new entry trains, resumes, is replayed, refuses and is described."""
  monkeypatch.setitem(methods.METHODS, 'toy', methods.Method(
      'toy descent, forward passes only',
      make=lambda s: mezo_jax.mezo(
          lambda step: 2 * s.learning_rate(step),
          estimator=mezo_jax.spsa(s.eps, **s.options), **s.finish),
      forwards=lambda config, rows: 7,
      needs=(lambda config: (
          not config.optimizer.weight_decay, 'a toy has no weight_decay'),),
      reads=('share',), ignores=r'spsa\.rank'))
  changes = dict(zero_shot=False, eval_every=6)
  config = small_config(tiny_dir, reviews_file, method='toy', **changes)
  result = train.run(config, tmp_path / 'toy')
  assert result['forwards'] == 6 * 7 and result['method'] == 'toy'
  # It is MeZO at twice the learning rate.
  twice = small_config(
      tiny_dir, reviews_file, **changes,
      optimizer__learning_rate=2 * config.optimizer.learning_rate)
  train.run(twice, tmp_path / 'mezo')
  helpers.assert_bitwise(saved(tmp_path / 'toy'), saved(tmp_path / 'mezo'))
  out = export(tmp_path / 'toy', tmp_path / 'out')
  assert 'toy descent' in (out / 'README.md').read_text()
  for bad in (dict(optimizer__weight_decay=0.1), dict(variant__share=2.0)):
    with pytest.raises(InputError, match='weight_decay|variant.share'):
      checks.check_config(
          small_config(tiny_dir, reviews_file, method='toy', **bad))
  checks.check_given(config, ['variant.share'])
  for given in ('variant.window', 'spsa.rank', 'privacy.epsilon'):
    with pytest.raises(InputError, match=f'--config.{given} '):
      checks.check_given(config, [given])


def test_no_other_module_compares_the_method_with_a_name():
  """`config.method`, or a variable called method, in ``==``, ``in`` or
  ``match``; and any comparison with a text that names a method."""
  def texts(node):
    return {x.value for x in ast.walk(node)
            if isinstance(x, ast.Constant) and isinstance(x.value, str)}

  def names_method(node):
    if isinstance(node, ast.Attribute):
      return node.attr == 'method' and ast.unparse(node.value) not in (
          'p', 'peft', 'config.peft', 'run.peft')
    return isinstance(node, ast.Name) and node.id == 'method'

  found = []
  files = [conftest.ROOT / 'train.py',
           *(conftest.ROOT / 'mezo_jax').rglob('*.py'),
           *(conftest.ROOT / 'benchmarks').rglob('*.py')]
  for file in files:
    if file.name == 'methods.py' and file.parent.name == 'training':
      continue
    for node in ast.walk(ast.parse(file.read_text())):
      if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
      elif isinstance(node, ast.Match):
        sides = [node.subject, *(case.pattern for case in node.cases)]
      else:
        continue
      if any("['kind']" in ast.unparse(side) for side in sides):
        continue  # a kind of record, not a method
      said = set().union(*map(texts, sides))
      in_package = 'benchmarks' not in file.parts
      if said and any(map(names_method, sides)) or (
          in_package and said & methods.METHODS.keys()):
        found.append(f'{file}:{node.lineno}: {ast.unparse(node)}')
  assert not found


# --- variants of MeZO -------------------------------------------------------


@pytest.mark.slow_except(method=['private'])
@pytest.mark.exhaustive_except(method=['private', 'adam_by_history'])
@pytest.mark.parametrize('method,changes,forwards', [
    ('sparse_mezo', dict(variant__share=0.3), 6 * 2),
    ('momentum_by_history', dict(variant__window=3), 6 * 2),
    ('adam_by_history', dict(variant__window=2, spsa__num_samples=2), 6 * 4),
    ('scalar_adam', dict(spsa__combine='one_sided'), 6 * 2),
    ('sign', dict(), 6 * 2), ('one_point', dict(), 6),
    ('conservative', dict(optimizer__micro_batches=2), 6 * 5),
    ('hizoo', dict(optimizer__micro_batches=2), 6 * 3),
    ('lozo_m', dict(spsa__distribution='lazy_low_rank', spsa__rank=2,
                    spsa__lazy_every=3), 6 * 2),
    ('expectation_modified', dict(variant__num_scores=1), 6 * 2),
    ('mezo', dict(spsa__distribution='subzero', spsa__rank=2), 6 * 2),
    ('quzo', dict(model__dtype='int8', spsa__apply_every=3, spsa__eps=1e-2),
     6 * 2),
    ('private', dict(privacy__delta=1e-3, spsa__num_samples=2,
                     data__max_length=16, model__dtype='bfloat16',
                     optimizer__micro_batches=2), 6 * 4),
    ('forward_grad', dict(optimizer__weight_decay=0.1), 6 * 2)])
def test_a_relative_runs(tiny_dir, reviews_file, tmp_path, method, changes,
                         forwards):
  config = small_config(tiny_dir, reviews_file, **dict(
      method=method, zero_shot=False, eval_every=6,
      spsa__distribution='rademacher', optimizer__learning_rate=1e-4) | changes)
  result = train.run(config, tmp_path)
  assert result['forwards'] == forwards
  assert moved(tiny_dir, tmp_path)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_svrg_runs_and_resumes_between_anchors(
    tiny_dir, reviews_file, tmp_path, monkeypatch):
  """Anchors of 32 of the 40 rows, at steps 1 and 5."""
  config = small_config(
      tiny_dir, reviews_file, method='svrg', steps=8, eval_every=4,
      zero_shot=False, spsa__distribution='rademacher',
      variant__every=4, variant__anchor_rows=35,
      optimizer__learning_rate=1e-3)
  result = train.run(config, tmp_path / 'a')
  assert result['forwards'] == 2 * (2 * 4 + 3 * 4)
  with monkeypatch.context() as m, pytest.raises(Stopped, match='step 6'):
    m.setattr(preemption, 'watched', lambda log: contextlib.nullcontext(
        lambda step: step == 6))
    train.run(config, tmp_path / 'b')
  train.run(config, tmp_path / 'b')
  helpers.assert_bitwise(saved(tmp_path / 'a')[1], saved(tmp_path / 'b')[1])


@pytest.mark.parametrize('changes,message', [
    (dict(method='svrg', steps=7, variant__every=2), 'variant.every'),
    (dict(method='svrg', eval_every=2, variant__anchor_rows=4),
     'variant.anchor_rows'),
    (dict(method='svrg', eval_every=2, optimizer__weight_decay=0.1),
     'weight_decay'),
    (dict(method='adam_by_history', spsa__apply_every=2),
     'spsa.apply_every'),
    (dict(method='momentum_by_history', variant__window=0),
     'variant.window'),
    (dict(method='sign', spsa__combine='fzoo', spsa__num_samples=4),
     'spsa.combine'),
    (dict(method='one_point', spsa__num_samples=2), 'spsa.num_samples'),
    (dict(method='lozo_m'), 'lazy_low_rank'),
    (dict(method='hizoo', variant__curvature_rate=1.0), 'curvature_rate'),
    (dict(method='hizoo', spsa__combine='one_sided'), 'spsa.combine'),
    (dict(method='mazo', variant__num_scores=0), 'num_scores'),
    (dict(method='mazo', model__dtype='int8'), 'model.dtype'),
    (dict(method='private', privacy__delta=0.0), 'delta'),
    (dict(method='private', privacy__mechanism='uniform'),
     "privacy.mechanism 'uniform'"),
    (dict(method='private', privacy__mechanism='laplace', spsa__num_samples=2),
     'num_samples'),
    (dict(method='private', objective='f1'), "objective 'f1'"),
    (dict(method='forward_grad', objective='accuracy'), "'accuracy'")])
def test_what_does_not_fit_a_relative(tiny_dir, reviews_file, changes, message):
  with pytest.raises(InputError, match=message):
    checks.check_config(small_config(tiny_dir, reviews_file, **changes))
