"""Rewards of generated answers: combine functions, steps, pools, whole runs."""

import json
from pathlib import Path
import subprocess
import sys

import conftest
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rewards_of_tests
import runs

import mezo_jax
from mezo_jax import models, tasks, training
from mezo_jax.core import sharding
from mezo_jax.core.errors import InputError
from mezo_jax.export.from_run import rebuild
from mezo_jax.tasks import rewards
from mezo_jax.training import checks, divergence, population
from mezo_jax.training import config as config_lib
from mezo_jax.transforms.step import field

HERE = Path(rewards_of_tests.__file__)
RNG = np.random.RandomState(0)
ROWS = RNG.randn(8, 5).astype(np.float32)


# --- the papers' equations --------------------------------------------------


def standardized(kind, rewards):
  """Standardizes rewards [members, B] as the papers do, in NumPy."""
  mean = rewards.mean(1)
  if kind == 'z_score':
    return (mean - mean.mean()) / (mean.std() + 1e-8)
  if kind == 'centered_rank':
    return np.argsort(np.argsort(mean)) / (len(mean) - 1) - 0.5
  centered = rewards - rewards.mean(0)
  return centered.mean(1) / (centered.std() + 1e-8)


def by_hand(kind, signs, steps, n, rate, sigma):
  """Returns the weights after steps of evolution strategies, in NumPy."""
  weights, normal = np.zeros(5), mezo_jax.Normal()
  for t in range(steps):
    keys = normal.keys(jax.random.key(0), t, n)
    z = [mezo_jax.direction({'w': jnp.zeros(5)}, mezo_jax.Displacement(
        keys[j:j + 1], jnp.ones(1)), normal)['w'] for j in range(n)]
    members = [s * np.float64(each) for each in z for s in signs]
    found = np.stack([
        -np.abs(ROWS @ (weights + sigma * member) - 1) for member in members])
    scores = standardized(kind, found)
    weights = weights + rate / len(members) * sum(
        score * member for score, member in zip(scores, members))
  return weights


@pytest.mark.parametrize('devices', [1, 8])
@pytest.mark.parametrize('over', ['scan', 'batch'])
@pytest.mark.parametrize('kind', ['z_score', 'centered_rank', 'per_prompt'])
@pytest.mark.parametrize('antithetic', [False, True])
def test_steps_are_the_papers_equations(kind, antithetic, over, devices):
  if devices == 8 and (over == 'scan') == antithetic:
    pytest.skip('half of the cases are enough on eight devices')
  tx = mezo_jax.mezo(0.05, estimator=mezo_jax.spsa(
      0.1, key=0, num_samples=6, over=over,
      combine=f'{"antithetic_" if antithetic else ""}{kind}'))
  mesh = sharding.make_mesh(data=2, direction=4) if devices == 8 else None
  params = {'w': jnp.zeros(5)}
  batch = ROWS
  if mesh is not None:
    params = jax.device_put(params, sharding.replicated(mesh))
    batch = sharding.put_batch({'x': ROWS}, mesh)['x']
  step = mezo_jax.make_step(
      tx, lambda params, x: x @ params['w'], mesh=mesh,
      reward=lambda found, batch: -np.abs(found - 1))
  state = tx.init(params)
  for _ in range(20):
    params, state, metrics = step(params, state, batch)
  want = by_hand(kind, (1, -1) if antithetic else (1,), 20, 6, 0.05, 0.1)
  np.testing.assert_allclose(params['w'], want, atol=2e-6)
  assert metrics['reward_best'] >= metrics['reward']
  np.testing.assert_allclose(metrics['reward'], -metrics['loss'], rtol=1e-5)


@pytest.mark.parametrize('value', [1.0, -0.1, 0.7, 100.3])
@pytest.mark.parametrize('name', [
    f'{anti}{name}' for name in ('z_score', 'centered_rank', 'per_prompt')
    for anti in ('', 'antithetic_')])
def test_equal_rewards_change_nothing(name, value):
  """Exactly: a mean of equal numbers may differ from them by rounding."""
  combine = getattr(mezo_jax, name)
  shape = (30, len(combine.signs), *((3,) if combine.of_rows else ()))
  found, g = combine.apply(jnp.full(shape, value, jnp.float32), 1e-3)
  np.testing.assert_allclose(found, value, rtol=1e-5)
  np.testing.assert_array_equal(g, 0)


def test_equal_ranks_are_shared_and_nan_has_none():
  _, g = mezo_jax.centered_rank.apply(jnp.array([[3.], [1.], [3.], [0.]]), 1)
  np.testing.assert_allclose(g, [1 / 3, -1 / 6, 1 / 3, -0.5], atol=1e-6)
  _, g = mezo_jax.centered_rank.apply(jnp.array([[3.], [np.nan]]), 1)
  assert np.isnan(g).any()


def test_a_loss_per_row_can_be_compared_without_rewards():
  """`per_prompt` works with a loss that returns one value per row."""
  tx = mezo_jax.mezo(0.05, estimator=mezo_jax.spsa(
      0.1, key=0, num_samples=6, combine='per_prompt'))
  def losses(params, batch):
    return jnp.abs(batch @ params['w'] - 1)
  params = {'w': jnp.zeros(5)}
  step, state = mezo_jax.make_step(tx, losses), tx.init(params)
  for _ in range(5):
    params, state, _ = step(params, state, ROWS)
  np.testing.assert_allclose(
      params['w'], by_hand('per_prompt', (1,), 5, 6, 0.05, 0.1), atol=2e-6)
  step = mezo_jax.make_step(tx, lambda params, batch: jnp.sum(params['w']))
  with pytest.raises(ValueError, match=r'\[B\]'):
    step({'w': jnp.zeros(5)}, tx.init(params), ROWS)


# --- steps ------------------------------------------------------------------


def test_the_update_is_that_of_a_replay():
  """A step with rewards, and its recorded numbers, give the same weights."""
  tx = mezo_jax.mezo(0.05, estimator=mezo_jax.spsa(
      0.1, key=0, num_samples=4, combine='z_score'))
  step = mezo_jax.make_step(tx, lambda params, x: x @ params,
                            reward=lambda found, batch: -np.abs(found))
  params = jnp.ones(5)
  state = tx.init(params)
  trained, state, _ = step(params.copy(), state, ROWS)
  again, _, _ = mezo_jax.make_step(tx, None).update(
      params.copy(), tx.init(params), field(state, 'projected_grad'))
  helpers.assert_bitwise(trained, again)


def test_rewards_that_are_not_finite_skip_the_step():
  tx = mezo_jax.mezo(0.05, estimator=mezo_jax.spsa(
      0.1, key=0, num_samples=4, combine='z_score'))
  step = mezo_jax.make_step(tx, lambda params, x: x @ params,
                            reward=lambda found, batch: np.nan * found)
  params, _, metrics = step(jnp.ones(5), tx.init(jnp.ones(5)), ROWS)
  assert metrics['skipped'] == 1
  np.testing.assert_array_equal(params, 1)


def test_the_number_of_the_step_is_passed():
  seen = []
  tx = mezo_jax.mezo(0.05, estimator=mezo_jax.spsa(
      0.1, key=0, num_samples=2, combine='z_score'))
  step = mezo_jax.make_step(
      tx, lambda params, x, step: x @ params + 0 * step + step,
      reward=lambda found, batch: seen.append(found.mean()) or 0 * found)
  params = jnp.zeros(5)
  state = tx.init(params)
  for _ in range(3):
    params, state, _ = step(params, state, 0 * ROWS)
  assert seen == [0, 1, 2]


def test_members_in_parts_are_members_at_once():
  tx = mezo_jax.mezo(0.05, estimator=mezo_jax.spsa(
      0.1, key=0, num_samples=6, combine='z_score', over='batch'))
  found = []
  for at_once in (None, 2, 4):
    step = mezo_jax.make_step(
        tx, lambda params, x: x @ params, at_once=at_once,
        reward=lambda outputs, batch: found.append(outputs) or outputs)
    step(jnp.ones(5), tx.init(jnp.ones(5)), ROWS)
  np.testing.assert_allclose(found[0], found[1], atol=1e-5)
  np.testing.assert_allclose(found[0], found[2], atol=1e-5)


@pytest.mark.parametrize('make', [
    lambda: mezo_jax.mezo(
        1e-3, estimator=mezo_jax.variants.forward_grad(key=0)),
    lambda: mezo_jax.mezo(1e-3, estimator=mezo_jax.variants.conservative(
        1e-3, learning_rate=1e-3, key=0)),
    lambda: mezo_jax.variants.svrg(1e-4, every=4, key=0),
    lambda: mezo_jax.mezo(1e-3, key=0, micro_batches=2)],
    ids=['forward_grad', 'conservative', 'svrg', 'micro_batches'])
def test_other_estimators_are_refused(make):
  tx = make()
  step = mezo_jax.make_step(tx, lambda params, x: x @ params,
                            reward=lambda found, batch: found)
  with pytest.raises(ValueError, match='reward'):
    step(jnp.ones(5), tx.init(jnp.ones(5)), ROWS)


def test_a_reward_of_another_shape_is_refused():
  tx = mezo_jax.mezo(1e-3, estimator=mezo_jax.spsa(
      0.1, key=0, num_samples=2, combine='z_score'))
  step = mezo_jax.make_step(tx, lambda params, x: x @ params,
                            reward=lambda found, batch: found[0])
  with pytest.raises(ValueError, match=r'\[2, 1, B\]'):
    step(jnp.ones(5), tx.init(jnp.ones(5)), ROWS)
  step = mezo_jax.make_step(tx, lambda params, x: x @ params,
                            reward=lambda found, batch: (found, found))
  with pytest.raises(ValueError, match=r'\[2, 1, B\]'):
    step(jnp.ones(5), tx.init(jnp.ones(5)), ROWS)


# --- decay towards the start ------------------------------------------------


def test_decay_towards_the_start():
  """With no gradient, the distance shrinks by 1 - rate * decay in each step."""
  start = {'w': jnp.arange(3.0), 'b': jnp.ones(2)}
  tx = optax.chain(mezo_jax.anchored(0.5), optax.sgd(0.1))
  state = tx.init(start)
  params = jax.tree.map(lambda x: x + 4, start)
  for _ in range(3):
    updates, state = tx.update(
        jax.tree.map(jnp.zeros_like, params), state, params)
    params = optax.apply_updates(params, updates)
  for name, x in params.items():
    np.testing.assert_allclose(x - start[name], 4 * 0.95**3, rtol=1e-6)


def test_mezo_decays_towards_the_start():
  zero = lambda params, batch: 0.0 * jnp.sum(params['w'])
  tx = mezo_jax.mezo(0.1, key=0, weight_decay=0.5, decay_to='start')
  params = {'w': jnp.ones((2, 2)), 'norm': {'scale': jnp.ones(2)}}
  state, step = tx.init(params), mezo_jax.make_step(tx, zero)
  moved = jax.tree.map(lambda x: x + 1, params)
  moved, state, _ = step(moved, state, ROWS)
  np.testing.assert_allclose(moved['w'], 1.95)
  np.testing.assert_allclose(moved['norm']['scale'], 1.95)
  with pytest.raises(ValueError, match='decay_to'):
    mezo_jax.mezo(0.1, key=0, decay_to='end')


# --- the pool ---------------------------------------------------------------


def pool(name, timeout=2.0):
  """Returns a pool of one process for a function of `rewards_of_tests`."""
  return rewards.Pool(rewards.source_of(f'{HERE}:{name}'), timeout, -5.0, 1)


@pytest.mark.processes
def test_functions_that_fail(capsys):
  answers = ['fine', 'raise', 'hang', 'exit', 'leave', 'text', 'nan', 'huge',
             'fine']
  found, failed = pool('mischief')(answers, [{}] * 9)
  assert [sum(each.values()) for each in found] == [2, *[-5] * 7, 2]
  assert failed == 7
  assert 'KeyError' in capsys.readouterr().out


@pytest.mark.processes
def test_named_parts_are_summed_and_reported():
  reward = rewards.Reward(pool('parts'), solved=2.0)
  report = reward.report(['four', 'a'], [{'label': 1}, {'label': 0}])
  assert report == {'reward': 1.75, 'solved': 0.5, 'reward/length': 1.25,
                    'reward/label': 0.5}
  assert [each.reward for each in reward.last] == [3.0, 0.5]


@pytest.mark.processes
def test_a_function_that_always_fails_ends_the_run():
  with pytest.raises(InputError, match='not today.*line'):
    pool('always')(['a', 'b'], [{}, {}])


@pytest.mark.parametrize('function, named', [
    ('nowhere', 'MODULE:FUNCTION'), (f'{HERE}:nothing', 'nothing'),
    ('no_such_module:f', 'no_such_module'), (f'{HERE}:one', 'two arguments'),
    (lambda text, row: 1.0, 'top level')])
def test_functions_that_cannot_be_used(function, named):
  with pytest.raises(InputError, match=named):
    rewards.load(rewards.source_of(function))


@pytest.mark.processes
def test_a_file_may_use_its_neighbours_and_dataclasses(tmp_path):
  (tmp_path / 'neighbour_of_rewards.py').write_text('TWO = 2.0')
  path = tmp_path / 'file_of_rewards.py'
  path.write_text('''
from __future__ import annotations
import dataclasses
import neighbour_of_rewards
@dataclasses.dataclass
class Found:
  value: float
def reward(text, row):
  return Found(neighbour_of_rewards.TWO).value
''')
  of_file = rewards.Pool(rewards.source_of(f'{path}:reward'), 5.0, 0.0, 1)
  assert of_file(['a'], [{}]) == ([{'': 2.0}], 0)


@pytest.mark.processes
def test_a_failure_that_is_rewarded_is_warned_of(capsys):
  of_failures = rewards.Pool(
      rewards.source_of(f'{HERE}:mischief'), 2.0, 3.0, 1)
  of_failures(['fine', 'raise'], [{}] * 2)
  of_failures(['fine', 'raise'], [{}] * 2)
  said = capsys.readouterr().out
  assert said.count('reward.failed, 3, is better') == 1
  # Once it has worked, the function may fail for all answers of a step.
  assert of_failures(['raise'], [{}]) == ([{'': 3.0}], 1)


def test_members_that_answer_alike():
  members = np.zeros((4, 2, 3), int)
  assert rewards.identical(members) == 1
  members[0, 1, 2] = 1
  assert rewards.identical(members) == 0.75
  assert rewards.identical(np.arange(24).reshape(4, 2, 3)) == 0


# --- rollouts ---------------------------------------------------------------


def populations(directions, over, **options):
  """Returns the tokens of four members of a tiny model, [4, 1, 4, 8]."""
  model, params, ids = helpers.tiny_model()
  tx = mezo_jax.mezo(1e-3, estimator=mezo_jax.spsa(
      0.5, key=0, directions=directions, combine='z_score', num_samples=4,
      over=over))
  found = []
  def rollout(params, ids, step):
    return models.generate(model, params, ids, max_new_tokens=8,
                           stop_ids=(5, 9), **options,
                           key=jax.random.fold_in(jax.random.key(0), step))
  step = mezo_jax.make_step(
      tx, rollout, reward=lambda tokens, batch: found.append(
          tokens) or np.zeros(tokens.shape[:-1]))
  step(params, tx.init(params), ids)
  return found[0]


@pytest.mark.parametrize('temperature', [0.0, 1.0])
@pytest.mark.parametrize('directions', [
    mezo_jax.Normal(), mezo_jax.LowRank(rank=1), mezo_jax.LowRank(rank=4)],
    ids=['normal', 'rank1', 'rank4'])
def test_a_population_answers_as_its_members(directions, temperature):
  one = populations(directions, 'scan', temperature=temperature)
  all_ = populations(directions, 'batch', temperature=temperature)
  np.testing.assert_array_equal(one, all_)
  assert len(np.unique(one.reshape(4, -1), axis=0)) == 4


def test_sampling_uses_the_same_noise_for_all_members():
  """With weights that are hardly perturbed, sampled answers are equal."""
  model, params, ids = helpers.tiny_model()
  z = mezo_jax.Displacement(
      jax.random.split(jax.random.key(0), 3), jnp.full(3, 1e-8))
  def of_member(key, coef):
    point = mezo_jax.Displacement(key[None], coef[None])
    return mezo_jax.perturbed(lambda p: models.generate(
        model, p, ids, max_new_tokens=8, temperature=1.0, key=3),
                              mezo_jax.Normal())(params, point)
  found = np.asarray(jax.vmap(of_member)(z.keys, z.coefs))
  np.testing.assert_array_equal(found, np.broadcast_to(found[:1], found.shape))


def test_low_rank_members_share_the_products_of_the_decoding_loop():
  """A population decodes with the flops of as many texts of one model."""
  model, params, ids = helpers.tiny_model(
      vocab_size=512, width=128, ff_width=256, head_width=32)
  generate = lambda params, ids: models.generate(
      model, params, ids, max_new_tokens=8)
  cost = lambda lowered: lowered.compile().cost_analysis()['flops']
  plain = cost(jax.jit(generate).lower(
      params, jnp.zeros((8 * 16, 12), jnp.int32)))
  for rank, most in ((1, 1.15), (4, 1.3)):
    tx = mezo_jax.mezo(1e-3, estimator=mezo_jax.spsa(
        1e-3, key=0, directions=mezo_jax.LowRank(rank=rank), over='batch',
        combine='z_score', num_samples=8))
    step = mezo_jax.make_step(tx, generate, reward=lambda *_: 0)
    rollouts, _ = step.lower(
        params, tx.init(params), jnp.zeros((16, 12), jnp.int32))
    assert cost(rollouts) < most * plain


def test_members_are_chosen_by_what_fits():
  config = config_lib.Train()
  config.spsa.over, config.spsa.num_samples = 'batch', 30
  config.spsa.combine = 'z_score'
  model, mesh = helpers.tiny_config(), one_device()
  one = population.bytes_of_member(config, model, 32, mesh)
  of = lambda free: population.at_once(config, model, 32, mesh, free)
  assert of(100 * one) is None and of(np.inf) is None
  assert of(0) == 1
  assert of(20 * one) == 15  # two passes of 15, not one of 16 and one of 14
  config.reward.at_once = 7
  assert of(100 * one) == 7


def test_a_resumed_run_keeps_its_number_of_members(tmp_path):
  config = config_lib.Train()
  config.spsa.num_samples = 30
  assert population.kept(tmp_path, config, 15) == 15
  assert population.kept(tmp_path, config, None) == 15  # there is more memory
  config.spsa.num_samples = 8
  assert population.kept(tmp_path, config, None) is None


def test_divergence_is_that_of_numpy(words_dir):
  """The divergence from other weights equals the definition; 0 from itself."""
  model, params, ids = helpers.tiny_model()
  task = tasks.Task(kind='generation', template='{text}', max_new_tokens=6,
                    stop='')
  data = tasks.encode.Encoded(
      [{}] * 4, np.asarray(ids).tolist(), [[]] * 4, [[]] * 4, [()] * 4, 0,
      generates=True)
  mesh = one_device()
  kl = divergence.make(
      model, task, data, models.load_tokenizer(words_dir),
      tasks.evaluate.Sizes((12,)), mesh)
  other = jax.tree.map(lambda x: x + 0.05 * jnp.sign(x), params)
  assert kl(params, params) == 0
  answers = models.generate(model, params, ids, max_new_tokens=6)
  whole = jnp.concatenate([ids, answers], 1)
  p, q = (jax.nn.log_softmax(model.apply({'params': each}, whole)[:, 11:-1])
          for each in (params, other))
  want = np.mean(np.sum(np.exp(p) * (p - q), -1))
  np.testing.assert_allclose(kl(params, other), want, rtol=1e-4)


def one_device():
  """Returns a mesh of one device."""
  return sharding.make_mesh(devices=jax.devices()[:1])


# --- whole runs -------------------------------------------------------------


@pytest.fixture(scope='module')
def words_dir(tmp_path_factory):
  """Returns a tiny model whose tokens are all words."""
  return conftest.write_tiny_model(
      tmp_path_factory.mktemp('words') / 'model', vocab_size=18)


@pytest.fixture(scope='module')
def prompts_file(tmp_path_factory):
  """Returns a file of 40 prompts without right answers."""
  path = tmp_path_factory.mktemp('prompts') / 'prompts.jsonl'
  path.write_text('\n'.join(
      json.dumps({'text': f'the {a} {b}'}) for a in conftest.WORDS[:10]
      for b in conftest.WORDS[4:8]))
  return path


def rewarded(model, data, **changes):
  """Returns the config of a small run that is rewarded for the word 'good'."""
  config = config_lib.Train(
      objective='reward', steps=30, eval_every=15, checkpoint_every=4)
  config.reward.function, config.reward.workers = rewards_of_tests.share, 1
  config.task = tasks.Task(
      kind='generation', template='{text}', max_new_tokens=16, stop='')
  config.model.name, config.data.train = str(model), str(data)
  config.data.num_train, config.data.num_dev, config.data.num_test = 24, 8, 8
  config.data.batch_size, config.eval_batch_size = 8, 8
  config.optimizer.learning_rate, config.spsa.eps = 3e-2, 3e-2
  config.spsa.num_samples, config.spsa.combine = 16, 'z_score'
  config.spsa.distribution, config.spsa.rank = 'low_rank', 1
  config.spsa.over = 'batch'
  return runs.changed(config, **changes)


@pytest.fixture(scope='module')
def whole_run(words_dir, prompts_file, tmp_path_factory):
  """Returns the directory and the result of a run that was not stopped."""
  workdir = tmp_path_factory.mktemp('run') / 'whole'
  config = rewarded(words_dir, prompts_file, reward__kl=True)
  return workdir, training.run(config, workdir)


@pytest.mark.processes
def test_the_reward_rises(whole_run):
  """The share of a word in greedy answers rises beyond noise in 30 steps."""
  workdir, result = whole_run
  assert result['zero_shot']['reward'] < 0.2
  assert result['final']['reward'] > 0.8
  last = runs.records(workdir)[-2:]
  assert all(0 <= last[0][name] <= 1 for name in ('identical', 'solved'))
  assert last[1]['kind'] == 'dev' and last[1]['kl'] > 0
  answers = [json.loads(line) for line in (
      workdir / 'answers.jsonl').read_text().splitlines()]
  assert {each['step'] for each in answers} == {0, 15, 30}
  assert all({'prompt', 'answer', 'reward'} <= {*each} for each in answers)


@pytest.mark.processes
def test_a_stopped_run_goes_on_and_its_log_gives_its_weights(
    whole_run, words_dir, prompts_file, tmp_path, monkeypatch):
  workdir, result = whole_run
  config = rewarded(words_dir, prompts_file, reward__kl=True)
  calls = []
  def report(self, answers, rows, original=rewards.Reward.report):
    calls.append(0)
    if len(calls) == 4:  # two of zero-shot, those of step 15 and of step 30
      raise KeyboardInterrupt
    return original(self, answers, rows)
  with monkeypatch.context() as patch:
    patch.setattr(rewards.Reward, 'report', report)
    with pytest.raises(KeyboardInterrupt):
      training.run(config, tmp_path / 'run')
  again = training.run(config, tmp_path / 'run')
  assert again['final'] == result['final']
  helpers.assert_bitwise(
      runs.saved(tmp_path / 'run')[1], runs.saved(workdir)[1])
  assert (tmp_path / 'run' / 'steps.log').read_bytes() == (
      workdir / 'steps.log').read_bytes()
  made = rebuild(words_dir, workdir / 'steps.log', tmp_path / 'made')
  _, params = models.load(made)
  helpers.assert_bitwise(params, runs.saved(workdir)[1])


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.exhaustive_except(name=['lora', 'mesh', 'antithetic'])
@pytest.mark.parametrize('name, changes', [
    ('lora', dict(peft__method='lora', optimizer__weight_decay=0.1,
                  optimizer__decay_to='start')),
    ('int8', dict(model__dtype='int8', peft__method='lora')),
    ('mesh', dict(mesh__direction=4, mesh__fsdp=2)),
    ('antithetic', dict(
        spsa__combine='antithetic_per_prompt', spsa__distribution='normal',
        spsa__over='scan', spsa__rank=16)),
    ('sampled', dict(reward__temperature=1.0, reward__at_once=4)),
    ('momentum', dict(method='momentum_by_history'))])
def test_other_settings(words_dir, prompts_file, tmp_path, name, changes):
  del name  # chooses the tier
  config = rewarded(words_dir, prompts_file, steps=4, eval_every=2,
                    checkpoint_every=2, zero_shot=False, **changes)
  result = training.run(config, tmp_path / 'run')
  assert np.isfinite(result['final']['reward'])
  assert runs.saved(tmp_path / 'run')[0] == 4


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_do_as_one(words_dir, prompts_file, tmp_path):
  """Each process computes the rewards of its own rows."""
  config = tmp_path / 'config.py'
  saved = config_lib.to_json(rewarded(
      words_dir, prompts_file, steps=6, eval_every=3,
      reward__function=f'{HERE}:share'))
  config.write_text(f'''
from mezo_jax.training.config import from_json
def get_config():
  return from_json({saved!r})
''')
  found = {}
  for count in (1, 2):
    port, started = helpers.free_port(), []
    for i in range(count):
      join = {} if count == 1 else {
          'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
          'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': str(i)}
      started.append(subprocess.Popen(
          [sys.executable, str(conftest.ROOT / 'train.py'),
           f'--config={config}', f'--workdir={tmp_path / str(count)}',
           *(['--distributed'] if join else [])], text=True,
          env=runs.environment(2 // count) | join, stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT))
    for process in started:
      said, _ = process.communicate(timeout=400)
      assert process.returncode == 0, said
    found[count] = runs.records(tmp_path / str(count))
  for one, two in zip(found[1], found[2], strict=True):
    assert one['reward'] == pytest.approx(two['reward'], abs=1e-6)


@pytest.mark.parametrize('changes, named', [
    (dict(reward__function=''), 'reward.function'),
    (dict(objective='lm'), 'objective'),
    (dict(method='hizoo', spsa__combine='two_sided'), 'hizoo'),
    (dict(method='finetune'), 'reward'),
    (dict(spsa__num_samples=1), 'num_samples'),
    (dict(spsa__over='rows', spsa__num_samples=8), 'rows'),
    (dict(reward__timeout=0), 'timeout'),
    (dict(optimizer__decay_to='start', method='finetune', objective='lm',
          reward__function='', spsa__combine='two_sided'), 'decay_to'),
    (dict(model__offload=True, spsa__over='scan',
          spsa__distribution='normal'), 'reward.build'),
    (dict(task__kind='multiple_choice'), 'reward'),
    (dict(task__chat=True, objective='lm', reward__function=''), 'chat')])
def test_configs_that_cannot_work(words_dir, prompts_file, changes, named):
  with pytest.raises(InputError, match=named):
    checks.check_config(rewarded(words_dir, prompts_file, **changes))


def test_conversations_are_those_of_the_chat_template(words_dir):
  tokenizer = models.load_tokenizer(words_dir)
  task = tasks.Task(kind='generation', template='{text}', chat=True,
                    max_new_tokens=4, stop='')
  rows = [{'text': 'good film'}, {'text': 'the plot'}]
  with pytest.raises(InputError, match='template'):
    tasks.encode.encode(task, rows, tokenizer, 32, needs_gold=False)
  tokenizer.chat_template = (
      "{% for m in messages %}It was {{ m.content }}{% endfor %}"
      '{% if add_generation_prompt %} a{% endif %}')
  found = tasks.encode.encode(task, rows, tokenizer, 32, needs_gold=False)
  assert tokenizer.batch_decode(found.prompts) == [
      'It was good film a', 'It was the plot a']
  with pytest.raises(InputError, match='row 0'):
    tasks.encode.encode(task, rows, tokenizer, 8, needs_gold=False)


def test_the_end_of_a_turn_ends_an_answer(words_dir):
  """Also if it is not the tokenizer's end token, as in Gemma."""
  tokenizer = models.load_tokenizer(words_dir)
  tokenizer.add_special_tokens({'additional_special_tokens': ['<end>']})
  tokenizer.chat_template = (
      '{% for m in messages %}{{ m.content }} <end>{% endfor %}')
  task = tasks.Task(kind='generation', template='{text}', chat=True, stop='')
  end = tokenizer.convert_tokens_to_ids('<end>')
  good = tokenizer.convert_tokens_to_ids('good')
  assert end in tasks.score.stop_ids(task, tokenizer)
  assert tasks.score.texts([[good, end, good]], task, tokenizer) == ['good']
