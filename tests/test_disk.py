"""A disk that is full, read-only or forbidden; directories of any name."""

import errno
import os
import subprocess

import pytest
import runs

from mezo_jax.core.errors import in_one_sentence, InputError, local, of_the_disk
from mezo_jax.export.from_run import export
from mezo_jax.runs import checkpoint
import train


@pytest.fixture
def disk(tmp_path):
  """A function that makes a file system of so many KiB, or changes its size."""
  place = tmp_path / 'disk'
  place.mkdir()
  mounted = []

  def make(size, *more):
    options = ','.join([*(['remount'] if mounted else []), f'size={size}k',
                        *more])
    found = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', place],
        capture_output=True)
    if found.returncode:
      pytest.skip('cannot mount a file system')
    mounted.append(place)
    return place
  yield make
  if mounted:
    subprocess.run(['umount', '-l', place], check=True)


def said(fn, capfd) -> str:
  """Returns the status and the message that a program ends with."""
  capfd.readouterr()
  with pytest.raises(SystemExit) as e, in_one_sentence('prog'):
    fn()
  assert 'Traceback' not in ''.join(capfd.readouterr())
  assert e.value.code.startswith('prog: ') and '\n' not in e.value.code
  return e.value.code


@pytest.mark.slow
def test_a_full_disk(disk, tiny_dir, reviews_file, tmp_path, capfd):
  config = runs.small_config(tiny_dir, reviews_file, steps=4, eval_every=2)
  # In config.json, in the log's header, and in checkpoints.
  for size in (4, 12, 300):
    place = disk(size) / f'{size}'
    text = said(lambda place=place: train.run(config, place), capfd)
    assert 'No space left on device' in text
  result = train.run(config, disk(20_000) / '300')
  assert [r['step'] for r in runs.records(tmp_path / 'disk' / '300')
          if r['kind'] == 'train'] == [1, 2, 3, 4]
  assert result['final'] == train.run(config, tmp_path / 'run')['final']
  used = sum(f.stat().st_size for f in (tmp_path / 'disk').rglob('*'))
  disk(used // 1024 + 100)
  text = said(lambda: export(tmp_path / 'run', tmp_path / 'disk/out'), capfd)
  assert 'No space left on device' in text
  disk(20_000)
  export(tmp_path / 'run', tmp_path / 'disk' / 'out')  # part of it is there
  disk(20_000, 'ro')
  said(lambda: export(tmp_path / 'run', tmp_path / 'disk' / 'x'), capfd)
  config.steps = 6
  said(lambda: train.run(config, tmp_path / 'disk' / '300'), capfd)
  export(tmp_path / 'disk' / '300', tmp_path / 'from read-only')


def test_where_an_error_of_the_disk_is_found():
  full = os.strerror(errno.ENOSPC)
  assert of_the_disk(OSError(errno.EDQUOT, 'x')) == errno.EDQUOT
  assert of_the_disk(RuntimeError(f'INTERNAL: {full} [a]')) == errno.ENOSPC
  assert of_the_disk(ExceptionGroup('several', [
      ValueError('x'), OSError(errno.EROFS, 'x')])) == errno.EROFS
  try:
    raise ValueError('cannot save') from OSError(errno.EACCES, 'x')
  except ValueError as e:
    assert of_the_disk(e) == errno.EACCES
  assert of_the_disk(ValueError('x')) is None
  assert of_the_disk(FileNotFoundError(errno.ENOENT, 'x')) is None
  try:  # an error of ours in the handler of another is ours
    try:
      raise OSError(errno.EACCES, 'x')
    except OSError:
      raise KeyError('a bug')
  except KeyError as e:
    assert of_the_disk(e) is None


@pytest.mark.parametrize('error', [
    PermissionError(errno.EACCES, 'Permission denied'),
    RuntimeError('PERMISSION_DENIED: Error opening: Permission denied')])
def test_a_checkpoint_that_may_not_be_read_is_not_damaged(
    error, tmp_path, monkeypatch):
  import jax.numpy as jnp
  kept = checkpoint.Checkpoints(tmp_path / 'c')
  kept.save(1, {'w': jnp.ones(3)})
  kept.wait()
  def fail(*args):
    raise error
  monkeypatch.setattr(kept._checkpointer, 'load', fail)
  with pytest.raises(PermissionError):
    kept.load(1, {'w': jnp.ones(3)})
  kept.close()


@pytest.mark.slow_except(name=['a[b]c', 'gs'])
@pytest.mark.parametrize('name', [
    'a[b]c', '[!a]', 'a*', 'a**b', 'x?', '{a,b}', '50%41', 'x#y', 'a b ', '~',
    'ünï', 'new\nline', 'x:y', "it's", '.hidden', '$HOME', 'gs'])
def test_checkpoints_in_a_directory_of_any_name(name, tmp_path):
  import jax.numpy as jnp
  state = {'w': jnp.arange(4.0)}
  for again in (False, True):
    kept = checkpoint.Checkpoints(tmp_path / name / 'c')
    if not again:
      kept.save(1, state, {'score': 1.0, 'loss': 1.0})
      kept.wait()
    assert kept.best_step() == 1 and kept.latest_step() == 1
    assert (kept.load(1, state)['w'] == state['w']).all()
    kept.close()


@pytest.mark.parametrize('name', [
    'gs://bucket/run', 's3:/bucket', 'a\\b', 'a\udcffb'])
def test_names_that_are_refused(name, tiny_dir, reviews_file):
  with pytest.raises(InputError, match='address|character'):
    local(name)
  config = runs.small_config(tiny_dir, reviews_file)
  with pytest.raises(InputError, match='address|character'):
    train.run(config, type(tiny_dir)(name))
