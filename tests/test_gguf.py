"""GGUF files in parts, of other kinds, and what they know of their tokenizer.
"""

import json

import gguf
import numpy as np
import pytest

from mezo_jax import models

MATRICES = {
    'attn_q': (32, 32), 'attn_k': (32, 32), 'attn_v': (32, 32),
    'attn_output': (32, 32), 'ffn_gate': (64, 32), 'ffn_up': (64, 32),
    'ffn_down': (32, 64)}
NORMS = ('attn_norm', 'ffn_norm')
WORDS = ['<s>', '</s>', '<pad>', '<unk>', '<turn>', '<mask>', '<tool>', '<x>',
         'a', 'b', '\u0120', 'ab', '1']
T = gguf.TokenType
TYPES = [T.CONTROL, T.CONTROL, T.CONTROL, T.UNKNOWN, T.CONTROL, T.CONTROL,
         T.USER_DEFINED, T.USER_DEFINED] + [T.NORMAL] * 5


def tensors_of_a_model():
  rng = np.random.RandomState(0)
  return {
      'token_embd.weight': rng.randn(40, 32), 'output_norm.weight': np.ones(32),
      **{f'blk.0.{name}.weight': rng.randn(*shape)
         for name, shape in MATRICES.items()},
      **{f'blk.0.{name}.weight': np.ones(32) for name in NORMS}}


def write(path, tensors, *, about=lambda writer: None, whole=True,
          arch='llama'):
  """A GGUF file of a Llama with these tensors, and with what ``about`` adds."""
  writer = gguf.GGUFWriter(path, arch)
  if whole:
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-6)
  about(writer)
  for name, x in tensors.items():
    writer.add_tensor(name, x.astype(np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_parts(path, count=3):
  """The parts of a model, as llama-gguf-split writes them."""
  items = [*tensors_of_a_model().items()]
  files = []
  for i in range(count):
    def about(writer, i=i):
      writer.add_uint16('split.no', i)
      writer.add_uint16('split.count', count)
      writer.add_int32('split.tensors.count', len(items))
    files.append(write(
        path / f'm-{i + 1:05d}-of-{count:05d}.gguf', dict(items[i::count]),
        about=about, whole=i == 0))
  return files


def weights(path):
  params = models.load(path, progress=False)[1]
  return [np.asarray(x).tobytes() for x in (
      params['embed']['embedding'],
      params['layers']['mlp']['down']['kernel'],
      params['layers']['attn']['q']['kernel'])]


# --- parts ------------------------------------------------------------------


def test_any_part_stands_for_all(tmp_path):
  want = weights(write(tmp_path / 'whole.gguf', tensors_of_a_model()))
  parts = write_parts(tmp_path)
  for part in parts:
    assert weights(part) == want
  assert models.load_config(parts[1]).num_layers == 1
  alone = write(tmp_path / 'n-00001-of-00002.gguf', tensors_of_a_model())
  assert weights(alone) == want  # a whole file with the name of a part


def test_parts_that_are_not_a_model(tmp_path):
  parts = write_parts(tmp_path)
  renamed = tmp_path / 'renamed.gguf'
  renamed.write_bytes(parts[0].read_bytes())
  with pytest.raises(ValueError, match='renamed.gguf .* 3 '):
    models.load(renamed, progress=False)
  swapped = parts[2].read_bytes()
  parts[2].write_bytes(parts[1].read_bytes())
  with pytest.raises(ValueError, match='m-00003-of-00003.gguf'):
    models.load(parts[0], progress=False)
  parts[2].write_bytes(swapped)
  for gone in (parts[2], parts[0]):
    kept = gone.read_bytes()
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f'm-00002.*{gone.name}'):
      models.load(parts[1], progress=False)
    gone.write_bytes(kept)
  weights(parts[1])  # all are back


@pytest.mark.parametrize('kind,message', [
    ('adapter', 'LoRA'), ('mmproj', 'vision'),
    ('imatrix', 'importance'), ('vocabulary', 'vocabulary'),
    ('layers', 'token_embd.weight'), ('clip', "'clip'")])
def test_a_file_of_another_kind(kind, message, tmp_path):
  tensors = tensors_of_a_model()
  tensors = {} if kind == 'vocabulary' else {
      k: v for k, v in tensors.items() if k != 'token_embd.weight'}
  about = (lambda writer: writer.add_type(kind)) if (
      kind in ('adapter', 'mmproj', 'imatrix')) else lambda writer: None
  file = write(tmp_path / 'm.gguf', tensors, about=about,
               arch='clip' if kind == 'clip' else 'llama')
  with pytest.raises(ValueError, match=message):
    models.load(file, progress=False)


# --- tokenizers -------------------------------------------------------------


def write_tokenizer(path, **fields):
  def about(writer):
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('smollm')
    writer.add_token_list(WORDS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(['a b'])
    for name, value in fields.items():
      getattr(writer, f'add_{name}')(value)
  return write(path, tensors_of_a_model(), about=about)


def test_what_the_file_knows_of_its_tokenizer(tmp_path):
  file = write_tokenizer(
      tmp_path / 'm.gguf', bos_token_id=0, eos_token_id=1, eot_token_id=4,
      pad_token_id=2, unk_token_id=3, mask_token_id=5, add_bos_token=True,
      add_eos_token=True, chat_template=[
          {'name': 'default', 'template': 'hello'},
          {'name': 'tool_use', 'template': '{{ messages[0].content }}'}])
  first = models.load_tokenizer(file)
  model, params = models.load(file, progress=False)
  models.save(tmp_path / 'out', model, params, tokenizer=first, progress=False)
  for t in (first, models.load_tokenizer(tmp_path / 'out')):  # as exported too
    assert t('ab')['input_ids'] == [0, 11, 1]
    assert t('a', 'b')['input_ids'] == [0, 8, 1, 0, 9, 1]
    assert t('<tool>a<s>', add_special_tokens=False)['input_ids'] == [6, 8, 0]
    assert t.decode([0, 6, 8, 4, 3], skip_special_tokens=True) == '<tool>a'
    assert [t.bos_token_id, t.eos_token_id, t.pad_token_id, t.unk_token_id,
            t.mask_token_id] == [0, 1, 2, 3, 5]
    chat = [{'role': 'user', 'content': 'ab'}]
    assert t.apply_chat_template(chat, tokenize=False) == 'hello'
    assert t.apply_chat_template(
        chat, chat_template='tool_use', tokenize=False) == 'ab'
  about = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert about['eos_token_id'] == [1, 4] and about['pad_token_id'] == 2


def test_a_file_that_knows_little(tmp_path):
  t = models.load_tokenizer(write_tokenizer(
      tmp_path / 'm.gguf', eos_token_id=1, chat_template='hi'))
  assert t('ab')['input_ids'] == [11] and t.chat_template == 'hi'
  assert t.bos_token is None and t.pad_token == '</s>'
  t = models.load_tokenizer(write_tokenizer(tmp_path / 'n.gguf'))
  assert t('b')['input_ids'] == [9] and t.chat_template is None
  with pytest.raises(ValueError, match='add_space_prefix'):
    models.load_tokenizer(write_tokenizer(
        tmp_path / 'o.gguf', add_space_prefix=True))
  with pytest.raises(ValueError, match='p.gguf'):
    models.load_tokenizer(write_tokenizer(
        tmp_path / 'p.gguf', add_bos_token=True))  # and no such token
