"""What optax asks of every optimizer in contrib, asked of ours.

Ours makes its own updates, so each case has value_fn where theirs have the
gradient; gradients that are handed in, by MultiSteps too, are refused (tested
in test_wrappers.py).
"""

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mezo_jax

OPTIMIZERS = {
    'mezo': mezo_jax.mezo,
    'mezo, decayed': functools.partial(mezo_jax.mezo, weight_decay=1e-4),
    'mezo, signs': functools.partial(
        mezo_jax.mezo, distribution='rademacher'),
    'spsa and sgd': lambda learning_rate, **kwargs: optax.chain(
        mezo_jax.spsa(**kwargs), optax.sgd(learning_rate)),
    'spsa and adam': lambda learning_rate, **kwargs: optax.chain(
        mezo_jax.spsa(**kwargs), optax.adam(learning_rate)),
}


def parabola(params):
  return jnp.sum((params.astype(jnp.float32) - jnp.array([1.0, -1, 1])) ** 2)


START = jnp.array([-1.0, 10.0, 1.0])
TARGETS = {
    'parabola': (START, jnp.array([1.0, -1.0, 1.0]), parabola),
    'rosenbrock': (jnp.zeros(2), jnp.ones(2), lambda p: (
        (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2)),
    'matrix parabola': (
        jnp.zeros((2, 2)), jnp.array([[3.0, -2], [1, 4]]), lambda p: jnp.sum(
            (p - jnp.array([[3.0, -2], [1, 4]])) ** 2)),
    'mixed tensors': (
        (jnp.zeros(3), jnp.zeros((2, 2))),
        (jnp.array([1.0, -1, 2]), jnp.array([[1.0, 0], [-1, 1]])),
        lambda p: (jnp.sum((p[0] - jnp.array([1.0, -1, 2])) ** 2)
                   + jnp.sum((p[1] - jnp.array([[1.0, 0], [-1, 1]])) ** 2))),
}


def make_step(tx, value_fn, **extra):
  def step(params, state):
    updates, state = tx.update(
        None, state, params, value_fn=value_fn, **extra)
    return optax.apply_updates(params, updates), state
  return step


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_extra_arguments_and_no_second_compilation(name):
  tx = OPTIMIZERS[name](1e-3, key=0)
  step = jax.jit(make_step(
      tx, parabola, unexpected_extra_args_your_optimizer_doesnt_expect=1))
  params, state = step(START, tx.init(START))
  with helpers.compilations() as seen:
    step(params, state)
  assert not seen


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_it_converges(name, target):
  """To 3e-2 within 30,000 steps; all at one setting a target."""
  params, goal, value_fn = TARGETS[target]
  rate, steps, more = 2e-2, 2000, {}
  if target == 'rosenbrock':
    rate, steps, more = 1e-3, 30_000, dict(eps=1e-3, num_samples=4)
    if 'adam' in name:
      rate = optax.cosine_decay_schedule(3e-2, steps)
  elif 'adam' in name:
    rate, steps = optax.cosine_decay_schedule(1e-1, 2000), 2000
  tx = OPTIMIZERS[name](rate, key=0, **more)
  state = optax.tree.map_params(tx, lambda v: v, tx.init(params))
  step = make_step(tx, value_fn)
  (end, state), _ = jax.jit(lambda c: jax.lax.scan(
      lambda c, _: (step(*c), None), c, None, length=steps))((params, state))
  assert state[0].total_notfinite == 0
  helpers.assert_close(end, goal, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize('name', [n for n in OPTIMIZERS if 'mezo' in n])
def test_hyperparameters_can_be_injected(name):
  """No argument but the learning rate and the seed is static or named."""
  params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
  loss = lambda p: sum(jnp.sum((x - 0.5) ** 2) for x in p)
  factory = OPTIMIZERS[name]
  tx = factory(learning_rate=1e-2, key=0)
  injected = optax.inject_hyperparams(factory)(learning_rate=1e-2, key=0)
  run = lambda tx: jax.jit(functools.partial(tx.update, value_fn=loss))(
      None, jax.jit(tx.init)(params), params)
  updates, state = run(tx)
  got, with_hyperparams = run(injected)
  helpers.assert_close(got, updates)
  data = lambda s: jax.tree.map(
      lambda x: jax.random.key_data(x) if jnp.issubdtype(
          x.dtype, jax.dtypes.prng_key) else x, s)
  helpers.assert_close(data(with_hyperparams.inner_state), data(state))


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_updates_have_the_dtype_of_the_parameters(name, dtype):
  params = jnp.array([1.0, 2.0, 3.0], dtype)
  tx = OPTIMIZERS[name](1e-2, key=0)
  updates, _ = jax.jit(functools.partial(tx.update, value_fn=parabola))(
      None, jax.jit(tx.init)(params), params)
  assert updates.dtype == params.dtype


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32', 'float64'])
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_shapes_and_dtypes_of_params_and_state_are_stable(name, dtype):
  with jax.enable_x64(dtype == 'float64'):
    params = jnp.array([-1.0, 10.0, 1.0], dtype)
    tx = OPTIMIZERS[name](1e-2, key=0)
    step = jax.jit(lambda params, state: jax.lax.cond(
        jax.random.randint(jax.random.key(0), (), 0, 2) == 0,
        make_step(tx, parabola), lambda *same: same, params, state))
    state = tx.init(params)
    types = lambda s: jax.tree.map(jax.typeof, s)
    for _ in range(2):
      params, new = step(params, state)
      assert params.dtype == dtype
      assert types(new) == types(state)
      state = new


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_schedule_is_as_good_as_a_number(name):
  runs = []
  for rate in (1e-3, optax.constant_schedule(1e-3)):
    tx = OPTIMIZERS[name](rate, key=0)
    params, state = START, tx.init(START)
    step = jax.jit(make_step(tx, parabola))
    for _ in range(10):
      params, state = step(params, state)
    runs.append(params)
  helpers.assert_close(*runs)
  assert np.any(runs[0] != START)
