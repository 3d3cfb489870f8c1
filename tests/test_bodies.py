"""Files of base classes: a body without the head of its family."""

import dataclasses
import json
import shutil

import conftest
import families
import helpers
import jax
import numpy as np
import pytest
from runs import small_config
from safetensors.numpy import load_file, save_file

from mezo_jax import models, peft
from mezo_jax.models.formats import huggingface
from mezo_jax.tasks import Task
import train

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.torch

_POOLER = {'pooler.dense.weight', 'pooler.dense.bias'}
CASES = [  # (family, switch, whether the head is the embedding)
    ('llama', 'tied head', True), ('llama', 'untied head', False),
    ('mistral', 'window', False), ('qwen2', 'no window', False),
    ('qwen3', 'biases', False), ('gemma', 'as released', True),
    ('gemma', 'biases, untied', False), ('gemma2', 'as released', True),
    ('gemma3_text', 'as released', True), ('gpt2', 'as released', True),
    ('gpt2', 'untied head', False), ('opt', '350M', True),
    ('opt', 'untied head', False), ('bert', 'as released', False),
    ('bert', 'untied head', False), ('roberta', 'as released', False)]


def body_of(reference, directory):
  """The base class of a torch model, with a pooler if it has one, as files."""
  body = transformers.AutoModel.from_config(
      reference.config, attn_implementation='eager').eval()
  body.load_state_dict(reference.base_model.state_dict(), strict=False)
  body.save_pretrained(directory)
  return body


def same_tree(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  helpers.assert_bitwise(a, b)


@pytest.mark.parametrize('family,switch,tied', CASES)
def test_files_of_a_base_class(family, switch, tied, tmp_path):
  """They are the whole model's, less the head where that is no embedding; and
  so are those that are written, for us and for transformers."""
  reference = families.torch_model(family, switch)
  reference.save_pretrained(tmp_path / 'whole')
  body = body_of(reference, tmp_path / 'body')
  _, whole = models.load(tmp_path / 'whole', progress=False)
  model, params = models.load(tmp_path / 'body', progress=False)
  assert model.config.head == tied
  assert model.config == models.load_config(tmp_path / 'body')
  same_tree(params, {k: v for k, v in whole.items()
                     if tied or k not in ('head', 'lm_head')})
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
      lambda x: x.shape, models.param_shapes(model.config))

  models.save(tmp_path / 'out', model, params, progress=False)
  again, back = models.load(tmp_path / 'out', progress=False)
  assert again.config == model.config
  same_tree(params, back)
  theirs, report = transformers.AutoModel.from_pretrained(
      tmp_path / 'out', output_loading_info=True)
  assert set(report['missing_keys']) <= _POOLER  # which no model here uses
  assert not report['unexpected_keys']
  assert theirs.config.architectures == [type(body).__name__] == [
      huggingface.ARCHITECTURES[family][1]]
  for name, x in body.state_dict().items():
    if name not in _POOLER:
      assert torch.equal(x, theirs.state_dict()[name]), name


@pytest.mark.parametrize('family,switch', [
    ('bert', 'as released'), ('roberta', 'as released'),
    ('llama', 'untied head')])
def test_a_body_s_features(family, switch, tmp_path):
  """What transformers' base class gives; what needs the head says so."""
  body = body_of(families.torch_model(family, switch), tmp_path)
  model, params = models.load(tmp_path, progress=False)
  for mask in families.MASKS.values():
    want = families.torch_outputs(
        body, families.IDS, mask).last_hidden_state.numpy()[mask == 1]
    got = helpers.quick_jit(lambda p, mask=mask: model.apply(
        {'params': p}, families.IDS, mask, features='body'))(params)
    assert np.abs(got[mask == 1] - want).max() < 1e-5 * np.abs(want).max()
  needs = [dict(), dict(targets=families.IDS)]
  if not model.config.causal:
    needs.append(dict(features='head'))
  for kwargs in needs:
    with pytest.raises(ValueError, match="features='body'"):
      jax.eval_shape(lambda p, kwargs=kwargs: model.apply(
          {'params': p}, families.IDS, **kwargs), params)
  if model.config.causal:
    with pytest.raises(ValueError, match='head'):
      models.generate(model, params, families.IDS, max_new_tokens=2)
  with pytest.raises(ValueError, match='head'):
    peft.untie(model, params)


def test_whether_there_is_a_head_is_known_before_the_weights(tmp_path):
  """From one file, from an index, from older files, from config.json; where
  these differ the tensors are right."""
  directory = conftest.write_tiny_model(
      tmp_path / 'm', tie_word_embeddings=False)
  file, hf = directory / 'model.safetensors', directory / 'config.json'
  head = lambda: models.load_config(directory).head
  whole = load_file(file)
  assert head()
  tensors = {k.removeprefix('model.'): v for k, v in whole.items()
             if k != 'lm_head.weight'}
  save_file(tensors, file)
  assert not head()
  torch.save({k: torch.tensor(v) for k, v in tensors.items()},
             directory / 'pytorch_model.bin')
  file.unlink()
  assert not head()
  assert not models.load(directory, progress=False)[0].config.head
  (directory / 'pytorch_model.bin').unlink()
  assert head()  # nothing says otherwise
  about = json.loads(hf.read_text())
  hf.write_text(json.dumps(about | {'architectures': ['LlamaModel']}))
  assert not head()
  index = directory / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': dict.fromkeys(whole, file.name)}))
  assert head()
  with pytest.raises(FileNotFoundError, match='model.safetensors'):
    models.load(directory)
  save_file(whole, file)
  model, params = models.load(directory, progress=False)
  assert model.config.head and 'lm_head' in params
  models.save(tmp_path / 'out', model, params, progress=False)
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())[
      'architectures'] == ['LlamaForCausalLM']


def test_a_part_of_a_head_is_a_misfit(tmp_path):
  body = families.torch_model('bert', 'as released')
  body.save_pretrained(tmp_path)
  tensors = load_file(tmp_path / 'model.safetensors')
  del tensors['cls.predictions.transform.dense.weight']
  save_file(tensors, tmp_path / 'model.safetensors')
  with pytest.raises(ValueError, match='cls.predictions.transform'):
    models.load(tmp_path)


def test_the_base_class_of_a_gemma_with_vision(tmp_path):
  body_of(families.torch_model('gemma3_text', 'as released'), tmp_path)
  want = models.load(tmp_path, progress=False)[1]
  tensors = load_file(tmp_path / 'model.safetensors')
  save_file({f'language_model.{k}': v for k, v in tensors.items()} | {
      'vision_tower.x.weight': np.ones(3, np.float32)},
            tmp_path / 'model.safetensors')
  hf = json.loads((tmp_path / 'config.json').read_text())
  (tmp_path / 'config.json').write_text(json.dumps(dict(
      model_type='gemma3', text_config=hf, architectures=['Gemma3Model'])))
  same_tree(models.load(tmp_path, progress=False)[1], want)


def test_lora_of_a_body_is_one_for_peft(tmp_path):
  """Under the names that the base class has."""
  reference = pytest.importorskip('peft')
  body = body_of(families.torch_model('bert', 'as released'), tmp_path / 'm')
  model, params = models.load(tmp_path / 'm', progress=False)
  adapters = jax.tree.map(
      lambda x: x + 0.1, peft.lora.init(params, jax.random.key(0)))
  peft.save(tmp_path / 'lora', model, adapters)
  theirs = reference.PeftModel.from_pretrained(body, tmp_path / 'lora')
  want = families.torch_outputs(
      theirs, families.IDS, families.MASKS['right']).last_hidden_state.numpy()
  got = helpers.quick_jit(lambda p: model.apply(
      {'params': p}, families.IDS, families.MASKS['right'], features='body'))(
          peft.join(params, adapters))
  at = families.MASKS['right'] == 1
  np.testing.assert_allclose(np.asarray(got)[at], want[at], atol=3e-5)
  same_tree(peft.load(tmp_path / 'lora', model)[1], adapters)


@pytest.fixture(scope='module')
def encoder(tiny_dir, tmp_path_factory):
  """A sentence encoder's directory, with a tokenizer."""
  directory = tmp_path_factory.mktemp('encoder')
  body_of(families.torch_model('bert', 'as released', 0.05), directory)
  for file in tiny_dir.glob('tokenizer*'):
    shutil.copy(file, directory)
  return directory


@pytest.mark.exhaustive
def test_a_new_head_on_an_encoder(encoder, reviews_file, tmp_path):
  config = small_config(
      encoder, reviews_file, steps=2, eval_every=2, zero_shot=False,
      spsa__distribution='rademacher', peft__mask='mlp/down')
  config.task = Task(kind='head', template='{text}',
                     label_names=('bad', 'good'))
  result = train.run(config, tmp_path)
  assert result['steps'] == 2 and 0 <= result['final']['accuracy'] <= 1
  assert result['trained'] == 4 * 65 * 32 + 33 * 32 + 33 * 2


@pytest.mark.parametrize('template', ['{text} It was', '{text} It was{mask}.'])
def test_label_words_need_the_head(encoder, reviews_file, tmp_path, template):
  config = small_config(encoder, reviews_file, task__template=template)
  with pytest.raises(ValueError, match="base class.*kind 'classification' need"
                     ".*--config.task.kind=head"):
    train.run(config, tmp_path)


def test_a_body_is_a_config_of_its_own():
  hf = dict(model_type='bert', vocab_size=32, hidden_size=16,
            num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
  whole = models.read_config(hf)
  body = models.read_config(hf | dict(architectures=['BertModel']))
  assert body == dataclasses.replace(whole, head=False)
  model, ids = models.Transformer(body), np.zeros((1, 4), int)
  params = jax.eval_shape(lambda key: model.init(
      key, ids, features='body')['params'], jax.random.key(0))
  assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(
      lambda x: x.shape, models.param_shapes(body))
