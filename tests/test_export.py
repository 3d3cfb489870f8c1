"""A run's working directory to what transformers loads."""

import json
import shutil

import conftest
import helpers
import jax
from orbax.checkpoint import v1 as ocp
import pytest
from runs import records, small_config

from mezo_jax import models, peft
from mezo_jax.cli import commands as command_line
from mezo_jax.core.errors import InputError
from mezo_jax.export import from_run
from mezo_jax.export.from_run import card, export, rebuild
from mezo_jax.tasks import Task
from mezo_jax.training import config as config_lib
import train


def run_export(*args):
  """What the command says, in the end of a failure."""
  try:
    command_line.main(['export', *map(str, args)])
  except SystemExit as e:
    return e.code


def test_export_of_a_run(tiny_dir, reviews_file, tmp_path, capsys):
  """The best checkpoint as a directory that transformers loads; what it scores
  is what the run reported; a card that says so."""
  workdir = tmp_path / 'run'
  result = train.run(small_config(tiny_dir, reviews_file), workdir)
  capsys.readouterr()
  assert run_export(workdir, tmp_path / 'm') is None
  assert f'wrote {tmp_path / "m"}\n' in capsys.readouterr().out
  best = result['final']['step']
  _, params = models.load(tmp_path / 'm', progress=False)
  helpers.assert_bitwise(params, ocp.load(
      workdir / 'checkpoints' / str(best), checkpointable_name='state')[0])
  text = (tmp_path / 'm' / 'README.md').read_text()
  for part in (f'{result["final"]["accuracy"]:.1%}', 'MeZO', f'after {best} of',
               f'{result["zero_shot"]["accuracy"]:.1%}', '{text} It was'):
    assert part in text
  tokens = models.load_tokenizer(tmp_path / 'm')('a good film')['input_ids']
  assert len(tokens) == 3
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').touch()
  for args, message in (
      ((workdir, tmp_path / 'full'), 'not empty'),
      ((workdir, tmp_path / 'n', '--step', '1'), 'checkpoint of step 1'),
      ((workdir, tmp_path / 'n', '--merged'), '--merged'),
      ((tmp_path, tmp_path / 'n'), 'config.json')):
    assert message in run_export(*args)
  config = json.loads((workdir / 'config.json').read_text())
  for wrong, message in (
      ('{', 'config.json'),
      (json.dumps(config | {'method': 'magic'}), 'magic'),
      (json.dumps(config | {'no_such': 1}), 'no_such')):
    (workdir / 'config.json').write_text(wrong)
    assert message in run_export(workdir, tmp_path / 'n')
  assert not (tmp_path / 'n').exists()


def test_a_card_s_tables_hold_any_text():
  config = config_lib.Train()
  config.task.template, config.peft.mask = '{text}\n|?', 'attn/(q|v)'
  lines = card(config, 5, {}).splitlines()
  assert r'| prompt | `{text}\n\|?` |' in lines
  assert r'| parameters trained | all: `attn/(q\|v)` |' in lines


def changed_json(file, **changes):
  about = json.loads(file.read_text())
  file.write_text(json.dumps(about | changes))


@pytest.mark.slow
@pytest.mark.exhaustive_except(method=['lora'])
@pytest.mark.parametrize('method', ['lora', ''])
def test_another_base_is_refused_and_a_moved_one_is_found(
    method, tiny_dir, reviews_file, tmp_path):
  """By what is in its files, not by its name."""
  base, run = tmp_path / 'base', tmp_path / 'run'
  shutil.copytree(tiny_dir, base)
  config = small_config(base, reviews_file, steps=4, eval_every=2,
                        peft__method=method)
  train.run(config, run)
  merged = method == 'lora'
  want = (export(run, tmp_path / 'a', merged=merged)
          / 'model.safetensors').read_bytes()
  replayed = rebuild(base, run / 'steps.log', tmp_path / 'b', merged=merged)
  assert (replayed / 'README.md').is_file()

  # The directory has something else now.
  before = (base / 'config.json').read_text()
  changed_json(base / 'config.json', rms_norm_eps=1e-3)
  for make in (lambda: export(run, tmp_path / 'c', merged=merged),
               lambda: rebuild(base, run / 'steps.log', tmp_path / 'c'),
               lambda: train.run(config, run)):
    with pytest.raises(InputError, match='config of .*norm_eps .*1e-05'):
      make()
  (base / 'config.json').write_text(before)
  vocabulary = base / 'tokenizer.json'
  words = vocabulary.read_text()
  vocabulary.write_text(words.replace('"cold"', '"frost"'))
  for make in (lambda: export(run, tmp_path / 'c'),
               lambda: rebuild(base, run / 'steps.log', tmp_path / 'c')):
    with pytest.raises(InputError, match='tokenizer of .*--base'):
      make()
  vocabulary.write_text(words)
  other = conftest.write_tiny_model(tmp_path / 'other', seed=1)
  shutil.copytree(base, tmp_path / 'moved')
  shutil.rmtree(base)
  with pytest.raises(InputError, match='--base'):
    export(run, tmp_path / 'c', merged=merged)
  if method:
    with pytest.raises(InputError, match='weights of .*other '):
      export(run, tmp_path / 'c', merged=merged, base=other)
  assert not (tmp_path / 'c').exists()

  # It was moved.
  out = export(run, tmp_path / 'd', merged=merged, base=tmp_path / 'moved')
  assert (out / 'model.safetensors').read_bytes() == want
  config.model.name, config.steps = str(other), 6
  with pytest.raises(InputError, match='weights of .*other '):
    train.run(config, run)
  config.model.name = str(tmp_path / 'moved')
  train.run(config, run)
  assert [r['step'] for r in records(run) if r['kind'] == 'dev'] == [
      0, 2, 4, 6]
  export(run, tmp_path / 'e')  # the run knows where it is now
  (run / 'inputs.json').unlink()
  config.model.name = str(tiny_dir)
  with pytest.raises(InputError, match='model.name .*weights'):
    train.run(config, run)


@pytest.mark.slow
def test_an_adapter_that_a_run_began_with(tiny_dir, reviews_file, tmp_path):
  """It is a part of the base, and a shared log needs to be given it."""
  config = small_config(tiny_dir, reviews_file, steps=2, eval_every=2,
                        peft__method='lora')
  train.run(config, tmp_path / 'first')
  adapter = export(tmp_path / 'first', tmp_path / 'adapter')
  config.peft.adapter, config.seed = str(adapter), 1
  run = tmp_path / 'run'
  train.run(config, run)
  export(run, tmp_path / 'shared', step=2, log=True)
  log = tmp_path / 'shared' / 'steps.log'
  assert '--adapter' in (tmp_path / 'shared' / 'README.md').read_text()
  out = rebuild(tiny_dir, log, tmp_path / 'a', adapter=adapter)
  assert (out / 'adapter_model.safetensors').read_bytes() == (
      export(run, tmp_path / 'b', step=2) / 'adapter_model.safetensors'
  ).read_bytes()
  changed_json(adapter / 'adapter_config.json', lora_alpha=3.0)
  with pytest.raises(InputError, match='adapter .*--base'):
    export(run, tmp_path / 'c')
  with pytest.raises(InputError, match='adapter .*--base'):
    rebuild(tiny_dir, log, tmp_path / 'c', adapter=adapter)


@pytest.mark.slow
def test_what_is_shared_has_no_local_paths(tiny_dir, reviews_file, tmp_path):
  """A path of the model, the data or an adapter; PEFT needs that of a base."""
  from transformers import AutoTokenizer
  place = tmp_path / 'secretplace'
  shutil.copytree(tiny_dir, place / 'base')
  changed_json(place / 'base' / 'config.json', _name_or_path=str(place))
  changed_json(place / 'base' / 'tokenizer_config.json',
               name_or_path=str(place), tokenizer_file=f'{place}/x.json')
  shutil.copy(reviews_file, place / 'rows.jsonl')
  config = small_config(place / 'base', place / 'rows.jsonl', steps=2,
                        eval_every=2, peft__method='lora')
  config.data.test = config.data.train
  train.run(config, place / 'first')
  said = []
  adapter = export(place / 'first', place / 'adapter', say=said.append)
  assert 'adapter_config.json' in said[0]
  config.peft.adapter = str(adapter)
  train.run(config, place / 'run')
  export(place / 'run', tmp_path / 'log', step=2, log=True)
  export(place / 'run', tmp_path / 'whole', merged=True)
  export(place / 'run', tmp_path / 'peft')
  AutoTokenizer.from_pretrained(tmp_path / 'whole')
  found = {f'{file.parent.name}/{file.name}'
           for name in ('log', 'whole', 'peft')
           for file in (tmp_path / name).rglob('*')
           if file.is_file() and b'secretplace' in file.read_bytes()}
  assert found == {'peft/adapter_config.json'}


@pytest.mark.slow
def test_where_it_is_written(tiny_dir, tmp_path, reviews_file, monkeypatch):
  """Any way to name a directory; an address is none."""
  config = small_config(tiny_dir, reviews_file, steps=2, eval_every=2)
  train.run(config, tmp_path / 'run[1]')
  monkeypatch.setenv('HOME', str(tmp_path))
  for i, name in enumerate(('~/home', './here/', 'a[b]*/x?', 'ü b#%41')):
    (tmp_path / str(i)).mkdir()
    monkeypatch.chdir(tmp_path / str(i))
    export('../run[1]', name, log=i % 2 == 1)
  assert (tmp_path / 'home' / 'config.json').is_file()
  assert (tmp_path / '1' / 'here' / 'steps.log').is_file()
  assert (tmp_path / '2' / 'a[b]*' / 'x?' / 'config.json').is_file()
  for name in ('gs://bucket/x', 's3:/x', 'a\\b', 'a\udcffb'):
    with pytest.raises(InputError, match='address|character'):
      export(tmp_path / 'run[1]', name)


@pytest.mark.slow
def test_adapters_of_a_gguf_file_say_how_to_load_them(
    tiny_dir, tmp_path, monkeypatch):
  """PEFT cannot load the file, so its name is no base."""
  model, params = models.load(tiny_dir, progress=False)
  whole = peft.join(params, peft.lora.init(params, jax.random.key(0), rank=2))
  config = small_config('/secretplace/tiny.gguf', 'rows.jsonl',
                        peft__method='lora')
  said = []
  out = from_run._write(
      tmp_path / 'out', config, model, whole, None, 2, {}, False, said.append)
  about = json.loads((out / 'adapter_config.json').read_text())
  assert about['base_model_name_or_path'] is None
  assert 'GGUF' in said[0] and 'PEFT' in said[0]
  card_text = (out / 'README.md').read_text()
  assert 'secretplace' not in card_text
  pytest.importorskip('torch')
  pytest.importorskip('peft')
  code = card_text.split('```python\n')[1].split('```')[0]
  # The file's content is that of the directory.
  load = models.load
  monkeypatch.setattr(models, 'load', lambda name: load(
      tiny_dir, progress=False))
  monkeypatch.setattr(models, 'load_tokenizer', lambda name: None)
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(code.replace("'DIR'", repr(str(out))), names)
  assert names['model'].peft_config['default'].r == 2


@pytest.mark.parametrize('method', [
    '', pytest.param('lora', marks=pytest.mark.slow)])
def test_an_export_says_what_it_is_for(
    method, tiny_dir, reviews_file, tmp_path):
  """Its classes and their words, and the licence of its base model."""
  base = tmp_path / 'base'
  shutil.copytree(tiny_dir, base)
  (base / 'LICENSE').write_text('Be kind.')
  (base / 'NOTICE.txt').write_bytes(b'\xff of others')
  (base / 'notes').write_text('')
  config = small_config(base, reviews_file, steps=1, eval_every=1,
                        zero_shot=False, peft__method=method)
  train.run(config, tmp_path / 'run')
  out = export(tmp_path / 'run', tmp_path / 'm', say=lambda text: None)
  for name in ('LICENSE', 'NOTICE.txt'):
    assert (out / name).read_bytes() == (base / name).read_bytes()
  assert not (out / 'notes').exists()
  about = json.loads((out / 'mezo_jax.json').read_text())
  assert about['classes'] == [
      {'name': 'terrible', 'word': ' terrible'},
      {'name': 'great', 'word': ' great'}]
  assert about['config']['task']['template'] == '{text} It was'


@pytest.mark.torch
def test_transformers_ends_answers_where_the_export_says(tmp_path):
  """At the end tokens of the base model and at the end of a turn of a chat."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  base = tmp_path / 'base'
  conftest.write_tiny_model(base, vocab_size=18)
  tokenizer = models.load_tokenizer(base)
  tokenizer.chat_template = (
      '{% for m in messages %}{{ m.content }}<pad>{% endfor %}')
  tokenizer.save_pretrained(base)
  words = [w for w in conftest.WORDS if w != 'the'] * 4
  (tmp_path / 'rows.jsonl').write_text('\n'.join(
      json.dumps({'text': f'{a} {b}', 'answers': a})
      for a, b in zip(words, words[1:])))
  config = small_config(base, tmp_path / 'rows.jsonl', steps=1, eval_every=1,
                        zero_shot=False, data__num_train=20, data__num_dev=10,
                        data__num_test=10)
  config.task = Task(kind='generation', template='{text}', max_new_tokens=3)
  train.run(config, tmp_path / 'run')

  def written(name):
    """Returns the tokens that transformers writes, and the model."""
    out = export(tmp_path / 'run', tmp_path / name, say=lambda text: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
      found = model.generate(
          torch.tensor([[5, 6, 7]]), max_new_tokens=8, do_sample=False)
    return found[0, 3:].tolist(), model
  whole, model = written('a')
  assert model.generation_config.eos_token_id == tokenizer.pad_token_id
  end = whole[0]
  (base / 'generation_config.json').write_text(json.dumps(
      {'eos_token_id': end, 'repetition_penalty': 1.5,
       '_from_model_config': True}))
  ended, model = written('b')
  assert ended == [end] != whole
  assert model.generation_config.eos_token_id == [end, tokenizer.pad_token_id]
  assert model.generation_config.repetition_penalty == 1.5
  assert model.generation_config.pad_token_id == tokenizer.pad_token_id
