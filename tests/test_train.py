"""train.py as a user runs it: to the end, killed, resumed, sharded, misused."""

import json
import os
import signal
import subprocess
import sys
import time

import conftest
import helpers
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

from mezo_jax import checkpoint, models, sharding
from mezo_jax import config as config_lib
from mezo_jax.export import card
from mezo_jax.tasks import Task
import train

SMALL = ['--config.task.template={text} It was',
         "--config.task.label_words=(' terrible', ' great')",
         '--config.data.num_train=40', '--config.data.num_dev=20',
         '--config.data.num_test=40', '--config.data.batch_size=8',
         '--config.data.buckets=(8,16)', '--config.peft.mask=',
         '--config.optimizer.learning_rate=1e-3', '--config.steps=30',
         '--config.eval_every=10', '--config.checkpoint_every=4']


def command(model, data, workdir, *more):
  return [sys.executable, str(conftest.ROOT / 'train.py'),
          *(x for x in more if x.startswith('--config=')),
          f'--config.model.name={model}', f'--config.data.train={data}',
          f'--workdir={workdir}', *SMALL,
          *(x for x in more if not x.startswith('--config='))]


def start(*args, devices=1):
  env = os.environ | {'JAX_PLATFORMS': 'cpu',
                      'JAX_NUM_CPU_DEVICES': str(devices)}
  return subprocess.Popen(
      command(*args), env=env, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT)


def finish(*args, **kwargs):
  process = start(*args, **kwargs)
  return process.communicate(timeout=400)[0], process.returncode


def kill_after(workdir, steps, number, *args):
  """Runs until so many steps are logged, then sends the signal."""
  process = start(*args)
  log = workdir / 'metrics.jsonl'
  while process.poll() is None:
    if log.exists() and log.read_text().count('"train"') >= steps:
      process.send_signal(number)
      break
    time.sleep(0.005)
  return process.communicate(timeout=400)[0], process.returncode


def records(workdir):
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k != 'seconds'}
          for line in lines]


def final_params(workdir):
  """The tree of the last checkpoint, as saved."""
  directory = workdir / 'checkpoints'
  step = max(int(p.name) for p in directory.iterdir() if p.name.isdigit())
  return step, jax.tree.leaves(
      ocp.load(directory / str(step), checkpointable_name='state')[0])


@pytest.fixture(scope='module')
def whole(tiny_dir, reviews_file, tmp_path_factory):
  """A run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('whole')
  out, code = finish(tiny_dir, reviews_file, workdir)
  assert code == 0, out
  return workdir, out


def test_a_run_from_the_command_line(whole):
  workdir, out = whole
  result = json.loads((workdir / 'result.json').read_text())
  for part in ('zero_shot', 'final'):
    assert 0 <= result[part]['accuracy'] <= 1
    assert 0 <= result[part]['calibrated_accuracy'] <= 1
    assert result[part]['count'] == 40
  assert result['steps'] == 30 and result['forwards'] == 60
  assert result['compilations'] == 2  # buckets
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


@pytest.mark.parametrize('number,message', [
    (signal.SIGKILL, ''), (signal.SIGTERM, 'told to stop; step')])
def test_killed_and_run_again(whole, tiny_dir, reviews_file, tmp_path, number,
                              message):
  """Law 12: bitwise the parameters of a run that was never killed."""
  out, code = kill_after(tmp_path, 13, number, tiny_dir, reviews_file, tmp_path)
  assert code != 0 and message in out
  assert not (tmp_path / 'result.json').exists()
  out, code = finish(tiny_dir, reviews_file, tmp_path)
  assert code == 0 and 'resumed from step' in out, out
  assert records(tmp_path) == records(whole[0])
  one, two = (json.loads((w / 'result.json').read_text())
              for w in (tmp_path, whole[0]))
  for part in ('zero_shot', 'final'):
    assert one[part] == two[part]
  (step, mine), (other, theirs) = map(final_params, (tmp_path, whole[0]))
  assert step == other == 30
  helpers.assert_bitwise(mine, theirs)


def test_a_finished_run_is_reported_again(tiny_dir, reviews_file, tmp_path):
  """Its best step is not the last; fewer steps than it made are refused."""
  settings = ['--config.optimizer.learning_rate=3e-2', '--config.select=loss',
              '--config.optimizer.schedule=constant', '--config.steps=8',
              '--config.eval_every=4', '--config.data.max_length=8']
  again = lambda *more: finish(
      tiny_dir, reviews_file, tmp_path, *settings, *more)
  results = []
  for _ in range(2):
    out, code = again()
    assert code == 0, out
    results.append(json.loads((tmp_path / 'result.json').read_text()))
  for part in ('final', 'zero_shot'):
    assert results[0][part] == results[1][part]
  assert results[0]['final']['step'] == 4
  held = lambda: {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
  before = held()
  out, code = again('--config.steps=6')
  assert code == 1 and 'holds step 8 and --config.steps is 6; give 8' in out
  assert 'Traceback' not in out and held() == before


def test_meshes_give_the_same_run(tmp_path, reviews_file):
  model = conftest.write_tiny_model(
      tmp_path / 'm', hidden_size=256, intermediate_size=512)
  losses = {}
  for name, devices, mesh in (('one', 1, ()), ('fsdp', 8, ()), (
      'data', 8, ('--config.mesh.data=8', '--config.mesh.fsdp=1'))):
    out, code = finish(model, reviews_file, tmp_path / name, '--config.steps=4',
                       '--config.optimizer.learning_rate=1e-5', *mesh,
                       devices=devices)
    assert code == 0, out
    assert f'on {devices} cpu device(s)' in out
    losses[name] = [r['loss'] for r in records(tmp_path / name)
                    if r['kind'] == 'train']
  for name in ('fsdp', 'data'):
    np.testing.assert_allclose(losses[name], losses['one'], rtol=1e-5)


# --- in this process --------------------------------------------------------


def small_config(model, data, **changes):
  config = config_lib.Train(steps=6, eval_every=3, checkpoint_every=3)
  config.task = Task(
      template='{text} It was', label_words=(' terrible', ' great'))
  config.model.name, config.data.train = str(model), str(data)
  config.data.num_train, config.data.num_dev, config.data.num_test = 40, 20, 40
  config.data.batch_size, config.data.buckets = 8, (16,)
  for path, value in changes.items():
    *parents, field = path.split('__')
    node = config
    for parent in parents:
      node = getattr(node, parent)
    assert hasattr(node, field)
    setattr(node, field, value)
  return config


@pytest.mark.parametrize('changes', [
    dict(optimizer__num_samples=2, optimizer__distribution='sphere'),
    dict(optimizer__one_sided=True, optimizer__schedule='linear',
         optimizer__warmup_steps=2, optimizer__weight_decay=0.1),
    dict(peft__mask='attn/(q|v)', optimizer__schedule='cosine'),
    dict(model__dtype='bfloat16', optimizer__micro_batches=1),
    dict(data__k_shot=8, task__label_words=(' a great film', ' bad')),
    dict(model__bos_token='<pad>')])
def test_options_run(tiny_dir, reviews_file, tmp_path, changes):
  result = train.run(small_config(tiny_dir, reviews_file, **changes), tmp_path)
  assert result['final']['count'] == 40


def test_a_test_file_of_its_own(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file, data__test=str(reviews_file),
                        data__num_test=0)
  assert train.run(config, tmp_path)['final']['count'] == 120


def test_as_many_steps_as_were_saved_but_not_evaluated(
    tiny_dir, reviews_file, tmp_path):
  kept = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  kept.save(6, {'w': jax.numpy.zeros(3)})
  kept.close()
  with pytest.raises(ValueError, match='step 6, not evaluated, .*give 7 or'):
    train.run(small_config(tiny_dir, reviews_file), tmp_path)


def test_other_settings_in_the_same_directory(tiny_dir, reviews_file, tmp_path):
  train.run(small_config(tiny_dir, reviews_file), tmp_path)
  changed = small_config(tiny_dir, reviews_file, seed=1, optimizer__eps=1.0)
  with pytest.raises(ValueError) as e:
    train.run(changed, tmp_path)
  assert 'optimizer.eps was 0.001 and is now 1.0' in str(e.value)
  assert 'seed was 0 and is now 1' in str(e.value)
  longer = small_config(tiny_dir, reviews_file, steps=8)
  assert train.run(longer, tmp_path)['steps'] == 8


def test_a_corrupted_checkpoint(tiny_dir, reviews_file, tmp_path):
  config = small_config(tiny_dir, reviews_file)
  train.run(config, tmp_path)
  for file in (tmp_path / 'checkpoints' / '6' / 'state').rglob('*'):
    if file.is_file():
      file.write_bytes(file.read_bytes()[:10])
  with pytest.raises(ValueError, match='6 cannot be read.*delete that direct'):
    train.run(config, tmp_path)


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
  state = {'w': jax.numpy.arange(4.0), 'key': jax.random.key(3)}
  kept = checkpoint.Checkpoints(tmp_path)
  for step, accuracy, loss in ((1, .5, 1.0), (2, .9, .6), (3, .9, .5), (4, .6,
                                                                       .4)):
    kept.save(step, state, {'score': accuracy, 'loss': loss})
  kept.save(5, state)
  assert kept.best_step() == 3 and kept.latest_step() == 5
  kept.wait()
  steps = sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit())
  assert steps == [3, 5]
  helpers.assert_bitwise(kept.load(3, state)['w'], state['w'])
  assert kept.load(3, state)['key'] == state['key']
  kept.close()


def test_loaded_arrays_lie_where_they_were_asked_for(tmp_path):
  """So one load can follow another; also of keys as earlier versions kept
  them."""
  place = sharding.replicated(helpers.mesh_of(1, 1))  # where this went wrong
  state = jax.device_put(
      {'w': jax.numpy.arange(4.0), 'key': jax.random.key(3)}, place)
  with ocp.training.Checkpointer(tmp_path / 'earlier') as earlier:
    earlier.save(1, state)
  checkpoints = {name: checkpoint.Checkpoints(tmp_path / name)
                 for name in ('now', 'earlier')}
  checkpoints['now'].save(1, state)
  found = state
  for name in ('now', 'earlier', 'now'):
    checkpoints[name].wait()
    found = checkpoints[name].load(1, found)
    assert found['key'] == state['key']
    assert {x.sharding for x in found.values()} == {place}
  for each in checkpoints.values():
    each.close()


@pytest.mark.parametrize('changes,message', [
    (dict(optimizer__schedule='step'), 'optimizer.schedule'),
    (dict(model__dtype='int8'), "model.dtype 'int8'"),
    (dict(optimizer__learning_rate=0.0), 'learning_rate must be positive'),
    (dict(optimizer__eps=float('inf')), 'eps and weight_decay must be finite'),
    (dict(data__buckets=(64, 32)), 'must increase'),
    (dict(task__label_words=('one',)), 'needs two or more'),
    (dict(optimizer__micro_batches=3), 'micro_batches must divide'),
    (dict(data__batch_size=12), 'batch_size 12 does not divide over 8 groups'),
    (dict(mesh__fsdp=3), 'does not fit 8 device'),
    (dict(data__num_train=4000), 'lower --config.data.num_train'),
    (dict(task__template='{sentence} It was'), 'config.task.template'),
    (dict(optimizer__generator='dice'), 'generator must be one of'),
    (dict(peft__mask='no_such'), 'selects no floating-point')])
def test_bad_settings(tiny_dir, reviews_file, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    train.run(small_config(tiny_dir, reviews_file, **changes), tmp_path)
  assert not (tmp_path / 'result.json').exists()


@pytest.mark.parametrize('argument,message', [
    ('--config.optimizer.lr=1', 'train.py: Field lr not found'),
    ('--config.steps=many', "invalid literal for int() with base 10: 'many'"),
    ('--config=configs/none.py', 'none.py'), ('stray', "argument 'stray'"),
    ('--config.data.train=/none.jsonl', 'train.py: no data file'),
    ('--distributed', 'train.py: --distributed finds no other processes')])
def test_bad_arguments(tiny_dir, reviews_file, tmp_path, argument, message):
  out, code = finish(tiny_dir, reviews_file, tmp_path, argument)
  assert code != 0 and message in out
  assert 'Traceback' not in out


def test_a_masked_model_is_refused(tiny_dir, reviews_file, tmp_path):
  model = models.Transformer(models.read_config(dict(
      model_type='bert', vocab_size=300, hidden_size=16, num_hidden_layers=1,
      num_attention_heads=2, intermediate_size=32)))
  params = model.init(jax.random.key(0), np.zeros((1, 4), int))['params']
  models.save(tmp_path / 'm', model, params,
              tokenizer=models.load_tokenizer(tiny_dir))
  with pytest.raises(ValueError, match='is for a causal model'):
    train.run(small_config(tmp_path / 'm', reviews_file), tmp_path / 'w')


# --- export -----------------------------------------------------------------


def run_export(*args):
  done = subprocess.run(
      [sys.executable, '-m', 'mezo_jax', 'export', *map(str, args)], text=True,
      capture_output=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  return done.stdout + done.stderr, done.returncode


def test_export_of_a_run(whole, tmp_path):
  """The best checkpoint as a directory that transformers loads; what it scores
  is what the run reported; a card that says so."""
  workdir, _ = whole
  output, code = run_export(workdir, tmp_path / 'm')
  assert code == 0 and f'wrote {tmp_path / "m"}\n' in output, output
  result = json.loads((workdir / 'result.json').read_text())
  best = result['final']['step']
  _, params = models.load(tmp_path / 'm', progress=False)
  helpers.assert_bitwise(params, ocp.load(
      workdir / 'checkpoints' / str(best), checkpointable_name='state')[0])
  text = (tmp_path / 'm' / 'README.md').read_text()
  for part in (f'{result["final"]["accuracy"]:.1%}', 'MeZO', f'after {best} of',
               f'{result["zero_shot"]["accuracy"]:.1%}', '{text} It was'):
    assert part in text
  tokens = models.load_tokenizer(tmp_path / 'm')('a good film')['input_ids']
  assert len(tokens) == 3
  for args, message in (
      ((workdir, tmp_path / 'm'), 'not empty'),
      ((workdir, tmp_path / 'n', '--step', '1'), 'no checkpoint of step 1 but'),
      ((tmp_path, tmp_path / 'n'), 'not the --workdir of a run')):
    output, code = run_export(*args)
    assert code == 1 and message in output and 'Traceback' not in output
  assert not (tmp_path / 'n').exists()


def test_a_card_s_tables_hold_any_text():
  config = config_lib.Train()
  config.task.template, config.peft.mask = '{text}\n|?', 'attn/(q|v)'
  lines = card(config, 5, {}).splitlines()
  assert r'| prompt | `{text}\n\|?` |' in lines
  assert r'| parameters trained | all: `attn/(q\|v)` |' in lines


def test_a_config_survives_json():
  config = config_lib.Train()
  config.task.label_words = ('a', 'b', 'c')
  config.optimizer.eps = 0.5
  saved = json.loads(json.dumps(config_lib.to_json(config)))
  assert config_lib.from_json(saved) == config
  del saved['model']['revision']  # a run of an earlier version
  config_lib.check_same_run(config, saved)
