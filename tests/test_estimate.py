"""The losses of several directions: one after the other, or in one pass."""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mezo_jax
from mezo_jax import Displacement, estimate, LowRank
from mezo_jax.core import sharding
from mezo_jax.directions import noise

KEY = jax.random.key(1)
KINDS = [LowRank(rank=4), mezo_jax.Normal(), mezo_jax.Rademacher()]
WEIGHTS = jnp.array([1.0, 2, 0, 1, 3, 1, 1, 0.5])


@pytest.fixture(scope='module')
def tiny():
  model, params, _ = helpers.tiny_model(width=64, ff_width=128, vocab_size=256)
  ids = jax.random.randint(jax.random.key(2), (8, 12), 0, 256)
  def value_fn(params, ids, weights):
    log_p = model.apply({'params': params}, ids[:, :-1], targets=ids[:, 1:])
    return -log_p.mean(-1), weights
  return value_fn, params, dict(ids=ids, weights=WEIGHTS)


def of(n):
  return Displacement(noise.step_keys(KEY, 0, n), jnp.ones(n))


@pytest.mark.slow
@pytest.mark.exhaustive_except(kind=KINDS[:1], signs=[(1.0, -1.0)])
@pytest.mark.parametrize('kind,signs', [
    *((kind, (1.0, -1.0)) for kind in KINDS), (KINDS[0], (1.0, 0.0))],
                         ids=lambda k: type(k).__name__)
def test_in_one_pass_as_one_after_the_other(tiny, kind, signs):
  value_fn, params, batch = tiny
  run = helpers.quick_jit(lambda params, batch, over: estimate(
      value_fn, params, of(4), 1e-2, kind, signs=signs, over=over,
      batch=batch), static_argnums=2)
  by_turns, at_once, by_rows = (
      run(params, batch, over) for over in ('scan', 'batch', 'rows'))
  np.testing.assert_allclose(at_once, by_turns, rtol=1e-6)
  displaced = helpers.quick_jit(lambda params, key, c: value_fn(
      mezo_jax.displace(params, Displacement(key, c), kind), **batch)[0])
  want = np.zeros((4, 2))
  for j, key in enumerate(of(4).keys):
    for i, sign in enumerate(signs):
      values = displaced(params, key, sign * 1e-2)[2 * j:2 * j + 2]
      want[j, i] = 4 * np.sum(values * WEIGHTS[2 * j:2 * j + 2]) / WEIGHTS.sum()
  np.testing.assert_allclose(by_rows, want, rtol=2e-6)


@pytest.mark.slow
@pytest.mark.exhaustive_except(over=['rows'])
@pytest.mark.parametrize('kind,over', [
    (LowRank(rank=4), 'scan'), (LowRank(rank=4), 'batch'),
    (LowRank(rank=4), 'rows'), (mezo_jax.Normal(mask='attn'), 'scan')],
                         ids=lambda k: k if isinstance(k, str) else
                         type(k).__name__)
def test_around_a_displacement(tiny, kind, over):
  """Terms of another step, of signs in a loop: as of built weights."""
  value_fn, params, batch = tiny
  n = 3 if isinstance(kind, LowRank) else 9
  at = Displacement(noise.step_keys(KEY, 1, n), jnp.linspace(-1e-2, 2e-2, n))
  tx = mezo_jax.spsa(1e-2, key=KEY, directions=kind, over=over)
  def losses(params, around=None):
    state = tx.update(
        None, tx.init(params), params, batch=batch, around=around,
        value_fn=lambda params, batch: value_fn(params, **batch))[1]
    return state.value, state.projected_grad
  got = helpers.quick_jit(losses)(params, at)
  want = helpers.quick_jit(losses)(mezo_jax.displace(params, at, kind))
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
  np.testing.assert_allclose(got[1], want[1], atol=1e-3)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize('n', [2, 8])
@pytest.mark.parametrize('over', ['batch', 'rows'])
def test_a_mesh_changes_nothing(tiny, over, n):
  """Two directions for four groups of devices, and one for each row."""
  value_fn, params, batch = tiny
  run = helpers.quick_jit(lambda params, batch: estimate(
      value_fn, params, of(n), 1e-2, LowRank(rank=4), over=over, batch=batch))
  want = run(params, batch)
  mesh = sharding.make_mesh(2, 2, 2)
  placed = jax.device_put(
      jax.device_get(params), sharding.param_shardings(params, mesh))
  with jax.set_mesh(mesh):
    got = run(placed, sharding.put_batch(jax.device_get(batch), mesh))
  np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.slow
def test_rows_in_parts(tiny):
  value_fn, params, batch = tiny
  run = lambda parts: helpers.quick_jit(lambda params, batch: estimate(
      value_fn, params, of(4), 1e-2, LowRank(rank=4), over='rows',
      micro_batches=parts, batch=batch))(params, batch)
  np.testing.assert_allclose(run(2), run(1), rtol=1e-6)


@pytest.mark.slow
def test_the_estimate_of_rows_is_unbiased_and_as_spread_as_it_should_be():
  r"""Of row losses :math:`g_i^\top w` and signs, n = B directions, d elements:

  .. math:: E\hat g = \bar g, \qquad
            E|\hat g|^2 = \frac{d - 1}{B} E_i|g_i|^2 + |\bar g|^2

  where one direction for the batch has :math:`d |\bar g|^2`."""
  b, shape, steps = 4, (6, 5), 20_000
  slopes = jax.random.normal(jax.random.key(3), (b, *shape))
  mean = np.asarray(slopes.mean(0), np.float64)
  def value_fn(params, slopes):
    return jnp.sum(params['w'] * slopes, (1, 2))
  def one(key, kind):
    tx = mezo_jax.spsa(1.0, key=key, directions=kind, num_samples=b,
                       over='rows')
    params = {'w': jnp.zeros(shape)}
    return tx.update(None, tx.init(params), params, value_fn=value_fn,
                     slopes=slopes)[0]['w']
  d = np.prod(shape)
  for kind in (mezo_jax.Rademacher(), LowRank(rank=2)):
    g = np.asarray(jax.jit(jax.vmap(functools.partial(one, kind=kind)))(
        jax.random.split(KEY, steps)), np.float64)
    error = g.std(0) / np.sqrt(steps)
    assert np.max(np.abs(g.mean(0) - mean) / error) < 5
    if isinstance(kind, mezo_jax.Rademacher):
      squares = np.sum(g**2, (1, 2))
      want = (d - 1) / b * np.mean(
          np.sum(np.asarray(slopes)**2, (1, 2))) + np.sum(mean**2)
      assert abs(squares.mean() - want) < 5 * squares.std() / np.sqrt(steps)


@pytest.mark.slow
@pytest.mark.as_shipped
def test_directions_in_one_batch_share_each_product():
  """The compiler's count of operations, of wide layers beside a forward."""
  width, layers, rows = 512, 4, 64
  params = {'layers': {'w': jax.ShapeDtypeStruct(
      (layers, width, width), jnp.float32)}}
  def value_fn(params, x):
    for l in range(layers):
      x = x @ params['layers']['w'][l]
    return jnp.mean(x, -1)
  x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
  flops = lambda fn, *args: jax.jit(fn).lower(
      *args).compile().cost_analysis()['flops']
  one = flops(value_fn, params, x)
  many = flops(lambda params, x: estimate(
      value_fn, params, of(8), 1e-3, LowRank(rank=4), signs=(1.0,),
      over='rows', batch=dict(x=x)), params, x)
  assert many < 1.15 * one


def test_fzoo_is_what_numpy_makes_of_the_losses():
  losses = jnp.array([[0.9, 1.0], [1.3, 1.0], [1.05, 1.0]])
  value, g = mezo_jax.fzoo.fn(losses, 1e-3)
  one = np.asarray(losses[:, 0], np.float64)
  assert value == 1
  np.testing.assert_allclose(g, (one - 1) / one.std(ddof=1), rtol=1e-5)
  flat = mezo_jax.fzoo.fn(jnp.full((3, 2), 0.5), 1e-3)[1]
  assert not np.any(flat)  # no deviation, no step, and no division by 0
  with pytest.raises(ValueError, match='num_samples.*fzoo'):
    mezo_jax.fzoo.fn(losses[:1], 1e-3)


def test_options_are_checked(tiny):
  value_fn, params, batch = tiny
  with pytest.raises(ValueError, match="over .*'all'"):
    mezo_jax.spsa(key=0, over='all')
  with pytest.raises(ValueError, match="over .*'row'"):
    estimate(value_fn, params, of(2), 1e-2, LowRank(), over='row', batch=batch)
  with pytest.raises(ValueError, match='micro_batches=3 '):
    mezo_jax.spsa(key=0, over='rows', num_samples=4, micro_batches=3)
  def update(value_fn, n, directions, **batch):
    tx = mezo_jax.spsa(key=0, over='rows', num_samples=n, directions=directions)
    return jax.eval_shape(lambda: tx.update(
        None, tx.init(params), params, value_fn=value_fn, **batch))
  with pytest.raises(ValueError, match='num_samples=3 '):
    update(value_fn, 3, LowRank(), **batch)
  with pytest.raises(ValueError, match="over='rows'.*scalar"):
    update(lambda p, ids: jnp.float32(0), 4, LowRank(), ids=batch['ids'])
  params = {'w': jnp.zeros((1024, 1024))}
  dot, x = lambda p, x: jnp.sum(x @ p['w'], -1), jnp.ones((64, 1024))
  with pytest.raises(ValueError, match='128 points.*mezo_jax.LowRank'):
    update(dot, 64, mezo_jax.Normal(), x=x)
  assert update(dot, 64, LowRank(), x=x)
