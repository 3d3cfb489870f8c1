"""Checkpoints: what is kept, and where it lies when it is loaded."""

import shutil

import helpers
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp
import pytest

import mezo_jax
from mezo_jax.core import sharding
from mezo_jax.core.errors import Damaged, InputError, MissingError
from mezo_jax.runs import checkpoint


@pytest.mark.parametrize('keep,left', [(1, [3, 5]), (2, [3, 4, 5])])
def test_checkpoints_keep_the_newest_and_the_best(tmp_path, keep, left):
  state = {'w': jax.numpy.arange(4.0), 'key': jax.random.key(3)}
  kept = checkpoint.Checkpoints(tmp_path, keep)
  for step, accuracy, loss in ((1, .5, 1.0), (2, .9, .6), (3, .9, .5), (4, .6,
                                                                       .4)):
    kept.save(step, state, {'score': accuracy, 'loss': loss})
  with helpers.compilations() as seen:
    kept.save(5, state)
  assert not seen
  assert kept.best_step() == 3 and kept.latest_step() == 5
  kept.wait()
  steps = sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit())
  assert steps == left
  helpers.assert_bitwise(kept.load(3, state)['w'], state['w'])
  assert kept.load(3, state)['key'] == state['key']
  kept.close()


def test_loaded_arrays_have_the_sharding_that_was_asked_for(tmp_path):
  """So one load can follow another."""
  place = sharding.replicated(helpers.mesh_of(1, 1))  # where this went wrong
  state = jax.device_put(
      {'w': jax.numpy.arange(4.0), 'key': jax.random.key(3)}, place)
  kept = checkpoint.Checkpoints(tmp_path)
  kept.save(1, state)
  kept.wait()
  found = state
  for _ in range(2):
    found = kept.load(1, found)
    assert found['key'] == state['key']
    assert {x.sharding for x in found.values()} == {place}
  kept.close()


def test_a_checkpoint_without_our_record_is_refused(tmp_path):
  """Such as one that another program saved with orbax."""
  state = {'w': jax.numpy.arange(4.0)}
  with ocp.training.Checkpointer(tmp_path) as other:
    other.save(1, state)
  kept = checkpoint.Checkpoints(tmp_path)
  with pytest.raises(Damaged, match=f'{tmp_path}/1 '):
    kept.load(1, state)
  kept.close()


@pytest.mark.slow
def test_what_is_damaged_is_never_loaded(tmp_path):
  """A flipped bit, or a cut, in each file of a checkpoint."""
  rng = np.random.default_rng(0)
  params = {'w': jax.numpy.asarray(rng.normal(size=(30, 20)), 'float32'),
            'codes': jax.numpy.arange(8, dtype='int4')}
  tx = mezo_jax.mezo(1e-3, key=0, directions=mezo_jax.Normal(mask='w'))
  state = params, tx.init(params)
  metrics = {'score': 0.5, 'loss': 1.25}
  whole = checkpoint.Checkpoints(tmp_path / 'whole')
  whole.save(3, state, metrics)
  whole.wait()
  whole.close()
  files = [p.relative_to(tmp_path / 'whole')
           for p in sorted((tmp_path / 'whole').rglob('*')) if p.is_file()]
  seen = set()
  for i, file in enumerate(files * 3):
    where = tmp_path / f'{i}'
    shutil.copytree(tmp_path / 'whole', where / 'checkpoints')
    data = bytearray((where / 'checkpoints' / file).read_bytes())
    if data and i % 2:
      data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    (where / 'checkpoints' / file).write_bytes(
        data if i % 2 else data[:len(data) // 2])
    try:
      kept = checkpoint.Checkpoints(where / 'checkpoints')
    except Damaged as e:
      seen.add('not opened')
      assert str(where / 'checkpoints' / '3') in str(e)  # what to move
      shutil.move(where / 'checkpoints' / '3', where)
      kept = checkpoint.Checkpoints(where / 'checkpoints')
    else:
      try:
        found = kept.load(3, state)
      except Damaged:
        seen.add('refused')
        assert kept.set_aside(3).is_dir()
      else:
        seen.add('whole')
        for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(state)):
          assert (got == want).all(), file
        assert kept.best_step() == 3
    kept.save(4, state)  # it resumes
    kept.close()
  assert seen == {'refused', 'whole', 'not opened'}


@pytest.mark.parametrize('score', ['18446744073709551616', '0.9', '"a"'])
def test_metrics_that_are_not_those_that_were_saved(tmp_path, score):
  directory, state = tmp_path / 'checkpoints', {'w': jax.numpy.ones(3)}
  kept = checkpoint.Checkpoints(directory)
  kept.save(1, state, {'score': 0.5, 'loss': 1.25})
  kept.close()
  file = directory / '1' / 'metrics' / 'metrics'
  file.write_text(file.read_text().replace('0.5', score))
  kept = checkpoint.Checkpoints(directory)
  with pytest.raises((Damaged, MissingError)):
    kept.load(kept.best_step(), state)
  kept.close()


def test_of_another_model_is_not_damaged(tmp_path):
  kept = checkpoint.Checkpoints(tmp_path / 'checkpoints')
  kept.save(1, {'w': jax.numpy.ones(3)})
  kept.wait()
  with pytest.raises(InputError, match='checkpoints/1') as e:
    kept.load(1, {'w': jax.numpy.ones(4)})
  assert not isinstance(e.value, Damaged)
  kept.close()


@pytest.mark.parametrize('make, more', [
    (mezo_jax.spsa, set()), (mezo_jax.variants.hizoo, {'memory/w'})],
    ids=['spsa', 'hizoo'])
def test_the_names_in_a_state_stay(make, more):
  """They are in checkpoints, which later versions are to read."""
  state = make(1e-3, key=0).init({'w': jax.numpy.ones(2)})
  names = {'count', 'key', 'value', 'projected_grad', 'notfinite_count',
           'total_notfinite'}
  if more:
    names = {f'spsa/{name}' for name in names}
  assert helpers.paths(state) == names | more
