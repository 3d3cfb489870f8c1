"""A run's working directory to what transformers loads."""

import json

import helpers
from orbax.checkpoint import v1 as ocp
from runs import small_config

from mezo_jax import __main__ as command_line
from mezo_jax import config as config_lib
from mezo_jax import models
from mezo_jax.export import card
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
      ((workdir, tmp_path / 'n', '--step', '1'), 'no checkpoint of step 1 but'),
      ((workdir, tmp_path / 'n', '--merged'), 'only LoRA can be merged'),
      ((tmp_path, tmp_path / 'n'), 'not the --workdir of a run')):
    assert message in run_export(*args)
  config = json.loads((workdir / 'config.json').read_text())
  for wrong, message in (
      ('{', 'config.json is not JSON'),
      (json.dumps(config | {'method': 'magic'}), 'not that of a run of this'),
      (json.dumps(config | {'no_such': 1}), 'not that of a run of this')):
    (workdir / 'config.json').write_text(wrong)
    assert message in run_export(workdir, tmp_path / 'n')
  assert not (tmp_path / 'n').exists()


def test_a_card_s_tables_hold_any_text():
  config = config_lib.Train()
  config.task.template, config.peft.mask = '{text}\n|?', 'attn/(q|v)'
  lines = card(config, 5, {}).splitlines()
  assert r'| prompt | `{text}\n\|?` |' in lines
  assert r'| parameters trained | all: `attn/(q\|v)` |' in lines
