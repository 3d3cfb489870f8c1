"""Reports about several runs."""

from html.parser import HTMLParser
import json
import re

import pytest
import runs

from mezo_jax.cli import commands, report
from mezo_jax.core.errors import InputError
from mezo_jax.training import config as config_lib
import train


def record(directory, done=True, steps=20, last=None, score=0.5,
           metric='accuracy', value='loss', **changes):
  """Writes the files of a run that has made the steps up to ``last``.

  Args:
    directory: Working directory of the run.
    done: Whether the run is finished.
    steps: Number of steps of its config; 0 for a baseline.
    last: The last step that it has made; None for all.
    score: Its score on test rows, and on dev rows at step 10.
    metric: Name of its metric.
    value: What its training steps record.
    **changes: Fields of its config, as in `runs.changed`.
  """
  directory.mkdir(parents=True)
  config = runs.changed(config_lib.Train(), **changes)
  config.steps, last = 20, steps if last is None else last
  (directory / 'config.json').write_text(
      json.dumps(config_lib.to_json(config)))
  records = []
  for step in range(0, last + 1):
    if step:
      records.append({'kind': 'train', 'step': step, value: 1 / step,
                      'tokens': 90, 'seconds': 0.5})
    if step % 5 == 0 and steps:
      records.append({'kind': 'dev', 'step': step, 'loss': 1.0,
                      metric: score - abs(step - 10) / 100})
  (directory / 'metrics.jsonl').write_text(
      ''.join(json.dumps(r) + '\n' for r in records))
  if done:
    (directory / 'result.json').write_text(json.dumps({
        'metric': metric, 'steps': steps, 'seconds': 7.0, 'train_rows': 100,
        'final': {metric: score, 'count': 40} | ({'step': 10} if steps else {}),
        'peak_memory': 2**30}))


class Page(HTMLParser):
  """Collects what a page refers to, and checks that its tags are closed."""

  def __init__(self, text):
    super().__init__()
    self.open, self.refers, self.images = [], [], 0
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.refers += [value for name, value in attrs
                    if name in ('src', 'href', 'srcset', 'action')]
    self.images += tag == 'img'
    assert tag not in ('script', 'link', 'iframe')
    if tag not in ('img', 'meta'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def made(tmp_path, capsys, *paths):
  """Makes a report, and returns its Markdown and its parsed page."""
  out = tmp_path / 'out'
  commands.main(['report', *map(str, paths), f'--out={out}'])
  assert str(out / 'report.html') in capsys.readouterr().out
  text = (out / 'report.html').read_text()
  page = Page(text)
  assert all(src.startswith('data:image/png;base64,') for src in page.refers)
  assert not re.search(r'url\(|@import|https?:', text)
  markdown = (out / 'report.md').read_text()
  pictures = re.findall(r'\]\((.*?)\)', markdown)
  assert len(pictures) == page.images
  for name in pictures:
    assert (out / name).read_bytes().startswith(b'\x89PNG')
  return markdown, page


def rows_of(markdown, heading='run'):
  """Returns the rows of the first table whose first column has a name."""
  lines = markdown[markdown.index(f'| {heading} |'):].split('\n\n')[0]
  table = [[cell.strip() for cell in re.split(r'(?<!\\)\|', line)[1:-1]]
           for line in lines.splitlines()]
  return [dict(zip(table[0], cells)) for cells in table[2:]]


def test_a_finished_a_stopped_and_a_baseline(tmp_path, capsys):
  record(tmp_path / 'w/mezo', score=0.75, peft__mask='q|v')
  record(tmp_path / 'w/stopped', False, last=7, score=0.5)
  record(tmp_path / 'w/zero', steps=0, method='zero_shot', score=0.25)
  markdown, page = made(tmp_path, capsys, *(
      tmp_path / 'w' / name for name in ('mezo', 'stopped', 'zero', 'mezo')))
  mezo, stopped, zero = rows_of(markdown)
  assert (mezo['run'], mezo['state'], mezo['best step']) == (
      'mezo', 'finished', '10')
  assert (mezo['dev'], mezo['test'], mezo['GiB']) == ('75.0', '75.0', '1.00')
  # 20 steps of half a second, and of 2 forward passes of 16 rows.
  assert (mezo['seconds'], mezo['row forwards']) == ('10', '640')
  assert 'step 7 of 20' in stopped['state'] and stopped['test'] == ''
  assert (stopped['best step'], stopped['dev']) == ('5', '45.0')
  assert (zero['state'], zero['test'], zero['dev'], zero['seconds']) == (
      'baseline', '25.0', '', '7')
  assert page.images == 3
  differ = rows_of(markdown.partition('## Configs')[2])
  assert differ[0].keys() == {'run', 'method', 'peft.mask'}
  assert [row['peft.mask'] for row in differ] == [r'q\|v', '', '']


def test_a_directory_stands_for_its_runs(tmp_path, capsys):
  for seed in range(12):
    record(tmp_path / f'w/rate=1,seed={seed}', seed=seed)
  record(tmp_path / 'w/task/method')
  (tmp_path / 'w/compiled').mkdir()
  (tmp_path / 'w/failed').mkdir()
  (tmp_path / 'w/failed/log.txt').touch()
  markdown, _ = made(tmp_path, capsys, tmp_path / 'w')
  assert len(rows_of(markdown)) == 13 and 'task/method' in markdown
  # One baseline has no curves, and one config no differences.
  record(tmp_path / 'zero', steps=0, method='zero_shot')
  markdown, page = made(tmp_path, capsys, tmp_path / 'zero')
  assert page.images == 0 and len(rows_of(markdown)) == 1


def test_runs_with_other_metrics_and_with_rewards(tmp_path, capsys):
  record(tmp_path / 'a')
  record(tmp_path / 'b', metric='f1')
  record(tmp_path / 'c', metric='reward', value='reward', objective='reward',
         task__kind='generation')
  markdown, _ = made(tmp_path, capsys, *(tmp_path / name for name in 'abc'))
  assert 'cannot be compared' in markdown
  assert [row['metric'] for row in rows_of(markdown)] == [
      'accuracy', 'f1', 'reward']
  panels = report.report_page._panels(
      report._read_all([str(tmp_path / name) for name in 'abc']))
  assert panels == {
      ('train', 'loss'): [0, 1], ('train', 'reward'): [2],
      ('dev', 'loss'): [0, 1], ('dev', 'accuracy'): [0], ('dev', 'f1'): [1],
      ('dev', 'reward'): [2]}


def test_a_run_that_goes_on_is_not_finished(tmp_path, capsys):
  record(tmp_path / 'a')
  config = json.loads((tmp_path / 'a/config.json').read_text())
  (tmp_path / 'a/config.json').write_text(json.dumps(config | {'steps': 40}))
  markdown, _ = made(tmp_path, capsys, tmp_path / 'a')
  assert 'step 20 of 40' in rows_of(markdown)[0]['state']


@pytest.mark.parametrize('name', ['missing', 'empty', 'model'])
def test_what_is_not_a_run(name, tmp_path):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'model').mkdir()
  (tmp_path / 'model/config.json').write_text('{"model_type": "llama"}')
  record(tmp_path / 'a')
  with pytest.raises(InputError, match=name):
    report.write([str(tmp_path / 'a'), str(tmp_path / name)],
                 str(tmp_path / 'out'))
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_runs_as_train_leaves_them(tiny_dir, reviews_file, tmp_path, capsys):
  for name, changes in (('mezo', {}), ('zero', {'method': 'zero_shot'})):
    result = train.run(runs.small_config(
        tiny_dir, reviews_file, **changes), tmp_path / name)
    if name == 'mezo':
      wanted = result
  markdown, page = made(tmp_path, capsys, tmp_path / 'mezo', tmp_path / 'zero')
  mezo, zero = rows_of(markdown)
  assert mezo['state'] == 'finished' and zero['state'] == 'baseline'
  assert mezo['test'] == f'{100 * wanted["final"]["accuracy"]:.1f}'
  assert mezo['best step'] == str(wanted['final']['step']) and mezo['dev']
  assert page.images == 3
