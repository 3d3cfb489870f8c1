"""Reading and writing model files: memory, shards, formats, tokenizers, errors.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import conftest
import helpers
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mezo_jax
from mezo_jax import models

_LIMITED = '''
import os, resource, sys
import jax.numpy as jnp
import numpy as np
from mezo_jax import models
small, large, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
models.load(small, dtype='bfloat16', progress=False)
jnp.ones((8, 8)).sum().block_until_ready()  # starts XLA's threads
status = open('/proc/self/status').read().split('VmData:')[1]
now = 1024 * int(status.split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (now + limit, now + limit))
try:
  np.ones(os.path.getsize(large + '/model.safetensors'), np.uint8)
  print('the whole file fits')
except MemoryError:
  print('the whole file does not fit')
_, params = models.load(large, dtype='bfloat16', progress=False)
up = np.asarray(params['layers']['mlp']['up']['kernel'])
print('loaded', int(up[-1].astype(np.float32).sum()))
'''


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != 'linux', reason='limits memory as Linux')
def test_loading_holds_the_result_and_one_parameter(tiny_dir, tmp_path):
  """A file of 218 MB as 109 MB of bfloat16 in 109 + 25 (one leaf) + 20 MB."""
  hf = conftest.TINY | dict(
      vocab_size=8192, hidden_size=512, intermediate_size=2048,
      num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8,
      head_dim=64)
  (tmp_path / 'config.json').write_text(json.dumps(hf))
  rows = models.FAMILIES['llama'].table(models.read_config(hf))
  save_file({row.name.format(l=l): np.ones(row.source_shape(), np.float32)
             for row in rows for l in range(12 if row.stacked else 1)},
            tmp_path / 'model.safetensors')
  size = (tmp_path / 'model.safetensors').stat().st_size
  limit = size // 2 + 45 * 10**6
  assert limit < 0.75 * size
  done = subprocess.run(
      [sys.executable, '-c', _LIMITED, tiny_dir, tmp_path, str(limit)],
      capture_output=True, text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.split('\n')[:2] == [
      'the whole file does not fit', f'loaded {512 * 2048}']


@pytest.mark.slow_except(family=['gpt2'], fsdp=[2])
@pytest.mark.exhaustive_except(family=['gpt2'])
@pytest.mark.parametrize('family', ['gpt2', 'roberta', 'gemma2'])
@pytest.mark.parametrize('fsdp,tensor', [(8, 1), (2, 4)])
def test_sharded_loading_and_saving(family, fsdp, tensor, tmp_path):
  """Each device holds its slice and no leaf whole; the same bits and logits;
  and written from the shards the same file."""
  hf = dict(
      model_type=family, vocab_size=1024, hidden_size=256, n_embd=256, n_head=8,
      n_layer=2, intermediate_size=1024, num_hidden_layers=2,
      num_attention_heads=8, num_key_value_heads=4, head_dim=32,
      sliding_window=4, pad_token_id=1, max_position_embeddings=258)
  config = models.read_config(hf)
  model, ids = models.Transformer(config), np.arange(24).reshape(2, 12)
  params = helpers.quick_jit(model.init)(jax.random.key(0), ids)['params']
  models.save(tmp_path / 'a', model, params, progress=False)
  mesh = jax.make_mesh((1, fsdp, tensor), ('data', 'fsdp', 'tensor'),
                       axis_types=(jax.sharding.AxisType.Auto,) * 3)
  _, sharded = models.load(tmp_path / 'a', mesh, progress=False)
  helpers.assert_bitwise(jax.device_get(params), jax.device_get(sharded))
  for path, x in jax.tree_util.tree_flatten_with_path(sharded)[0]:
    if x.size // (2 if 'layers' in str(path) else 1) >= 2**16:
      by_width = 'positions' in str(path) or 'dense' in str(path)
      for shard in x.addressable_shards:
        assert shard.data.size == x.size // (fsdp if by_width else 8), path
  apply = helpers.quick_jit(model.apply)
  np.testing.assert_allclose(
      apply({'params': sharded}, ids), apply({'params': params}, ids),
      rtol=1e-4, atol=1e-5)
  models.save(tmp_path / 'b', model, sharded, progress=False)
  name = 'model.safetensors'
  assert (tmp_path / 'a' / name).read_bytes() == (
      tmp_path / 'b' / name).read_bytes()


# --- writing ----------------------------------------------------------------


def test_several_files_and_an_index(tiny_dir, tmp_path):
  model, params = models.load(tiny_dir, dtype='bfloat16', progress=False)
  models.save(tmp_path / 'm', model, params, max_shard_bytes=20_000,
              tokenizer=models.load_tokenizer(tiny_dir), card='# A card\n')
  index = json.loads(
      (tmp_path / 'm' / 'model.safetensors.index.json').read_text())
  files = sorted(set(index['weight_map'].values()))
  assert len(files) > 2 and files[0] == f'model-00001-of-{len(files):05d}' \
      '.safetensors'
  assert index['metadata']['total_size'] == sum(
      2 * x.size for x in jax.tree.leaves(params))
  again, back = models.load(tmp_path / 'm', progress=False)
  helpers.assert_bitwise(params, back)
  assert again.config == model.config
  assert json.loads(again.config.source)['dtype'] == 'bfloat16'
  assert (tmp_path / 'm' / 'README.md').read_text() == '# A card\n'
  assert models.load_tokenizer(tmp_path / 'm')('a film')['input_ids'] == (
      models.load_tokenizer(tiny_dir)('a film')['input_ids'])


def test_what_cannot_be_saved(tiny_dir, tmp_path):
  model, params = models.load(tiny_dir, progress=False)
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'notes').write_text('mine')
  with pytest.raises(FileExistsError, match='full .*empty'):
    models.save(tmp_path / 'full', model, params)
  wrong = params | {'norm': {'scale': np.ones(3)}, 'more': np.ones(2)}
  del wrong['embed']
  with pytest.raises(ValueError) as e:
    models.save(tmp_path / 'm', model, wrong)
  for part in ('embed/embedding is missing',
               'more is (2,)', 'norm/scale is (3,)'):
    assert part in str(e.value)
  with pytest.raises(ValueError, match='config.json'):
    models.save(tmp_path / 'm', models.Transformer(helpers.tiny_config()), {})
  assert not (tmp_path / 'm').exists()


# --- the hub ----------------------------------------------------------------


@pytest.mark.processes
def test_a_hub_id_and_its_revisions(tiny_dir, tmp_path):
  """From the cache that HF_HOME names, offline: main, and a tag."""
  cache = tmp_path / 'hub' / 'models--someone--tiny'
  for revision, commit, layers in (('main', '1' * 40, 3), ('v2', '2' * 40, 2)):
    snapshot = conftest.write_tiny_model(
        cache / 'snapshots' / commit, num_hidden_layers=layers)
    (cache / 'refs').mkdir(exist_ok=True)
    (cache / 'refs' / revision).write_text(commit)
  code = """from mezo_jax import models
for revision in (None, 'v2', 'v3'):
  try:
    model, _ = models.load('someone/tiny', revision=revision, progress=False)
    tokenizer = models.load_tokenizer('someone/tiny', revision)
    print(model.config.num_layers, tokenizer('a film')['input_ids'])
  except FileNotFoundError as e:
    print(e)"""
  done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'HF_HUB_OFFLINE': '1',
                        'HF_HOME': str(tmp_path)})
  main, v2, v3 = done.stdout.strip().split('\n')
  ids = models.load_tokenizer(snapshot)('a film')['input_ids']
  assert (main, v2) == (f'3 {ids}', f'2 {ids}'), done.stderr
  assert "'someone/tiny'" in v3 and 'hub' in v3


# --- formats ----------------------------------------------------------------


def quantised(kind, shape, rng):
  """Raw bytes of a GGUF tensor of random blocks, and the weights they stand
  for, by the layouts of llama.cpp's ggml-common.h."""
  rows, cols = shape
  half = lambda x: np.asarray(x, np.float16)
  scale = lambda n: half(rng.uniform(0.01, 0.1, n))
  size = 256 if kind.endswith('K') else 32
  n = rows * cols // size
  wide = lambda x: x.astype(np.float32)[:, None]
  if kind == 'Q8_0':
    d, q = scale(n), rng.randint(-127, 128, (n, 32)).astype(np.int8)
    raw, w = [d, q], wide(d) * q
  elif kind in ('Q4_0', 'Q4_1'):
    d, m = scale(n), scale(n)
    q = rng.randint(0, 16, (n, 32)).astype(np.uint8)
    packed = q[:, :16] | q[:, 16:] << 4
    if kind == 'Q4_0':
      raw, w = [d, packed], wide(d) * (q.astype(np.float32) - 8)
    else:
      raw, w = [d, m, packed], wide(d) * q + wide(m)
  elif kind == 'Q4_K':
    d, m = scale(n), scale(n)
    sc, mn = (rng.randint(0, 64, (n, 8)).astype(np.uint8) for _ in 'sm')
    q = rng.randint(0, 16, (n, 8, 32)).astype(np.uint8)
    scales = np.concatenate([
        sc[:, :4] | (sc[:, 4:] >> 4) << 6, mn[:, :4] | (mn[:, 4:] >> 4) << 6,
        (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4], 1)
    raw = [d, m, scales, q[:, 0::2] | q[:, 1::2] << 4]
    w = (wide(d) * sc)[..., None] * q - (wide(m) * mn)[..., None]
  else:  # Q6_K: two halves of four groups of 32
    d, sc = scale(n), rng.randint(-64, 64, (n, 16)).astype(np.int8)
    q = rng.randint(0, 64, (n, 2, 4, 32)).astype(np.uint8)
    low = np.concatenate([(q[:, :, g] & 15) | (q[:, :, g + 2] & 15) << 4
                          for g in (0, 1)], -1)
    high = sum((q[:, :, g] >> 4) << 2 * g for g in range(4))
    raw = [low, high, sc, d]
    w = ((wide(d) * sc)[..., None]
         * (q.reshape(n, 16, 16).astype(np.float32) - 32))
  data = np.concatenate(
      [np.ascontiguousarray(x).view(np.uint8).reshape(n, -1) for x in raw], 1)
  return data.reshape(rows, -1), w.reshape(rows, cols).astype(np.float32)


@pytest.mark.slow_except(kind=['Q8_0', 'Q4_K'], family=['llama'])
@pytest.mark.parametrize('kind', [
    'F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q6_K'])
@pytest.mark.parametrize('family', ['llama', 'qwen3'])
def test_gguf_formats(family, kind, tmp_path):
  """A file with the matrices in each format is the model of its weights."""
  import gguf
  rng = np.random.RandomState(0)
  hf = dict(model_type=family, vocab_size=32, hidden_size=256,
            intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=64, rms_norm_eps=1e-5,
            max_position_embeddings=64, tie_word_embeddings=True)
  config = models.read_config(hf)
  writer = gguf.GGUFWriter(tmp_path / 'm.gguf', family)
  writer.add_block_count(1)
  writer.add_embedding_length(256)
  writer.add_feed_forward_length(256)
  writer.add_context_length(64)
  writer.add_head_count(4)
  writer.add_head_count_kv(2)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_key_length(64)
  names = {'embed_tokens': 'token_embd', 'model.norm': 'output_norm',
           'input_layernorm': 'attn_norm', 'q_norm': 'attn_q_norm',
           'post_attention_layernorm': 'ffn_norm', 'k_norm': 'attn_k_norm',
           'o_proj': 'attn_output', 'q_proj': 'attn_q', 'k_proj': 'attn_k',
           'v_proj': 'attn_v', 'up_proj': 'ffn_up', 'gate_proj': 'ffn_gate',
           'down_proj': 'ffn_down'}
  tensors = {}
  for row in models.FAMILIES[family].table(config):
    name, shape = row.name.format(l=0), row.source_shape()
    target = next(v for k, v in names.items() if f'{k}.' in name)
    target = ('blk.0.' if row.stacked else '') + target + '.weight'
    if len(shape) == 1 or kind == 'F32':
      w = data = rng.randn(*shape).astype(np.float32)
      type_ = gguf.GGMLQuantizationType.F32
    elif kind in ('F16', 'BF16'):
      type_ = gguf.GGMLQuantizationType[kind]
      data = rng.randn(*shape).astype(
          np.float16 if kind == 'F16' else ml_dtypes.bfloat16)
      w, data = data.astype(np.float32), data.view(
          np.float16 if kind == 'F16' else np.uint8)
    else:
      data, w = quantised(kind, shape, rng)
      type_ = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(target, data, raw_dtype=type_)
    heads = {'q_proj': 4, 'k_proj': 2}.get(name.split('.')[-2])
    if family == 'llama' and heads:  # rows (head, pair, half) in the file
      w = w.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(w.shape)
    tensors[name] = w
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  save_file(tensors, tmp_path / 'model.safetensors')
  (tmp_path / 'config.json').write_text(json.dumps(hf))
  model, params = models.load(tmp_path / 'm.gguf', progress=False)
  want_model, want = models.load(tmp_path, progress=False)
  assert model.config == want_model.config
  for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-7)
  if kind in ('Q8_0', 'Q4_0', 'Q4_1'):  # of which the codes themselves are kept
    _, codes = models.load(tmp_path / 'm.gguf', dtype='codes', progress=False)
    helpers.assert_bitwise(mezo_jax.dequantize(codes), params)
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sum(x.nbytes for x in jax.tree.leaves(codes)) < 0.28 * whole
  if kind == 'F32':  # another file of that name is another model
    (tmp_path / 'other').write_bytes(b'not a model')
    (tmp_path / 'other').rename(tmp_path / 'm.gguf')
    with pytest.raises(ValueError, match='m.gguf'):
      models.load(tmp_path / 'm.gguf', progress=False)


class _Evil:

  def __reduce__(self):
    return os.system, ('touch evil',)


def test_a_bin_file_cannot_run_code(tiny_dir, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with zipfile.ZipFile('pytorch_model.bin', 'w') as archive:
    archive.writestr('m/data.pkl', pickle.dumps({'w': _Evil()}))
  (tmp_path / 'config.json').write_bytes(
      (tiny_dir / 'config.json').read_bytes())
  with pytest.raises(ValueError, match='pytorch_model.bin .*system'):
    models.load(tmp_path)
  assert not (tmp_path / 'evil').exists()
  (tmp_path / 'pytorch_model.bin').write_bytes(b'not a zip')
  with pytest.raises(ValueError, match='pytorch_model.bin'):
    models.load(tmp_path)


def test_all_misfits_at_once_twice_there_too(tiny_dir, tmp_path):
  (tmp_path / 'config.json').write_bytes(
      (tiny_dir / 'config.json').read_bytes())
  tensors = load_file(tiny_dir / 'model.safetensors')
  tensors.pop('model.norm.weight')
  save_file(tensors, tmp_path / 'a.safetensors')
  save_file({'model.embed_tokens.weight': tensors['model.embed_tokens.weight']},
            tmp_path / 'b.safetensors')
  with pytest.raises(ValueError) as e:
    models.load(tmp_path)
  for part in ('model.embed_tokens.weight',
               'model.norm.weight'):
    assert part in str(e.value)
  (tmp_path / 'config.json').write_text('{"model_type": ')
  with pytest.raises(ValueError, match='config.json'):
    models.load(tmp_path)


@pytest.mark.parametrize('text', ['{"weight_map"', '{}', '[]',
                                  '{"weight_map": null}'])
def test_an_index_that_is_none(tiny_dir, tmp_path, text):
  shutil.copy(tiny_dir / 'config.json', tmp_path)
  (tmp_path / 'model.safetensors.index.json').write_text(text)
  with pytest.raises(ValueError, match='index.json .*weight_map'):
    models.load(tmp_path)


@pytest.mark.slow
def test_names_of_early_checkpoints(tmp_path):
  """GPT-2's without a prefix, BERT's gamma and beta, a decoder left out."""
  for family, rename in (
      ('gpt2', lambda n: n.replace('transformer.', '')),
      ('bert', lambda n: n.replace('LayerNorm.weight', 'LayerNorm.gamma')
       .replace('LayerNorm.bias', 'LayerNorm.beta'))):
    hf = dict(model_type=family, vocab_size=32, n_embd=16, n_head=2, n_layer=1,
              hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
              intermediate_size=32)
    model = models.Transformer(models.read_config(hf))
    params = helpers.quick_jit(model.init)(
        jax.random.key(0), np.zeros((1, 4), int))['params']
    old = tmp_path / family
    models.save(old, model, params, progress=False)
    tensors = {rename(k): v for k, v in load_file(
        old / 'model.safetensors').items() if not k.endswith('decoder.weight')}
    tensors |= {'h.0.attn.bias': np.ones((1, 1, 4, 4))} if (
        family == 'gpt2') else {'bert.pooler.dense.weight': np.ones((16, 16))}
    save_file(tensors, old / 'model.safetensors')
    _, back = models.load(old, progress=False)
    helpers.assert_bitwise(params, back)


# --- tokenizers -------------------------------------------------------------


def test_the_first_token_as_the_caller_says(tmp_path):
  """OPT's files: its tokenizer puts </s> first, the paper's code <s>."""
  tokens = ['<s>', '<pad>', '</s>', '<unk>', 'a', 'b', '\u0120b', '\u0120']
  (tmp_path / 'vocab.json').write_text(json.dumps(
      {t: i for i, t in enumerate(tokens)}))
  (tmp_path / 'merges.txt').write_text('#version: 0.2\n\u0120 b\n')
  (tmp_path / 'config.json').write_text(json.dumps(dict(
      model_type='opt', bos_token_id=2, eos_token_id=2, pad_token_id=1)))
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(dict(
      tokenizer_class='GPT2Tokenizer', add_bos_token=True, bos_token='</s>',
      eos_token='</s>', unk_token='</s>', pad_token='<pad>')))
  ids = lambda **kwargs: models.load_tokenizer(
      tmp_path, **kwargs)('a b')['input_ids']
  assert ids() == [2, 4, 6]
  assert ids(bos_token='<s>') == [0, 4, 6]
  with pytest.raises(ValueError, match="'<x>'"):
    ids(bos_token='<x>')
