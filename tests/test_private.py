"""Private MeZO: its equations, what a row can do to a step, what is published,
and the budget."""

import json
import sys

import dp_accounting
from dp_accounting import pld
from estimators import whole
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from scipy import stats

import mezo_jax
from mezo_jax import Displacement, make_step
from mezo_jax.core.errors import InputError, MissingError
from mezo_jax.directions import noise as noise_lib
from mezo_jax.runs import loggers
from mezo_jax.training import config as config_lib
from mezo_jax.training import privacy
from mezo_jax.variants.private import noise
from train import run

KEY, RATE, EPS, CLIP = jax.random.key(7), 1e-2, 1e-2, 0.5
ROWS = np.random.RandomState(0).normal(size=(12, 5)).astype(np.float32)
TRUE = ROWS @ np.random.RandomState(1).normal(size=5).astype(np.float32)
private = whole.private


def value_fn(params, batch):
  return (batch['x'] @ params - batch['y']) ** 2, batch['weight']


def batch_of(rows, room=16):
  """These rows, and empty ones, which are not numbers."""
  pad = lambda x: np.concatenate(
      [x[rows], np.full((room - len(rows), *x.shape[1:]), np.nan, x.dtype)])
  return dict(x=pad(ROWS), y=pad(TRUE), weight=np.float32(
      np.arange(room) < len(rows)))


def secret_key(t):
  return privacy.noise_key(b's' * 32, t)


def made(**more):
  return private(RATE, EPS, **(dict(key=KEY, clip=CLIP, noise_multiplier=0.7,
                                    batch_size=8) | more))


def released(tx, batch, key=None, value_fn=value_fn):
  """The projected gradients of a first step."""
  params = jnp.ones(5)
  run = helpers.quick_jit(lambda key, batch: tx.update(
      None, tx.init(params), params, value_fn=value_fn, batch=batch,
      noise_key=key))
  _, state = run(secret_key(0) if key is None else key, batch)
  assert np.isnan(optax.tree.get(state, 'value'))  # no loss of a row
  return np.asarray(optax.tree.get(state, 'projected_grad'))


def xi(key, n, mechanism):
  """The noise of a key, in float64."""
  u, low, other = np.float64(jax.random.bits(
      jax.random.wrap_key_data(key), (3, n), jnp.uint32)) / 2**32
  length = -np.log(u + low / 2**32)
  if mechanism == 'gaussian':
    return np.sqrt(2 * length) * np.cos(2 * np.pi * other)
  return length * np.where(other < 0.5, 1, -1)


# --- the equations ----------------------------------------------------------


@pytest.mark.slow_except(mechanism=['laplace'])
@pytest.mark.parametrize('mechanism, n, parts', [
    ('gaussian', 1, 1), ('laplace', 1, 2), ('gaussian', 3, 4)])
def test_it_is_its_papers_equations(mechanism, n, parts):
  """20 steps in NumPy, given z and the noise, of batches of unequal sizes."""
  tx = made(mechanism=mechanism, num_samples=n, micro_batches=parts)
  step, params = make_step(tx, value_fn), jnp.ones(5)
  state, theta = tx.init(params), np.ones(5)
  clipped = 0
  for t in range(20):
    rows = np.flatnonzero(np.random.RandomState(t).rand(12) < 0.6)
    z = np.stack([np.asarray(mezo_jax.direction(jnp.zeros(5), Displacement(
        noise_lib.direction_key(KEY, t, j), 1.0)), np.float64)
                  for j in range(n)])
    losses = (ROWS[rows] @ (theta + EPS * np.stack([z, -z])).swapaxes(1, 2)
              - TRUE[rows, None]) ** 2  # [sign, row, direction]
    d = (losses[0] - losses[1]).T / (2 * EPS)
    length = np.sqrt((d ** 2).sum(0))
    clipped += np.sum(length > CLIP)
    d = d * np.minimum(1, CLIP / length)
    g = (d.sum(1) + 0.7 * CLIP * xi(secret_key(t), n, mechanism)) / 8
    theta = theta - RATE * (g[:, None] * z).mean(0)
    params, state, metrics = step(
        params, state, batch_of(rows), noise_key=secret_key(t))
    np.testing.assert_allclose(metrics['projected_grad'], g, rtol=2e-3,
                               atol=1e-4)
  np.testing.assert_allclose(params, theta, rtol=1e-4)
  assert clipped and metrics['skipped'] == 0


@pytest.mark.slow
@pytest.mark.parametrize('mechanism', ['gaussian', 'laplace'])
def test_the_noise_is_of_its_distribution(mechanism):
  """2,000 secrets: Kolmogorov and Smirnov cannot tell them apart."""
  tx = made(mechanism=mechanism, clip=2.0, noise_multiplier=1.5)
  nobody = batch_of(np.arange(0))
  keys = jnp.stack([secret_key(t) for t in range(2000)])
  one = lambda key: optax.tree.get(tx.update(
      None, tx.init(jnp.ones(5)), jnp.ones(5), value_fn=value_fn, batch=nobody,
      noise_key=key)[1], 'projected_grad')
  found = np.asarray(jax.jit(jax.vmap(one))(keys))[:, 0]
  of = {'gaussian': stats.norm, 'laplace': stats.laplace}[mechanism]
  assert stats.kstest(found, of(scale=2.0 * 1.5 / 8).cdf).pvalue > 1e-3
  # Its mean and variance, within five standard errors.
  n = 200_000
  draws = np.float64(noise(KEY, n, mechanism))
  var, kurtosis = {'gaussian': (1, 3), 'laplace': (2, 6)}[mechanism]
  assert abs(draws.mean()) < 5 * np.sqrt(var / n)
  assert abs(draws.var() / var - 1) < 5 * np.sqrt((kurtosis - 1) / n)


@pytest.mark.parametrize('mechanism, most', [('gaussian', 9.3),
                                             ('laplace', 43.0)])
def test_its_tails_do_not_end_where_a_float_s_do(monkeypatch, mechanism, most):
  """At the least of 2**64 uniform numbers; of 2**24 it is 5.4, and 16."""
  with monkeypatch.context() as m:
    m.setattr(jax.random, 'bits', lambda key, shape, dtype: jnp.zeros(
        shape, dtype))
    assert noise(jax.random.key(0), 1, mechanism)[0] > most
    m.setattr(jax.random, 'bits', lambda key, shape, dtype: jnp.full(
        shape, 2**32 - 1, dtype))
    assert np.isfinite(noise(jax.random.key(0), 1, mechanism)[0])


# --- what a row can do ------------------------------------------------------


@pytest.mark.slow_except(row=[np.inf, 50.0])
@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize('row', [1e30, -3e38, np.inf, np.nan, 50.0])
def test_no_row_moves_what_is_released_by_more_than_the_clip(row, n):
  """Added to a batch, whatever its losses are; in the Euclidean norm."""
  tx = made(num_samples=n)
  rows, more = np.arange(6), np.arange(7)
  with_it = batch_of(more)
  with_it['y'] = with_it['y'].copy()
  with_it['y'][6] = row
  change = 8 * (released(tx, with_it) - released(tx, batch_of(rows)))
  assert np.all(np.isfinite(change))
  assert np.linalg.norm(change) < CLIP * (1 + 1e-4)
  if row == 50.0:
    assert np.linalg.norm(change) > 0.99 * CLIP  # the bound is reached


@pytest.mark.slow
def test_masked_weights_are_not_perturbed():
  """Rows whose loss notices it would be NaN, and count as 0."""
  blind = lambda params, batch: (jnp.where(
      params[0] != 1, jnp.nan, value_fn(params, batch)[0]), batch['weight'])
  tx = made(noise_multiplier=0.0, directions=mezo_jax.Normal(
      mask=np.arange(5) > 0))
  rows = batch_of(np.arange(12))
  g = released(tx, rows, value_fn=blind)
  np.testing.assert_allclose(g, released(tx, rows), rtol=1e-3)
  assert abs(g[0]) > 0.1


def test_a_loss_of_the_whole_batch_is_refused():
  tx, params = made(), jnp.ones(5)
  update = lambda value_fn, **more: tx.update(
      None, tx.init(params), params, value_fn=value_fn, **more)
  with pytest.raises(ValueError, match='value_fn .*scalar'):
    update(lambda p: jnp.sum(p), noise_key=secret_key(0))
  # One value of all rows, and one for every two, would be clipped as rows.
  mean = lambda p, batch: jnp.mean(value_fn(p, batch)[0], keepdims=True)
  pairs = lambda p, batch: value_fn(p, batch)[0].reshape(-1, 2).mean(1)
  for of_batch in (mean, pairs):
    for parts in (1, 2):
      with pytest.raises(ValueError, match=r'value_fn .* \[(8|16)\]'):
        released(made(micro_batches=parts), batch_of(np.arange(12)),
                 value_fn=of_batch)
  with pytest.raises(ValueError, match='noise_key'):
    update(lambda p: p * p)
  with pytest.raises(ValueError, match='clip .*0.0'):
    made(clip=0.0)
  with pytest.raises(ValueError, match="mechanism 'laplace' .*num_samples"):
    made(mechanism='laplace', num_samples=2)
  with pytest.raises(ValueError, match="mechanism .*'uniform'"):
    made(mechanism='uniform')


# --- what is published ------------------------------------------------------


@pytest.mark.slow
def test_all_that_is_published_does_not_give_the_noise():
  """The same key, state, rows and weights, and another secret: another number.
  And the state holds neither."""
  tx, batch = made(), batch_of(np.arange(8))
  one, two = (released(tx, batch, privacy.noise_key(s * 32, 0))
              for s in (b'a', b'b'))
  assert one != two
  _, state = tx.update(
      None, tx.init(jnp.ones(5)), jnp.ones(5), value_fn=value_fn, batch=batch,
      noise_key=privacy.noise_key(b'a' * 32, 0))
  held = [np.asarray(jax.random.key_data(x) if jnp.issubdtype(
      x.dtype, jax.dtypes.prng_key) else x) for x in jax.tree.leaves(state)]
  words = privacy.noise_key(b'a' * 32, 0)
  assert not any(w in x.ravel().view(np.uint32) for x in held for w in words
                 if x.dtype.itemsize == 4)
  # From the direction's key, as in the paper's code, it does not come.
  key = noise_lib.direction_key(KEY, 0)
  guess = one - 0.7 * CLIP / 8 * np.asarray(noise(key, 1, 'gaussian'))
  assert abs(guess - released(made(noise_multiplier=0.0), batch)) > 1e-4


def test_replay_needs_no_secret():
  tx, params = made(), jnp.ones(5)
  step, state, told = make_step(tx, value_fn), tx.init(params), []
  start = jnp.copy(params)
  for t in range(4):
    params, state, metrics = step(
        params, state, batch_of(np.arange(t, 12)), noise_key=secret_key(t))
    told.append(metrics['projected_grad'])
  again, fresh = start, jax.jit(tx.init)(start)
  for g in told:
    again, fresh, _ = step.update(again, fresh, g)
  helpers.assert_bitwise(again, params)


# --- the budget -------------------------------------------------------------


@pytest.mark.slow_except(mechanism=['laplace'])
@pytest.mark.parametrize('mechanism', ['gaussian', 'laplace'])
def test_the_account_is_the_accountants(mechanism):
  plan = privacy.plan(6.0, 1e-5, mechanism, 500, 2000, 16)
  event = {'gaussian': dp_accounting.GaussianDpEvent,
           'laplace': dp_accounting.LaplaceDpEvent}[mechanism](
               plan.noise_multiplier)
  account = pld.PLDAccountant().compose(
      dp_accounting.PoissonSampledDpEvent(16 / 2000, event), 500)
  # A thousandth of delta is for batches that are cut short.
  assert account.get_epsilon(1e-5) <= plan.spent(500) <= 6.0
  np.testing.assert_allclose(plan.spent(500), 6.0, rtol=1e-4)
  np.testing.assert_allclose(account.get_epsilon(1e-5), 6.0, rtol=1e-3)
  assert plan.spent(0) == 0 < plan.spent(100) < plan.spent(500)
  cut = stats.binom.sf(plan.capacity, 2001, 16 / 2000)  # of a neighbour
  assert 500 * cut * (1 + np.exp(6)) <= 1e-8
  assert plan.capacity < 60
  with pytest.raises(ValueError, match='data.batch_size 16 .* 10 '):
    privacy.plan(6.0, 1e-5, mechanism, 500, 10, 16)


def test_without_the_accountant(monkeypatch):
  monkeypatch.setitem(sys.modules, 'dp_accounting', None)
  with pytest.raises(MissingError, match='dp-accounting'):
    privacy.plan(6.0, 1e-6, 'gaussian', 10, 100, 10)


def test_rows_are_there_by_chance_each_for_itself():
  """4,000 steps: rates of rows and of pairs, within five standard errors."""
  plan = privacy.plan(6.0, 1e-5, 'gaussian', 4000, 40, 8)
  seen = np.zeros((4000, 40))
  for t in range(4000):
    seen[t, privacy.sample(b'x' * 32, t, plan)] = 1
  q, bound = 0.2, 5 * np.sqrt(0.2 * 0.8 / 4000)
  assert np.all(np.abs(seen.mean(0) - q) < bound)
  pairs = seen.T @ seen / 4000 - q * q
  assert np.all(np.abs(pairs[~np.eye(40, dtype=bool)]) < 5 * np.sqrt(
      q * q * (1 - q * q) / 4000))
  sizes = seen.sum(1)
  assert abs(sizes.std() - np.sqrt(40 * q * (1 - q))) < 0.2
  again = privacy.sample(b'x' * 32, 5, plan)
  assert np.array_equal(again, np.flatnonzero(seen[5]))
  assert not np.array_equal(again, privacy.sample(b'y' * 32, 5, plan))


class Killed(BaseException):
  """Ends a run where it is raised, as kill -9 does."""


@pytest.mark.slow
def test_a_run_spends_its_budget_once(
    tiny_dir, reviews_file, tmp_path, monkeypatch, capsys):
  """Killed and resumed it ends as one that was not and has the same secret;
  nothing of that is published; more steps are refused."""
  runs.use_devices(monkeypatch, 1)
  config = runs.small_config(
      tiny_dir, reviews_file, method='private', privacy__epsilon=8.0,
      privacy__delta=1e-3, privacy__clip=2.0, steps=8, eval_every=4,
      checkpoint_every=4, data__max_length=16)
  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  for place in (whole, killed):
    place.mkdir()
    (place / 'secret').write_bytes(b'k' * 32)
  run(config, whole)
  out = capsys.readouterr().out
  assert 'spent epsilon' in out, out
  assert not (whole / 'predictions.jsonl').exists()
  result = json.loads((whole / 'result.json').read_text())['privacy']
  event = dp_accounting.PoissonSampledDpEvent(
      8 / 40, dp_accounting.GaussianDpEvent(result['noise_multiplier']))
  spent = pld.PLDAccountant().compose(event, 8).get_epsilon(1e-3)
  assert spent <= result['spent'] <= 8 and spent > 7.9
  train = [r for r in runs.records(whole) if r['kind'] == 'train']
  assert len(train) == 8 and not any('loss' in r for r in train)
  assert {r['tokens'] for r in train} == {result['capacity'] * 16}
  assert 'data: 40 train rows, padded to 16 tokens' in out
  assert 'nan' not in out and out.count('tokens on average') == 2  # dev, test
  spent = [r['epsilon'] for r in runs.records(whole) if 'epsilon' in r]
  assert 0 < spent[0] < spent[1] == result['spent']
  for text in (f'; spent epsilon {spent[0]:.3f}', 'final (step 8, the last)'):
    assert text in out
  published = [p for p in whole.rglob('*') if p.is_file()
               and p.name != 'secret']
  assert not any(b'k' * 16 in p.read_bytes() for p in published)

  write = loggers.Metrics.write

  def write_and_die(self, kind, step, **values):
    write(self, kind, step, **values)
    if (kind, step) == ('train', 6):
      raise Killed

  with monkeypatch.context() as m, pytest.raises(Killed):
    m.setattr(loggers.Metrics, 'write', write_and_die)
    run(config, killed)
  run(config, killed)
  assert 'resumed from step ' in capsys.readouterr().out
  helpers.assert_bitwise(runs.saved(whole)[1], runs.saved(killed)[1])
  assert runs.records(whole) == runs.records(killed)

  saved = json.loads((whole / 'config.json').read_text())
  config = config_lib.from_json(saved)
  config_lib.check_same_run(config, saved)
  config.steps = 12
  with pytest.raises(InputError, match='epsilon 8.*steps .*12'):
    run(config, whole)
  config.steps, config.mesh.data = 8, 8
  with pytest.raises(ValueError, match='mesh.data .* 1 .* 8'):
    config_lib.check_same_run(config, saved)


def test_a_new_secret_is_for_nobody_else(tmp_path):
  found = privacy.secret(tmp_path / 'run', new=True)
  file = tmp_path / 'run' / 'secret'
  assert file.stat().st_mode & 0o777 == 0o600
  assert found == file.read_bytes() == privacy.secret(tmp_path / 'run', False)
  assert len(set(found)) > 8
  file.unlink()
  with pytest.raises(ValueError, match='run/secret'):
    privacy.secret(tmp_path / 'run', False)
  file.write_bytes(b'short')
  with pytest.raises(ValueError, match='run/secret .* 5 '):
    privacy.secret(tmp_path / 'run', False)
