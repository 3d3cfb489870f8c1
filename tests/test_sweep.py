"""Sweeps: the grid, the choice of its best point, kills, and refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import conftest
import pytest
import runs

from mezo_jax.cli import commands, grid, processes, sweep
from mezo_jax.core.errors import AGAIN, InputError
from mezo_jax.training import config as config_lib

RATE, EPS = 'optimizer.learning_rate', 'spsa.eps'


def finish_by_hand(directory, run, dev, test, metric='accuracy'):
  """Writes what a finished run leaves, with a score that was chosen here."""
  directory.mkdir(parents=True)
  (directory / 'config.json').write_text(
      json.dumps(config_lib.to_json(run.config)))
  (directory / 'metrics.jsonl').write_text(''.join(
      json.dumps({'kind': 'dev', 'step': step, metric: score, 'loss': loss})
      + '\n' for step, (score, loss) in dev.items()))
  best = max(dev, key=lambda step: (dev[step][0], -dev[step][1]))
  (directory / 'result.json').write_text(json.dumps({
      'metric': metric, 'steps': run.config.steps,
      'final': {metric: test, 'loss': 1 - test, 'count': 40, 'step': best}}))


# --- the grid ---------------------------------------------------------------


@pytest.mark.parametrize('text,values', [
    ('1e-4,1e-3', ['1e-4', '1e-3']), ('', ['']), (',lora', ['', 'lora']),
    ('(8,16),(16,32)', ['(8,16)', '(16,32)']),
    ("'a, b',c", ['a, b', 'c']), ("it's,so", ["it's", 'so']),
    ("(' a)',' b'),(' c',)", ["(' a)',' b')", "(' c',)"]),
    ('attn/(q|v),mlp', ['attn/(q|v)', 'mlp'])])
def test_values_are_separated_by_commas(text, values):
  argv = ['sweep', f'--grid.x={text}', '--workdir=w', '--grid.y=3']
  assert grid.take_grid(argv) == (
      ['sweep', '--workdir=w'], {'x': values, 'y': ['3']})


def test_equal_numbers_are_one_run_and_names_are_stable():
  names = lambda *args: [name for point in grid.points_of(*args)
                         for name in point.runs]
  found = names([], {RATE: ['1e-4', '0.0001', '1_0e-5'], EPS: ['1e-3']}, 2)
  assert found == [f'{RATE}=0.0001,{EPS}=0.001,seed={i}' for i in range(2)]
  # Neither the order of the flags nor other values change a name.
  more = names(['--config.seed=1'], {EPS: ['2', '.001'], RATE: ['1e-4']}, 2)
  assert found[1] in more and len(more) == 4
  masks = names([], {'peft.mask': ['attn/(q|v)', 'attn/(q,v)', 'a' * 300]}, 1)
  assert len({*masks}) == 3
  assert all('/' not in name and len(name) < 100 for name in masks)


@pytest.mark.parametrize('words,values,message', [
    ([], {}, '--grid.FIELD'),
    ([], {'optimizer.lr': ['1']}, RATE),
    ([], {RATE: ['1e-4', 'small']}, f'{RATE}=small'),
    ([], {RATE: ['1e-4', '-1']}, f'{RATE}.*positive'),
    ([], {'spsa.rank': ['4']}, "spsa.rank.*'rademacher'"),
    ([], {'seed': ['1', '2']}, '--seeds'),
    (['--config.spsa.eps=1e-3'], {EPS: ['1']}, 'leave one out'),
    ([], {'method': ['mezo', 'zero_shot']}, 'zero_shot.*evaluate'),
    ([], {'method': ['private']}, 'public_dev'),
    ([], {'task.metric': ['accuracy', 'macro_f1']}, 'accuracy and by macro_f1'),
    ([], {'select': ['loss', 'metric']}, 'by accuracy and by the loss of'),
    (['--config.spas.eps=1'], {RATE: ['1']}, 'spas')])
def test_what_is_refused_before_a_run_starts(words, values, message, tmp_path):
  with pytest.raises(InputError, match=message):
    sweep.run(words, str(tmp_path / 'w'), values, 2)
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize('more,message', [
    (['--seeds=0'], '--seeds'), (['--jobs=0'], '--jobs'), (['stray'], 'stray'),
    ([f'--grid.{RATE}'], 'V1,V2'), (['--sedes=2'], '--seeds')])
def test_flags_that_are_refused(more, message, tmp_path):
  with pytest.raises(SystemExit, match=message):
    commands.main(['sweep', '--workdir', str(tmp_path), f'--grid.{RATE}=1',
                   *more])
  assert not [*tmp_path.iterdir()]


# --- the choice -------------------------------------------------------------


def test_the_best_mean_on_dev_rows_is_chosen_and_tested(tmp_path, capsys):
  """Test scores, single seeds and steps that were not chosen have no part."""
  points = grid.points_of(['--config.steps=20'], {RATE: ['1e-4', '1e-3']}, 2)
  dev = {'0.0001': ({10: (0.9, 0.9), 20: (0.2, 0.1)}, {20: (0.4, 0.5)}),
         '0.001': ({10: (0.5, 0.9), 20: (0.7, 0.5)}, {20: (0.7, 0.5)})}
  test = {'0.0001': (1.0, 1.0), '0.001': (0.2, 0.4)}
  for point in points:
    value = grid.spell(point.values[RATE])
    for run, of_dev, of_test in zip(
        point.runs.items(), dev[value], test[value]):
      finish_by_hand(tmp_path / run[0], run[1], of_dev, of_test)
  commands.main(['sweep', '--workdir', str(tmp_path), '--config.steps', '20',
                 '--seeds=2', f'--grid.{RATE}=0.0001,1e-3'])
  out = capsys.readouterr().out
  assert 'running' not in out
  table = json.loads((tmp_path / 'table.json').read_text())
  best = table['best']
  assert best['values'] == {RATE: 0.001}
  assert best['dev']['accuracy']['mean'] == pytest.approx(0.7)
  assert best['test']['accuracy']['mean'] == pytest.approx(0.3)
  assert best['test']['accuracy']['error'] == pytest.approx(0.1)
  assert '30.0 ± 10.0' in out and '100.0' not in out
  assert f'--config.steps 20 --config.{RATE}=1e-3' in out
  assert (tmp_path / 'table.md').read_text() in out
  assert (tmp_path / 'sweep.png').read_bytes().startswith(b'\x89PNG')
  # Another value makes one more run, which is refused like train's own.
  config = tmp_path / f'{RATE}=0.0001,seed=0/config.json'
  saved = json.loads(config.read_text())
  config.write_text(json.dumps(saved | {'select': 'loss'}))
  with pytest.raises(SystemExit, match="select was 'loss'"):
    commands.main(['sweep', '--workdir', str(tmp_path), '--config.steps=20',
                   '--seeds=2', f'--grid.{RATE}=1e-4,1e-3,1e-2'])


def test_a_point_with_a_failed_run_is_not_chosen(tmp_path, monkeypatch):
  points = grid.points_of([], {RATE: ['1e-4', '1e-3'], EPS: ['1', '2'],
                               'optimizer.schedule': ['linear']}, 2)
  names = [name for point in points for name in point.runs]
  for point in points:
    for name, run in point.runs.items():
      if name != names[0]:
        high = point is points[0] or point is points[3]
        finish_by_hand(tmp_path / name, run, {1: (0.8 if high else 0.5, 1)}, 0)
  monkeypatch.setattr(processes, 'run_all', lambda runs, *_: (
      (name, 'it | diverged' if name == names[0] else '') for name in runs))
  values = {RATE: ['1e-4', '1e-3'], EPS: ['1', '2'],
            'optimizer.schedule': ['linear']}
  table = sweep.run([], str(tmp_path), values, 2).read_text()
  assert r'failed: it \| diverged' in table and '1 of 2' in table
  best = json.loads((tmp_path / 'table.json').read_text())['best']
  assert (best['values'][RATE], best['values'][EPS]) == (1e-3, 2)
  assert (tmp_path / 'sweep.png').exists()  # of three fields
  for name in names:
    shutil.rmtree(tmp_path / name, ignore_errors=True)
  monkeypatch.setattr(processes, 'run_all', lambda runs, *_: (
      (name, 'it diverged') for name in runs))
  with pytest.raises(InputError, match='it diverged'):
    sweep.run([], str(tmp_path), {RATE: ['1e-4', '1e-3']}, 2)


@pytest.mark.parametrize('found,jobs,places', [
    ('cpu 1', 2, [{}, {}]), ('tpu 4', 3, [{}]), ('gpu 1', 1, [{}]),
    ('gpu 2', 2, [{'CUDA_VISIBLE_DEVICES': '0'},
                  {'CUDA_VISIBLE_DEVICES': '1'}]),
    ('gpu 2', 3, [{'CUDA_VISIBLE_DEVICES': i,
                   'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.45'} for i in '010'])])
def test_each_process_gets_a_gpu(found, jobs, places, monkeypatch):
  monkeypatch.setattr(subprocess, 'run', lambda argv, **_: (
      subprocess.CompletedProcess(argv, 0, f'hello\n{found}\n', '')))
  said = []
  assert processes._places(jobs, {}, said.append) == places
  assert bool(said) == found.startswith('tpu')
  if jobs == 3 and found.startswith('gpu'):
    chosen = processes._places(jobs, {'CUDA_VISIBLE_DEVICES': '5,7'}, print)
    assert [place['CUDA_VISIBLE_DEVICES'] for place in chosen] == [*'575']


# --- processes --------------------------------------------------------------


def small(model, data, workdir, *more):
  """Returns the arguments of a sweep of small runs."""
  words = runs.command(model, data, workdir, '--config.steps=6',
                       '--config.eval_every=3', *more)[2:]
  return [sys.executable, '-m', 'mezo_jax', 'sweep',
          *(word for word in words if not word.startswith(f'--config.{RATE}'))]


def start(command):
  """Starts a sweep in a process group of its own."""
  return subprocess.Popen(
      command, env=runs.environment() | {'PYTHONPATH': str(conftest.ROOT)},
      text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      start_new_session=True)


def finished(workdir):
  """Returns when each finished run of a sweep wrote its result."""
  return {path.parent.name: path.stat().st_mtime_ns
          for path in workdir.glob('*/result.json')}


@pytest.mark.processes
def test_a_sweep_that_is_stopped_and_killed(tiny_dir, reviews_file, tmp_path):
  """Finished runs are not repeated, and the table is that of another sweep."""
  fields = [f'--grid.{RATE}=1e-3,1e-2', f'--grid.{EPS}=1e-3,1e-2', '--seeds=2']
  workdir = tmp_path / 'killed'
  command = small(tiny_dir, reviews_file, workdir, *fields)

  def interrupted(end, least):
    """Ends a sweep while it trains, after some runs are finished."""
    process = start(command)
    def training():
      """Returns whether an unfinished run has made a step."""
      return any('"train"' in path.read_text()
                 for path in workdir.glob('*/metrics.jsonl')
                 if path.parent.name not in finished(workdir))
    while len(finished(workdir)) < least or not training():
      assert process.poll() is None, process.communicate()[0]
      time.sleep(0.01)
    end(process)
    return process.communicate(timeout=300)[0], process.returncode

  out, code = interrupted(lambda process: process.terminate(), 1)
  assert code == AGAIN and 'Run the same command again' in out, out
  before = finished(workdir)
  assert len(before) in (1, 2) and 'Traceback' not in out
  out, code = interrupted(
      lambda process: os.killpg(process.pid, signal.SIGKILL), 3)
  assert code == -signal.SIGKILL
  assert before.items() <= finished(workdir).items()
  before = finished(workdir)
  assert len(before) < 8
  out = start(command).communicate(timeout=1200)[0]
  after = finished(workdir)
  assert len(after) == 8 and before.items() <= after.items(), out
  assert out.count(': running') == 8 - len(before)
  assert 'accuracy' in (workdir / 'table.md').read_text()
  other = tmp_path / 'other'
  out = start(small(tiny_dir, reviews_file, other, *fields, '--jobs=2')
              ).communicate(timeout=1200)[0]
  tables = [json.loads((w / 'table.json').read_text())
            for w in (workdir, other)]
  assert tables[0] == tables[1], out
  assert len(tables[0]['points']) == 4


@pytest.mark.processes
def test_a_run_that_fails_does_not_stop_the_sweep(
    tiny_dir, reviews_file, tmp_path):
  process = start(small(tiny_dir, reviews_file, tmp_path,
                        f'--grid.{RATE}=1e30,1e-3'))
  out = process.communicate(timeout=1200)[0]
  assert process.returncode == 0, out
  table = (tmp_path / 'table.md').read_text()
  assert 'failed: ' in table and f'{RATE}=1e-3' in table
  assert table in out
