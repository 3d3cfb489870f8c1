"""What z is: one object, the same draws as ever, and what a displacement is."""

from collections import OrderedDict
import dataclasses
import hashlib

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mezo_jax
from mezo_jax import Displacement, Normal, Rademacher
from mezo_jax.directions import noise, streams

pytestmark = pytest.mark.as_shipped

KEY = jax.random.key(11)
LEAVES = {'embed': (50, 8), 'layers/w': (3, 6, 5), 'h_1/s': (9,)}
TREE = {'embed': jnp.zeros((50, 8)), 'layers': {'w': jnp.zeros((3, 6, 5))},
        'h_1': {'s': jnp.zeros(9)}}
# Of the first release: a run that is resumed must draw what it drew.
WORDS = {
    'hash32':
    'f23e0d5b60813cd8cef9d7a85ffdcc40f933f0df5eac9c9baaf2e88c34a1636d',
    'threefry2x32':
    '45366b636bd453dbb086c8aaf2363746a747540e1ca39ed40cf9d14dbc92c247'}
DRAWS = {
    Normal('hash32'): [
        0.641494631767273, 0.30281466245651245, 0.9709852933883667,
        0.4077279567718506, 0.10725868493318558],
    Normal('threefry2x32'): [
        -0.35324135422706604, -0.2381715029478073, 0.6591612100601196,
        -0.5774131417274475, 1.247554898262024],
    Rademacher('hash32'): [-1.0, -1.0, 1.0, -1.0, -1.0],
    Rademacher('threefry2x32'): [1.0, 1.0, -1.0, 1.0, -1.0],
}


@pytest.mark.parametrize('generator', WORDS)
def test_words_are_what_they_were(generator):
  digest = hashlib.sha256()
  for path, shape in LEAVES.items():
    s = streams.of_leaf(KEY[None], path, shape)
    digest.update(np.asarray(noise.words(
        s, 0, jnp.zeros(shape), generator)).tobytes())
  assert digest.hexdigest() == WORDS[generator]


@pytest.mark.parametrize('directions', DRAWS, ids=str)
def test_draws_are_what_they_were(directions):
  """To the last bits of a normal draw, which differ between machines."""
  z = mezo_jax.direction(TREE, Displacement(KEY, 1.0), directions)
  np.testing.assert_allclose(
      z['layers']['w'][1, 2], DRAWS[directions], rtol=1e-6)


@pytest.mark.slow
def test_a_displacement_is_a_pytree():
  """It can be scanned, joined, kept in an array and sent through jit."""
  keys = jax.vmap(jax.random.key)(jnp.arange(3))
  d = Displacement(keys, jnp.array([0.1, -0.2, 0.3]))
  want = mezo_jax.displace(TREE, d)
  one_by_one, _ = jax.lax.scan(
      lambda tree, term: (mezo_jax.displace(tree, term), None), TREE, d)
  helpers.assert_close(one_by_one, want)
  joined = jax.tree.map(lambda *x: jnp.concatenate(x), *(
      jax.tree.map(lambda x, i=i: x[i], d) for i in (slice(2), slice(2, 3))))
  helpers.assert_bitwise(jax.jit(mezo_jax.displace)(TREE, joined),
                         jax.jit(mezo_jax.displace)(TREE, d))
  doubled = mezo_jax.direction(TREE, d.times(2.0))
  helpers.assert_close(doubled, jax.tree.map(
      lambda x: 2 * x, mezo_jax.direction(TREE, d)))


def test_coefficients_of_groups():
  d = Displacement(KEY, OrderedDict([('^layers/', 0.5), ('', 2.0)]))
  z, got = (mezo_jax.direction(TREE, x) for x in (Displacement(KEY, 1.0), d))
  helpers.assert_close(got['layers']['w'], 0.5 * z['layers']['w'])
  helpers.assert_close(got['embed'], 2 * z['embed'])
  with pytest.raises(ValueError, match='coefs.*OrderedDict'):
    mezo_jax.direction(TREE, d._replace(coefs=dict(d.coefs)))
  only = Displacement(KEY, OrderedDict([('^layers/', 0.5)]))
  with pytest.raises(ValueError, match='embed .*groups'):
    mezo_jax.direction(TREE, only)


def test_directions_are_values():
  assert Normal() == Normal('hash32') != Rademacher()
  assert len({Normal(), Normal(), Rademacher(), Normal(mask='a')}) == 3
  assert dataclasses.replace(Rademacher(), mask='a').mask == 'a'
  with pytest.raises(dataclasses.FrozenInstanceError):
    Normal().generator = 'threefry2x32'


@pytest.mark.slow
def test_masks_of_elements():
  """Half of a leaf, seen through a reshape, a transpose and rows by index."""
  there = jax.random.bernoulli(KEY, 0.5, (50, 8))
  kind = Normal(mask={'embed': there, 'layers': False, 'h_1': True})
  z = mezo_jax.direction(TREE, Displacement(KEY, 1.0), kind)
  whole = mezo_jax.direction(TREE, Displacement(KEY, 1.0))
  helpers.assert_bitwise(z['embed'], jnp.where(there, whole['embed'], 0))
  assert not np.any(z['layers']['w'])
  x = jnp.arange(400.0).reshape(25, 16) / 400
  for view in (lambda e: jnp.sum(e.reshape(25, 16) * x),
               lambda e: jnp.sum(e.T.reshape(16, 25) * x.T),
               lambda e: jnp.sum(e[jnp.array([3, 7])] @ x[:8])):
    near = mezo_jax.perturbed(lambda p, view=view: view(p['embed']), kind)(
        TREE, Displacement(KEY, 1.0))
    np.testing.assert_allclose(near, view(z['embed']), rtol=1e-4)
  with pytest.raises(ValueError, match=r'mask .*\(8,\).*\(50, 8\)'):
    mezo_jax.direction(TREE, Displacement(KEY, 1.0), Normal(
        mask={'embed': there[0], 'layers': True, 'h_1': True}))


def test_weight_decay_does_not_reach_masked_elements():
  mask = {'embed': jnp.ones((50, 8), bool), 'layers': False, 'h_1': True}
  tx = mezo_jax.mezo(1e-2, key=0, directions=Normal(mask=mask),
                     weight_decay=0.1, decay='embed')
  with pytest.raises(ValueError, match='weight_decay .*mask'):
    tx.init(TREE)


def test_directions_decide_which_leaves_they_take():
  """Integers have no z but in directions that say so."""
  params = {'w': jnp.ones(3), 'codes': jnp.arange(3)}

  class OfCodes(Rademacher):
    def takes(self, leaf):
      return True

  d = Displacement(KEY, 1.0)
  assert not np.any(mezo_jax.direction(params, d, Rademacher())['codes'])
  z = mezo_jax.direction(params, d, OfCodes())
  assert set(np.abs(z['codes'])) == {1} and z['codes'].dtype == jnp.int32
  assert mezo_jax.displace(params, d, OfCodes())['codes'].dtype == jnp.int32


def test_a_combine_of_ones_own():
  """Central differences at two distances: exact for a cubic."""
  def five_points(losses, eps):
    near, far = losses[:, 0] - losses[:, 1], losses[:, 2] - losses[:, 3]
    return jnp.mean(losses), (8 * near - far) / (12 * eps)
  combine = mezo_jax.Combine((1.0, -1.0, 2.0, -2.0), five_points)
  loss = lambda p: jnp.sum(p['w'] ** 3)
  params = {'w': jnp.array([0.5, -0.3, 0.2])}
  tx = mezo_jax.spsa(0.1, key=0, combine=combine, num_samples=2)
  _, state = tx.update(None, tx.init(params), params, value_fn=loss)
  for j in range(2):
    z = mezo_jax.direction(params, Displacement(
        noise.direction_key(jax.random.key(0), 0, j), 1.0))
    np.testing.assert_allclose(
        state.projected_grad[j], jnp.sum(3 * params['w'] ** 2 * z['w']),
        rtol=1e-4)


def test_what_the_door_refuses():
  tx = mezo_jax.spsa(key=0, num_samples=2)
  params = {'w': jnp.ones(3)}
  state = tx.init(params)
  with pytest.raises(ValueError, match=r'projected_grad .*\[2\].*\[\]'):
    tx.update(None, state, params, projected_grad=1.0)
  with pytest.raises(ValueError, match='value_fn and projected_grad'):
    tx.update(None, state, params, projected_grad=jnp.ones(2),
              value_fn=lambda p: jnp.float32(0))
  _, state = tx.update(None, state, params, projected_grad=jnp.ones(2),
                       value=3.5)
  assert state.value == 3.5 and state.count == 1
