"""The commands of mezo-jax: their help, their errors, and configs by name."""

import os
from pathlib import Path
import subprocess
import sys

import conftest
import pytest

from mezo_jax.cli import command_line, commands
from mezo_jax.cli.command_line import find
from mezo_jax.core.errors import InputError, MissingError


def run(*argv):
  """Runs a command in this process and returns its exit status."""
  with pytest.raises(SystemExit) as e:
    commands.main(argv)
  return e.value.code


@pytest.mark.parametrize('argv', [(), ('--help',), ('help',)])
def test_help_lists_the_commands(argv, capsys):
  assert not run(*argv)
  text = capsys.readouterr().out
  for name in ('train', 'predict', 'export', 'replay', 'evaluate', 'sweep',
               'report', 'plan', 'diagnose'):
    assert f'mezo-jax {name} ' in text


@pytest.mark.parametrize('command,flags', [
    ('predict', ['--data', '--out', '--step']),
    ('export', ['--step', '--[no]merged', '--base']),
    ('replay', ['--log', '--out', '--until']),
    ('evaluate', ['--suite', '--tasks', '--config.FIELD=VALUE']),
    ('sweep', ['--config', '--workdir', '--seeds', '--jobs', '--grid.FIELD']),
    ('report', ['--out']), ('plan', ['--config', '--topology', '--mesh']),
    ('diagnose', ['--config', '--run', '--directions'])])
@pytest.mark.parametrize('help_flag', ['--help', '-h'])
def test_help_of_a_command_describes_its_flags(
    command, flags, help_flag, capsys):
  assert not run(command, help_flag)
  text = capsys.readouterr().out
  assert f'mezo-jax {command} ' in text
  for flag in flags:
    assert flag in text


@pytest.mark.parametrize('argv,names', [
    (['trian'], 'train'), (['--steps=3'], '--steps'),
    (['export', 'run'], 'DIRECTORY'), (['export', 'a', 'b', 'stray'], 'stray'),
    (['export', 'a', 'b', '--mergd'], '--merged'),
    (['export', 'a', 'b', '--step=x'], '--step=x'),
    (['export', 'a', 'b', '--config.steps=3'], 'config.steps'),
    (['predict', 'a'], '--data'), (['predict', '--data=x'], 'RUN_OR_DIRECTORY'),
    (['predict', 'a', '--data=x', '--out=no/such'], '--out'),
    (['replay', '--base=x', '--log=y'], '--out'),
    (['evaluate'], '--suite'), (['evaluate', '--suite=cpu_siute'], 'cpu_suite'),
    (['evaluate', '--suite=cpu_suite', '--config.stepz=3'], 'steps'),
    (['evaluate', '--suite=opt'], 'get_suite'),
    (['sweep', '--grid.steps=1'], '--workdir'), (['report'], 'RUN'),
    (['plan'], '--topology'),
    (['plan', '--topology=cpu:1', '--config.stpes=3'], 'steps'),
    (['plan', '--topology=cpu:1', '--config=optt'], 'opt')])
def test_an_error_names_the_flag(argv, names):
  status = run(*argv)
  assert status.startswith('mezo-jax') and names in status
  assert '\n' not in status


@pytest.mark.processes
def test_the_console_script_trains_with_a_config_by_name(tmp_path):
  """From an empty folder; its config is read as train.py would read it."""
  def run(*argv):
    return subprocess.run(
        [sys.executable, '-c', 'from mezo_jax.__main__ import main; main()',
         'train', *argv], capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {'PYTHONPATH': str(conftest.ROOT)})
  done = run('--help')
  assert done.returncode == 0 and '--[no]distributed' in done.stdout
  done = run('--config=opt:sst2', '--config.steps=many')
  assert done.returncode == 1
  assert done.stderr.startswith('mezo-jax train: ')
  assert '--config.steps=many' in done.stderr
  assert 'Traceback' not in done.stderr and not [*tmp_path.iterdir()]


@pytest.mark.parametrize('name', ['opt', 'opt.py', 'configs/opt.py'])
def test_a_config_that_comes_with_the_package(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert Path(find(name)).samefile(conftest.ROOT / 'configs/opt.py')
  config = command_line.read_config(f'{name}:rte,lora', ['--config.steps=7'])
  assert (config.task.name, config.peft.method, config.steps) == (
      'rte', 'lora', 7)


def test_a_file_comes_before_a_config_of_the_package(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'own').mkdir()  # which is not a file
  (tmp_path / 'opt.py').write_text(
      'from mezo_jax.training.config import Train\n'
      'get_config = lambda: Train(steps=3)\n')
  assert find('opt.py') == 'opt.py'
  assert command_line.read_config('opt.py').steps == 3
  assert Path(find('own')).samefile(conftest.ROOT / 'configs/own.py')


def test_a_config_that_is_not_there():
  with pytest.raises(MissingError, match="'rboerta.py'.* roberta"):
    find('rboerta.py')
  with pytest.raises(MissingError, match='quickstart'):
    find('elsewhere/xyz.py')
  with pytest.raises(InputError, match="''"):
    command_line.read_config('')


def test_the_package_has_all_configs():
  names = lambda folder: {path.name for path in folder.glob('*.py')}
  assert names(command_line.CONFIGS) == names(conftest.ROOT / 'configs')
  setuptools = pytest.importorskip('setuptools')
  assert 'mezo_jax.configs' in setuptools.find_namespace_packages(
      str(conftest.ROOT), include=['mezo_jax*'])
