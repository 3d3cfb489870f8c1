"""The package: what it imports, and what it shows."""

import json
import re
import subprocess
import sys

import conftest
import helpers
import numpy as np
import pytest

import mezo_jax


@pytest.mark.processes
def test_the_mathematics_needs_jax_and_optax_only():
  """They serve Linen, NNX, Equinox and Haiku alike."""
  code = ('import sys, mezo_jax.variants; print([m for m in ("flax", '
          '"transformers", "orbax", "datasets", "ml_collections") '
          'if m in sys.modules])')
  done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                        text=True, cwd=conftest.ROOT)
  assert done.stdout.strip() == '[]', done.stdout + done.stderr


def test_public_names():
  assert all(hasattr(mezo_jax, name) for name in mezo_jax.__all__)
  assert mezo_jax.models.load
  variants = mezo_jax.variants
  assert all(hasattr(variants, name) for name in variants.__all__)
  with pytest.raises(AttributeError):
    mezo_jax.nothing  # noqa: B018


def run(code):
  return subprocess.run([sys.executable, '-c', code], capture_output=True,
                        text=True, cwd=conftest.ROOT)


@pytest.mark.processes
def test_rooms_are_there_when_they_are_used():
  done = run('import sys, mezo_jax\n'
             'mezo_jax.sharding.make_mesh, mezo_jax.replay.open_log\n'
             'assert not {"flax", "orbax"} & {*sys.modules}\n'
             'mezo_jax.peft.lora, mezo_jax.models.load, mezo_jax.training\n'
             'assert {"models", "replay", "variants"} <= {*dir(mezo_jax)}')
  assert not done.returncode, done.stderr


@pytest.mark.processes
def test_a_command_names_the_extra_that_it_needs():
  done = run('import sys\nsys.modules["flax"] = None\n'
             'from mezo_jax import __main__\n__main__.main()')
  assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
  assert 'flax' in done.stderr and 'mezo_jax[train]' in done.stderr


@pytest.mark.processes
@pytest.mark.parametrize('room', ['models', 'peft', 'training', 'planning'])
def test_a_room_names_the_extra_that_it_needs(room):
  """Where jax, numpy and optax alone are installed."""
  done = run(f'import sys\nsys.modules["flax"] = None\n'
             f'import mezo_jax.variants, mezo_jax.{room}')
  *_, last = done.stderr.strip().splitlines()
  assert last.startswith('mezo_jax.core.extras.MissingExtraError')
  assert 'flax' in last and 'mezo_jax[train]' in last


def test_the_readme_s_lines_are_type_checked():
  """CI runs pyright on the file that has them."""
  bare = lambda line: line.split('#')[0].strip()
  checked = {bare(line) for line in (
      conftest.ROOT / 'tests' / 'typing_readme.py').read_text().splitlines()}
  blocks = (conftest.ROOT / 'README.md').read_text().split('```python\n')[1:]
  missing = [line for block in blocks for line in map(
      bare, block.split('```')[0].splitlines()) if line not in checked and not (
          line.startswith(('import ', 'from ', 'print(')))]
  assert missing == []


def test_the_readme_s_example_runs():
  text = (conftest.ROOT / 'README.md').read_text()
  code = text.split('```python\n')[1].split('```')[0]
  import jax.numpy as jnp
  scope = {'params': {'w': jnp.ones(3)},
           'loss_fn': lambda params, batch: jnp.sum((params['w'] - batch)**2)}
  exec(code, scope)
  params, state = scope['step'](scope['params'], scope['state'], jnp.zeros(3))
  assert state[0].count == 1 and params['w'].shape == (3,)


def test_the_readme_is_one_page():
  """As people read it before they decide: 130 lines, 1,000 words."""
  text = (conftest.ROOT / 'README.md').read_text()
  assert len(text.splitlines()) <= 130 and len(text.split()) <= 1000


def test_the_quickstart_s_model_loads_and_generates(
    tiny_dir, tmp_path, monkeypatch):
  text = (conftest.ROOT / 'docs' / 'quickstart.md').read_text()
  blocks = [block.split('```')[0] for block in text.split('```python\n')[1:]]
  (tmp_path / 'my-model').symlink_to(tiny_dir)
  monkeypatch.chdir(tmp_path)
  scope = {}
  for code in blocks:
    exec(code, scope)
  assert scope['tokens'].shape == (2, 5)
  model, params = scope['model'], scope['params']
  mezo_jax.models.save('copy', model, params, tokenizer=scope['tokenizer'])
  helpers.assert_bitwise(mezo_jax.models.load('copy')[1], params)


def test_the_documentation_s_lora_step_runs(tiny_dir, tmp_path, monkeypatch):
  text = (conftest.ROOT / 'docs' / 'few_parameters.md').read_text()
  code = text.split('```python\n')[1].split('```')[0]
  (tmp_path / 'my-model').symlink_to(tiny_dir)
  monkeypatch.chdir(tmp_path)
  scope = {'loss_fn': lambda params, batch: scope['model'].apply(
      {'params': params}, batch).mean(), 'batches': [np.array([[1, 2, 3]])]}
  exec(code, scope)
  assert scope['state'][0].count == 1 and scope['metrics']['loss'].shape == ()
  assert set(scope['trainable']['layers']['attn']) == {'q', 'v'}
  scope |= {'ids': np.array([[5, 6, 7]]), 'mask': np.ones((1, 3), int)}
  whole = scope['model'].apply({'params': scope['params']}, scope['ids'])
  exec(text.split('```python\n')[2].split('```')[0], scope)
  helpers.assert_close(scope['logits'], whole, rtol=1e-4)


def test_the_documentation_s_own_model_lies_on_a_mesh():
  import jax
  import jax.numpy as jnp
  text = (conftest.ROOT / 'docs' / 'pods.md').read_text()
  code = text.split('```python\n')[1].split('```')[0]
  scope = {'jax': jax, 'batch': np.ones((8, 256), np.float32), 'params': {
      'embed': jnp.ones((512, 256)), 'out': {'kernel': jnp.ones((512, 512))}}}
  scope['loss_fn'] = lambda params, batch: jnp.mean(
      (batch @ params['embed'].T @ params['out']['kernel']) ** 2, -1)
  exec(code, scope)
  spec = lambda x: x.sharding.spec
  assert spec(scope['params']['embed']) == jax.P('tensor', 'fsdp')
  assert spec(scope['params']['out']['kernel']) == jax.P('fsdp', 'tensor')
  assert scope['metrics']['projected_grad'].shape == (1,)


def test_the_documentation_s_replicas_exchange(tmp_path):
  import threading

  import jax.numpy as jnp
  text = (conftest.ROOT / 'docs' / 'log.md').read_text()
  code = text.split('```python\n')[1].split('```')[0]
  scopes = [dict(
      directory=tmp_path, replica=i, batches=np.ones((3, 4, 2), np.float32),
      params={'w': jnp.ones((2, 2))}, loss_fn=lambda params, batch: jnp.sum(
          (batch @ params['w']) ** 2, -1)) for i in range(2)]
  threads = [threading.Thread(target=exec, args=(code, s)) for s in scopes]
  for t in threads:
    t.start()
  for t in threads:
    t.join(60)
  one, two = (np.asarray(s['params']['w']) for s in scopes)
  assert scopes[0]['state'][0].count == 3
  np.testing.assert_array_equal(one, two)
  assert not np.array_equal(one, np.ones((2, 2)))


def test_the_tasks_in_the_documentation_fit_their_rows():
  from mezo_jax.tasks import Task
  from mezo_jax.tasks import task as task_lib
  text = (conftest.ROOT / 'docs' / 'tasks.md').read_text()
  blocks = re.findall(r'```python\n# (\{.*?\})\n(Task\(.*?\))\n```', text, re.S)
  found = []
  for row, code in blocks:
    task, row = eval(code, {'Task': Task}), json.loads(row)
    task_lib.check_task(task)
    found.append(task.prompt(row) + task.gold_text(row))
  assert found == [
      'a warm film It was great', 'Who wrote it? Joyce',
      '...\nQuestion: ...\nAnswer: Paris\n']


def test_the_example_of_own_data_is_a_config(tmp_path, monkeypatch):
  import runpy

  from mezo_jax.tasks import data
  from mezo_jax.training import checks
  folder = conftest.ROOT / 'examples' / 'tickets'
  run = lambda name: runpy.run_path(str(folder / name))
  monkeypatch.chdir(tmp_path)
  run('make_tickets.py')
  config = run('mine.py')['get_config']()
  suite = run('suite.py')['get_suite']()
  for each in (config, *suite.values()):
    checks.check_config(each)
  rows = data.load_rows('tickets.csv')
  assert len(rows) == 240 and "'billing' is ' payment'" in (
      config.task.reading(rows))


def test_the_picture_of_a_mesh_is_that_of_its_script():
  import runpy
  docs = conftest.ROOT / 'docs'
  drawn = runpy.run_path(str(docs / 'figures_mesh.py'))['picture']()
  assert drawn == (docs / 'mesh.svg').read_text()


def test_promises_name_tests_that_are_there():
  text = (conftest.ROOT / 'docs' / 'promises.md').read_text()
  named = re.findall(r'`(test_\w+\.py)(?:::(test_\w+))?`|`(test_\w+)`', text)
  assert len(named) > 20
  files = {p.name: p.read_text()
           for p in (conftest.ROOT / 'tests').glob('test_*.py')}
  for file, test, alone in named:
    where = files[file] if file else ''.join(files.values())
    assert not (test or alone) or f'def {test or alone}(' in where, (file, test)
