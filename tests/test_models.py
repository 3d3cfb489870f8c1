"""Logits against references written independently, and model files."""

import json

import conftest
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mezo_jax
from mezo_jax import models
from mezo_jax.models import transformer
from mezo_jax.tasks import quickstart_data

SWITCHES = {
    'grouped queries, tied head': dict(),
    'untied head': dict(tie_word_embeddings=False),
    'one key-value head': dict(num_key_value_heads=1),
    'full heads, wide head_dim': dict(num_key_value_heads=4, head_dim=16),
    'no head_dim': dict(head_dim=None),
    'biases': dict(attention_bias=True, mlp_bias=True),
    'linear rope': dict(rope_scaling={'type': 'linear', 'factor': 3.0}),
    'llama3 rope': dict(rope_scaling={
        'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0,
        'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}),
    'rope_parameters': dict(rope_theta=None, rope_parameters={
        'rope_theta': 5e5, 'rope_type': 'default'}),
}
IDS = np.random.RandomState(0).randint(0, 300, (3, 20))
MASK = np.arange(20) < np.array([[20], [15], [4]])  # rows padded on the right


def numpy_llama(directory, ids):
  """The forward pass in numpy, from the files: no code shared with ours."""
  c = json.loads((directory / 'config.json').read_text())
  t = {k: v.astype(np.float64)
       for k, v in load_file(directory / 'model.safetensors').items()}
  n, k = c['num_attention_heads'], c['num_key_value_heads']
  h = c['head_dim'] or c['hidden_size'] // n
  rope = c.get('rope_parameters') or {}
  theta = rope.get('rope_theta') or c['rope_theta']
  freq = theta ** (-np.arange(0, h, 2) / h)
  s = c.get('rope_scaling') or {}
  kind = s.get('rope_type', s.get('type'))
  if kind == 'linear':
    freq = freq / s['factor']
  if kind == 'llama3':
    old, low, high = (s['original_max_position_embeddings'],
                      s['low_freq_factor'], s['high_freq_factor'])
    for i, f in enumerate(freq):
      wave = 2 * np.pi / f
      smooth = (old / wave - low) / (high - low)
      if wave > old / low:
        freq[i] = f / s['factor']
      elif wave > old / high:
        freq[i] = (1 - smooth) * f / s['factor'] + smooth * f
  angle = np.arange(ids.shape[1])[:, None] * freq
  cos, sin = np.cos(angle), np.sin(angle)
  def turn(x):  # [S, H]
    a, b = x[:, :h // 2], x[:, h // 2:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], 1)
  def norm(x, w):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c['rms_norm_eps']) * w
  def linear(x, name):
    return x @ t[f'{name}.weight'].T + t.get(f'{name}.bias', 0)
  out = []
  for row in ids:
    x = t['model.embed_tokens.weight'][row]
    for l in range(c['num_hidden_layers']):
      p = f'model.layers.{l}.'
      y = norm(x, t[p + 'input_layernorm.weight'])
      q, key, v = (linear(y, f'{p}self_attn.{m}_proj') for m in 'qkv')
      heads = []
      for i in range(n):
        j = i // (n // k)
        a = turn(q[:, i * h:(i + 1) * h]) @ turn(
            key[:, j * h:(j + 1) * h]).T / np.sqrt(h)
        a = np.where(np.tri(len(row)), a, -np.inf)
        a = np.exp(a - a.max(-1, keepdims=True))
        heads.append(a / a.sum(-1, keepdims=True) @ v[:, j * h:(j + 1) * h])
      x = x + linear(np.concatenate(heads, 1), p + 'self_attn.o_proj')
      y = norm(x, t[p + 'post_attention_layernorm.weight'])
      gate = linear(y, p + 'mlp.gate_proj')
      y = gate / (1 + np.exp(-gate)) * linear(y, p + 'mlp.up_proj')
      x = x + linear(y, p + 'mlp.down_proj')
    x = norm(x, t['model.norm.weight'])
    out.append(x @ t.get('lm_head.weight', t['model.embed_tokens.weight']).T)
  return np.stack(out)


def relative(a, b):
  return np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()


@pytest.mark.parametrize('name', SWITCHES)
def test_logits_against_numpy(name, tmp_path):
  directory = conftest.write_tiny_model(tmp_path / 'm', **SWITCHES[name])
  model, params = models.load(directory)
  got = jax.jit(model.apply)({'params': params}, IDS)
  assert got.dtype == jnp.float32
  assert relative(got, numpy_llama(directory, IDS)) < 1e-5


@pytest.mark.parametrize('vocab,chunk', [(64, 64), (64, 16), (61, 16), (5, 16)])
@pytest.mark.slow_except(vocab=[61])
@pytest.mark.exhaustive_except(vocab=[61])
def test_log_likelihood_in_parts_of_the_vocabulary(vocab, chunk):
  x, table = (jax.random.normal(jax.random.key(i), shape)
              for i, shape in enumerate([(3, 4, 8), (vocab, 8)]))
  targets = jax.random.randint(jax.random.key(2), (3, 4), 0, vocab)
  loss = lambda p: transformer.log_likelihood(
      x, 9 * p['embed'], targets, chunk=chunk)
  whole = jax.nn.log_softmax(x @ (9 * table).T)
  want = jnp.take_along_axis(whole, targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(loss({'embed': table}), want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_long_answer_needs_no_perturbed_vocabulary():
  """With a table of 20 MB and 8 answer tokens a row: the perturbed loss needs
  less than a fifth of it, and is what built weights give."""
  model, _, ids = helpers.tiny_model(vocab_size=40_000, width=128)
  def loss_fn(params, ids):
    return -model.apply({'params': params}, ids, targets=ids).mean()
  shapes = models.param_shapes(model.config)
  step = mezo_jax.Displacement(jax.random.key(3), 0.1)
  lazy = jax.jit(lambda p, ids: mezo_jax.perturbed(loss_fn)(p, step, ids))
  memory = lazy.lower(shapes, ids).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.2 * 4 * 40_000 * 128
  params = helpers.quick_jit(model.init)(jax.random.key(1), ids)['params']
  built = helpers.quick_jit(lambda p, ids: loss_fn(
      mezo_jax.displace(p, step), ids))
  np.testing.assert_allclose(lazy(params, ids), built(params, ids), rtol=1e-5)


@pytest.mark.parametrize('model_type,change,message', [
    ('opt', dict(layer_norm_elementwise_affine=False), 'layer_norm_element'),
    ('opt', dict(activation_function='mish'), "activation_function='mish'"),
    ('llama', dict(hidden_act='mish'), "hidden_act='mish'"),
    ('gpt2', dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by'),
    ('gemma2', dict(use_bidirectional_attention=True), 'use_bidirectional'),
    ('gemma', dict(hidden_act='tanh'), "hidden_act='tanh'"),
    ('bert', dict(position_embedding_type='relative_key'), "'relative_key'"),
    ('roberta', dict(is_decoder=True), 'is_decoder'),
    ('qwen2', dict(rope_scaling={'type': 'yarn'}), "'yarn' .*rope_scaling"),
    ('mistral', dict(hidden_size='32'), "hidden_size='32'"),
    ('mamba', dict(), "model_type 'mamba'")])
def test_what_is_not_covered_is_refused(model_type, change, message):
  hf = dict(model_type=model_type, vocab_size=64, hidden_size=32, ffn_dim=64,
            intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
  hf = {k: v for k, v in (hf | change).items() if v is not None}
  with pytest.raises(ValueError, match=message):
    models.read_config(hf)


def test_old_spellings_of_a_config():
  """As files on the hub have them, before transformers 5 rewrote them."""
  common = dict(vocab_size=64, hidden_size=32, intermediate_size=64,
                num_hidden_layers=12, num_attention_heads=4,
                num_key_value_heads=4, head_dim=8)
  third = models.read_config(common | dict(
      model_type='gemma3_text', sliding_window=512, sliding_window_pattern=6,
      rope_theta=1e6, rope_local_base_freq=2e4,
      rope_scaling={'rope_type': 'linear', 'factor': 8.0}))
  assert third.local_layers == ((True,) * 5 + (False,)) * 2
  assert third.rope == models.Rope(1e6, 'linear', 8.0)
  assert third.local_rope == models.Rope(2e4)
  vision = models.read_config(dict(model_type='gemma3', text_config=common | {
      'sliding_window': 512}))
  assert vision.family == 'gemma3_text' and vision.rope == models.Rope(1e6)
  second = models.read_config(common | dict(model_type='gemma2'))
  assert second.local_layers == (True, False) * 6 and second.window == 4096
  assert models.read_config(common | dict(
      model_type='gemma', hidden_act='gelu')).activation == 'gelu_tanh'
  assert models.read_config(common | dict(
      model_type='mistral', sliding_window=None)).window is None
  assert models.read_config(common | dict(
      model_type='llama', rope_theta=5e5)).rope == models.Rope(5e5)


@pytest.mark.torch
def test_the_real_model_against_torch():
  """SmolLM2-135M, where torch is installed and the file is at hand."""
  torch = pytest.importorskip('torch')
  pytest.importorskip('accelerate')  # transformers reads GGUF with it
  if not quickstart_data.model_path(fetch=False):
    pytest.skip('the quickstart model is not in the cache')
  from transformers import AutoModelForCausalLM
  path = quickstart_data.model_path()
  model, params = models.load(path, dtype='float32')
  tokenizer = models.load_tokenizer(path)
  ids = np.array(tokenizer(['The capital of France is Paris, and the'])[
      'input_ids'])
  reference = AutoModelForCausalLM.from_pretrained(
      path.parent, gguf_file=path.name, dtype=torch.float32)
  with torch.no_grad():
    want = reference(torch.tensor(ids)).logits.numpy()
  assert relative(jax.jit(model.apply)({'params': params}, ids), want) < 1e-4


@pytest.mark.slow
def test_padding_on_either_side_changes_nothing(tiny_dir):
  model, params = models.load(tiny_dir)
  ids = IDS[:1, :8]
  want = model.apply({'params': params}, ids)
  for left in (0, 5):
    padded = np.zeros((1, 13), int)
    mask = np.zeros((1, 13), int)
    padded[:, left:left + 8], mask[:, left:left + 8] = ids, 1
    got = model.apply({'params': params}, padded, mask)
    np.testing.assert_allclose(
        got[:, left:left + 8], want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_answer_positions_and_rows_only(tiny_dir):
  model, params = models.load(tiny_dir)
  full = model.apply({'params': params}, IDS)
  at, words = np.array([[3, 0], [19, 7], [2, 2]]), np.array([5, 17, 250])
  got = model.apply({'params': params}, IDS, answer_at=at, token_ids=words)
  want = np.take_along_axis(np.asarray(full), at[..., None], 1)[..., words]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_float32_within_its_rounding(tiny_dir):
  model, params = models.load(tiny_dir)
  half = models.load(tiny_dir, dtype='bfloat16')[1]
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype('bfloat16')}
  got = model.apply({'params': half}, IDS)
  assert got.dtype == jnp.float32
  assert relative(got, np.asarray(model.apply({'params': params}, IDS))) < 0.05


# --- files ------------------------------------------------------------------


def test_many_files_and_an_index(tiny_dir, tmp_path):
  tensors = load_file(tiny_dir / 'model.safetensors')
  for name in ('config.json', 'tokenizer.json', 'tokenizer_config.json'):
    (tmp_path / name).write_bytes((tiny_dir / name).read_bytes())
  parts, index = [dict(), dict()], {}
  for i, (name, tensor) in enumerate(tensors.items()):
    parts[i % 2][name] = tensor
    index[name] = f'model-{i % 2}.safetensors'
  for i, part in enumerate(parts):
    save_file(part, tmp_path / f'model-{i}.safetensors')
  (tmp_path / 'model.safetensors.index.json').write_text(
      json.dumps({'weight_map': index}))
  helpers.assert_bitwise(models.load(tmp_path)[1], models.load(tiny_dir)[1])
  (tmp_path / 'model-1.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='model-1.safetensors'):
    models.load(tmp_path)


@pytest.mark.parametrize('data,fsdp', [(1, 8), (2, 4), (8, 1)])
@pytest.mark.slow_except(data=[2])
def test_sharded_loading(tmp_path, data, fsdp):
  directory = conftest.write_tiny_model(
      tmp_path / 'm', hidden_size=256, intermediate_size=512, vocab_size=512)
  model, params = models.load(directory)
  mesh = helpers.mesh_of(data, fsdp)
  _, sharded = models.load(directory, mesh)
  helpers.assert_bitwise(jax.device_get(params), jax.device_get(sharded))
  gate = sharded['layers']['mlp']['gate']['kernel']
  assert gate.addressable_shards[0].data.size == gate.size // fsdp
  ids = IDS[:2, :8]
  got = jax.jit(model.apply)({'params': sharded}, ids)
  want = jax.jit(model.apply)({'params': params}, ids)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_misfits_are_named_all_at_once(tiny_dir, tmp_path):
  tensors = dict(load_file(tiny_dir / 'model.safetensors'))
  (tmp_path / 'config.json').write_bytes(
      (tiny_dir / 'config.json').read_bytes())
  del tensors['model.norm.weight']
  name = 'model.layers.1.mlp.up_proj.weight'
  tensors[name] = tensors[name].T.copy()
  tensors['model.layers.9.extra'] = np.zeros(2, np.float32)
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError) as e:
    models.load(tmp_path)
  for part in ('model.norm.weight', 'model.layers.9.extra',
               name, '(32, 64)', '(64, 32)'):
    assert part in str(e.value)


@pytest.mark.parametrize('name,error', [
    ('/no/such/dir', '/no/such/dir.*config.json'),
    ('a/b/c', 'a/b/c.*config.json'),
    ('lost.gguf', 'lost.gguf.*config.json'), ('nonsense', "'nonsense'.*hub"),
    ('someone/some-model', "'someone/some-model'.*hub")])
def test_no_such_model(name, error):
  with pytest.raises(FileNotFoundError, match=error):
    models.load(name)


def test_unusable_files(tiny_dir, tmp_path):
  with pytest.raises(FileNotFoundError, match='config.json'):
    models.load(tmp_path)
  config = json.loads((tiny_dir / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(FileNotFoundError, match='.safetensors'):
    models.load(tmp_path)
  (tmp_path / 'model.safetensors').write_bytes(b'not a checkpoint')
  with pytest.raises(ValueError, match='model.safetensors'):
    models.load(tmp_path)
  (tmp_path / 'm.gguf').write_bytes(b'not a checkpoint')
  with pytest.raises(ValueError, match='m.gguf'):
    models.load(tmp_path / 'm.gguf')
  for change, message in ((dict(model_type='rwkv'), "'rwkv'"),
                          (dict(hidden_act='mish'), 'hidden_act'),
                          (dict(rope_scaling={'type': 'yarn'}), "'yarn'")):
    (tmp_path / 'config.json').write_text(json.dumps(config | change))
    (tmp_path / 'model.safetensors').write_bytes(
        (tiny_dir / 'model.safetensors').read_bytes())
    with pytest.raises(ValueError, match=message):
      models.load(tmp_path)


def test_too_long_a_sequence(tiny_dir):
  model, params = models.load(tiny_dir)
  with pytest.raises(ValueError, match='129 .* 128 positions'):
    model.apply({'params': params}, np.zeros((1, 129), int))
