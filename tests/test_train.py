"""train.py as a user runs it: to the end, killed, resumed, sharded, misused."""

import json
import os
import re
import signal
import subprocess
import sys

import conftest
import helpers
import jax
import numpy as np
import pytest
from runs import (
  command,
  finish,
  kill_after,
  records,
  saved,
  small_config,
  use_devices,
)

from mezo_jax import models
from mezo_jax.core.errors import AGAIN, InputError
from mezo_jax.runs import checkpoint, replay
import train


@pytest.fixture(scope='module')
def whole(tiny_dir, reviews_file, tmp_path_factory):
  """A run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('whole')
  out, code = finish(tiny_dir, reviews_file, workdir)
  assert code == 0, out
  return workdir, out


@pytest.mark.processes
def test_a_run_from_the_command_line(whole):
  workdir, out = whole
  result = json.loads((workdir / 'result.json').read_text())
  for part in ('zero_shot', 'final'):
    assert 0 <= result[part]['accuracy'] <= 1
    assert 0 <= result[part]['calibrated_accuracy'] <= 1
    assert result[part]['count'] == 40
  assert result['steps'] == 30 and result['forwards'] == 60
  assert result['compilations'] == 3  # a bucket each, and the update
  assert out.count('compiled the step for') == 2
  for text in ('zero-shot: test accuracy', 'step 30: dev accuracy',
               'final (step', 'model: '):
    assert text in out
  assert (workdir / 'curves.png').read_bytes().startswith(b'\x89PNG')
  rows = records(workdir)
  assert [r['step'] for r in rows if r['kind'] == 'train'] == [*range(1, 31)]
  dev = [r for r in rows if r['kind'] == 'dev']
  assert [r['step'] for r in dev] == [0, 10, 20, 30]
  assert len({r['loss'] for r in dev}) == 4, 'the parameters did not move'
  best = max(dev[1:], key=lambda r: (r['accuracy'], -r['loss']))
  assert result['final']['step'] == best['step']


@pytest.mark.processes
def test_killed_and_run_again(whole, tiny_dir, reviews_file, tmp_path):
  """Law 12: bitwise the parameters of a run that was never stopped or killed,
  though nothing was saved since the evaluation before; and no step is made
  twice."""
  rare = ['--config.checkpoint_every=100']
  made = 0
  for steps, number, status in ((5, signal.SIGTERM, AGAIN),
                                (14, signal.SIGKILL, -signal.SIGKILL)):
    out, code = kill_after(
        tmp_path, steps, number, tiny_dir, reviews_file, tmp_path, *rare)
    assert code == status, out
    if number == signal.SIGTERM:
      assert 'step 1/30: loss' in out, out
      assert re.search(r'\ntrain\.py: .*step \d+ is saved', out), out
    else:
      assert f'resumed from step {made} of' in out, out
    assert not (tmp_path / 'result.json').exists()
    made = replay.read(tmp_path / 'steps.log').steps.last
  out, code = finish(tiny_dir, reviews_file, tmp_path, *rare)
  assert code == 0 and f'resumed from step {made} of' in out, out
  assert 'from the log' in out
  assert records(tmp_path) == records(whole[0])
  one, two = (json.loads((w / 'result.json').read_text())
              for w in (tmp_path, whole[0]))
  for part in ('zero_shot', 'final'):
    assert one[part] == two[part]
  (step, mine), (other, theirs) = map(saved, (tmp_path, whole[0]))
  assert step == other == 30
  helpers.assert_bitwise(mine, theirs)


@pytest.mark.slow
def test_a_finished_run_is_reported_again(tiny_dir, reviews_file, tmp_path):
  """Its best step is not the last; fewer steps than it made are refused."""
  config = small_config(
      tiny_dir, reviews_file, steps=8, eval_every=4, select='loss',
      optimizer__learning_rate=3e-2)
  results = [train.run(config, tmp_path) for _ in range(2)]
  for part in ('final', 'zero_shot'):
    assert results[0][part] == results[1][part]
  assert results[0]['final']['step'] == 4
  held = lambda: {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
  before = held()
  config.steps = 6
  with pytest.raises(
      InputError, match='step 8 .*--config.steps is 6'):
    train.run(config, tmp_path)
  assert held() == before


@pytest.mark.slow
def test_meshes_give_the_same_run(tmp_path, reviews_file, capsys, monkeypatch):
  model = conftest.write_tiny_model(
      tmp_path / 'm', hidden_size=256, intermediate_size=512)
  config = small_config(
      model, reviews_file, steps=3, data__max_length=8, data__buckets=(8,),
      zero_shot=False, optimizer__learning_rate=1e-5)
  with monkeypatch.context() as m:
    use_devices(m, 1)
    train.run(config, tmp_path / 'one')
  assert 'on 1 cpu device(s)' in capsys.readouterr().out
  for name, sizes in (('fsdp', (1, 8)), ('data', (8, 1))):
    config.mesh.data, config.mesh.fsdp = sizes
    train.run(config, tmp_path / name)
    assert 'on 8 cpu device(s)' in capsys.readouterr().out
  losses = {name: [r['loss'] for r in records(tmp_path / name)
                   if r['kind'] == 'train'] for name in ('one', 'fsdp', 'data')}
  for name in ('fsdp', 'data'):
    np.testing.assert_allclose(losses[name], losses['one'], rtol=1e-5)


# --- in this process --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('changes', [
    dict(spsa__combine='one_sided', optimizer__schedule='linear',
         optimizer__warmup_steps=2, optimizer__weight_decay=0.1),
    dict(spsa__distribution='low_rank', spsa__rank=4, spsa__over='rows',
         spsa__num_samples=4),
    *(pytest.param(changes, marks=pytest.mark.exhaustive) for changes in (
        dict(spsa__num_samples=2, spsa__distribution='rademacher'),
        dict(peft__mask='attn/(q|v)', optimizer__schedule='cosine'),
        dict(model__dtype='bfloat16', optimizer__micro_batches=1),
        dict(spsa__apply_every=4, spsa__distribution='low_rank', spsa__rank=4),
        dict(data__k_shot=8, task__label_words=(' a great film', ' bad')),
        dict(model__bos_token='<pad>')))])
def test_options_run(tiny_dir, reviews_file, tmp_path, changes):
  result = train.run(small_config(tiny_dir, reviews_file, **changes), tmp_path)
  assert result['final']['count'] == 40


@pytest.mark.slow
def test_a_test_file_of_its_own(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, data__test=str(reviews_file),
                        data__num_test=0)
  assert train.run(config, tmp_path)['final']['count'] == 120


def test_as_many_steps_as_were_saved_but_not_evaluated(
    tiny_dir, reviews_file, tmp_path):
  kept = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  kept.save(6, {'w': jax.numpy.zeros(3)})
  kept.close()
  with pytest.raises(ValueError, match='step 6, .* 7 '):
    train.run(small_config(tiny_dir, reviews_file), tmp_path)


@pytest.mark.slow
def test_other_settings_in_the_same_directory(tiny_dir, reviews_file, tmp_path):
  train.run(small_config(tiny_dir, reviews_file), tmp_path)
  changed = small_config(tiny_dir, reviews_file, seed=1, spsa__eps=1.0)
  with pytest.raises(ValueError) as e:
    train.run(changed, tmp_path)
  assert re.search('spsa.eps .*0.001 .*1.0', str(e.value))
  assert re.search('seed .*0 .*1', str(e.value))
  longer = small_config(tiny_dir, reviews_file, steps=8)
  assert train.run(longer, tmp_path)['steps'] == 8


@pytest.mark.slow
def test_a_corrupted_checkpoint(tiny_dir, reviews_file, tmp_path, capsys):
  """It is put aside, and made again from the log."""
  config = small_config(tiny_dir, reviews_file, select='loss')
  result, before = train.run(config, tmp_path), records(tmp_path)
  for file in (tmp_path / 'checkpoints' / '6' / 'state').rglob('*'):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:10])
  first = train.run(config, tmp_path)
  assert 'checkpoints/6 is damaged' in capsys.readouterr().out
  assert (tmp_path / 'damaged' / '6').is_dir()
  assert first['final'] == result['final'] and records(tmp_path) == before


@pytest.mark.parametrize('changes,message', [
    (dict(data__batch_size=12), 'batch_size 12 .* 8 '),
    (dict(mesh__fsdp=3), '8 device'),
    (dict(data__num_train=4000), '--config.data.num_train'),
    (dict(task__template='{sentence} It was'), 'config.task.template'),
    (dict(peft__mask='no_such'), "'no_such'"),
    (dict(data__train=''), 'data.train'),
    (dict(task__template='{text}{mask}'), 'mask'),
    (dict(method='icl', num_demos=4000), '--config.num_demos'),
    (dict(method='magic'), "method 'magic'")])
def test_bad_settings(tiny_dir, reviews_file, tmp_path, changes, message):
  with pytest.raises(InputError, match=message):
    train.run(small_config(tiny_dir, reviews_file, **changes), tmp_path)
  assert not (tmp_path / 'result.json').exists()


@pytest.mark.exhaustive_except(
    argument=['--config.optimizer.lr=1', '--config.data.train=/none.jsonl'])
@pytest.mark.processes
@pytest.mark.parametrize('argument,message', [
    ('--config.optimizer.lr=1', 'optimizer.learning_rate'),
    ('--config.steps=many', 'steps=many'),
    ('--config=configs/none.py', 'none.py'), ('stray', "'stray'"),
    ('--config.data.train=/none.jsonl', '/none.jsonl'),
    ('--distributed', 'train.py: --distributed')])
def test_bad_arguments(tiny_dir, reviews_file, tmp_path, argument, message):
  out, code = finish(tiny_dir, reviews_file, tmp_path, argument)
  assert code != 0 and message in out
  assert 'Traceback' not in out


@pytest.mark.exhaustive
@pytest.mark.processes
def test_a_bug_of_ours_keeps_its_traceback(tiny_dir, reviews_file, tmp_path):
  """Where what the user can mend is said in one sentence."""
  code = '''
from pathlib import Path
from mezo_jax.cli import train_command
from mezo_jax.tasks import score
import train
def make_loss_fn(*args):
  def loss_fn(params, batch):
    raise ValueError('a bug in a step')
  return loss_fn
score.make_loss_fn = make_loss_fn
train_command.main(train.run, Path('configs'))
'''
  script, *arguments = command(
      tiny_dir, reviews_file, tmp_path, '--config.zero_shot=False')[1:]
  done = subprocess.run(
      [sys.executable, '-c', code, *arguments], text=True, capture_output=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'},
      cwd=conftest.ROOT)
  assert done.returncode != 0
  assert 'Traceback' in done.stderr and 'in loss_fn' in done.stderr
  assert 'ValueError: a bug in a step' in done.stderr


@pytest.mark.slow
def test_a_masked_model_is_refused(tiny_dir, reviews_file, tmp_path):
  model = models.Transformer(models.read_config(dict(
      model_type='bert', vocab_size=300, hidden_size=16, num_hidden_layers=1,
      num_attention_heads=2, intermediate_size=32)))
  params = model.init(jax.random.key(0), np.zeros((1, 4), int))['params']
  models.save(tmp_path / 'm', model, params,
              tokenizer=models.load_tokenizer(tiny_dir))
  with pytest.raises(ValueError, match='causal model'):
    train.run(small_config(tmp_path / 'm', reviews_file), tmp_path / 'w')
