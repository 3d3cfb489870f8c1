"""variants of MeZO: each against its paper's equations in NumPy, and what it
claims."""

import dataclasses
import functools

from estimators import whole
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import variants_reference
from variants_reference import (
  batch_of,
  EPS,
  flat,
  gradient_of,
  KEY,
  loss_of,
  RATE,
  rows,
  START,
  two_sided,
  value_fn,
  z_of,
)

import mezo_jax
from mezo_jax import Displacement, make_step, models, variants
from mezo_jax.directions import noise
from mezo_jax.variants.sparse import is_below


class Momentum:
  made = functools.partial(whole.momentum_by_history, beta=0.8, window=4)

  def __init__(self):
    self.past = []

  def step(self, theta, t, batch):
    self.past.append((two_sided(theta, z_of(t), batch), z_of(t)))
    return theta - RATE * sum(
        0.8**age * g * z
        for age, (g, z) in enumerate(reversed(self.past[-4:])))


class Adam(Momentum):
  made = functools.partial(whole.adam_by_history, b1=0.8, b2=0.9, window=5,
                           num_samples=2)

  def step(self, theta, t, batch):
    self.past.append(sum(two_sided(theta, z_of(t, j), batch) * z_of(t, j)
                         for j in (0, 1)) / 2)
    last = self.past[-5:][::-1]
    mean = lambda b, of: sum(b**i * x for i, x in enumerate(of)) / sum(
        b**i for i in range(len(of)))
    return theta - RATE * mean(0.8, last) / (
        np.sqrt(mean(0.9, [x**2 for x in last])) + 1e-8)


class Sign:
  made = whole.sign

  def step(self, theta, t, batch):
    return theta - RATE * np.sign(two_sided(theta, z_of(t), batch)) * z_of(t)


class ScalarAdam:
  made = functools.partial(whole.scalar_adam, b2=0.9, num_samples=2)
  v = 0.0

  def step(self, theta, t, batch):
    g = [two_sided(theta, z_of(t, j), batch) for j in (0, 1)]
    self.v = 0.9 * self.v + 0.1 * (g[0]**2 + g[1]**2) / 2
    v = self.v / (1 - 0.9**(t + 1))
    return theta - RATE / (np.sqrt(v) + 1e-8) * (
        g[0] * z_of(t, 0) + g[1] * z_of(t, 1)) / 2


class OnePoint:
  rate = 1e-5
  made = lambda rate, eps, **kwargs: whole.one_point(
      OnePoint.rate, eps, **kwargs)
  last = None

  def step(self, theta, t, batch):
    now = loss_of(theta + EPS * z_of(t), batch)
    g = 0.0 if self.last is None else (now - self.last) / EPS
    self.last = now
    return theta - self.rate * g * z_of(t)


class Conservative:
  made = functools.partial(whole.conservative, num_samples=2)

  def step(self, theta, t, batch):
    step = RATE * sum(two_sided(theta, z_of(t, j), batch) * z_of(t, j)
                      for j in (0, 1)) / 2
    return min((theta, theta - step, theta + step),
               key=lambda x: loss_of(x, batch))


class ForwardGrad:
  made = lambda rate, eps, **kwargs: whole.forward_grad(
      rate, num_samples=2, **kwargs)

  def step(self, theta, t, batch):
    gradient = gradient_of(theta, batch)
    return theta - RATE * sum(
        gradient @ z_of(t, j) * z_of(t, j) for j in (0, 1)) / 2


class Svrg:
  """With a copy of the anchor, as the paper has it."""

  made = functools.partial(
      variants.svrg, every=5, anchor_learning_rate=3 * RATE, rows=16)

  def batch(self, t):
    return rows(np.arange(32)) if t % 5 == 0 else batch_of(t)

  def step(self, theta, t, batch):
    z = z_of(t)
    if t % 5 == 0:
      self.anchor = theta.copy()
      self.g = two_sided(theta, z, batch) * z
      return theta - 3 * RATE * self.g
    return theta - RATE * (
        (two_sided(theta, z, batch) - two_sided(self.anchor, z, batch)) * z
        + self.g)


class Sparse:
  """The mask is of the weights before the step, perturbed or not."""

  made = lambda rate, eps, **kwargs: whole.sparse_mezo(
      rate, eps, limits=variants.smallest(START, 0.4), **kwargs)
  limits = np.concatenate([np.zeros(2), np.full(10, np.sort(
      np.abs(START['w']).ravel())[3])])

  def step(self, theta, t, batch):
    z = np.where(np.abs(theta) <= self.limits, z_of(t), 0.0)
    return theta - RATE * two_sided(theta, z, batch) * z


class Lozo:
  """In windows of 4 steps, each window added at once."""

  lazy = mezo_jax.LazyLowRank(rank=1, every=4)
  made = functools.partial(mezo_jax.mezo, directions=lazy, apply_every=4)

  def step(self, theta, t, batch):
    like = jax.tree.map(lambda x: jnp.zeros(x.shape), START)
    z = flat(mezo_jax.direction(
        like, Displacement(self.lazy.keys(KEY, t, 1), 1.0), self.lazy))
    u = z[2:].reshape(5, 2)
    if t % 4 == 0:
      self.v = u[0] / u[0, 0]
    assert np.linalg.matrix_rank(np.stack([self.v, *u])) == 1
    return theta - RATE * two_sided(theta, z, batch) * z


RELATIVES = [Lozo, Sparse, Momentum, Adam, Sign, ScalarAdam, OnePoint,
             Conservative, ForwardGrad, Svrg]


@pytest.mark.slow_except(relative=[Sparse, Svrg])
@pytest.mark.parametrize('relative', RELATIVES, ids=lambda r: r.__name__)
def test_it_is_its_papers_equations(relative):
  variants_reference.agrees(
      relative(), relative.made, getattr(relative, 'rate', RATE))


# --- what they claim --------------------------------------------------------


@pytest.mark.slow
def test_svrg_stays_where_the_mean_gradient_is_zero():
  """Rows pull in all directions: MeZO wanders off, SVRG's differences are of
  one and the same z and vanish as the anchor is near."""
  pulls = np.random.RandomState(0).normal(size=(64, 10))
  pulls -= pulls.mean(0)
  value = lambda w, batch: 0.5 * jnp.sum((w - batch) ** 2, -1)
  ends = {}
  for name, made in (('mezo', mezo_jax.mezo), ('svrg', functools.partial(
      variants.svrg, every=4, anchor_learning_rate=1e-2))):
    tx = made(1e-2, 1e-2, key=0)
    step = make_step(tx, value)
    w, state = jnp.zeros(10), tx.init(jnp.zeros(10))
    order = np.random.RandomState(1)
    for t in range(200):
      some = np.arange(64) if name == 'svrg' and t % 4 == 0 else (
          order.choice(64, 4, False))
      w, state, _ = step(w, state, jnp.asarray(pulls[some], jnp.float32))
    ends[name] = float(jnp.linalg.norm(w))
  assert ends['svrg'] < 1e-2 * ends['mezo']


@pytest.mark.slow
@pytest.mark.exhaustive
def test_svrg_varies_less_near_its_anchor():
  """Along the same keys and batches, 40 of them, after a short step."""
  spread = {}
  for name, tx in (
      ('mezo', mezo_jax.mezo(1e-5, EPS, key=KEY)),
      ('svrg', variants.svrg(1e-5, EPS, key=KEY, every=41,
                             anchor_learning_rate=1e-2))):
    step = make_step(tx, value_fn)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
    state, seen = tx.init(params), []
    for t in range(41):
      params, state, metrics = step(params, state, batch_of(t))
      seen.append(float(metrics['projected_grad'][0]))
    spread[name] = np.std(seen[1:])
  assert 0 < spread['svrg'] < 0.1 * spread['mezo']


def test_svrg_refuses_a_batch_that_its_rows_do_not_part():
  tx = variants.svrg(RATE, EPS, key=KEY, rows=3)
  with pytest.raises(ValueError, match='3'):
    tx.update(None, tx.init(START), START, value_fn=value_fn, batch=batch_of(0))


@pytest.mark.parametrize('name', ['forward_grad', 'conservative'])
@pytest.mark.slow_except(name=['forward_grad'])
def test_half_precision_updates_are_rounded_once(name):
  """After the learning rate, not before it as well."""
  tx = getattr(whole, name)(1e-4, key=KEY, stochastic_rounding=False)
  w = jnp.ones((40, 40), jnp.bfloat16)
  updates, state = jax.jit(lambda w: tx.update(
      None, tx.init(w), w, value_fn=lambda w: jnp.sum(
          w.astype(jnp.float32) ** 2)))(w)
  g = optax.tree.get(state, 'projected_grad')
  z = mezo_jax.direction(jnp.zeros(w.shape), Displacement(
      noise.direction_key(KEY, 0), 1.0))
  assert g[0] != 0
  want = (-1e-4 * (g[0] * z)).astype(jnp.bfloat16)
  assert np.mean(np.asarray(updates != want)) < 2e-3  # last bits of float32


def test_one_point_of_a_loss_of_zero():
  """Is a step like any other, not a skipped one."""
  tx = whole.one_point(1e-3, EPS, key=KEY)
  step = make_step(tx, lambda w, batch: batch * jnp.sum(w))
  w, state = jnp.ones(3), tx.init(jnp.ones(3))
  for scale in (1.0, 0.0, 1.0):
    w, state, metrics = step(w, state, jnp.float32(scale))
    assert metrics['skipped'] == 0


@pytest.mark.slow
def test_svrg_applied_out_of_turn_moves_nothing_before_its_next_anchor():
  tx = variants.svrg(RATE, EPS, key=KEY, every=4)
  step = make_step(tx, value_fn)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
  state = tx.init(params)
  for t in range(2):
    params, state, _ = step(params, state, batch_of(t))
  params, state = step.apply_accumulated(params, state)
  before = jax.tree.map(jnp.copy, params)
  for t in range(2, 4):
    params, state, _ = step(params, state, batch_of(t))
  helpers.assert_bitwise(params, before)
  for t in range(4, 8):
    params, state, _ = step(params, state, batch_of(t))
  assert np.any(params['w'] != before['w'])


def test_svrg_forgets_its_anchor_when_updates_are_applied_out_of_turn():
  tx = variants.svrg(RATE, EPS, key=KEY, every=4)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
  state = tx.init(params)
  step = jax.jit(lambda params, state, apply: tx.update(
      None, state, params, projected_grad=jnp.ones(1), apply=apply),
                 static_argnums=2)
  for apply in (False, True):
    _, state = step(params, state, apply)
  assert np.all(np.isnan(optax.tree.get(state, 'anchor_grad')))


@pytest.mark.slow
def test_svrg_without_its_anchor_moves_nothing():
  """Where that step is skipped, nor does the window after it."""
  tx = variants.svrg(RATE, EPS, key=KEY, every=4)
  step = make_step(tx, lambda params, batch: jnp.where(
      batch['bad'], jnp.nan, jnp.mean(value_fn(params, batch))))
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), START)
  state, seen = tx.init(params), []
  for t in range(16):
    params, state, _ = step(
        params, state, batch_of(t) | {'bad': np.bool_(t in (8, 13))})
    seen.append(flat(params))
  moved = [bool(np.any(a != b)) for a, b in zip(seen, seen[1:])]
  assert np.flatnonzero(moved).tolist() == [2, 6, 14]  # not 10


@pytest.mark.slow
@pytest.mark.parametrize('directions', ['normal', mezo_jax.LowRank(rank=2)])
def test_large_weights_are_neither_perturbed_nor_moved(directions):
  """In a stack of layers that is scanned, by rows and transposed: a share of
  each layer."""
  params = jax.tree.map(
      lambda s: jax.random.normal(KEY, s), {
          'layers': {'w': (3, 16, 16)}, 'embed': (40, 16)},
      is_leaf=lambda x: isinstance(x, tuple))
  limits = variants.smallest(params, 0.25)
  assert limits['layers']['w'].shape == (3,)
  small = jax.tree.map(lambda x, h: np.abs(x) <= np.reshape(
      h, np.shape(h) + (1,) * (x.ndim - np.ndim(h))), params, limits)
  for layer in small['layers']['w']:
    assert layer.sum() == 64

  def value(p, batch):
    large = jax.tree.map(lambda x, x0, s: jnp.any(~s & (x != x0)), p, params,
                         small)  # uses all of each leaf at once
    x, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None),
                        p['embed'][batch], p['layers']['w'])
    return jnp.where(jnp.any(jnp.stack(jax.tree.leaves(large))), jnp.nan,
                     jnp.mean((x @ p['embed'].T) ** 2))

  tx = whole.sparse_mezo(1e-4, 1e-2, key=KEY, limits=limits,
                            directions=directions)
  step, state = make_step(tx, value), tx.init(params)
  moved = jax.tree.map(jnp.copy, params)
  for _ in range(2):
    moved, state, metrics = step(moved, state, jnp.arange(5))
  assert metrics['skipped'] == 0
  jax.tree.map(lambda a, b, s: np.testing.assert_array_equal(
      np.asarray(a)[~s], np.asarray(b)[~s]), moved, params, small)
  assert np.mean(np.asarray(moved['embed'] != params['embed'])) > 0.1
  # As the mask of elements that says the same.
  small_alone = mezo_jax.Multiplier(limits, is_below)
  z = mezo_jax.direction(params, Displacement(KEY, 1.0), dataclasses.replace(
      tx_directions(directions), multiplier=small_alone))
  masked = mezo_jax.direction(params, Displacement(KEY, 1.0),
                              dataclasses.replace(
                                  tx_directions(directions), mask=small))
  helpers.assert_bitwise(z, masked)
  picked = lambda p: (p['embed'][jnp.array([3, 7])].T, p['layers']['w'][1][2:5])
  got = jax.jit(mezo_jax.perturbed(picked, dataclasses.replace(
      tx_directions(directions), multiplier=small_alone)))(
          params, Displacement(KEY, 1e-2))
  want = picked(jax.tree.map(lambda x, z: x + 1e-2 * z, params, z))
  helpers.assert_close(got, want)


def tx_directions(directions):
  return mezo_jax.Normal() if directions == 'normal' else directions


@pytest.mark.parametrize('make,message', [
    (lambda: variants.smallest(START, 0.0), 'share'),
    (lambda: variants.svrg(1e-3, key=0, every=1), 'every'),
    (lambda: whole.momentum_by_history(1e-3, key=0, window=0), 'window'),
    *((lambda name=name: getattr(whole, name)(
        1e-3, {'a': 1e-3, '': 1e-2}, key=0), 'groups') for name in (
            'adam_by_history', 'hizoo', 'lozo_m', 'svrg'))])
def test_bad_options(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.slow
@pytest.mark.exhaustive_except(name=['momentum_by_history', 'private'])
@pytest.mark.as_shipped
@pytest.mark.parametrize('name', ['svrg', 'sparse_mezo', 'momentum_by_history',
                                  'adam_by_history', 'forward_grad',
                                  'conservative', 'private'])
def test_memory_is_that_of_inference(name):
  """135 million parameters, 16 rows of 16 tokens; signs, 4 terms: temporaries
  of a step's programs within 5 % of the weights beside the forward's."""
  model = models.Transformer(helpers.tiny_config(
      vocab_size=49152, width=576, ff_width=1536, num_layers=30, num_heads=9,
      num_kv_heads=3, head_width=64))
  params = models.param_shapes(model.config)
  size = sum(4 * x.size for x in jax.tree.leaves(params))
  ids = jnp.zeros((16, 16), jnp.int32)
  loss = lambda p, ids: -model.apply(
      {'params': p}, ids, answer_at=jnp.full((16, 1), 15),
      token_ids=jnp.array([3, 5]))[:, 0, 0]
  more = {'svrg': dict(every=4), 'sparse_mezo': dict(
      limits=variants.smallest(params)), 'private': dict(
          clip=1.0, noise_multiplier=1.0, batch_size=8)}.get(
          name, dict(window=4) if 'history' in name else {})
  tx = getattr(whole, name)(1e-4, key=0, directions='rademacher', **more)
  state = jax.eval_shape(tx.init, params)
  forward = jax.jit(loss).lower(params, ids).compile().memory_analysis()
  given = {'noise_key': KEY} if name == 'private' else {}
  losses, update, *_ = make_step(tx, loss).lower(params, state, ids, **given)
  for program in (losses, update):
    memory = program.compile().memory_analysis()
    extra = memory.temp_size_in_bytes + memory.output_size_in_bytes - (
        memory.alias_size_in_bytes)
    assert extra < forward.temp_size_in_bytes + 0.05 * size
