"""Few parameters: what is added, what is trained, and that it is used."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mezo_jax
from mezo_jax import models, peft

KEY = jax.random.key(0)


def adapted(kind, model, params, **kwargs):
  """(model, parameters with adapters away from where they start)."""
  if kind == 'last_layers':
    return model, peft.split_layers(params, 2)
  make = {'lora': lambda: peft.lora.init(params, KEY, rank=2),
          'prefix': lambda: peft.prefix.init(
              model, params, KEY, num_tokens=3, **kwargs)}[kind]
  adapters = jax.tree_util.tree_map_with_path(
      lambda path, x: x if path[-1].key == 'lora_scale' else
      x + 0.1 * jax.random.normal(jax.random.key(5), x.shape), make())
  return model, peft.join(params, adapters)


def apply(model, params, ids, **kwargs):
  return np.asarray(helpers.quick_jit(lambda p: model.apply(
      {'params': p}, ids, **kwargs))(params))


# --- LoRA -------------------------------------------------------------------


def test_lora_starts_as_the_model_and_as_the_paper_says():
  model, params, ids = helpers.tiny_model()
  adapters = peft.lora.init(params, KEY, rank=4, alpha=8.0)
  assert helpers.paths(adapters) == {
      f'layers/attn/{m}/lora_{x}' for m in 'qv' for x in ('a', 'b', 'scale')}
  q = adapters['layers']['attn']['q']
  assert q['lora_a'].shape == (3, 32, 4) and q['lora_b'].shape == (3, 4, 32)
  assert not q['lora_b'].any() and (q['lora_scale'] == 2.0).all()
  a = np.concatenate([np.ravel(peft.lora.init(params, jax.random.key(s))[
      'layers']['attn']['q']['lora_a']) for s in range(5)])
  bound = 32 ** -0.5  # uniform: variance bound^2 / 3
  assert np.abs(a).max() <= bound and np.abs(a.mean()) < 4 * bound / (
      3 * a.size) ** 0.5
  np.testing.assert_allclose(a.var(), bound ** 2 / 3, rtol=0.1)
  np.testing.assert_array_equal(
      apply(model, peft.join(params, adapters), ids),
      apply(model, params, ids))
  scaled = peft.lora.init(params, KEY, rank=4, alpha=8.0, rslora=True)
  assert (scaled['layers']['attn']['q']['lora_scale'] == 4.0).all()


def test_perturbing_lora_alone_changes_the_loss():
  """One release of the original trained nothing: its LoRA was merged away."""
  model, params, ids = helpers.tiny_model()
  adapters = peft.lora.init(params, KEY)
  trainable, frozen = peft.split(
      peft.join(params, adapters), peft.TRAINED['lora'])
  assert helpers.paths(trainable) == {
      f'layers/attn/{m}/lora_{x}' for m in 'qv' for x in 'ab'}
  loss_fn = lambda p: helpers.lm_loss(model)(peft.join(p, frozen), ids)
  far = helpers.quick_jit(lambda c: mezo_jax.perturbed(loss_fn)(
      trainable, mezo_jax.Displacement(jax.random.key(3), c)))
  losses = [float(far(c)) for c in (0.0, 0.1, -0.1)]
  assert len(set(losses)) == 3 and max(losses) - min(losses) > 1e-4
  built = mezo_jax.displace(
      trainable, mezo_jax.Displacement(jax.random.key(3), 0.1))
  np.testing.assert_allclose(
      losses[1], helpers.quick_jit(
          lambda: loss_fn(built))(), rtol=1e-6)


@pytest.mark.slow
def test_merging_is_the_same_function_and_unmerging_its_inverse():
  model, params, ids = helpers.tiny_model()
  model, whole = adapted('lora', model, params)
  merged = peft.lora.merge(whole)
  assert helpers.paths(merged) == helpers.paths(params)
  np.testing.assert_allclose(
      apply(model, merged, ids), apply(model, whole, ids), atol=2e-5)
  w, a = whole['layers']['attn']['q'], None
  a = np.asarray(w['kernel'], np.float64) + np.asarray(
      w['lora_scale'], np.float64)[:, None, None] * np.einsum(
          'lir,lro->lio', *(np.asarray(w[f'lora_{x}'], np.float64)
                            for x in 'ab'))
  np.testing.assert_allclose(
      merged['layers']['attn']['q']['kernel'], a, rtol=1e-6, atol=1e-7)
  helpers.assert_bitwise(merged['layers']['mlp'], params['layers']['mlp'])
  adapters = peft.split(whole, '/lora_')[0]
  back = peft.lora.unmerge(merged, adapters)
  assert helpers.paths(back) == helpers.paths(whole)
  np.testing.assert_allclose(
      back['layers']['attn']['q']['kernel'], params['layers']['attn']['q'][
          'kernel'], atol=2e-7)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  assert peft.lora.merge(peft.join(half, adapters))['layers']['attn']['q'][
      'kernel'].dtype == jnp.bfloat16


def test_bad_lora():
  _, params, _ = helpers.tiny_model()
  with pytest.raises(ValueError, match="'query' .*layers/attn/q"):
    peft.lora.init(params, KEY, targets='query')
  with pytest.raises(ValueError, match='rank .* 0'):
    peft.lora.init(params, KEY, rank=0)


@pytest.mark.slow
def test_a_lora_step_draws_noise_for_lora_alone():
  """By the compiler's count, and its memory is that of two forwards."""
  config = helpers.tiny_config(
      width=256, ff_width=1024, num_layers=4, head_width=64, vocab_size=512)
  model = models.Transformer(config)
  params = jax.eval_shape(
      lambda: models.Transformer(config).init(KEY, jnp.zeros((1, 8), int)))[
          'params']
  adapters = jax.eval_shape(lambda p: peft.lora.init(p, KEY), params)
  trainable, frozen = peft.split(
      peft.join(params, adapters), peft.TRAINED['lora'])
  ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)
  tx = mezo_jax.mezo(1e-4, 1e-2, key=0)

  def forward(trainable, frozen, ids):
    return helpers.lm_loss(model)(peft.join(trainable, frozen), ids)

  def step(trainable, state, frozen, ids):
    updates, state = tx.update(
        None, state, trainable, value_fn=lambda p: forward(p, frozen, ids))
    return optax.apply_updates(trainable, updates), state

  step = jax.jit(step, donate_argnums=(0, 1)).lower(
      trainable, jax.eval_shape(tx.init, trainable), frozen, ids).compile()
  forward = jax.jit(forward).lower(trainable, frozen, ids).compile()
  size = lambda x: x.memory_analysis().temp_size_in_bytes
  weights = 4 * sum(x.size for x in jax.tree.leaves(params))
  assert size(step) - size(forward) < 0.05 * weights
  flops = lambda x: x.cost_analysis()['flops']
  assert flops(step) < 2.1 * flops(forward)


# --- prefixes, soft prompts, last layers ------------------------------------


@pytest.mark.slow
def test_a_prefix_is_what_the_layers_make_of_real_tokens():
  """With it, and positions after it, a text reads as if they stood there."""
  for changes in (dict(), dict(rope=None, norm='layer')):
    model, params, ids = helpers.tiny_model(**changes)
    tokens = jax.random.randint(KEY, (3,), 0, 64)
    for init, more in (('tokens', {}), ('text', dict(token_ids=tokens))):
      adapters = peft.prefix.init(
          model, params, KEY, num_tokens=3, init=init, **more)
      after = model.clone(prefix_positions='after')
      np.testing.assert_allclose(
          apply(after, peft.join(params, adapters), ids),
          apply(model, params, jnp.concatenate(
              [jnp.broadcast_to(tokens, (4, 3)), ids], 1))[:, 3:], atol=2e-5)
  k = adapters['layers']['attn']['prefix_k']
  assert k.shape == (3, 3, 2, 8) and k.dtype == jnp.float32
  normal = peft.prefix.init(model, params, KEY, num_tokens=50, init='normal')
  values = np.ravel(normal['layers']['attn']['prefix_v'])
  assert abs(values.mean()) < 4 / values.size ** 0.5
  np.testing.assert_allclose(values.std(), 1, rtol=0.1)


@pytest.mark.slow
def test_a_soft_prompt_of_real_tokens_reads_as_they_do():
  for changes in (dict(), dict(rope=None, norm='layer', embed_scale=3.0),
                  dict(causal=False, rope=None)):
    model, params, ids = helpers.tiny_model(**changes)
    tokens = jnp.array([5, 9])
    adapters = peft.prefix.init_prompt(
        model, params, KEY, num_tokens=3, init='text', token_ids=tokens)
    whole = peft.join(params, adapters)
    mask = np.ones((4, 12), np.int32)
    mask[1, :5] = mask[2, :2] = 0
    soft, soft_mask = peft.prefix.prepend(
        peft.prefix.soft_ids(64, whole), ids, mask)
    real, real_mask = peft.prefix.prepend([5, 9, 5], ids, mask)
    np.testing.assert_allclose(
        apply(model, whole, soft, attention_mask=soft_mask),
        apply(model, params, real, attention_mask=real_mask), atol=2e-5)


@pytest.mark.slow
def test_last_layers_are_the_same_model():
  model, params, ids = helpers.tiny_model()
  want = apply(model, params, ids)
  for k in (1, 2, 3):
    apart = peft.split_layers(params, k)
    assert ('layers' in apart) == (k < 3)
    assert len(apart['last_layers']['attn']['q']['kernel']) == k
    np.testing.assert_allclose(apply(model, apart, ids), want, atol=1e-6)
    helpers.assert_bitwise(peft.join_layers(apart), params)
  given = jax.tree.map(jnp.copy, params)
  apart = peft.split_layers(given, 1, take=True)
  assert not jax.tree.leaves(given['layers'])
  helpers.assert_bitwise(peft.join_layers(apart, take=True), params)
  assert not jax.tree.leaves(apart['layers'])
  assert peft.join_layers(params) is params
  for k in (0, 4):
    with pytest.raises(ValueError, match=f'{k} last layers'):
      peft.split_layers(params, k)


@pytest.mark.slow
@pytest.mark.exhaustive_except(kind=['prefix'], changes=[{}])
@pytest.mark.parametrize('kind,changes', [
    ('lora', {}), ('prefix', {}), ('prefix', dict(rope=None, norm='layer')),
    ('prefix', dict(window=4)), ('last_layers', {})])
@pytest.mark.parametrize('positions', ['zero', 'after'])
def test_cached_generation_is_uncached(kind, changes, positions):
  if positions == 'after' and kind != 'prefix':
    pytest.skip('no positions of its own')
  model, params, ids = helpers.tiny_model(**changes)
  model = model.clone(prefix_positions=positions)
  model, whole = adapted(kind, model, params)
  mask = np.ones((4, 12), np.int32)
  mask[1, :5] = 0
  got = models.generate(model, whole, ids, mask, max_new_tokens=6)
  # A causal model says at each token of the whole text what comes next.
  logits = apply(model, whole, jnp.concatenate([ids, got], 1),
                 attention_mask=np.pad(mask, ((0, 0), (0, 6)),
                                       constant_values=1))
  np.testing.assert_array_equal(got, logits[:, 11:-1].argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['prefix', 'prompt'])
def test_packed_candidates_each_see_the_prefix(kind):
  """Candidates after a shared prompt score as each does alone."""
  model, params, ids = helpers.tiny_model()
  if kind == 'prefix':
    model, whole = adapted('prefix', model, params)
    soft = []
  else:
    whole = peft.join(params, peft.prefix.init_prompt(model, params, KEY))
    soft = peft.prefix.soft_ids(64, whole)
  prompt, one, two = ids[:1, :5], ids[:1, 5:8], ids[:1, 8:12]
  put = lambda *parts: peft.prefix.prepend(soft, jnp.concatenate(parts, 1))[0]
  n = len(soft)
  packed = put(prompt, one, two)
  mask = jnp.array([[1] * (5 + n) + [2] * 3 + [3] * 4])
  got = apply(model, whole, packed, attention_mask=mask, shared_prompt=True)
  for start, answer in ((5 + n, one), (8 + n, two)):
    alone = apply(model, whole, put(prompt, answer))
    np.testing.assert_allclose(
        got[:, start:start + answer.shape[1]], alone[:, 5 + n:], atol=2e-5)


def test_a_prefix_leaves_room_for_itself():
  model, params, _ = helpers.tiny_model()
  ids = jnp.zeros((1, 64), int)
  _, whole = adapted('prefix', model, params)
  apply(model, whole, ids)
  with pytest.raises(ValueError, match='67 .* 64 positions'):
    apply(model.clone(prefix_positions='after'), whole, ids)
  for bad, message in ((dict(num_tokens=0), 'num_tokens .* 0'),
                       (dict(init='no'), "init 'no'"),
                       (dict(init='text'), "init 'text'")):
    with pytest.raises(ValueError, match=message):
      peft.prefix.init(model, params, KEY, **bad)


@pytest.mark.slow
def test_adapters_of_half_precision_models_are_float32():
  model, params, ids = helpers.tiny_model()
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  for adapters in (peft.lora.init(half, KEY),
                   peft.prefix.init(model, half, KEY),
                   peft.prefix.init_prompt(model, half, KEY)):
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapters))
    if 'prompt' in adapters:
      ids, _ = peft.prefix.prepend(peft.prefix.soft_ids(64, adapters), ids)
    got = apply(model, peft.join(half, adapters), ids)
    want = apply(model, peft.join(params, adapters), ids)
    np.testing.assert_allclose(got, want, atol=0.05)


# --- files ------------------------------------------------------------------


def test_adapters_survive_their_files(tiny_dir, tmp_path):
  model, params = models.load(tiny_dir, progress=False)
  cases = {'lora': adapted('lora', model, params)[1],
           'prefix': adapted('prefix', model, params)[1],
           'prompt': peft.join(
               params, peft.prefix.init_prompt(model, params, KEY))}
  model = model.clone(prefix_positions='after')
  for kind, whole in cases.items():
    peft.save(tmp_path / kind, model, whole, base='someone/base', card='# a')
    _, adapters, found = peft.load(tmp_path / kind, model)
    assert found == kind
    assert (tmp_path / kind / 'README.md').read_text() == '# a'
    helpers.assert_bitwise(peft.join(params, adapters), whole)
  with pytest.raises(FileExistsError, match='lora .*empty'):
    peft.save(tmp_path / 'lora', model, cases['lora'])
  with pytest.raises(ValueError, match='LoRA, prefix or prompt'):
    peft.save(tmp_path / 'none', model, params)


def test_bad_adapter_directories(tiny_dir, tmp_path):
  model, params = models.load(tiny_dir, progress=False)
  _, whole = adapted('lora', model, params)
  with pytest.raises(FileNotFoundError, match='adapter_config.json'):
    peft.load(tmp_path, model)
  at = peft.save(tmp_path / 'a', model, whole)
  config, weights = at / 'adapter_config.json', at / 'adapter_model.safetensors'
  said, data = config.read_text(), weights.read_bytes()
  for old, new, message in (
      ('"LORA"', '"IA3"', "'IA3'.*LORA"),
      ('"LORA"', '"PREFIX_TUNING"', "adapter_config.json: .*'bias'"),
      ('"LORA"', '["LORA"]', r"\['LORA'\]"),
      ('"none"', '"all"', "bias .*'all'"),
      ('"lora_alpha": ', '"lora_alpha": 1e999, "x": ', 'lora_alpha .*inf'),
      ('"r": ', '"alpha_pattern": {"(": 1}, "r": ', 'alpha_pattern'),
      ('"r": ', '"prefix_positions": "x", "r": ', "'prefix_positions' .*'x'"),
      ('{', '', 'adapter_config.json')):
    assert old in said
    config.write_text(said.replace(old, new))
    with pytest.raises(ValueError, match=message):
      peft.load(at, model)
  config.write_text(said)
  weights.write_bytes(data[:-200])
  with pytest.raises(ValueError, match='adapter_model.safetensors'):
    peft.load(at, model)
  weights.write_bytes(data)
  for changes, message in (
      (dict(width=64), r'q_proj .*\(2, 32\) .* 64'),
      (dict(num_layers=2), 'layers.2.self_attn')):
    with pytest.raises(ValueError, match=message):
      peft.load(at, models.Transformer(helpers.tiny_config(
          **dict(vocab_size=300) | changes)))
