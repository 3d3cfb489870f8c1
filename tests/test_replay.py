"""The log: what it holds, what is left of a damaged one, weights made again."""

import errno
import itertools
import json
import shutil

import conftest
import helpers
import numpy as np
import pytest
import runs

from mezo_jax import models
from mezo_jax.cli.commands import main
from mezo_jax.core.errors import (
  Again,
  Damaged,
  in_one_sentence,
  InputError,
  Stopped,
)
from mezo_jax.export.from_run import export, rebuild
from mezo_jax.runs import checkpoint, loggers, replay
import train

RNG = np.random.default_rng(0)


def written(path, steps=12, n=1, added=(5, 12)):
  """A log of so many steps, and what was told to it."""
  log, said = replay.open_log(path, {'mezo_jax': '0', 'key': 3}, n)
  assert not said
  grads = RNG.normal(size=(steps, n)).astype(np.float32)
  grads[3] = np.nan
  values = RNG.normal(size=steps).astype(np.float32)
  for step in range(1, steps + 1):
    log.append(step, grads[step - 1], values[step - 1])
    if step in added:
      log.added(step)
  log.close()
  return grads, values


# --- the file ---------------------------------------------------------------


@pytest.mark.parametrize('n', [1, 3])
def test_what_was_written_is_read(tmp_path, n):
  path = tmp_path / 'steps.log'
  grads, values = written(path, n=n)
  found = replay.read(path)
  assert (found.steps.first, found.steps.last, found.damaged) == (1, 12, 0)
  helpers.assert_bitwise(found.steps.projected_grads, grads)
  helpers.assert_bitwise(found.steps.values, values)
  assert found.steps.added == {5, 12} and found.header['key'] == 3
  header = len(path.read_bytes().splitlines()[0]) + 1
  assert path.stat().st_size - header <= 16 * n * (12 + 2)
  some = found.steps.until(5)
  assert some.last == 5 and some.added == {5}
  # It grows from there.
  log, said = replay.open_log(path, {}, n)
  assert not said and log.end == 12
  with pytest.raises(ValueError, match='step 12 .*step 12'):
    log.append(12, grads[0])
  log.append(13, grads[0])
  log.close()
  assert replay.read(path).steps.last == 13


def is_part(path, grads, values) -> bool:
  """Whether what is read is the beginning of what was written."""
  found = replay.read(path)
  t = len(found.steps.values)
  helpers.assert_bitwise(found.steps.projected_grads, grads[:t])
  helpers.assert_bitwise(found.steps.values, values[:t])
  assert found.steps.added <= {5, 12} and found.header['key'] == 3
  return found.damaged > 0


def test_a_torn_log_ends_before_the_tear(tmp_path):
  path = tmp_path / 'steps.log'
  told = written(path)
  data = path.read_bytes()
  header = data.index(b'\n') + 1
  for size in range(len(data)):
    path.write_bytes(data[:size])
    if size < header:
      with pytest.raises(Damaged):
        replay.read(path)
      continue
    assert is_part(path, *told) == bool((size - header) % 16)
  # Opened again, it is cut there, and goes on as if nothing had been.
  path.write_bytes(data[:-7])
  log, said = replay.open_log(path, {}, 1)
  assert log.end == 12 and not said
  log.added(12)
  log.close()
  assert path.read_bytes() == data


def test_no_flipped_bit_is_taken_for_a_step(tmp_path):
  path = tmp_path / 'steps.log'
  told = written(path)
  data = path.read_bytes()
  header = data.index(b'\n') + 1
  for at, bit in itertools.product(range(len(data)), range(8)):
    flipped = bytearray(data)
    flipped[at] ^= 1 << bit
    path.write_bytes(flipped)
    if at < header:
      with pytest.raises(InputError):
        replay.read(path)
    else:
      assert is_part(path, *told)
      assert replay.read(path).size == header + (at - header) // 16 * 16


def test_what_is_missing_is_said(tmp_path):
  path = tmp_path / 'steps.log'
  written(path)
  data = path.read_bytes()
  damaged = bytearray(data)
  damaged[-3 * 16] ^= 1
  path.write_bytes(damaged)
  log, said = replay.open_log(path, {}, 1)
  assert log.end == 10 and 'step 10' in said
  log.close()
  for content, message in ((data, 'step 12'), (b'', 'step 21'),
                           (b'{}\n', 'step 21'), (None, 'step 21')):
    path.unlink()
    if content is not None:
      path.write_bytes(content)
    log, said = replay.open_log(path, {'mezo_jax': '0'}, 1, 20)
    log.close()
    assert log.end == 20 and message in said
    assert replay.read(path).steps.first == 21


def test_a_log_that_begins_later_is_not_taken_for_what_is_missing(tmp_path):
  path = tmp_path / 'steps.log'
  log, said = replay.open_log(path, {}, 1, 20)
  log.append(21, 0.5)
  log.close()
  assert said
  with pytest.raises(IndexError, match='step 3 .*21'):
    log.steps.at(3)
  log, said = replay.open_log(path, {}, 1, 4)
  log.close()
  assert 'step 21' in said and log.end == 4
  assert replay.read(path).steps.first == 5


def test_a_log_of_another_kind_is_refused(tmp_path):
  path = tmp_path / 'steps.log'
  written(path)
  with pytest.raises(InputError, match='steps.log .*1 .*2'):
    replay.open_log(path, {}, 2)
  line = replay._line({'format': 9, 'mezo_jax': '7.1'})
  path.write_bytes(line)
  with pytest.raises(InputError, match="format 9.*1.*'7.1'"):
    replay.open_log(path, {}, 1)
  for header in ({'numbers': 0, 'first': 1}, {'numbers': 1, 'first': None},
                 {'numbers': 1, 'first': 1, 'shared': True}):
    path.write_bytes(replay._line({'format': 1} | header))
    with pytest.raises(Damaged):
      replay.read(path)


def test_a_file_that_is_no_log_is_kept(tmp_path):
  path = tmp_path / 'notes.txt'
  path.write_text('not a log')
  log, said = replay.open_log(path, {}, 1)
  log.close()
  kept = tmp_path / 'notes.txt.damaged'
  assert str(kept) in said
  assert kept.read_text() == 'not a log'


def test_paths_that_can_be_no_log_are_refused(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  for path in (tmp_path, tmp_path / 'no' / 'a.log'):
    with pytest.raises(InputError, match=str(path.parent)):
      replay.open_log(path, {}, 1)
  assert not [*tmp_path.parent.glob('*.part')] and not [*tmp_path.iterdir()]
  replay.open_log('~/a.log', {}, np.int64(1))[0].close()
  assert replay.read('~/a.log').header['numbers'] == 1


@pytest.mark.parametrize('old, new, named', [
    ({'lr': 0.1, 'key': 3}, {'lr': 0.1}, 'key'),
    ({'lr': 0.1}, {'lr': 0.1, 'key': 3}, 'key'),
    ({'a': {'b': 1}}, {'a': {'b': 2}}, 'a'),
    ({'lr': 0.1, 'key': 3}, {'key': 3, 'lr': 0.1}, None),
    ({'lr': 1}, {'lr': 1.0}, None),
    ({'lr': float('nan')}, {'lr': float('nan')}, None),
    ({'size': (1, 2)}, {'size': [1, 2]}, None)])
def test_another_header_is_said(old, new, named, tmp_path):
  path = tmp_path / 'a.log'
  replay.open_log(path, old, 1)[0].close()
  log, said = replay.open_log(path, new, 1)
  log.close()
  assert f'({named} differ)' in said if named else not said


@pytest.mark.parametrize('bad', [
    dict(projected_grad='x'), dict(projected_grad=None),
    dict(projected_grad=[0.5, 0.5]), dict(value='x'), dict(value=None)])
def test_only_numbers_are_recorded(bad, tmp_path):
  log, _ = replay.open_log(tmp_path / 'a.log', {}, 1)
  with pytest.raises(ValueError, match=[*bad][0]):
    log.append(1, **(dict(projected_grad=[0.5]) | bad))
  log.append(1, np.float64([0.5]), 1)
  log.close()
  assert replay.read(tmp_path / 'a.log').steps.last == 1


def test_a_shared_log_is_small_and_checked(tmp_path):
  path, shared = tmp_path / 'steps.log', tmp_path / 'shared.log'
  grads, _ = written(path, steps=20_000)
  found = replay.read(path)
  replay.write_shared(shared, found.header, found.steps)
  assert shared.stat().st_size < 80_500
  again = replay.read(shared)
  helpers.assert_bitwise(again.steps.projected_grads, grads)
  assert np.isnan(again.steps.values).all() and again.steps.added == {5, 12}
  data = shared.read_bytes()
  header = data.index(b'\n') + 1
  for at in (*range(header), *RNG.integers(header, len(data), 200)):
    flipped = bytearray(data)
    flipped[at] ^= 1 << RNG.integers(8)
    shared.write_bytes(flipped)
    with pytest.raises(InputError):
      replay.read(shared)
  shared.write_bytes(data)
  with pytest.raises(InputError, match='shared.log'):
    replay.open_log(shared, {}, 1)
  shared.write_bytes(data[:-1])
  with pytest.raises(InputError, match='shared.log'):
    replay.read(shared)


def test_every_process_knows_whether_steps_are_recorded(tmp_path):
  """Though process 0 alone has the file: they must do the same."""
  log, _ = replay.open_log(tmp_path / 'steps.log', {}, 2)
  log.close()
  assert log.records and replay.Log(None, {}, log.steps).records
  assert not replay.Log(None, {}, replay.no_steps(0)).records


def test_a_disk_that_is_full_or_a_file_that_is_gone(tmp_path):
  class Full:
    def write(self, data):
      raise OSError(errno.ENOSPC, 'No space left on device')
    def close(self):
      pass
  path = tmp_path / 'steps.log'
  written(path)
  log, _ = replay.open_log(path, {}, 1)
  log.sync()
  path.unlink()
  with pytest.raises(InputError, match='steps.log'):
    log.sync()
  log._file = Full()
  with pytest.raises(SystemExit, match='steps.log: No space left'):
    with in_one_sentence('prog'):
      log.append(13, 0.5)


# --- weights ----------------------------------------------------------------


def tensors(directory):
  return {p.name: p.read_bytes() for p in directory.glob('*.safetensors')}


WAYS = {
    'bfloat16': dict(
        model__dtype='bfloat16', optimizer__weight_decay=0.1,
        optimizer__schedule='linear', optimizer__warmup_steps=2),
    'skipped steps': dict(optimizer__learning_rate=3e38, max_skipped=99),
    'lora': dict(peft__method='lora', optimizer__learning_rate=1e-2),
    'last layers': dict(peft__method='last_layers', peft__num_layers=1),
    'lozo, pending': dict(
        spsa__distribution='lazy_low_rank', spsa__lazy_every=4, spsa__rank=2,
        spsa__apply_every=4, model__dtype='bfloat16'),
    'fzoo': dict(spsa__combine='fzoo', spsa__num_samples=3,
                 spsa__distribution='rademacher'),
    'svrg': dict(method='svrg', variant__every=3, model__dtype='bfloat16'),
    'one point': dict(method='one_point'),
    'quzo': dict(model__dtype='int8', method='quzo'),
    'private': dict(method='private', privacy__epsilon=6.0, privacy__delta=1e-3,
                    privacy__clip=1.0),
}


@pytest.mark.slow_except(way=['bfloat16'])
@pytest.mark.exhaustive_except(
    way=['bfloat16', 'skipped steps', 'lora', 'lozo, pending', 'quzo'])
@pytest.mark.parametrize('way', WAYS)
def test_a_log_gives_the_weights_of_training(
    tiny_dir, reviews_file, tmp_path, way):
  """Bit for bit, without data; and of a run that lost all its checkpoints."""
  config = runs.small_config(
      tiny_dir, reviews_file, **{'optimizer__learning_rate': 1e-3} | WAYS[way])
  workdir = tmp_path / 'run'
  if way == 'skipped steps':
    with pytest.raises(Stopped):
      train.run(config, workdir)
  else:
    train.run(config, workdir)
  said = []
  options = dict(step=None if way == 'private' else 6)
  if way == 'skipped steps':  # no weights to export: the log, to its end
    assert np.isnan(replay.read(workdir / 'steps.log').steps.values[1:]).all()
    with pytest.raises(InputError, match='embed/embedding of step'):
      rebuild(tiny_dir, workdir / 'steps.log', tmp_path / 'b', say=said.append)
    return
  want = tensors(export(workdir, tmp_path / 'a', **options))
  got = tensors(rebuild(tiny_dir, workdir / 'steps.log', tmp_path / 'b',
                        say=said.append))
  assert want == got and want and '6 steps' in said[0]
  if way not in ('bfloat16', 'lozo, pending', 'svrg', 'private'):
    return
  # A run goes on from its log alone, and ends with the same.
  before = runs.records(workdir)
  shutil.rmtree(workdir / 'checkpoints')
  (workdir / 'result.json').unlink()
  metrics = workdir / 'metrics.jsonl'
  if way == 'bfloat16':  # a machine that went down and forgot a line
    lines = metrics.read_text().splitlines(True)
    metrics.write_text(''.join(lines[:-2]))
    before[-2] = {k: v for k, v in before[-2].items() if k != 'tokens'}
  train.run(config, workdir)
  assert runs.records(workdir) == before
  assert tensors(export(workdir, tmp_path / 'c', **options)) == want


@pytest.mark.slow
def test_a_log_is_shared_with_a_card(tiny_dir, reviews_file, tmp_path, capsys):
  config = runs.small_config(tiny_dir, reviews_file)
  train.run(config, tmp_path / 'run')
  main(['export', str(tmp_path / 'run'), str(tmp_path / 'shared'), '--log',
        '--step=6'])
  assert {p.name for p in (tmp_path / 'shared').iterdir()} == {
      'README.md', 'steps.log'}
  card = (tmp_path / 'shared' / 'README.md').read_text()
  assert f'replay --base {tiny_dir.name} --log steps.log' in card
  log = tmp_path / 'shared' / 'steps.log'
  assert str(reviews_file).encode() not in log.read_bytes()
  main(['replay', f'--base={tiny_dir}', f'--log={log}',
        f'--out={tmp_path / "again"}'])
  assert '6 steps' in capsys.readouterr().out
  assert tensors(tmp_path / 'again') == tensors(
      export(tmp_path / 'run', tmp_path / 'whole', step=6))
  # An earlier step, which no checkpoint has.
  kept = [p.name for p in (tmp_path / 'run' / 'checkpoints').iterdir()]
  assert '2' not in kept
  main(['replay', f'--base={tiny_dir}', f'--log={log}', '--until=2',
        f'--out={tmp_path / "two"}'])
  config.steps, config.eval_every = 2, 2
  train.run(config, tmp_path / 'short')
  assert tensors(tmp_path / 'two') == tensors(
      export(tmp_path / 'short', tmp_path / 'short_model', step=2))


@pytest.mark.slow
def test_what_cannot_be_made_again_is_refused(
    tiny_dir, reviews_file, tmp_path, capsys):
  run = tmp_path / 'run'
  config = runs.small_config(tiny_dir, reviews_file, steps=2, eval_every=2)
  train.run(config, run)
  log, out = run / 'steps.log', tmp_path / 'out'
  other = conftest.write_tiny_model(tmp_path / 'other', seed=1)
  with pytest.raises(InputError, match='weights of .*other'):
    rebuild(other, log, out)
  with pytest.raises(InputError, match='--until is 3'):
    rebuild(tiny_dir, log, out, 3)
  with pytest.raises(SystemExit, match='config.json'):
    main(['replay', f'--base={tiny_dir}', '--out=x',
          f'--log={run / "config.json"}'])
  with pytest.raises(SystemExit, match='nowhere'):
    main(['replay', f'--base={tiny_dir}', '--out=x', '--log=nowhere'])
  for changes in (dict(steps=3, first=2), dict(method='mazo')):
    header = replay.read(log).header
    header['config'] |= {k: v for k, v in changes.items() if k == 'method'}
    part = tmp_path / 'part.log'
    replay.write_shared(part, header, replay.no_steps(
        1, changes.get('first', 1) - 1))
    with pytest.raises(InputError, match='step 2|mazo'):
      rebuild(tiny_dir, part, out)
  assert not out.exists()


@pytest.mark.slow
def test_inputs_that_changed_are_refused(tiny_dir, tmp_path, reviews_file):
  """Other labels, or another base model under a LoRA."""
  model, data = tmp_path / 'm', tmp_path / 'rows.jsonl'
  shutil.copytree(tiny_dir, model)
  shutil.copy(reviews_file, data)
  config = runs.small_config(model, data, steps=2, eval_every=2,
                             peft__method='lora')
  train.run(config, tmp_path / 'run')
  config.steps = 4
  rows = [json.loads(line) for line in data.read_text().splitlines()]
  data.write_text('\n'.join(json.dumps(
      row | {'label': 1 - row['label']}) for row in rows))
  with pytest.raises(InputError, match='rows'):
    train.run(config, tmp_path / 'run')
  shutil.copy(reviews_file, data)
  found, params = models.load(model, progress=False)
  params['embed']['embedding'] = params['embed']['embedding'].at[5, 5].add(1e-3)
  shutil.rmtree(model)
  models.save(model, found, params, progress=False,
              tokenizer=models.load_tokenizer(tiny_dir))
  with pytest.raises(InputError, match='weights of'):
    train.run(config, tmp_path / 'run')


class Killed(BaseException):
  """Ends a run where it is raised, as kill -9 does."""


@pytest.mark.slow
@pytest.mark.exhaustive_except(way=[{}])
@pytest.mark.parametrize('way', [
    dict(), dict(method='finetune'),
    dict(spsa__apply_every=3, spsa__distribution='low_rank')],
    ids=['mezo', 'backpropagation', 'accumulated updates'])
def test_killed_around_an_evaluation(
    tiny_dir, reviews_file, tmp_path, monkeypatch, way):
  """Of the best step: before and after it is recorded, and after it is saved.
  """
  config = runs.small_config(
      tiny_dir, reviews_file, checkpoint_every=2, zero_shot=False,
      select='loss', optimizer__learning_rate=3e-2, **way)
  result = train.run(config, tmp_path / 'whole')
  best = result['final']['step']
  write, save = loggers.Metrics.write, checkpoint.Checkpoints.save

  def write_and_die(self, kind, step, **values):
    if where == 'evaluated' and (kind, step) == ('dev', best):
      raise Killed
    write(self, kind, step, **values)

  def save_and_die(self, step, *args):
    if where == 'recorded' and step == best:
      raise Killed
    save(self, step, *args)
    if where == 'saved' and step == best:
      raise Killed
  monkeypatch.setattr(loggers.Metrics, 'write', write_and_die)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', save_and_die)
  for where in ('evaluated', 'recorded', 'saved'):
    with pytest.raises(Killed):
      train.run(config, tmp_path / 'killed')
  where = None
  assert train.run(config, tmp_path / 'killed')['final'] == result['final']
  assert runs.records(tmp_path / 'killed') == runs.records(tmp_path / 'whole')
  mine, theirs = (runs.saved(tmp_path / name, state=True)
                  for name in ('killed', 'whole'))
  assert mine[0] == theirs[0] == 6
  helpers.assert_bitwise(mine[1], theirs[1])


@pytest.mark.slow
def test_a_damaged_best_step_is_made_again(
    tiny_dir, reviews_file, tmp_path, capsys):
  """From the log; but only once, if the disk cannot be trusted."""
  config = runs.small_config(
      tiny_dir, reviews_file, steps=8, eval_every=4, select='loss',
      optimizer__learning_rate=3e-2)
  first, before = train.run(config, tmp_path), runs.records(tmp_path)
  assert first['final']['step'] == 4
  kept = tmp_path / 'checkpoints'
  for file in (kept / '4').rglob('d/*'):
    file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(Again, match='checkpoints/4'):
    train.run(config, tmp_path)
  assert train.run(config, tmp_path)['final'] == first['final']
  assert runs.records(tmp_path) == before
  assert {p.name for p in kept.iterdir() if p.name.isdigit()} == {'4', '8'}
  assert 'from the log' in capsys.readouterr().out
  for file in (kept / '4').rglob('d/*'):
    file.write_bytes(file.read_bytes()[:-1])
  # Running again did not help; a job that requeues itself must not go on.
  with pytest.raises(Stopped, match='checkpoints/4') as e:
    train.run(config, tmp_path)
  assert not isinstance(e.value, Again)


def test_a_shared_log_that_could_not_be_written_leaves_the_old_one(
    tmp_path, monkeypatch):
  path = tmp_path / 'steps.log'
  steps = replay.no_steps(1)
  replay.write_shared(path, {'config': {}}, steps)
  before = path.read_bytes()

  def fails(self, data):
    with open(self, 'wb'):  # empties a file that exists
      raise OSError('no space')
  monkeypatch.setattr(type(path), 'write_bytes', fails)
  with pytest.raises(OSError):
    replay.write_shared(path, {'config': {'a': 1}}, steps)
  assert path.read_bytes() == before
