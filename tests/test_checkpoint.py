"""Checkpoints: what is kept, and where it lies when it is loaded."""

import helpers
import jax
from orbax.checkpoint import v1 as ocp

from mezo_jax import checkpoint, sharding


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
