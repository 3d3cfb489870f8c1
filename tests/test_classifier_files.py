"""A classification head in files that transformers, and PEFT, load."""

import json

import families
from families import FAMILIES, IDS, MASKS
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from mezo_jax import models, peft
from mezo_jax.core.errors import InputError
from mezo_jax.export.from_run import export, rebuild
from mezo_jax.tasks import head, Task
import train

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

pytestmark = pytest.mark.torch

LABELS = ['bad', 'so so', 'good']


def with_head(family, switch, path):
  """(model, parameters with a head) of a family's files."""
  families.torch_model(family, switch).save_pretrained(path)
  model, params = models.load(path, progress=False)
  classifier = jax.tree.map(
      lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape),
      head.init(jax.random.key(0), model.config, 3))
  return model, params | {'classifier': classifier}


def ours(model, params):
  at = np.full(3, 0) if not model.config.causal else (
      MASKS['right'].sum(1) - 1)
  x = helpers.quick_jit(lambda p: model.apply(
      {'params': p}, IDS, MASKS['right'], answer_at=at[:, None],
      features='body'))(params)
  return np.asarray(head.apply(params['classifier'], x[:, 0]))


def theirs(model):
  """Logits of a torch model, whose padding has the padding token."""
  return families.torch_logits(model.eval(), IDS, MASKS['right'])


@pytest.mark.exhaustive_except(family=['llama', 'gpt2', 'bert'])
@pytest.mark.parametrize('family,switch', [
    *((family, [*switches][0])
      for family, (_, _, switches) in FAMILIES.items()),
    ('llama', 'tied head'), ('opt', '350M'), ('bert', 'untied head')])
def test_transformers_loads_a_head(family, switch, tmp_path):
  model, params = with_head(family, switch, tmp_path / 'base')
  if switch == '350M':
    with pytest.raises(InputError, match='OPT'):
      models.save(tmp_path / 'out', model, params, progress=False)
    return
  models.save(tmp_path / 'out', model, params, labels=LABELS, progress=False)
  found, report = (
      transformers.AutoModelForSequenceClassification.from_pretrained(
          tmp_path / 'out', output_loading_info=True,
          attn_implementation='eager'))
  assert not report['missing_keys'] and not report['unexpected_keys']
  assert found.config.id2label == dict(enumerate(LABELS))
  want = ours(model, params)
  np.testing.assert_allclose(theirs(found), want, atol=3e-5)
  assert np.abs(want).max() > 0.1


@pytest.mark.exhaustive_except(family=['llama', 'bert'])
@pytest.mark.parametrize('family', ['llama', 'gpt2', 'bert', 'roberta'])
def test_peft_loads_lora_with_a_head(family, tmp_path):
  reference = pytest.importorskip('peft')
  switch = [*FAMILIES[family][2]][0]
  model, params = with_head(family, switch, tmp_path / 'base')
  adapters = peft.lora.init(params, jax.random.key(0), rank=2)
  whole = peft.join(params, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(
      jax.random.key(1), x.shape), adapters))
  peft.save(tmp_path / 'out', model, whole)
  base = transformers.AutoModelForSequenceClassification.from_pretrained(
      tmp_path / 'base', num_labels=3, attn_implementation='eager')
  found = reference.PeftModel.from_pretrained(base, tmp_path / 'out').eval()
  ids = np.where(MASKS['right'] == 1, IDS, base.config.pad_token_id)
  with torch.no_grad():
    got = found(torch.tensor(ids), attention_mask=torch.tensor(
        MASKS['right'])).logits.numpy()
  np.testing.assert_allclose(got, ours(model, whole), atol=3e-5)


def test_half_precision_and_a_base_class(tmp_path):
  """The head stays float32 in the file; a body alone is enough."""
  from safetensors.numpy import load_file
  body = families.torch_model('bert', 'as released').bert
  body.save_pretrained(tmp_path / 'base')
  model, params = models.load(
      tmp_path / 'base', dtype='bfloat16', progress=False)
  assert not model.config.head
  params |= {'classifier': head.init(jax.random.key(0), model.config, 3)}
  models.save(tmp_path / 'out', model, params, progress=False)
  found = load_file(tmp_path / 'out' / 'model.safetensors')
  assert found['classifier.weight'].dtype == np.float32
  assert json.loads((tmp_path / 'out' / 'config.json').read_text())[
      'id2label'] == {'0': 'LABEL_0', '1': 'LABEL_1', '2': 'LABEL_2'}
  again = transformers.AutoModelForSequenceClassification.from_pretrained(
      tmp_path / 'out')
  assert again.dtype == torch.bfloat16
  np.testing.assert_array_equal(
      again.classifier.weight.detach().float().numpy(),
      np.asarray(params['classifier']['out']['kernel'].T.astype(
          jnp.bfloat16).astype(jnp.float32)))


def config_of(model, data, **changes):
  config = runs.small_config(
      model, data, **{'optimizer__learning_rate': 1e-2} | changes)
  config.task = Task(
      kind='head', template='{text}', label_names=('bad', 'good'))
  return config


def test_a_run_with_a_head_is_exported_and_replayed(
    tiny_dir, reviews_file, tmp_path):
  config = config_of(tiny_dir, reviews_file)
  result = train.run(config, tmp_path / 'run')
  out = export(tmp_path / 'run', tmp_path / 'out')
  tokenizer = transformers.AutoTokenizer.from_pretrained(out)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
  assert model.config.id2label == {0: 'bad', 1: 'good'}
  rows = [json.loads(line) for line in reviews_file.read_text().splitlines()]
  tokens = tokenizer(
      [row['text'] for row in rows], padding=True, return_tensors='pt')
  with torch.no_grad():
    loss = torch.nn.functional.cross_entropy(
        model(**tokens).logits, torch.tensor([row['label'] for row in rows]))
  # Over all rows; the run reports 40 of the 120.
  assert abs(loss.item() - result['final']['loss']) < 0.2

  export(tmp_path / 'run', tmp_path / 'shared', step=6, log=True)
  card = (tmp_path / 'shared' / 'README.md').read_text()
  assert 'python -m mezo_jax replay' in card
  rebuild(tiny_dir, tmp_path / 'shared' / 'steps.log', tmp_path / 'again')
  export(tmp_path / 'run', tmp_path / 'six', step=6)
  assert (tmp_path / 'again' / 'model.safetensors').read_bytes() == (
      tmp_path / 'six' / 'model.safetensors').read_bytes()


@pytest.mark.exhaustive
def test_adapters_with_a_head(tiny_dir, reviews_file, tmp_path):
  reference = pytest.importorskip('peft')
  train.run(config_of(tiny_dir, reviews_file, peft__method='lora'),
            tmp_path / 'run')
  export(tmp_path / 'run', tmp_path / 'whole', merged=True)
  export(tmp_path / 'run', tmp_path / 'out')
  lines = (tmp_path / 'out' / 'README.md').read_text()
  code = lines.split('```python\n')[1].split('```')[0]
  names = {}
  exec(code.replace(repr(tiny_dir.name), repr(str(tiny_dir))).replace(
      "'DIR'", repr(str(tmp_path / 'out'))), names)
  assert isinstance(names['model'], reference.PeftModel)
  merged = transformers.AutoModelForSequenceClassification.from_pretrained(
      tmp_path / 'whole')
  ids = torch.tensor([[5, 6, 7], [8, 9, 1]])
  with torch.no_grad():
    np.testing.assert_allclose(
        names['model'].eval()(ids).logits, merged(ids).logits, atol=3e-5)


@pytest.mark.parametrize('changes', [
    dict(peft__method='prompt'), dict(peft__method='prefix')])
def test_what_cannot_be_exported_is_refused_before_training(
    changes, tiny_dir, reviews_file, tmp_path):
  config = config_of(tiny_dir, reviews_file, **changes)
  with pytest.raises(InputError, match='peft.method'):
    train.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run' / 'config.json').exists()
