"""What is asked of every estimator, in any chain: one row of `ROWS` each.

After optax's common tests of contrib, with value_fn where theirs have the
gradient. A relative that is not in the table does not exist.
"""

from estimators import EVERY_OTHER, ROWS, ZEROTH
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mezo_jax

# The rows of the default tier.
FEW = ['mezo', 'mezo, low rank', 'mezo, pending', 'hizoo', 'spsa and adam']
# One row of each kind: several directions in one pass, a memory, losses that
# are measured or applied in another way. The rest is exhaustive.
SOME = FEW + ['mezo, low rank in one pass', 'adam by history', 'conservative',
              'one point', 'private']
pytestmark = [pytest.mark.slow_except(name=FEW),
              pytest.mark.exhaustive_except(name=SOME)]

quick = helpers.quick_jit
every = pytest.mark.parametrize('name', ROWS)
zeroth = pytest.mark.parametrize('name', ZEROTH)


def stepped(tx, value_fn, times=1, **extra):
  def step(params, state):
    for _ in range(times):
      updates, state = tx.update(
          None, state, params, value_fn=value_fn, **extra)
      params = optax.apply_updates(params, updates)
    return params, state
  return step


def times(name) -> int:
  return 2 if name in EVERY_OTHER else 1


def door(tx):
  def step(params, state, g):
    updates, state = tx.update(None, state, params, projected_grad=g)
    return optax.apply_updates(params, updates), state
  return step


def get(state, name):
  return optax.tree.get(state, name)


def words(tree):
  return jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(
      x.dtype, jax.dtypes.prng_key) else x, tree)


# --- optax's contract -------------------------------------------------------


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


@every
def test_extra_arguments_and_no_second_compilation(name):
  tx = ROWS[name](optax.constant_schedule(1e-3), key=0)
  step = quick(stepped(
      tx, parabola, unexpected_extra_args_your_optimizer_doesnt_expect=1))
  state = tx.init(START)
  params, new = step(START, state)
  assert jax.tree.map(jax.typeof, new) == jax.tree.map(jax.typeof, state)
  with helpers.compilations() as seen:
    params, _ = step(params, new)
  assert not seen
  assert np.any(params != START)


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('name', [
    'mezo', 'mezo, signs', 'mezo, four directions', 'mezo, decayed',
    'spsa and sgd', 'spsa and adam'])
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
  tx = ROWS[name](rate, key=0, **more)
  state = optax.tree.map_params(tx, lambda v: v, tx.init(params))
  step = stepped(tx, value_fn)
  (end, state), _ = jax.jit(lambda c: jax.lax.scan(
      lambda c, _: (step(*c), None), c, None, length=steps))((params, state))
  assert get(state, 'total_notfinite') == 0
  helpers.assert_close(end, goal, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize('name', [n for n in ROWS if 'mezo' in n])
def test_hyperparameters_can_be_injected(name):
  """No argument but the learning rate and the seed is static or named."""
  params = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2))]
  loss = lambda p: sum(jnp.sum((x - 0.5) ** 2) for x in p)
  factory = ROWS[name]
  static = ('num_samples', 'decay') if any(
      x in name for x in ('four', 'decayed', 'one pass', 'fzoo')) else (
          'apply_every', 'weight_decay') if 'pending' in name else ()
  tx = factory(learning_rate=1e-2, key=0)
  injected = optax.inject_hyperparams(factory, static_args=static)(
      learning_rate=1e-2, key=0)
  run = lambda tx: tx.update(None, tx.init(params), params, value_fn=loss)
  (updates, state), (got, other) = quick(lambda: (run(tx), run(injected)))()
  helpers.assert_close(got, updates)
  helpers.assert_close(words(other.inner_state), words(state))


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', 'float32', 'float64'])
@every
def test_shapes_and_dtypes_are_stable(name, dtype):
  """Updates have the dtype of the parameters, in and out of `lax.cond`. To be
  traced is enough to know."""
  with jax.enable_x64(dtype == 'float64'):
    params = jnp.array([-1.0, 10.0, 1.0], dtype)
    tx = ROWS[name](1e-2, key=0)
    state = tx.init(params)
    assert jax.eval_shape(lambda: tx.update(
        None, state, params, value_fn=parabola)[0]).dtype == dtype
    got = jax.eval_shape(lambda params, state: jax.lax.cond(
        jax.random.randint(jax.random.key(0), (), 0, 2) == 0,
        stepped(tx, parabola), lambda *same: same, params, state),
                         params, state)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(got) == types((params, state))


@every
def test_a_schedule_is_as_good_as_a_number(name):
  def run(rate):
    tx = ROWS[name](rate, key=0)
    step = stepped(tx, parabola)
    (params, _), _ = jax.lax.scan(lambda c, _: (step(*c), None), (
        START, tx.init(START)), None, length=2)
    return params
  a, b = quick(lambda: (run(1e-3), run(optax.constant_schedule(1e-3))))()
  helpers.assert_close(a, b)
  assert np.any(a != START)


# --- the laws of the house --------------------------------------------------

TREE = {'a': jnp.array([[0.5, -1.0], [2.0, 0.1]]), 'b': jnp.array([1.0, 3.0])}


def quadratic(params, bad=False):
  loss = sum(jnp.sum((p.astype(jnp.float32) - 1.0) ** 2)
             for p in jax.tree.leaves(params))
  return jnp.where(bad, jnp.nan, loss)


@every
def test_any_tree(name):
  from flax import nnx
  bias = nnx.split(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))[1]
  bias['bias'] = bias['bias'].replace(jnp.full(2, 0.3))
  params = [TREE['a'], ({'b': (TREE['b'],)}, bias, {
      'x': jnp.float32(3.0), 'y': 2.0})]
  tx = ROWS[name](1e-2, key=0)
  step = quick(stepped(tx, quadratic, times(name)))
  got, state = step(params, tx.init(params))
  if name == 'one point':  # whose first step has nothing to compare with
    got, _ = step(got, state)
  assert jax.tree.structure(got) == jax.tree.structure(params)
  assert all(np.any(np.asarray(x) != np.asarray(y)) for x, y in zip(
      jax.tree.leaves(got), jax.tree.leaves(params)))


@pytest.mark.parametrize('name', [name for name in ROWS if name != 'private'])
def test_a_loss_that_is_not_finite_changes_nothing(name):
  """Not the weights, float32 or bfloat16, nor any state but the estimator's
  own; and it counts. (Private steps are skipped for nothing that a row does.)
  """
  tx = ROWS[name](1e-2, key=0)
  params = TREE | {'half': TREE['b'].astype(jnp.bfloat16)}
  state, seen = tx.init(params), []
  n = times(name)
  step = quick(lambda p, s, bad: stepped(tx, quadratic, n, bad=bad)(p, s))
  if name == 'one point':
    params, state = step(params, state, False)
  for bad in (False, True, True, False):
    new, after = step(params, state, bad)
    if bad:
      helpers.assert_bitwise(new, params)
      kept = slice(1, 2 if n > 1 else None)  # a sum of nothing is rounded too
      helpers.assert_bitwise(words(after[kept]), words(state[kept]))
    else:
      assert np.any(new['a'] != params['a'])
    params, state = new, after
    seen.append((int(get(state, 'notfinite_count')) // n,
                 int(get(state, 'total_notfinite')) // n))
  assert seen == [(0, 0), (1, 1), (2, 2), (0, 2)]


MASKS = {
    'expression': '^b', 'tree': {'a': False, 'b': True},
    'function': lambda p: {'a': False, 'b': True}, 'elements': {
        'a': jnp.array([[True, False], [False, False]]), 'b': True}}


@pytest.mark.parametrize('name,kind_of_mask', [
    *((name, 'elements') for name in ZEROTH if name != 'mazo'),  # has its own
    *(pytest.param(name, 'expression', marks=(
        () if name in FEW else pytest.mark.exhaustive))
      for name in ZEROTH if name != 'mazo'),
    ('mezo', 'tree'), ('mezo', 'function')])
def test_masked_weights_are_neither_perturbed_nor_updated(name, kind_of_mask):
  mask = MASKS[kind_of_mask]
  off = jnp.array([[False, True], [True, True]]) if (
      isinstance(mask, dict) and jnp.ndim(mask['a'])) else jnp.ones(
          (2, 2), bool)
  blind = lambda p: jnp.where(jnp.any(off & (p['a'] != TREE['a'])), jnp.nan,
                              quadratic(p))
  kind = mezo_jax.Rademacher if 'signs' in name else mezo_jax.Normal
  kind = mezo_jax.LazyLowRank if name == 'lozo-m' else kind
  more = {}
  if 'decayed' in name and jnp.ndim(off) and not np.all(off):
    more = dict(weight_decay=0.0)
  tx = ROWS[name](1e-2, key=0, directions=kind(mask=mask), **more)
  params, state = TREE, tx.init(TREE)
  step = quick(stepped(tx, blind))
  for _ in range(3):
    params, state = step(params, state)
  assert get(state, 'total_notfinite') == 0
  helpers.assert_bitwise(params['a'][off], TREE['a'][off])
  assert np.all(params['a'][~off] != TREE['a'][~off])
  assert np.all(params['b'] != TREE['b'])


@pytest.mark.slow_except(name=['mezo'])
@pytest.mark.exhaustive_except(name=['mezo', 'mezo, low rank', 'hizoo'])
@pytest.mark.parametrize('name,dtype', [
    *((n, 'bfloat16') for n in ZEROTH
      if 'adam' not in n and n not in ('one point', 'sign')),
    ('mezo', 'float16')])
def test_half_precision_moves_as_far_as_float32(name, dtype):
  """Along the gradient, over 300 tiny steps; to nearest, most is lost."""
  wide = {'w': 0.02 * jax.random.normal(jax.random.key(0), (100, 100))}
  slope = jnp.sign(wide['w'])
  loss = lambda p: jnp.sum(p['w'].astype(jnp.float32) * slope) / 10
  def moved(params):
    tx = ROWS[name](1e-6, key=0)
    step = stepped(tx, loss)
    (end, state), _ = jax.jit(lambda c: jax.lax.scan(
        lambda c, _: (step(*c), None), c, None, length=300))(
            (params, tx.init(params)))
    assert get(state, 'total_notfinite') == 0
    return float(jnp.vdot(end['w'].astype(jnp.float32) - params['w'], slope))
  half = jax.tree.map(lambda x: x.astype(dtype), wide)
  share = moved(half) / moved(wide)
  assert share < 0.6 if 'nearest' in name else 0.6 < share < 1.4


@pytest.mark.slow_except(name=['mezo'])
@pytest.mark.exhaustive_except(
    name=['mezo', 'mezo, low rank', 'adam by history'])
@every
def test_eight_devices_do_as_one(name):
  params = {'w': jnp.ones((16, 8)) / 3, 'layers': {'w': jnp.ones((2, 8, 8))}}
  tx, runs = ROWS[name](1e-2, key=0), []
  for place in (lambda x: x, on_eight):
    placed = jax.tree.map(place, params)
    step, state = quick(stepped(tx, quadratic)), tx.init(placed)
    placed, state = step(placed, state)
    with helpers.compilations() as seen:
      placed, state = step(placed, state)
    assert not seen
    runs.append(placed)
  # Losses are equal to rounding, of which g has 1 / eps as much.
  helpers.assert_close(*runs, rtol=1e-3, atol=5e-3)


def on_eight(x):
  return jax.device_put(x, jax.NamedSharding(
      helpers.mesh_of(2, 4), jax.P(*[None] * (x.ndim - 1), 'fsdp')))


@pytest.mark.slow_except(name=['mezo'])
@pytest.mark.exhaustive_except(
    name=['mezo', 'mezo, low rank', 'hizoo', 'private'])
@pytest.mark.as_shipped
@zeroth
def test_the_door_gives_the_same_weights(name):
  """Float32 and bfloat16, from the recorded projected gradients alone, a
  skipped step among them; on eight devices too."""
  half = jnp.bfloat16
  params = {'layers': {
      'w': jnp.ones((2, 12, 8)) / 3, 'half': jnp.ones((2, 12, 8), half) / 3,
      'b': jnp.zeros((2, 8), half)}}
  tx = ROWS[name](optax.linear_schedule(1e-2, 0, 9), key=0)
  end, state, told = params, tx.init(params), []
  step = jax.jit(lambda p, s, bad: stepped(tx, quadratic, bad=bad)(p, s))
  for t in range(6):
    end, state = step(end, state, t == 2)
    told.append(np.asarray(get(state, 'projected_grad')))
  step = jax.jit(door(tx))
  for place in (lambda x: x, on_eight):
    got = jax.tree.map(place, params)
    again = tx.init(got)
    for g in told:
      got, again = step(got, again, jnp.asarray(g))
    helpers.assert_bitwise(got, end)
    assert get(again, 'total_notfinite') == (name != 'private')


@pytest.mark.slow_except(name=['mezo'])
@pytest.mark.exhaustive_except(
    name=['mezo', 'mezo, low rank', 'hizoo', 'spsa and adam'])
@pytest.mark.as_shipped
@zeroth
def test_the_update_needs_no_dense_tree(name):
  """update and apply_updates in one donated jit; Adam has two moments."""
  shapes = {'layers': {'w': jax.ShapeDtypeStruct((6, 256, 256), jnp.float32)},
            'embed': jax.ShapeDtypeStruct((2048, 64), jnp.float32)}
  loss = lambda p: jnp.sum(jax.lax.scan(
      lambda c, w: (jnp.tanh(c @ w), None), p['embed'][:4] @ jnp.ones(
          (64, 256)), p['layers']['w'])[0])
  tx = ROWS[name](1e-3, key=0)
  state = jax.eval_shape(tx.init, shapes)
  if name in EVERY_OTHER:  # with make_step alone
    program = mezo_jax.make_step(tx, lambda p, batch: loss(p)).lower(
        shapes, state, ())[1]
  else:
    program = jax.jit(stepped(tx, loss), donate_argnums=(0, 1)).lower(
        shapes, state)
  memory = program.compile().memory_analysis()
  size = sum(4 * x.size for x in jax.tree.leaves(shapes))
  assert memory.alias_size_in_bytes >= size
  most = 0.3
  if 'adam' in name:  # two moments are read twice
    most = 1.6
  elif name == 'hizoo':  # H is read twice
    most = 1.1
  assert memory.temp_size_in_bytes < most * size
