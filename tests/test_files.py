"""Which files a model is read from, under which names, and where it is saved.
"""

import json
from pathlib import Path
import shutil

import conftest
import families
import helpers
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mezo_jax import models, peft
from mezo_jax.models.formats import huggingface

ONE, MANY = 'model.safetensors', 'model.safetensors.index.json'
BIN, MANY_BIN = 'pytorch_model.bin', 'pytorch_model.bin.index.json'


def embedding(directory) -> np.ndarray:
  return np.asarray(
      models.load(directory, progress=False)[1]['embed']['embedding'])


def write_kind(kind: str, directory: Path, seed: int) -> np.ndarray:
  """Writes a model's weights as one of the four kinds; its embedding."""
  source = conftest.write_tiny_model(
      directory / f'source_{seed}', seed) / ONE
  shutil.copy(source.parent / 'config.json', directory)
  tensors = load_file(source)
  if kind == ONE:
    shutil.copy(source, directory)
  elif kind == MANY:
    file = 'model-00001-of-00001.safetensors'
    shutil.copy(source, directory / file)
  else:
    torch = pytest.importorskip('torch')
    file = BIN if kind == BIN else 'pytorch_model-00001-of-00001.bin'
    torch.save({k: torch.tensor(v) for k, v in tensors.items()},
               directory / file)
  if kind in (MANY, MANY_BIN):
    (directory / kind).write_text(json.dumps(
        {'metadata': {}, 'weight_map': dict.fromkeys(tensors, file)}))
  return tensors['model.embed_tokens.weight']


# --- which files ------------------------------------------------------------


@pytest.mark.parametrize('first,second', [
    (ONE, MANY), (ONE, BIN), (MANY, BIN), (MANY, MANY_BIN), (BIN, MANY_BIN)])
def test_the_first_kind_that_transformers_takes(first, second, tmp_path):
  """Whatever an earlier save left there, with or without its shards."""
  write_kind(second, tmp_path, seed=1)
  want = write_kind(first, tmp_path, seed=2)
  np.testing.assert_array_equal(embedding(tmp_path), want)
  for file in tmp_path.glob('*-of-*'):
    if first != MANY or file.suffix == '.bin':
      file.unlink()
  np.testing.assert_array_equal(embedding(tmp_path), want)


def test_a_file_that_is_no_models_comes_after_those_that_are(tmp_path):
  want = write_kind(BIN, tmp_path, seed=1)
  save_file({'x': np.ones(3)}, tmp_path / 'adapter_model.safetensors')
  np.testing.assert_array_equal(embedding(tmp_path), want)


def test_shards_that_an_index_does_not_name_are_not_read(tmp_path):
  want = write_kind(MANY, tmp_path, seed=1)
  save_file({'x': np.ones(3)}, tmp_path / 'model-00002-of-00002.safetensors')
  np.testing.assert_array_equal(embedding(tmp_path), want)
  (tmp_path / 'model-00001-of-00001.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='model-00001-of-00001'):
    models.load(tmp_path, progress=False)


def test_a_file_that_the_config_names(tmp_path):
  """``transformers_weights`` comes first, and does not stay when saved."""
  write_kind(ONE, tmp_path, seed=1)
  other = conftest.write_tiny_model(tmp_path / 'other', 2) / ONE
  want = load_file(other)['model.embed_tokens.weight']
  shutil.copy(other, tmp_path / 'mine.safetensors')
  config = json.loads((tmp_path / 'config.json').read_text())
  def name(file):
    (tmp_path / 'config.json').write_text(json.dumps(
        config | {'transformers_weights': file}))
  name('mine.safetensors')
  np.testing.assert_array_equal(embedding(tmp_path), want)
  models.save(tmp_path / 'out', *models.load(tmp_path, progress=False),
              progress=False)
  np.testing.assert_array_equal(embedding(tmp_path / 'out'), want)
  for wrong in ('../other/model.safetensors', 'weights.bin', 5):
    name(wrong)
    with pytest.raises(ValueError, match='transformers_weights'):
      models.load(tmp_path, progress=False)
  name('lost.safetensors')
  with pytest.raises(FileNotFoundError, match='lost.safetensors'):
    models.load(tmp_path, progress=False)


# --- under which names ------------------------------------------------------


@pytest.mark.parametrize('family', families.FAMILIES)
def test_a_tied_matrix_under_the_name_of_the_head(family, tmp_path):
  """Alone or under both names, and with the body's prefix or without."""
  make, settings, _ = families.FAMILIES[family]
  layers = 'n_layer' if family == 'gpt2' else 'num_hidden_layers'
  config = models.read_config(make(**(settings | {
      layers: 1, 'tie_word_embeddings': True, 'layer_types': None})).to_dict())
  model, rng = models.Transformer(config), np.random.RandomState(0)
  params = jax.tree.map(
      lambda x: rng.randn(*x.shape).astype(np.float32),
      models.param_shapes(config))
  models.save(tmp_path, model, params, progress=False)
  tensors = load_file(tmp_path / ONE)
  body = huggingface.table_of(config)[0].name
  prefix, head = body.split('.')[0] + '.', {
      'bert': 'cls.predictions.decoder.weight',
      'roberta': 'lm_head.decoder.weight'}.get(family, 'lm_head.weight')
  both = tensors | {head: tensors[body]}
  alone = {k: v for k, v in both.items() if k != body}
  for changed in (both, alone, {
      k.removeprefix(prefix): v for k, v in alone.items()}):
    save_file(changed, tmp_path / ONE)
    again, back = models.load(tmp_path, progress=False)
    helpers.assert_bitwise(back, params)
    assert again.config.head
  alone.pop(head)
  save_file(alone, tmp_path / ONE)
  with pytest.raises(ValueError, match=body):
    models.load(tmp_path, progress=False)


@pytest.mark.parametrize('family,task', [
    ('bert', 'SequenceClassification'), ('bert', 'TokenClassification'),
    ('bert', 'NextSentencePrediction'), ('roberta', 'SequenceClassification'),
    ('roberta', 'QuestionAnswering'), ('roberta', 'MultipleChoice'),
    ('llama', 'SequenceClassification'), ('llama', 'QuestionAnswering'),
    ('qwen2', 'TokenClassification'), ('gemma2', 'SequenceClassification'),
    ('gpt2', 'SequenceClassification'), ('gpt2', 'TokenClassification'),
    ('opt', 'SequenceClassification'), ('opt', 'QuestionAnswering')])
def test_the_body_of_a_classifier(family, task, tmp_path):
  """Its own head is left out, whatever else is too much is named."""
  torch = pytest.importorskip('torch')
  import transformers
  make, settings, _ = families.FAMILIES[family]
  layers = 'n_layer' if family == 'gpt2' else 'num_hidden_layers'
  torch.manual_seed(0)
  classifier = getattr(transformers, f'AutoModelFor{task}').from_config(
      make(**(settings | {layers: 2, 'num_labels': 3})))
  classifier.save_pretrained(tmp_path / 'm')
  classifier.base_model.save_pretrained(tmp_path / 'body')
  model, params = models.load(tmp_path / 'm', progress=False)
  assert not model.config.head
  assert models.load_config(tmp_path / 'm') == model.config
  helpers.assert_bitwise(
      params, models.load(tmp_path / 'body', progress=False)[1])
  tensors = load_file(tmp_path / 'm' / ONE)
  (tmp_path / 'm' / ONE).unlink()
  assert not models.load_config(tmp_path / 'm').head  # its config says so
  for extra in ('layers.9.mlp.weight', 'classifier.original_module.weight',
                'score.modules_to_save.default.weight',
                'base_model.model.score.weight'):
    save_file(tensors | {extra: np.ones(2, np.float32)}, tmp_path / 'm' / ONE)
    with pytest.raises(ValueError, match=extra):
      models.load(tmp_path / 'm', progress=False)


# --- where to ---------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
  config = models.read_config(conftest.TINY | dict(num_hidden_layers=1))
  params = jax.tree.map(lambda x: np.ones(x.shape, np.float32),
                        models.param_shapes(config))
  return models.Transformer(config), params


@pytest.mark.parametrize('name,lands', [
    ('.', 'new'), ('./', 'new'), ('a/', 'new/a'), ('.././new/b', 'new/b'),
    ('../new', 'new'), ('~', 'home'), ('~/x', 'home/x'), ('link', 'far'),
    ('dangling', 'further'), ('link/below', 'far/below')])
def test_saved_where_the_name_says(small, name, lands, tmp_path, monkeypatch):
  """An empty directory that is there stays the directory that it is."""
  for directory in ('new', 'home', 'far'):
    (tmp_path / directory).mkdir()
  monkeypatch.chdir(tmp_path / 'new')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  if 'link' in name:
    Path('link').symlink_to('../far')
  if name == 'dangling':
    Path('dangling').symlink_to('../further')
  there = Path(name).expanduser()
  before = there.stat().st_ino if there.is_dir() else None
  assert (models.save(name, *small, progress=False)
          / 'config.json').is_file()
  out = tmp_path / lands
  assert {x.name for x in out.iterdir()} == {'config.json', ONE}
  assert before in (None, out.stat().st_ino) and Path.cwd().is_dir()
  assert embedding(out).shape == (300, 32)
  assert not list(tmp_path.rglob('*.part'))
  if name == '.':
    with pytest.raises(FileExistsError, match='empty'):
      models.save(name, *small, progress=False)
    with pytest.raises(FileExistsError, match=r'\.\. .*empty'):
      models.save('..', *small, progress=False)


def test_adapters_are_saved_there_too(small, tmp_path, monkeypatch):
  model, params = small
  params = peft.join(params, peft.lora.init(params, jax.random.key(0), rank=2))
  monkeypatch.chdir(tmp_path)
  peft.save('.', model, params)
  assert peft.load('.', model)[2] == 'lora'


def test_what_is_in_the_way_is_kept(small, tmp_path):
  file = tmp_path / 'file'
  file.write_text('mine')
  with pytest.raises(FileExistsError, match='file is a file'):
    models.save(file, *small, progress=False)
  assert file.read_text() == 'mine'
  (tmp_path / 'new' / '.part').mkdir(parents=True)  # a save was stopped here
  (tmp_path / 'new' / '.part' / 'old').write_text('half')
  models.save(tmp_path / 'new', *small, progress=False)
  assert not (tmp_path / 'new' / 'old').exists()
