"""Logits against references written independently, and model files."""

import json
import re

import conftest
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mezo_jax
from mezo_jax import models, quickstart
from mezo_jax.models import opt, transformer

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


def assert_like(reference, model, params, mask):
  """Equal logits at all tokens of IDS, those of a torch model as reference."""
  import torch
  mask = mask.astype(np.int32)
  with torch.no_grad():
    want = reference(torch.tensor(IDS),
                     attention_mask=torch.tensor(mask)).logits.numpy()
  got = jax.jit(model.apply)({'params': params}, IDS, mask)
  assert relative(np.asarray(got)[mask == 1], want[mask == 1]) < 1e-5


@pytest.mark.parametrize('name', SWITCHES)
def test_logits_against_numpy(name, tmp_path):
  directory = conftest.write_tiny_model(tmp_path / 'm', **SWITCHES[name])
  model, params = models.load(directory)
  got = jax.jit(model.apply)({'params': params}, IDS)
  assert got.dtype == jnp.float32
  assert relative(got, numpy_llama(directory, IDS)) < 1e-5


@pytest.mark.parametrize('name', SWITCHES)
def test_logits_against_torch(name, tmp_path):
  torch = pytest.importorskip('torch')
  from transformers import AutoModelForCausalLM
  directory = conftest.write_tiny_model(tmp_path / 'm', **SWITCHES[name])
  model, params = models.load(directory)
  reference = AutoModelForCausalLM.from_pretrained(
      directory, dtype=torch.float32, attn_implementation='eager')
  assert_like(reference, model, params, MASK)


OPT_SWITCHES = {
    'as released': dict(),
    'untied head': dict(tie_word_embeddings=False),
    'no biases': dict(enable_bias=False),
}


@pytest.mark.parametrize('padding', ['left', 'right'])
@pytest.mark.parametrize('name', OPT_SWITCHES)
def test_opt_logits_against_torch(name, padding, tmp_path):
  torch = pytest.importorskip('torch')
  from transformers import OPTConfig, OPTForCausalLM
  torch.manual_seed(0)
  reference = OPTForCausalLM(OPTConfig(
      vocab_size=320, hidden_size=32, ffn_dim=64, num_hidden_layers=3,
      num_attention_heads=4, max_position_embeddings=40, dropout=0.0,
      word_embed_proj_dim=32, init_std=0.3, **OPT_SWITCHES[name])).eval()
  with torch.no_grad():
    for x in reference.parameters():  # biases and norms as trained ones are
      x.add_(0.1 * torch.randn_like(x))
  reference.save_pretrained(tmp_path)
  model, params = models.load(tmp_path)
  assert_like(reference, model, params,
              MASK if padding == 'right' else MASK[:, ::-1])


@pytest.mark.parametrize('vocab,chunk', [(64, 64), (64, 16), (61, 16), (5, 16)])
def test_log_likelihood_in_parts_of_the_vocabulary(vocab, chunk):
  x, table = (jax.random.normal(jax.random.key(i), shape)
              for i, shape in enumerate([(3, 4, 8), (vocab, 8)]))
  targets = jax.random.randint(jax.random.key(2), (3, 4), 0, vocab)
  loss = lambda p: transformer.log_likelihood(x, 9 * p['embed'], targets, chunk)
  whole = jax.nn.log_softmax(x @ (9 * table).T)
  want = jnp.take_along_axis(whole, targets[..., None], -1)[..., 0]
  np.testing.assert_allclose(loss({'embed': table}), want, rtol=1e-5, atol=1e-5)


def test_a_long_answer_needs_no_perturbed_vocabulary():
  """With a table of 20 MB and 8 answer tokens a row: the perturbed loss needs
  less than a fifth of it, and is what built weights give."""
  model, _, ids = helpers.tiny_model(vocab_size=40_000, width=128)
  def loss_fn(params, ids):
    return -model.apply({'params': params}, ids, targets=ids).mean()
  shapes = models.param_shapes(model.config)
  step = [(jax.random.key(3), 0.1)]
  lazy = jax.jit(lambda p, ids: mezo_jax.perturbed(loss_fn)(p, step, ids))
  memory = lazy.lower(shapes, ids).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 0.2 * 4 * 40_000 * 128
  params = model.init(jax.random.key(1), ids)['params']
  built = mezo_jax.displace(params, step)
  np.testing.assert_allclose(lazy(params, ids), loss_fn(built, ids), rtol=1e-5)


@pytest.mark.parametrize('change', [
    {'do_layer_norm_before': False}, {'word_embed_proj_dim': 8},
    {'activation_function': 'gelu'}])
def test_an_opt_that_is_not_covered_is_refused(change):
  config = dict(vocab_size=64, hidden_size=32, ffn_dim=64,
                num_hidden_layers=1, num_attention_heads=4)
  with pytest.raises(ValueError, match=f'opt with {[*change][0]}'):
    opt.config_from_hf(config | change)


def test_the_real_model_against_torch():
  """SmolLM2-135M, where torch is installed and the file is at hand."""
  torch = pytest.importorskip('torch')
  pytest.importorskip('accelerate')  # transformers reads GGUF with it
  if not quickstart.model_path(fetch=False):
    pytest.skip('the quickstart model is not in the cache')
  from transformers import AutoModelForCausalLM
  path = quickstart.model_path()
  model, params = models.load(path, dtype='float32')
  tokenizer = models.load_tokenizer(path)
  ids = np.array(tokenizer(['The capital of France is Paris, and the'])[
      'input_ids'])
  reference = AutoModelForCausalLM.from_pretrained(
      path.parent, gguf_file=path.name, dtype=torch.float32)
  with torch.no_grad():
    want = reference(torch.tensor(ids)).logits.numpy()
  assert relative(jax.jit(model.apply)({'params': params}, ids), want) < 1e-4


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
  with pytest.raises(FileNotFoundError, match='lacks model-1.safetensors'):
    models.load(tmp_path)


@pytest.mark.parametrize('data,fsdp', [(1, 8), (2, 4), (8, 1)])
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


def write_gguf(directory, path):
  """The tiny model as llama.cpp stores it: renamed, q and k permuted."""
  import gguf
  c = json.loads((directory / 'config.json').read_text())
  writer = gguf.GGUFWriter(path, 'llama')
  writer.add_block_count(c['num_hidden_layers'])
  writer.add_embedding_length(c['hidden_size'])
  writer.add_feed_forward_length(c['intermediate_size'])
  writer.add_context_length(c['max_position_embeddings'])
  writer.add_head_count(c['num_attention_heads'])
  writer.add_head_count_kv(c['num_key_value_heads'])
  writer.add_layer_norm_rms_eps(c['rms_norm_eps'])
  writer.add_rope_freq_base(c['rope_theta'])
  names = {'self_attn.q_proj': 'attn_q', 'self_attn.k_proj': 'attn_k',
           'self_attn.v_proj': 'attn_v', 'self_attn.o_proj': 'attn_output',
           'mlp.gate_proj': 'ffn_gate', 'mlp.up_proj': 'ffn_up',
           'mlp.down_proj': 'ffn_down', 'input_layernorm': 'attn_norm',
           'post_attention_layernorm': 'ffn_norm'}
  for name, w in load_file(directory / 'model.safetensors').items():
    for heads, kind in ((c['num_attention_heads'], 'q_proj'),
                        (c['num_key_value_heads'], 'k_proj')):
      if kind in name:
        out, width = w.shape
        w = w.reshape(heads, 2, out // heads // 2, width).swapaxes(1, 2)
        w = w.reshape(out, width)
    layer = re.fullmatch(r'model\.layers\.(\d+)\.(.+)\.weight', name)
    target = {'model.embed_tokens.weight': 'token_embd.weight',
              'model.norm.weight': 'output_norm.weight'}.get(name)
    if layer:
      target = f'blk.{layer[1]}.{names[layer[2]]}.weight'
    writer.add_tensor(target, np.ascontiguousarray(w))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def test_gguf_equals_safetensors(tiny_dir, tmp_path):
  write_gguf(tiny_dir, tmp_path / 'm.gguf')
  model, params = models.load(tmp_path / 'm.gguf')
  want_model, want = models.load(tiny_dir)
  helpers.assert_bitwise(params, want)
  assert model.config.rope_theta == want_model.config.rope_theta
  np.testing.assert_allclose(
      model.apply({'params': params}, IDS),
      want_model.apply({'params': want}, IDS), rtol=1e-5, atol=1e-5)


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
  for part in ('missing model.norm.weight', 'unexpected model.layers.9.extra',
               f'{name} has shape (32, 64), not (64, 32)'):
    assert part in str(e.value)


@pytest.mark.parametrize('name,error', [
    ('/no/such/dir', 'no model at'), ('nonsense', 'no model at'),
    ('someone/some-model', 'the hub did not give one')])
def test_no_such_model(name, error):
  with pytest.raises(FileNotFoundError, match=error):
    models.load(name)


def test_unusable_files(tiny_dir, tmp_path):
  with pytest.raises(FileNotFoundError, match='no config.json'):
    models.load(tmp_path)
  config = json.loads((tiny_dir / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(FileNotFoundError, match='no .safetensors file'):
    models.load(tmp_path)
  (tmp_path / 'model.safetensors').write_bytes(b'not a checkpoint')
  with pytest.raises(ValueError, match='not a readable safetensors file'):
    models.load(tmp_path)
  (tmp_path / 'm.gguf').write_bytes(b'not a checkpoint')
  with pytest.raises(ValueError, match='not a readable GGUF file'):
    models.load(tmp_path / 'm.gguf')
  for change, message in ((dict(model_type='rwkv'), "'rwkv' is not supported"),
                          (dict(hidden_act='gelu'), 'hidden_act'),
                          (dict(rope_scaling={'type': 'yarn'}), "'yarn'")):
    (tmp_path / 'config.json').write_text(json.dumps(config | change))
    (tmp_path / 'model.safetensors').write_bytes(
        (tiny_dir / 'model.safetensors').read_bytes())
    with pytest.raises(ValueError, match=message):
      models.load(tmp_path)


def test_too_long_a_sequence(tiny_dir):
  model, params = models.load(tiny_dir)
  with pytest.raises(ValueError, match='129 tokens exceed the 128 positions'):
    model.apply({'params': params}, np.zeros((1, 129), int))
