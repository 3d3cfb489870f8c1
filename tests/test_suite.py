"""Many runs, and one table of them."""

import json

import conftest
import pytest

from mezo_jax.cli import commands

pytestmark = pytest.mark.processes


def test_a_suite_makes_one_table(
    tiny_dir, reviews_file, tmp_path, monkeypatch, capsys):
  suite = tmp_path / 'suite.py'
  suite.write_text(f'''
from mezo_jax.training.config import Data, Model, Train
from mezo_jax.tasks import Task
def get_suite():
  return {{f'reviews/{{m}}': Train(
      method=m, model=Model({str(tiny_dir)!r}), steps=6, eval_every=4,
      task=Task(template='{{text}} It was', label_words=(' bad', ' good')),
      data=Data(train={str(reviews_file)!r}, num_dev=20, num_test=40,
                num_train=4000 if m == 'icl' else 40, batch_size=8))
          for m in ('zero_shot', 'mezo', 'icl')}}
get_config = lambda name: get_suite()[name]
''')
  environment = conftest.QUICK_ENVIRONMENT | {'JAX_NUM_CPU_DEVICES': '1'}
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  def run(*more):
    code = ''
    try:
      commands.main(['evaluate', '--suite', str(suite), '--workdir',
                         str(tmp_path / 'w'), '--config.steps=4', *more])
    except SystemExit as e:
      code = e.code
    return capsys.readouterr().out, code
  output, code = run()
  assert 'reviews/icl failed' in code, output
  assert 'lower --config.data.num_train' in output  # the run's own message
  rows = json.loads((tmp_path / 'w/table.json').read_text())
  assert [r['method'] for r in rows] == ['zero_shot', 'mezo']
  assert rows[1]['row forwards'] == 4 * 2 * 8
  assert all(float(r['GiB']) > 0.05 and r['examples'] == 40 for r in rows)
  output, code = run('--methods', 'mezo')
  assert not code and 'running' not in output
  assert json.loads((tmp_path / 'w/table.json').read_text()) == rows
  output, code = run('--methods', 'mezo', '--config.seed=1')
  assert 'reviews/mezo failed' in code and 'seed was 0' in output
  for more, message in ((['--tasks', 'x'], '--tasks'), (
      ['--suite', str(reviews_file) + 'x'], f'{reviews_file}x'), (
          ['--config.stepz=5'], 'stepz')):
    assert message in run(*more)[1]
